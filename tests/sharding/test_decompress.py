"""`decompress` of sharded models, and plain modules in them: what is served stays, whatever the plan."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor, nn
from torchrec import DataType, EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.planner import Topology
from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import PoolingType

from tests.cases import CONFIGS, IDS
from tests.sharding.test_compress import GIVEN, NAMES, D, Model, N, batch, shard, with_optimizer, wrap
from torchrec_compress import CompressedEmbeddingBagCollection, compress, decompress, get_default_sharders
from torchrec_compress.convert import served
from torchrec_compress.methods import DenseConfig, HashConfig, Int8Config, MEmComConfig, MethodConfig, PQConfig
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.seams import sharded_configs
from torchrec_compress.sharding.loading import load_plain

CPU = torch.device("cpu")


def there_and_back(pooled: bool, config: Any, how: str | None) -> tuple[Tensor, Tensor, bool]:
    """Return what a sharded model serves compressed, and expanded again, and whether stock tables serve then."""
    small = compress(shard(pooled, "row_wise"), config, inplace=True, seed=3, wrap=wrap, **GIVEN).eval()
    before = small(batch().permute([1, 0])).detach()  # an order of features that its exchanges remember

    def again(model: Any) -> DistributedModelParallel:
        cuts: dict[str, Any] = {"row_wise": row_wise(), "column_wise": column_wise(ranks=[1, 0])}
        cuts["table_wise"] = table_wise(rank=dist.get_world_size() - 1)
        wanted, sharder = {name: cuts[str(how)] for name in NAMES}, get_default_sharders()[0]
        world = dist.get_world_size()
        cut = construct_module_sharding_plan(model.sparse, wanted, sharder, world, world, "cpu")
        return DistributedModelParallel(
            model, device=CPU, plan=ShardingPlan({"sparse": cut}), sharders=get_default_sharders()
        )

    options: dict[str, Any] = {} if how is None else {"wrap": again}
    dense = decompress(small, inplace=True, **options)
    assert isinstance(dense, DistributedModelParallel) and not dense.training
    return before, dense(batch()).detach(), sharded_configs(dense.module.sparse) is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_every_method_serves_the_same_rows(two_ranks, config):
    for before, after, is_stock in two_ranks.run(there_and_back, True, config, None):
        assert is_stock
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("how", "pooled"), [("table_wise", True), ("column_wise", True), (None, False)])
def test_rows_go_to_any_plan(two_ranks, how, pooled):
    config = {"item": PQConfig(num_codes=2, codebook_size=32, num_hot_rows=20), "user": HashConfig(num_buckets=50)}
    for before, after, _ in two_ranks.run(there_and_back, pooled, config, how):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def by_one_planner() -> tuple[Tensor, Tensor]:
    """Return what is served before and after, all planned by one planner, which knows the model already."""
    planner, sharders = EmbeddingShardingPlanner(Topology(dist.get_world_size(), "cpu")), get_default_sharders()

    def plan(model: Any) -> DistributedModelParallel:
        found = planner.collective_plan(model, sharders, dist.group.WORLD)
        return DistributedModelParallel(model, device=CPU, plan=found, sharders=sharders)

    small = compress(plan(Model(True)), PQConfig(num_codes=2, codebook_size=32), inplace=True, wrap=plan).eval()
    before = small(batch()).detach()
    return before, decompress(small, inplace=True, wrap=plan)(batch()).detach()


def test_a_planner_does_not_take_a_changed_model_for_the_one_it_knows(two_ranks):
    for before, after in two_ranks.run(by_one_planner):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def by_few_rows(config: Any, how: str) -> tuple[Tensor, Tensor, bool]:
    """Do the same in blocks of seven rows, of which ranks need other numbers: the last holds fewer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served, "_FLOATS_AT_ONCE", 7 * 2 * D)
        return there_and_back(True, config, how)


@pytest.mark.parametrize("how", ["row_wise", "table_wise"])
def test_ranks_look_up_as_often_as_the_one_that_needs_most(four_ranks, how):
    config = {"item": MEmComConfig(num_buckets=50), "user": DenseConfig()}
    for before, after, _ in four_ranks.run(by_few_rows, config, how):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


