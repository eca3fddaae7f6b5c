"""What would go wrong after hours, found first: from the config alone, from the sizes of the tables, from the data."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_compress.compression import Compression, parse, resolve
from torchrec_compress.compression.budget import maybe_dense, smallest_bytes
from torchrec_compress.compression.candidates import Tried
from torchrec_compress.methods import as_codebook
from torchrec_compress.names import check_feature_names, check_folder_names, check_table_names
from torchrec_compress.schema import nearest
from torchrec_compress.train.byte_budget import Budget, budget_of
from torchrec_compress.train.check_sequence import check_sequence
from torchrec_compress.train.check_stored import (
    ADAGRADS,
    check_row_optimizer,
    check_shared,
    check_small_tables,
    check_trains,
    check_trial,
    check_widths,
)
from torchrec_compress.train.config import (
    ModelConfig,
    OptimConfig,
    RunConfig,
    StageConfig,
    needs_pretrained,
    of_pattern,
    override,
)
from torchrec_compress.train.data.batch import Share
from torchrec_compress.train.data.check import check_data
from torchrec_compress.train.data.source import ClickSource
from torchrec_compress.train.engine.profile import WARM_UP
from torchrec_compress.train.models.kinds import full_tables, make_model, tables_of
from torchrec_compress.train.sized import Sized, sized_of
from torchrec_compress.train.width_trial import WidthTrial, width_trial_of

# what a `compression` may ask for; None is nothing
Wanted: TypeAlias = Compression | Budget | Sized | WidthTrial | None


def check_config(config: RunConfig) -> Wanted:
    """Return what `compression` asks for, having checked all settings as far as that goes without the data.

    Args:
        config: of a run; its variants are left to `check_variants`.

    Raises:
        ValueError: settings that cannot work.
    """
    wanted = compression_of(config.compression)
    if isinstance(wanted, Budget):
        if config.start != "pretrained":
            raise ValueError(f"start: must be 'pretrained' with a budget in compression, got {config.start!r}")
        if not wanted.num_codes:
            raise ValueError("compression.num_codes: must hold a code length, got none")
        tried_by(wanted)
    if isinstance(wanted, WidthTrial):
        check_trial(config)
    _check_small(config, wanted)
    for name, stage in used_stages(config).items():
        _check_stage(name, stage, bool(config.pretrain_compression))
    check_sequence(config, wanted)
    check_data(config.data)
    if "dcn" not in config.model.name:
        for key in ("num_cross_layers", "cross_rank"):
            got = getattr(config.model, key)
            if got != getattr(ModelConfig(), key):
                raise ValueError(f"model.{key}: has no meaning with model.name = {config.model.name!r}, got {got!r}")
    known = [kind.value for kind in ShardingType]
    for pattern, kinds in config.parallel.sharding_types.items():
        for kind in kinds:
            if kind not in known:
                raise ValueError(
                    f"parallel.sharding_types.{pattern}: must be of {known}, got {kind!r}{nearest(kind, known)}"
                )
    return wanted


def pretrain_methods(config: RunConfig) -> Compression | None:
    """Return how tables are stored while stage 1 trains, or None where they are full.

    Raises:
        ValueError: `pretrain_compression` is no methods, or a budget.
    """
    if not config.pretrain_compression:
        return None
    try:
        found = compression_of(config.pretrain_compression)
    except ValueError as error:
        raise ValueError(str(error).replace("compression", "pretrain_compression", 1)) from error
    if isinstance(found, Budget | Sized | WidthTrial):
        what = "a trial" if isinstance(found, WidthTrial) else "a budget"
        raise ValueError(f"pretrain_compression: must name methods, got {what}; choose before, and name the outcome")
    return found


def _check_small(config: RunConfig, wanted: Wanted) -> None:
    """Raise ValueError where small tables in stage 1 do not go with the rest."""
    if pretrain_methods(config) is None:
        return
    if not needs_pretrained(config):
        raise ValueError(
            "pretrain_compression: must be empty with start = 'scratch', which has no stage 1; name its methods in "
            "compression, or set start = 'pretrained'"
        )


def check_variants(config: RunConfig) -> dict[str, RunConfig]:
    """Return the config of every variant that is asked for, each checked.

    Raises:
        ValueError: no variants, names that cannot be folders, an unknown name in `only`, or an unknown key or settings
            that cannot work in a variant.
    """
    chosen = config.compare
    if not chosen.variants or not chosen.seeds:
        raise ValueError("compare: must have variants and seeds, got none; see configs/demo.yaml")
    check_folder_names(list(chosen.variants), "compare.variants")
    for key in ("seeds", "only"):
        twice = [value for value, count in Counter(getattr(chosen, key)).items() if count > 1]
        if twice:
            raise ValueError(f"compare.{key}: must differ, got {twice[0]!r} twice")
    for name in chosen.only:
        if name not in chosen.variants:
            raise ValueError(f"compare.only: no variant {name!r}{nearest(name, list(chosen.variants))}")
    found, base = {}, replace(config, compare=type(chosen)())
    for name in chosen.only or chosen.variants:
        found[name] = override(base, chosen.variants[name] or {}, f"compare.variants.{name}")
        try:
            check_config(found[name])
        except ValueError as error:
            raise ValueError(f"compare.variants.{name}: {error}") from error
    return found


def check_tables(config: RunConfig, wanted: Wanted, rows: Mapping[str, int]) -> list[EmbeddingBagConfig]:
    """Return the full model's tables, having checked what names or stores them.

    Args:
        config: of a run.
        wanted: what its `compression` asks for.
        rows: rows by table name.

    Raises:
        ValueError: a name that a table cannot have or that no table has, a width or a method that cannot store a table,
            or a budget that is too small for all.
    """
    check_table_names(list(rows), "table")
    check_feature_names(rows, "table")
    tables = tables_of(config.model, rows)
    for key, given in (("data.tail_tables", config.data.tail_tables), ("context", config.context)):
        unknown = [name for name in given if name not in rows]
        if unknown:
            raise ValueError(f"{key}: must name tables of {list(rows)}, got {unknown}{nearest(unknown[0], list(rows))}")
    for name, other in config.context.items():
        if other not in rows or other == name:
            raise ValueError(f"context.{name}: must be another table of {list(rows)}, got {other!r}")
    for pattern in config.parallel.sharding_types:
        if pattern not in rows and not fnmatch.filter(rows, pattern):
            raise ValueError(f"parallel.sharding_types: {pattern!r} must fit a table of {sorted(rows)}, got none")
    try:
        small = pretrain_methods(config)
        if small is not None:
            check_small_tables(config, tables, resolve(tables, small))
    except ValueError as error:
        named = str(error).startswith("pretrain")
        raise error if named else ValueError(f"pretrain_compression: {error}") from error
    try:
        wanted = wanted.methods(tables) if isinstance(wanted, Sized) else wanted
        if isinstance(wanted, Budget):
            _check_budget(wanted, tables)
        elif isinstance(wanted, WidthTrial):
            check_widths(wanted, tables)
        elif wanted is not None:
            chosen = resolve(tables, wanted)
            check_shared(config, tables, chosen)
            if config.retrain.epochs > 0:
                check_trains(config, "retrain", tables, chosen)
                check_row_optimizer(config, "retrain", tables, chosen)
            for table in tables if config.pretrain_compression else ():
                chosen[table.name].check_blocks(table)
            unfit = sorted(name for name, method in chosen.items() if method.needs != "nothing")
            if unfit and config.start == "scratch" and config.parallel.init == "shards":
                raise ValueError(f"parallel.init: must be 'host' for tables that are fitted, got 'shards' and {unfit}")
            unfit = sorted(name for name, method in chosen.items() if method.needs == "rows")
            if unfit and config.start == "scratch":
                raise ValueError(
                    f"start: must be 'pretrained' for tables that are fitted to trained ones, got 'scratch' and {unfit}"
                )
    except ValueError as error:
        named = str(error).startswith(("compression", "parallel", "start", "retrain"))
        raise error if named else ValueError(f"compression: {error}") from error
    return tables


def check_run(config: RunConfig, wanted: Wanted, data: ClickSource, world: int = 1) -> None:
    """Raise ValueError where a run would fail on its data later than now.

    Args:
        config: of the run.
        wanted: what its `compression` asks for.
        data: opened; no row is read.
        world: number of ranks.
    """
    tables = check_tables(config, wanted, dict(zip(data.features, data.vocab, strict=True)))
    with torch.device("meta"):  # the nets' widths are checked where they are built
        make_model(config.model, full_tables(config.model, tables), data)
    for name, stage in used_stages(config).items():
        if stage.optim.tables != "adam":  # which replicates them
            budgeted = name == "retrain" and isinstance(wanted, Budget)
            _check_sharding(config, name, _stock(config, wanted, name, tables), budgeted)
        steps = len(data.batches("train", stage.batch_size, config.seed, Share(0, world)))
        total, profiled = round(stage.epochs * steps), config.parallel.profile_steps
        if isinstance(wanted, WidthTrial) and round((wanted.trial_epochs or 0) * steps) < 1:
            raise ValueError(
                f"compression.trial_epochs: must make a step, got {wanted.trial_epochs} of the {steps} of an epoch"
            )
        if total < 1:
            raise ValueError(f"{name}.epochs: must make a step, got {stage.epochs} of the {steps} steps of an epoch")
        if profiled and total < WARM_UP + profiled:
            raise ValueError(
                f"parallel.profile_steps: must be at most {max(0, total - WARM_UP)}, the steps of {name} after a "
                f"warm-up of {WARM_UP}, got {profiled}"
            )
        if config.model.batch_norm:
            _check_batch_norm(name, stage, data.num_rows("train"), world)


def _stock(config: RunConfig, wanted: Wanted, stage: str, tables: list[EmbeddingBagConfig]) -> list[str]:
    """Return the tables that TorchRec's own collection holds in a stage, or may hold where a budget chooses."""
    if stage == "pretrain":
        wanted = pretrain_methods(config)
    if wanted is None:
        return [table.name for table in tables]
    if isinstance(wanted, Budget):
        return maybe_dense(tables, wanted.num_bytes(_dense_bytes(tables)))
    if isinstance(wanted, WidthTrial):
        return [table.name for table in tables]  # which of them are small is not asked here
    chosen = resolve(tables, wanted.methods(tables) if isinstance(wanted, Sized) else wanted)
    return [table.name for table in tables if chosen[table.name].parts(table, config.seed).dense]


