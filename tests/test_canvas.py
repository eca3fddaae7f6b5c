from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from torchrec_compress.dry_run.config import PlanConfig, TableSpec
from torchrec_compress.dry_run.plan import plan

ROOT = Path(__file__).parents[1]
DRAW = """
from pathlib import Path
from torchrec_compress.train.compare.plots import draw
use = {"by_rows": 1.0, "by_lookups": 2.0, "codebook_size": 4}
test = {"auc": {"mean": 0.7, "spread": 0.1}, "logloss": {"mean": 0.5, "spread": 0.1}}
rows = {name: {"bytes": 9, "test": test, "usage": {"$_{$": use}} for name in ("$a$", "50 % {x}", "$^{$")}
print(draw({"variants": rows, "bayes": {}}, Path(".")))
"""


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_plots_are_written_whatever_the_environment_asks_for(tmp_path, backend):
    """In a process of its own: Matplotlib reads the environment when it is imported."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.dpi: 7\n")
    env = {**os.environ, "MPLBACKEND": backend, "PYTHONPATH": str(ROOT), "DISPLAY": ""}
    command = [sys.executable, "-W", "ignore", "-c", DRAW]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("auc_against_bytes.png", "logloss_against_bytes.png", "code_usage.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 5000


def test_nothing_else_imports_matplotlib():
    files = [
        path
        for path in (ROOT / "torchrec_compress").rglob("*.py")
        if re.search(r"(import|from) matplotlib", path.read_text())
    ]
    assert [path.name for path in files] == ["canvas.py"]


def test_names_start_no_formula_in_the_plot_of_a_plan(tmp_path):
    plan(
        PlanConfig(
            tables={"$_{$": TableSpec(100), "$": TableSpec(100)},
            world_size=1,
            output=str(tmp_path),
        )
    )
    assert (tmp_path / "plan.png").stat().st_size > 5000


def test_the_environment_and_matplotlib_are_left_as_they_were(tmp_path, monkeypatch):
    import matplotlib

    from torchrec_compress.canvas import figure

    monkeypatch.setenv("MPLBACKEND", "nonsense")
    before = dict(matplotlib.rcParams)
    with figure(tmp_path / "a.png", 2, 2, 50) as drawn:
        drawn.subplots().plot([1, 2])
    assert os.environ["MPLBACKEND"] == "nonsense" and dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or matplotlib.pyplot.get_fignums() == []
