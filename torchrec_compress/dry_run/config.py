"""The schema of `torchrec-compress plan`: tables by their sizes alone, and the machines that they go on.

This file imports nothing heavy, so that `--help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from torchrec_compress.schema import NonNegative, Positive, Range, Rate

Width = Annotated[int, Range(4)]
DataTypeName = Literal["FP32", "FP16", "BF16"]


@dataclass(frozen=True)
class TableSpec:
    """One table.

    Args:
        num_embeddings: rows.
        embedding_dim: width; null is the config's.
        feature_names: features that look it up; empty is the table's own name.
        pooling_factor: ids per bag, on average.
        pooling: how bags are pooled.
        data_type: of the table's rows, as TorchRec's configs say it.
        sharding_types: allowed sharding types, such as "row_wise"; empty allows all.
        compute_kernels: allowed kernels, such as "fused"; empty allows all.
    """

    num_embeddings: Positive
    embedding_dim: Width | None = None
    feature_names: list[str] = field(default_factory=list)
    pooling_factor: NonNegative = 1.0
    pooling: Literal["sum", "mean"] = "sum"
    data_type: DataTypeName = "FP32"
    sharding_types: list[str] = field(default_factory=list)
    compute_kernels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PlanConfig:
    """What to plan, and for which machines.

    Args:
        tables: by name.
        embedding_dim: width of tables that state none.
        output_dtype: of what look-ups return, as TorchRec's constraints say it; null is float32 for compressed tables.
        unpooled: whether the tables are an `EmbeddingCollection`, whose rows are not pooled.
        compression: {"method": name, options} or such mappings by table name or pattern; empty plans the tables as they
            are.
        frontier: file that `measure_frontier(...).to_dict()` was written to as JSON: of its ways each table gets the
            one with which all fits and the loss rises least. It is instead of `compression`.
        budget: memory of all ranks for tables, with a frontier, such as "40GB" (2**30 bytes to a GB, as
            everywhere here); null is all that there is.
        world_size: ranks.
        local_world_size: ranks of one host; null puts all on one.
        device: of the ranks.
        hbm: memory of a GPU, such as "80GB" (2**30 bytes to a GB, as in TorchRec).
        ddr: memory of the host for each rank; on the CPU it holds the tables.
        reserved: share of the memory that is held back, as in TorchRec.
        dense_net: memory of a rank for the rest of the model, its optimizer and its activations.
        batch_size: examples of a rank in a step; null is `global_batch_size` over the ranks, or 4096 without it.
        global_batch_size: examples of all ranks in a step, as training configs state them.
        optimizer: of native tables, in the backward.
        dense_optimizer: of codebooks and other replicated parameters.
        output: folder for plan.json, plan.md and plan.png, with a frontier choice.json, choice.md and choice.png;
            null writes nothing.
    """

    tables: dict[str, TableSpec] = field(default_factory=dict)
    embedding_dim: Width = 128
    output_dtype: DataTypeName | None = None
    unpooled: bool = False
    compression: dict[str, Any] = field(default_factory=dict)
    frontier: str | None = None
    budget: str | None = None
    world_size: Positive = 8
    local_world_size: Positive | None = None
    device: Literal["cuda", "cpu"] = "cuda"
    hbm: str = "80GB"
    ddr: str = "128GB"
    reserved: Rate = 0.15
    dense_net: str = "0GB"
    batch_size: Positive | None = None
    global_batch_size: Positive | None = None
    optimizer: Literal["rowwise_adagrad", "adagrad", "adam", "sgd"] = "rowwise_adagrad"
    dense_optimizer: Literal["adam", "adamw", "adagrad", "rmsprop", "momentum", "sgd"] = "adam"
    output: str | None = None


def rank_batch_size(config: PlanConfig) -> int:
    """Return the examples of a rank in a step.

    Raises:
        ValueError: it is not positive.

    Example:
        >>> rank_batch_size(PlanConfig(global_batch_size=65536, world_size=64))
        1024
    """
    size = config.batch_size
    if size is None:
        size = 4096 if config.global_batch_size is None else -(-config.global_batch_size // config.world_size)
    if size < 1:
        raise ValueError(f"batch_size: must be positive, got {size}")
    return size
