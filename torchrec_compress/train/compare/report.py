"""The report of a comparison: report.md, report.json and plots, from the summaries alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrec_compress.train.evaluate.metrics import QUALITY
from torchrec_compress.train.journal import write_atomically
from torchrec_compress.train.sealed import is_done, read_json, write_json

_COLUMNS = {
    **{key: f"test {title}" for key, title in QUALITY.items()},
    "calibrated_logloss": "calibrated logloss",
    "tail_auc": "tail AUC",
    "tail_logloss": "tail logloss",
}


_NOTE = (
    "Mean ± sample standard deviation over the seeds. Bytes count everything stored: codes, codebooks, per-id scalars,",
    "hot rows and dense tables. `smaller`: the bytes of the variant `full` over them. `ratio`: the fp32 bytes of the",
    "variant's own tables over them, of all tables and of the compressed ones alone. `held in training`: the most that",
    "tables and their optimizer state took in a stage, one copy of each; that of stage 1 where there was one.",
    "`calibrated logloss`: of logits with the scale and the bias that are best on validation. `examples/s`: of the",
    "last stage that a variant trained (-: none), validation left out, by the clock: other work slows it.",
)


def collect(output: Path, order: Sequence[str] = (), folders: Sequence[Path] | None = None) -> dict[str, Any]:
    """Gather the summaries of a comparison.

    Args:
        output: folder that `compare` wrote.
        order: names of variants in the order of the report; others follow.
        folders: of the runs to gather; None is all that there are.

    Returns:
        By variant: seeds, bytes, how many times smaller than the variant `full`, and mean and spread (sample standard
        deviation, 0 for one seed) of every test metric.

    Raises:
        ValueError: the folder holds no finished run.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(output.glob("runs/*/seed*/summary.json")):
        if folders is not None and path.parent not in folders:
            continue
        found.setdefault(path.parent.parent.name, []).append(read_json(path, "run the same compare again"))
    if not found:
        raise ValueError(f"{output}: must hold finished runs (runs/*/seed*/summary.json), got none; run compare first")
    names = [name for name in order if name in found] + sorted(set(found) - set(order))
    rows = {name: _summarise(found[name]) for name in names}
    for name, row in rows.items():
        row["gap"] = _gap(found[name], found.get("full", [])) if name != "full" else {}
        row["against_full"] = rows["full"]["bytes"] / row["bytes"] if "full" in rows else row["ratio"]
    bayes = next((runs[0]["bayes"] for runs in found.values() if runs[0].get("bayes")), {})
    popularity = next((runs[0]["popularity"] for runs in found.values() if "popularity" in runs[0]), {})
    return {"variants": rows, "bayes": bayes, "popularity": popularity}


def _summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means and spreads over the seeds of one variant."""
    result: dict[str, Any] = {"seeds": [run["seed"] for run in runs], "footprint": runs[0]["footprint"]}
    result["bytes"] = statistics.fmean(run["footprint"]["total_bytes"] for run in runs)
    result["ratio"] = statistics.fmean(run["footprint"]["ratio"] for run in runs)
    result["compressed_ratio"] = statistics.fmean(run["footprint"]["compressed_ratio"] for run in runs)
    result["test"] = _spread([run["metrics"]["test"] for run in runs])
    result["valid"] = _spread([run["metrics"]["valid"] for run in runs])
    fitted = [run["fitted"]["test"] for run in runs if "fitted" in run]
    if fitted and all("training" in run and "fit_seconds" in run for run in runs):
        result["before_training"] = _spread(fitted)
    if all("predicted" in run for run in runs):
        result["predicted"] = statistics.fmean(sum(run["predicted"].values()) for run in runs)
        result["fitted_gap"] = _less([(run["fitted"]["test"], run["fitted_to"]["test"]) for run in runs])
    result["state_bytes"] = runs[0].get("state_bytes")
    result["held_bytes"] = runs[0].get("held_bytes")
    result["usage"] = runs[0].get("usage", {})
    result["training"] = [run["training"] for run in runs if "training" in run]
    rates = [told["rows_per_second"] for told in result["training"]]
    result["rows_per_second"] = statistics.fmean(rates) if rates else None
    return result


def _gap(runs: list[dict[str, Any]], full: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and spread of a variant's scores less those of the full model of the same seed."""
    base = {run["seed"]: run["metrics"]["test"] for run in full}
    pairs = [(run["metrics"]["test"], base[run["seed"]]) for run in runs if run["seed"] in base]
    return {**_less(pairs), "seeds": len(pairs)} if pairs else {}


