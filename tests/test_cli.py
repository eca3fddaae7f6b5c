from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

from torchrec_compress.cli import main, parse_run
from torchrec_compress.train.check import check_config, check_variants
from torchrec_compress.train.ranks import stop

CONFIGS = sorted(
    path for path in (Path(__file__).parents[1] / "configs").glob("*.yaml") if not path.stem.startswith("plan_")
)


@pytest.fixture(autouse=True)
def _leave_no_process_group():
    """A training in this process keeps its group, and another file may start one of its own."""
    yield
    stop()
    if dist.is_initialized():
        dist.destroy_process_group()


def _error(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("torchrec-compress: error: ")
    return text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_with_all_its_variants(path):
    config = parse_run([str(path), "--data.path", "there"])
    check_config(config)
    if config.compare.variants:
        assert set(check_variants(config)) == set(config.compare.variants)


def test_the_command_line_wins_over_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 3\nmodel: {embedding_dim: 64, hidden: [5]}\n")
    config = parse_run([str(tmp_path / "a.yaml"), "--model.embedding_dim", "8", "--compression", '{"method": "int8"}'])
    assert (config.seed, config.model.embedding_dim, config.model.hidden) == (3, 8, [5])
    assert config.compression == {"method": "int8"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("modle: {name: dlrm}", "unknown key 'modle"),
        ("model: {embeding_dim: 3}", "unknown key 'model.embeding_dim'; did you mean 'model.embedding_dim'?"),
        ("pretrain: {optim: {tabel_lr: 3}}", "did you mean 'pretrain.optim.table_lr'?"),
        ("seed: x", "seed"),
        ("a: b: c", "must be YAML of plain data"),
        ("ouput: x", "did you mean 'output'?"),
    ],
)
def test_bad_files_are_one_line_with_the_nearest_name(tmp_path, capsys, text, named):
    (tmp_path / "a.yaml").write_text(text)
    assert named in _error(capsys, "train", str(tmp_path / "a.yaml"))


def test_bad_arguments_are_one_line(tmp_path, capsys):
    assert "did you mean 'model.embedding_dim'?" in _error(capsys, "train", "--model.embeding_dim", "8")
    assert "did you mean 'pretrain.optim.table_lr'?" in _error(capsys, "train", "--pretrain.optim.table_l", "8")
    assert "did you mean 'train'?" in _error(capsys, "trian")
    assert "no such config file" in _error(capsys, "train", "none.yaml")
    assert "report FOLDER" in _error(capsys, "report")
    assert "finished runs" in _error(capsys, "report", str(tmp_path))
    assert "data.path" in _error(capsys, "train", "--data.kind", "parquet", "--output", str(tmp_path))


def test_the_resolved_config_is_printed_and_read_back(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_run(["--seed", "5", "--print_config"])
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["seed"] == 5
    (tmp_path / "a.yaml").write_text(text)
    assert parse_run([str(tmp_path / "a.yaml")]) == parse_run(["--seed", "5"])


def test_help_names_the_commands():
    done = subprocess.run(
        [sys.executable, "-m", "torchrec_compress", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "compare CONFIG" in done.stdout


def test_criteo_is_converted(tmp_path, capsys):
    row = "\t".join(["1", *["5"] * 13, *["68fd1e64"] * 26])
    (tmp_path / "train.txt").write_text(row + "\n")
    main(["data", "criteo", str(tmp_path), str(tmp_path / "npy"), "--frequency-threshold", "0"])
    assert capsys.readouterr().out == f"{tmp_path / 'npy' / 'train_sparse.npy'}\n"
    assert "choose from" in _error(capsys, "data", "avazu", "a", "b")
    assert "must be a TSV" in _error(capsys, "data", "criteo", str(tmp_path / "npy"), str(tmp_path))
