"""What a conversion did, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchrec import DataType

from torchrec_compress.conversion.optimizer import Fate
from torchrec_compress.conversion.plan import Change
from torchrec_compress.conversion.tables import Table
from torchrec_compress.methods import MethodConfig

_SHOWN = 5


def build_report(
    changes: Sequence[Change], fate: Fate, sizes: Mapping[str, int], more: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the report.

    Args:
        changes: what is stored otherwise.
        fate: what became of the rest.
        sizes: bytes of every tensor, before and after, by name; a name that stays has the same.
        more: further entries, as they are.
    """
    tables = {}
    for change in changes:
        for table in change.home.tables:
            tables[table.key] = {
                "name": table.name,
                "rows": table.num_embeddings,
                "columns": table.embedding_dim,
                "data_type": table.data_type.name,
                "from": said(change.method(table, False)),
                "to": said(change.method(table, True)),
                "kept_bit_for_bit": change.stays(table),
                "bytes_before": sum(sizes.get(key, 0) for key in set(change.keys_of(table, False).values())),
                "bytes_after": sum(sizes.get(key, 0) for key in set(change.keys_of(table, True).values())),
            }
    return {
        "tables": tables,
        "copied_bit_for_bit": len(fate.places) - len(fate.renamed),
        "renamed": fate.renamed,
        "dropped": fate.dropped,
        "dropped_whole": fate.numbered,
        "back": way_back(changes),
        **more,
    }


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
            f"{about['bytes_after']:,} bytes"
        )
    lines.append(f"{report['copied_bit_for_bit']} other entries copied bit for bit")
    for what, told in (("renamed", "renamed with their tables"), ("dropped", "left out, of weights that are gone")):
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
