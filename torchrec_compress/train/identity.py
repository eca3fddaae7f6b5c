"""What a run depends on, and whether a folder was begun with just that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from torchrec_compress.train.command_line import dump, load_yaml
from torchrec_compress.train.config import RunConfig, lasting, needs_pretrained, override
from torchrec_compress.train.engine.checkpoint import check_same
from torchrec_compress.train.journal import versions
from torchrec_compress.train.sealed import is_done, listed, read_json, read_text, write_json, write_text


def identity_of(config: RunConfig, stage: str, files: dict[str, Any]) -> dict[str, Any]:
    """Return what the outcome of a stage depends on, plain data.

    Args:
        config: of the run.
        stage: "pretrain" or "retrain".
        files: the data files, as `identify` tells them.
    """
    of_retrain = {
        "compression": config.compression,
        "context": config.context,
        "start": config.start,
        "pretrain": lasting(config.pretrain) if needs_pretrained(config) else None,
        **({"curvature_rows": config.curvature_rows} if needs_pretrained(config) and config.curvature_rows else {}),
    }
    return {
        "stage": lasting(getattr(config, stage)),
        "seed": config.seed,
        "data": lasting(config.data),
        "files": files,
        "model": lasting(config.model),
        # absent with full tables, as in folders of before there were others
        **({"pretrain_compression": config.pretrain_compression} if config.pretrain_compression else {}),
        **(of_retrain if stage == "retrain" else {}),
    }


# what the full model depends on; `compression` may be mended after hours of training
_OF_FULL = ("data", "model", "pretrain", "pretrain_compression", "seed", "start")
_FREE = ("output", "num_threads", "tensorboard", "parallel", "compare")


def check_unchanged(config: RunConfig, folder: Path, files: dict[str, Any] | None = None) -> None:
    """Refuse a folder that holds what other settings or data files led to.

    Args:
        config: of the run.
        folder: of the run.
        files: as `identify` tells them; None leaves them out.

    Raises:
        ValueError: what is there depends on another value; the message names the key.
    """
    ends = ("fitted.pt", "compression.json", "summary.json", "model.pt", "retrain/checkpoints/step*")
    is_late = any(next(folder.glob(end), None) for end in ends)
    if not is_late and next(folder.glob("full/*/pretrain/checkpoints/step*"), None) is None:
        return
    path, put_back = folder / "config.yaml", "put it back, or choose another output folder"
    if not is_late and not path.is_file():
        return  # a full model that was put here, which tells its own settings
    if not path.is_file():
        raise ValueError(f"{path}: is missing, and the folder holds results; {put_back}")
    # older ones have no checksum
    is_sealed = path.name in (listed(folder) or {})
    text = read_text(path, put_back) if is_sealed else path.read_text()
    try:
        begun = override(RunConfig(curvature_rows=0), load_yaml(text) or {})  # older ones had no such key
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {put_back}") from error
    if begun.parallel.init != config.parallel.init:  # the rest of it decides who holds what, not what is learnt
        check_same(folder, {"parallel": {"init": begun.parallel.init}}, {"parallel": {"init": config.parallel.init}})
    old, new = lasting(begun), lasting(config)
    for key in [key for key in new if key in _FREE or not (is_late or key in _OF_FULL)]:
        old.pop(key)
        new.pop(key)
    check_same(folder, old, new)
    if files is None:
        return
    if is_done(folder / "inputs.json"):
        check_same(folder / "inputs.json", read_json(folder / "inputs.json", put_back), files)
    elif files:
        tqdm.write(f"{folder}: does not tell which data files it was begun with; whether they changed is not checked")


def record(config: RunConfig, folder: Path, files: dict[str, Any]) -> None:
    """Write the resolved config, the versions and what tells the data files beside a run."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", dump(config, allow_unicode=False))
    _record_versions(folder)
    write_json(folder / "inputs.json", files)


def _record_versions(folder: Path) -> None:
    """Write the versions beside a run; where it is finished, keep those that it was made with, and say so."""
    path, now = folder / "versions.json", versions()
    if is_done(folder / "summary.json") and is_done(path):
        try:
            made = read_json(path)
        except ValueError:  # changed by hand; no result depends on it
            write_json(path, now)
            return
        differ = [name for name in sorted({*made, *now}) if made.get(name) != now.get(name)]
        if differ:
            changes = ", ".join(f"{name} {made.get(name)} (now {now.get(name)})" for name in differ)
            tqdm.write(f"{folder}: finished with {changes}; its results are those of then")
        return
    write_json(path, now)
