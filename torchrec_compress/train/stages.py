"""The three stages: pre-train a model of full or small tables, fit the compressed tables, train on with them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from torchrec_compress.compression import Compression
from torchrec_compress.convert import Curvature, dequantize_codebooks, export_codes, quantize_codebooks
from torchrec_compress.methods import MethodConfig
from torchrec_compress.train.asked import curvature_of, teacher_logits
from torchrec_compress.train.check import Wanted, check_config, check_run
from torchrec_compress.train.choosing import settle
from torchrec_compress.train.config import DataConfig, RunConfig, fingerprint, lasting, needs_pretrained
from torchrec_compress.train.data.batch import Batch
from torchrec_compress.train.data.inputs import identify
from torchrec_compress.train.data.memory import ClickData
from torchrec_compress.train.data.open import open_data
from torchrec_compress.train.data.sequences import SequenceData
from torchrec_compress.train.data.source import ClickSource
from torchrec_compress.train.engine.checkpoint import check_same
from torchrec_compress.train.engine.loop import Task, Trained, train
from torchrec_compress.train.evaluate.metrics import bayes_metrics
from torchrec_compress.train.evaluate.ranking import popularity_metrics
from torchrec_compress.train.evaluate.scoring import check_labels, score
from torchrec_compress.train.evaluate.usage import code_usage
from torchrec_compress.train.fitting import PREDICTED, fit
from torchrec_compress.train.full import full_model, held_bytes, read_model, trained_model, untrained
from torchrec_compress.train.identity import check_unchanged, identity_of, record
from torchrec_compress.train.models.kinds import CompressedTables, make_tables
from torchrec_compress.train.models.recommender import Recommender
from torchrec_compress.train.ranks import Ranks, agree, on_first
from torchrec_compress.train.sealed import (
    is_done,
    listed,
    load_tensors,
    read_json,
    read_text,
    save_tensors,
    write_json,
)

# how a run comes by its rows; a worker of a comparison keeps those that it opened last
Opener: TypeAlias = Callable[[DataConfig, Ranks], ClickSource]


def open_checked(config: DataConfig, ranks: Ranks) -> ClickSource:
    """Open data and look at its labels. Every rank calls it, and an error reaches all.

    Raises:
        ValueError: a file that is missing, empty or malformed, or labels on which no AUC is defined.
    """
    data = agree(lambda: open_data(config, ranks.device.type == "cuda"), ranks)
    on_first(lambda: check_labels(data), ranks)
    return data


def pretrained_key(config: RunConfig) -> str:
    """Return the name under which the model of stage 1 of a config is shared."""
    small = [config.pretrain_compression] if config.pretrain_compression else []
    return fingerprint(lasting(config.data), lasting(config.model), lasting(config.pretrain), config.seed, *small)


def pretrain(
    config: RunConfig, shared: Path, ranks: Ranks, position: int | None = 0, open_source: Opener = open_checked
) -> Path:
    """Train the model of stage 1, unless that was done already. Every rank calls it.

    Args:
        config: data, model, pretrain, pretrain_compression, seed and parallel matter.
        shared: folder of all full models.
        ranks: that train it.
        position: of the progress bar; None shows none.
        open_source: returns the rows, where they are needed.

    Returns:
        The folder with `summary.json`, which names the checkpoint of the best validation.

    Raises:
        ValueError: what is there is damaged, or was trained with other settings or data files.
    """
    folder, files = shared / pretrained_key(config), on_first(lambda: identify(config.data), ranks)
    identity = identity_of(config, "pretrain", files)
    if on_first(lambda: _is_pretrained(folder, identity), ranks):
        return folder
    on_first(lambda: record(config, folder, files), ranks)
    data = open_source(config.data, ranks)
    model = full_model(config, data)
    footprint = _footprint(model)
    trained = train(model, _task(config, data, files, folder, "pretrain", position), ranks)
    metrics, undefined = score(trained.trainable.logits, data, config.data, ranks)
    summary = {
        "identity": identity,
        "metrics": metrics,
        "undefined": undefined,
        "training": _training(trained),
        "bayes": _bayes(data),
        "dense_bytes": sum(4 * t.num_embeddings * t.embedding_dim for t in make_tables(config.model, data)),
        "checkpoint": str(trained.checkpoint.relative_to(folder)),
        **({} if footprint is None else {"footprint": footprint}),
    }
    on_first(lambda: write_json(folder / "summary.json", summary), ranks)
    return folder


def _footprint(model: Recommender) -> dict[str, Any] | None:
    """Return the bytes of a model's tables as plain data, or None where they are full."""
    collection = model.embeddings
    return collection.footprint().to_dict() if isinstance(collection, CompressedTables) else None


