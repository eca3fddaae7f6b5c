"""Sharded collections against unsharded ones: bit-equal forward, equal training, equal state."""

import copy

import pytest
import torch
import torch.distributed as dist
from torchrec import EmbeddingConfig, PoolingType
from torchrec.distributed.shard import shard_modules
from torchrec.distributed.types import ShardedModule

from tests.cases import CONFIGS, IDS, NUM_ROWS, fit, steps_itself, table
from tests.modules import batches
from tests.sharding.models import RATE, Model, local_state, loss_of, make_plan, optimizer_of, shard, whole_state
from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, get_default_sharders
from torchrec_compress.methods import MECConfig, MEmComConfig, MethodConfig, PQConfig, RandomCodesConfig
from torchrec_compress.ops import NOT_SUMMED

KINDS = ["row_wise", "table_wise", "data_parallel"]
STEPS = 3
SCALED = ("hash_embeddings", "memcom", "memrec", "robe")


def one_table(config: MethodConfig) -> Model:
    torch.manual_seed(0)
    return Model(fit(config))


def mixed(pooling: PoolingType, weighted: bool) -> Model:
    torch.manual_seed(0)
    return Model(batches.collection(pooling=pooling, is_weighted=weighted))


def unpooled(config: MethodConfig) -> Model:
    torch.manual_seed(0)
    tables = [
        EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=8, feature_names=features)
        for name, rows, features in (("user", 400, ["u", "u2"]), ("item", 300, ["i"]))
    ]
    return Model(CompressedEmbeddingCollection(tables, compression=config))


def draw(kind: str, step: int, rank: int, keys: list[str], ranges: dict[str, int], weighted: bool):
    """Return one rank's batch: plain, all empty, empty on rank 1, or uneven over the ranks; int32 or int64 ids."""
    seeded = torch.Generator().manual_seed(1000 * step + rank)
    num_bags = 3 + rank if kind == "uneven" else 4
    longest = {"empty": 1, "rank 1 empty": 1 if rank == 1 else 4}.get(kind, 4)
    lengths = torch.randint(0, longest, (len(keys) * num_bags,), generator=seeded)
    per_key = lengths.view(len(keys), num_bags).sum(1).tolist()
    ids = [torch.randint(0, ranges[key], (n,), generator=seeded) for key, n in zip(keys, per_key, strict=True)]
    values = torch.cat(ids).to(torch.int32 if kind == "int32" else torch.int64)
    weights = torch.randn(len(values), generator=seeded) if weighted else None
    return batches.KeyedJaggedTensor.from_lengths_sync(keys, values, lengths.to(values.dtype), weights)


def compare_with_unsharded(
    make, arguments, how: str, kind: str, keys: list[str], ranges: dict[str, int], weighted: bool
):
    """Train both, on every rank; return the largest difference of outputs and the states."""
    plain = make(*arguments)
    sharded = shard(copy.deepcopy(plain), how)
    rank, world = dist.get_rank(), dist.get_world_size()
    ours, theirs = optimizer_of(sharded), torch.optim.SGD(plain.parameters(), lr=RATE)
    first = None
    for step in range(STEPS):
        drawn = [draw(kind, step, r, keys, ranges, weighted) for r in range(world)]
        with torch.no_grad():
            gap = (sharded(drawn[rank]) - plain(drawn[rank])).abs()
            first = float(gap.max()) if first is None and len(gap) else first
        ours.zero_grad()
        theirs.zero_grad()
        loss_of(sharded, drawn[rank]).backward()
        (sum(loss_of(plain, features) for features in drawn) / world).backward()
        ours.step()
        theirs.step()
    return first or 0.0, local_state(sharded), plain.state_dict()


def check(results, allowed: float = 0.0) -> None:
    """Forward bit-equal before training; all values equal after it.

    Where TorchRec pools a table on several ranks (row-wise bags), it adds in another order, and rows that are scaled
    by numbers of their ids (`SCALED`), whole on a rank, multiplied and added in one rounding: `allowed` is for that.
    """
    expected = results[0][2]
    got = whole_state([state for _, state, _ in results], expected)
    assert all(gap <= allowed for gap, _, _ in results), [gap for gap, _, _ in results]
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


