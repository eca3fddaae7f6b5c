"""What the trained model of stage 1 is asked, once for all that share it: its logits, the curvature of its loss."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_compress.convert import Curvature, measure_curvature
from torchrec_compress.train.config import RunConfig
from torchrec_compress.train.data.batch import EVERYTHING, Batch, Share
from torchrec_compress.train.data.source import ClickSource
from torchrec_compress.train.engine.checkpoint import check_same
from torchrec_compress.train.engine.trainable import Trainable
from torchrec_compress.train.evaluate.scoring import predict
from torchrec_compress.train.full import best_checkpoint, full_model
from torchrec_compress.train.ranks import Ranks, on_first
from torchrec_compress.train.sealed import is_done, load_tensors, publish, read_json, save_tensors, write_json

_CURVATURE_BATCH = 8192  # rows, over all ranks


def teacher_logits(config: RunConfig, data: ClickSource, source: Path, ranks: Ranks) -> Tensor:
    """Return the logits of all train rows by the model of stage 1, (rows,) float32, computed once.

    Args:
        config: of the run.
        data: the rows.
        source: folder of the model of stage 1.
        ranks: all of which call this; every one computes its share.

    Raises:
        ValueError: what was kept is damaged, or of another model.
    """

    def ask(full: Trainable) -> dict[str, Tensor]:
        scored = predict(full.logits, data, "train", ranks)
        return {} if scored is None else {"logits": torch.from_numpy(scored.logits)}

    folder = source / "teacher"
    logits = _kept(folder, "train_logits.pt", {}, ask, config, data, ranks).get("logits")
    num_rows = data.num_rows("train")
    if logits is None or logits.shape != (num_rows,):
        got = None if logits is None else tuple(logits.shape)
        raise ValueError(
            f"{folder}/train_logits.pt: must hold a logit for each of {num_rows} rows, got {got}; {_remedy(folder)}"
        )
    return logits


def curvature_of(config: RunConfig, data: ClickSource, source: Path, ranks: Ranks) -> dict[str, Curvature]:
    """Return the curvature of the loss of the model of stage 1 by table name, measured once on rows of validation.

    Args:
        config: of the run; `curvature_rows` are drawn by its seed, in whole batches, or all rows where they are fewer.
        data: the rows.
        source: folder of the model of stage 1.
        ranks: all of which call this; every one measures its share.

    Raises:
        ValueError: what was kept is damaged, or of another model; a gradient is not finite.
    """

    def ask(full: Trainable) -> dict[str, Tensor]:
        found = measure_curvature(
            full.model,
            (batch.to(ranks.device) for batch in validation(config, data, Share(ranks.rank, ranks.world))),
            lambda model, batch: model(batch.features, batch.dense).logits,
            weights=lambda batch: batch.weights,
            group=dist.group.WORLD,
            seed=config.seed,
        )
        return {
            f"{name}.{key}": torch.as_tensor(value, dtype=torch.float64 if key == "moved" else None)
            for name, mine in found.items()
            for key, value in mine.to_dict().items()
            if key != "table"
        }

    folder = source / f"curvature{config.curvature_rows}"
    tensors = _kept(folder, "curvature.pt", {"rows": config.curvature_rows}, ask, config, data, ranks)
    tables: dict[str, dict[str, Any]] = {name: {"table": name} for name in data.features}
    for key, value in tensors.items():
        name, _, field = key.rpartition(".")
        tables.setdefault(name, {})[field] = value if value.dim() else value.item()
    try:
        return {name: Curvature.from_dict(table) for name, table in tables.items()}
    except ValueError as error:
        raise ValueError(f"{folder}/curvature.pt: {error}; {_remedy(folder)}") from error


def validation(config: RunConfig, data: ClickSource, share: Share = EVERYTHING) -> Iterator[Batch]:
    """Yield this share of the rows of validation that a curvature is measured on, drawn by the seed."""
    batches = data.batches("valid", _CURVATURE_BATCH, config.seed, share)
    return islice(batches.epoch(0), -(-config.curvature_rows // _CURVATURE_BATCH))


def _kept(
    folder: Path,
    name: str,
    settings: Mapping[str, Any],
    ask: Callable[[Trainable], dict[str, Tensor]],
    config: RunConfig,
    data: ClickSource,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Return what the model of stage 1 answered, tensors by name. Every rank calls it.

    Args:
        folder: in that of the model; the answer is kept there, and asked for where it is not.
        name: of the file of tensors.
        settings: of the question.
        ask: of the model under its ranks; what it returns on rank 0 counts.
        config: of the run.
        data: the rows.
        ranks: that hold the model.

    Raises:
        ValueError: what was kept is damaged, or of another model or question.
    """
    source, path = folder.parent, folder / name
    best = on_first(lambda: best_checkpoint(source), ranks)
    identity = on_first(lambda: read_json(source / "summary.json")["identity"], ranks)
    told = {**identity, "checkpoint": best.name, **settings}
    if not on_first(lambda: is_done(path), ranks):
        full = Trainable(full_model(config, data), config.pretrain, ranks, config.parallel)
        full.load_model(best)
        answer = ask(full)

        def write(part: Path) -> None:
            write_json(part / "identity.json", told)
            save_tensors(part / name, answer)

        def keep() -> None:
            if folder.is_dir() and not is_done(path):
                shutil.rmtree(folder)
            publish(folder, write)

        on_first(keep, ranks)
    remedy = _remedy(folder)
    check_same(folder, read_json(folder / "identity.json", remedy), told)
    return load_tensors(path, remedy)


def _remedy(folder: Path) -> str:
    return f"delete {folder}, the same command makes it again"
