"""The optimizer and the codecs that a user gives to TorchRec's sharders reach every native table, or are refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import BaseEmbeddingSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.fused_embeddingbag import FusedEmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import BoundsCheckMode, CacheAlgorithm, CacheParams, ParameterSharding, ShardingEnv
from torchrec.modules.embedding_configs import DataType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.sharding.models import local_state
from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, native_parameters
from torchrec_compress.methods import HashConfig, MEmComConfig, PQConfig
from torchrec_compress.planner import EmbeddingShardingPlanner as OurPlanner
from torchrec_compress.sharding import RemappedEmbeddingBagRowsSharder, compressed_sharders, get_default_sharders

ADAGRAD = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.123, "eps": 1e-3}
ROWS, BUCKETS, DIM, STEPS = 300, 40, 16, 3
KEYS = {"t": "f", "s": "g"}  # one table for each rank: TorchRec's empty ranks know no output_dtype


def codecs() -> dict[str, Any]:
    return get_qcomm_codecs_registry(QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.BF16))


def hashed(pooled: bool) -> Any:
    """Return hashed tables: a native table is the embedding, so a stock one of the same rows trains alike."""
    config, kind = (
        (EmbeddingBagConfig, CompressedEmbeddingBagCollection)
        if pooled
        else (EmbeddingConfig, CompressedEmbeddingCollection)
    )
    tables: Any = [
        config(name=name, num_embeddings=ROWS, embedding_dim=DIM, feature_names=[key]) for name, key in KEYS.items()
    ]
    return kind(tables, compression=HashConfig(num_buckets=BUCKETS))


def stock(pooled: bool) -> Any:
    config, kind = (EmbeddingBagConfig, EmbeddingBagCollection) if pooled else (EmbeddingConfig, EmbeddingCollection)
    tables: Any = [
        config(name=name, num_embeddings=BUCKETS, embedding_dim=DIM, feature_names=[key]) for name, key in KEYS.items()
    ]
    return kind(tables)


def remapped(pooled: bool, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Return the batch with the bucket of every id, as a stock table is looked up."""
    collection = hashed(pooled)
    part = collection.bags if pooled else next(iter(collection.rows.values()))
    ids = [entry.remap(features[entry.feature].values()) for entry in part.remaps]
    return KeyedJaggedTensor(features.keys(), torch.cat(ids), lengths=features.lengths())


def train(tables: Any, pooled: bool, sharders: list[Any], how: str, move: bool = False) -> Any:
    """Train tables of equal values; return the fused learning rates, the outputs and this rank's values."""
    model = nn.ModuleDict({"tables": tables})
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(BUCKETS, DIM, generator=torch.Generator().manual_seed(3)))
    values = {name: value.clone() for name, value in model.state_dict().items()}
    if move:
        model = model.to("cpu")  # as scripts do before they shard; on several ranks it once lost the optimizer
    constraints = {name: ParameterConstraints(sharding_types=[how]) for name in KEYS}
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology, batch_size=4, constraints=constraints)
    group: Any = dist.GroupMember.WORLD
    sharded = DistributedModelParallel(model, plan=planner.collective_plan(model, sharders, group), sharders=sharders)
    sharded.load_state_dict(values)
    outputs = []
    for step in range(STEPS):
        seeded = torch.Generator().manual_seed(10 * step + dist.get_rank())
        features = KeyedJaggedTensor.from_lengths_sync(
            list(KEYS.values()), torch.randint(0, ROWS, (24,), generator=seeded), torch.full((8,), 3)
        )
        batch = features if hasattr(tables, "footprint") else remapped(pooled, features)
        found = sharded.module["tables"](batch)
        outputs.append(found.values() if pooled else torch.cat([found[key].values() for key in KEYS.values()]))
        (outputs[-1].float() - 1).square().sum().backward()
    rates = {round(group["lr"], 4) for group in sharded.fused_optimizer.param_groups}
    return rates, [output.detach() for output in outputs], local_state(sharded)