def _less(pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Return mean and spread of the first scores of pairs less the second."""
    return _spread(
        [{key: mine[key] - its[key] for key in _COLUMNS if key in mine and key in its} for mine, its in pairs]
    )


def _spread(runs: list[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    keys = [key for key in runs[0] if all(key in run for run in runs)]
    return {
        key: {
            "mean": statistics.fmean(run[key] for run in runs),
            "spread": statistics.stdev([run[key] for run in runs]) if len(runs) > 1 else 0.0,
        }
        for key in keys
    }


def write_report(output: Path, order: Sequence[str] = (), folders: Sequence[Path] | None = None) -> Path:
    """Write report.md, report.json and the plots of a comparison.

    Args:
        output: folder that `compare` wrote.
        order: names of variants in the order of the report.
        folders: of the runs that it is about; None is all that there are.

    Returns:
        The path of report.md.

    Raises:
        ValueError: the folder holds no finished run.
    """
    if not order and is_done(output / "report.json"):
        order = list(read_json(output / "report.json")["variants"])
    report = collect(output, order, folders)
    write_json(output / "report.json", report)
    from torchrec_compress.train.compare.plots import draw

    pictures = draw(report, output)
    write_atomically(output / "report.md", _markdown(report, pictures))
    return output / "report.md"


def _markdown(report: dict[str, Any], pictures: list[str]) -> str:
    rows = report["variants"]
    columns = {key: title for key, title in _COLUMNS.items() if all(key in row["test"] for row in rows.values())}
    kinds = sorted({key for row in rows.values() for key in row["test"] if key.startswith("kind")})
    columns |= {key: f"AUC, negatives of kind {key[4:-4]}" for key in kinds}
    lines = ["# Comparison", "", *_NOTE, ""]
    if report["bayes"]:
        lines += [
            f"Best possible: AUC {report['bayes']['bayes_auc']:.4f}, logloss {report['bayes']['bayes_logloss']:.4f}.",
            "",
        ]
    if report["popularity"]:
        known = ", ".join(f"{QUALITY[key]} {value:.4f}" for key, value in report["popularity"]["test"].items())
        lines += [f"Items by their popularity in train alone: test {known}.", ""]
    titles = [
        "variant",
        "bytes",
        "smaller",
        "ratio",
        "ratio, compressed",
        *columns.values(),
        "optimizer state",
        "held in training",
        "examples/s",
        "seeds",
    ]
    lines += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for name, row in rows.items():
        cells = [
            name,
            f"{row['bytes']:,.0f}",
            f"{row['against_full']:.1f}x",
            f"{row['ratio']:.1f}x",
            f"{row['compressed_ratio']:.1f}x",
        ]
        cells += [_number(row["test"].get(key), len(row["seeds"])) for key in columns]
        numbers = (row[key] for key in ("state_bytes", "held_bytes", "rows_per_second"))
        cells += ["-" if number is None else f"{number:,.0f}" for number in numbers]
        cells.append(str(len(row["seeds"])))
        lines.append("| " + " | ".join(cells) + " |")
    lines += _gap_lines(rows) + _predicted_lines(rows) + _training_lines(rows) + _usage_lines(rows)
    for picture in pictures:
        lines += ["", f"![{picture[:-4].replace('_', ' ')}]({picture})"]
    return "\n".join(lines) + "\n"


def _number(value: Mapping[str, float] | None, num_seeds: int) -> str:
    if value is None or math.isnan(value["mean"]):
        return "-"
    return f"{value['mean']:.4f}" + (f" ± {value['spread']:.4f}" if num_seeds > 1 else "")


def _gap_lines(rows: Mapping[str, Any]) -> list[str]:
    """Scores less those of the full model of the same seed, whose spread is that of the gap alone."""
    gaps = {name: row["gap"] for name, row in rows.items() if row["gap"]}
    if not gaps:
        return []
    keys = [key for key in QUALITY if all(key in gap for gap in gaps.values())]
    lines = [
        "",
        "## Gap to the full model of the same seed",
        "",
        f"| variant | smaller | {' | '.join(QUALITY[key] for key in keys)} | seeds |",
        "|---" * (len(keys) + 3) + "|",
    ]
    for name, gap in gaps.items():
        cells = [
            f"{gap[key]['mean']:+.4f}" + (f" ± {gap[key]['spread']:.4f}" if gap["seeds"] > 1 else "") for key in keys
        ]
        lines.append(f"| {name} | {rows[name]['against_full']:.1f}x | " + " | ".join(cells) + f" | {gap['seeds']} |")
    return lines


def _predicted_lines(rows: Mapping[str, Any]) -> list[str]:
    """What fits were predicted to cost beside what they did, before any training: a rank, see docs/curvature.md."""
    told = {name: row for name, row in rows.items() if "predicted" in row}
    if not told:
        return []
    lines = ["", "## Predicted and measured rise of the logloss by the fit alone", ""]
    lines += [
        "Both against the model that a variant was fitted to, the full one or a small one. The prediction is for the"
    ]
    lines += ["order of fits of one model; as a number it is not right for rows of training or test.", ""]
    lines += ["| variant | predicted, rank | predicted | measured | AUC, measured |", "|---|---|---|---|---|"]
    for rank, (name, row) in enumerate(sorted(told.items(), key=lambda item: item[1]["predicted"]), start=1):
        gap = row["fitted_gap"]
        logloss, auc = (f"{gap[key]['mean']:+.4f}" for key in ("logloss", "auc"))
        lines.append(f"| {name} | {rank} | {row['predicted']:.4f} | {logloss} | {auc} |")
    return lines


def _training_lines(rows: Mapping[str, Any]) -> list[str]:
    """What training did to the fitted model."""
    trained = {name: row for name, row in rows.items() if "before_training" in row}
    if not trained:
        return []
    lines = ["", "## What training after the fit changed", ""]
    keys = [key for key in QUALITY if all(key in row["test"] for row in trained.values())]
    titles = [f"{QUALITY[key]} {when}" for key in keys for when in ("fitted", "trained")]
    lines += [f"| variant | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name, row in trained.items():
        before, after, n = row["before_training"], row["test"], len(row["seeds"])
        cells = [_number(part[key], n) for key in keys for part in (before, after)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _usage_lines(rows: Mapping[str, Any]) -> list[str]:
    """How evenly codewords are used (perplexity, at most the codebook's size)."""
    used = [(name, table, use) for name, row in rows.items() for table, use in row["usage"].items()]
    if not used:
        return []
    lines = ["", "## Code usage (perplexity per codebook, first seed)", ""]
    lines += ["| variant | table | over rows | over look-ups | codewords |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {_cell(table)} | {use['by_rows']:.1f} | {use['by_lookups']:.1f} | {use['codebook_size']:.0f} |"
        for name, table, use in used
    ]
    return lines


def _cell(name: str) -> str:
    """Return a table's name so that it stays in its cell."""
    return name.replace("|", "\\|")
