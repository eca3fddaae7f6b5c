"""What is kept of a weight goes where that weight goes, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.cases import DIM, NUM_ROWS, rows
from tests.conversion.made import load_folder, run
from torchrec_compress.methods import PQConfig

PQ = PQConfig(num_codes=4, codebook_size=16).to_dict()
BY_COUNTS = PQConfig(num_codes=4, codebook_size=16, popularity="count").to_dict()
STOCK = "ebc.embedding_bags.{}.weight"


def saved(folder: Path, value: dict[str, Any]) -> Path:
    torch.save(value, folder / "dense.pt")
    return folder / "dense.pt"


def state(*names: str) -> dict[str, Any]:
    return {name: {"exp_avg": torch.full((NUM_ROWS, DIM), float(number))} for number, name in enumerate(names)}


def test_state_belongs_to_the_longest_name(tmp_path):
    """Of `emb.weight`, which goes, and `enc.emb.weight`, which stays."""
    names = ["emb.weight", "enc.emb.weight"]
    optimizer = {"state": state(*names), "param_groups": [{"params": names, "lr": 0.1}]}
    path = saved(tmp_path, {"model": dict.fromkeys(names, rows()) | {"enc.emb.weight": rows() + 1}, "opt": optimizer})
    report = run(path, tmp_path / "small.pt", {"tables": {"model.emb.weight": {}}, "compression": {"emb": PQ}})
    got = torch.load(tmp_path / "small.pt")["opt"]
    assert list(got["state"]) == ["enc.emb.weight"] and bool((got["state"]["enc.emb.weight"]["exp_avg"] == 1).all())
    assert got["param_groups"] == [{"params": ["enc.emb.weight"], "lr": 0.1}]
    assert report["dropped"] == ["opt.state.emb.weight.exp_avg"] and report["changed"] == ["opt.param_groups"]
    assert report["copied_bit_for_bit"] == 2  # a weight and its state


@pytest.mark.parametrize("flat", [True, False])
def test_the_state_of_another_collection_is_not_renamed(flat, tmp_path):
    """Of `ebc` one table is compressed, so that the other has a new name; `tower.ebc` is left alone."""
    keys = [STOCK.format("a"), STOCK.format("b"), "tower." + STOCK.format("b")]
    model = {key: rows() + number for number, key in enumerate(keys)}
    sums = {key: torch.full((NUM_ROWS,), float(number)) for number, key in enumerate(keys)}
    told = {f"opt.state.{key}.sum": value for key, value in sums.items()}
    value = {**model, **told} if flat else {"m": model, "opt": {"state": {key: {"sum": s} for key, s in sums.items()}}}
    report = run(saved(tmp_path, value), tmp_path / "small.pt", {"compression": told_of(flat)})
    got = torch.load(tmp_path / "small.pt")
    found = {k: v for k, v in got.items() if k.startswith("opt")} if flat else got["opt"]["state"]
    new = "ebc.dense.embedding_bags.b.weight"
    wanted = [f"opt.state.{each}.sum" for each in (new, keys[2])] if flat else [new, keys[2]]
    assert list(found) == wanted and report["dropped"] == [f"opt.state.{keys[0]}.sum"]


def told_of(flat: bool) -> dict[str, Any]:
    above = "" if flat else "m."
    return {f"{above}ebc.a": PQ, f"{above}ebc.b": {"method": "dense"}}


def test_sums_of_another_weight_are_no_counts(tmp_path):
    model = {"emb.weight": rows(), "enc.emb.weight": rows()}
    path = saved(tmp_path, {"model": model, "opt": {"state": {"enc.emb.weight": {"sum": torch.rand(NUM_ROWS, DIM)}}}})
    told = {"counts": "optimizer", "tables": {"model.emb.weight": {}}, "compression": {"emb": BY_COUNTS}}
    with pytest.raises(ValueError, match="counts: must be the sums of one Adagrad in the checkpoint, got none"):
        run(path, tmp_path / "small.pt", told)


@pytest.mark.parametrize(("first", "second"), [("momentum1", "momentum2"), ("sum", "exp_avg_sq")])
def test_moments_of_adam_are_no_counts(first, second, tmp_path):
    key = STOCK.format("a")
    sums = {f"a.{first}": torch.rand(NUM_ROWS, DIM), f"a.{second}": torch.rand(NUM_ROWS, DIM)}
    path = saved(tmp_path, {"model": {key: rows()}, "opt": {"state": {key: sums}}})
    with pytest.raises(
        ValueError, match=rf"must be the sums of one Adagrad in the checkpoint, got moments, .*{second}"
    ):
        run(path, tmp_path / "small.pt", {"counts": "optimizer", "compression": {"a": BY_COUNTS}})


def test_state_of_two_models_is_not_mixed_up(tmp_path):
    """Whose it is cannot be told by a name that both have; of one optimizer it is what is converted."""
    models = {name: {"emb.weight": rows()} for name in ("student", "teacher")}
    one, two = ({"state": state("emb.weight")} for _ in range(2))
    told = {"tables": {"student.emb.weight": {}}, "compression": {"emb": PQ}}
    with pytest.raises(ValueError, match=r"got 'emb.weight' in \['o1.state', 'o2.state'\], and weights \['student"):
        run(saved(tmp_path, {**models, "o1": one, "o2": two}), tmp_path / "small.pt", told)
    report = run(saved(tmp_path, {**models, "o1": one}), tmp_path / "small.pt", told)
    assert report["dropped"] == ["o1.state.emb.weight.exp_avg"]
    both = {"tables": {f"{name}.emb.weight": {"name": name} for name in models}, "compression": {"*": PQ}}
    report = run(saved(tmp_path, {**models, "o1": one, "o2": two}), tmp_path / "both.pt", both)
    assert len(report["dropped"]) == 2


def test_groups_in_a_folder_lose_the_names_of_what_is_gone(tmp_path):
    """A folder keeps groups entry by entry where one of them is a tensor."""
    names = ["emb.weight", "net.weight"]
    group = {"params": names, "lr": torch.tensor(0.1)}
    value = {"model": {"emb.weight": rows(), "net.weight": torch.ones(3)}, "opt": {"param_groups": [group]}}
    dcp.save(value, checkpoint_id=tmp_path / "dense", no_dist=True)
    told = {"tables": {"model.emb.weight": {}}, "compression": {"emb": PQ}}
    report = run(tmp_path / "dense", tmp_path / "small.pt", told)
    got = torch.load(tmp_path / "small.pt")["opt"]["param_groups"]
    assert got == [{"params": ["net.weight"], "lr": torch.tensor(0.1)}]
    assert report["changed"] == ["opt.param_groups.0.params"]


def test_numbers_in_a_folder_are_left_out_whole(tmp_path):
    group = {"params": [0, 1], "lr": torch.tensor(0.1)}
    value = {"model": {"emb.weight": rows()}, "opt": {"param_groups": [group]}}
    dcp.save(value, checkpoint_id=tmp_path / "dense", no_dist=True)
    report = run(
        tmp_path / "dense", tmp_path / "small.pt", {"tables": {"model.emb.weight": {}}, "compression": {"emb": PQ}}
    )
    assert "opt" not in torch.load(tmp_path / "small.pt") and report["dropped_whole"] == ["opt"]


def test_what_a_folder_cannot_hold_is_said_and_lists_stay_lists(tmp_path):
    value = {"model": {"emb.weight": rows()}, "opt": {"state": {}, "steps": [torch.ones(2), torch.zeros(1)]}}
    told = {"tables": {"model.emb.weight": {}}, "compression": {"emb": PQ}}
    report = run(saved(tmp_path, value), tmp_path / "small", told)
    assert report["not_in_a_folder"] == ["opt.state"]
    assert load_folder(tmp_path / "small", {"opt.steps.0": torch.zeros(2)})["opt.steps.0"].tolist() == [1.0, 1.0]
    run(tmp_path / "small", tmp_path / "back.pt", report["back"])
    steps = torch.load(tmp_path / "back.pt")["opt"]["steps"]
    assert [each.tolist() for each in steps] == [[1.0, 1.0], [0.0]]
