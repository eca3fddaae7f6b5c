"""What sharders check before they shard."""

from __future__ import annotations

import pytest
from torchrec import EmbeddingBagConfig, PoolingType
from torchrec.distributed.types import ParameterSharding

from torchrec_compress.sharding.checks import check_means

MEAN, SUM = PoolingType.MEAN, PoolingType.SUM


def _check(kinds: dict[str, tuple[str, PoolingType]]) -> None:
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=9, embedding_dim=4, feature_names=[name], pooling=pooling)
        for name, (_, pooling) in kinds.items()
    ]
    plan = {name: ParameterSharding(sharding_type=kind, compute_kernel="fused") for name, (kind, _) in kinds.items()}
    check_means("bags", tables, plan)


@pytest.mark.parametrize("cut", ["row_wise", "table_row_wise"])
@pytest.mark.parametrize("other", ["table_wise", "column_wise", "data_parallel", "table_column_wise"])
@pytest.mark.parametrize("pooling", [MEAN, SUM])
def test_cut_means_beside_whole_tables_are_refused(cut, other, pooling):
    with pytest.raises(ValueError, match=r"bags: tables that pool by mean .*, got \['a'\] row-wise and \['b'\] otherw"):
        _check({"a": (cut, MEAN), "b": (other, pooling)})
    _check({"a": (cut, SUM), "b": (other, MEAN)})


def test_all_of_one_kind_may_be_means():
    _check({"a": ("row_wise", MEAN), "b": ("table_row_wise", MEAN)})
    _check({"a": ("table_wise", MEAN), "b": ("column_wise", MEAN)})
