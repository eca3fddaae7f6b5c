"""Fit one table to rows in a file, or expand it into one; killed at any moment, it goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.conversion.work import Work
from torchrec_compress.convert.collections import check_range
from torchrec_compress.methods import MethodConfig, TableData, TableState
from torchrec_compress.methods.learned import BLOCK_ROWS, Learned, RowReader
from torchrec_compress.ops import mark_of, total_of
from torchrec_compress.train.machine import give_back

# seconds between two notes of how far a table is; a killed conversion loses no more
NOTE_EVERY = 20.0
_AT = "at"  # how many rows are encoded; what was summed up over them is called by numbers


@dataclass(frozen=True)
class Job:
    """One table that is stored otherwise.

    Args:
        number: of the job, by which its files are called.
        label: of the table, in errors and on the bar.
        config: of the table.
        into: the method that it gets; None: dense rows.
        keys: what the result calls the tensors of its state, by field and name.
        like: of every key, a tensor on the meta device of its shape and type.
        read: its rows.
        data: what the fit learns from beside them.
    """

    number: int
    label: str
    config: BaseEmbeddingConfig
    into: MethodConfig | None
    keys: Mapping[tuple[str, str], str]
    like: Mapping[str, Tensor]
    read: RowReader
    data: TableData

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return self.config.num_embeddings


def run_job(job: Job, work: Work, step: Callable[[int], object], learns_whole: bool) -> dict[str, Tensor]:
    """Return the tensors of one table in the result, by key; large ones are mapped.

    Args:
        job: what to do.
        work: where files are.
        step: is told how many rows are done.
        learns_whole: whether a method that must learn from all rows may have them in memory.

    Raises:
        ValueError: a row is not finite, or a fit fails; the message names the table.
        OSError: a file cannot be written.
    """
    with torch.inference_mode(False), torch.no_grad():
        if job.into is None:
            return _expand(job, work, step)
        return _fit(job, job.into, work, step, learns_whole)


def _expand(job: Job, work: Work, step: Callable[[int], object]) -> dict[str, Tensor]:
    """Write the rows that a compressed table serves."""
    (key,) = job.keys.values()
    name, note = f"{job.number}.rows", f"{job.number}.note"
    target = work.mapped(name, tuple(job.like[key].shape), job.like[key].dtype)
    first, last_note = _noted(work, note), time.monotonic()
    step(first)
    for ids in _blocks(first, job.num_rows):
        rows = job.read(ids)
        check_range(job.label, rows, target.dtype, ids)
        target[int(ids[0]) : int(ids[0]) + len(ids)] = rows
        step(len(ids))
        if time.monotonic() - last_note >= NOTE_EVERY:
            work.sync(name)
            work.save(note, {_AT: torch.tensor(int(ids[-1]) + 1)})
            last_note = time.monotonic()
    work.sync(name)
    work.save(note, {_AT: torch.tensor(job.num_rows)})
    return {key: target}


def _noted(work: Work, name: str) -> int:
    return int(work.load(name)[_AT]) if work.is_done(name) else 0


def _blocks(first: int, num_rows: int) -> Iterator[Tensor]:
    """Ids by blocks; what was made for a block is the system's again before the next one.

    glibc before 2.38 cannot use an aligned block that was freed for one of the same size unless all beside it is free:
    by chance the expansion of 10^7 x 64 rows came to hold all of them.
    """
    for start in range(first, num_rows, BLOCK_ROWS):
        give_back()
        yield torch.arange(start, min(start + BLOCK_ROWS, num_rows))


def _fit(
    job: Job, method: MethodConfig, work: Work, step: Callable[[int], object], learns_whole: bool
) -> dict[str, Tensor]:
    """Learn and encode; what is done by id lies in a mapped file, the rest in one that is written at the end."""
    rows, small, note = f"{job.number}.rows", f"{job.number}.small", f"{job.number}.note"
    where = _kept_at(job, method)
    if work.is_done(small):
        step(job.num_rows)
        found = work.load(small)
        like = None if where is None else job.like[where]
        return found if where is None or like is None else {**found, where: _mapped(work, rows, like)}
    learned = _learned(job, method, learns_whole)
    key = job.keys.get(learned.kept_as)
    assert key == where, (key, where)
    kept = None if key is None else _mapped(work, rows, job.like[key])
    _encode(job, learned, kept, work, (rows, note), step)
    state = learned.finish()
    found = {job.keys[part]: _stored(value, job.like[job.keys[part]]) for part, value in _parts_of(state)}
    if ("codes", "is_set") in job.keys:
        assert kept is not None
        integers = [value for value in state.decoder.values() if not value.dtype.is_floating_point]
        mark = mark_of(total_of([kept, *integers]))
        found[job.keys["codes", "is_set"]] = torch.tensor([mark], dtype=torch.int32)
    work.sync(rows)
    work.save(small, found)
    work.drop(note)
    return found if key is None or kept is None else {**found, key: kept}


def _stored(value: Tensor, like: Tensor) -> Tensor:
    """Return a tensor of the type that is stored, with a storage of its own."""
    assert value.shape == like.shape, (value.shape, like.shape)
    found = value.detach().to(like.dtype).contiguous()
    return found if found.untyped_storage().nbytes() == found.nbytes else found.clone()


def _kept_at(job: Job, method: MethodConfig) -> str | None:
    """Return the key of what is stored by id: of what has as many rows as ids, or as coded ids."""
    for part in (("codes", ""), ("trained", "rows"), ("native", "rows"), ("native", "queries")):
        if part in job.keys and method.parts(job.config, job.data.seed).managed is None:
            return job.keys[part]
    return None


def _mapped(work: Work, name: str, like: Tensor) -> Tensor:
    return work.mapped(name, tuple(like.shape), like.dtype)


def _learned(job: Job, method: MethodConfig, learns_whole: bool) -> Learned:
    if method.learns_from == "all" and learns_whole:
        rows = torch.empty(job.num_rows, job.config.embedding_dim)
        for ids in _blocks(0, job.num_rows):
            rows[ids[0] : ids[-1] + 1] = job.read(ids)
        return method.learn(job.config, _with_rows(job.data, rows))
    return method.learn_blocks(job.config, job.data, job.read)


def _with_rows(data: TableData, rows: Tensor) -> TableData:
    return TableData(rows, data.counts, data.contexts, data.seed, data.progress, curvature=data.curvature)


def _encode(
    job: Job, learned: Learned, kept: Tensor | None, work: Work, names: tuple[str, str], step: Callable[[int], object]
) -> None:
    """Encode all rows that are left, and note from time to time how far it is and what was summed up."""
    rows, note = names
    first, last_note = _restored(learned, work, note), time.monotonic()
    step(first)
    for ids in _blocks(first, job.num_rows):
        block = learned.encode(ids, job.read(ids) if learned.needs_rows else None)
        if block is not None:
            assert kept is not None
            # floats fit, which the fit has looked at
            assert kept.dtype == block.dtype or (kept.is_floating_point() and block.is_floating_point())
            numbers = learned.row_numbers(ids)
            if len(numbers) and torch.equal(numbers, ids):
                kept[int(ids[0]) : int(ids[0]) + len(ids)] = block
            else:
                kept[numbers] = block
        step(len(ids))
        if time.monotonic() - last_note >= NOTE_EVERY:
            work.sync(rows)
            _note(learned, int(ids[-1]) + 1, work, note)
            last_note = time.monotonic()


def _note(learned: Learned, at: int, work: Work, name: str) -> None:
    """Save what was summed up so far; ranks add up the same."""
    found: list[Tensor] = []
    learned.add_up(lambda each: found.append(each))
    work.save(name, {_AT: torch.tensor(at), **{str(number): each for number, each in enumerate(found)}})


def _restored(learned: Learned, work: Work, name: str) -> int:
    """Take what was summed up before a kill, and return how many rows were encoded."""
    if not work.is_done(name):
        return 0
    found = work.load(name)
    numbers = iter(range(len(found)))
    learned.add_up(lambda each: each.copy_(found[str(next(numbers))]))  # type: ignore[arg-type, return-value]
    return int(found[_AT])


def _parts_of(state: TableState) -> list[tuple[tuple[str, str], Tensor]]:
    found = [] if state.codes is None else [(("codes", ""), state.codes)]
    for field in ("decoder", "native", "managed", "trained"):
        found += [((field, name), value) for name, value in getattr(state, field).items()]
    return found
