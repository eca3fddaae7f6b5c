"""Plan tables by their sizes alone: no data, no GPU, no process group, nothing allocated."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, PoolingType
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.modules.embedding_configs import DataType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_compress.amounts import parse_bytes
from torchrec_compress.compression import Frontier, parse
from torchrec_compress.dry_run.config import PlanConfig, TableSpec, rank_batch_size
from torchrec_compress.modules import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, native_parameters
from torchrec_compress.planner import EmbeddingShardingPlanner, PlannedChoice, PlanReport
from torchrec_compress.planner.accounting import FUSED_OPTIMIZERS, fused_state_bytes
from torchrec_compress.planner.choosing import TooSmallBudget

_META = torch.device("meta")


def plan(config: PlanConfig) -> PlanReport:
    """Plan, and write the files that the config asks for.

    Args:
        config: tables and machines.

    Returns:
        The report.

    Raises:
        ValueError: a bad config.
        InsufficientStorageError: the tables do not fit.

    Example:
        >>> codes = {"method": "pq", "num_codes": 8}
        >>> report = plan(PlanConfig(tables={"user": TableSpec(10**9)}, compression=codes, hbm="4GB"))
        >>> round(report.ratio), report.tables["user"].parts[0].sharding_type
        (64, 'row_wise')
    """
    return plan_and_choose(config)[0]


def plan_and_choose(config: PlanConfig) -> tuple[PlanReport, PlannedChoice | None]:
    """Plan as `plan` does; return what was chosen from a frontier, too, or None without one."""
    _check_choice(config)
    tables = make_tables(config)
    model = nn.ModuleDict({"embeddings": make_collection(config, tables)})
    apply_optimizer_in_backward(FUSED_OPTIMIZERS[config.optimizer], native_parameters(model), {"lr": 0.1})
    planner = EmbeddingShardingPlanner(
        make_topology(config),
        rank_batch_size(config),
        make_constraints(config, tables),
        dense_optimizer=config.dense_optimizer,
        storage_reservation=FixedPercentageStorageReservation(config.reserved),
        stats=[],
    )
    choice = None
    if config.frontier is None:
        planner.plan(model)
    else:
        budget = None if config.budget is None else _bytes(config.budget, "budget")
        frontier = read_frontier(Path(config.frontier))
        try:
            choice = planner.choose(model, frontier, budget)
        except TooSmallBudget as error:
            key = "budget" if budget == error.got else ("hbm" if config.device == "cuda" else "ddr")
            raise ValueError(str(error).replace("choose: budget_bytes", f"{key}:", 1)) from error
    assert planner.report is not None
    if config.output is not None:
        planner.report.save(Path(config.output))
        if choice is not None:
            choice.save(Path(config.output))
    return planner.report, choice


def _check_choice(config: PlanConfig) -> None:
    """Raise ValueError where what chooses methods does not go together."""
    if config.frontier is None and config.budget is not None:
        raise ValueError(f"budget: must come with a frontier to choose from, got {config.budget!r} alone")
    if config.frontier is not None and config.compression:
        raise ValueError(
            "frontier: must come without compression, which it chooses, got both; leave one of them out (of the "
            "command line: --compression '{}')"
        )


def read_frontier(path: Path) -> Frontier:
    """Return a frontier that was written to a file as JSON; it may come from a stranger.

    Raises:
        ValueError: there is no such file, or it is no frontier.
    """
    wanted = f"frontier: {path}: must be a file that measure_frontier(...).to_dict() was written to as JSON"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{wanted}, got none ({error.strerror}); name that file") from error
    except (ValueError, RecursionError) as error:  # cut short, no text, or no JSON
        raise ValueError(f"{wanted}, got other content ({error}); write it again") from error
    try:
        return Frontier.from_dict(found)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{wanted}, got {error}; measure it again") from error


def run(config: PlanConfig) -> str:
    """Plan, and return what to print.

    Raises:
        ValueError: a bad config, or tables that do not fit; the text says what would.
    """
    start = time.perf_counter()
    report, choice = quiet_plan(config)
    chosen = "" if choice is None else f"{choice}\n\n"
    return chosen + summary(config, report, time.perf_counter() - start)


def quiet_plan(config: PlanConfig) -> tuple[PlanReport, PlannedChoice | None]:
    """Plan with TorchRec's own log kept to errors.

    Raises:
        ValueError: a bad config, or tables that do not fit; the text says what would.
    """
    levels = {"": logging.ERROR, "torchrec": logging.ERROR, "torchrec_compress": logging.WARNING}
    before = {name: logging.getLogger(name).level for name in levels}
    try:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        return plan_and_choose(config)
    except PlannerError as error:
        raise ValueError(str(error).partition("\n\nTorchRec says")[0]) from error
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def make_tables(config: PlanConfig) -> list[Any]:
    """Return TorchRec's configs of the tables."""
    if not config.tables:
        raise ValueError(
            "tables: must name at least one table, got none; see configs/plan_criteo_1tb.yaml, or give a training "
            "config"
        )
    if config.unpooled:
        return [EmbeddingConfig(**_shape(config, name, spec)) for name, spec in config.tables.items()]
    return [
        EmbeddingBagConfig(**_shape(config, name, spec), pooling=PoolingType[spec.pooling.upper()])
        for name, spec in config.tables.items()
    ]


