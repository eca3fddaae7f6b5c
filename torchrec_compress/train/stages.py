"""The three stages: pre-train the full model, fit the compressed tables, train on with them."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_compress import CompressedEmbeddingBagCollection, compress, compress_into
from torchrec_compress.budget import for_budget
from torchrec_compress.compression import parse, resolve
from torchrec_compress.train.checkpoint import check_same
from torchrec_compress.train.config import DataConfig, RunConfig, fingerprint
from torchrec_compress.train.data import ClickData, load_data
from torchrec_compress.train.journal import versions, write_atomically, write_json
from torchrec_compress.train.loop import Task, Trained, predict, train
from torchrec_compress.train.metrics import bayes_metrics, evaluate, tail_rows
from torchrec_compress.train.models import ClickModel, make_model, make_tables
from torchrec_compress.train.usage import code_usage

_MAX_PAIRS = 2_000_000
_loaded: dict[str, ClickData] = {}


def get_data(config: DataConfig) -> ClickData:
    """Load data, or return what this process loaded last for the same config."""
    key = fingerprint(config)
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = load_data(config)
    return _loaded[key]


def pretrained_key(config: RunConfig) -> str:
    """Return the name under which the full model of a config is shared."""
    return fingerprint(config.data, config.model, config.pretrain, config.seed)


def needs_pretrained(config: RunConfig) -> bool:
    """Return whether the full model is trained first."""
    return config.start == "pretrained" or not config.compression


def pretrain(config: RunConfig, shared: Path, position: int | None = 0) -> Path:
    """Train the full model, unless that was done already.

    Args:
        config: data, model, pretrain and seed matter.
        shared: folder of all full models.
        position: of the progress bar; None shows none.

    Returns:
        The folder with `model.pt` (tensors by name) and `summary.json`.
    """
    folder = shared / pretrained_key(config)
    if (folder / "summary.json").is_file():
        return folder
    record(config, folder)
    data = get_data(config.data)
    trained = train(full_model(config, data), _task(config, data, folder, "pretrain", position))
    _save_tensors(folder / "model.pt", trained.state)
    model = full_model(config, data)
    model.load_state_dict(trained.state)
    summary = {
        "metrics": score(model, data, config.data),
        "training": _training(trained),
        "bayes": bayes_metrics(data.test),
        "dense_bytes": sum(4 * t.num_embeddings * t.embedding_dim for t in model.embeddings.embedding_bag_configs()),
    }
    write_json(folder / "summary.json", summary)
    return folder


def full_model(config: RunConfig, data: ClickData) -> ClickModel:
    """Return the untrained full model, a pure function of config and seed."""
    torch.manual_seed(config.seed)
    return make_model(EmbeddingBagCollection(tables=make_tables(config.model, data)), data.num_dense, config.model)


def run(config: RunConfig, folder: Path, shared: Path, position: int | None = 0) -> dict[str, Any]:
    """Do all stages of a config and write `summary.json`.

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
    """
    _check_unchanged(config, folder)
    record(config, folder)
    data = get_data(config.data)
    source = pretrain(config, shared, position) if needs_pretrained(config) else None
    started = time.perf_counter()
    model = _compressed(config, data, source, folder) if config.compression else _full(config, data, source)
    summary: dict[str, Any] = {"seed": config.seed, "fit_seconds": time.perf_counter() - started}
    if isinstance(model.embeddings, CompressedEmbeddingBagCollection):
        summary["footprint"] = model.embeddings.footprint().to_dict()
        summary["usage"] = code_usage(model.embeddings, data.counts())
    else:
        size = sum(4 * t.num_embeddings * t.embedding_dim for t in model.embeddings.embedding_bag_configs())
        summary["footprint"] = {"dense_bytes": size, "total_bytes": size, "ratio": 1.0, "compressed_ratio": 1.0}
    if source is not None:
        full = json.loads((source / "summary.json").read_text())
        summary["fitted"] = score(model, data, config.data) if config.compression else full["metrics"]
        summary["metrics"] = summary["fitted"]
        if not config.compression:
            summary["optimizer_bytes"] = full["training"]["optimizer_bytes"]
    if config.compression and config.retrain.epochs > 0:
        model, trained = _retrain(config, data, model, source, folder, position)
        summary["training"] = _training(trained)
        summary["optimizer_bytes"] = trained.optimizer_bytes
        summary["metrics"] = score(model, data, config.data)
    elif source is None:
        raise ValueError("retrain.epochs: must be over 0 with start = 'scratch', got 0; nothing would be trained")
    summary["bayes"] = bayes_metrics(data.test)
    _save_tensors(folder / "model.pt", dict(model.state_dict()))
    write_json(folder / "summary.json", summary)
    return summary


def _check_unchanged(config: RunConfig, folder: Path) -> None:
    """Raise ValueError where a folder holds what other settings led to."""
    if not any((folder / name).is_file() for name in ("fitted.pt", "compression.json", "summary.json")):
        return
    free = ("output", "num_threads", "tensorboard", "compare")
    old = yaml.safe_load((folder / "config.yaml").read_text())
    new = dataclasses.asdict(config)
    for key in free:
        old.pop(key, None)
        new.pop(key, None)
    check_same(folder, old, new)


def _full(config: RunConfig, data: ClickData, source: Path | None) -> ClickModel:
    assert source is not None
    model = full_model(config, data)
    model.load_state_dict(torch.load(source / "model.pt", weights_only=True))
    return model


def _compressed(config: RunConfig, data: ClickData, source: Path | None, folder: Path) -> ClickModel:
    """Return the fitted model; the fit itself is kept, so that a resumed run need not repeat it."""
    tables = make_tables(config.model, data)
    kept = folder / "fitted.pt"
    chosen = _choose(config, data, source, folder)
    collection = CompressedEmbeddingBagCollection(tables, compression=chosen, seed=config.seed)
    torch.manual_seed(config.seed)
    model = make_model(collection, data.num_dense, config.model)
    if kept.is_file():
        model.load_state_dict(torch.load(kept, weights_only=True))
        return model
    contexts = _contexts(config, data, chosen)
    if source is None:
        compress_into(collection, {}, counts=data.counts(), contexts=contexts, seed=config.seed)
    else:
        full = _full(config, data, source)
        assert isinstance(full.embeddings, EmbeddingBagCollection)
        collection = compress(full.embeddings, chosen, counts=data.counts(), contexts=contexts, seed=config.seed)
        net = {name: value for name, value in full.state_dict().items() if not name.startswith("embeddings.")}
        model.embeddings = collection
        model.load_state_dict(net, strict=False)
    _save_tensors(kept, dict(model.state_dict()))
    return model


def _choose(config: RunConfig, data: ClickData, source: Path | None, folder: Path) -> Any:
    """Return the compression: parsed, or chosen for a budget of bytes and kept, since choosing takes long."""
    wanted = dict(config.compression)
    ratio, size, codes = (wanted.pop(key, None) for key in ("budget_ratio", "budget_bytes", "codes"))
    if ratio is None and size is None:
        return parse(config.compression)
    if source is None or (ratio is not None and size is not None):
        raise ValueError("compression: must have one of budget_ratio and budget_bytes, and start = 'pretrained'")
    kept = folder / "compression.json"
    if not kept.is_file():
        full = _full(config, data, source)
        rows = {name: bag.weight.detach() for name, bag in full.embeddings.embedding_bags.items()}  # type: ignore[union-attr]
        dense = sum(4 * weight.numel() for weight in rows.values())
        budget = int(dense / float(ratio or 1)) if size is None else int(size)
        method = {} if codes is None else {"codes": parse(codes)}
        chosen = for_budget(rows, data.counts(), budget, seed=config.seed, **method, **wanted)
        write_json(kept, {name: choice.to_dict() for name, choice in chosen.items()})
    return parse(json.loads(kept.read_text()))


def _contexts(config: RunConfig, data: ClickData, compression: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the pairs of ids that occur together in clicks, for the tables whose method asks for them."""
    tables = make_tables(config.model, data)
    wanted = [name for name, method in resolve(tables, compression).items() if method.method == "quantile"]
    clicked = data.train.ids[data.train.labels > 0.5][:_MAX_PAIRS]
    pairs = {}
    for name in wanted:
        others = [other for other in data.features if other != name]
        other = config.context.get(name) or max(others, key=lambda key: data.vocab[data.features.index(key)])
        if other not in data.features or other == name:
            raise ValueError(f"context.{name}: must be another table of {data.features}, got {other!r}")
        first, second = (clicked[:, data.layout.columns(key)] for key in (name, other))
        if first.shape[1] != 1 or second.shape[1] != 1:
            raise ValueError(f"context.{name}: must pair features of one id per row, got {name!r} and {other!r}")
        pairs[name] = (first[:, 0].long(), second[:, 0].long())
    return pairs


