"""NaN and infinity in what a table is stored as: refused by table and tensor, wherever they come from."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec import DataType

from tests.cases import CONFIGS, IDS, NUM_ROWS, fit, fitted, fresh, rows, table
from torchrec_compress.methods import HashEmbeddingsConfig, Int8Config, MEmComConfig, PQConfig, QRConfig, TableData
from torchrec_compress.methods.learned import LearnedWhole, TableState
from torchrec_compress.ops import quantize_rows

every = pytest.mark.parametrize("config", CONFIGS, ids=IDS)
BAD = pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)


def spoilt(values: Tensor, bad: float) -> Tensor:
    """Return a copy with one bad value in the last row."""
    found = values.detach().clone()
    found.view(len(found), -1)[-1, -1] = bad
    return found


def floats(state: TableState) -> list[tuple[str, str, Tensor]]:
    """Return field, name and values of the floats that a table is stored as."""
    return [
        (field, name, values)
        for field in ("decoder", "native", "managed")
        for name, values in getattr(state, field).items()
        if values.is_floating_point()
    ]


@BAD
@every
def test_a_table_takes_none(config, bad):
    made, state = fresh(config), fitted(config).table_state("item")
    shared = {part.name for part in config.parts(table(), 0).native if part.shared}
    before = {name: value.clone() for name, value in made.state_dict().items()}
    for field, name, values in floats(state):
        if name in shared:
            continue  # what several tables share, no fit of one fills
        wrong: Any = {field: {**getattr(state, field), name: spoilt(values, bad)}}
        with pytest.raises(
            ValueError, match=rf"table 'item', '{name}': values must be finite, .* row {len(values) - 1}"
        ):
            made.load_table("item", dataclasses.replace(state, **wrong))
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


@BAD
@every
def test_a_state_dict_has_none(config, bad):
    made = fresh(config)
    for name, values in (*made.named_parameters(), *made.named_buffers()):  # of buffers, scores of managers
        if not values.numel() or not values.is_floating_point():
            continue
        saved = {**made.state_dict(), name: spoilt(values, bad)}
        with pytest.raises(ValueError, match=rf"{name}: values must be finite, got NaN or infinity in row"):
            made.load_state_dict(saved)
        assert torch.isfinite(values).all()


@BAD
def test_what_was_learned_has_none(bad):
    whole = torch.ones(4, 2)
    for state in (
        TableState(decoder={"codebooks": spoilt(whole, bad)}),
        TableState(decoder={"codebooks": whole, "projection": spoilt(whole, bad)}),
        TableState(native={"scalars": spoilt(whole, bad)}),
    ):
        learned = LearnedWhole(table(num_embeddings=4), state)
        with pytest.raises(
            ValueError, match=r"table 'item': what was learned must be finite, .* row 3 of '(code|pro|sca)"
        ):
            learned.encode_all(None)


@BAD
@pytest.mark.parametrize("name", ["codebooks", "hot_rows"])
def test_scales_of_few_bits_have_none(name, bad):
    config = PQConfig(num_codes=2, codebook_size=32, structure="residual", num_hot_rows=20, codebook_dtype="int8")
    made = fit(dataclasses.replace(config, hot_dtype="int8"))
    state = made.table_state("item")
    wrong = state.decoder[name].clone()
    wrong[7, :4].view(torch.float16)[1] = bad
    with pytest.raises(
        ValueError, match=rf"table 'item', '{name}': scales and biases of rows must be finite, .* row 7"
    ):
        made.load_table("item", dataclasses.replace(state, decoder={**state.decoder, name: wrong}))


@BAD
def test_rows_of_few_bits_have_none(bad):
    made = fresh(Int8Config())
    codes = quantize_rows(rows(), "int8")
    made.load_table("item", TableState(codes=codes))
    codes[NUM_ROWS - 1, :4].view(torch.float16)[0] = bad
    with pytest.raises(
        ValueError, match=r"table 'item', 'codes': scales and biases of rows must be finite, .* row 402"
    ):
        made.load_table("item", TableState(codes=codes))


def test_float32_parts_of_fp16_tables_may_be_large():
    """An id that is rarely looked up and a million times as long as the one that it shares its row with."""
    item = table(num_embeddings=80, data_type=DataType.FP16)
    direction = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    trained = torch.cat([0.01 * direction.expand(40, 16), 1e4 * direction.expand(40, 16)])
    looked_up = torch.cat([torch.full((40,), 10**9), torch.zeros(40, dtype=torch.int64)])
    data = TableData(trained, looked_up)
    state = MEmComConfig(num_buckets=40).fit(item, data)
    assert state.native["scalars"].abs().max() > 65504 and state.native["buckets"].abs().max() < 65504
    for config, name in ((HashEmbeddingsConfig(num_buckets=40), "weights"), (QRConfig(num_buckets=8), None)):
        kept = config.learn(item, data).kept_in_float32
        assert kept == (() if name is None else (name,))
    too_large = TableData(trained * 1e3)
    with pytest.raises(ValueError, match=r"pre-trained values must be in \+-65504 for data_type FP16, .* of 'buckets'"):
        MEmComConfig(num_buckets=40).fit(item, too_large)
