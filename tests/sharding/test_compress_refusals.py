"""What ranks that compress together must agree on, and what a sharded model keeps."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.distributed import DistributedModelParallel

from tests.cases import contexts, counts
from tests.sharding.test_compress import GIVEN, NAMES, D, Model, N, batch, shard, wrap
from torchrec_compress import CompressedEmbeddingBagCollection, compress, get_default_sharders, measure_curvature
from torchrec_compress.fit import MinHashSketch
from torchrec_compress.methods import GraphCodesConfig, LMAConfig, PQConfig, QuantileCodesConfig

CONFIG = PQConfig(num_codes=2, codebook_size=16)


def disagree(kind: str) -> str:
    """Return what each rank is told where its arguments are others than those of the other."""
    sharded, other = shard(True, "row_wise"), dist.get_rank() == 1
    config: Any = CONFIG
    given: dict[str, Any] = {"counts": {name: counts() for name in NAMES}, "inplace": True}
    if kind in ("curvature", "no curvature", "another's curvature"):
        found = measure_curvature(sharded, [batch()], lambda model, ids: model(ids), "mse")
        given["curvature"] = found
        if other:
            moved = dataclasses.replace(found["item"], matrix=found["item"].matrix * 2)
            swapped = {"item": found["user"], "user": found["item"]}
            values = {"curvature": {**found, "item": moved}, "no curvature": None, "another's curvature": swapped}
            given["curvature"] = values[kind]
    if other and kind == "inplace":
        given["inplace"] = False
    if other and kind == "name":
        given["counts"] = {"items": counts()}
    if other and kind == "no mapping":
        given["counts"] = [counts()]
    if other and kind == "collision":  # of the same sum, and the same sum times their places
        seen = counts().clone()
        seen[0], seen[1], seen[2] = seen[0] + 1, seen[1] - 2, seen[2] + 1
        given["counts"] = {"item": seen, "user": counts()}
    if kind == "contexts":
        config = QuantileCodesConfig(num_codes=2, codebook_size=16)
        pairs = contexts()
        given["contexts"] = {"item": pairs, "user": (pairs[0], pairs[1].flip(0)) if other else pairs}
    if kind == "bad contexts":
        config = QuantileCodesConfig(num_codes=2, codebook_size=16)
        given["contexts"] = {name: contexts() for name in NAMES}
        if other:
            given["contexts"]["user"] = (torch.tensor([N]), torch.tensor([0]))
    if other and kind == "type":
        config = {"item": 3, "*": CONFIG}
    with pytest.raises(ValueError) as error:
        compress(sharded, config, seed=4 if other and kind == "seed" else 3, **given)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("curvature", r"curvature must be the same on all ranks, got others on ranks \[1\]"),
        ("no curvature", r"curvature must be the same on all ranks, got others on ranks \[1\]"),
        ("another's curvature", r"curvature must be the same on all ranks, got others on ranks \[1\]"),
        ("seed", r"seed must be the same on all ranks, got others on ranks \[1\]"),
        ("inplace", "must be compressed in place"),
        ("name", "counts must name tables, got 'items'"),
        ("no mapping", "counts must be a mapping by table name, got list"),
        ("collision", r"counts must be the same on all ranks, got others on ranks \[1\]"),
        ("contexts", r"contexts must be the same on all ranks, got others on ranks \[1\]"),
        ("bad contexts", "table 'user': "),
        ("type", r"compression\['item'\]: must be a method"),
    ],
)
def test_a_difference_is_told_on_all_ranks(two_ranks, kind, message):
    first, second = two_ranks.run(disagree, kind)
    assert re.search(message, second), second
    assert re.search(message, first), first
    if "on all ranks" not in message:
        assert first == f"rank 1: {second}"


def of_streams(config: LMAConfig | GraphCodesConfig, joins: bool) -> Tensor | str:
    """Return what a model serves whose ranks have each seen half of the pairs, and the same without ranks, stacked."""
    rank = dist.get_rank()
    plain = Model(True)
    tables = {each.name: each for each in plain.sparse.embedding_bag_configs()}  # type: ignore[operator, union-attr]
    sketches = {name: config.sketch(table, seed=3) for name, table in tables.items()}
    for sketch in sketches.values():
        sketch.add(*(part.chunk(2)[rank] for part in contexts()))
        if joins and isinstance(sketch, MinHashSketch):
            dist.all_reduce(sketch.minima, dist.ReduceOp.MIN)
        elif joins:
            found = [torch.empty_like(sketch.kept) for _ in range(2)]
            dist.all_gather(found, sketch.kept)
            sketch.join(found[1 - rank])
    given: dict[str, Any] = {"seed": 3, "inplace": True}
    try:
        small = compress(shard(True, "row_wise"), config, contexts=sketches, **given)
    except ValueError as error:
        return str(error)
    alone = compress(plain, config, contexts={name: contexts() for name in NAMES}, **given)
    return torch.stack([each(batch()).detach() for each in (small, alone)])


@pytest.mark.parametrize("method", [LMAConfig, GraphCodesConfig])
def test_ranks_that_saw_a_stream_together_join_their_sketches(two_ranks, method):
    config = method(num_codes=4, codebook_size=16)
    for told in two_ranks.run(of_streams, config, False):
        assert re.search(
            r"contexts must be the same on all ranks, got others on ranks \[1\].* join their sketches", told
        )
    for found in two_ranks.run(of_streams, config, True):
        torch.testing.assert_close(found[0], found[1])


def keep() -> dict[str, Any]:
    """Return what a model in evaluation keeps of its modes, and what the log says."""
    sharded = shard(True, "row_wise").eval()
    sharded.module.over.train()  # type: ignore[union-attr, operator]
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("torchrec_compress.convert.wrapping")
    logger.addHandler(handler)
    try:
        small = compress(sharded, CONFIG, inplace=True, **GIVEN)
        again = compress(shard(True, "table_wise"), CONFIG, inplace=True, wrap=wrap, **GIVEN)
    finally:
        logger.removeHandler(handler)
    inner: Any = small.module
    return {
        "modes": [small.training, inner.training, inner.over.training, any(m.training for m in inner.sparse.modules())],
        "other": again.training and all(module.training for module in again.module.modules()),  # type: ignore[union-attr]
        "said": records,
        "let go": sharded._dmp_wrapped_module is sharded.module,
    }


def test_modes_stay_and_lost_optimizers_are_told(two_ranks):
    first, second = two_ranks.run(keep)
    for each in (first, second):
        assert each["modes"] == [False, False, True, False] and each["other"]
        assert each["let go"]  # or the hooks of its reducer would be called beside those of the new one
    assert len(first["said"]) == 1 and "'sparse'" in first["said"][0] and "pass wrap=" in first["said"][0]
    assert not second["said"]


def settings() -> list[bool]:
    """Return whether a collection of weighted bags, and one that returns ids, are so after."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_embeddings": N, "embedding_dim": D}
    bags = [EmbeddingBagConfig(name="bag", feature_names=["bag"], **options)]
    rows = [EmbeddingConfig(name="row", feature_names=["row"], **options)]
    model = nn.ModuleDict(
        {
            "bags": EmbeddingBagCollection(bags, is_weighted=True),
            "rows": EmbeddingCollection(rows, need_indices=True),
            "net": nn.Linear(1, 1),
        }
    )
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), sharders=get_default_sharders())
    small: Any = compress(sharded, CONFIG, inplace=True)
    return [small.module["bags"].is_weighted(), small.module["rows"].need_indices()]