def _retrain(
    config: RunConfig, data: ClickData, model: ClickModel, source: Path | None, folder: Path, position: int | None
) -> tuple[ClickModel, Trained]:
    """Train the compressed model on; return it unsharded with its best tensors."""
    teacher = None
    if config.retrain.distill_weight:
        if source is None:
            raise ValueError(
                "retrain.distill_weight: must be 0 with start = 'scratch', there is no full model to imitate"
            )
        teacher = _teacher(config, data, source)
    task = dataclasses.replace(
        _task(config, data, folder, "retrain", position), keep_start=source is not None, teacher=teacher
    )
    kept, collection = folder / "fitted.pt", model.embeddings
    assert isinstance(collection, CompressedEmbeddingBagCollection)
    methods = collection.methods()
    trained = train(model, task)
    fresh = CompressedEmbeddingBagCollection(make_tables(config.model, data), compression=methods, seed=config.seed)
    result = make_model(fresh, data.num_dense, config.model)
    result.load_state_dict(torch.load(kept, weights_only=True))
    result.load_state_dict(trained.state)
    return result, trained


def _teacher(config: RunConfig, data: ClickData, source: Path) -> Tensor:
    """Return the full model's logits of all train rows, computed once."""
    path = source / "train_logits.pt"
    if not path.is_file():
        _save_tensors(path, {"logits": predict(_full(config, data, source), data, "train")})
    return torch.load(path, weights_only=True)["logits"]


