"""Tables that train otherwise than they are served (DPQ): counted, kept and scored as they are served."""

import pytest
import torch

from torchrec_compress.compression import parse
from torchrec_compress.train import stages
from torchrec_compress.train.check import check_config, check_run
from torchrec_compress.train.config import override
from torchrec_compress.train.evaluate.scoring import score
from torchrec_compress.train.full import untrained
from torchrec_compress.train.ranks import start

STAGE = {"epochs": 1.0, "batch_size": 256, "evals_per_epoch": 2, "optim": {"codebook_lr": 0.01, "table_lr": 0.1}}
DPQ = {"method": "dpq", "num_codes": 2, "codebook_size": 16, "bound": 0.1}
TRAINED = {"user": DPQ, "item": DPQ, "*": {"method": "dense"}}
PQ = {"method": "pq", "num_codes": 2, "codebook_size": 16}
SERVED = {"user": PQ, "item": PQ, "*": {"method": "dense"}}
SCRATCH = {"start": "scratch", "retrain": STAGE, "compression": TRAINED}


def _run(config, tmp_path, name, **changes):
    config = override(config, changes)
    return config, stages.run(config, tmp_path / name, tmp_path / "full", start(config.parallel), None)


def test_from_scratch_to_the_codes_that_are_kept(config, data, tmp_path, ranks):
    config, summary = _run(config, tmp_path, "dpq", **SCRATCH)
    tables = summary["footprint"]["tables"]
    assert {name: tables[name]["method"] for name in ("user", "item", "hour")} == {
        "user": "pq",
        "item": "pq",
        "hour": "dense",
    }
    assert tables["user"]["total_bytes"] == 300 + 4 + 4 * 16 * 8  # two codes a byte
    queries = 4 * 8 * (300 + 80)
    saved = sum(tables[name]["code_bytes"] for name in ("user", "item"))
    held = summary["footprint"]["total_bytes"] + queries - saved + summary["state_bytes"]
    assert summary["held_bytes"] == held
    assert {"user", "item"} == summary["usage"].keys() and summary["usage"]["user"]["by_rows"] > 1
    model = untrained(config, parse(SERVED), data)
    model.load_state_dict(torch.load(tmp_path / "dpq" / "model.pt", weights_only=True))
    assert model.embeddings.footprint().to_dict() == summary["footprint"]
    model.eval()
    again, _ = score(lambda batch: model(batch.features, batch.dense).logits, data, config.data, ranks)
    for split in ("valid", "test"):
        assert again[split] == pytest.approx(summary["metrics"][split], rel=1e-6)


def test_fitted_to_a_full_model_they_are_what_pq_is(config, tmp_path):
    given = {"compression": {**TRAINED, "user": {**DPQ, "bound": None}}}
    config = override(config, {"pretrain.optim.tables": "sgd"})  # which keeps no state
    _, ours = _run(config, tmp_path, "dpq", **given, curvature_rows=0)
    assert ours["held_bytes"] == ours["footprint"]["dense_bytes"] + 2 * 4 * 16 * 8  # both codebooks
    weighed = {"compression": {**SERVED, **{key: {**PQ, "popularity": "count"} for key in ("user", "item")}}}
    _, pq = _run(config, tmp_path, "pq", **weighed, curvature_rows=0)
    assert ours["footprint"]["total_bytes"] == pq["footprint"]["total_bytes"]
    assert ours["metrics"]["test"] == pytest.approx(pq["metrics"]["test"], rel=1e-6)


def test_a_budget_is_of_what_is_served(config, tmp_path):
    wanted = {"compression": {"budget_ratio": 4.0, "method": DPQ}}
    _, summary = _run(config, tmp_path, "sized", **{**SCRATCH, **wanted})
    assert 4.0 <= summary["footprint"]["ratio"] < 8.0
    assert summary["held_bytes"] > summary["footprint"]["dense_bytes"]


def test_a_first_stage_serves_what_it_trains(config, data):
    wanted = override(config, {"pretrain_compression": TRAINED, "pretrain": STAGE})
    message = (
        r"pretrain_compression: must be methods that are served as they train, got \['dpq'\] for \['item', 'user'\]; "
        "name them in compression, with start = 'scratch'"
    )
    with pytest.raises(ValueError, match=message):
        check_run(wanted, check_config(wanted), data)
