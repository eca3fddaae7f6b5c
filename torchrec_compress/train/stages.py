"""The three stages: pre-train the full model, fit the compressed tables, train on with them."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.compression import parse, resolve
from torchrec_compress.methods import CodebookConfig
from torchrec_compress.train.byte_budget import budget_of
from torchrec_compress.train.check import check_config, check_run
from torchrec_compress.train.config import (
    DataConfig,
    RunConfig,
    fingerprint,
    lasting,
    needs_pretrained,
    override,
)
from torchrec_compress.train.data.inputs import identify
from torchrec_compress.train.data.memory import ClickData
from torchrec_compress.train.data.open import open_data
from torchrec_compress.train.data.source import ClickSource
from torchrec_compress.train.engine.checkpoint import check_same
from torchrec_compress.train.engine.checkpoint_reader import read
from torchrec_compress.train.engine.loop import Task, Trained, train
from torchrec_compress.train.engine.trainable import Trainable
from torchrec_compress.train.evaluate.metrics import bayes_metrics
from torchrec_compress.train.evaluate.scoring import check_labels, predict, score, total_counts
from torchrec_compress.train.evaluate.usage import code_usage
from torchrec_compress.train.fitting import best_checkpoint, choose, fit
from torchrec_compress.train.identity import check_unchanged, identity_of, record
from torchrec_compress.train.models.click import ClickModel, make_model, make_tables
from torchrec_compress.train.ranks import Ranks, agree, on_first, start
from torchrec_compress.train.sealed import (
    is_done,
    listed,
    load_tensors,
    publish,
    read_json,
    read_text,
    save_tensors,
    write_json,
)

_loaded: dict[str, ClickSource] = {}


def get_data(config: DataConfig, files: dict[str, Any], ranks: Ranks) -> ClickSource:
    """Load data, or return what this process loaded last for the same config and files; an error reaches all ranks."""
    key = fingerprint(config, files)
    if key not in _loaded:
        _loaded.clear()
        data = agree(lambda: open_data(config, ranks.device.type == "cuda"), ranks)
        on_first(lambda: check_labels(data), ranks)
        _loaded[key] = data
    return _loaded[key]


def pretrained_key(config: RunConfig) -> str:
    """Return the name under which the full model of a config is shared."""
    return fingerprint(lasting(config.data), config.model, lasting(config.pretrain), config.seed)


def pretrain(config: RunConfig, shared: Path, position: int | None = 0) -> Path:
    """Train the full model, unless that was done already. Every rank calls it.

    Args:
        config: data, model, pretrain, seed and parallel matter.
        shared: folder of all full models.
        position: of the progress bar; None shows none.

    Returns:
        The folder with `summary.json`, which names the checkpoint of the best validation.

    Raises:
        ValueError: what is there is damaged, or was trained with other settings or data files.
    """
    ranks = start(config.parallel)
    folder, files = shared / pretrained_key(config), on_first(lambda: identify(config.data), ranks)
    identity = identity_of(config, "pretrain", files)
    if on_first(lambda: _is_pretrained(folder, identity), ranks):
        return folder
    on_first(lambda: record(config, folder, files), ranks)
    data = get_data(config.data, files, ranks)
    trained = train(full_model(config, data), _task(config, data, folder, "pretrain", position))
    metrics, undefined = score(trained.trainable.logits, data, config.data, ranks)
    summary = {
        "identity": identity,
        "metrics": metrics,
        "undefined": undefined,
        "training": _training(trained),
        "bayes": _bayes(data),
        "dense_bytes": sum(4 * t.num_embeddings * t.embedding_dim for t in make_tables(config.model, data)),
        "checkpoint": str(trained.checkpoint.relative_to(folder)),
    }
    on_first(lambda: write_json(folder / "summary.json", summary), ranks)
    return folder


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


def full_model(config: RunConfig, data: ClickSource) -> ClickModel:
    """Return the untrained full model, a pure function of config and seed.

    Its tables are on the meta device where `parallel.init` is "shards".
    """
    torch.manual_seed(config.seed)
    device = torch.device("meta") if config.parallel.init == "shards" else None
    tables = EmbeddingBagCollection(tables=make_tables(config.model, data), device=device)
    return make_model(tables, data.num_dense, config.model)


def run(config: RunConfig, folder: Path, shared: Path, position: int | None = 0) -> dict[str, Any]:
    """Do all stages of a config and write `summary.json`. Every rank calls it.

    Args:
        config: the whole run.
        folder: of the run; stages resume from what it holds.
        shared: folder of full models.
        position: of the progress bar; None shows none.

    Returns:
        The summary: metrics of test and valid, bytes, training.

    Raises:
        ValueError: bad data, settings, or a resumed run of other settings.
        OSError: something could not be written.
        Preempted: SIGTERM came while a model was trained; everything is saved.
    """
    check_config(config)
    ranks = start(config.parallel)
    files = on_first(lambda: identify(config.data), ranks)
    on_first(lambda: (check_unchanged(config, folder, files), record(config, folder, files))[0], ranks)
    data = get_data(config.data, files, ranks)
    check_run(config, data, ranks.world)
    if not config.compression:
        summary = _run_full(config, data, folder, shared, position)
    else:
        summary = _run_compressed(config, data, folder, shared, position)
    summary["bayes"] = _bayes(data)
    on_first(lambda: write_json(folder / "summary.json", summary), ranks)
    return summary


def _run_full(config: RunConfig, data: ClickSource, folder: Path, shared: Path, position: int | None) -> dict[str, Any]:
    """Train the full model alone."""
    source = pretrain(config, shared, position)
    full = read_json(source / "summary.json", keys=("metrics", "training", "dense_bytes"))
    size = full["dense_bytes"]
    if config.parallel.init == "host":
        on_first(
            lambda: save_tensors(folder / "model.pt", dict(_full(config, data, source).state_dict())),
            start(config.parallel),
        )
    return {
        "seed": config.seed,
        "footprint": {"dense_bytes": size, "total_bytes": size, "ratio": 1.0, "compressed_ratio": 1.0},
        "fitted": full["metrics"],
        "metrics": full["metrics"],
        "undefined": full["undefined"],
        "optimizer_bytes": full["training"]["optimizer_bytes"],
        "training": full["training"],
    }


def _run_compressed(
    config: RunConfig, data: ClickSource, folder: Path, shared: Path, position: int | None
) -> dict[str, Any]:
    """Fit the compressed tables and train on with them."""
    ranks = start(config.parallel)
    source = pretrain(config, shared, position) if needs_pretrained(config) else None
    started = time.perf_counter()
    counts = _counts(config, data, source, ranks)
    model = _compressed(config, data, source, folder, counts)
    collection = model.embeddings
    assert isinstance(collection, CompressedEmbeddingBagCollection)
    methods, path = collection.methods(), None
    summary: dict[str, Any] = {"seed": config.seed, "fit_seconds": time.perf_counter() - started}
    summary["footprint"] = collection.footprint().to_dict()
    if config.parallel.init == "host":
        summary["usage"] = code_usage(collection, counts)
    if source is not None:
        model.eval()
        found = score(lambda batch: model(batch.features, batch.dense).logits, data, config.data, ranks)
        summary["fitted"], summary["undefined"] = found
        summary["metrics"] = summary["fitted"]
    if config.retrain.epochs > 0:
        trained = _retrain(config, data, model, source, folder, position)
        summary["training"] = _training(trained)
        summary["optimizer_bytes"] = trained.optimizer_bytes
        summary["metrics"], summary["undefined"] = score(trained.trainable.logits, data, config.data, ranks)
        path = trained.checkpoint
    if config.parallel.init == "host":
        on_first(lambda: _save_compressed(config, data, methods, path, folder), ranks)
    return summary


def _counts(config: RunConfig, data: ClickSource, source: Path | None, ranks: Ranks) -> dict[str, Tensor]:
    """Return look-ups per id in train, or nothing where no table is fitted or coded: streamed, they cost a pass."""
    if source is None and budget_of(config.compression) is None:
        methods = resolve(make_tables(config.model, data), parse(config.compression)).values()
        if all(method.needs == "nothing" and not isinstance(method, CodebookConfig) for method in methods):
            return {}
    return total_counts(data, ranks)


def _save_compressed(
    config: RunConfig, data: ClickSource, methods: Mapping[str, Any], trained: Path | None, folder: Path
) -> None:
    """Write `model.pt`, the whole compressed model: as fitted, or as trained after that."""
    tables = make_tables(config.model, data)
    collection = CompressedEmbeddingBagCollection(tables, compression=dict(methods), seed=config.seed)
    model = make_model(collection, data.num_dense, config.model)
    _fill(model, folder / "fitted.pt")
    if trained is not None:
        _read_model(trained, model)
    save_tensors(folder / "model.pt", dict(model.state_dict()))


def _full(config: RunConfig, data: ClickSource, source: Path) -> ClickModel:
    """Return the trained full model in this process's memory."""
    model = full_model(override(config, {"parallel.init": "host"}), data)
    _read_model(best_checkpoint(source), model)
    return model