def _task(config: RunConfig, data: ClickData, folder: Path, stage: str, position: int | None) -> Task:
    identity = {
        "data": dataclasses.asdict(config.data),
        "model": dataclasses.asdict(config.model),
        **({"compression": config.compression, "start": config.start} if stage == "retrain" else {}),
    }
    return Task(
        data=data,
        stage=getattr(config, stage),
        seed=config.seed,
        folder=folder / stage,
        label=f"{stage} {folder.parent.name if stage == 'retrain' else 'full'} seed {config.seed}",
        tensorboard=config.tensorboard,
        position=position,
        identity=identity,
    )


def score(model: ClickModel, data: ClickData, config: DataConfig) -> dict[str, dict[str, float]]:
    """Return all metrics of valid and test."""
    return {name: _score_split(model, data, name, config) for name in ("valid", "test")}


def _score_split(model: ClickModel, data: ClickData, name: str, config: DataConfig) -> dict[str, float]:
    logits, split = predict(model, data, name).numpy(), data.split(name)
    tail = tail_rows(data, split, config.tail_tables, config.tail_count)
    return evaluate(split.labels.numpy(), logits, tail, None if split.kinds is None else split.kinds.numpy())


def record(config: RunConfig, folder: Path) -> None:
    """Write the resolved config and the versions beside a run."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
    write_json(folder / "versions.json", versions())


def _training(trained: Trained) -> dict[str, float]:
    return {
        "steps": trained.steps,
        "best_step": trained.best_step,
        "seconds": trained.seconds,
        "rows_per_second": trained.rows_per_second,
        "optimizer_bytes": trained.optimizer_bytes,
    }


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    part = path.with_name(f".{path.name}")
    try:
        torch.save({name: value.detach() for name, value in tensors.items()}, part)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        part.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written ({error}); free some space, the same command continues") from error
    part.replace(path)
