"""The memory that a conversion may take: what it needs is known before it begins, what it took is measured."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import TracebackType

from torch import nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.kmeans import train_size
from torchrec_compress.methods import MethodConfig
from torchrec_compress.methods.learned import BLOCK_ROWS

_STATUS = Path("/proc/self/status")
# all measured, see benchmarks/convert.md: Python with torch and TorchRec imported
_BASE = 340 * 10**6
_FOLDER = 120 * 10**6  # more where chunks of a folder are written
# of an id: while what all rows share is learned, the same by look-ups, and while rows are encoded
_LEARNED, _WEIGHED, _ENCODED = 6, 11, 8
_MANAGED = 640  # of a place, of those that are dealt out together by look-ups
_COUNT, _PAIR = 8, 48
# of a number of a block that is encoded, and of a row that is learned from
_BLOCK_FLOAT, _SAMPLE_FLOAT, _WHOLE_FLOAT = 24, 24, 36
_POINTS = 256  # of a sample, for each codeword


def needed(
    table: BaseEmbeddingConfig,
    method: MethodConfig,
    small: nn.Module | None,
    has_counts: bool = False,
    has_contexts: int = 0,
    is_folder: bool = False,
) -> int:
    """Return about how many bytes the conversion of one table takes at most, whatever its rows.

    Args:
        table: its config.
        method: that it gets.
        small: the collection that it goes into, on the meta device; None: dense.
        has_counts: whether it has look-ups per id.
        has_contexts: pairs of ids and contexts.
        is_folder: whether the result is a folder.
    """
    ids, width = table.num_embeddings, table.embedding_dim
    block, base = min(ids, BLOCK_ROWS) * width * _BLOCK_FLOAT, _BASE + _FOLDER * is_folder
    if small is None:
        return base + block
    phases = [ids * _ENCODED + block + (2 * method.stored_bytes(table) if _sums_rows(method, table) else 0)]
    if method.learns_from != "nothing":
        is_all = method.learns_from == "all"
        rows = ids if is_all else min(ids, train_size(method.codewords, _POINTS))
        each = _WEIGHED if has_counts else _LEARNED
        phases.append(rows * width * (_WHOLE_FLOAT if is_all else _SAMPLE_FLOAT) + ids * each)
    managed = method.parts(table, 0).managed
    if has_counts:
        phases.append(ids * _WEIGHED + (0 if managed is None else managed.blocks.places_at_once * _MANAGED))
    given = has_counts * ids * _COUNT + has_contexts * _PAIR
    return base + max(phases) + given + method.sketch_bytes(table)


def _sums_rows(method: MethodConfig, table: BaseEmbeddingConfig) -> bool:
    parts = method.parts(table, 0)
    return bool(parts.native) and all(part.num_embeddings < table.num_embeddings for part in parts.native)


class Meter:
    """Watch the memory of this process: what is its own, and what is mapped from files and can be given back.

    Attributes:
        anonymous, mapped: the most so far, in bytes; 0 where the system does not say.
    """

    def __init__(self) -> None:
        self.anonymous = self.mapped = 0
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.look()
            if self._stop.wait(0.05):
                return

    def look(self) -> None:
        """Read the figures now."""
        with self._lock:  # or an older look would be noted after a newer one
            try:
                found = dict(re.findall(r"^(RssAnon|RssFile|RssShmem):\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE))
            except OSError:
                return
            self.anonymous = max(self.anonymous, int(found.get("RssAnon", 0)) * 1024)
            self.mapped = max(self.mapped, (int(found.get("RssFile", 0)) + int(found.get("RssShmem", 0))) * 1024)


def check_memory(limit: int, needs: dict[str, int]) -> None:
    """Raise ValueError where a table would take more than the limit.

    Args:
        limit: in bytes.
        needs: by table.
    """
    if not needs:
        return
    most = max(needs, key=needs.__getitem__)
    if needs[most] > limit:
        raise ValueError(
            f"--memory: must be at least {-(-needs[most] // 10**6)}MB, for table {most!r}, got {limit // 10**6}MB; "
            "give more, or leave the table out"
        )