def _is_pretrained(folder: Path, identity: dict[str, Any]) -> bool:
    """Return whether a full model is there, with these very settings and data files.

    Raises:
        ValueError: a file is damaged, or the settings or data files are others.
    """
    path = folder / "summary.json"
    if not is_done(path):
        return False
    for name in listed(folder) or {}:
        read_text(folder / name)
    check_same(path, read_json(path, keys=("identity",))["identity"], identity)
    return True


def run(
    config: RunConfig,
    folder: Path,
    shared: Path,
    ranks: Ranks,
    position: int | None = 0,
    open_source: Opener = open_checked,
) -> dict[str, Any]:
    """Do all stages of a config and write `summary.json`. Every rank calls it.

    Args:
        config: the whole run.
        folder: of the run; stages resume from what it holds.
        shared: folder of full models.
        ranks: that train.
        position: of the progress bar; None shows none.
        open_source: returns the rows.

    Returns:
        The summary: metrics of test and valid, bytes, training.

    Raises:
        ValueError: bad data, settings, or a resumed run of other settings.
        OSError: something could not be written.
        Preempted: SIGTERM came while a model was trained; everything is saved.
    """
    wanted = check_config(config)
    files = on_first(lambda: identify(config.data), ranks)
    on_first(lambda: (check_unchanged(config, folder, files), record(config, folder, files))[0], ranks)
    data = open_source(config.data, ranks)
    check_run(config, wanted, data, ranks.world)
    source = pretrain(config, shared, ranks, position, lambda *_: data) if needs_pretrained(config) else None
    if wanted is not None:
        task = _task(config, data, files, folder, "retrain", position)
        summary = _run_compressed(config, wanted, task, source, folder, ranks)
    else:
        assert source is not None
        summary = _run_full(config, data, source, folder, ranks)
    summary["bayes"] = _bayes(data)
    summary |= _popularity(data, ranks)
    on_first(lambda: write_json(folder / "summary.json", summary), ranks)
    return summary


