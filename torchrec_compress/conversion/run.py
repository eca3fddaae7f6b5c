"""The conversion of a checkpoint, from its arguments to the report."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from torchrec_compress.conversion.checkpoints import Checkpoint, kind_of_path, open_checkpoint
from torchrec_compress.conversion.config import ConversionConfig, read_config
from torchrec_compress.conversion.counts import check_files, counts_of_optimizer, read_contexts, read_counts
from torchrec_compress.conversion.entries import Held
from torchrec_compress.conversion.fits import Job, run_job
from torchrec_compress.conversion.memory import Meter, check_memory, needed
from torchrec_compress.conversion.optimizer import Fate, settle, states_of
from torchrec_compress.conversion.outputs import (
    check_safetensors,
    nested,
    write_folder,
    write_safetensors,
    write_torch,
)
from torchrec_compress.conversion.plan import Change, find_changes, first_old, moved_place, prefix_of, renamed_weights
from torchrec_compress.conversion.report import as_text, build_report
from torchrec_compress.conversion.sources import Sources
from torchrec_compress.conversion.tables import Home, Table, collection_of
from torchrec_compress.conversion.work import Work, clear_away, files_of
from torchrec_compress.convert.models import errors_of, shared_out
from torchrec_compress.methods import TableData
from torchrec_compress.modules.format import FORMAT_VERSION, StateFormat
from torchrec_compress.train.sealed import check_regular

_FORMAT = 3  # of the folder that a killed conversion leaves


def convert(source: Path, target: Path, config_path: Path, memory: int, progress: bool = True) -> str:
    """Convert a checkpoint and return what was done, in lines.

    Args:
        source: a folder of torch.distributed.checkpoint, a file of torch.save or of safetensors; never written to.
        target: what appears, as a whole: a folder, or a file by its ending. It must not exist. Beside it `.part` is
            worked in, from which a killed conversion goes on, and `.report.json` is written.
        config_path: a YAML file, see docs/convert.md.
        memory: bytes that this process may take for itself.
        progress: whether to show a bar.

    Raises:
        ValueError: something of what was given is wrong; nothing was written, or what was is continued from.
        OSError: a file cannot be written.
        ImportError: an optional package is missing.
    """
    config = read_config(config_path)
    kind = kind_of_path(target, is_folder=not target.suffix or target.is_dir())
    if (
        target.resolve() in (source.resolve(), *source.resolve().parents)
        or source.resolve() in target.resolve().parents
    ):
        raise ValueError(f"{target}: must not be the checkpoint, nor lie in it; name another one")
    checkpoint = open_checkpoint(source)
    identity = _identity(checkpoint, config, kind)
    if _is_there(target, identity):
        return f"{target} is there already, made by the same command"
    _check_report(target)
    with Meter() as meter:
        began = time.monotonic()
        changes, homes = find_changes(checkpoint, config)
        conversion = _Conversion(checkpoint, config, changes, homes, kind, memory)
        work = Work(target, kind == "dcp")
        try:
            work.start(identity)
            if not work.published():
                made, num_rows = conversion.tables(work, progress)
                values, places = conversion.assembled(made, work)
                seconds = max(time.monotonic() - began, 1e-9)
                report = build_report(
                    changes,
                    conversion.fate,
                    checkpoint.tensors,
                    values,
                    {
                        "identity": _digest(identity),
                        "counts_change_nothing": conversion.idle,
                        "seconds": seconds,
                        "rows_per_second": int(num_rows / seconds),
                        "memory": memory,
                    },
                )
                work.publish(
                    lambda path: _write(path, kind, values, places, checkpoint), lambda: _measured(report, meter, began)
                )
            path, told = work.finish()
        finally:
            work.close()
    back = ", which --to takes for the way back" if told["back"] else ""
    return f"{as_text(told)}\n{target}, and {path}{back}"


def _measured(report: Mapping[str, Any], meter: Meter, began: float) -> dict[str, Any]:
    meter.look()
    return {
        **report,
        "seconds_in_all": time.monotonic() - began,
        "peak_anonymous_bytes": meter.anonymous,
        "peak_mapped_bytes": meter.mapped,
    }


def _identity(checkpoint: Checkpoint, config: ConversionConfig, kind: str) -> dict[str, Any]:
    """Return what must be the same where a killed conversion goes on: the bytes of the result hang on it."""
    files = {}
    given = [*(config.counts.values() if isinstance(config.counts, dict) else ()), *config.contexts.values()]
    for text in given:
        name = text.rpartition(":")[0] if ".parquet:" in text else text
        found = Path(name)
        files[name] = [found.stat().st_size, found.stat().st_mtime_ns] if found.is_file() else []
    return {
        "format": _FORMAT,
        "checkpoint": str(checkpoint.path.resolve()),
        "files": checkpoint.identity,
        "config": config.plain,
        "given": files,
        "result": kind,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _is_there(target: Path, identity: Mapping[str, Any]) -> bool:
    """Return whether the same command has made the result before, to its end, and nothing has touched it since."""
    found = _report_at(target)
    is_ours = target.exists() and found is not None and found.get("identity") == _digest(identity)
    return bool(is_ours and found and found.get("files") == files_of(target)) and clear_away(target)


def _report_at(target: Path) -> dict[str, Any] | None:
    """Return the report beside a result, or None where there is none, or none that a conversion has written."""
    path = target.with_name(f"{target.name}.report.json")
    try:
        found = json.loads(path.read_text()) if check_regular(path) is None else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and "identity" in found else None


def _check_report(target: Path) -> None:
    """Raise ValueError where something stands in the way of the report that no conversion has written."""
    path = target.with_name(f"{target.name}.report.json")
    if os.path.lexists(path) and _report_at(target) is None:
        raise ValueError(f"{path}: must be free for the report, got something else there; move it away")


class _Conversion:
    """What is to be done, looked over before a row is read.

    Args:
        checkpoint, config, changes: of the conversion.
        homes: all modules that hold tables, which may be named.
        kind: of the result.
        memory: bytes that may be taken.

    Attributes:
        fate: what becomes of all that is no table.
        idle: keys of tables whose look-ups were given, and change nothing as their methods are set.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ConversionConfig,
        changes: list[Change],
        homes: list[Home],
        kind: str,
        memory: int,
    ) -> None:
        self._checkpoint, self._changes, self._config = checkpoint, changes, config
        self._kind = kind
        self._ties: dict[Any, Tensor] = {}
        self._kept, gone = renamed_weights(checkpoint, changes)
        self._own = {key for change in changes for key in change.old_keys()}
        self.fate: Fate = settle(checkpoint, self._own, self._kept, gone)
        if kind == "dcp":
            self.fate.lost = [name for name, value in self.fate.plain.items() if value == {}]
        if kind == "safetensors":
            check_safetensors(checkpoint.path, self.fate.plain)
        self._tables = [
            (change, table) for change in changes for table in change.home.tables if not change.stays(table)
        ]
        self.idle: list[str] = []
        self._data = self._inputs(homes)
        self._check_memory(memory)
        self._check_fits()

    def _inputs(self, homes: list[Home]) -> dict[str, TableData]:
        """Return what each fit learns from beside rows, by the key of the table."""
        config = self._config
        places = [home.place() for home in homes]
        given = config.counts if isinstance(config.counts, dict) else None
        counts, contexts = shared_out("counts", given, places), shared_out("contexts", config.contexts, places)
        keys = {
            (place.path, table.name): table.key
            for place, home in zip(places, homes, strict=True)
            for table in home.tables
        }
        idle = {keys[path, name] for path, each in counts.items() for name in each}
        for name, given_file in (("counts", given), ("contexts", config.contexts)):
            check_files(name, given_file or {})
        found = {}
        for change, table in self._tables:
            path, where = change.home.place().path, f"table {table.name!r}"
            mine: Tensor | None = None
            if (text := counts[path].get(table.name)) is not None:
                mine = read_counts(where, text, table.num_embeddings)
            elif config.counts == "optimizer":
                mine = self._of_optimizer(where, change, table)
            pairs = contexts[path].get(table.name)
            both = None if pairs is None else read_contexts(where, pairs)
            found[table.key] = TableData(None, mine, both, config.seed)
            method = change.method(table, True)
            if method is not None and method.fits_by_counts(_config_of(change, table)):
                idle.discard(table.key)
            elif mine is not None:
                idle.add(table.key)
        self.idle = sorted(idle)
        return found

    def _of_optimizer(self, where: str, change: Change, table: Table) -> Tensor | None:
        if change.method(table, False) is not None or change.method(table, True) is None:
            return None
        (key,) = change.keys_of(table, False).values()
        states = states_of(self._checkpoint, str(self._checkpoint.places[key][-1]))
        with_numbers = self.fate.numbered
        return counts_of_optimizer(where, self._checkpoint, dict.fromkeys(states), table.num_embeddings, with_numbers)

    def _check_memory(self, memory: int) -> None:
        needs = {}
        held = {key: 0 if data.counts is None else data.counts.nbytes for key, data in self._data.items()}
        for change, table in self._tables:
            method, data = change.method(table, True), self._data[table.key]
            config = _config_of(change, table)
            some = method or change.method(table, False)
            assert some is not None
            pairs = len(data.contexts[0]) if isinstance(data.contexts, tuple) else 0
            new = None if method is None else change.new
            others = sum(held.values()) - held[table.key]  # look-ups of all tables lie there together
            needs[table.key] = others + needed(config, some, new, data.counts is not None, pairs, self._kind == "dcp")
        check_memory(memory, needs)

    def _check_fits(self) -> None:
        """Raise ValueError for whatever shows before the first row is read."""
        for change, table in self._tables:
            method = change.method(table, True)
            if method is None:
                continue
            with errors_of(f"{self._checkpoint.path}"):
                method.check_fit(_config_of(change, table), self._data[table.key])

    def tables(self, work: Work, progress: bool) -> tuple[dict[str, Tensor], int]:
        """Return the tensors of all tables that are stored otherwise, by key, and how many rows they have."""
        sources, made = Sources(self._checkpoint, work), {}
        total = sum(table.num_embeddings for _, table in self._tables)
        with tqdm(total=total, desc="converting", unit="row", unit_scale=True, disable=not progress) as bar:
            for number, (change, table) in enumerate(self._tables):
                method = change.method(table, True)
                bar.set_postfix_str(f"{table.name}: {'dense' if method is None else method.method}")
                with errors_of(f"{self._checkpoint.path}"):
                    job = self._job(number, change, table, sources)
                    made |= run_job(job, work, bar.update, learns_whole=True)
        for change in self._changes:
            made |= self._shared(change, sources)
        return made, total

    def _job(self, number: int, change: Change, table: Table, sources: Sources) -> Job:
        if change.new is None:
            like = {table.key: torch.empty(table.num_embeddings, table.embedding_dim, dtype=table.dtype, device="meta")}
        else:
            like = {change.home.prefix + key: value for key, value in change.new.state_dict().items()}
        config, keys = _config_of(change, table), change.keys_of(table, True)
        method, reader = change.method(table, True), sources.reader(change, table)
        return Job(number, table.name, config, method, keys, like, reader, self._data[table.key])

    def _shared(self, change: Change, sources: Sources) -> dict[str, Tensor]:
        """Return what the result has of a module beside its tables: format, layout and padding row."""
        if change.new is None:
            return {}
        collection, found, prefix = collection_of(change.new), {}, prefix_of(change.home, change.new)
        banks = {table.name: collection.decoder.bank(table.name) for table in change.home.tables}
        layout = StateFormat(collection.blueprint, banks).layout
        found[f"{prefix}decoder.format_version"] = torch.full((1,), FORMAT_VERSION)
        found[f"{prefix}decoder.layout"] = torch.tensor(layout, dtype=torch.int64)
        row = sources.padding_row(change)
        if row is not None:
            found[f"{change.home.prefix}padding_row"] = row
        return found

    def assembled(self, made: Mapping[str, Tensor], work: Work) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
        """Return all values of the result by name, in the order of the checkpoint, and the keys that lead to them."""
        values: dict[str, Any] = {}
        places: dict[str, tuple[Any, ...]] = {}
        owner = {first_old(self._checkpoint, change): change for change in self._changes}
        number = 0
        for name in self._checkpoint.places:
            if name in owner:
                change = owner[name]
                stays = self._staying(change)
                for key in change.new_keys():
                    places[key] = moved_place(self._checkpoint, name, key)
                    values[key] = made[key] if key in made else self._copied(stays[key], work, number)
                    number += 1
            elif name not in self._own and name in self.fate.places:
                places_of = self.fate.places[name]
                new = ".".join(map(str, places_of)) if name in self.fate.renamed else name
                places[new] = places_of
                plain = self.fate.plain
                values[new] = plain[name] if name in plain else self._copied(name, work, number)
                number += 1
        return values, places

    def _copied(self, name: str, work: Work, number: int) -> Tensor:
        """Return a tensor that stays, in a storage of its own; tied ones are one, but where a format has no ties."""
        entry, file = self._checkpoint.tensors[name], f"copy.{number}"
        if not isinstance(entry, Held):
            return work.copied(file, entry)
        key = (entry.span, entry.shape, entry.dtype, entry.tensor.stride())
        found = None if self._kind == "safetensors" else self._ties.get(key)
        if found is None:
            is_alone = entry.is_whole and key not in self._ties
            as_it_is = is_alone and (self._kind == "torch" or entry.tensor.is_contiguous())
            found = entry.tensor if as_it_is else work.placed(file, entry)
        self._ties[key] = found
        return found

    def _staying(self, change: Change) -> dict[str, str]:
        """Return where tensors of tables that stay are in the checkpoint, by new key."""
        found = {}
        for table in change.home.tables:
            if change.stays(table):
                before, after = change.keys_of(table, False), change.keys_of(table, True)
                found |= {after[part]: before[part] for part in before}
        return found


def _config_of(change: Change, table: Table) -> Any:
    (config,) = [config for config in change.home.configs() if config.name == table.name]
    return config


def _write(
    path: Path, kind: str, values: Mapping[str, Any], places: Mapping[str, tuple[Any, ...]], source: Checkpoint
) -> None:
    if kind == "safetensors":
        write_safetensors(path, values)
    elif kind == "torch":
        write_torch(path, nested(places, values, source))
    else:
        write_folder(path, nested(places, values, source))
