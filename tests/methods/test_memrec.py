"""MEM-REC: against plain loops over ids and hashes."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, PoolingType

from tests.cases import NUM_ROWS, batch, counts, fresh, rows, table
from tests.tolerances import assert_trains_alike
from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from torchrec_compress.methods import MemRecConfig, TableData
from torchrec_compress.ops import hash_ids, stable_salt

IDS = torch.arange(NUM_ROWS)
WAYS = [MemRecConfig(num_tokens=40, num_hashes=k, num_weights=90, num_weight_hashes=w) for k in (1, 3) for w in (1, 2)]
every = pytest.mark.parametrize("config", WAYS, ids=[f"{w.num_hashes}-{w.num_weight_hashes}" for w in WAYS])


def native(collection, name: str = "item") -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and weights: one table each, however many ways into them."""
    stored = dict(collection._native_weights(name))
    tokens = {id(value): value for part, value in stored.items() if part.startswith("token")}
    weights = {id(value): value for part, value in stored.items() if part.startswith("weight")}
    assert len(tokens) == len(weights) == 1
    return next(iter(tokens.values())), next(iter(weights.values()))


def pick(number: int, size: int, of: str) -> int:
    return int(hash_ids(torch.tensor([number]), size, stable_salt(0, of)))


def row_of(config: MemRecConfig, tokens, weights, number: int, name: str = "item") -> torch.Tensor:
    scale = sum(
        weights[pick(number, len(weights), f"{name}:weight {j}"), pick(number, 4, f"{name}:lane {j}")]
        for j in range(config.num_weight_hashes)
    )
    return scale * sum(tokens[pick(number, len(tokens), f"{name}:token {j}")] for j in range(config.num_hashes))


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


def test_all_tables_share_both_and_hash_otherwise():
    config = MemRecConfig(num_tokens=100, num_weights=30)
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=size, embedding_dim=16, feature_names=[name])
        for name, size in (("user", 900), ("item", 400))
    ]
    ours = CompressedEmbeddingBagCollection(tables, compression=config)
    assert native(ours, "user")[0] is native(ours, "item")[0] and native(ours, "user")[1] is native(ours, "item")[1]
    assert ours.footprint().total_bytes == 4 * (100 * 16 + 32)
    assert not torch.equal(ours.table_rows("user", IDS[:400]), ours.table_rows("item", IDS[:400]))
    for name in ("user", "item"):
        expected = torch.stack([row_of(config, *native(ours), number, name) for number in range(9)])
        torch.testing.assert_close(ours.table_rows(name, IDS[:9]), expected)
    with pytest.raises(ValueError, match="are shared with other tables, which a fit of one must not overwrite"):
        ours.load_table("item", config.fit(tables[1], TableData(torch.randn(400, 16))))


@every
def test_it_starts_with_the_spread_of_its_tokens(config):
    start = fresh(MemRecConfig(num_tokens=300, num_hashes=config.num_hashes, bound=0.3)).table_rows("item", IDS)
    assert float(start.detach().std()) == pytest.approx(0.3 / 3**0.5, rel=0.15)
    one, other = (native(fresh(config, seed=seed))[0] for seed in (0, 1))
    assert torch.equal(one, native(fresh(config))[0]) and not torch.equal(one, other)
    assert [part.decay for part in config.parts(table(), 0).rows].count(False) == config.num_weight_hashes


@every
def test_each_round_of_a_fit_is_nearer_as_look_ups_count(config, monkeypatch):
    config, errors = dataclasses.replace(config, memory=None), []
    for rounds in (1, 6):
        monkeypatch.setattr("torchrec_compress.methods.memrec._FIT_ROUNDS", rounds)
        collection = fresh(config)
        collection.load_table("item", config.fit(table(), TableData(rows(), counts())))
        left = (collection.table_rows("item", IDS) - rows()).detach().square().sum(1)
        errors.append(float(left @ counts().float()))
    nothing = float(rows().square().sum(1) @ counts().float())
    assert errors[1] < errors[0] < nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "num_tokens must be at least 1"),
        ({"num_tokens": 9, "num_weights": 0}, "num_weights must be at least 1"),
        ({"num_tokens": 9, "num_hashes": 17}, r"num_hashes must be in \[1, 16\]"),
        ({"num_tokens": 9, "num_weight_hashes": 0}, r"num_weight_hashes must be in \[1, 16\]"),
        ({"num_tokens": 9, "memory": 3}, "memory must be a name or None"),
        ({"num_tokens": 9, "bound": -1.0}, "bound must be in"),
    ],
)
def test_bad_settings_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        fresh(MemRecConfig(**options))


def test_tables_that_share_must_not_say_how_they_start():
    with pytest.raises(ValueError, match="must not say how it starts"):
        fresh(WAYS[0], init_fn=lambda weight: nn.init.uniform_(weight, -0.3, 0.3))
