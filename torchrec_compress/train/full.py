"""The model of stage 1, with full tables or small ones: untrained, trained, and as a teacher."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from torch import Tensor
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.compression import Compression
from torchrec_compress.train.check import pretrain_methods
from torchrec_compress.train.config import RunConfig, override
from torchrec_compress.train.data.source import ClickSource
from torchrec_compress.train.engine.checkpoint import check_identity, check_same
from torchrec_compress.train.engine.checkpoint_reader import read
from torchrec_compress.train.engine.trainable import Trainable
from torchrec_compress.train.evaluate.scoring import predict
from torchrec_compress.train.models.click import ClickModel, make_model, make_tables
from torchrec_compress.train.ranks import Ranks, on_first
from torchrec_compress.train.sealed import is_done, load_tensors, publish, read_json, save_tensors, write_json


def full_model(config: RunConfig, data: ClickSource) -> ClickModel:
    """Return the untrained model of stage 1, a pure function of config and seed.

    Its tables are on the meta device where `parallel.init` is "shards".
    """
    small = pretrain_methods(config)
    if small is not None:
        return untrained(config, small, data, config.parallel.init == "shards")
    torch.manual_seed(config.seed)
    device = torch.device("meta") if config.parallel.init == "shards" else None
    tables = EmbeddingBagCollection(tables=make_tables(config.model, data), device=device)
    return make_model(tables, data.num_dense, config.model)


def untrained(config: RunConfig, chosen: Compression, data: ClickSource, in_shards: bool = False) -> ClickModel:
    """Return a compressed model as it starts, a pure function of config and seed; on the meta device `in_shards`."""
    tables, device = make_tables(config.model, data), torch.device("meta") if in_shards else None
    torch.manual_seed(config.seed)  # native tables are drawn, whatever this process did before
    collection = CompressedEmbeddingBagCollection(tables, device=device, compression=chosen, seed=config.seed)
    torch.manual_seed(config.seed)
    return make_model(collection, data.num_dense, config.model)


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


def trained_model(config: RunConfig, data: ClickSource, source: Path) -> ClickModel:
    """Return the trained model of stage 1 in this process's memory, tables as they were trained."""
    model = full_model(override(config, {"parallel.init": "host"}), data)
    read_model(best_checkpoint(source), model)
    return model


def read_model(path: Path, model: ClickModel) -> None:
    """Fill an unsharded model from a checkpoint, in this process alone."""
    state = {"model": dict(model.state_dict())}
    read(path, state)
    model.load_state_dict(state["model"])


def held_bytes(source: Path) -> int:
    """Return the bytes of the tables of stage 1, as they were stored, and of all optimizer state while it trained."""
    told = read_json(source / "summary.json", keys=("training", "dense_bytes"))
    stored = told["footprint"]["total_bytes"] if "footprint" in told else told["dense_bytes"]
    return stored + told["training"]["optimizer_bytes"]


def teacher_logits(config: RunConfig, data: ClickSource, source: Path, ranks: Ranks) -> Tensor:
    """Return the logits of all train rows by the model of stage 1, (rows,) float32, computed once.

    Every rank calls it and computes its share.

    Raises:
        ValueError: what was kept is damaged, or of another model.
    """
    folder = source / "teacher"
    path, best = folder / "train_logits.pt", on_first(lambda: best_checkpoint(source), ranks)
    told = on_first(lambda: {**read_json(source / "summary.json")["identity"], "checkpoint": best.name}, ranks)
    if not on_first(lambda: is_done(path), ranks):
        full = Trainable(full_model(config, data), config.pretrain, ranks, config.parallel)
        full.load_model(best)
        scored = predict(full.logits, data, "train", ranks)

        def write(part: Path) -> None:
            assert scored is not None
            write_json(part / "identity.json", told)
            save_tensors(part / path.name, {"logits": torch.from_numpy(scored.logits)})

        def keep() -> None:
            if folder.is_dir() and not is_done(path):
                shutil.rmtree(folder)
            publish(folder, write)

        on_first(keep, ranks)
    remedy = f"delete {folder}, the same command makes it again"
    check_same(folder, read_json(folder / "identity.json", remedy), told)
    return _logits(path, remedy, data.num_rows("train"))


def _logits(path: Path, remedy: str, num_rows: int) -> Tensor:
    """Return the logits of all train rows that were kept.

    Raises:
        ValueError: the file is damaged, or holds anything else.
    """
    logits = load_tensors(path, remedy).get("logits")
    if logits is None or logits.shape != (num_rows,):
        got = None if logits is None else tuple(logits.shape)
        raise ValueError(f"{path}: must hold a logit for each of {num_rows} rows, got {got}; {remedy}")
    return logits
