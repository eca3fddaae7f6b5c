"""Which method serves which table, where the data decide: a budget of bytes, or short trainings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from torchrec_compress.compression import Compression, parse, resolve
from torchrec_compress.convert import Curvature
from torchrec_compress.train.budgeting import choose
from torchrec_compress.train.byte_budget import Budget
from torchrec_compress.train.check import Wanted
from torchrec_compress.train.config import RunConfig
from torchrec_compress.train.data.source import ClickSource
from torchrec_compress.train.engine.loop import Task
from torchrec_compress.train.evaluate.scoring import total_counts
from torchrec_compress.train.full import untrained
from torchrec_compress.train.models.kinds import make_tables
from torchrec_compress.train.ranks import Ranks, on_first
from torchrec_compress.train.rises import Known
from torchrec_compress.train.sealed import is_done, read_json, write_json
from torchrec_compress.train.sized import Sized
from torchrec_compress.train.trials import Trials
from torchrec_compress.train.width_trial import WidthTrial


def settle(
    config: RunConfig,
    wanted: Wanted,
    task: Task,
    source: Path | None,
    folder: Path,
    curvature: Mapping[str, Curvature],
    ranks: Ranks,
) -> tuple[Compression, dict[str, Tensor]]:
    """Return the method of every table, and the look-ups per id in train where a fit needs them.

    What the data decide is kept in `compression.json`, as deciding takes long. Every rank calls it.

    Args:
        config: the run.
        wanted: what its `compression` asks for.
        task: of the stage that trains the compressed model.
        source: folder of the trained full model, or None without one.
        folder: of the run.
        curvature: of the loss of the full model by table, or empty: a budget then counts squared errors.
        ranks: that train.
    """
    data, kept = task.data, folder / "compression.json"
    tables = make_tables(config.model, data)
    if isinstance(wanted, Sized):
        wanted = wanted.methods(tables)
    if isinstance(wanted, Budget):
        assert source is not None  # a config with a budget and without a full model is refused
        counts = total_counts(data, ranks)
        found = on_first(lambda: choose(wanted, Known(config, data, source, counts, curvature), kept), ranks)
        return parse(found), counts
    if isinstance(wanted, WidthTrial):
        if not on_first(lambda: is_done(kept), ranks):
            in_shards = config.parallel.init == "shards"
            trials = Trials(wanted, task, lambda methods: untrained(config, dict(methods), data, in_shards), ranks)
            plain = {name: method.to_dict() for name, method in trials.choose(tables).items()}
            on_first(lambda: write_json(kept, plain), ranks)
        return parse(on_first(lambda: read_json(kept), ranks)), {}
    assert wanted is not None  # nothing is compressed then
    return wanted, _counts(config, wanted, data, source, ranks)


def _counts(
    config: RunConfig, chosen: Compression, data: ClickSource, source: Path | None, ranks: Ranks
) -> dict[str, Tensor]:
    """Return look-ups per id in train, or nothing where no table is fitted or coded: streamed, they cost a pass."""
    if source is None:
        methods = resolve(make_tables(config.model, data), chosen).values()
        if not any(method.uses_counts for method in methods):
            return {}
    return total_counts(data, ranks)