def _read_model(path: Path, model: ClickModel) -> None:
    """Fill an unsharded model from a checkpoint, in this process alone."""
    state = {"model": dict(model.state_dict())}
    read(path, state)
    model.load_state_dict(state["model"])


def _compressed(
    config: RunConfig, data: ClickSource, source: Path | None, folder: Path, counts: dict[str, Tensor]
) -> ClickModel:
    """Return the fitted model; the fit is done by rank 0 and kept, so that a resumed run need not repeat it."""
    ranks = start(config.parallel)
    plain = on_first(lambda: choose(config, data, source, folder, counts), ranks)
    kept, tables, chosen = folder / "fitted.pt", make_tables(config.model, data), parse(plain)
    in_shards = source is None and config.parallel.init == "shards"
    device = torch.device("meta") if in_shards else None
    torch.manual_seed(config.seed)  # native tables are drawn, whatever this process did before
    collection = CompressedEmbeddingBagCollection(tables, device=device, compression=chosen, seed=config.seed)
    torch.manual_seed(config.seed)
    model = make_model(collection, data.num_dense, config.model)
    if in_shards:
        return model
    on_first(lambda: fit(config, data, source, kept, model, counts), ranks)
    _fill(model, kept)
    return model


def _retrain(
    config: RunConfig, data: ClickSource, model: ClickModel, source: Path | None, folder: Path, position: int | None
) -> Trained:
    """Train the compressed model on; it is wrapped in place."""
    teacher = None
    if config.retrain.distill_weight:
        assert source is not None
        teacher = _teacher(config, data, source)
    task = _task(config, data, folder, "retrain", position)
    return train(model, dataclasses.replace(task, keep_start=source is not None, teacher=teacher))


