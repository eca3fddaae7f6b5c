"""Hash embeddings: against plain loops over ids and hashes."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, PoolingType

from tests.cases import NUM_ROWS, batch, counts, fit, fresh, rows, table
from tests.tolerances import assert_trains_alike
from torchrec_compress import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    compress,
    native_parameters,
)
from torchrec_compress.methods import HashConfig, HashEmbeddingsConfig, TableData
from torchrec_compress.ops import hash_ids, stable_salt

IDS = torch.arange(NUM_ROWS)
WAYS = [HashEmbeddingsConfig(num_buckets=40, num_hashes=k, num_weights=w) for k in (2, 3, 4, 6) for w in (None, 90)]
every = pytest.mark.parametrize("config", WAYS, ids=[f"{way.num_hashes}-{way.num_weights}" for way in WAYS])


def native(collection) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the vectors and the weights."""
    stored = dict(collection._native_weights("item"))
    weights = stored.pop("weights")
    assert len({id(value) for value in stored.values()}) == 1  # one table, however many ways into it
    return next(iter(stored.values())), weights


def set_of(config: HashEmbeddingsConfig, number: int, num_rows: int, seed: int = 0) -> int:
    """Return which set of weights an id has."""
    if config.num_weights is None:
        return number
    in_row, each = config._sets_in_row, torch.tensor([number])
    row = hash_ids(each, num_rows, stable_salt(seed, "item:weights"))
    return int(row) * in_row + int(hash_ids(each, in_row, 0x1A9E))


def row_of(config: HashEmbeddingsConfig, vectors, weights, number: int) -> torch.Tensor:
    mine = weights.reshape(-1, config.num_hashes)[set_of(config, number, len(weights))]
    hashes = [hash_ids(torch.tensor([number]), 40, stable_salt(0, f"item:{j}")) for j in range(config.num_hashes)]
    return sum(factor * vectors[int(pick)] for factor, pick in zip(mine, hashes, strict=True))


@every
@pytest.mark.parametrize("kind", ["sum", "mean", "weighted"])
def test_values_and_gradients_are_those_written_out(config, kind):
    pooling = PoolingType.MEAN if kind == "mean" else PoolingType.SUM
    ours = CompressedEmbeddingBagCollection(
        [table(pooling=pooling)], is_weighted=kind == "weighted", compression=config
    )
    with torch.no_grad():
        native(ours)[1].normal_()
    leaves = [weight.detach().clone().requires_grad_() for weight in native(ours)]
    features = batch([[1, 2, 2], [], [402, 0], [7], []])
    factors = torch.randn(6, requires_grad=True) if kind == "weighted" else None
    if factors is not None:
        features = KeyedJaggedTensor(["item"], features.values(), factors, features.lengths())
    expected = []
    for first, last in pairwise(features.offsets().tolist()):
        total = torch.zeros(16)
        for place in range(first, last):
            row = row_of(config, *leaves, int(features.values()[place]))
            total = total + (row if factors is None else row * factors[place])
        expected.append(total / max(last - first, 1) if kind == "mean" else total)
    wanted = [] if factors is None else [factors]
    got = ours(features).values()
    assert_trains_alike(got, torch.stack(expected), [*native(ours), *wanted], [*leaves, *wanted])


@every
def test_unpooled_rows_are_the_same(config):
    tables = [EmbeddingConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=["item"])]
    ours = CompressedEmbeddingCollection(tables, compression=config)
    with torch.no_grad():
        native(ours)[1].normal_()
    expected = torch.stack([row_of(config, *native(ours), number) for number in range(NUM_ROWS)])
    torch.testing.assert_close(ours(batch([IDS.tolist()]))["item"].values(), expected)
    torch.testing.assert_close(ours.table_rows("item", IDS), expected)


@every
def test_every_id_has_weights_and_hashed_ones_are_shared_evenly(config):
    _, weights = native(fresh(config))
    sets = torch.tensor([set_of(config, number, len(weights)) for number in range(NUM_ROWS)])
    assert weights.numel() >= (config.num_weights or NUM_ROWS) * config.num_hashes
    assert weights.shape[1] % 4 == 0 and int(sets.max()) < weights.numel() // config.num_hashes
    if config.num_weights is None:
        assert len(sets.unique()) == NUM_ROWS
    else:
        assert int(sets.bincount().max()) < 16 and len(sets.unique()) > 80
    parts = config.parts(table(), 0).rows
    assert [part.decay for part in parts] == [True] * config.num_hashes + [False]