def _check_sharding(config: RunConfig, stage: str, tables: list[str], budgeted: bool) -> None:
    """Raise ValueError where TorchRec offers a table of its own collection none of the types that it may have."""
    is_cpu = config.parallel.device == "cpu" or (config.parallel.device == "auto" and not torch.cuda.is_available())
    device = "cpu" if is_cpu else "cuda"
    offered = EmbeddingBagCollectionSharder().sharding_types(device)
    reason = "which the budget may leave whole" if budgeted else "which is not compressed there"
    for name in tables:
        kinds = of_pattern(config.parallel.sharding_types, name)
        if kinds and not set(kinds) & set(offered):
            offered.remove("data_parallel")  # tables that train in the backward are never that
            raise ValueError(
                f"parallel.sharding_types: table {name!r} of {stage}, {reason}, must have one of "
                f"{offered}, which TorchRec offers on the device {device!r}, got {kinds}; add one, or replicate the "
                f"tables by {stage}.optim.tables = 'adam'"
            )


def _check_batch_norm(name: str, stage: StageConfig, num_rows: int, world: int) -> None:
    """Raise ValueError where a rank gets a batch of one row, which has no variance to normalise by."""
    for size in {min(stage.batch_size, num_rows), num_rows % stage.batch_size or stage.batch_size}:
        if Share(0, world).padded(size) == 1:
            raise ValueError(
                f"{name}.batch_size: must leave each of {world} ranks two rows of every batch with model.batch_norm, "
                f"got {stage.batch_size} for {num_rows} train rows, of which a batch has {size}; choose another size, "
                "or leave model.batch_norm out"
            )


