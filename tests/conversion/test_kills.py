"""A conversion that is killed at any moment goes on, and makes the same bytes."""

from __future__ import annotations

import json
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from tests.conversion.made import digest, report_of
from tests.sharding.ranks import forkserver
from torchrec_compress.conversion import fits, run, work
from torchrec_compress.train import sealed

ROWS, WIDTH = 40_000, 8
BLOCK = 1 << 12  # so small that there are many
CONFIG = {
    "compression": {
        "user": {"method": "pq", "num_codes": 2, "codebook_size": 16},
        "item": {"method": "hash", "num_buckets": 1000},
        "shop": {"method": "int8"},
    }
}


def make(path: Path) -> None:
    torch.manual_seed(1)
    types = {"user": torch.float32, "item": torch.float16, "shop": torch.float32}
    state = {f"sparse.embedding_bags.{name}.weight": torch.randn(ROWS, WIDTH).to(each) for name, each in types.items()}
    torch.save({**state, "net.weight": torch.randn(3, 3)}, path)


def work_through(source: Path, target: Path, config: Path, pipe: Connection) -> None:
    """Convert in a process of its own, noting after every block how far it is."""
    torch.set_num_threads(1)
    fits.NOTE_EVERY, fits.BLOCK_ROWS = 0.0, BLOCK
    pipe.send("begun")
    run.convert(source, target, config, 10**10, False)
    pipe.send("done")


def killed_after(wait: float, *arguments: Path) -> bool:
    """Begin a conversion, kill it after some seconds, and return whether it was done before."""
    context = forkserver()
    ours, theirs = context.Pipe()
    process = context.Process(target=work_through, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process shows
    try:
        assert ours.poll(60) and ours.recv() == "begun"
        is_done = ours.poll(wait)
        return bool(is_done and ours.recv() == "done")
    finally:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Path, str, str]:
    """Return a checkpoint, a config, and what tells the bytes of a file, and of a folder, that nobody's kill was in."""
    folder = tmp_path_factory.mktemp("whole")
    source, config = folder / "dense.pt", folder / "config.yaml"
    make(source)
    config.write_text(json.dumps(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fits, "BLOCK_ROWS", BLOCK)
        run.convert(source, folder / "small.pt", config, 10**10, False)
        run.convert(source, folder / "small", config, 10**10, False)
    return source, config, digest(folder / "small.pt"), digest(folder / "small")


@pytest.mark.parametrize("name", ["small.pt", "small"])
def test_killed_again_and_again_it_makes_the_same_bytes(whole, tmp_path, name):
    """Killed later each time, it is done some time; nothing half is ever there."""
    source, config, of_file, of_folder = whole
    before, target, wait = digest(source), tmp_path / name, 0.005
    kills = 0
    while not killed_after(wait, source, target, config):
        kills, wait = kills + 1, wait * 1.4
        assert not target.exists() or digest(target) in (of_file, of_folder)
    assert kills >= 3
    assert digest(target) == (of_file if name.endswith(".pt") else of_folder)
    assert digest(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}.report.json"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("table", [0, 1, 2])
def test_blocks_that_are_encoded_are_not_read_again(whole, tmp_path, monkeypatch, table):
    """Killed behind the fifth block of each table; sums over the five come back, and the sixth is read next."""
    source, config, of_file, _ = whole
    monkeypatch.setattr(fits, "BLOCK_ROWS", BLOCK)
    monkeypatch.setattr(fits, "NOTE_EVERY", 0.0)
    encode, seen, target = fits.Learned.encode, [], tmp_path / "small.pt"

    def spied(self, ids, rows):
        number = ("user", "item", "shop").index(self._table.name)
        if number == table and int(ids[0]) == 5 * BLOCK and not seen:
            seen.append(-1)
            raise Killed
        if seen and number == table:
            seen.append(int(ids[0]))
        assert not seen or number >= table, "a table that was done is encoded again"
        return encode(self, ids, rows)

    monkeypatch.setattr(fits.Learned, "encode", spied)
    with pytest.raises(Killed):
        run.convert(source, target, config, 10**10, False)
    run.convert(source, target, config, 10**10, False)
    assert seen == [-1, *range(5 * BLOCK, ROWS, BLOCK)]
    assert digest(target) == of_file


def test_killed_before_the_first_note_is_listed_it_begins_anew(whole, tmp_path, monkeypatch):
    source, config, of_file, _ = whole
    monkeypatch.setattr(fits, "BLOCK_ROWS", BLOCK)
    target = tmp_path / "small.pt"
    with monkeypatch.context() as patch:

        def killed(*_):
            raise Killed

        patch.setattr(sealed, "write_sums", killed)
        with pytest.raises(Killed):
            run.convert(source, target, config, 10**10, False)
    assert (tmp_path / "small.pt.part" / "conversion.json").exists()
    run.convert(source, target, config, 10**10, False)
    assert digest(target) == of_file


def test_killed_while_it_cleans_up_it_is_done(whole, tmp_path, monkeypatch):
    source, config, of_file, _ = whole
    monkeypatch.setattr(fits, "BLOCK_ROWS", BLOCK)
    target, finish = tmp_path / "small.pt", work.Work.finish

    def killed(self):
        raise Killed

    monkeypatch.setattr(work.Work, "finish", killed)
    with pytest.raises(Killed):
        run.convert(source, target, config, 10**10, False)
    assert digest(target) == of_file and not report_exists(target)
    monkeypatch.setattr(work.Work, "finish", finish)
    run.convert(source, target, config, 10**10, False)
    assert digest(target) == of_file and report_of(target)["tables"]
    assert "is there already" in run.convert(source, target, config, 10**10, False)
    config.touch()
    assert "is there already" in run.convert(source, target, config, 10**10, False)


def test_killed_at_the_last_of_the_cleaning_up_it_is_done(whole, tmp_path, monkeypatch):
    """With the note of what is converted gone, and other files not; another conversion does not take it for its own."""
    source, config, of_file, _ = whole
    target, other = tmp_path / "small.pt", tmp_path / "other.yaml"
    monkeypatch.setattr(fits, "BLOCK_ROWS", BLOCK)
    with monkeypatch.context() as patch:

        def killed(path):
            raise Killed

        patch.setattr(work.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            run.convert(source, target, config, 10**10, False)
    other.write_text(json.dumps({**CONFIG, "seed": 5}))
    with pytest.raises(ValueError, match="must not exist, got something there"):
        run.convert(source, target, other, 10**10, False)
    assert (tmp_path / "small.pt.part" / "published.json").exists()
    assert "is there already" in run.convert(source, target, config, 10**10, False)
    assert digest(target) == of_file and not (tmp_path / "small.pt.part").exists()


def report_exists(target: Path) -> bool:
    return target.with_name(f"{target.name}.report.json").exists()


def test_another_config_does_not_go_on_from_it(whole, tmp_path, monkeypatch):
    source, config, _, _ = whole
    target, other = tmp_path / "small.pt", tmp_path / "other.yaml"
    monkeypatch.setattr(work.Work, "publish", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run.convert(source, target, config, 10**10, False)
    other.write_text(json.dumps({**CONFIG, "seed": 5}))
    with pytest.raises(ValueError, match=r"config\.seed must be None as when it was written, got 5"):
        run.convert(source, target, other, 10**10, False)
    os.utime(source, ns=(time.time_ns(), time.time_ns()))
    with pytest.raises(ValueError, match=r"files\.dense\.pt must be"):
        run.convert(source, target, config, 10**10, False)