def _run_full(config: RunConfig, data: ClickSource, source: Path, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Return the summary of a run of stage 1 alone, and write `model.pt`."""
    full = read_json(source / "summary.json", keys=("metrics", "training", "dense_bytes"))
    size = full["dense_bytes"]
    dense = {"dense_bytes": size, "total_bytes": size, "ratio": 1.0, "compressed_ratio": 1.0}
    if config.parallel.init == "host":
        on_first(
            lambda: save_tensors(folder / "model.pt", dict(trained_model(config, data, source).state_dict())), ranks
        )
    return {
        "seed": config.seed,
        "footprint": full.get("footprint", dense),
        "fitted": full["metrics"],
        "metrics": full["metrics"],
        "undefined": full["undefined"],
        "state_bytes": full["training"].get("state_bytes"),
        "held_bytes": held_bytes(source),
        "training": full["training"],
    }


def _run_compressed(
    config: RunConfig,
    wanted: Wanted,
    task: Task,
    source: Path | None,
    folder: Path,
    ranks: Ranks,
) -> dict[str, Any]:
    """Fit the compressed tables and train on with them."""
    data, started = task.data, time.perf_counter()
    curvature = {}
    if source is not None and config.curvature_rows:
        curvature = curvature_of(config, data, source, ranks)
    chosen, counts = settle(config, wanted, task, source, folder, curvature, ranks)
    model = _compressed(config, chosen, data, source, folder, counts, curvature, ranks)
    collection = model.embeddings
    assert isinstance(collection, CompressedTables)
    methods, path = collection.methods(), None
    summary: dict[str, Any] = {"seed": config.seed, "fit_seconds": time.perf_counter() - started}
    summary["footprint"] = _footprint(_as_exported(config, methods, data) or model)
    if config.parallel.init == "host":
        summary["usage"] = code_usage(collection, counts)
    if source is not None:
        summary["fitted"], summary["undefined"] = score(_logits_of(model), data, config.data, ranks)
        summary["metrics"] = summary["fitted"]
        if curvature:
            summary["predicted"] = on_first(lambda: read_json(folder / PREDICTED), ranks)
            summary["fitted_to"] = on_first(lambda: read_json(source / "summary.json", keys=("metrics",)), ranks)[
                "metrics"
            ]
    held = collection.footprint().total_bytes
    if config.retrain.epochs > 0:
        path, held = _train_on(config, task, model, source, folder, summary, ranks)
    before = 0 if source is None else held_bytes(source)
    summary["held_bytes"] = None if before is None else max(held, before)
    if config.parallel.init == "host":
        usage = on_first(partial(_keep, config, data, methods, path, folder, counts), ranks)
        if _are_exported(methods):  # no codes before
            summary["usage"] |= usage
    return summary


def _keep(
    config: RunConfig,
    data: ClickSource,
    methods: Mapping[str, MethodConfig],
    trained: Path | None,
    folder: Path,
    counts: dict[str, Tensor],
) -> dict[str, dict[str, float]]:
    """Write `model.pt`, tables as they are served, and return how evenly their codewords are used; see `_stored`."""
    model = _stored(config, data, methods, trained, folder)
    save_tensors(folder / "model.pt", dict(model.state_dict()))
    assert isinstance(model.embeddings, CompressedTables)
    return code_usage(model.embeddings, counts)


def _are_exported(methods: Mapping[str, MethodConfig]) -> bool:
    """Return whether tables train otherwise than they are served."""
    return any(method.exported() != method for method in methods.values())


def _as_exported(config: RunConfig, methods: Mapping[str, MethodConfig], data: ClickSource) -> Recommender | None:
    """Return the model whose tables are as they are served, without values; None where they train so."""
    if not _are_exported(methods):
        return None
    return untrained(config, {name: each.exported() for name, each in methods.items()}, data, in_shards=True)


def _train_on(
    config: RunConfig,
    task: Task,
    model: Recommender,
    source: Path | None,
    folder: Path,
    summary: dict[str, Any],
    ranks: Ranks,
) -> tuple[Path, int]:
    """Train the compressed model on and score it as it is stored; return its checkpoint, and the bytes it held."""
    collection, teacher = model.embeddings, None
    assert isinstance(collection, CompressedTables)
    methods, in_floats = collection.methods(), _trains_in_floats(config, collection)
    if in_floats:
        collection = model.embeddings = dequantize_codebooks(model.embeddings)
    held = collection.footprint().total_bytes
    if config.retrain.distill_weight:
        assert source is not None
        teacher = teacher_logits(config, task.data, source, ranks)
    # it is wrapped in place
    trained = train(model, dataclasses.replace(task, keep_start=source is not None, teacher=teacher), ranks)
    logits = trained.trainable.logits
    if in_floats:  # what is stored is rounded
        logits = _logits_of(_stored(config, task.data, methods, trained.checkpoint, folder))
    summary["training"], summary["state_bytes"] = _training(trained), trained.state_bytes
    summary["metrics"], summary["undefined"] = score(logits, task.data, config.data, ranks)
    return trained.checkpoint, held + trained.state_bytes


def _logits_of(model: Recommender) -> Callable[[Batch], Tensor]:
    """Return what scores a batch by a model in this process's memory."""
    model.eval()
    return lambda batch: model(batch.features, batch.dense).logits


def _trains_in_floats(config: RunConfig, collection: CompressedTables) -> bool:
    """Return whether codebooks or hot rows that are stored in few bits train on, in float32."""
    stage, methods = config.retrain, collection.methods().values()
    wanted = stage.dequantize and stage.train_codebooks and needs_pretrained(config)
    return wanted and any(method.dequantized() != method for method in methods)


def _stored(
    config: RunConfig, data: ClickSource, methods: Mapping[str, MethodConfig], trained: Path | None, folder: Path
) -> Recommender:
    """Return the whole compressed model in this process's memory: as fitted, or as trained after that."""
    model = untrained(config, dict(methods), data)
    _fill(model, folder / "fitted.pt")
    collection = model.embeddings
    assert isinstance(collection, CompressedTables)
    if trained is not None:
        in_floats = _trains_in_floats(config, collection)
        if in_floats:
            collection = model.embeddings = dequantize_codebooks(model.embeddings)
        read_model(trained, model)
        if in_floats:
            model.embeddings = quantize_codebooks(model.embeddings, methods)
    if _are_exported(methods):
        model.embeddings = export_codes(model.embeddings)
    return model


def _compressed(
    config: RunConfig,
    chosen: Compression,
    data: ClickSource,
    source: Path | None,
    folder: Path,
    counts: dict[str, Tensor],
    curvature: dict[str, Curvature],
    ranks: Ranks,
) -> Recommender:
    """Return the fitted model; the fit is done by rank 0 and kept, so that a resumed run need not repeat it."""
    in_shards = source is None and config.parallel.init == "shards"
    model, kept = untrained(config, chosen, data, in_shards), folder / "fitted.pt"
    if in_shards:
        return model
    on_first(lambda: fit(config, data, source, kept, model, counts, curvature), ranks)
    agree(lambda: _fill(model, kept), ranks)
    return model


def _fill(model: Recommender, path: Path) -> None:
    """Fill a model from a file of its state dict.

    Raises:
        ValueError: the file is damaged, or its tensors are not the model's.
    """
    try:
        model.load_state_dict(load_tensors(path))
    except RuntimeError as error:  # torch lists all names and shapes that differ
        raise ValueError(f"{path}: must hold the tensors of this model, got others: {error}; delete it") from error


def _task(
    config: RunConfig, data: ClickSource, files: dict[str, Any], folder: Path, stage: str, position: int | None
) -> Task:
    return Task(
        data=data,
        stage=getattr(config, stage),
        seed=config.seed,
        folder=folder / stage,
        label=f"{stage} {folder.parent.name if stage == 'retrain' else 'full'} seed {config.seed}",
        tensorboard=config.tensorboard,
        position=position,
        identity=identity_of(config, stage, files),
        parallel=config.parallel,
    )


def _bayes(data: ClickSource) -> dict[str, float]:
    return bayes_metrics(data.test) if isinstance(data, ClickData) else {}


def _popularity(data: ClickSource, ranks: Ranks) -> dict[str, Any]:
    """Return what popularity alone does on sequences, for a summary."""
    if not isinstance(data, SequenceData):
        return {}
    return {"popularity": on_first(lambda: popularity_metrics(data), ranks)}


def _training(trained: Trained) -> dict[str, float]:
    return {
        "steps": trained.steps,
        "best_step": trained.best_step,
        "seconds": trained.seconds,
        "rows_per_second": trained.rows_per_second,
        "state_bytes": trained.state_bytes,
        "skipped_batches": trained.skipped,
    }