def _fill(model: ClickModel, path: Path) -> None:
    """Fill a model from a file of its state dict.

    Raises:
        ValueError: the file is damaged, or its tensors are not the model's.
    """
    try:
        model.load_state_dict(load_tensors(path))
    except RuntimeError as error:  # torch lists all names and shapes that differ
        raise ValueError(f"{path}: must hold the tensors of this model, got others: {error}; delete it") from error


def _logits(path: Path, remedy: str, num_rows: int) -> Tensor:
    """Return the full model's logits of all train rows.

    Raises:
        ValueError: the file is damaged, or holds anything else.
    """
    logits = load_tensors(path, remedy).get("logits")
    if logits is None or logits.shape != (num_rows,):
        got = None if logits is None else tuple(logits.shape)
        raise ValueError(f"{path}: must hold a logit for each of {num_rows} rows, got {got}; {remedy}")
    return logits


def _teacher(config: RunConfig, data: ClickSource, source: Path) -> Tensor:
    """Return the full model's logits of all train rows, computed once, each rank its share."""
    ranks, folder = start(config.parallel), source / "teacher"
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


def _task(config: RunConfig, data: ClickSource, folder: Path, stage: str, position: int | None) -> Task:
    return Task(
        data=data,
        stage=getattr(config, stage),
        seed=config.seed,
        folder=folder / stage,
        label=f"{stage} {folder.parent.name if stage == 'retrain' else 'full'} seed {config.seed}",
        tensorboard=config.tensorboard,
        position=position,
        identity=identity_of(config, stage, on_first(lambda: identify(config.data), start(config.parallel))),
        parallel=config.parallel,
    )


def _bayes(data: ClickSource) -> dict[str, float]:
    return bayes_metrics(data.test) if isinstance(data, ClickData) else {}


def _training(trained: Trained) -> dict[str, float]:
    return {
        "steps": trained.steps,
        "best_step": trained.best_step,
        "seconds": trained.seconds,
        "rows_per_second": trained.rows_per_second,
        "optimizer_bytes": trained.optimizer_bytes,
        "skipped_batches": trained.skipped,
    }
