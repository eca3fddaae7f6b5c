"""Checkpoints that survive a kill at any moment: written aside, made durable, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

LATEST = "LATEST"
FORMAT = 1


def save(folder: Path, step: int, state: dict[str, Any], config: dict[str, Any], keep: int = 2) -> Path:
    """Write a checkpoint; when anything fails, the older ones stay as they were.

    Args:
        folder: of all checkpoints of a stage.
        step: names the checkpoint.
        state: whatever `torch.save` takes; tensors and plain data.
        config: plain data that must be the same when training resumes.
        keep: checkpoints that are kept.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: nothing could be written, such as on a full disk; the message names the checkpoint that is still good.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, partial = folder / f"step{step:09d}", folder / f".partial{step:09d}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        _write_state(partial / "state.pt", state)
        text = json.dumps({"format": FORMAT, "step": step, "sha256": _digest(partial / "state.pt"), "config": config})
        _write(partial / "meta.json", text)
        _sync_folder(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _write(folder / ".latest", final.name)
        (folder / ".latest").replace(folder / LATEST)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        old = find(folder)
        left = f"{old} is still good" if old else "there is no older one"
        raise OSError(f"checkpoint {final}: could not be written ({error}); {left}") from error
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def find(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a folder, or None."""
    pointer = folder / LATEST
    if pointer.is_file() and (folder / pointer.read_text().strip()).is_dir():
        return folder / pointer.read_text().strip()
    whole = _all(folder)
    return whole[-1] if whole else None


def load(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Read the newest checkpoint that is whole.

    Args:
        folder: of all checkpoints of a stage.
        config: must equal that of the checkpoint.

    Returns:
        What was saved, or None where there is no checkpoint. A damaged one is refused with a warning that names the
        older one that is used instead.

    Raises:
        ValueError: all checkpoints are damaged, or the config differs; the message names the key.
    """
    newest = find(folder)
    if newest is None:
        return None
    older = [path for path in reversed(_all(folder)) if path != newest]
    problems = []
    for path in [newest, *older]:
        problem = _problem(path)
        if problem:
            problems.append(f"{path}: {problem}")
            continue
        meta = json.loads((path / "meta.json").read_text())
        check_same(path, meta["config"], config)
        if problems:
            from tqdm import tqdm

            tqdm.write(f"checkpoint {'; '.join(problems)}; resuming from the older {path.name}")
        return torch.load(path / "state.pt", weights_only=True)
    raise ValueError(f"checkpoint {'; '.join(problems)}; none is whole, delete {folder} to start anew")


def _problem(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        digest = _digest(path / "state.pt")
    except (OSError, json.JSONDecodeError) as error:
        return f"damaged ({error})"
    if meta.get("format") != FORMAT:
        return f"must be of format {FORMAT}, got {meta.get('format')}"
    return None if digest == meta["sha256"] else "truncated or changed (its checksum differs)"


def check_same(path: Path, old: Any, new: Any, where: str = "") -> None:
    """Compare plain data that was written with a file to what it is now.

    Raises:
        ValueError: a value differs; the message names the first such key.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            check_same(path, old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif json.loads(json.dumps(new)) != old:
        raise ValueError(
            f"{path}: {where} must be {old!r} as when it was written, got {new!r}; "
            "put it back, or choose another output folder"
        )


def _write_state(path: Path, state: dict[str, Any]) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow_digest(file)
        )


def _slow_digest(file: Any) -> str:
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step*") if path.is_dir())