def compression_of(plain: Mapping[str, Any]) -> Wanted:
    """Return what the `compression` of a config asks for: methods, a budget, with a method or not, a trial, or None.

    Raises:
        ValueError: it is none of them.

    Example:
        >>> compression_of({"budget_ratio": 50}).budget_ratio, compression_of({})
        (50.0, None)
    """
    if (budget := budget_of(plain)) is not None:
        return sized_of(budget) or budget
    return (width_trial_of(plain) or parse(plain)) if plain else None


def tried_by(budget: Budget) -> Tried:
    """Return the codes that a budget tries.

    Raises:
        ValueError: the method is not one of codes, or needs contexts, which no trial fit has.
    """
    if not budget.codes:
        return Tried(num_codes=budget.num_codes, widths=budget.widths)
    try:
        found = as_codebook(parse(budget.codes))
    except ValueError as error:
        raise ValueError(str(error).replace("compression", "compression.codes", 1)) from error
    if found is None:
        raise ValueError(f"compression.codes: must be one method of codes, got {budget.codes}")
    if found.needs == "contexts":
        raise ValueError(
            f"compression.codes: must be a method that is fitted to rows alone, got {found.method!r}, which needs "
            "contexts; name it by table, in place of a budget"
        )
    return Tried(found, budget.num_codes, budget.widths)


