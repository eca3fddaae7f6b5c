"""What the report says is so: types, bytes, rounding, and what was given and changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.cases import NUM_ROWS, counts, rows
from tests.conversion.made import MEMORY, report_of, run
from torchrec_compress.conversion.run import convert
from torchrec_compress.methods import HashConfig, Int8Config, PQConfig

NAMES = ("user", "item", "shop")
KEYS = {name: f"sparse.embedding_bags.{name}.weight" for name in NAMES}
PQ, HASH = PQConfig(num_codes=4, codebook_size=16), HashConfig(num_buckets=40)


def saved(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.save({key: rows().to(dtype) for key in KEYS.values()}, folder / "dense.pt")
    return folder / "dense.pt"


def said(source: Path, target: Path, config: dict) -> str:
    """Return what is printed."""
    path = source.parent / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return convert(source, target, path, MEMORY, progress=False)


def test_bytes_and_types_are_those_of_the_files(tmp_path):
    """Codes are called as before where a table gets other codes; they take other bytes."""
    first = {"user": PQ.to_dict(), "item": HASH.to_dict(), "shop": {"method": "dense"}}
    report = run(saved(tmp_path, torch.float16), tmp_path / "a.pt", {"compression": first})
    second = {**first, "user": PQConfig(num_codes=8, codebook_size=16).to_dict()}
    again = run(tmp_path / "a.pt", tmp_path / "b.pt", {**report["back"], "compression": second})
    for number, (told, before, after) in enumerate(((report, "dense.pt", "a.pt"), (again, "a.pt", "b.pt"))):
        for name, key in KEYS.items():
            about = told["tables"][key]
            for when, path in (("before", before), ("after", after)):
                state = torch.load(tmp_path / path)
                mine = [value for each, value in state.items() if name in each]
                assert about[f"bytes_{when}"] == sum(value.nbytes for value in mine), (number, name, when)
                assert about[f"types_{when}"] == sorted({str(value.dtype)[6:] for value in mine})
    assert report["tables"][KEYS["item"]]["rounding"] == "to nearest float16"
    assert [again["tables"][key]["rounding"] for key in KEYS.values()] == [None] * 3


def test_wider_rows_are_rounded_as_a_fit_reads_them(tmp_path):
    config = {"compression": {"user": Int8Config().to_dict(), "*": {"method": "dense"}}}
    told = said(saved(tmp_path, torch.float64), tmp_path / "a.pt", config)
    assert "bytes, rounded to nearest float32\n" in told and told.count("rounded to") == 1
    assert report_of(tmp_path / "a.pt")["tables"][KEYS["item"]]["rounding"] is None


@pytest.mark.parametrize("given", ["files", "optimizer"])
def test_counts_that_change_nothing_are_said(given, tmp_path):
    weights = {key: rows() for key in KEYS.values()}
    sums = {key: {f"{name}.momentum1": counts().float()} for name, key in KEYS.items()}
    torch.save({"model": weights, "optimizer": {"state": sums}}, tmp_path / "dense.pt")
    np.save(tmp_path / "counts.npy", counts().numpy())
    files = dict.fromkeys(NAMES, str(tmp_path / "counts.npy"))
    methods = {"user": PQ.to_dict(), "item": HASH.to_dict(), "shop": {"method": "dense"}}
    config = {"compression": methods, "counts": files if given == "files" else "optimizer"}
    told = said(tmp_path / "dense.pt", tmp_path / "a.pt", config)
    idle = [f"model.{KEYS[name]}" for name in (("shop", "user") if given == "files" else ("user",))]
    assert report_of(tmp_path / "a.pt")["counts_change_nothing"] == idle
    assert f"counts change nothing, as methods are set, of {', '.join(idle)}\n" in told
    told = said(tmp_path / "dense.pt", tmp_path / "b.pt", {"compression": methods})
    assert "counts change" not in told and report_of(tmp_path / "b.pt")["counts_change_nothing"] == []


def test_the_way_back_is_named_where_there_is_one(tmp_path):
    told = said(saved(tmp_path), tmp_path / "a.pt", {"compression": {"*": PQ.to_dict()}})
    assert told.endswith("a.pt.report.json, which --to takes for the way back")
    way = report_of(tmp_path / "a.pt")["back"]
    assert said(tmp_path / "a.pt", tmp_path / "b.pt", way).endswith("b.pt.report.json")


def test_what_is_compressed_already_is_told_apart_from_a_typo(tmp_path):
    """The config of the way there is given once more, to what came of it."""
    state = {KEYS["user"]: rows(), "other.embedding_bags.item.weight": rows()}
    torch.save(state, tmp_path / "dense.pt")
    there = {"compression": {"user": PQ.to_dict()}}
    run(tmp_path / "dense.pt", tmp_path / "a.pt", there)
    with pytest.raises(
        ValueError, match=r"got \['user'\]; the tables are .*; what is compressed, at \['sparse.'\], is exp"
    ):
        run(tmp_path / "a.pt", tmp_path / "b.pt", there)
    with pytest.raises(ValueError, match=r"got \['usr'\]; did you mean 'user'\?; the tables are \[.*\]$"):
        run(tmp_path / "dense.pt", tmp_path / "b.pt", {"compression": {"usr": PQ.to_dict()}})


def test_a_pattern_of_tables_is_none_of_an_optimizers_state(tmp_path):
    state = {"model": {KEYS["user"]: rows().half()}, "optimizer": {"state": {KEYS["user"]: {"exp_avg": rows()}}}}
    torch.save(state, tmp_path / "dense.pt")
    told = {"compression": {"user": HASH.to_dict()}, "tables": {"*": {"data_type": "FP32"}}}
    report = run(tmp_path / "dense.pt", tmp_path / "a.pt", told)
    about = report["tables"][f"model.{KEYS['user']}"]
    assert about["data_type"] == "FP32" and about["types_after"] == ["float32"] and about["rows"] == NUM_ROWS
