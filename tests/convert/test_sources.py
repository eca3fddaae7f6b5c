"""`compress` of a collection that is compressed already: its rows are read block by block."""

import pytest
import torch
from torchrec import EmbeddingBagConfig, EmbeddingConfig

from tests.cases import CONFIGS, DIM, IDS, NUM_ROWS, batch, contexts, counts, fitted, fresh, table
from tests.made import Made
from torchrec_compress import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    compress,
    compress_into,
    decompress,
)
from torchrec_compress.convert import row_reader
from torchrec_compress.methods import HashConfig, Int8Config, MEmComConfig, NarrowConfig, PQConfig, base

GIVEN = {"counts": {"item": counts()}, "contexts": {"item": contexts()}}
NARROW = NarrowConfig(width=8, bits=8)
MANY, WIDE = 150_000, 32  # more rows than are ever held


def served(collection):
    return decompress(collection).embedding_bags["item"].weight.detach()


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_a_compressed_source_is_fitted_as_its_dense_rows_are(config):
    """A table that is small enough is learned from whole."""
    source = fitted(NARROW)
    expected = compress(decompress(source), config, seed=3, **GIVEN)
    got = compress(source, config, seed=3, **GIVEN)
    assert type(got) is type(expected)
    for (name, one), (_, other) in zip(got.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("source", CONFIGS, ids=IDS)
def test_any_collection_is_a_source_and_is_left_as_it_is(source):
    collection = fitted(source)
    before = {name: value.clone() for name, value in collection.state_dict().items()}
    again = compress(collection, NarrowConfig(width=12), **GIVEN)
    assert again.methods()["item"] == NarrowConfig(width=12)
    assert all(torch.equal(before[name], value) for name, value in collection.state_dict().items())


def test_unpooled_collections_stay_unpooled():
    item = EmbeddingConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=DIM, feature_names=["item"])
    source = CompressedEmbeddingCollection([item], compression=NarrowConfig(width=4), need_indices=True)
    got = compress(source, PQConfig(num_codes=2, codebook_size=64, width=4))
    assert isinstance(got, CompressedEmbeddingCollection) and got.need_indices()
    rows = got(batch([[3, 5]]))["item"].values()
    torch.testing.assert_close(rows, got.table_rows("item", torch.tensor([3, 5])))


def test_a_sample_stands_for_the_whole(monkeypatch):
    """Learned from a quarter of the rows, codes lose little more; every row is encoded."""
    source, config = fitted(NarrowConfig(width=8)), PQConfig(num_codes=4, codebook_size=16, popularity="count", width=8)
    seen = counts().clamp(min=1e-3)[:, None]

    def error():
        got = served(compress(source, config, **GIVEN))
        return float(((got - served(source)).square() * seen).sum() / seen.sum())

    whole = error()
    monkeypatch.setattr(base, "train_size", lambda *_: 100)
    assert whole < error() < 2 * whole
    assert error() < float((served(source).square() * seen).sum() / seen.sum()) / 4


@pytest.mark.parametrize(
    "config",
    [
        PQConfig(num_codes=2, codebook_size=16, structure="residual", width=8, num_hot_rows=50, popularity="count"),
        HashConfig(num_buckets=40),
        Int8Config(),
        NarrowConfig(width=8, bits=4),
    ],
    ids=lambda config: config.method,
)
def test_no_table_of_floats_is_made(config):
    item = EmbeddingBagConfig(name="item", num_embeddings=MANY, embedding_dim=WIDE, feature_names=["item"])
    source = CompressedEmbeddingBagCollection([item], compression=NARROW)
    seen = torch.arange(MANY) % 100
    with Made() as made:
        got = compress(source, config, counts={"item": seen})
    held = 65_536 * WIDE  # a block, or the sample
    # narrow rows in float32 start with blocks of their own; a table of few bits is no float
    assert max(made.floats)[0] <= held < MANY * WIDE / 2, max(made.floats)
    assert got.footprint().total_bytes < 4 * MANY * WIDE / 3


def test_the_count_would_see_a_whole_table():
    source = fresh(NARROW)
    with Made() as made:
        decompress(source)
    assert max(made.floats)[0] >= NUM_ROWS * DIM


def test_what_must_learn_from_all_rows_says_so_before_any_fit(monkeypatch):
    monkeypatch.setattr(base, "train_size", lambda *_: NUM_ROWS - 1)
    tables = [table(name=name, feature_names=[name]) for name in ("a", "b")]
    source = CompressedEmbeddingBagCollection(tables, compression=NARROW)
    read = []
    monkeypatch.setattr(source, "table_rows", lambda name, ids: read.append(name))
    with pytest.raises(ValueError, match=r"table 'b': method 'memcom' must learn from all 403 rows at once, got rows"):
        compress(source, {"a": HashConfig(num_buckets=9), "b": MEmComConfig(num_buckets=9)})
    assert not read


def test_rows_that_are_read_fill_a_collection_in_place():
    source, into = fitted(NARROW), fresh(Int8Config())
    compress_into(into, {"item": row_reader(source, "item")})
    torch.testing.assert_close(served(into), served(source), rtol=0, atol=0.05)


def test_what_is_read_is_checked():
    into = fresh(Int8Config())
    for rows, message in (
        (torch.full((NUM_ROWS, DIM), float("nan")), "pre-trained rows must be finite"),
        (torch.zeros(NUM_ROWS, DIM + 1), "the pre-trained table must be 403 x 16, got .403, 17."),
    ):
        with pytest.raises(ValueError, match=f"table 'item': {message}"):
            compress_into(into, {"item": lambda ids, rows=rows: rows[ids]})
