"""Training on several ranks: the same numbers as on one, whatever is sharded how, and whoever dies when."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import yaml

from torchrec_compress import cli
from torchrec_compress.train.config import GeneratorConfig, ParallelConfig, RunConfig, override
from torchrec_compress.train.ranks import Ranks, agree, on_first, start

METHODS = {
    "dense": {},
    "mec": {
        "*": {"method": "mec", "num_codes": 2, "codebook_size": 16, "num_hot_rows": 5, "fit_options": {"num_steps": 5}}
    },
    "memcom": {"*": {"method": "memcom", "num_buckets": 30}},
    "cafe": {"*": {"method": "cafe", "num_hot_rows": 16, "num_cold_rows": 24, "num_blocks": 4, "every": 2}},
    "cce": {"*": {"method": "cce", "num_codes": 2, "codebook_size": 16, "cluster_every": 5, "cluster_until": 15}},
}
STAGE = {"epochs": 2.0, "batch_size": 250, "evals_per_epoch": 2, "checkpoint_every": 3, "patience": 0}


def _config(config: RunConfig, method: str, **changes) -> RunConfig:
    start_at = {} if method == "mec" else {"start": "scratch"} if METHODS[method] else {}
    later = {"distill_weight": 0.3, "dequantize": True} if method == "mec" else {}
    stages = {"pretrain": STAGE, "retrain": {**STAGE, **later}}
    return override(config, {"compression": METHODS[method], **stages, **start_at, **changes})


@functools.cache
def _ranks() -> Ranks:
    """Return this process among those of its pool, which it joins once."""
    return start(ParallelConfig(device="cpu"))


def _train(plain: dict, folder: str, full: str | None = None) -> dict:
    """Run on this rank of a pool; `full` is a folder of models of stage 1."""
    from torchrec_compress.train.stages import run

    return run(override(RunConfig(), plain), Path(folder), Path(full or f"{folder}/full"), _ranks(), None)


def _close(first: dict, second: dict, atol: float = 1e-5) -> None:
    for split in ("valid", "test"):
        assert first["metrics"][split].keys() == second["metrics"][split].keys()
        for name, value in first["metrics"][split].items():
            assert value == pytest.approx(second["metrics"][split][name], abs=atol, nan_ok=True), (split, name)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_ranks_trains_the_same_model(config, tmp_path, two_ranks, four_ranks, method):
    """12.8 batches an epoch, so that the last is uneven.

    MEC starts from one full model: a fit turns the last digits of the rows into other codes.
    """
    plain = dataclasses.asdict(_config(config, method))
    one = _train(plain, str(tmp_path / "one"))
    for name, pool in (("two", two_ranks), ("four", four_ranks)):
        if method == "mec":
            shutil.copytree(tmp_path / "one" / "full", tmp_path / name / "full")
        summaries = pool.run(_train, plain, str(tmp_path / name))
        assert all(summary["metrics"] == summaries[0]["metrics"] for summary in summaries)
        _close(one, summaries[0])
        assert one["training"]["steps"] == summaries[0]["training"]["steps"]
        assert json.loads((tmp_path / name / "summary.json").read_text())["metrics"] == summaries[0]["metrics"]
        assert one["footprint"] == summaries[0]["footprint"]
        for summary in summaries:  # of all ranks, not of one; a column-wise shard has a state for its rows of its own
            assert summary["state_bytes"] == pytest.approx(one["state_bytes"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepfm", "dlrm", "dcnv2", "dlrm_dcnv2"])
def test_every_model_goes_through_the_pipeline(config, tmp_path, two_ranks, name):
    """TorchRec traces them. Criteo's shape for MLPerf's model; bfloat16 rounds the same on any number of ranks."""
    criteo = {"data.generator": {**vars(GeneratorConfig()), "criteo_rows": 50}} if name == "dlrm_dcnv2" else {}
    changes = {"model.name": name, "model.bfloat16": True, "model.bottom": [16, 8] if criteo else [], **criteo}
    short = {"data.generator.num_rows": 1000, "retrain.epochs": 1.0}
    plain = dataclasses.asdict(_config(config, "memcom", **changes, **short))
    one = _train(plain, str(tmp_path / "one"))
    _close(one, two_ranks.run(_train, plain, str(tmp_path / "two"))[0], 1e-2)


@pytest.mark.slow
def test_streamed_rows_train_the_same_model_on_any_number_of_ranks(config, data, tmp_path, two_ranks, four_ranks):
    rows = {name: data.train.ids[:, i].numpy() for i, name in enumerate(data.features)}
    table = pa.table({**rows, "label": data.train.labels.to(torch.int8).numpy()})
    sizes = dict(zip(data.features, data.vocab, strict=True))
    pq.write_table(table.replace_schema_metadata({"vocab": str(sizes)}), tmp_path / "rows.parquet", row_group_size=100)
    source = {"kind": "parquet", "path": str(tmp_path / "rows.parquet"), "streaming": True, "lanes": 4, "split": None}
    source["generator"] = vars(GeneratorConfig())
    plain = dataclasses.asdict(_config(config, "memcom", data=source, **{"retrain.batch_size": 248}))
    one = _train(plain, str(tmp_path / "one"))
    for name, pool in (("two", two_ranks), ("four", four_ranks)):
        _close(one, pool.run(_train, plain, str(tmp_path / name))[0])
    logs = [next(tmp_path.glob(f"{name}/retrain/metrics.jsonl")).read_text().count("\n") for name in ("one", "four")]
    assert logs[0] == logs[1] == 4


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [["row_wise"], ["table_wise"], ["data_parallel"]])
def test_codes_may_be_sharded_in_any_way(config, tmp_path, two_ranks, kinds):
    plain = dataclasses.asdict(_config(config, "mec", **{"data.generator.num_rows": 1000}))
    one = _train(plain, str(tmp_path / "one"))
    plain["parallel"]["sharding_types"] = {"user": kinds, "item": kinds}
    plain["start"], plain["pretrain"]["optim"]["tables"] = "pretrained", "adam"  # full tables replicated
    reference = _train(plain | {"parallel": dataclasses.asdict(ParallelConfig())}, str(tmp_path / "adam"))
    # one model of stage 1 for both, as rounding there may turn a code, which is not what is compared
    _close(reference, two_ranks.run(_train, plain, str(tmp_path / "two"), str(tmp_path / "adam" / "full"))[0])
    assert reference["metrics"] != one["metrics"]


@pytest.mark.slow
def test_shards_start_on_their_device_where_no_host_holds_them(config, tmp_path, two_ranks):
    plain = dataclasses.asdict(_config(config, "mec", **{"parallel.init": "shards", "retrain.distill_weight": 0.5}))
    summary = two_ranks.run(_train, plain, str(tmp_path / "mec"))[0]
    assert summary["metrics"]["valid"]["logloss"] < math.log(2) and summary["training"]["steps"] > 0
    plain = dataclasses.asdict(_config(config, "memcom", **{"parallel.init": "shards"}))
    assert two_ranks.run(_train, plain, str(tmp_path / "memcom"))[0]["metrics"]["valid"]["logloss"] < math.log(2)


def _fail_on(rank: int) -> str:
    ranks = _ranks()

    def work() -> int:
        if dist.get_rank() == rank:
            raise ValueError("a column is missing")
        return dist.get_rank()

    try:
        agree(work, ranks)
    except ValueError as error:
        return str(error)
    return ""


def _fail_on_first(text: str) -> tuple[str, str]:
    def work() -> int:
        if text:
            raise OSError(text)
        return json.loads("{")

    try:
        on_first(work, _ranks())
    except (OSError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", ""


def test_an_error_of_one_rank_reaches_all(two_ranks):
    assert two_ranks.run(_fail_on, 1) == ["rank 1: a column is missing", "a column is missing"]
    assert two_ranks.run(_fail_on, 7) == ["", ""]
    assert two_ranks.run(_fail_on_first, "the disk is full") == [("OSError", "the disk is full")] * 2
    kind, message = two_ranks.run(_fail_on_first, "")[1]  # an error whose type takes other arguments
    assert kind == "ValueError" and message.startswith("Expecting property name")


def test_every_start_has_its_own_settings():
    found = [start(ParallelConfig(device="cpu", timeout=timeout)) for timeout in (5.0, 9.0)]
    assert [ranks.timeout for ranks in found] == [5.0, 9.0]


def test_ranks_are_joined_at_the_doors_alone():
    """Whatever else trains is handed them."""
    package = Path(cli.__file__).parent
    doors = {package / "cli.py", package / "train" / "compare" / "worker.py"}
    for path in package.rglob("*.py"):
        imported = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module == "torchrec_compress.train.ranks"
            for alias in node.names
        }
        assert ("start" in imported) == (path in doors), path


def _wait_for_first(timeout: float) -> float:
    import time as clock

    ranks = dataclasses.replace(_ranks(), timeout=timeout)
    return on_first(lambda: (clock.sleep(2.5), clock.monotonic())[1], ranks)


def test_others_wait_for_rank_0_longer_than_for_a_sign_of_life(two_ranks):
    """Ten signs of life, a quarter of a second apart, then the same answer on both."""
    assert len(set(two_ranks.run(_wait_for_first, 1.0))) == 1


# trains; the n-th start of the job ends with a signal to the n-th victim, "rank:step" with the steps of that start
_SUICIDAL = """
import os, pathlib, signal, sys, time
from torchrec_compress import cli
from torchrec_compress.train.engine.trainable import Trainable
marks, number, kills = pathlib.Path(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1).split()
marks.mkdir(exist_ok=True)
starts = len(list(marks.iterdir()))
victim, at = map(int, kills[starts].split(":")) if starts < len(kills) else (-1, 0)
steps, before = 0, Trainable.set_rate
def set_rate(self, factor):
    global steps
    steps += 1
    if steps == at and int(os.environ["RANK"]) == victim:
        (marks / str(starts)).write_text("")
        os.kill(os.getpid(), number)
    before(self, factor)