def _shape(config: PlanConfig, name: str, spec: TableSpec) -> dict[str, Any]:
    width = config.embedding_dim if spec.embedding_dim is None else spec.embedding_dim
    if spec.num_embeddings < 1 or width < 4 or width % 4:
        raise ValueError(
            f"tables.{name}: num_embeddings must be positive and embedding_dim a multiple of 4 (FBGEMM), got "
            f"{spec.num_embeddings} and {width}"
        )
    if spec.pooling_factor < 0:
        raise ValueError(f"tables.{name}.pooling_factor: must not be negative, got {spec.pooling_factor}")
    names = spec.feature_names or [name]
    return {
        "name": name,
        "num_embeddings": spec.num_embeddings,
        "embedding_dim": width,
        "feature_names": names,
        "data_type": DataType[spec.data_type],
    }


def make_collection(config: PlanConfig, tables: list[Any]) -> nn.Module:
    """Return the collection on the meta device: compressed, or TorchRec's own where there is no compression."""
    if config.compression:
        kind: Any = CompressedEmbeddingCollection if config.unpooled else CompressedEmbeddingBagCollection
        return kind(tables, device=_META, compression=parse(config.compression))
    stock: Any = EmbeddingCollection if config.unpooled else EmbeddingBagCollection
    return stock(tables=tables, device=_META)


def make_constraints(config: PlanConfig, tables: list[Any]) -> dict[str, ParameterConstraints]:
    """Return constraints by table name: pooling factors, and what the config allows."""
    return {
        table.name: ParameterConstraints(
            sharding_types=spec.sharding_types or None,
            compute_kernels=spec.compute_kernels or None,
            pooling_factors=[spec.pooling_factor] * len(table.feature_names),
            output_dtype=None if config.output_dtype is None else DataType[config.output_dtype],
        )
        for table, spec in zip(tables, config.tables.values(), strict=True)
    }


def make_topology(config: PlanConfig) -> Topology:
    """Return the machines, with the memory of the dense net taken off."""
    ranks, on_host = config.world_size, config.local_world_size or config.world_size
    if ranks < 1 or on_host < 1 or ranks % on_host:
        raise ValueError(
            f"world_size: must be a multiple of local_world_size, both positive, got {ranks} and {on_host}"
        )
    if not 0 <= config.reserved < 1:
        raise ValueError(f"reserved: must be in [0, 1), got {config.reserved}")
    hbm, ddr = _bytes(config.hbm, "hbm"), _bytes(config.ddr, "ddr")
    dense = _bytes(config.dense_net, "dense_net")
    # TorchRec's reservation takes its share of a GPU's memory only
    left = hbm - dense if config.device == "cuda" else int(ddr * (1 - config.reserved)) - dense
    if left <= 0:
        raise ValueError(f"dense_net: must leave memory for tables, got {config.dense_net} of {left + dense:,} bytes")
    return Topology(
        world_size=ranks,
        local_world_size=on_host,
        compute_device=config.device,
        hbm_cap=left if config.device == "cuda" else 0,
        ddr_cap=left if config.device == "cpu" else ddr,
    )


def _bytes(text: str, where: str) -> int:
    return parse_bytes(text, where, 1024)  # as in TorchRec


def summary(config: PlanConfig, report: PlanReport, seconds: float) -> str:
    """Return the plan as text, beside what the dense tables would take.

    Args:
        config: that was planned.
        report: of the plan.
        seconds: that planning took.
    """
    from torchrec_compress.planner.text import size

    state = sum(
        fused_state_bytes(table.num_embeddings, table.embedding_dim, FUSED_OPTIMIZERS[config.optimizer].__name__)
        for table in report.tables.values()
    )
    ranks = len(report.ranks)
    most = max(rank.device_bytes for rank in report.ranks)
    left = min(rank.capacity_bytes for rank in report.ranks)
    lines = [
        str(report),
        "",
        f"dense tables: {size(report.dense_bytes)} and {size(state)} of optimizer state, at least "
        f"{size((report.dense_bytes + state) / ranks)} on each of {ranks} ranks",
        f"this plan:    {size(report.stored_bytes)} stored, {report.ratio:.1f}x; at most {size(most)} of {size(left)} "
        f"on a rank; planned in {seconds:.1f} s",
    ]
    return "\n".join(lines)
