"""The memory of a conversion is bounded by what it was given, and does not grow with the table."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchrec import EmbeddingBagConfig

from torchrec_compress.conversion import fits
from torchrec_compress.conversion.memory import Meter, needed
from torchrec_compress.conversion.run import convert
from torchrec_compress.methods import CafeConfig, MEmComConfig, PQConfig
from torchrec_compress.modules import CompressedEmbeddingBagCollection

ROWS, WIDTH = 10**6, 64
KEY = "sparse.embedding_bags.item.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Return a folder of a dense table of 256 MB."""
    path = tmp_path_factory.mktemp("memory") / "dense"
    weight = torch.rand(4096, WIDTH).repeat(ROWS // 4096 + 1, 1)[:ROWS].contiguous()
    dcp.save({KEY: weight}, checkpoint_id=path, no_dist=True)
    return path


PROGRAM = """
import json, sys
from pathlib import Path
from torchrec_compress.conversion.memory import Meter
from torchrec_compress.conversion.run import convert
bare = Meter()
bare.look()
source, small, back, config = map(Path, sys.argv[1:])
convert(source, small, config, 600 * 10**6, False)
report = json.loads(small.with_name(small.name + ".report.json").read_text())
config.write_text(json.dumps(report["back"]))
convert(small, back, config, 600 * 10**6, False)
print(bare.anonymous)
"""


LEARNING = """
import sys, torch
from torchrec import EmbeddingBagConfig
from torchrec_compress.conversion.memory import Meter, needed
from torchrec_compress.methods import CafeConfig, NarrowConfig, PQConfig, TableData
from torchrec_compress.modules import CompressedEmbeddingBagCollection
table = EmbeddingBagConfig(name="item", num_embeddings=10**7, embedding_dim=8, feature_names=["item"])
method = {
    "pq": PQConfig(num_codes=2, popularity="count", num_hot_rows=1000),
    "shared": PQConfig(num_codes=2, popularity="log2", num_coded=4 * 10**6),
    "narrow": NarrowConfig(width=4),
    "cafe": CafeConfig(num_hot_rows=1600, num_cold_rows=1600),
    "cafe, narrow": CafeConfig(num_hot_rows=1600, num_cold_rows=1600, width=4),
}[sys.argv[1]]
small = CompressedEmbeddingBagCollection([table], torch.device("meta"), compression=method, will_fit=True)
counts = (1 / (1 - torch.rand(10**7))).long()
with Meter() as meter:
    method.learn_blocks(table, TableData(None, counts), lambda ids: torch.randn(len(ids), 8))
print(meter.anonymous, needed(table, method, small, has_counts=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pq", "shared", "narrow", "cafe", "cafe, narrow"])
def test_learning_by_look_ups_takes_no_more_than_was_said(name):
    command = [sys.executable, "-W", "ignore", "-c", LEARNING, name]
    found, said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert 0.5 * int(said) < int(found) <= int(said)


@pytest.mark.slow
def test_a_table_is_converted_and_expanded_through_less_memory_than_it_takes(source, tmp_path):
    """256 MB of rows: what the process has for itself grows by less than half of that, and stays within the limit."""
    config, small, back = tmp_path / "c.yaml", tmp_path / "small", tmp_path / "back.pt"
    config.write_text(json.dumps({"compression": {"item": {"method": "int8"}}}))
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, source, small, back, config]
    least = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for path in (small, back):
        found = json.loads(path.with_name(f"{path.name}.report.json").read_text())["peak_anonymous_bytes"]
        assert least <= found <= min(least + 128 * 10**6, 600 * 10**6)
    got = torch.load(back, mmap=True)[KEY]
    assert got.shape == (ROWS, WIDTH) and torch.equal(got[-5:], got[-5 - 4096 : -4096])


def test_what_is_needed_grows_with_what_is_held():
    """By ids where a sample is drawn or look-ups are weighed; by all rows where a method learns from all."""
    config = EmbeddingBagConfig(name="item", num_embeddings=10**8, embedding_dim=64, feature_names=["item"])
    pq = PQConfig(num_codes=4)
    module = CompressedEmbeddingBagCollection([config], torch.device("meta"), compression=pq, will_fit=True)
    assert needed(config, pq, None) < 5 * 10**8
    assert 10**9 < needed(config, pq, module) < 1.5 * 10**9
    assert needed(config, pq, module) + 8 * 10**8 < needed(config, pq, module, has_counts=True) < 3 * 10**9
    assert needed(config, CafeConfig(num_hot_rows=1600, num_cold_rows=1600), module, has_counts=True) < 7 * 10**9
    assert needed(config, MEmComConfig(num_buckets=10**6), module) > 10**8 * 64 * 4
    assert needed(config, pq, None, is_folder=True) > needed(config, pq, None)


def test_the_meter_sees_what_is_allocated_and_given_back():
    gc.collect()  # what other tests left must not be given back meanwhile
    with Meter() as meter:
        meter.look()
        before = meter.anonymous
        held = torch.ones(500_000_000, dtype=torch.uint8)
        meter.look()
        del held
    assert meter.anonymous >= before + 100_000_000


def test_memory_is_given_back_before_every_block(tmp_path, monkeypatch):
    """Both ways: by chance the heap keeps blocks that it cannot use again, as long as there are rows."""
    calls = []
    monkeypatch.setattr(fits, "BLOCK_ROWS", 64)
    monkeypatch.setattr(fits, "give_back", lambda: calls.append(None))
    source, config = tmp_path / "dense.pt", tmp_path / "c.yaml"
    torch.save({KEY: torch.rand(1000, 8)}, source)
    config.write_text(json.dumps({"compression": {"item": {"method": "int8"}}}))
    convert(source, tmp_path / "small.pt", config, 10**9, False)
    assert len(calls) == 16
    config.write_text(json.dumps(json.loads((tmp_path / "small.pt.report.json").read_text())["back"]))
    convert(tmp_path / "small.pt", tmp_path / "back.pt", config, 10**9, False)
    assert len(calls) == 32
