"""DPQ: against plain loops over ids and slices, in a look-up and in a training."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed.planner import Topology

from tests.cases import DIM, NUM_ROWS, batch, counts, dense_collection, fit, fresh, rows, table
from tests.tolerances import assert_trains_alike
from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, compress, export_codes
from torchrec_compress.compression import resolve
from torchrec_compress.methods import DPQConfig, PQConfig, TableData
from torchrec_compress.planner import EmbeddingShardingPlanner

IDS = torch.arange(NUM_ROWS)
WAYS = [DPQConfig(num_codes=m, codebook_size=k, bound=0.5) for m, k in ((1, 9), (4, 20), (2, 300))]
every = pytest.mark.parametrize("config", WAYS, ids=[f"{w.num_codes}-{w.codebook_size}" for w in WAYS])


def stored(collection: Any, name: str = "item") -> tuple[Tensor, Tensor]:
    """Return queries and codewords."""
    ((part, queries),) = collection._native_weights(name)
    assert part == "queries"
    return queries, collection.decoder.banks[name].codewords


def row_of(config: DPQConfig, queries: Tensor, books: Tensor, number: int) -> Tensor:
    """Return an id's row: codewords to the bit in value, queries and codewords in gradient."""
    found = []
    for part, book in zip(queries[number].chunk(config.num_codes), books.chunk(config.num_codes), strict=True):
        word = book[(part.detach().double() - book.detach().double()).square().sum(1).argmin()]
        found.append(word + part - part.detach())
    return torch.cat(found)


@every
@pytest.mark.parametrize("kind", ["sum", "mean", "weighted"])
def test_values_and_gradients_are_those_written_out(config, kind):
    pooling = PoolingType.MEAN if kind == "mean" else PoolingType.SUM
    ours = CompressedEmbeddingBagCollection(
        [table(pooling=pooling)], is_weighted=kind == "weighted", compression=config
    )
    with torch.no_grad():
        stored(ours)[0].normal_(std=0.3)
    leaves = [weight.detach().clone().requires_grad_() for weight in stored(ours)]
    features = batch([[1, 2, 2], [], [402, 0], [7], []])
    factors = torch.randn(6, requires_grad=True) if kind == "weighted" else None
    if factors is not None:
        features = KeyedJaggedTensor(["item"], features.values(), factors, features.lengths())
    expected = []
    for first, last in pairwise(features.offsets().tolist()):
        total = torch.zeros(DIM)
        for place in range(first, last):
            row = row_of(config, leaves[0], leaves[1], int(features.values()[place]))
            total = total + (row if factors is None else row * factors[place])
        expected.append(total / max(last - first, 1) if kind == "mean" else total)
    wanted = [] if factors is None else [factors]
    got = ours(features).values()
    assert_trains_alike(got, torch.stack(expected), [*stored(ours), *wanted], [*leaves, *wanted])


@every
def test_unpooled_rows_are_the_same_and_codewords_to_the_bit(config):
    tables = [EmbeddingConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=DIM, feature_names=["item"])]
    ours = CompressedEmbeddingCollection(tables, compression=config)
    with torch.no_grad():
        stored(ours)[0].normal_(std=0.3)
    found = ours(batch([IDS.tolist()]))["item"].values()
    queries, books = (each.detach() for each in stored(ours))
    assert torch.equal(found, ours.table_rows("item", IDS))
    torch.testing.assert_close(found, torch.stack([row_of(config, queries, books, number) for number in IDS.tolist()]))
    for part, book in zip(found.chunk(config.num_codes, 1), books.chunk(config.num_codes), strict=True):
        assert len(torch.cat([part, book]).unique(dim=0)) == len(book.unique(dim=0))


