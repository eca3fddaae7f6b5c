from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from torchrec_compress.cli import main, parse_run
from torchrec_compress.train.check import check_config, check_variants

CONFIGS = sorted(
    path for path in (Path(__file__).parents[1] / "configs").glob("*.yaml") if not path.stem.startswith("plan_")
)


def _error(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("torchrec-compress: error: ")
    return text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_with_all_its_variants(path):
    config = parse_run([str(path)])
    if config.data.kind != "generator":
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "must be YAML, text in UTF-8, got other bytes"),
        (b"a: {", "must be YAML of plain data, got an error"),
        (b"[]", "must hold keys and values, got list"),
        (None, "must be a config file, got a folder"),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare", "plan", "convert", "launch"])
def test_files_that_are_no_config_are_named(tmp_path, capsys, command, content, message):
    path = tmp_path / "a.yaml"
    _ = path.mkdir() if content is None else path.write_bytes(content)
    rest = {"launch": ["--scheduler", "local_cwd", "-j", "1x1"], "convert": []}.get(command, [])
    given = ["convert", "in.pt", "out.pt", "--to", str(path)] if command == "convert" else [command, str(path), *rest]
    text = _error(capsys, *given)
    assert f"{path}: " in text and (message in text or (command, content) == ("convert", None))


def test_folders_that_cannot_be_made_are_told_before_anything_is_run(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "plan.yaml").write_text("tables: {user: {num_embeddings: 100}}")
    for place in ("file", "file/deeper/still"):
        path = str(tmp_path / place)
        wanted = f"output: must be a folder, or one that can be made, got {path!r}, where {tmp_path / 'file'} is a file"
        for command in (["train"], ["compare"], ["plan", str(tmp_path / "plan.yaml")]):
            assert wanted in _error(capsys, *command, "--output", path)
        assert "data criteo: OUT: must be a folder, or o" in _error(capsys, "data", "criteo", str(tmp_path), path)
    assert (tmp_path / "file").read_text() == ""


def test_errors_of_the_system_have_no_numbers(capsys, monkeypatch):
    def fail(*_):
        raise PermissionError(13, "Permission denied", "there/report.md")

    monkeypatch.setattr("torchrec_compress.train.compare.report.write_report", fail)
    text = _error(capsys, "report", "there")
    assert (
        "error: there/report.md: must be a file that can be read, or written, got an error: Permission denied" in text
    )


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


def test_the_file_of_a_wrong_key_is_named(tmp_path, capsys):
    path = tmp_path / "a.yaml"
    path.write_text(
        f"output: {tmp_path / 'out'}\nmodel: {{}}\ncompression: {{user: {{method: mec, num_codewords: 32}}}}\n"
    )
    for command in ("train", "plan", "launch"):
        options = ["--scheduler", "kubernetes", "--dryrun"] if command == "launch" else []
        text = _error(capsys, command, str(path), *options)
        assert f"{path}: unknown key 'compression.user.num_codewords'" in text, command
    assert not (tmp_path / "out" / "full").exists()
    path.write_text(f"output: {tmp_path / 'out'}\n")
    wrong = ["--compression", "{user: {method: mec, num_codewords: 32}}"]
    assert "command line: unknown key 'compression.user.num_codewords'" in _error(capsys, "train", str(path), *wrong)
    assert "command line: pretrain.epochs: must be over 0" in _error(
        capsys, "train", str(path), "--pretrain.epochs", "0"
    )
    assert "command line: seed: must be int" in _error(capsys, "train", str(path), "--seed", "x")
    path.write_text(f"output: {tmp_path / 'out'}\npretrain: {{epochs: 0}}\n")
    assert f"{path}: pretrain.epochs: must be over 0" in _error(
        capsys, "train", str(path), "--pretrain.batch_size", "9"
    )
    path.write_text("compare: {variants: {ok: {}, pq/4: {}}}")
    assert f"{path}: compare.variants 'pq/4': must be a folder's name" in _error(capsys, "compare", str(path))
    path.write_text("compare: {variants: {ok: {}, bad one: {compression: {user: {method: pqq}}}}}")
    said = f"{path}: compare.variants.bad one: compression.user.method: must be one of"
    assert said in _error(capsys, "compare", str(path))


def test_a_config_runs_no_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(
        "model: {}\ncompression: {user: {class_path: subprocess.Popen, init_args: {args: touch X, shell: true}}}"
    )
    for command in ("train", "plan", "launch"):
        options = ["--scheduler", "kubernetes", "--dryrun"] if command == "launch" else []
        assert "compression.user: must be a mapping with the key 'method'" in _error(
            capsys, command, "a.yaml", *options
        )
    with pytest.raises(SystemExit):
        main(["train", "a.yaml", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["compression"]["user"]["class_path"] == "subprocess.Popen"
    assert not Path("X").exists()


def test_a_training_on_a_column_that_is_no_table_ends_at_once(tmp_path, capsys):
    numbers = np.arange(300)
    columns = {"user": numbers % 40, "label": numbers % 2, "split": np.repeat([0, 1, 2], [200, 50, 50])}
    pq.write_table(pa.table({**columns, "type": numbers % 5}), tmp_path / "eight.parquet", row_group_size=50)
    options = [
        "--data.kind",
        "parquet",
        "--data.path",
        str(tmp_path / "eight.parquet"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert "eight.parquet: column 'type': must not be an attribute of torch.nn.ModuleDict" in _error(
        capsys, "train", *options
    )


def test_packages_are_there_by_their_dotted_names():
    """As the documentation writes them, without an import of their own."""
    program = "import torchrec_compress as t; print([getattr(t, name).__name__ for name in t._PACKAGES])"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, capture_output=True, text=True)
    assert "torchrec_compress.compression" in found.stdout and "torchrec_compress.sharding" in found.stdout
