"""The result is the state dict that `compress` of the same model has, and the way back is what `decompress` makes."""

import pytest
import torch

from tests.cases import CONFIGS, IDS, contexts, counts
from tests.conversion.made import NAMES, PLAIN, Model, assert_same, given_files, run
from torchrec_compress import compress, decompress


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_all_methods_of_all_kinds_of_tables_there_and_back(config, tmp_path):
    model = Model()
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    given = {"counts": dict.fromkeys(NAMES, counts()), "contexts": dict.fromkeys(NAMES, contexts())}
    small = compress(model, config, seed=3, **given)
    told = {"compression": {"*": config.to_dict()}, "tables": PLAIN, "seed": 3, **given_files(tmp_path)}
    report = run(tmp_path / "dense.pt", tmp_path / "small.pt", told)
    got = torch.load(tmp_path / "small.pt")
    assert_same(got, small.state_dict())
    small.load_state_dict(got)
    if not config.is_compressed:
        return
    run(tmp_path / "small.pt", tmp_path / "back.pt", report["back"])
    assert_same(torch.load(tmp_path / "back.pt"), decompress(small).state_dict())
