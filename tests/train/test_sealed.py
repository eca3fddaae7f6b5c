"""Every file of a run is verified by whoever reads it: cut, changed, gone, or of another run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from torchrec_compress.train import sealed, stages
from torchrec_compress.train.config import override
from torchrec_compress.train.ranks import start

# files of a finished run; a damaged one is an error that names it, or is made again with the same numbers
ERRORS = (
    "config.yaml",
    "fitted.pt",
    "inputs.json",
    "full/*/config.yaml",
    "full/*/inputs.json",
    "full/*/summary.json",
    "full/*/versions.json",
    "full/*/teacher/identity.json",
    "full/*/teacher/train_logits.pt",
    "full/*/curvature*/identity.json",
    "full/*/curvature*/curvature.pt",
    "predicted.json",
    "retrain/metrics.jsonl",
)
MADE_AGAIN = (
    "model.pt",
    "summary.json",
    "versions.json",
    "retrain/checkpoints/step*2/meta.json",
    "retrain/checkpoints/step*2/.metadata",
    "retrain/checkpoints/step*2/__0_0.distcp",
    "retrain/checkpoints/step*2/random_0.pt",
    "retrain/checkpoints/step*2/SHA256SUMS",
)


NOT_MADE_AGAIN = ("config.yaml", "identity.json", "inputs.json", "versions.json")
LISTS = ("SHA256SUMS", "full/*/SHA256SUMS", "full/*/teacher/SHA256SUMS", "full/*/curvature*/SHA256SUMS")


def _copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished.folder, tmp_path / "run"))


def _run(finished, folder):
    return stages.run(finished.config, folder, folder / "full", start(finished.config.parallel), None)


def _flip(path, place):
    """Change a byte, `place` of the way through the file."""
    content = bytearray(path.read_bytes())
    content[min(int(place * len(content)), len(content) - 1)] ^= 1
    path.write_bytes(bytes(content))


def test_the_lists_above_are_complete(finished):
    files = {path for path in finished.folder.rglob("*") if path.is_file()}
    last = sorted(finished.folder.glob("retrain/checkpoints/step*"))[-1]
    assert last.name == "step000000002"
    for pattern in (*ERRORS, *MADE_AGAIN, *LISTS):
        found = set(finished.folder.glob(pattern))
        assert found, pattern
        files -= found
    stages_left = {path.relative_to(finished.folder).parts[-2:] for path in files}
    assert all(parent.startswith("step") or name == "metrics.jsonl" for parent, name in stages_left), stages_left


@pytest.mark.parametrize("pattern", ERRORS)
def test_a_changed_file_is_an_error_that_names_it(finished, tmp_path, pattern):
    folder = _copy(finished, tmp_path)
    [path] = folder.glob(pattern)
    whole = path.read_bytes()
    for place in (0.0, 0.5, 0.9) if path.suffix != ".jsonl" else (0.2,):  # the last line may be cut
        _flip(path, place)
        with pytest.raises(ValueError, match=rf"{path}: .*(checksum differs)"):
            _run(finished, folder)
        path.write_bytes(whole)
    path.write_bytes(whole[:-1] if path.suffix != ".jsonl" else whole[1:])
    with pytest.raises(ValueError, match=rf"{path}: .*(checksum differs)"):
        _run(finished, folder)


@pytest.mark.parametrize("pattern", LISTS)
def test_a_changed_list_of_checksums_is_an_error_or_costs_time(finished, tmp_path, pattern):
    folder = _copy(finished, tmp_path)
    [path] = folder.glob(pattern)
    whole, errors = path.read_bytes(), 0
    for place in (0.0, 0.25, 0.5, 0.75, 1.0):
        _flip(path, place)
        try:
            assert _run(finished, folder)["metrics"] == finished.summary["metrics"]
        except ValueError as error:
            assert str(path.parent) in str(error)
            errors += 1
        path.write_bytes(whole)
    assert errors


@pytest.mark.parametrize("pattern", [*ERRORS, *MADE_AGAIN, *LISTS])
def test_a_file_that_is_gone_is_made_again_or_named(finished, tmp_path, pattern):
    folder = _copy(finished, tmp_path)
    [path] = folder.glob(pattern)
    path.unlink()
    if path.name in NOT_MADE_AGAIN and pattern in ERRORS and pattern != "inputs.json":
        with pytest.raises(ValueError, match=f"{path}: is missing"):
            _run(finished, folder)
    else:
        assert _run(finished, folder)["metrics"] == finished.summary["metrics"]


def test_a_file_of_another_run_is_refused(finished, tmp_path):
    """Its checksum is not listed; with its list and all that is beside it, its settings are others."""
    other = override(finished.config, {"seed": 1, "retrain.epochs": 0.0})
    stages.run(other, tmp_path / "other", tmp_path / "other" / "full", start(other.parallel), None)
    folder = _copy(finished, tmp_path)
    [source], [target] = ((at / "full").iterdir() for at in (tmp_path / "other", folder))
    kept = (folder / "fitted.pt").read_bytes()
    shutil.copy(tmp_path / "other" / "fitted.pt", folder / "fitted.pt")
    with pytest.raises(ValueError, match=r"fitted\.pt: is truncated or changed"):
        _run(finished, folder)
    (folder / "fitted.pt").write_bytes(kept)
    shutil.copy(source / "summary.json", target / "summary.json")
    with pytest.raises(ValueError, match=r"summary\.json: is truncated or changed"):
        _run(finished, folder)
    shutil.rmtree(target)
    shutil.copytree(source, target)
    with pytest.raises(ValueError, match="seed must be 1 as when it was written, got 0"):
        _run(finished, folder)


def test_a_checkpoint_of_another_run_is_refused(finished, tmp_path):
    """Whole, with all of its checksums: the fit must not start from it."""
    other = override(finished.config, {"seed": 1, "compression": {}})
    stages.run(other, tmp_path / "other", tmp_path / "other" / "full", start(other.parallel), None)
    folder = _copy(finished, tmp_path)
    summary = json.loads(next(folder.glob("full/*/summary.json")).read_text())
    [source], [target] = ((at / "full").iterdir() for at in (tmp_path / "other", folder))
    shutil.rmtree(target / summary["checkpoint"])
    shutil.copytree(source / summary["checkpoint"], target / summary["checkpoint"])
    (folder / "fitted.pt").unlink()
    with pytest.raises(ValueError, match="seed must be 1 as when it was written, got 0"):
        _run(finished, folder)


def test_a_teacher_of_another_run_is_refused(finished, tmp_path):
    other = override(finished.config, {"seed": 1})
    stages.run(other, tmp_path / "other", tmp_path / "other" / "full", start(other.parallel), None)
    folder = _copy(finished, tmp_path)
    [source], [target] = (at.glob("full/*/teacher") for at in (tmp_path / "other", folder))
    shutil.rmtree(target)
    shutil.copytree(source, target)
    with pytest.raises(ValueError, match="teacher: seed must be 1 as when it was written, got 0"):
        _run(finished, folder)


def test_the_fit_and_the_teacher_verify_the_full_model(finished, tmp_path):
    """What they made is gone, so that they read it again."""
    for name, gone in (("fit", ("fitted.pt", "retrain")), ("teacher", ("full/*/teacher",))):
        folder = Path(shutil.copytree(finished.folder, tmp_path / name))
        for path in (path for pattern in gone for path in folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        summary = json.loads(next(folder.glob("full/*/summary.json")).read_text())
        path = next(folder.glob("full/*")) / summary["checkpoint"] / "__0_0.distcp"
        _flip(path, 0.5)
        with pytest.raises(ValueError, match=r"__0_0\.distcp is truncated or changed .*to train that stage anew"):
            _run(finished, folder)


def test_a_run_of_an_older_version_is_made_again_from_its_checkpoints(finished, tmp_path, capsys):
    """It had checksums of checkpoints only, in their meta.json, and named fewer parts of its settings."""
    folder = _copy(finished, tmp_path)
    for path in (*folder.glob("full/*/teacher"), *folder.glob("**/inputs.json"), folder / "SHA256SUMS"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in folder.glob("full/*/SHA256SUMS"):
        path.unlink()
    for path in folder.glob("**/meta.json"):
        meta, files = json.loads(path.read_text()), sealed.listed(path.parent)
        assert files is not None
        meta |= {"format": 2, "files": {name: digest for name, digest in files.items() if name != "meta.json"}}
        del meta["identity"]["files"]
        meta["identity"].pop("pretrain", None)
        path.write_text(json.dumps(meta))
        (path.parent / "SHA256SUMS").unlink()
    assert _run(finished, folder)["metrics"] == finished.summary["metrics"]
    said = capsys.readouterr().out
    assert "fitted.pt: has no checksum" in said and "does not tell which data files it was begun with" in said
    assert all(len(list(folder.glob(name))) == 1 for name in ("full/*/summary.json", "SHA256SUMS", "inputs.json"))


def test_a_report_takes_no_number_that_is_not_verified(finished, tmp_path):
    from torchrec_compress.train.compare.report import write_report

    shutil.copytree(finished.folder, tmp_path / "runs" / "a" / "seed0", ignore=shutil.ignore_patterns("full"))
    assert write_report(tmp_path).is_file()
    path = tmp_path / "runs" / "a" / "seed0" / "summary.json"
    path.write_text(path.read_text().replace('"logloss": 0.', '"logloss": 0.0'))
    with pytest.raises(ValueError, match=r"summary\.json: is truncated or changed .*; run the same compare again"):
        write_report(tmp_path)


def test_links_are_not_followed(finished, tmp_path):
    folder = _copy(finished, tmp_path)
    (folder / "fitted.pt").rename(tmp_path / "elsewhere.pt")
    (folder / "fitted.pt").symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(ValueError, match=r"fitted\.pt: must be a regular file, got a link"):
        _run(finished, folder)


def test_numbers_that_json_does_not_have_are_refused(tmp_path):
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"a\.json: must hold finite numbers"):
            sealed.write_json(tmp_path / "a.json", {"auc": value})
    assert not list(tmp_path.iterdir())


def test_every_json_file_of_a_run_is_valid(finished):
    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = [*finished.folder.glob("**/*.json"), *finished.folder.glob("**/*.jsonl")]
    assert len(found) > 8
    for path in found:
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        for line in lines:
            json.loads(line, parse_constant=refuse)


def test_what_was_verified_is_what_is_read(tmp_path):
    sealed.save_tensors(tmp_path / "a.pt", {"x": torch.ones(2)})
    with sealed.open_verified(tmp_path / "a.pt") as file:
        sealed.save_tensors(tmp_path / "a.pt", {"x": torch.zeros(2)})
        assert torch.equal(torch.load(file, weights_only=True)["x"], torch.ones(2))
    assert torch.equal(sealed.load_tensors(tmp_path / "a.pt")["x"], torch.zeros(2))


@pytest.mark.parametrize("at", [1, 2])
def test_a_writer_that_is_killed_leaves_nothing_that_is_wrong(tmp_path, monkeypatch, at):
    """Before the old checksum is gone, the old file counts; before the new one is there, none does."""
    path, calls, write = tmp_path / "a.json", [], sealed.write_sums
    sealed.write_json(path, {"number": 0})

    def killed(folder, sums):
        calls.append(sums)
        if len(calls) == at:
            raise KeyboardInterrupt
        write(folder, sums)

    monkeypatch.setattr(sealed, "write_sums", killed)
    with pytest.raises(KeyboardInterrupt):
        sealed.write_json(path, {"number": 1})
    monkeypatch.undo()
    assert sealed.is_done(path) == (at == 1)
    if at == 1:
        assert sealed.read_json(path) == {"number": 0}
    sealed.write_json(path, {"number": 2})
    assert sealed.read_json(path) == {"number": 2}


def test_a_folder_appears_whole_or_is_anothers(tmp_path):
    def write(part: Path) -> None:
        sealed.write_text(part / "a.txt", "mine")

    sealed.publish(tmp_path / "folder", write)
    sealed.publish(tmp_path / "folder", lambda part: sealed.write_text(part / "a.txt", "theirs"))
    assert sealed.read_text(tmp_path / "folder" / "a.txt") == "mine"
    with pytest.raises(OSError, match="full"):
        sealed.publish(tmp_path / "other", lambda part: (_ for _ in ()).throw(OSError("full")))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("pattern", MADE_AGAIN)
def test_a_changed_file_that_is_made_again_changes_no_number(finished, tmp_path, capsys, pattern):
    folder = _copy(finished, tmp_path)
    [path] = folder.glob(pattern)
    before = path.read_bytes()
    _flip(path, 0.5)
    assert _run(finished, folder)["metrics"] == finished.summary["metrics"]
    if "checkpoints" in pattern:
        said = capsys.readouterr().out
        assert "step000000002: " in said and "resuming from the older step000000001" in said
    elif path.name != "versions.json":
        assert path.read_bytes() == before or path.name == "summary.json"
    assert sealed.is_done(path) or "checkpoints" in pattern


def test_a_young_file_is_read_again(tmp_path, monkeypatch):
    """Clocks of file systems are coarse: it may change once more within its time of change."""
    path, reads, count = tmp_path / "a", [], sealed._hash
    path.write_text("a")
    monkeypatch.setattr(sealed, "_hash", lambda file: (reads.append(file), count(file))[1])
    assert sealed.digest(path) == sealed.digest(path) and len(reads) == 2
    os.utime(path, (0, 0))
    assert sealed.digest(path) == sealed.digest(path) and len(reads) == 3


class _Malicious:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("pattern", ["fitted.pt", "full/*/teacher/train_logits.pt"])
@pytest.mark.parametrize(
    "content",
    [_Malicious(), {}, [1], {"logits": torch.zeros(3)}, b"no tensors"],
    ids=["code", "empty", "list", "tensors", "bytes"],
)
def test_tensors_of_a_stranger_are_refused_by_name(finished, tmp_path, monkeypatch, pattern, content):
    """With the right checksum, which a stranger can write as well."""
    monkeypatch.chdir(tmp_path)
    folder = _copy(finished, tmp_path)
    (path,) = folder.glob(pattern)
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    sealed.write_sums(path.parent, {**(sealed.listed(path.parent) or {}), path.name: sealed.digest(path)})
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "retrain")
    with pytest.raises(ValueError, match=f"{path.name}: must hold"):
        _run(finished, folder)
    assert not Path("ran").exists()


@pytest.mark.parametrize("text", ["[]", "{", "3", "{}", '{"checkpoint": 3, "identity": {}}'])
def test_a_summary_of_a_stranger_is_refused_by_name(finished, tmp_path, text):
    folder = _copy(finished, tmp_path)
    (path,) = folder.glob("full/*/summary.json")
    sealed.write_text(path, text)
    with pytest.raises(ValueError, match=r"summary\.json: .*must"):
        _run(finished, folder)


def test_a_config_of_a_stranger_is_refused_by_name(finished, tmp_path):
    folder = _copy(finished, tmp_path)
    for text in ("seed: !!python/object/apply:os.system ['touch ran']", "seed: [", "newkey: 3"):
        sealed.write_text(folder / "config.yaml", text)
        with pytest.raises(ValueError, match=r"config\.yaml: "):
            _run(finished, folder)