def used_stages(config: RunConfig) -> dict[str, StageConfig]:
    """Return the stages that a run trains, by name.

    Raises:
        ValueError: a stage that must train has no epochs, or one imitates a model that is not there.
    """
    stages = {}
    if needs_pretrained(config):
        if config.pretrain.epochs <= 0:
            raise ValueError(
                "pretrain.epochs: must be over 0 where the full model is trained first (start = 'pretrained', or no "
                "compression), got 0; start = 'scratch' trains compressed tables alone"
            )
        if config.pretrain.distill_weight:
            raise ValueError("pretrain.distill_weight: must be 0, there is no full model to imitate before it")
        stages["pretrain"] = config.pretrain
    if not config.compression:
        return stages
    if config.start == "scratch":
        if config.retrain.epochs <= 0:
            raise ValueError("retrain.epochs: must be over 0 with start = 'scratch', got 0; nothing would be trained")
        if config.retrain.distill_weight:
            raise ValueError(
                "retrain.distill_weight: must be 0 with start = 'scratch', there is no full model to imitate"
            )
    return {**stages, "retrain": config.retrain} if config.retrain.epochs > 0 else stages


def check_optim(config: OptimConfig, where: str) -> None:
    """Raise ValueError for an l2 that the optimizer of tables would ignore."""
    if config.table_l2 and config.tables != "adam":
        raise ValueError(
            f"{where}.table_l2: must be 0 with {where}.tables = {config.tables!r} (FBGEMM's CPU kernels ignore it), "
            f"got {config.table_l2}; use 'adam', adaptive_l2 or lookup_l2"
        )
    if config.average_squares and config.tables not in ADAGRADS:
        raise ValueError(
            f"{where}.average_squares: must be false with {where}.tables = {config.tables!r}, which adds up no "
            f"squares; use one of {', '.join(ADAGRADS)}"
        )


def _check_stage(name: str, stage: StageConfig, is_small: bool) -> None:
    check_optim(stage.optim, f"{name}.optim")
    passed = stage.optim.decay_patience
    if stage.optim.decay == "plateau" and 0 < stage.patience < passed + 2:
        raise ValueError(
            f"{name}.patience: must be at least {passed + 2} with {name}.optim.decay = 'plateau' and decay_patience = "
            f"{passed}, or 0, got {stage.patience}, which ends the training before rates ever fall"
        )
    if not (stage.train_dense or stage.train_tables or stage.train_codebooks):
        raise ValueError(f"{name}: must train something, got train_dense, train_tables and train_codebooks all false")
    if name == "pretrain" and not is_small and not (stage.train_dense or stage.train_tables):
        raise ValueError(
            "pretrain: must train something, got train_dense and train_tables false; the full model has no codebooks"
        )


def _check_budget(budget: Budget, tables: list[EmbeddingBagConfig]) -> None:
    wanted = budget.num_bytes(_dense_bytes(tables))
    least = smallest_bytes(tables)
    if wanted < least:
        raise ValueError(f"compression: the budget must be at least {least:,} bytes for these tables, got {wanted:,}")


def _dense_bytes(tables: list[EmbeddingBagConfig]) -> int:
    return sum(4 * table.num_embeddings * table.embedding_dim for table in tables)
