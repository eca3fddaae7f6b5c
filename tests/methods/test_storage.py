"""What one table may be stored as."""

from dataclasses import replace

import pytest
from torchrec import DataType

from tests.cases import table
from torchrec_compress.methods import CafeConfig, NativePart, Parts
from torchrec_compress.methods.storage import Remap


def test_bytes_of_a_native_part_are_those_of_its_data_type():
    part = NativePart("rows", 10, 8, Remap())
    assert part.num_bytes == 10 * 8 * 4
    assert replace(part, data_type=DataType.FP16).num_bytes == 10 * 8 * 2


@pytest.mark.parametrize("data_type", [DataType.BF16, DataType.INT8])
def test_data_types_that_torchrec_would_change_are_refused(data_type):
    with pytest.raises(
        ValueError, match=rf"native part 'rows': data_type must be FP32 or FP16, .*got {data_type.value}"
    ):
        NativePart("rows", 10, 8, Remap(), data_type=data_type)


def test_managed_rows_are_float32():
    part = CafeConfig(num_hot_rows=8, num_cold_rows=8, num_blocks=2).parts(table(), 0).managed
    with pytest.raises(ValueError, match="managed part 'rows': data_type must be FP32, got FP16"):
        replace(part, rows=replace(part.rows, data_type=DataType.FP16))


def test_managed_rows_are_not_shared():
    part = CafeConfig(num_hot_rows=8, num_cold_rows=8, num_blocks=2).parts(table(), 0).managed
    with pytest.raises(ValueError, match="managed part 'rows': must not be shared, got 'memory'"):
        replace(part, rows=replace(part.rows, shared="memory"))


def test_parts_of_one_table_that_share_are_counted_once():
    part = NativePart("left", 10, 8, Remap(), shared="memory")
    parts = Parts(rows=(part, replace(part, name="right"), NativePart("own", 5, 8, Remap())))
    assert parts.native_bytes == (10 + 5) * 8 * 4
