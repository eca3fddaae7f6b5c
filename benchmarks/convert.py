"""Memory and speed of `torchrec-compress convert` on one large table: it makes the checkpoint, converts it, measures.

    python benchmarks/convert.py --rows 10000000 --memory 2GB

A source of safetensors is written where it shall lie; the others are copied from a file that is deleted, so that the
disk needs room for two.
Anonymous memory is what the process holds for itself; mapped memory is pages of files, which the system takes back
when it needs them. Both are the most that /proc/self/status showed, looked at every 50 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

BLOCK = 1 << 18
KEY = "sparse.embedding_bags.item.weight"
METHODS = {
    "pq": {"method": "pq", "num_codes": 8},
    "pq-counts": {"method": "pq", "num_codes": 8, "popularity": "count", "num_hot_rows": 10000},
    "int8": {"method": "int8"},
    "narrow": {"method": "narrow", "width": 16},
}


def make(folder: Path, rows: int, width: int, kind: str) -> Path:
    """Write a dense checkpoint of clustered rows, block by block."""
    if kind == "safetensors":
        path, start = folder / "dense.safetensors", _write_header(folder / "dense.safetensors", rows, width)
        weight = torch.from_numpy(np.memmap(path, np.float32, "r+", start, (rows, width)))
    else:
        path = folder / "raw"
        weight = torch.from_file(str(path), shared=True, size=rows * width).reshape(rows, width)
    seeded = torch.Generator().manual_seed(0)
    centres = torch.randn(1000, width, generator=seeded)
    for first in range(0, rows, BLOCK):
        block = weight[first : first + BLOCK]
        block.copy_(centres[torch.randint(0, 1000, (len(block),), generator=seeded)])
        block.add_(torch.randn(block.shape, generator=seeded), alpha=0.3)
    if kind == "safetensors":
        return path
    raw, state = path, {KEY: weight, "net.weight": torch.randn(64, width, generator=seeded)}
    path = folder / ("dense.pt" if kind == "torch" else "dense")
    if kind == "torch":
        torch.save(state, path)
    else:
        dcp.save(state, checkpoint_id=path, no_dist=True)
    raw.unlink()
    return path


def _write_header(path: Path, rows: int, width: int) -> int:
    """Begin a file of one table, and return where its values start; they are zeros."""
    size = 4 * rows * width
    text = json.dumps({KEY: {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, size]}})
    text += " " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode())
    os.truncate(path, 8 + len(text) + size)
    return 8 + len(text)


def make_counts(folder: Path, rows: int) -> Path:
    """Write look-ups per id of a long tail, int64: half of them 1, one in a thousand above 1,000."""
    path, seeded = folder / "counts.npy", torch.Generator().manual_seed(1)
    counts = np.lib.format.open_memmap(path, "w+", np.int64, (rows,))
    for first in range(0, rows, BLOCK):
        block = counts[first : first + BLOCK]
        block[:] = (1 / (1 - torch.rand(len(block), dtype=torch.float64, generator=seeded))).long().numpy()
    counts.flush()
    return path


def measure(source: Path, target: Path, config: dict, memory: str) -> dict:
    """Convert in a process of its own and return its report."""
    path = target.with_name(f"{target.name}.yaml")
    path.write_text(json.dumps(config))  # which is YAML
    command = [sys.executable, "-m", "torchrec_compress", "convert", str(source), str(target)]
    began = time.perf_counter()
    subprocess.run([*command, "--to", str(path), "--memory", memory], check=True, stdout=subprocess.DEVNULL)
    found = json.loads(target.with_name(f"{target.name}.report.json").read_text())
    return {**found, "wall": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**7)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--methods", default="pq")
    parser.add_argument("--kind", choices=["torch", "dcp", "safetensors"], default="torch")
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--back", action="store_true", help="and expand each result again")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="convert-"))
    try:
        source = make(folder, given.rows, given.width, given.kind)
        for name in given.methods.split(","):
            suffix = "" if given.kind == "dcp" else ".pt"
            small, config = folder / f"{name}{suffix}", {"compression": {"item": METHODS[name]}}
            if name.endswith("-counts"):
                config["counts"] = {"item": str(make_counts(folder, given.rows))}
            found = measure(source, small, config, given.memory)
            show(f"dense -> {name}", found)
            if given.back:
                dense = folder / f"{name}-back{suffix}"
                show(f"{name} -> dense", measure(small, dense, found["back"], given.memory))
                shutil.rmtree(dense) if dense.is_dir() else dense.unlink()
    finally:
        shutil.rmtree(folder)


def show(what: str, found: dict) -> None:
    (table,) = found["tables"].values()
    print(
        f"{what}: {table['bytes_before']:,} -> {table['bytes_after']:,} bytes, {found['wall']:.0f} s in all, "
        f"{found['rows_per_second']:,} rows/s, {found['peak_anonymous_bytes'] / 1e6:,.0f} MB anonymous, "
        f"{found['peak_mapped_bytes'] / 1e6:,.0f} MB mapped",
        flush=True,
    )


if __name__ == "__main__":
    main()
