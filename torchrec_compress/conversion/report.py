"""What a conversion did, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchrec import DataType

from torchrec_compress.conversion.entries import Entry
from torchrec_compress.conversion.optimizer import Fate
from torchrec_compress.conversion.plan import Change
from torchrec_compress.conversion.tables import Table
from torchrec_compress.methods import MethodConfig

_SHOWN = 5


def build_report(
    changes: Sequence[Change],
    fate: Fate,
    before: Mapping[str, Entry],
    after: Mapping[str, Any],
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the report.

    Args:
        changes: what is stored otherwise.
        fate: what became of the rest.
        before: tensors of the checkpoint by name.
        after: values of the result by name.
        more: further entries, as they are.
    """
    tables = {}
    for change in changes:
        for table in change.home.tables:
            padding = f"{change.home.prefix}padding_row"  # of a plain module that is compressed
            old = [before[key] for key in {*change.keys_of(table, False).values(), padding} if key in before]
            new = [after[key] for key in {*change.keys_of(table, True).values(), padding} if key in after]
            tables[table.key] = {
                "name": table.name,
                "rows": table.num_embeddings,
                "columns": table.embedding_dim,
                "data_type": table.data_type.name,
                "from": said(change.method(table, False)),
                "to": said(change.method(table, True)),
                "kept_bit_for_bit": change.stays(table),
                "types_before": _types(old),
                "types_after": _types(new),
                "rounding": _rounding(change, table, old),
                "bytes_before": sum(each.nbytes for each in old),
                "bytes_after": sum(each.nbytes for each in new),
            }
    return {
        "tables": tables,
        "orders": {
            change.home.path: [table.name for table in change.home.tables]
            for change in changes
            if change.new is not None and len(change.home.tables) > 1
        },
        "copied_bit_for_bit": len(fate.places) - len({*fate.renamed, *fate.changed, *fate.lost}),
        "changed": fate.changed,
        "not_in_a_folder": fate.lost,
        "renamed": fate.renamed,
        "dropped": fate.dropped,
        "dropped_whole": fate.numbered,
        "back": way_back(changes),
        **more,
    }


def _types(tensors: Sequence[Entry | Tensor]) -> list[str]:
    return sorted({str(each.dtype).removeprefix("torch.") for each in tensors})


def _rounding(change: Change, table: Table, old: Sequence[Entry]) -> str | None:
    """Return how rows are rounded, beside what a method does to them; None where they are not."""
    if change.stays(table):
        return None
    found, types = torch.float32, change.native_types(table, True)
    if change.method(table, False) is None:
        found = torch.promote_types(old[0].dtype, found)  # what a fit computes in, of wider rows than it reads
    target = table.dtype if change.method(table, True) is None or DataType.FP16 in types else torch.float32
    if torch.promote_types(found, target) == target:
        return None
    return f"to nearest {str(target).removeprefix('torch.')}"


def said(method: MethodConfig | None) -> dict[str, Any]:
    """Return a method as plain data."""
    return {"method": "dense"} if method is None else method.to_dict()


def way_back(changes: Sequence[Change]) -> dict[str, Any] | None:
    """Return the config that makes dense tables of the result again, or None where it has compressed ones no more."""
    found: dict[str, Any] = {"tables": {}, "from": {}, "compression": {}}
    for change in changes:
        if change.new is None:
            continue
        found["seed"] = change.new_seed
        for table in change.home.tables:
            name = _name(change, table)
            found["tables"][table.key] = _entry(change, table)
            found["from"][name] = said(change.method(table, True))
            found["compression"][name] = {"method": "dense"}
    return found if found["from"] else None


def _name(change: Change, table: Table) -> str:
    place = change.home.place()
    return place.names(table.name)[0]


def _entry(change: Change, table: Table) -> dict[str, Any]:
    said_of: dict[str, Any] = {"num_embeddings": table.num_embeddings, "embedding_dim": table.embedding_dim}
    said_of |= {} if table.data_type == DataType.FP32 else {"data_type": table.data_type.name}
    if not change.home.kind:
        entry = table.entry
        said_of |= {"pooled": change.home.is_pooled, "plain": entry.plain, "name": table.name}
        said_of |= {} if entry.padding_idx is None else {"padding_idx": entry.padding_idx}
        said_of |= {"mode": entry.mode} if change.home.is_pooled else {}
    return said_of


def as_text(report: Mapping[str, Any]) -> str:
    """Return the report in lines."""
    lines = []
    for key, about in report["tables"].items():
        how = (
            "kept bit for bit" if about["kept_bit_for_bit"] else f"{about['from']['method']} -> {about['to']['method']}"
        )
        kind = "" if about["data_type"] == "FP32" else f" {about['data_type']}"
        lines.append(
            f"{key}: {about['rows']:,} x {about['columns']}{kind}, {how}, {about['bytes_before']:,} -> "
            f"{about['bytes_after']:,} bytes" + (f", rounded {about['rounding']}" if about["rounding"] else "")
        )
    for path, names in report["orders"].items():
        lines.append(
            f"collection {path!r} has its tables in the order {', '.join(names)}: name them in 'tables' where the "
            "model that loads it has another"
        )
    if report["counts_change_nothing"]:
        lines.append(f"counts change nothing, as methods are set, of {', '.join(report['counts_change_nothing'])}")
    lines.append(f"{report['copied_bit_for_bit']} other entries copied bit for bit")
    for what, told in (
        ("renamed", "renamed with their tables"),
        ("dropped", "left out, of weights that are gone"),
        ("changed", "kept without the names of weights that are gone"),
        ("not_in_a_folder", "left out, as a folder holds no empty mappings"),
    ):
        names = report[what]
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"{len(names)} entries {told}: {', '.join(names[:_SHOWN])}{more}")
    for name in report["dropped_whole"]:
        lines.append(f"optimizer {name!r} numbers its parameters, which are others now: left out whole, make it anew")
    lines.append(
        f"{report['seconds_in_all']:.1f} s, tables at {report['rows_per_second']:,} rows/s; peak memory "
        f"{report['peak_anonymous_bytes'] / 1e6:,.0f} MB of its own, {report['peak_mapped_bytes'] / 1e6:,.0f} MB of "
        "mapped files"
    )
    return "\n".join(lines)
