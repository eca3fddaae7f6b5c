"""Codes of rows of fewer numbers than the embedding, and one projection behind the pooling."""

from dataclasses import replace

import pytest
import torch

from tests.cases import DIM, NUM_ROWS, batch, counts, dense_collection, fit, fresh, rows, table
from torchrec_compress import compress, decompress
from torchrec_compress.methods import NarrowConfig, PQConfig, QuantileCodesConfig, RandomCodesConfig, TableData
from torchrec_compress.methods.width import learn_directions
from torchrec_compress.ops import dequantize_rows, quantize_rows

PQ = PQConfig(num_codes=2, codebook_size=32, structure="residual", popularity="count")


def served(collection):
    return decompress(collection).embedding_bags["item"].weight.detach()


def low_rank(rank: int) -> torch.Tensor:
    """Return rows of this rank, which a narrow table of that width served."""
    narrow = compress(dense_collection(), NarrowConfig(width=rank), counts={"item": counts()})
    return served(narrow)


@pytest.mark.parametrize("structure", ["product", "residual"])
def test_rows_of_that_rank_lose_nothing_by_the_projection(structure):
    """Codewords for all of 30 distinct rows, of rank 8: served as they are."""
    distinct, stock = low_rank(8)[:30], dense_collection()
    with torch.no_grad():
        stock.embedding_bags["item"].weight.copy_(distinct[torch.arange(NUM_ROWS) % 30])
    config = PQConfig(num_codes=1, codebook_size=30, structure=structure, width=8)
    got = served(compress(stock, config))
    torch.testing.assert_close(got, stock.embedding_bags["item"].weight, rtol=1e-4, atol=1e-4)


def test_codes_of_a_low_rank_table_lose_no_more_than_codes_of_its_whole_rows():
    trained, seen = low_rank(8), counts().clamp(min=1e-3)[:, None]
    errors = []
    for config in (PQ, replace(PQ, width=8)):
        state = config.fit(table(), TableData(trained, counts()))
        bank = config.decoder(table(), None)
        assert state.codes is not None
        bank.load_state_dict(state.decoder)
        got = bank(torch.arange(NUM_ROWS), None, None, state.codes, []).detach()
        errors.append(float(((got - trained).square() * seen).sum()))
    assert errors[1] <= 1.1 * errors[0]


@pytest.mark.parametrize("hot_dtype", ["fp32", "int8", "int4"])
def test_hot_rows_are_stored_in_the_width(hot_dtype):
    config = replace(PQ, width=8, num_hot_rows=40, hot_dtype=hot_dtype)
    state = config.fit(table(), TableData(rows(), counts()))
    projection = state.decoder["projection"]
    torch.testing.assert_close(projection @ projection.T, DIM / 8 * torch.eye(8), rtol=0, atol=1e-5)
    hot = config.hot_ids(table(), TableData(None, counts()))
    expected = learn_directions(table(), TableData(rows(), counts()), 8).narrow(rows())[hot]
    torch.testing.assert_close(expected, rows()[hot] @ projection.T / (DIM / 8), rtol=1e-5, atol=1e-5)
    if hot_dtype != "fp32":
        expected = dequantize_rows(quantize_rows(expected, hot_dtype), hot_dtype)
    torch.testing.assert_close(served(fit(config))[hot], expected @ projection, rtol=1e-5, atol=1e-5)


