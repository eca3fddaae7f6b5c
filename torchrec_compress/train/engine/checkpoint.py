"""Checkpoints that survive a kill at any moment, for any number of ranks: torch.distributed.checkpoint inside folders
that are written aside, made durable, then renamed."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from torchrec_compress.seams import copy_to_host
from torchrec_compress.train.engine.checkpoint_reader import FORMAT, META, damage, read, read_meta, reason
from torchrec_compress.train.ranks import Ranks, on_first
from torchrec_compress.train.sealed import digest, listed, load_plain, sync, to_json, write_sums


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint.

    Args:
        path: its folder.
        step: its number.
        notes: the plain data that was saved with it.
    """

    path: Path
    step: int
    notes: dict[str, Any]


class Checkpoints:
    """The checkpoints of one stage, written in the background while the training goes on.

    Every rank calls every method. The folder must be one that all ranks see. On the way to `step000000123/` a
    checkpoint is a hidden folder; when all ranks have written their shards and the checksums are noted, rank 0 renames
    it. So a kill at any moment, and a full disk, leave the older ones as they were.

    Args:
        folder: of all checkpoints of the stage.
        identity: plain data that must be the same when training resumes.
        ranks: all ranks; their number may differ when training resumes.
        keep: newest checkpoints that are kept.

    Example:
        >>> import tempfile
        >>> from torchrec_compress.train.config import ParallelConfig
        >>> from torchrec_compress.train.ranks import start
        >>> store = Checkpoints(Path(tempfile.mkdtemp()), {"seed": 0}, start(ParallelConfig(device="cpu")))
        >>> store.save(7, {"weight": torch.ones(3)}, {"rows": 21})
        >>> store.wait()
        >>> newest, state = store.newest(), {"weight": torch.zeros(3)}
        >>> store.load(newest, state)
        >>> newest.step, newest.notes, state["weight"].sum()
        (7, {'rows': 21}, tensor(3.))
    """

    def __init__(self, folder: Path, identity: dict[str, Any], ranks: Ranks, keep: int = 2) -> None:
        self._folder, self._identity, self._ranks, self._keep = folder, identity, ranks, keep
        self._writer: threading.Thread | None = None
        self._failure: str | None = None

    def save(self, step: int, state: dict[str, Any], notes: dict[str, Any], protected: int | None = None) -> None:
        """Copy a state and write it in the background; `wait` says how that went.

        Args:
            step: names the checkpoint.
            state: tensors, sharded or the same on all ranks, and plain data by name.
            notes: plain data, to be read without loading the state.
            protected: step of a checkpoint that is not deleted, however old it is.

        Raises:
            OSError: the one before could not be written.
        """
        self.wait()
        partial = self._folder / f".partial{step:09d}"
        on_first(lambda: _make_empty(partial), self._ranks)
        random = partial / f"random_{self._ranks.rank}.pt"
        generator = torch.get_rng_state()
        arguments = (_copied(state), step, random, generator, notes, protected)
        self._writer = threading.Thread(target=self._finish, args=arguments, name="checkpoint", daemon=True)
        self._writer.start()

    def wait(self) -> None:
        """Return when the last checkpoint is whole.

        Raises:
            OSError: it could not be written, such as on a full disk; the message names the one that is still good.
        """
        if self._writer is None:
            return
        self._writer.join()
        self._writer = None
        if self._failure is not None:
            old = _newest(self._folder)
            left = f"{old} is still good" if old else "there is no older one"
            raise OSError(f"checkpoint {self._folder}: {self._failure}; {left}")

    def _finish(
        self,
        state: dict[str, Any],
        step: int,
        random: Path,
        generator: torch.Tensor,
        notes: dict[str, Any],
        protected: int | None,
    ) -> None:
        """Write the shards, note their checksums and rename the folder; in a thread, on every rank."""
        error, files = None, {}
        try:
            group = self._ranks.saving
            dcp.save(
                state, storage_writer=dcp.FileSystemWriter(random.parent), process_group=group, no_dist=group is None
            )
            torch.save(generator, random)
            sync(random)
            files = {path.name: digest(path) for path in self._mine(random.parent)}
        except (OSError, RuntimeError, CheckpointException) as caught:
            error = reason(caught)
        found = self._gather_files((error, files))
        errors = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(found) if text is not None]
        if not errors and self._ranks.is_first:
            whole = {name: digest for _, part in found for name, digest in part.items()}
            meta = {"format": FORMAT, "step": step, "identity": self._identity, "notes": notes}
            try:
                self._publish(random.parent, step, meta, whole, protected)
            except (OSError, ValueError) as caught:
                errors = [f"rank 0: {reason(caught)}"]
        told = [errors[0] if errors else None]
        if self._ranks.world > 1:
            dist.broadcast_object_list(told, src=0, group=self._ranks.saving)
        if told[0] is not None:
            shutil.rmtree(random.parent, ignore_errors=True)
            self._failure = f"step {step} could not be written ({told[0]})"

    def _gather_files(self, mine: tuple[str | None, dict[str, str]]) -> list[tuple[str | None, dict[str, str]]]:
        if self._ranks.world == 1:
            return [mine]
        found: list[Any] = [None] * self._ranks.world
        dist.all_gather_object(found, mine, group=self._ranks.saving)
        return found

    def _mine(self, folder: Path) -> list[Path]:
        """Return the files that this rank has written."""
        own = [*folder.glob(f"__{self._ranks.rank}_*.distcp"), folder / f"random_{self._ranks.rank}.pt"]
        return [*own, folder / ".metadata"] if self._ranks.is_first else own

    def _publish(
        self, partial: Path, step: int, meta: dict[str, Any], sums: dict[str, str], protected: int | None
    ) -> None:
        """Make a checkpoint visible, and delete those that are too old."""
        final = self._folder / f"step{step:09d}"
        (partial / META).write_text(to_json(final / META, meta))
        sync(partial / META)
        write_sums(partial, {**sums, META: digest(partial / META)})
        sync(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync(self._folder)
        kept = {*_all(self._folder)[-self._keep :]}
        if protected is not None:
            kept.add(self._folder / f"step{protected:09d}")
        for old in set(_all(self._folder)) - kept:
            shutil.rmtree(old, ignore_errors=True)

    def newest(self) -> Saved | None:
        """Return the newest checkpoint that is whole, or None where there is none at all.

        A damaged one is passed over, with a line that names it and the older one that is used instead.

        Raises:
            ValueError: all are damaged, or the identity differs; the message names the key.
        """
        candidates = on_first(lambda: _all(self._folder)[::-1], self._ranks)
        problems = []
        for path in candidates:
            problem = damage(path, self._ranks)
            if problem is None:
                if problems and self._ranks.is_first:
                    tqdm.write(f"checkpoint {'; '.join(problems)}; resuming from the older {path.name}")
                return self.at(path)
            problems.append(f"{path}: {problem}")
        if problems:
            raise ValueError(f"checkpoint {'; '.join(problems)}; none is whole, delete {self._folder} to start anew")
        return None

    def at(self, step: int | Path) -> Saved:
        """Return a checkpoint by its step or folder; its tensors are verified when they are loaded.

        Raises:
            ValueError: it is damaged or missing, or its identity differs.
        """
        path = step if isinstance(step, Path) else self._folder / f"step{step:09d}"
        meta = check_identity(path, self._identity)
        return Saved(path, meta["step"], meta["notes"])

    def num_ranks(self, saved: Saved) -> int:
        """Return how many ranks saved a checkpoint."""
        return len(list(saved.path.glob("random_*.pt")))

    def load(self, saved: Saved, state: dict[str, Any], random: bool = False) -> None:
        """Fill a state in place; its tensors may be sharded in another way than those that were saved.

        Args:
            saved: from `newest` or `at`.
            state: names are those that were saved, or fewer.
            random: whether this rank's random state comes back too. With another number of ranks than when it was
                saved, that is one drawn from the step and the rank.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        read(saved.path, state, self._ranks)
        if not random:
            return
        own = saved.path / f"random_{self._ranks.rank}.pt"
        if self.num_ranks(saved) == self._ranks.world:
            with own.open("rb") as file:
                torch.set_rng_state(load_plain(file, f"{own}", f"delete {saved.path}, an older one is resumed from"))
        else:
            torch.manual_seed(saved.step * 65_537 + self._ranks.rank)


def _copied(value: Any) -> Any:
    """Return a copy of a state, in the host's memory."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    if isinstance(value, ShardedTensor):
        return copy_to_host(value)
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    return copy.deepcopy(value)


def check_identity(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the plain data of a checkpoint, which must be of the same settings and data files.

    Raises:
        ValueError: it is damaged or missing, or its identity differs; the message names the key.
    """
    try:
        meta = read_meta(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; delete {path.parent} to train that stage anew") from error
    if listed(path) is None:  # of format 2, whose identity had fewer parts
        identity = {key: value for key, value in identity.items() if key in meta["identity"]}
    check_same(path, meta["identity"], identity)
    return meta


def check_same(path: Path, old: Any, new: Any, where: str = "") -> None:
    """Compare plain data that was written with a file to what it is now.

    Raises:
        ValueError: a value differs; the message names the first such key.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        before, now = _order_of_patterns(old, where), _order_of_patterns(new, where)
        if before != now and sorted(before) == sorted(now):
            raise ValueError(
                f"{path}: the patterns of {where} must come in the order {before} as when it was written, got {now}: "
                "the first that fits a table counts; put them back, or choose another output folder"
            )
        for key in sorted(set(old) | set(new)):
            check_same(path, old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif json.loads(json.dumps(new)) != old:
        raise ValueError(
            f"{path}: {where} must be {old!r} as when it was written, got {new!r}; "
            "put it back, or choose another output folder"
        )


def _order_of_patterns(plain: dict[str, Any], where: str) -> list[str]:
    """Return the patterns of a compression in their order, of which the first that fits a table counts."""
    return [key for key in plain if set(key) & set("*?[")] if where.endswith("compression") else []


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        old = _newest(folder.parent)
        left = f"; {old} is still good" if old else ""
        raise OSError(f"checkpoint {folder.parent}: must be writable, got {error}{left}") from error


def _newest(folder: Path) -> Path | None:
    return next(reversed(_all(folder)), None)


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step*") if path.is_dir())