def test_settings_of_collections_stay(two_ranks):
    assert two_ranks.run(settings) == [[True, True]] * 2


def alone() -> tuple[bool, Tensor, Tensor]:
    """Return what a collection that is the whole model serves, before and after."""
    torch.manual_seed(0)
    tables = [EmbeddingBagConfig(name=name, num_embeddings=N, embedding_dim=D, feature_names=[name]) for name in NAMES]
    cpu, sharders = torch.device("cpu"), get_default_sharders()
    sharded = DistributedModelParallel(EmbeddingBagCollection(tables), device=cpu, sharders=sharders)

    def fail(model: Any) -> Any:
        raise RuntimeError("no plan")

    before = sharded(batch()).values().detach()
    with pytest.raises(RuntimeError, match="no plan"):
        compress(sharded, CONFIG, inplace=True, wrap=fail)
    assert torch.equal(sharded(batch()).values().detach(), before)
    small: Any = compress(sharded, CONFIG, inplace=True)
    after = small(batch()).values().detach()
    return isinstance(small.module, CompressedEmbeddingBagCollection), before, after


def test_a_collection_may_be_the_whole_model(two_ranks):
    for is_ours, before, after in two_ranks.run(alone):
        assert is_ours and not torch.equal(before, after)
        assert float((before - after).square().mean()) < float(before.square().mean())