def test_a_loss_that_feels_nothing_of_the_width_is_squared_error(caplog):
    """Else the metric would be of rounding."""
    felt = torch.randn(DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    felt /= felt.norm()
    flat = (rows().double() - torch.outer(rows().double() @ felt, felt)).float()
    config, data = replace(PQ, width=8), TableData(flat, counts(), curvature=torch.outer(felt, felt))
    directions = learn_directions(table(), data, 8)
    state = config.fit(table(), data)
    expected = config.coded(table())
    bare = TableData(directions.narrow(flat), counts())
    assert "feels nothing of their width" in caplog.text
    torch.testing.assert_close(
        state.decoder["codebooks"], replace(PQ, width=None).fit(expected, bare).decoder["codebooks"]
    )


@pytest.mark.parametrize("hot_dtype", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("width", [8, None])
def test_rows_served_as_hot_are_those_of_a_fit(hot_dtype, width):
    data = TableData(rows(), counts())
    config = replace(PQ, width=width, num_hot_rows=40, hot_dtype=hot_dtype)
    hot = config.hot_ids(table(), data)
    torch.testing.assert_close(config.serve_hot(table(), data)[hot], served(fit(config))[hot], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("structure", ["product", "residual"])
def test_an_untrained_row_has_the_spread_of_the_users_table(structure):
    config = RandomCodesConfig(num_codes=4, codebook_size=64, structure=structure, width=16)
    untrained = served(fresh(config, embedding_dim=64, weight_init_min=-0.3, weight_init_max=0.3))
    assert float(untrained.square().mean().sqrt()) == pytest.approx(0.3 / 3**0.5, rel=0.1)


def test_quantile_codes_without_rows_keep_the_projection_that_was_drawn():
    config = QuantileCodesConfig(num_codes=2, codebook_size=16, width=8)
    state = config.fit(table(), TableData(None, contexts=(torch.arange(NUM_ROWS), torch.arange(NUM_ROWS) % 9)))
    assert state.decoder.keys() == {"codebooks"}
    collection = fresh(config)
    collection.load_table("item", state)
    projection = collection.decoder.banks["item"].projection
    torch.testing.assert_close(projection @ projection.T, DIM / 8 * torch.eye(8), rtol=0, atol=1e-5)


def test_projection_and_codebooks_train():
    collection = fresh(replace(PQ, width=8))
    collection(batch([[3, 5], [5], []]))["item"].square().sum().backward()
    bank = collection.decoder.banks["item"]
    assert all(bool(value.grad.abs().sum() > 0) for value in (bank.codebooks, bank.projection))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(PQ, width=5), r"a multiple of 4 in \[4, 12\], with residual codes .* 16, got 5; the nearest is 4"),
        (replace(PQ, width=16), "got 16; the nearest is 12"),
        (replace(PQ, width=-4), "got -4; the nearest is 4"),
        (
            PQConfig(num_codes=3, codebook_size=16, width=8),
            r"a multiple of 12 in \[12, 12\], with num_codes=3 side by side .* got 8; the nearest is 12",
        ),
        (
            PQConfig(num_codes=5, codebook_size=16, width=10),
            "a multiple of 20 below its embedding_dim, 16, with num_codes=5 side by side, got 10 and there is none",
        ),
    ],
)
def test_a_width_that_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=f"table 'item': width must be .*{message}"):
        config.check(table())
    with pytest.raises(ValueError, match="table 'item': width must be"):
        fresh(config)


def test_low_bit_hot_rows_have_the_width_that_is_checked():
    config = PQConfig(num_codes=3, codebook_size=16, structure="residual", width=4, num_hot_rows=9, hot_dtype="int4")
    config.check(table(embedding_dim=6))  # of 6 numbers, int4 rows could not be


def test_bytes():
    whole = replace(PQ, codebook_size=64)
    narrow = replace(whole, width=4)
    stored = NUM_ROWS * 2 + 4
    assert whole.stored_bytes(table()) == stored + 4 * 2 * 64 * DIM
    assert narrow.stored_bytes(table()) == stored + 4 * (2 * 64 * 4 + 4 * DIM)
    product = replace(narrow, structure="product", num_hot_rows=9)
    assert product.stored_bytes(table()) == stored + 4 * (64 * 4 + 4 * DIM) + 9 * (4 + 4)
    for config in (whole, narrow, product):
        assert fresh(config).footprint().total_bytes == config.stored_bytes(table())
