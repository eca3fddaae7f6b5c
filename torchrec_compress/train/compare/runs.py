"""Run variants over seeds, several at a time; what is finished is not run again."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from torchrec_compress.train.check import check_run, check_variants, compression_of
from torchrec_compress.train.compare.worker import Job, begin, run_job, stamp
from torchrec_compress.train.config import RunConfig, fingerprint, needs_pretrained
from torchrec_compress.train.data.inputs import identify
from torchrec_compress.train.data.open import open_data
from torchrec_compress.train.identity import check_unchanged
from torchrec_compress.train.machine import slow_settings
from torchrec_compress.train.sealed import is_done, read_text
from torchrec_compress.train.stages import pretrained_key


def compare(config: RunConfig) -> Path:
    """Run all variants over all seeds and write the report.

    Full models are trained first, once per distinct (data, model, pretrain, seed), and shared by the variants. One
    that fails is reported and does not stop the others.

    Args:
        config: with `compare` filled in.

    Returns:
        The folder of the report.

    Raises:
        ValueError: bad settings, found before anything is trained, or all variants failed.
    """
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    jobs = _jobs(config, output)
    # the report has the others too
    others = [job for job in _jobs(_with_all_variants(config), output) if Path(job[2]).is_dir()]
    finished = {job[2] for job in [*jobs, *others] if _finished(Path(job[2]), job[1])}
    left = [job for job in jobs if job[2] not in finished]
    _check_data(left)
    for line in slow_settings(job[1] for job in left):
        tqdm.write(f"torchrec-compress: {line}", file=sys.stderr)
    shared = output / "full"
    first: dict[str, Job] = {}
    for _, run, _, _ in jobs:
        key = pretrained_key(run)
        if needs_pretrained(run) and not is_done(shared / key / "summary.json"):
            first.setdefault(
                key, (f"full model {run.model.name} d={run.model.embedding_dim} seed {run.seed}", run, "", str(shared))
            )
    if len(left) < len(jobs):
        tqdm.write(f"{len(jobs) - len(left)} of {len(jobs)} runs are finished already")
    workers = min(config.compare.num_workers, max(len(left), 1))
    with tqdm(total=len(first) + len(left), desc="compare", unit="run", position=0) as bar:
        failed = _run_all(first, left, workers, bar)
    if len(failed) == len(left) + len(first) and failed:
        raise ValueError(f"compare: all runs failed; the first: {failed[0]}")
    from torchrec_compress.train.compare.report import write_report

    write_report(output, list(config.compare.variants), _reported(config, output))
    return output


def _reported(config: RunConfig, output: Path) -> list[Path]:
    """Return the folders of finished runs that this config stands for; what others there are is said."""
    runs, kept = check_variants(_with_all_variants(config)), []
    for folder in sorted(path.parent for path in output.glob("runs/*/seed*/summary.json")):
        name, seed = folder.parent.name, folder.name.removeprefix("seed")
        why = "its name is none of compare.variants"
        if name in runs and seed.isdigit():
            try:
                _finished(folder, dataclasses.replace(runs[name], seed=int(seed)))
            except ValueError as error:
                why = str(error)
            else:
                kept.append(folder)
                continue
        tqdm.write(f"{folder}: left out of the report: {why}", file=sys.stderr)
    return kept


def _with_all_variants(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, compare=dataclasses.replace(config.compare, only=[]))


def _jobs(config: RunConfig, output: Path) -> list[Job]:
    jobs = []
    for name, run in check_variants(config).items():
        for seed in config.compare.seeds:
            folder = output / "runs" / name / f"seed{seed}"
            jobs.append((f"{name} seed {seed}", dataclasses.replace(run, seed=seed), str(folder), str(output / "full")))
    return jobs


def _check_data(jobs: list[Job]) -> None:
    """Hold the runs that are left against their data, before hours are spent on the first of them.

    Raises:
        ValueError: data that cannot be read, or a run that would fail on it; the variant is named.
    """
    by_data: dict[str, list[Job]] = {}
    for job in jobs:
        by_data.setdefault(fingerprint(job[1].data), []).append(job)
    for same in by_data.values():
        data = open_data(same[0][1].data)
        for name, run, _, _ in same:
            try:
                check_run(run, compression_of(run.compression), data)
            except ValueError as error:
                raise ValueError(f"compare.variants.{name.rpartition(' seed ')[0]}: {error}") from error


def _finished(folder: Path, config: RunConfig) -> bool:
    """Return whether a run is done, with these very settings.

    Raises:
        ValueError: it was done or begun with others or with other data files, or a file of it is damaged.
    """
    told, summary = folder / "fingerprint", folder / "summary.json"
    is_stamped = is_done(told)
    if told.is_file() and (read_text(told) if is_stamped else told.read_text()) != stamp(config):
        raise ValueError(
            f"{folder}: was run with other settings (see its config.yaml); delete it, or choose another output folder"
        )
    if not is_stamped or not is_done(summary):
        return False
    read_text(summary)
    check_unchanged(config, folder, identify(config.data))
    return True


def _run_all(first: dict[str, Job], left: list[Job], workers: int, bar: tqdm) -> list[str]:
    """Train full models by key and run what is left, each as soon as its full model is there; return what failed.

    Processes live until the last job is done, as most of them read the same rows.
    """
    failed: list[str] = []
    waiting: dict[str, list[Job]] = {}
    for job in left:
        key = pretrained_key(job[1]) if needs_pretrained(job[1]) else ""
        waiting.setdefault(key if key in first else "", []).append(job)
    context = multiprocessing.get_context("spawn")
    slots = context.Queue()
    for slot in range(workers):
        slots.put(slot + 1)
    arguments = (context.RLock(), slots, os.getpid())
    with ProcessPoolExecutor(workers, mp_context=context, initializer=begin, initargs=arguments) as pool:
        running = {pool.submit(run_job, job): key for key, job in first.items()}
        running |= {pool.submit(run_job, job): "" for job in waiting.pop("", [])}
        while running:
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(done)
                try:
                    name, outcome, error = done.result()
                except BrokenProcessPool as broken:
                    pool.shutdown(cancel_futures=True)
                    raise ValueError(
                        "compare: a worker was killed (out of memory?); the same command continues"
                    ) from broken
                bar.update()
                if error:
                    failed.append(f"{name}: {error}")
                tqdm.write(f"{name}: {error or outcome}", file=sys.stderr)
                running |= {pool.submit(run_job, job): "" for job in waiting.pop(key, [])}
    return failed
