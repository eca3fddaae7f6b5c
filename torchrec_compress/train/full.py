"""The model of stage 1, with full tables or small ones, untrained and trained."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from torchrec_compress.compression import Compression
from torchrec_compress.train.check import pretrain_methods
from torchrec_compress.train.config import RunConfig, override
from torchrec_compress.train.data.source import ClickSource
from torchrec_compress.train.engine.checkpoint import check_identity
from torchrec_compress.train.engine.checkpoint_reader import read
from torchrec_compress.train.models.kinds import compressed_tables, full_tables, make_model, make_tables
from torchrec_compress.train.models.recommender import Recommender
from torchrec_compress.train.sealed import read_json


def full_model(config: RunConfig, data: ClickSource) -> Recommender:
    """Return the untrained model of stage 1, a pure function of config and seed.

    Its tables are on the meta device where `parallel.init` is "shards".
    """
    small = pretrain_methods(config)
    if small is not None:
        return untrained(config, small, data, config.parallel.init == "shards")
    torch.manual_seed(config.seed)
    device = torch.device("meta") if config.parallel.init == "shards" else None
    tables = full_tables(config.model, make_tables(config.model, data), device)
    return make_model(config.model, tables, data)


def untrained(config: RunConfig, chosen: Compression, data: ClickSource, in_shards: bool = False) -> Recommender:
    """Return a compressed model as it starts, a pure function of config and seed; on the meta device `in_shards`."""
    tables, device = make_tables(config.model, data), torch.device("meta") if in_shards else None
    torch.manual_seed(config.seed)  # native tables are drawn, whatever this process did before
    collection = compressed_tables(config.model, tables, chosen, config.seed, device)
    torch.manual_seed(config.seed)
    return make_model(config.model, collection, data)


def best_checkpoint(source: Path) -> Path:
    """Return the checkpoint of the best validation of the model of stage 1 whose folder this is.

    Raises:
        ValueError: the folder's summary or the checkpoint is damaged, or that is of another training.
    """
    summary = read_json(source / "summary.json", keys=("checkpoint", "identity"))
    if not re.fullmatch(r"pretrain/checkpoints/step\d{9,}", str(summary["checkpoint"])):
        raise ValueError(f"{source}/summary.json: must name a checkpoint beside it, got {summary['checkpoint']!r}")
    path = source / summary["checkpoint"]
    check_identity(path, summary["identity"])
    return path


def trained_model(config: RunConfig, data: ClickSource, source: Path) -> Recommender:
    """Return the trained model of stage 1 in this process's memory, tables as they were trained."""
    model = full_model(override(config, {"parallel.init": "host"}), data)
    read_model(best_checkpoint(source), model)
    return model


def read_model(path: Path, model: Recommender) -> None:
    """Fill an unsharded model from a checkpoint, in this process alone."""
    state = {"model": dict(model.state_dict())}
    read(path, state)
    model.load_state_dict(state["model"])


def held_bytes(source: Path) -> int | None:
    """Return the bytes of the tables of stage 1 and their optimizer state, or None where it was not told apart then."""
    told = read_json(source / "summary.json", keys=("training", "dense_bytes"))
    stored = told["footprint"]["total_bytes"] if "footprint" in told else told["dense_bytes"]
    state = told["training"].get("state_bytes")
    return None if state is None else stored + state
