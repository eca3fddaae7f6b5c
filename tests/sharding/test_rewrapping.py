"""What `compress` and `decompress` leave of a sharded model: as it was where they fail, frozen where it was frozen."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_configs import DataType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.cases import counts
from tests.sharding.test_compress import NAMES, D, Model, N, batch, shard, wrap
from torchrec_compress import (
    CompressedEmbeddingBagCollection,
    compress,
    decompress,
    get_default_sharders,
    native_parameters,
)
from torchrec_compress.methods import CafeConfig, HashConfig, Int8Config, NarrowConfig, PQConfig
from torchrec_compress.sharding.loading import load_plain

CPU = torch.device("cpu")
HASH = HashConfig(num_buckets=50)
CAFE = CafeConfig(num_hot_rows=8, num_cold_rows=40, num_blocks=4)


def tables(data_type: DataType = DataType.FP32) -> list[EmbeddingBagConfig]:
    options: dict[str, Any] = {"num_embeddings": N, "embedding_dim": D, "data_type": data_type}
    return [EmbeddingBagConfig(name=name, feature_names=[name], **options) for name in NAMES]


class TwoTowers(nn.Module):
    """A compressed collection beside a stock one that is sharded with it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        is_half, config = kind == "range", PQConfig(num_codes=2, codebook_size=16) if kind == "never filled" else HASH
        self.small = CompressedEmbeddingBagCollection(
            tables(DataType.FP16 if is_half else DataType.FP32), compression=config, will_fit=kind == "never filled"
        )
        self.stock = EmbeddingBagCollection(tables())
        self.over = nn.Linear(4 * D, 1)

    def forward(self, features: Any) -> tuple[Tensor, Tensor]:
        found = self.over(torch.cat([self.small(features).values().float(), self.stock(features).values()], dim=1))
        return found.square().mean(), found.detach()


