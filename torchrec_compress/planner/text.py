"""A plan as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from torchrec_compress.planner.records import KINDS, RankPlan, TablePlan

_MOST_TABLES, _MOST_RANKS = 40, 16
_RANK_COLUMNS = {
    "codes": "code_bytes",
    "native": "native_bytes",
    "managed": "managed_bytes",
    "decoder": "decoder_bytes",
    "optimizer": "optimizer_bytes",
    "gradient": "gradient_bytes",
    "activations": "activation_bytes",
    "device": "device_bytes",
    "host": "host_bytes",
    "capacity": "capacity_bytes",
}


def size(num_bytes: float) -> str:
    """Return bytes for people, in powers of 1024.

    Example:
        >>> size(0), size(1536), size(80 * 2**30)
        ('-', '1.5 KiB', '80.0 GiB')
    """
    if not num_bytes:
        return "-"
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def table_lines(tables: Mapping[str, TablePlan]) -> list[str]:
    """Return a line per table, the largest dense ones first, and the sum."""
    spent = ("optimizer_bytes", "activation_bytes")
    rows = [["table", "method", "rows", "dense", *KINDS, "ratio", "optimizer", "activations", "how"]]
    order = sorted(tables, key=lambda name: -tables[name].dense_bytes)
    for name in order[:_MOST_TABLES]:
        table = tables[name]
        sizes = [table.dense_bytes, *(table.stored(kind) for kind in KINDS)]
        rows.append([name, table.method, f"{table.num_embeddings:,}", *map(size, sizes), f"{table.ratio:.1f}x"])
        rows[-1] += [*(size(getattr(table, field)) for field in spent), how(table)]
    dense = sum(table.dense_bytes for table in tables.values())
    kinds = [sum(table.stored(kind) for table in tables.values()) for kind in KINDS]
    number = sum(table.num_embeddings for table in tables.values())
    rows.append(["all tables", "", f"{number:,}", *map(size, (dense, *kinds)), f"{dense / sum(kinds):.1f}x"])
    rows[-1] += [*(size(sum(getattr(table, field) for table in tables.values())) for field in spent), ""]
    lines = columns(rows, left=(0, 1, len(rows[0]) - 1))
    if len(order) > _MOST_TABLES:
        lines.insert(-1, f"... and {len(order) - _MOST_TABLES} smaller tables")
    return lines


def rank_lines(ranks: Sequence[RankPlan]) -> list[str]:
    """Return a line per rank, or of many ranks the least, the mean and the most."""
    rows = [("rank", *_RANK_COLUMNS)]
    by_column = {title: [getattr(rank, name) for rank in ranks] for title, name in _RANK_COLUMNS.items()}
    if len(ranks) <= _MOST_RANKS:
        rows += [(str(n), *(size(values[n]) for values in by_column.values())) for n in range(len(ranks))]
    else:
        for title, pick in (("least", min), ("mean", lambda v: sum(v) / len(v)), ("most", max)):
            rows.append((f"{title} of {len(ranks)}", *(size(pick(values)) for values in by_column.values())))
    return columns(rows, left=(0,))


def ranges(ranks: Sequence[int]) -> str:
    """Return sorted rank numbers in short.

    Example:
        >>> ranges([0, 1, 2, 3, 7, 9, 10])
        '0-3,7,9-10'
    """
    runs = []
    for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        runs.append(f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0]))
    return ",".join(runs)


def columns(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Return rows as lines, with the columns `left` to the left and all others to the right.

    Example:
        >>> columns([("a", "1"), ("bc", "234")], left=(0,))
        ['a     1', 'bc  234']
    """
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = []
    for row in rows:
        padded = enumerate(zip(row, widths, strict=True))
        cells = [cell.ljust(width) if n in left else cell.rjust(width) for n, (cell, width) in padded]
        lines.append("  ".join(cells).rstrip())
    return lines


def how(table: TablePlan) -> str:
    """Return kind, sharding type, kernel and ranks of the parts that are not simply replicated decoders.

    The kernel tells which memory rows lie in; codes have one of ours alone, in the device's.
    """
    shown = [part for part in table.parts if part.kind != "decoder"] or list(table.parts)
    said = []
    for part in shown:
        kernel = "" if part.kind in ("codes", "decoder") else f" {part.compute_kernel}"
        said.append(f"{part.kind} {part.sharding_type}{kernel} on {ranges(part.ranks)}")
    return "; ".join(dict.fromkeys(said))
