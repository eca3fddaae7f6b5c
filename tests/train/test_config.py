"""A config is data: whatever its keys hold, nothing is imported or called, and a wrong value names its key."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from torchrec_compress import cli
from torchrec_compress.dry_run.config import PlanConfig
from torchrec_compress.schema import leaves
from torchrec_compress.train.byte_budget import Budget, budget_of
from torchrec_compress.train.command_line import dump, load_yaml, origin, read, yaml_line
from torchrec_compress.train.config import ParallelConfig, RunConfig, StageConfig, lasting, of_pattern, override

MARKER = "module_that_tells_of_its_import"
# free-form data, of which other code makes something later
FREE = ("compression", "pretrain_compression", "compare.variants")


def _groups(kind: type, where: str = "") -> Iterator[str]:
    for field in dataclasses.fields(kind):
        inner = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(inner):
            yield where + field.name
            yield from _groups(type(inner), f"{where}{field.name}.")


def _payloads(folder: Path) -> list[Any]:
    told = {"class_path": f"{MARKER}.Told", "init_args": {"path": str(folder / "called")}}
    popen = {"class_path": "subprocess.Popen", "init_args": {"args": f"touch {folder / 'called'}", "shell": True}}
    return [told, [told], {"user": popen}, {"user": {"method": told}}, {"user": [told], "__path__": told}]


@pytest.fixture
def payloads(tmp_path, monkeypatch):
    """Yield values that would leave a file behind if anything imported or called what they name."""
    (tmp_path / "modules").mkdir()
    source = f"from pathlib import Path\nPath({str(tmp_path / 'imported')!r}).touch()\n"
    source += "class Told:\n    def __init__(self, path):\n        Path(path).touch()\n"
    (tmp_path / "modules" / f"{MARKER}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    yield _payloads(tmp_path)
    assert MARKER not in sys.modules
    assert not (tmp_path / "imported").exists() and not (tmp_path / "called").exists()


def test_the_marker_would_tell(tmp_path, payloads):
    # in another process, since this one must never have imported it
    told = payloads[0]
    code = f"from {MARKER} import Told; Told({told['init_args']['path']!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(tmp_path / "modules")})
    for name in ("imported", "called"):
        (tmp_path / name).unlink()


def _nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}


@pytest.mark.parametrize("schema", [RunConfig, PlanConfig])
def test_no_key_imports_or_calls(payloads, schema):
    keys = [*(key for key, _, _ in leaves(schema)), *_groups(schema)]
    assert len(keys) > (100 if schema is RunConfig else 15)
    for key in keys:
        is_free = key.startswith(FREE)
        for value in payloads if is_free else payloads[1:3]:
            text = json.dumps(value)
            Path("a.yaml").write_text(yaml.safe_dump(_nested(key, value)))
            for arguments in (["a.yaml"], [f"--{key}", text], [f"--{key}={text}", "--print_config"]):
                try:
                    found = read(schema(), arguments, "usage")
                except ValueError as error:
                    assert key in str(error), (key, error)
                except SystemExit:
                    assert "--print_config" in arguments
                else:  # free-form data, or text where the key takes text
                    for part in key.split("."):
                        found = getattr(found, part)
                    assert found == (value if is_free else text), key


@pytest.mark.parametrize("command", ["train", "compare", "plan", "launch"])
def test_no_command_imports_or_calls(payloads, capsys, monkeypatch, command):
    options = ["--scheduler", "kubernetes", "--dryrun"] if command == "launch" else []
    keys = ["compression", "compression.user", "compare.variants", "model", "data.path", "pretrain.optim", "seed"]
    for key in keys if command != "plan" else [*keys, "tables", "tables.user", "hbm"]:
        for value in payloads:
            start = {"output": "out", "model": {}} if not key.startswith(("tables", "hbm")) else {}
            changes = _nested(key, value)
            if key.startswith("compare") and command != "compare":
                changes["seed"] = "no number"  # variants are the business of `compare` alone; stop before the training
            if command == "compare" and not key.startswith("compare"):
                changes["compare"] = {"variants": {"a": None}}
            Path("a.yaml").write_text(yaml.safe_dump({**start, **changes}))
            with pytest.raises(SystemExit) as stopped:
                cli.main([command, "a.yaml", *options])
            error = capsys.readouterr().err
            assert stopped.value.code == 2 and error.count("\n") == 1
            assert "a.yaml: " in error and (key in error or "seed" in error), error


def test_files_that_are_more_than_data_are_refused(payloads, tmp_path):
    deep, lines = "[" * 1200 + "]" * 1200, ["a0: &a0 [1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    for text in (
        f"compression: !!python/object/apply:{MARKER}.Told [{tmp_path / 'called'}]",
        f"compression: !!python/name:{MARKER}.Told",
        f"compression: !!python/module:{MARKER}",
        f"compression: !{MARKER}.Told {{path: x}}",
        "compression: !!binary aGVsbG8=",
        "compression: !!set {a}",
        "compression: 2020-01-01",
        "compression: {1: {method: pq}}",
        "compression: {a: .inf}",
        f"compression: {deep}",
        "compression: &a [*a]",
        "\n".join(lines).replace("a29", "compression"),
        "a: &a {x: 1}\ncompression: {<<: [*a, *a]}",
        "seed: 1\nseed: 2",
        "- seed",
        "seed: 1\n---\nseed: 2",
        "\x00",
        "seed: 1\n\tx",
    ):
        Path("a.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"a\.yaml: "):
            read(RunConfig(), ["a.yaml"], "usage")
    Path("a.yaml").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match=r"a\.yaml: "):
        read(RunConfig(), ["a.yaml"], "usage")


def test_text_stays_text(payloads, monkeypatch):
    monkeypatch.setenv("SEED", "5")
    monkeypatch.setenv("TORCHREC_COMPRESS_SEED", "5")
    Path("a.yaml").write_text("output: ${SEED}\nmodel.name: dlrm\n")
    config = read(RunConfig(), ["a.yaml", "--data.label", "file://x", "--data.path", "memory://a.yaml"], "usage")
    assert (config.output, config.data.label, config.data.path) == ("${SEED}", "file://x", "memory://a.yaml")
    assert config.seed == 0 and config.model.name == "dlrm"
    for value in ("memory://a.yaml", "https://a/b.yaml", "{seed: 3}", "/dev/null/a", "."):
        with pytest.raises(ValueError, match=r"no such config file|must be a config file, got a folder"):
            read(RunConfig(), ["--config", value], "usage")
    with pytest.raises(ValueError, match=r"compression\.x: must be plain data"):
        override(read(RunConfig(), ["--compression.help", f"{MARKER}.Told"], "usage"), {"compression.x": object()})


def _marks(hint: Any) -> list[Any]:
    parts = get_args(hint) if get_origin(hint) is not Annotated else (hint,)
    return [part for part in (*parts, hint) if get_origin(part) is Annotated] + [
        mark for part in parts if part is not hint for mark in _marks(part)
    ]


@pytest.mark.parametrize("schema", [RunConfig, PlanConfig])
def test_every_number_has_its_range(schema):
    """A key that is added without one fails here: negative, zero, NaN and infinite values are thought of once."""
    for key, hint, default in leaves(schema):
        if not re.search(r"\b(int|float)\b", str(hint)):
            continue
        assert _marks(hint), f"{key}: say which numbers it takes, as in Annotated[int, Range(1)]"
        shapes = [lambda bad: bad, lambda bad: [bad], lambda bad: {"a": bad}]
        for bad in (float("nan"), float("inf"), -float("inf"), -1e300, "x", True, 2**70, -(2**40)):
            refused = 0
            for shape in shapes:
                try:
                    override(schema(), {key: shape(bad)})
                except ValueError as error:
                    refused += key in str(error)
            assert refused == 3 or key in ("data.positive_from", *FREE) or isinstance(default, dict), (key, bad)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pretrain.epochs", -1),
        ("pretrain.batch_size", 0),
        ("pretrain.evals_per_epoch", 0),
        ("pretrain.keep_checkpoints", 0),  # [-0:] would keep all
        ("retrain.distill_weight", 1.5),
        ("model.dropout", 1),
        ("model.embedding_dim", 0),
        ("model.hidden", [0]),
        ("model.cross_rank", 0),
        ("data.lanes", 0),
        ("data.subsample", 0),
        ("data.vocab.user", 0),
        ("data.vocab.user", 2**31 + 1),
        ("data.pooling.user", 0),
        ("data.fractions", [1, 0.5]),
        ("data.generator.num_users", 1),
        ("parallel.timeout", 0),
        ("compare.num_workers", 0),
        ("compare.seeds", [-1]),
        ("num_threads", 0),
        ("seed", 2**32),
    ],
)
def test_numbers_out_of_range_name_their_key(key, value):
    with pytest.raises(ValueError, match=rf"^{key}(\[\d\])?: must be (at least|in) "):
        override(RunConfig(), {key: value})


def test_numbers_are_read_as_yaml_1_2_writes_them(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: {init_scale: 1e-3}\npretrain: {epochs: 2, optim: {dense_lr: 1E-2, table_lr: .5}}\n")
    config = read(RunConfig(), [str(path), "--retrain.epochs", "5e-1", "--seed=7"], "usage")
    assert (config.model.init_scale, config.pretrain.epochs, config.pretrain.optim.dense_lr) == (1e-3, 2.0, 1e-2)
    assert config.retrain.epochs == 0.5 and config.seed == 7 and type(config.pretrain.epochs) is float


@pytest.mark.parametrize("number", ["1:30", "190:20:30", "010", "0b11", "08", "-1:30", "2020-01-31", "2020-99-99"])
def test_what_only_yaml_1_1_takes_for_a_number_is_none(tmp_path, number):
    path = tmp_path / "a.yaml"
    path.write_text(f"seed: {number}\n")
    for arguments in ([str(path)], ["--seed", number]):
        with pytest.raises(ValueError, match=f"seed: must be int in .*, got '{number}'"):
            read(RunConfig(), arguments, "usage")
    path.write_text(f"pretrain: {{epochs: {number}.5}}\ndata: {{label: {number}}}\n")
    if ":" in number:
        with pytest.raises(ValueError, match=rf"pretrain.epochs: must be float at least 0, got '{number}.5'"):
            read(RunConfig(), [str(path)], "usage")
    path.write_text(f"data: {{label: {number}}}\n")
    assert read(RunConfig(), [str(path)], "usage").data.label == number


@pytest.mark.parametrize("word", ["on", "off", "yes", "No", "0x10", "1_0", "3.5"])
def test_a_name_that_yaml_takes_for_something_else_wants_quotes(tmp_path, word):
    path = tmp_path / "a.yaml"
    for text in (f"data: {{label: {word}}}", f"data: {{drop: [{word}]}}", f"context: {{user: {word}}}"):
        path.write_text(text)
        with pytest.raises(
            ValueError, match=r"(label|drop\[0\]|context\.user): must be str, got .*; put text in quotes"
        ):
            read(RunConfig(), [str(path)], "usage")
    path.write_text(f"data: {{vocab: {{{word}: 3}}}}")
    with pytest.raises(ValueError, match=r"keys must be text, got .*; put it in quotes"):
        read(RunConfig(), [str(path)], "usage")
    path.write_text(f"data: {{label: '{word}', vocab: {{'{word}': 3}}}}")
    found = read(RunConfig(), [str(path)], "usage").data
    assert found.label == word and found.vocab == {word: 3}


# what looks like a number, a date, a merge, to one YAML or another; and any other text
_marked = st.text("0123456789+-.:_eExnaifNOynt<=~ \t\n\r#'\"\x85\u2028", max_size=12)
_texts = _marked | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60)
_values = _texts | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()


@given(_texts, st.dictionaries(_texts, _values | st.lists(_values)))
def test_text_is_written_so_that_it_is_read_as_text(text, found):
    config = dataclasses.replace(RunConfig(), output=text, compression=found, context={text: text})
    for written in (dump(config), dump(config, allow_unicode=False)):
        assert load_yaml(written) == dataclasses.asdict(config)
        assert yaml.safe_load(written)["output"] == text  # others read YAML 1.1
    assert load_yaml(yaml_line([text, found])) == [text, found]


def test_numbers_are_numbers_in_every_usual_form():
    texts = ["0", "-7", "1_000", "0x1f", "1.5", ".5", "-2.", "1e3", "1E-3", "1.5e+2", "+.5e1"]
    assert [load_yaml(text) for text in texts] == [0, -7, 1000, 31, 1.5, 0.5, -2.0, 1e3, 1e-3, 150.0, 5.0]
    assert [type(load_yaml(text)) for text in ("7", "1e3")] == [int, float]
    assert load_yaml(".inf") == float("inf") and load_yaml("-.inf") == -float("inf")


def test_what_1_1_alone_has_a_meaning_for_is_text():
    assert load_yaml("{split: =, =: 1, also: <<, list: [=, <<], hex: 0x_}") == {
        "split": "=",
        "=": 1,
        "also": "<<",
        "list": ["=", "<<"],
        "hex": "0x_",
    }
    with pytest.raises(ValueError, match=r"seed: must be int in .*, got '0x_'"):
        read(RunConfig(), ["--seed", "0x_"], "usage")


@pytest.mark.parametrize("text", ["!!int 010", "!!int '1:30'", "!!int 0b11", "!!int 0x_", "!!float 1:30", "!!float ''"])
def test_explicit_tags_read_numbers_as_1_2_does(text):
    with pytest.raises(ValueError, match=r"must be written as in YAML 1\.2, got"):
        load_yaml(text)
    found = [load_yaml(text) for text in ("!!int 7", "!!int '0x1f'", "!!float 3", "!!float '1e3'")]
    assert found == [7, 31, 3.0, 1000.0] and [type(value) for value in found] == [int, int, float, float]


def test_an_error_names_the_last_file_that_gives_its_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("data: {kind: parquet, label: y}\nseed: 1\n")
    Path("b.yaml").write_text("data.label: z\nretrain: {epochs: 1}\n")
    keys = ["data", "seed", "retrain"]
    for error, words, said in (
        ("data.label: no", "a.yaml --config b.yaml", "b.yaml: "),
        ("data.label: no", "--config=b.yaml --config a.yaml", "a.yaml: "),
        ("data.kind: no", "a.yaml --config b.yaml", "a.yaml: "),
        ("data.path: must be set", "a.yaml --config b.yaml", "a.yaml: "),
        ("retrain: no", "a.yaml --config b.yaml", "b.yaml: "),
        ("retrain.epochs: no", "--config b.yaml", "b.yaml: "),
        ("data.label: no", "a.yaml --data.label x --config b.yaml", "b.yaml: "),
        ("data.label: no", "a.yaml --config b.yaml --data.label x", "command line: "),
        ("data.label: no", "a.yaml --data {}", "command line: "),
        ("no key", "a.yaml --config b.yaml", ""),
    ):
        assert origin(error, words.split(), keys) == said + error


def test_merged_mappings_are_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "pretrain: &p {epochs: 3, optim: &o {table_lr: 0.5}}\n"
        "retrain: {<<: *p, epochs: 1, optim: {<<: *o, dense_lr: 0.25}}\n"
        "compare: {variants: {a: {retrain: *p}, b: {retrain: {<<: *p, epochs: 2}}}}\n"
    )
    config = read(RunConfig(), [str(path)], "usage")
    assert (config.retrain.epochs, config.retrain.optim.table_lr, config.retrain.optim.dense_lr) == (1, 0.5, 0.25)
    assert config.compare.variants["b"] == {"retrain": {"epochs": 2, "optim": {"table_lr": 0.5}}}


def test_command_lines_reach_into_mappings(tmp_path):
    lines = ["--compression.user.method", "pq", "--compression.user.num_codes=4", "--data.vocab.my-table", "5"]
    lines += [
        "--compare.variants.a.compression",
        '{"*": {method: int8}}',
        "--data.hash_size",
        "7",
        "--data.split",
        "null",
    ]
    config = read(RunConfig(), lines, "usage")
    assert config.compression == {"user": {"method": "pq", "num_codes": 4}} and config.data.vocab == {"my-table": 5}
    assert config.compare.variants == {"a": {"compression": {"*": {"method": "int8"}}}}
    assert config.data.hash_size == 7 and config.data.split is None
    plan = read(PlanConfig(), ["--tables.user.num_embeddings", "9", "--tables.user.pooling", "mean"], "usage")
    assert plan.tables["user"].num_embeddings == 9 and plan.tables["user"].pooling == "mean"
    for wrong, said in (
        (["--seed"], "must have a value"),
        (["-x"], "options must be"),
        (["--seed", "3", "4"], "got '4'"),
    ):
        with pytest.raises(ValueError, match=said):
            read(RunConfig(), wrong, "usage")


def test_help_tells_every_key(capsys):
    for schema in (RunConfig, PlanConfig):
        with pytest.raises(SystemExit):
            read(schema(), ["--help"], "usage")
        lines = capsys.readouterr().out.splitlines()
        for key, _, _ in leaves(schema):
            said = lines[lines.index(f"  --{key}") + 1]
            assert said.strip()[0] != "(" and "default: " in said, f"{key} has no description"


def test_a_budget_is_read_in_one_place():
    assert budget_of({"user": {"method": "int8"}}) is None and budget_of({}) is None
    assert budget_of({"budget_bytes": 100, "num_codes": [2]}) == Budget(budget_bytes=100, num_codes=[2])
    assert budget_of({"budget_ratio": {"method": "int8"}}) is None, "a table may be called so"
    for wrong, said in (
        ({"budget_ratio": 0}, "compression.budget_ratio: must be at least 1, got 0"),
        ({"budget_bytes": -5}, "compression.budget_bytes: must be at least 1"),
        ({"budget_ratio": "x"}, "compression.budget_ratio: must be float"),
        ({"budget_ratio": None}, "compression.budget_ratio: must be a number, got null"),
        ({"budget_ratio": 9, "budget_bytes": 9}, "must have one of"),
        ({"budget_ratio": 9, "num_code": [2]}, "did you mean 'compression.num_codes'"),
        ({"budget_ratio": 9, "num_codes": [0]}, r"compression.num_codes\[0\]: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            budget_of(wrong)


def test_a_table_s_own_name_comes_before_patterns():
    kinds = ParallelConfig(
        sharding_types={"a": ["row_wise"], "*": ["table_wise"], "[x]": ["column_wise"]}
    ).sharding_types
    assert of_pattern(kinds, "a") == ["row_wise"] and of_pattern(kinds, "[x]") == ["column_wise"]
    assert of_pattern(kinds, "x") == ["column_wise"] and of_pattern(kinds, "b") == ["table_wise"]


def test_what_was_trained_before_a_key_was_there_goes_on():
    """Keys that came later are left out of an identity while they change nothing."""
    stage = lasting(StageConfig())
    assert "dequantize" not in stage and not {"decay_patience", "adaptive_l2", "average_squares"} & set(stage["optim"])
    changed = lasting(override(StageConfig(), {"dequantize": True, "optim.decay_patience": 1}))
    assert changed["dequantize"] is True and changed["optim"]["decay_patience"] == 1
