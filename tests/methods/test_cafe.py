"""Rows of hot and cold ids narrower than the embedding, and one projection behind the pooling."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchrec import EmbeddingBagConfig, EmbeddingConfig, PoolingType

from tests.cases import DIM, NUM_ROWS, batch, counts, dense_collection, fresh, rows, table
from torchrec_compress import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    after_step,
    compress,
    decompress,
)
from torchrec_compress.compression import sized
from torchrec_compress.methods import CafeConfig, NarrowConfig, TableData
from torchrec_compress.methods.cafe import ManagedRowsDecoder
from torchrec_compress.methods.width import learn_directions
from torchrec_compress.ops import pool_rows

WHOLE = CafeConfig(num_hot_rows=24, num_cold_rows=40, num_blocks=4, decay=1.0)
NARROW = replace(WHOLE, width=8)
BAGS, WEIGHTS = [[1, 1, 7], [], [402, 1], [5]], [0.5, 2.0, -1.0, 3.0, 1.5, 0.25]


def served(config: CafeConfig, data: TableData) -> Tensor:
    """Return the rows that a fit serves, (N, D)."""
    collection = fresh(config)
    collection.load_table("item", config.fit(table(), data))
    return collection.table_rows("item", torch.arange(NUM_ROWS)).detach()


def stored(model: CompressedEmbeddingBagCollection) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, projection and, by id, the row that it reads."""
    (config,) = model.managed.configs()
    places = config.part.blocks.places(torch.arange(NUM_ROWS))
    read = model.managed.managers["item"].remap(places, train=False)[:, 0]
    return model.managed.native["item"].embeddings["item__rows"].weight, model.decoder.banks["item"].projection, read


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_a_fit_is_that_of_whole_rows_in_the_directions_of_narrow_ones(rate, metric):
    """Projections and means of shared rows commute."""
    seeded = torch.randn(DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    data = TableData(rows(), counts(), curvature=seeded @ seeded.T if metric else None)
    directions = learn_directions(table(), data, 8)
    expected = served(WHOLE, data) @ directions.encode @ directions.matrix
    torch.testing.assert_close(served(replace(NARROW, rate=rate), data), expected, rtol=1e-5, atol=1e-5)
    projection = replace(NARROW, rate=rate).fit(table(), data).decoder["projection"]
    torch.testing.assert_close(projection @ projection.T, rate**2 * DIM / 8 * torch.eye(8), rtol=0, atol=1e-5)
    assert metric == (not torch.equal(directions.encode, directions.matrix.T))


def test_hot_ids_are_served_as_narrow_rows_of_their_own_are():
    model = compress(dense_collection(), NARROW, counts={"item": counts()})
    hot = stored(model)[2] % 16 < 6
    alone = decompress(compress(dense_collection(), NarrowConfig(width=8), counts={"item": counts()}))
    got = model.table_rows("item", torch.arange(NUM_ROWS)).detach()
    torch.testing.assert_close(got[hot], alone.embedding_bags["item"].weight.detach()[hot], rtol=1e-5, atol=1e-5)
    assert int(hot.sum()) == 24


def test_directions_are_learned_from_a_sample_and_whole_rows_of_no_rows_at_all(monkeypatch):
    asked = []

    def read(ids: Tensor) -> Tensor:
        asked.append(len(ids))
        return rows()[ids]

    data = TableData(None, counts())
    monkeypatch.setattr("torchrec_compress.methods.base.train_size", lambda *_: 100)
    WHOLE.learn_blocks(table(), data, read)
    assert asked == [] and not WHOLE.uses_curvature
    NARROW.learn_blocks(table(), data, read)
    assert asked == [100] and NARROW.uses_curvature


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_embeddings_start_as_wide_as_the_users(rate):
    given = {"num_embeddings": 20_000, "weight_init_min": -0.3, "weight_init_max": 0.3}
    torch.manual_seed(0)
    config = CafeConfig(num_hot_rows=4000, num_cold_rows=2000, num_medium_rows=400, num_blocks=4, width=4, rate=rate)
    model = fresh(config, **given)
    projection = model.decoder.banks["item"].projection
    torch.testing.assert_close(projection @ projection.T, rate**2 * DIM / 4 * torch.eye(4), rtol=0, atol=1e-5)
    got = model.table_rows("item", torch.arange(20_000)).detach()
    assert float(got.square().mean().sqrt()) == pytest.approx(0.3 / 3**0.5, rel=0.05)
    weight = model.managed.native["item"].embeddings["item__rows"].weight.view(4, -1, 4)
    assert not weight[:, 1500:].any() and weight[:, :1500].any(2).all()  # medium rows have no say yet


@pytest.mark.parametrize(
    ("pooling", "weighted"), [(PoolingType.SUM, False), (PoolingType.SUM, True), (PoolingType.MEAN, False)]
)
def test_values_and_gradients_are_those_of_rows_that_are_projected_first(pooling, weighted):
    model = CompressedEmbeddingBagCollection([table(pooling=pooling)], is_weighted=weighted, compression=NARROW)
    weight, projection, read = stored(model)
    out = model(batch(BAGS, WEIGHTS if weighted else None)).values()
    target = torch.randn(len(BAGS), DIM, generator=torch.Generator().manual_seed(0))
    (out * target).sum().backward()
    rows_of, matrix = weight.detach().clone().requires_grad_(), projection.detach().clone().requires_grad_()
    factors = iter(WEIGHTS if weighted else [1.0] * 6)
    bags = [sum((next(factors) * (rows_of[read[number]] @ matrix) for number in bag), torch.zeros(DIM)) for bag in BAGS]
    lengths = torch.tensor([[max(1, len(bag))] for bag in BAGS]) if pooling == PoolingType.MEAN else 1
    expected = torch.stack(bags) / lengths
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    (expected * target).sum().backward()
    torch.testing.assert_close(weight.grad, rows_of.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(projection.grad, matrix.grad, rtol=1e-5, atol=1e-6)


def test_unpooled_rows_are_projected_one_by_one():
    item = EmbeddingConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=DIM, feature_names=["item"])
    model = CompressedEmbeddingCollection([item], compression=NARROW)
    weight, projection, read = stored(model)
    found = model(batch(BAGS))["item"].values()
    torch.testing.assert_close(found, (weight @ projection)[read[[1, 1, 7, 402, 1, 5]]], rtol=1e-5, atol=1e-6)


def test_an_id_scores_by_what_its_row_feels_of_the_gradient():
    """Its length in the directions of the projection, over the mean of its block."""
    model = fresh(NARROW)
    projection = model.decoder.banks["item"].projection.detach().clone()
    gradients = torch.randn(2, DIM, generator=torch.Generator().manual_seed(1))
    (model(batch([[4], [8]])).values() * gradients).sum().backward()  # of one block
    after_step(model, 0, torch.optim.SGD(model.parameters(), lr=0.1))
    felt = (gradients @ projection.T).norm(dim=1)
    found = model.managed.managers["item"].sketch.find(torch.tensor([1, 2]))
    torch.testing.assert_close(found.score, felt / felt.mean(), rtol=1e-5, atol=0)


def test_bytes_and_budgets():
    sketch = 24 * 4 * 12 + 24 * 4 + 4 * 8
    assert WHOLE.stored_bytes(table()) == 64 * DIM * 4 + sketch
    assert NARROW.stored_bytes(table()) == 64 * 8 * 4 + sketch + 8 * DIM * 4
    assert NARROW.served_bytes(table()) == 64 * 8 * 4 + 96 * 8 + 8 * DIM * 4
    made = fresh(NARROW).footprint().tables["item"]
    assert (made.native_bytes, made.decoder_bytes, made.managed_bytes) == (64 * 8 * 4, 8 * DIM * 4, sketch)
    wide = EmbeddingBagConfig(name="user", num_embeddings=50_000, embedding_dim=64, feature_names=["user"])
    budget = 50_000 * 64 * 4 // 20
    config = CafeConfig(num_hot_rows=32, num_cold_rows=16, width=8, rate=0.2, importance="frequency")
    chosen = sized([wide], config, budget)["user"]
    assert isinstance(chosen, CafeConfig)
    assert (chosen.width, chosen.rate, chosen.importance) == (8, 0.2, "frequency")
    assert 0.95 * budget < chosen.stored_bytes(wide) <= budget
    alike = sized([wide], replace(config, width=None, rate=1.0), budget)["user"]
    assert isinstance(alike, CafeConfig) and chosen.num_hot_rows > 3 * alike.num_hot_rows


@pytest.mark.parametrize(
    ("width", "dim", "message"),
    [
        (5, DIM, r"width must be a multiple of 4 in \[4, 12\], with method 'cafe' .* 16, got 5; the nearest is 4"),
        (16, DIM, "got 16; the nearest is 12"),
        (0, DIM, "got 0; the nearest is 4"),
        (4, 4, "below its embedding_dim, 4, with method 'cafe', got 4 and there is none; leave width out"),
    ],
)
def test_a_width_that_no_kernel_takes_or_that_saves_nothing_is_refused(width, dim, message):
    with pytest.raises(ValueError, match=f"table 'item': .*{message}"):
        fresh(replace(NARROW, width=width), embedding_dim=dim)


def test_embeddings_of_a_width_may_be_of_any_number():
    model = fresh(NARROW, embedding_dim=14)
    assert model(batch(BAGS)).values().shape == (4, 14)


def test_rows_that_come_back_in_half_precision_are_projected_in_float32():
    bank = ManagedRowsDecoder(8, DIM, None, 1.0)
    found, offsets = torch.randn(3, 8).bfloat16(), torch.tensor([0, 1, 1, 3])
    pooled = pool_rows(found, offsets, None).float()
    bags = bank(torch.arange(3), offsets, None, None, [found])
    assert bags.dtype == torch.float32 and torch.equal(bags, pooled @ bank.projection)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0, "width": 8}, r"cafe: rate must be in \[0.001, 1000\], got 0.0"),
        ({"rate": 9e-4, "width": 8}, r"cafe: rate must be in \[0.001, 1000\], got 0.0009"),
        ({"rate": 1001.0, "width": 8}, r"cafe: rate must be in \[0.001, 1000\], got 1001.0"),
        ({"rate": 0.5}, "cafe: rate must be left out without a width, as there is no projection then, got 0.5"),
        ({"width": 8.0}, r"CafeConfig\.width: must be int or null, got 8.0"),
    ],
)
def test_rates_that_do_nothing_or_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(WHOLE, **options)
