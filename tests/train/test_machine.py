"""What this machine is slow at is said, and freed memory is given back."""

import subprocess
import sys
import time

import pytest
import torch

from torchrec_compress.train import machine
from torchrec_compress.train.config import ModelConfig, ParallelConfig, RunConfig
from torchrec_compress.train.machine import slow_settings

BFLOAT16 = RunConfig(model=ModelConfig(bfloat16=True), parallel=ParallelConfig(device="cpu"))


@pytest.mark.parametrize(("cost", "lines"), [(49.0, 1), (2.1, 1), (1.9, 0), (0.6, 0)])
def test_bfloat16_is_told_where_it_is_slow(monkeypatch, cost, lines):
    monkeypatch.setattr(machine, "_bfloat16_cost", lambda: cost)
    said = slow_settings([RunConfig(), BFLOAT16])
    assert len(said) == lines
    assert all(f"{cost:.0f} times as long" in line and "model.bfloat16=false" in line for line in said)


def test_nothing_is_measured_for_runs_without_it(monkeypatch):
    monkeypatch.setattr(machine, "_bfloat16_cost", lambda: 1 / 0)
    assert slow_settings([RunConfig()]) == []


def test_a_cost_is_how_much_longer_bfloat16_takes(monkeypatch):
    monkeypatch.setattr(torch, "mm", lambda left, _: time.sleep(0.02 if left.dtype == torch.bfloat16 else 0.002))
    assert 3 < machine._bfloat16_cost() < 20


FRAGMENTS = """
import torch
from torchrec_compress.train.machine import give_back, prepare

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

prepare(1)
before = resident()
blocks = [torch.ones(1 << 18) for _ in range(400)]  # a MiB each
kept = blocks[::20]
del blocks
free = resident() - before
give_back()
print(free, resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_between_what_lives_on_is_given_back():
    done = subprocess.run([sys.executable, "-c", FRAGMENTS], check=True, capture_output=True, text=True)
    held, left = map(int, done.stdout.split()[-2:])
    assert held > 300 << 20  # what `prepare` is for
    assert left < 60 << 20
