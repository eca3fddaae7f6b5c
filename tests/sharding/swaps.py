"""The one-line swap in every kind of script: methods, sharders, plans, devices, with and without a pipeline."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import get_default_sharders as get_stock_sharders
from torchrec.distributed.planner import EmbeddingShardingPlanner as StockPlanner
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.cases import CASES, CODES, has_manager, steps_itself
from tests.sharding.models import RATE, local_state, optimizer_of
from tests.sharding.scripts import Clicks
from torchrec_compress import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    get_default_sharders,
    native_parameters,
)
from torchrec_compress.methods import CafeConfig, TableData
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.sharding.loading import load_plain

ROWS, DIM, BAGS, STEPS = 90, 8, 4, 2
STORED = {method: configs[0] for method, configs in CASES.items()}
STORED["given"] = replace(STORED["given"], codes=CODES.format(ROWS))  # type: ignore[call-arg]
STORED["cafe_narrow"] = CafeConfig(num_hot_rows=16, num_cold_rows=40, num_blocks=4, width=4)
# no loop is changed
METHODS = {method: config for method, config in STORED.items() if not (steps_itself(config) or has_manager(config))}
SHARDERS = ("TorchRec's", "bags alone", "ours")
PLANS = ("DMP's", "TorchRec's planner", "our planner")


class Model(nn.Module):
    """Embeddings, pooled or not, and a linear layer; it returns a loss and the outputs, as train pipelines want."""

    def __init__(self, methods: list[str], pooled: bool, device: str) -> None:
        super().__init__()
        config, kind = (
            (EmbeddingBagConfig, CompressedEmbeddingBagCollection)
            if pooled
            else (EmbeddingConfig, CompressedEmbeddingCollection)
        )
        tables: Any = [
            config(name=name, num_embeddings=ROWS, embedding_dim=DIM, feature_names=[f"f_{name}"]) for name in methods
        ]
        compression = {name: STORED[name] for name in methods}
        self.embeddings: Any = kind(tables, device=torch.device(device), compression=compression)
        self.features, self.pooled = [f"f_{name}" for name in methods], pooled
        self.over = nn.Linear(DIM, 1)

    def forward(self, batch: Clicks) -> tuple[Tensor, Tensor]:
        found = self.embeddings(batch.sparse_features)
        rows = [found[name] if self.pooled else found[name].values() for name in self.features]
        out = self.over(torch.cat(rows))
        return (out - 1).square().sum(), out.detach()


def filled(methods: list[str], pooled: bool) -> Model:
    """Return a model on the CPU; low-bit tables are fitted to random rows, the others have start codes."""
    torch.manual_seed(0)
    model = Model(methods, pooled, "cpu")
    for table in model.embeddings.table_configs():
        if table.name in ("int4", "int8"):
            state = METHODS[table.name].fit(table, TableData(rows=torch.randn(ROWS, DIM)))
            model.embeddings.load_table(table.name, state)
    return model


def draw(methods: list[str], step: int, rank: int) -> Clicks:
    """Return one rank's batch of a step."""
    seeded = torch.Generator().manual_seed(10 * step + rank)
    lengths = torch.randint(0, 4, (len(methods) * BAGS,), generator=seeded)
    ids = torch.randint(0, ROWS, (int(lengths.sum()),), generator=seeded)
    features = KeyedJaggedTensor.from_lengths_sync([f"f_{name}" for name in methods], ids, lengths)
    return Clicks(torch.zeros(0), features, torch.zeros(0))


def reference(model: Model, methods: list[str]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Train one process on the batches of all ranks; return this rank's outputs by step, and the values."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    outputs = []
    for step in range(STEPS):
        optimizer.zero_grad()
        found = [model(draw(methods, step, rank)) for rank in range(dist.get_world_size())]
        outputs.append(found[dist.get_rank()][1])
        (sum(loss for loss, _ in found) / len(found)).backward()  # type: ignore[union-attr]
        optimizer.step()
    return outputs, model.state_dict()


def sharded_as(model: Model, methods: list[str], sharders: str, plan: str) -> DistributedModelParallel:
    """Plan and shard a model as a script does; its tables are constrained by the user's names."""
    made: Any = {
        "TorchRec's": lambda: None,
        "bags alone": lambda: [EmbeddingBagCollectionSharder()],
        "ours": get_default_sharders,
    }[sharders]()
    native = native_parameters(model)
    if native:
        apply_optimizer_in_backward(torch.optim.SGD, native, {"lr": RATE})
    if plan == "DMP's":
        return DistributedModelParallel(model, sharders=made)
    kind = StockPlanner if plan == "TorchRec's planner" else EmbeddingShardingPlanner
    constraints = {name: ParameterConstraints(sharding_types=["table_wise"]) for name in methods}
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
    planner = kind(topology=topology, batch_size=BAGS, constraints=constraints)
    group: Any = dist.GroupMember.WORLD
    known = get_stock_sharders() if made is None else made
    return DistributedModelParallel(model, plan=planner.collective_plan(model, known, group), sharders=made)


def gap(mine: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, (mine.shape, theirs.shape)
    return float((mine - theirs).abs().max() / theirs.abs().max()) if len(mine) else 0.0


def swap(start: Model, methods: list[str], pooled: bool, sharders: str, plan: str, device: str, piped: bool) -> Any:
    """Train a swapped model in one kind of script; return outputs by step and this rank's values."""
    values = {name: value.clone() for name, value in start.state_dict().items()}
    model = copy.deepcopy(start) if device == "cpu" else Model(methods, pooled, "meta")
    sharded = sharded_as(model, methods, sharders, plan)
    load_plain(sharded, values)
    optimizer = optimizer_of(sharded)
    batches = [draw(methods, step, dist.get_rank()) for step in range(STEPS)]
    if piped:
        pipeline = TrainPipelineSparseDist(sharded, optimizer, torch.device("cpu"), execute_all_batches=True)
        coming = iter(batches)
        outputs = [pipeline.progress(coming) for _ in batches]
    else:
        outputs = []
        for batch in batches:
            optimizer.zero_grad()
            loss, out = sharded(batch)
            loss.backward()
            optimizer.step()
            outputs.append(out)
    return outputs, local_state(sharded)


def all_swaps(methods: list[str], pooled: bool, plans: tuple[str, ...]) -> dict[tuple[str, ...], str]:
    """Return what is wrong with each kind of script; "" where it equals one process."""
    start = filled(methods, pooled)
    wanted, trained = reference(copy.deepcopy(start), methods)
    found = {}
    for sharders, plan, device, piped in itertools.product(SHARDERS, plans, ("cpu", "meta"), (False, True)):
        key = (sharders, plan, device, "piped" if piped else "plain")
        try:
            outputs, state = swap(start, methods, pooled, sharders, plan, device, piped)
        except Exception as error:  # noqa: BLE001 (whatever it is, the test shall list it)
            found[key] = f"{type(error).__name__}: {error}"
            continue
        gaps = [gap(mine, theirs) for mine, theirs in zip(outputs, wanted, strict=True)]
        for name, value in state.items():
            shards = value if isinstance(value, list) else [((0, 0), value)]
            for (row, column), mine in shards:
                whole = trained[name]
                if mine.dim() == 2:
                    whole = whole[row : row + mine.shape[0], column : column + mine.shape[1]]
                gaps.append(gap(mine, whole) if mine.is_floating_point() else float((mine != whole).any()))
        found[key] = "" if max(gaps) < 1e-5 else f"differs by {max(gaps)}"
    return found