class Plain(nn.Module):
    """A bag and a row of PyTorch's own beside a sharded collection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bag, self.row = nn.EmbeddingBag(N, D, mode="mean", padding_idx=3), nn.Embedding(N, D, padding_idx=1)
        tables = [EmbeddingBagConfig(name="item", num_embeddings=N, embedding_dim=D, feature_names=["item"])]
        self.sparse, self.over = EmbeddingBagCollection(tables), nn.Linear(3 * D, 1)

    def forward(self, ids: Tensor) -> Tensor:
        lengths = torch.ones(len(ids), dtype=torch.int64)
        found = self.sparse(KeyedJaggedTensor.from_lengths_sync(["item"], ids, lengths))["item"]
        return self.over(torch.cat([self.bag(ids.unsqueeze(1)), self.row(ids), found], dim=1))


def plain(config: MethodConfig) -> list[Tensor]:
    """Return what a model with plain modules serves: before, compressed, trained on and expanded."""
    ids = torch.arange(N)
    model = Plain()
    values = {name: value.detach().clone() for name, value in model.state_dict().items()}
    wrapped: Any = DistributedModelParallel(model, device=CPU, sharders=get_default_sharders())
    load_plain(wrapped, values)
    found = [wrapped(ids).detach()]

    def again(model: Any) -> DistributedModelParallel:
        for part in (model.bag, model.row):  # the collection is sharded already, and keeps its optimizer
            with_optimizer(part)
        return DistributedModelParallel(model, device=CPU, sharders=get_default_sharders())

    small = compress(wrapped, {"bag": config, "row": config}, inplace=True, seed=3, wrap=again)
    assert sharded_configs(small.module.sparse) is not None
    assert [type(each).__name__ for each in (small.module.bag, small.module.row)] == [
        "CompressedEmbeddingBag",
        "CompressedEmbedding",
    ]
    found.append(small(ids).detach())
    small(ids).square().mean().backward()
    small.module.bag.eval()
    dense = decompress(small, inplace=True)
    assert [each.training for each in (dense, dense.module.bag, dense.module.row)] == [True, False, True]
    assert type(dense.module.bag) is nn.EmbeddingBag and type(dense.module.row) is nn.Embedding
    assert torch.equal(dense.module.row.weight[1], values["row.weight"][1])
    return [*found, dense(ids).detach()]


@pytest.mark.parametrize(
    "config",
    [PQConfig(num_codes=4, codebook_size=64), Int8Config(), HashConfig(num_buckets=100)],
    ids=lambda config: config.method,
)
def test_plain_modules_of_a_sharded_model(two_ranks, config):
    model = Plain()
    methods = {"bag": config, "row": config}
    wanted = compress(model, methods, seed=3)(torch.arange(N)).detach()
    for before, small, dense in two_ranks.run(plain, config):
        torch.testing.assert_close(before, model(torch.arange(N)).detach())
        torch.testing.assert_close(small, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dense, small, rtol=1e-5, atol=1e-6)


def refused(kind: str) -> str:
    """Return what is said of a model that cannot be expanded; it goes on serving."""
    features = {"item": ["item"], "user": ["item"] if kind == "feature" else ["user"]}
    tables = [
        EmbeddingBagConfig(name=n, num_embeddings=N + i, embedding_dim=D, feature_names=features[n])
        for i, n in enumerate(NAMES)
    ]
    model: Any = nn.Sequential(EmbeddingBagCollection(tables))
    if kind != "stock":
        model = nn.Sequential(CompressedEmbeddingBagCollection(tables, compression=HashConfig(num_buckets=50)))
    codecs = get_qcomm_codecs_registry(QCommsConfig(forward_precision=CommType.FP16)) if kind == "codecs" else None
    fused: dict[str, Any] = {"output_dtype": SparseType.FP16} if kind == "output" else {}
    sharders = get_default_sharders(fused_params=fused, qcomm_codecs_registry=codecs)
    wrapped = DistributedModelParallel(model, device=CPU, sharders=sharders).eval()
    before = wrapped(batch()).values().detach()
    options: dict[str, Any] = {"inplace": kind != "copy"}
    if kind == "wrap" or (kind == "one" and dist.get_rank() == 1):
        options["wrap"] = lambda model: model
    if kind == "one" and dist.get_rank() == 1:
        options = {"inplace": False}
    with pytest.raises(ValueError) as error:
        decompress(wrapped, **options)
    assert torch.equal(wrapped(batch()).values().detach(), before)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("stock", "the model must hold compressed tables, got none"),
        ("feature", "table 'user' must have a feature that no smaller table has, got none"),
        ("codecs", "0: decompress: rows must travel as they are, got sharders with a qcomm_codecs_registry"),
        ("output", "0: decompress: table 'item': rows must be looked up in float32, got torch.float16 of sharders"),
        ("copy", "must be expanded in place, as no copy of its shards is made; pass inplace=True"),
        ("one", "must be expanded in place"),
        ("wrap", "wrap must return a DistributedModelParallel, got Sequential"),
    ],
)
def test_what_cannot_be_expanded_is_told_on_all_ranks(two_ranks, kind, message):
    for said in two_ranks.run(refused, kind):
        assert re.search(message, said), said


@pytest.mark.parametrize("data_type", [DataType.FP32, DataType.FP16], ids=lambda each: each.value)
@pytest.mark.parametrize("is_copied", [False, True], ids=["sharded", "copied"])
def test_weighted_bags(two_ranks, data_type, is_copied):
    for before, after in two_ranks.run(weighted, data_type, is_copied):
        torch.testing.assert_close(after, before, rtol=2e-3 if is_copied else 1e-5, atol=1e-4 if is_copied else 1e-6)


def weighted(data_type: DataType, is_copied: bool) -> tuple[Tensor, Tensor]:
    """Return what weighted bags of two tables, sharded or whole on every rank, serve, compressed and expanded."""
    options: dict[str, Any] = {"num_embeddings": N, "embedding_dim": D, "feature_names": ["item", "user"]}
    tables = [EmbeddingBagConfig(name=n, pooling=PoolingType.SUM, data_type=data_type, **options) for n in NAMES]
    made = CompressedEmbeddingBagCollection(tables, is_weighted=True, compression=HashConfig(num_buckets=50))
    sharders = [] if is_copied else get_default_sharders()
    wrapped: Any = DistributedModelParallel(nn.Sequential(made), device=CPU, sharders=sharders)
    ids = batch()
    weights = torch.linspace(-1, 1, len(ids.values()))
    if is_copied and data_type == DataType.FP16:
        weights = weights.half()
    asked = KeyedJaggedTensor(ids.keys(), ids.values(), weights, ids.lengths())
    before = wrapped(asked)
    dense = decompress(wrapped, inplace=True)
    after = dense(asked)
    keys = sorted(before.keys())
    assert sorted(after.keys()) == keys == ["item@item", "item@user", "user@item", "user@user"]
    return tuple(torch.cat([found[key] for key in keys], dim=1).detach() for found in (before, after))  # type: ignore[return-value]


def half_that_stays() -> Tensor:
    """Return what a sharded model of FP16 tables serves, of which one stays dense."""
    tables = [
        EmbeddingBagConfig(name=n, num_embeddings=N, embedding_dim=D, feature_names=[n], data_type=DataType.FP16)
        for n in NAMES
    ]
    wrapped: Any = DistributedModelParallel(
        nn.Sequential(EmbeddingBagCollection(tables)), device=CPU, sharders=get_default_sharders()
    )
    before = wrapped(batch())["user"].detach()
    small: Any = compress(wrapped, {"item": PQConfig(num_codes=4), "user": DenseConfig()}, inplace=True)
    return (small(batch())["user"].detach() - before).abs().max()


def test_rows_of_fp16_that_stay_are_kept(two_ranks):
    assert two_ranks.run(half_that_stays) == [0.0, 0.0]