def test_a_training_is_that_of_the_loops_while_codes_change():
    config, target = DPQConfig(num_codes=2, codebook_size=20, bound=0.5), rows()
    ours = fresh(config)
    mine = [weight.detach().clone().requires_grad_() for weight in stored(ours)]
    before = export_codes(ours).table_state("item").codes
    optimizers = [torch.optim.SGD(each, lr=0.2) for each in (ours.parameters(), mine)]
    seeded = torch.Generator().manual_seed(0)
    for _ in range(12):
        ids = torch.randint(NUM_ROWS, (30,), generator=seeded)
        served = ours(batch([[number] for number in ids.tolist()])).values()
        expected = torch.stack([row_of(config, mine[0], mine[1], number) for number in ids.tolist()])
        torch.testing.assert_close(served, expected, rtol=1e-5, atol=1e-5)
        for found, optimizer in zip((served, expected), optimizers, strict=True):
            optimizer.zero_grad()
            (found - target[ids]).square().sum().backward()
            optimizer.step()
    for one, other in zip(stored(ours), mine, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert float((export_codes(ours).table_state("item").codes != before).float().mean()) > 0.1


def test_codewords_start_in_their_bound_or_like_the_table():
    for config, spread in ((DPQConfig(num_codes=4, bound=0.3), 0.3), (DPQConfig(num_codes=4), NUM_ROWS**-0.5)):
        queries, books = stored(fresh(config))
        assert float(books.detach().abs().max()) == pytest.approx(spread, rel=0.05)
        assert float(queries.detach().abs().max()) == pytest.approx(NUM_ROWS**-0.5, rel=0.05)
    assert [part.decay for part in DPQConfig(num_codes=4).parts(table(), 0).native] == [False]
    own = fresh(DPQConfig(num_codes=4), init_fn=torch.nn.init.ones_)
    assert all(bool((each == 1).all()) for each in stored(own))


def test_a_fit_keeps_rows_and_clusters_as_pq_does():
    ours = fit(DPQConfig(num_codes=4, codebook_size=16))
    assert torch.equal(stored(ours)[0], rows())
    pq = compress(dense_collection(), PQConfig(num_codes=4, codebook_size=16, popularity="count"), counts=given())
    assert torch.equal(stored(ours)[1], pq.decoder.banks["item"].codebooks)
    assert torch.equal(ours.table_rows("item", IDS), pq.table_rows("item", IDS))


def given() -> dict[str, Tensor]:
    return {"item": counts()}


@every
def test_bytes_of_training_and_of_serving_are_both_told(config):
    ours, pq = fresh(config), config.exported()
    footprint = ours.footprint()
    assert footprint.total_bytes == 4 * (NUM_ROWS + config.codebook_size) * DIM == config.stored_bytes(table())
    assert footprint.total_bytes > footprint.dense_bytes and footprint.ratio < 1
    assert footprint.served_bytes == config.served_bytes(table()) == pq.stored_bytes(table())
    assert footprint.served_bytes == export_codes(ours).footprint().total_bytes
    planner = EmbeddingShardingPlanner(Topology(world_size=2, compute_device="cpu"), 4, stats=[])
    planner.plan(torch.nn.Sequential(ours))
    (planned,) = planner.report.tables.values()
    assert (planned.stored_bytes, planned.served_bytes) == (footprint.total_bytes, footprint.served_bytes)


def test_a_table_is_left_dense_where_what_is_served_would_save_nothing():
    def chosen(num_rows: int) -> str:
        of = EmbeddingBagConfig(name="a", num_embeddings=num_rows, embedding_dim=8, feature_names=["a"])
        return resolve([of], DPQConfig(num_codes=2, codebook_size=64))["a"].method

    least = next(n for n in range(64, 99) if 2 * n + 4 + 64 * 8 * 4 < 32 * n)
    assert [chosen(n) for n in (9, least - 1, least)] == ["dense", "dense", "dpq"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codes": 0}, "dpq: num_codes must be at least 1, got 0; the nearest is 1"),
        ({"num_codes": 5}, r"table 'item': num_codes must divide embedding_dim = 16, got 5; the nearest is 4"),
        ({"num_codes": 40}, r"table 'item': num_codes must divide embedding_dim = 16, got 40; the nearest is 16"),
        ({"num_codes": 4, "codebook_size": 1}, r"dpq: codebook_size must be in \[2, 32768\], got 1; the nearest is 2"),
        ({"num_codes": 4, "codebook_size": 10**5}, r"got 100000; the nearest is 32768"),
        ({"num_codes": 4, "bound": 0.0}, "dpq: bound must be above 0 and at most 1000, got 0.0; leave it out"),
        ({"num_codes": 4, "bound": float("nan")}, "DPQConfig.bound: must be finite, got nan"),
        ({"num_codes": 4, "bound": "wide"}, "DPQConfig.bound: must be"),
    ],
)
def test_bad_settings_are_told_with_what_works(options, message):
    with pytest.raises(ValueError, match=message):
        fresh(DPQConfig(**options))


def test_too_many_codewords_for_a_fit_are_told():
    config = DPQConfig(num_codes=4, codebook_size=500)
    assert fresh(config).methods()["item"].method == "dense"  # too few rows for any method of codes
    with pytest.raises(ValueError, match=r"table 'item': codebook_size must be in \[2, 403\] \(its rows\), got 500"):
        config.check(table())
    with pytest.raises(ValueError, match="table 'item': this method must be fitted to a pre-trained table, got none"):
        DPQConfig(num_codes=4).learn(table(), TableData(None))
