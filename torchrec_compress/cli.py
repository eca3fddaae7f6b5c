"""The command line: train, compare, report, plan, convert, data, launch, info. Heavy imports stand inside them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from torchrec_compress.dry_run.config import PlanConfig
    from torchrec_compress.train.config import RunConfig

_USAGE = """usage: torchrec-compress COMMAND ...

  train CONFIG [--key.sub VALUE ...]     pre-train, compress, train on: one run
  compare CONFIG [--key.sub VALUE ...]   variants over seeds, then the report; resumes where it stopped
  report FOLDER                          write report.md, report.json and plots of a comparison again
  plan CONFIG [--world-size N ...]       who holds which bytes on many GPUs; needs none, and no data
  convert CHECKPOINT OUT --to CONFIG     dense tables of a checkpoint become compressed ones, or back; no model needed
  data criteo IN OUT                     Criteo's TSV files to the NumPy files that training reads
  launch CONFIG --scheduler S -j 2x8     train on this machine's processes, Slurm or Kubernetes; checks first
  info                                   versions, and which implementation serves the look-ups and why

CONFIG is a YAML file such as configs/demo.yaml. Every key can be given on the command line as well.
  torchrec-compress train --help                   all keys, what they mean and their defaults
  torchrec-compress train CONFIG --print_config    the resolved config
"""
_COMMANDS = ("train", "compare", "report", "plan", "convert", "data", "launch", "info")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        _fail(message)


def _located(error: str, command: str, arguments: Sequence[str]) -> str:
    """Return an error with the config file in front where it is about one of its keys."""
    if command not in ("train", "compare", "plan", "launch"):
        return error
    from torchrec_compress.dry_run.config import PlanConfig
    from torchrec_compress.train.command_line import origin
    from torchrec_compress.train.config import RunConfig

    return origin(error, arguments, [field.name for kind in (RunConfig, PlanConfig) for field in fields(kind)])


def _told(error: ValueError | OSError) -> str:
    """Return the text of an error, of the system's with its file in front and without its number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: must be a file that can be read, or written, got an error: {error.strerror}"
    return str(error)


def _check_folder(where: str, path: str | None) -> None:
    """Raise ValueError where a folder could not be made, before anything is run that it is for."""
    parts = [] if path is None else [Path(path), *Path(path).parents]
    found = next((part for part in parts if part.exists() or part.is_symlink()), None)
    if found is not None and not found.is_dir():
        raise ValueError(f"{where}: must be a folder, or one that can be made, got {path!r}, where {found} is a file")


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"torchrec-compress: error: {message}\n")
    raise SystemExit(2)


def parse_run(arguments: Sequence[str], command: str = "train") -> RunConfig:
    """Read a config file and overrides.

    Args:
        arguments: [CONFIG] and --key.sub VALUE pairs.
        command: named in the usage.

    Returns:
        The resolved config.

    Raises:
        ValueError: a bad key or value; the error names it, and the file.
        SystemExit: after --help and --print_config.

    Example:
        >>> parse_run(["--model.embedding_dim", "64"]).model.embedding_dim
        64
    """
    from torchrec_compress.train.command_line import read
    from torchrec_compress.train.config import RunConfig

    return read(RunConfig(), arguments, _usage(command))


def parse_plan(arguments: Sequence[str]) -> PlanConfig:
    """Read what to plan: a planning config, or a training config that states its tables' sizes, and overrides.

    Args:
        arguments: [CONFIG] and --key.sub VALUE pairs; dashes in a key are underscores.

    Returns:
        The resolved config.

    Raises:
        ValueError: a bad key or value, or a training config whose sizes or methods depend on its data.
        SystemExit: after --help and --print_config.

    Example:
        >>> parse_plan(["--world-size", "64", "--hbm", "80GB"]).world_size
        64
    """
    from torchrec_compress.dry_run.config import PlanConfig
    from torchrec_compress.schema import build
    from torchrec_compress.train.command_line import read
    from torchrec_compress.train.plan_from_training import from_training

    if not arguments or not _is_training_config(arguments[0]):
        return read(PlanConfig(), arguments, _usage("plan"))
    start = build(PlanConfig, from_training(parse_run(arguments[:1], "plan")))
    return read(start, arguments[1:], _usage("plan"))


def _usage(command: str) -> str:
    return f"torchrec-compress {command} CONFIG [--key.sub VALUE ...]"


def _is_training_config(path: str) -> bool:
    from torchrec_compress.train.command_line import read_file

    return Path(path).is_file() and bool({"data", "model", "pretrain", "retrain"} & set(read_file(Path(path))))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; errors of the user's making are one line and status 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return
    command, rest = given[0], given[1:]
    if command not in _COMMANDS:
        from torchrec_compress.schema import nearest

        _fail(f"unknown command {command!r}{nearest(command, list(_COMMANDS))}; commands are {', '.join(_COMMANDS)}")
    try:
        if command == "report":
            _report(rest)
        elif command == "plan":
            _plan(parse_plan(rest))
        elif command == "convert":
            _convert(rest)
        elif command == "data":
            _data(rest)
        elif command == "launch":
            _launch(rest)
        elif command == "info":
            _info(rest)
        else:
            _run(command, parse_run(rest, command))
    except (ValueError, OSError) as error:
        _fail(_located(_told(error), command, rest))
    except KeyboardInterrupt:
        _fail("interrupted; the same command continues")