@every
def test_it_starts_with_the_spread_of_the_users_table(config):
    start = fresh(config, init_fn=lambda weight: nn.init.uniform_(weight, -0.3, 0.3))
    assert float(start.table_rows("item", IDS).detach().std()) == pytest.approx(0.3 / 3**0.5, rel=0.15)
    one, other = (native(fresh(config, seed=seed))[0] for seed in (0, 1))
    assert torch.equal(one, native(fresh(config))[0]) and not torch.equal(one, other)


@pytest.mark.parametrize("num_hashes", [2, 3])
def test_rows_of_the_model_are_nearly_found_again(num_hashes):
    """As near as six rounds come: it is no convex problem."""
    config = HashEmbeddingsConfig(num_buckets=40, num_hashes=num_hashes)
    vectors, weights = torch.randn(40, 16), torch.rand(NUM_ROWS, num_hashes) + 0.5
    data = torch.stack([row_of(config, vectors, weights, number) for number in range(NUM_ROWS)])
    collection = fresh(config)
    collection.load_table("item", config.fit(table(), TableData(data)))
    assert (collection.table_rows("item", IDS) - data).square().mean() < 0.15 * data.var()


def test_more_freedom_fits_better():
    def error(config):
        served = fit(config).table_rows("item", IDS).detach()
        return float(((served - rows()).square().sum(1) * counts().clamp(min=1e-3)).sum())

    two = error(HashEmbeddingsConfig(num_buckets=40))
    assert two < error(HashEmbeddingsConfig(num_buckets=40, num_weights=90)) < error(HashConfig(num_buckets=40))
    assert error(HashEmbeddingsConfig(num_buckets=40, num_hashes=4)) < two


def test_a_fit_of_zeros_trains_on():
    state = WAYS[0].fit(table(), TableData(torch.zeros(NUM_ROWS, 16)))
    assert not state.native["vector_0"].any() and bool((state.native["weights"] == 0.5**0.5).all())


def test_bytes():
    assert HashEmbeddingsConfig(num_buckets=40).stored_bytes(table()) == 4 * (40 * 16 + 202 * 4)
    assert HashEmbeddingsConfig(num_buckets=40, num_hashes=3).stored_bytes(table()) == 4 * (40 * 16 + 101 * 12)
    assert HashEmbeddingsConfig(num_buckets=40, num_weights=90).stored_bytes(table()) == 4 * (40 * 16 + 45 * 4)


def test_tables_of_a_collection_have_vectors_of_their_own_and_are_trained_by_native_optimizers():
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=300, embedding_dim=16, feature_names=[name]) for name in "ab"
    ]
    ours = CompressedEmbeddingBagCollection(tables, compression=HashEmbeddingsConfig(num_buckets=40))
    assert [tuple(value.shape) for value in ours.parameters()] == [(40, 16)] * 2 + [(150, 4)] * 2
    assert {id(value) for value in native_parameters(ours)} == {id(value) for value in ours.parameters()}
    assert not ours.blueprint.common("a") and not ours.blueprint.common("b")
    assert ours.footprint().total_bytes == 2 * 4 * (40 * 16 + 150 * 4)
    stock = [EmbeddingBagConfig(name="a", num_embeddings=300, embedding_dim=16, feature_names=["a"])]
    fitted = compress(EmbeddingBagCollection(stock), HashEmbeddingsConfig(num_buckets=40))
    assert all(value.requires_grad for value in fitted.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hashes": 1}, r"num_hashes must be in \[2, 16\], got 1; .*choose the method memcom"),
        ({"num_buckets": 0}, r"table 'item': num_buckets must be in \[1, 403\], got 0"),
        ({"num_weights": 0}, r"table 'item': num_weights must be in \[1, 403\), got 0; leave it out"),
    ],
)
def test_bad_settings_name_what_works(options, message):
    with pytest.raises(ValueError, match=message):
        fresh(HashEmbeddingsConfig(**{"num_buckets": 40, **options}))


def test_a_small_table_stays_dense():
    config = HashEmbeddingsConfig(num_buckets=40, num_weights=50)
    assert fresh(config, num_embeddings=50).methods()["item"].method == "dense"