# what changes rows other than by gradient is held against tests/managers/test_contract.py
TRAINED = [(config, name) for config, name in zip(CONFIGS, IDS, strict=True) if not steps_itself(config)]


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("config", [config for config, _ in TRAINED], ids=[name for _, name in TRAINED])
def test_every_method_trains_as_unsharded(two_ranks, config, how):
    ranges = {"item": NUM_ROWS}
    results = two_ranks.run(compare_with_unsharded, one_table, (config,), how, "plain", ["item"], ranges, False)
    check(results, allowed=1e-6 if config.parts(table(), 0).bags or config.method in SCALED else 0.0)


@pytest.mark.parametrize("how", [*KINDS, "in turn"])
@pytest.mark.parametrize("kind", ["plain", "uneven", "empty", "rank 1 empty", "int32"])
def test_a_mixed_collection_trains_as_unsharded(two_ranks, kind, how):
    arguments = (PoolingType.SUM, True)
    check(two_ranks.run(compare_with_unsharded, mixed, arguments, how, kind, batches.KEYS, batches.ROWS, True), 1e-5)


@pytest.mark.parametrize("how", KINDS)
def test_mean_pooling_on_four_ranks(four_ranks, how):
    arguments = (PoolingType.MEAN, False)
    results = four_ranks.run(compare_with_unsharded, mixed, arguments, how, "uneven", batches.KEYS, batches.ROWS, False)
    check(results, allowed=1e-5)


@pytest.mark.parametrize("how", [*KINDS, "in turn"])
@pytest.mark.parametrize("config", [PQConfig(num_codes=4, codebook_size=16), MEmComConfig(num_buckets=30, bias=True)])
def test_unpooled_collections_train_as_unsharded(two_ranks, config, how):
    check(
        two_ranks.run(compare_with_unsharded, unpooled, (config,), how, "uneven", ["i", "u", "u2"], batches.ROWS, False)
    )


START = [
    RandomCodesConfig(num_codes=5, codebook_size=16, structure="residual"),  # packed
    PQConfig(num_codes=2, codebook_size=300, num_hot_rows=40),
    MECConfig(num_codes=4, codebook_size=32),
]


def from_meta(config: MethodConfig, how: str) -> dict:
    """Return this rank's part of the state of a collection that was never held whole."""
    meta = CompressedEmbeddingBagCollection([table()], device=torch.device("meta"), compression=config, seed=3)
    return local_state(shard(Model(meta), how))


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("config", START)
def test_shards_made_from_meta_start_with_the_codes_of_their_own_rows(two_ranks, config, how):
    whole = CompressedEmbeddingBagCollection([table()], compression=config, seed=3).state_dict()
    like = {f"embeddings.{name}": value for name, value in whole.items()}
    by_rank = two_ranks.run(from_meta, config, how)
    codes, is_set = (f"embeddings.code_tables.banks.item.{name}" for name in ("codes", "is_set"))
    got = whole_state([{name: state[name] for name in (codes, is_set)} for state in by_rank], like)
    assert torch.equal(got[codes], like[codes])
    assert int(got[is_set]) == NOT_SUMMED  # filled; the ranks add their sums up with the first batch


def by_shard_modules(how: str) -> float:
    """Return the largest gap after `shard_modules`, which is what users of other wrappers call."""
    plain = mixed(PoolingType.SUM, False)
    values = {name: value.clone() for name, value in plain.state_dict().items()}
    features = draw("uneven", 0, dist.get_rank(), batches.KEYS, batches.ROWS, False)
    expected = plain(features).detach()
    sharders = get_default_sharders()
    sharded = shard_modules(plain, device=torch.device("cpu"), plan=make_plan(plain, how, sharders), sharders=sharders)
    for name, module in sharded.named_modules():
        if isinstance(module, ShardedModule):
            module.load_state_dict({k[len(name) + 1 :]: v for k, v in values.items() if k.startswith(f"{name}.")})
    return float((sharded(features) - expected).abs().max())


@pytest.mark.parametrize("how", KINDS)
def test_shard_modules(two_ranks, how):
    assert max(two_ranks.run(by_shard_modules, how)) < 1e-5