def _run(command: str, config: RunConfig) -> None:
    from torchrec_compress.train.machine import prepare

    _check_folder("output", config.output)
    prepare(config.num_threads)
    if command == "compare":
        from torchrec_compress.train.compare.runs import compare

        print((compare(config) / "report.md").read_text(), end="")
        return
    _train(config)


def _train(config: RunConfig) -> None:
    """Train, alone or as one of the ranks that torchrun started; rank 0 speaks for all."""
    import traceback

    from torchrec_compress.modules.footprint import why_no_smaller
    from torchrec_compress.train.engine.loop import Preempted
    from torchrec_compress.train.idle import idle_settings
    from torchrec_compress.train.machine import slow_settings
    from torchrec_compress.train.ranks import end_for_all, start, stop
    from torchrec_compress.train.stages import run

    folder, many = Path(config.output), int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        ranks = start(config.parallel)
        if ranks.is_first:
            for line in [*idle_settings(config), *slow_settings([config])]:
                sys.stderr.write(f"torchrec-compress: {line}\n")
        summary = run(config, folder, folder / "full", ranks)
    except Preempted as end:
        sys.stderr.write(f"torchrec-compress: {end.text}\n")
        raise
    except (ValueError, OSError) as error:
        if not many:
            raise
        sys.stderr.write(f"torchrec-compress: error: rank {os.environ.get('RANK')}: {error}\n")
        end_for_all(error, 2)
    except Exception as error:
        if not many:
            raise
        traceback.print_exc()
        end_for_all(error, 1)
    stop(ranks)
    if not ranks.is_first:
        return
    for split, metrics in summary["metrics"].items():
        print(f"{split}: " + ", ".join(f"{key} {value:.4f}" for key, value in metrics.items()))
    if summary["bayes"]:
        print("best possible: " + ", ".join(f"{key} {value:.4f}" for key, value in summary["bayes"].items()))
    size = summary["footprint"]
    reason = why_no_smaller(size)
    said = f"{size['ratio']:.1f}x smaller" if reason is None else f"no smaller than dense ones ({reason})"
    print(f"tables: {size['total_bytes']:,} bytes, {said}; see {folder}")


def _plan(config: PlanConfig) -> None:
    from torchrec_compress.dry_run.plan import run

    _check_folder("output", config.output)
    print(run(config))


def _convert(arguments: Sequence[str]) -> None:
    parser = _Parser(prog="torchrec-compress convert", allow_abbrev=False)
    parser.add_argument("checkpoint", help="a folder (torch.distributed.checkpoint), a .pt or a .safetensors file")
    parser.add_argument("out", help="what appears, of a kind by its form; it must not exist. A killed one goes on")
    parser.add_argument("--to", required=True, metavar="CONFIG", help="how tables shall be stored, see docs/convert.md")
    parser.add_argument(
        "--memory",
        default="4GB",
        help="that may be taken, 4GB if not given (10**9 bytes to a GB, 2**30 to a GiB); too little is an error, not "
        "another result",
    )
    given = parser.parse_args(list(arguments))
    from torchrec_compress.amounts import parse_bytes
    from torchrec_compress.conversion.run import convert

    memory = parse_bytes(given.memory, "--memory", 1000)
    try:
        print(convert(Path(given.checkpoint), Path(given.out), Path(given.to), memory))
    except ImportError as error:
        _fail(str(error))


def _data(arguments: Sequence[str]) -> None:
    parser = _Parser(prog="torchrec-compress data", allow_abbrev=False)
    parser.add_argument("kind", choices=["criteo"], help="which data set")
    parser.add_argument("source", help="a TSV file, or a folder with day_0 to day_23 or train.txt; .gz too")
    parser.add_argument(
        "target", help="folder for *_dense.npy, *_sparse.npy and *_labels.npy; a killed conversion goes on"
    )
    parser.add_argument(
        "--frequency-threshold",
        "--frequency_threshold",
        type=int,
        metavar="N",
        help="make ids contiguous, those seen less often share one (MLPerf: 0); without it ids stay hashes",
    )
    given = parser.parse_args(list(arguments))
    from torchrec_compress.train.data.criteo_tsv import convert

    _check_folder("data criteo: OUT", given.target)
    for path in convert(Path(given.source), Path(given.target), given.frequency_threshold):
        print(path)


def _launch(arguments: Sequence[str]) -> None:
    # launch/ is installed as torchrec_compress.launch, which a type checker cannot know
    from torchrec_compress.launch.command import launch  # pyright: ignore[reportMissingImports]
    from torchrec_compress.launch.options import parse  # pyright: ignore[reportMissingImports]

    options, training = parse(arguments)
    if not launch(parse_run(training, "launch"), options, training):
        raise SystemExit(1)


def _info(arguments: Sequence[str]) -> None:
    if arguments:
        _fail("usage: torchrec-compress info")
    from torchrec_compress.ops import tiers
    from torchrec_compress.versions import installed_versions

    versions = {"python": ".".join(str(part) for part in sys.version_info[:3]), **installed_versions()}
    print(", ".join(f"{name} {found or 'missing'}" for name, found in versions.items()))
    for device, name in (("cpu", "CPU"), ("cuda", "GPU")):
        for tier in tiers(device):
            served = f"passed over: {tier.passed_over}" if tier.passed_over else "serves"
            print(f"codebook_bag, {name}: {tier.name} {served}\n  {tier.detail}")


def _report(arguments: Sequence[str]) -> None:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        _fail("usage: torchrec-compress report FOLDER")
    from torchrec_compress.train.compare.report import write_report

    print(write_report(Path(arguments[0])).read_text(), end="")


if __name__ == "__main__":
    main()