def failing(kind: str, how: str) -> str:
    """Return what is said; the model serves and trains afterwards as it did."""
    inner: Any = TwoTowers(kind)
    if kind == "range":
        for weight in inner.small.parameters():  # which fit, but not their sums
            weight.data.fill_(6e4)
        inner.small = CompressedEmbeddingBagCollection(tables(DataType.FP16), compression=NarrowConfig(width=4))
        with torch.no_grad():
            for weight in inner.small.parameters():
                weight.fill_(200.0)
                if len(weight) == N:  # but for the last, all rows fit
                    weight[:-1] = 0.01
    kept = {name: value.detach().clone() for name, value in inner.state_dict().items()}
    model: Any = DistributedModelParallel(inner, device=CPU, sharders=get_default_sharders())
    load_plain(model, kept)
    model.train()
    model.module.small.eval()
    pipeline = None
    if kind == "pipeline":
        pipeline = TrainPipelineSparseDist(model, torch.optim.SGD(model.parameters(), lr=0.0), CPU)
        pipeline.progress(iter([batch(), batch(), batch()]))
    before = None if kind in ("pipeline", "never filled") else model(batch())[1]
    modules = {path: (id(module), module.training) for path, module in model.module.named_modules()}

    def late(changed: nn.Module) -> Any:
        DistributedModelParallel(changed, device=CPU, sharders=get_default_sharders())  # which changes it
        changed.train(not changed.training)
        changed.over.eval()  # type: ignore[operator, union-attr]
        raise RuntimeError("the disk is full")

    options: dict[str, Any] = {"wrap": late} if kind == "late" else {}
    with pytest.raises((ValueError, RuntimeError)) as error:
        if how == "compress":
            compress(model, {"stock.*": HASH}, inplace=True, **options)
        else:
            decompress(model, inplace=True, **options)
    assert {path: (id(module), module.training) for path, module in model.module.named_modules()} == modules
    assert (model.training, model.module.small.training) == (True, False)
    if pipeline is not None:
        pipeline.detach()
        options = {"compression": {"stock.*": HASH}} if how == "compress" else {}
        assert (compress if how == "compress" else decompress)(model, inplace=True, **options) is not model
    if before is not None:
        assert torch.equal(model(batch())[1], before)
        model(batch())[0].backward()
        assert model.module.over.weight.grad.abs().sum() > 0
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [
        ("never filled", "decompress", "small: table 'item': the code table must be filled before it is used"),
        ("pipeline", "decompress", r"'small': must have the forward of its class, got one of its own; detach\(\)"),
        ("pipeline", "compress", r"'stock': must have the forward of its class, got one of its own; detach\(\)"),
        ("range", "decompress", r"small: (rank 1: )?decompress: table 'item': rows must be in \+-65504 to be sto"),
        ("late", "decompress", "^the disk is full$"),
        ("late", "compress", "^the disk is full$"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(two_ranks, kind, how, message):
    for said in two_ranks.run(failing, kind, how):
        assert re.search(message, said), said


class Bags(nn.Module):
    """Two plain bags that are called as a collection is."""

    def __init__(self) -> None:
        super().__init__()
        self.item, self.user = nn.EmbeddingBag(N, D), nn.EmbeddingBag(N, D)

    def forward(self, features: Any) -> dict[str, Tensor]:
        return {name: getattr(self, name)(features[name].values().unsqueeze(1)) for name in NAMES}


def rows(model: Any) -> list[Tensor]:
    """Return the rows that each table serves."""
    found = model.module.sparse(batch())
    return [found[name].detach() for name in NAMES]


def step(model: Any) -> None:
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    model(batch()).square().sum().backward()
    optimizer.step()


def frozen(config: Any, kind: str, own_wrap: bool) -> list[list[Tensor]]:
    """Return what a model whose items are frozen serves: compressed and after a step, expanded and after a step."""

    def again(changed: nn.Module) -> DistributedModelParallel:
        apply_optimizer_in_backward(torch.optim.SGD, native_parameters(changed), {"lr": 0.5})
        return DistributedModelParallel(changed, device=CPU, sharders=get_default_sharders())

    options: dict[str, Any] = {"wrap": again} if own_wrap else {}
    inner: Any = Model(True)
    methods = {"*item*": config, "*user*": HASH}
    if kind != "unsharded":
        inner.sparse = Bags() if kind == "plain" else CompressedEmbeddingBagCollection(tables(), compression=methods)
    for name, parameter in inner.sparse.named_parameters():
        parameter.requires_grad_("item" not in name)
    model: Any = DistributedModelParallel(
        inner, device=CPU, sharders=[] if kind == "unsharded" else get_default_sharders()
    )
    given = {f"sparse.{name}": counts() for name in NAMES}
    old = None
    if kind != "compressed":
        old, model = model, compress(model, methods, inplace=True, seed=3, counts=given, **options)
    found = []
    for how in ("compressed", "expanded"):
        if how == "expanded":
            old, model = model, decompress(model, inplace=True, **options)
        if old is not None:  # whose ranks would train apart
            with pytest.raises(RuntimeError, match=r"this DistributedModelParallel is used up, .* call what"):
                old(batch())
        found.append(rows(model))
        step(model)
        found.append(rows(model))
    return found


@pytest.mark.parametrize(
    ("kind", "own_wrap"), [("unsharded", False), ("unsharded", True), ("plain", False), ("compressed", False)]
)
@pytest.mark.parametrize(
    "config",
    [
        HASH,
        PQConfig(num_codes=2, codebook_size=16),
        NarrowConfig(width=4),
        NarrowConfig(width=4, bits=8),
        CAFE,
    ],
    ids=str,
)
def test_what_is_frozen_stays_so(two_ranks, config, kind, own_wrap):
    for small, trained, dense, last in two_ranks.run(frozen, config, kind, own_wrap):
        torch.testing.assert_close(dense[0], small[0], rtol=1e-5, atol=1e-6)
        assert torch.equal(trained[0], small[0]) and torch.equal(last[0], dense[0])
        assert not torch.equal(trained[1], small[1]) and not torch.equal(last[1], dense[1])


@pytest.mark.parametrize(("kind", "own_wrap"), [("unsharded", False), ("plain", True)])
def test_what_is_frozen_in_integers_stays_so(two_ranks, kind, own_wrap):
    """They hold nothing that could be frozen."""
    test_what_is_frozen_stays_so(two_ranks, Int8Config(), kind, own_wrap)


def in_training(config: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return what is served by a table that counts look-ups in training, in training, and expanded."""
    made = Model(True)
    made.sparse = CompressedEmbeddingBagCollection(tables(), compression=config)
    model: Any = wrap(made)
    before = rows(model.eval())
    model.train()
    with torch.inference_mode():
        dense = decompress(model, inplace=True)
    assert dense.training
    after = rows(dense)
    dense(batch()).sum().backward()  # they are no tensors of inference
    return before, after


def test_expanding_counts_no_look_ups(two_ranks):
    for before, after in two_ranks.run(in_training, CAFE):
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def in_inference_mode() -> Tensor:
    """Return the gradient of the last layer of a model that was compressed in inference mode."""
    model = shard(True, "row_wise")
    with torch.inference_mode():
        small: Any = compress(model, PQConfig(num_codes=2, codebook_size=16), inplace=True)
    small(batch()).sum().backward()
    return small.module.over.weight.grad


def test_in_inference_mode(two_ranks):
    for found in two_ranks.run(in_inference_mode):
        assert bool(found.abs().sum() > 0)