def sharders_of(how: str, settings: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Return the sharders of a script with stock tables, and those that the swap makes of them."""
    plain = [EmbeddingBagCollectionSharder(**settings), EmbeddingCollectionSharder(**settings)]
    mine = {
        "beside": lambda: [*plain, *compressed_sharders(plain)],
        "before": lambda: [*compressed_sharders(plain), *plain],
        "defaults": lambda: get_default_sharders(**settings),
        "only ours": lambda: compressed_sharders(**{"fused_params": {}, **settings}),
    }[how]()
    return plain, mine


SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "adagrad": {"fused_params": ADAGRAD},
    "clipping": {"fused_params": {"learning_rate": 0.1, "gradient_clipping": True, "max_gradient": 0.01}},
    "half outputs": {"fused_params": {"output_dtype": SparseType.FP16, "learning_rate": 0.1}},
    "codecs": {"fused_params": {"learning_rate": 0.1}},
}


def differences(pooled: bool) -> list[str]:
    """Return where a hashed table trains otherwise than a stock one of the same rows."""
    wrong = []
    for name, settings in SETTINGS.items():
        extra = {"qcomm_codecs_registry": codecs()} if name == "codecs" else {}
        for way in ("beside", "before", "defaults", "only ours"):
            if name != "adagrad" and way != "defaults":
                continue
            for how in ("table_wise", "column_wise"):
                theirs, ours = sharders_of(way, {**settings, **extra})
                wanted = train(stock(pooled), pooled, theirs, how)
                found = train(hashed(pooled), pooled, ours, how)
                same = found[0] == wanted[0] and all(
                    a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found[1], wanted[1], strict=True)
                )
                shards = [state for key, state in found[2].items() if key.endswith("weight")]
                whole = [state for key, state in wanted[2].items() if key.endswith("weight")]
                same &= all(
                    [(at, rows.tolist()) for at, rows in a] == [(at, rows.tolist()) for at, rows in b]
                    for a, b in zip(shards, whole, strict=True)
                )
                if not same:
                    wrong.append(f"{name}, {way}, {how}: {found[0]} for {wanted[0]}")
    return wrong


@pytest.mark.parametrize("pooled", [True, False], ids=["bags", "rows"])
def test_native_tables_train_and_travel_as_the_users_own(two_ranks, pooled):
    """Rates, outputs (rounded by the codecs) and trained values are those of a stock table, to the last bit."""
    assert two_ranks.run(differences, pooled) == [[], []]


def moved_first(pooled: bool) -> Any:
    """Return the rates of tables that were given an optimizer, moved, then sharded."""
    tables = hashed(pooled)
    apply_optimizer_in_backward(torch.optim.SGD, native_parameters(tables), {"lr": 0.123})
    return train(tables, pooled, get_default_sharders(), "table_wise", move=True)[0]


@pytest.mark.parametrize("pooled", [True, False], ids=["bags", "rows"])
def test_an_optimizer_survives_a_move_before_sharding(two_ranks, pooled):
    assert set().union(*two_ranks.run(moved_first, pooled)) == {0.123}


def of_both_collections() -> dict[str, Any]:
    """Return what becomes of settings that differ for bags and rows: rates by native table, the log."""
    bags = CompressedEmbeddingBagCollection(
        [
            EmbeddingBagConfig(name=name, num_embeddings=ROWS, embedding_dim=DIM, feature_names=[f"f_{name}"])
            for name in ("bag", "memcom", "pq")
        ],
        compression={
            "bag": HashConfig(num_buckets=BUCKETS),
            "memcom": MEmComConfig(num_buckets=BUCKETS),
            "pq": PQConfig(num_codes=4, codebook_size=16),
        },
    )
    model = nn.ModuleDict({"bags": bags, "rows": hashed(False)})
    mine: list[Any] = [
        EmbeddingBagCollectionSharder({"learning_rate": 9.0}),  # of two for one class the last counts, as in TorchRec
        EmbeddingBagCollectionSharder({"learning_rate": 0.1}),
        EmbeddingCollectionSharder({"learning_rate": 0.2}, use_index_dedup=True),
    ]
    sharders = [*mine, *compressed_sharders(mine)]
    constraints = {name: ParameterConstraints(sharding_types=["table_wise"]) for name in ("bag", "memcom", *KEYS)}
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    planner = EmbeddingShardingPlanner(topology, batch_size=4, constraints=constraints)
    group: Any = dist.GroupMember.WORLD
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("torchrec_compress").addHandler(handler)
    plan = planner.collective_plan(model, sharders, group)
    sharded = DistributedModelParallel(model, plan=plan, sharders=sharders)
    logging.getLogger("torchrec_compress").removeHandler(handler)
    rates = {
        key.split(".")[-2]: round(each.param_groups[0]["lr"], 4)
        for _, each in sharded.fused_optimizer.optimizers
        for key in each.params
    }
    deduplicates = sharded.module["rows"].rows["buckets_16"].native._use_index_dedup
    return {"rates": rates, "said": said, "deduplicates": deduplicates}


def test_rows_of_bag_tables_are_trained_as_bags_and_others_as_rows(two_ranks):
    results = two_ranks.run(of_both_collections)
    rates = {name: rate for result in results for name, rate in result["rates"].items()}
    bags = dict.fromkeys(["bag__buckets", "memcom__buckets", "memcom__scalars"], 0.1)
    assert rates == {**bags, "t__buckets": 0.2, "s__buckets": 0.2}
    for result in results:
        assert result["deduplicates"]
        (line,) = [line for line in result["said"] if "fused_params" in line]
        assert "tables ['pq']" in line and "the dense optimizer trains" in line and "learning_rate" in line


class Picky(EmbeddingBagCollectionSharder):
    """As users write them, to choose how tables are sharded."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["table_wise"]


def test_settings_are_taken_from_the_list_or_given_but_never_lost():
    with pytest.raises(ValueError, match=r"must be given once.*got neither; pass sharders=\[\*mine, \*compressed_sh"):
        compressed_sharders()
    with pytest.raises(ValueError, match=r"must be given once.*got both"):
        compressed_sharders([EmbeddingBagCollectionSharder()], fused_params={})
    with pytest.raises(ValueError, match=r"must have a sharder of EmbeddingBagCollection.*got \['FusedEmbeddingBag"):
        compressed_sharders([FusedEmbeddingBagCollectionSharder(ADAGRAD)])
    registry = codecs()
    for alone in (EmbeddingBagCollectionSharder(ADAGRAD, registry), EmbeddingCollectionSharder(ADAGRAD, registry)):
        native = [sharder for sharder in compressed_sharders([alone]) if "Remapped" in type(sharder).__name__]
        assert len(native) == 3
        for sharder in native:
            assert isinstance(sharder, BaseEmbeddingSharder)
            assert sharder.fused_params is ADAGRAD and sharder.qcomm_codecs_registry is registry
    assert [s.sharding_types("cpu") for s in compressed_sharders([Picky()])][1] == ["table_wise"]


def test_all_default_sharders_of_trained_tables_take_the_settings():
    registry = codecs()
    for sharder in get_default_sharders(ADAGRAD, registry, use_index_dedup=True):
        name = type(sharder).__name__
        if name.startswith("Quant") or name in ("CodeTableCollectionSharder", "DecoderSharder"):
            continue  # nothing of theirs is trained in the backward, and codes travel as they are
        assert getattr(sharder, "fused_params", None) == ADAGRAD, name
        assert sharder.qcomm_codecs_registry is registry, name


def test_codecs_that_miss_unpooled_rows_are_said(caplog):
    collection = CompressedEmbeddingBagCollection(
        [EmbeddingBagConfig(name="t", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["f"])],
        compression=MEmComConfig(num_buckets=BUCKETS),
    )
    registry = {name: codec for name, codec in codecs().items() if not name.startswith("SEQUENCE")}
    sharder = RemappedEmbeddingBagRowsSharder(EmbeddingBagCollectionSharder(qcomm_codecs_registry=registry))
    env, part = ShardingEnv.from_local(1, 0), collection.rows["buckets_16"]
    native: Any = {"t": ParameterSharding("data_parallel", "dense", [0])}
    sharder.shard(part, native, env)  # type: ignore[arg-type]
    assert "tables ['t']: rows travel unpooled and as they are" in caplog.text


@pytest.mark.parametrize("chosen", ["nowhere", "fused_params", "in the backward"])
def test_an_optimizer_that_nobody_chose_is_said(caplog, chosen):
    """Another sharder of the user's, put behind ours in the list, does not reach native tables."""
    collection = CompressedEmbeddingBagCollection(
        [EmbeddingBagConfig(name="t", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["f"])],
        compression=MEmComConfig(num_buckets=BUCKETS),
    )
    part = collection.rows["buckets_16"]
    if chosen == "in the backward":
        apply_optimizer_in_backward(torch.optim.SGD, part.parameters(), {"lr": 0.1})
    sharders = get_default_sharders(ADAGRAD if chosen == "fused_params" else None)
    (sharder,) = [found for found in sharders if found.module_type is type(part)]
    native: Any = {"t": ParameterSharding("data_parallel", "dense", [0])}
    sharder.shard(part, native, ShardingEnv.from_local(1, 0))
    assert ("tables ['t']: train with FBGEMM's default optimizer" in caplog.text) == (chosen == "nowhere")


def test_constraints_on_the_users_table_reach_its_native_parts():
    """All fields of `ParameterConstraints` that TorchRec hands to its kernels, planned for a GPU."""
    tables = [EmbeddingBagConfig(name="t", num_embeddings=10**6, embedding_dim=DIM, feature_names=["f"])]
    wishes = {
        "cache_params": CacheParams(algorithm=CacheAlgorithm.LFU, load_factor=0.3),
        "enforce_hbm": True,
        "stochastic_rounding": False,
        "bounds_check_mode": BoundsCheckMode.FATAL,
        "output_dtype": DataType.FP16,
    }
    constraints = {
        "t": ParameterConstraints(sharding_types=["row_wise"], compute_kernels=["fused_uvm_caching"], **wishes)
    }
    topology = Topology(world_size=2, compute_device="cuda")
    for method in (HashConfig(num_buckets=10**5), MEmComConfig(num_buckets=10**5)):
        model = nn.ModuleDict({"e": CompressedEmbeddingBagCollection(tables, torch.device("meta"), compression=method)})
        for kind in (EmbeddingShardingPlanner, OurPlanner):
            plan = kind(topology=topology, constraints=constraints).plan(model, get_default_sharders())
            native = [part["t"] for path, part in plan.plan.items() if "rows" in path or "bags" in path]
            assert len(native) == (1 if method.method == "hash" else 2)
            for how in native:
                assert (how.sharding_type, how.compute_kernel) == ("row_wise", "fused_uvm_caching")
                assert {name: getattr(how, name) for name in wishes} == wishes