Trainable.set_rate = set_rate
cli.main(sys.argv[1:])
"""


def _launch(
    tmp_path, world: int, restarts: int, *arguments: str, source: str = _SUICIDAL
) -> subprocess.CompletedProcess[str]:
    """Run a script under torchrun, and end all of its processes whatever happens."""
    script = tmp_path / "script.py"
    script.write_text(source)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node"]
    command += [str(world), "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}"]
    command += ["--max_restarts", str(restarts), str(script), *arguments]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PYTHONPATH": os.getcwd(),
    }
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        out, error = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, error)


@pytest.fixture
def small(config, tmp_path):
    """Both stages of a compressed model in a file, with dropout."""
    plain = dataclasses.asdict(_config(config, "mec", **{"model.dropout": 0.2, "data.generator.num_rows": 2000}))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


@pytest.mark.slow
def test_a_rank_killed_at_any_step_restarts_and_ends_with_the_same_metrics(small, tmp_path, two_ranks):
    """One job loses rank 1 while the full model trains, in its 14 steps, then rank 0 while the compressed one does.

    Checkpoints are three steps apart, so that the second start begins with step 4.
    """
    given = (str(tmp_path / "marks"), "9", "1:5 0:18", "train", str(small), "--output", str(tmp_path / "killed"))
    done = _launch(tmp_path, 2, 2, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "marks").iterdir())) == 2
    whole = two_ranks.run(_train, yaml.safe_load(small.read_text()), str(tmp_path / "whole"))[0]
    assert json.loads((tmp_path / "killed" / "summary.json").read_text())["metrics"] == whole["metrics"]


@pytest.mark.slow
def test_sigterm_on_one_rank_saves_on_all_and_another_number_of_ranks_goes_on(small, tmp_path):
    """Of the three ranks that go on, one is killed."""
    output, signal_number = tmp_path / "run", str(int(signal.SIGTERM))
    given = ("train", str(small), "--output", str(output))
    done = _launch(tmp_path, 2, 0, str(tmp_path / "first"), signal_number, "1:5", *given)
    assert done.returncode != 0 and "exitcode  : 75" in done.stderr, done.stderr[-3000:]
    assert "asked to end, saved at step 5; the same command continues" in done.stderr
    saved = sorted(path.name for path in output.glob("full/*/pretrain/checkpoints/step*"))
    assert saved[-1] == "step000000005"
    done = _launch(tmp_path, 3, 1, str(tmp_path / "second"), "9", "2:12", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "second" / "0").exists()
    summary = json.loads((output / "summary.json").read_text())
    assert summary["training"]["steps"] == 14 and summary["metrics"]["test"]["logloss"] < math.log(2)


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_job_with_its_error_first(small, tmp_path):
    """The other rank waits in a collective meanwhile, and does not go on waiting."""
    broken = _SUICIDAL.replace("os.kill(os.getpid(), number)", "raise RuntimeError('a cosmic ray')")
    started = time.monotonic()
    given = (str(tmp_path / "marks"), "9", "1:5", "train", str(small), "--output", str(tmp_path / "run"))
    done = _launch(tmp_path, 2, 0, *given, source=broken)
    assert done.returncode != 0 and time.monotonic() - started < 100
    root = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1" in root and "a cosmic ray" in root


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_after_the_timeout(small, tmp_path):
    """The rank waits, as for a stuck file system: no error, no closed connection.

    It dies of a SIGTERM; for a rank that does not, torchrun's agent would wait half a minute more.
    """
    hangs = "signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(1000)"
    started = time.monotonic()
    given = ("train", str(small), "--output", str(tmp_path / "run"), "--parallel.timeout", "8")
    source = _SUICIDAL.replace("os.kill(os.getpid(), number)", hangs)
    done = _launch(tmp_path, 2, 0, str(tmp_path / "marks"), "9", "1:5", *given, source=source)
    assert done.returncode != 0 and time.monotonic() - started < 90
    assert (tmp_path / "marks" / "0").exists()
    assert re.search(r"[Tt]imed? ?out", done.stderr), done.stderr[-3000:]
