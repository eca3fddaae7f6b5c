"""What would go wrong with tables as they are stored, given what a stage trains."""

from __future__ import annotations

from collections.abc import Mapping

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_compress.convert import dequantized
from torchrec_compress.methods import MethodConfig
from torchrec_compress.methods.width import LANES
from torchrec_compress.modules.row_optimizer import RowOptimizer
from torchrec_compress.planner.accounting import FUSED_OPTIMIZERS
from torchrec_compress.train.config import RunConfig
from torchrec_compress.train.width_trial import WidthTrial

ADAGRADS = ("rowwise_adagrad", "adagrad")  # optimizers of tables that add up squares of gradients


def check_small_tables(config: RunConfig, tables: list[EmbeddingBagConfig], chosen: Mapping[str, MethodConfig]) -> None:
    """Raise ValueError where tables cannot train from the start as stage 1 says."""
    unfit = sorted(name for name, method in chosen.items() if method.needs != "nothing")
    if unfit:
        raise ValueError(
            f"pretrain_compression: must be methods that train from the start, got others for {unfit}, which are "
            "fitted to trained tables; name them in compression, and 'narrow' here"
        )
    others = sorted(name for name, method in chosen.items() if method.exported() != method)
    if others:
        raise ValueError(
            "pretrain_compression: must be methods that are served as they train, got "
            f"{sorted({chosen[name].method for name in others})} for {others}; name them in compression, with start = "
            "'scratch'"
        )
    check_trains(config, "pretrain", tables, chosen)
    check_row_optimizer(config, "pretrain", tables, chosen)


def check_trains(
    config: RunConfig, where: str, tables: list[EmbeddingBagConfig], chosen: Mapping[str, MethodConfig]
) -> None:
    """Raise ValueError where nothing of these tables would train in a stage, and the dense net does not either."""
    stage = getattr(config, where)
    if stage.train_dense:
        return
    parts = [(chosen[table.name], chosen[table.name].parts(table, config.seed)) for table in tables]
    has_tables = any(stored.dense or stored.native or stored.trained for _, stored in parts)
    has_decoders = any(
        (dequantized(chosen[table.name], table) if stage.dequantize else chosen[table.name]).trains_decoder(table)
        for table in tables
    )
    if (stage.train_tables and has_tables) or (stage.train_codebooks and has_decoders):
        return
    raise ValueError(
        f"{where}: must train something, got train_dense false and tables of which nothing that is switched on trains: "
        f"{sorted({method.method for method, _ in parts})}"
    )


def check_shared(config: RunConfig, tables: list[EmbeddingBagConfig], chosen: Mapping[str, MethodConfig]) -> None:
    """Raise ValueError where tables with one projection would be fitted: a fit is of one table."""
    shared = sorted(table.name for table in tables if chosen[table.name].shared_decoder(table) is not None)
    if shared and config.start != "scratch":
        raise ValueError(
            f"start: must be 'scratch' for tables that share a projection, which no fit of one may change, got "
            f"{config.start!r} and {shared}; share it in pretrain_compression, or nowhere"
        )


def check_row_optimizer(
    config: RunConfig, where: str, tables: list[EmbeddingBagConfig], chosen: Mapping[str, MethodConfig]
) -> None:
    """Raise ValueError where rows of a few bits cannot be trained as a stage says."""
    kind = getattr(config, where).optim.tables
    for table in tables:
        part = chosen[table.name].parts(table, config.seed).trained
        if part is None:
            continue
        if kind == "adam":
            raise ValueError(
                f"{where}.optim.tables: table {table.name!r}: rows of {part.bits} bits must train in the backward, "
                "got 'adam', which replicates tables and trains them after it; choose sgd, adagrad or rowwise_adagrad"
            )
        if getattr(config, where).optim.average_squares and part.optimizer not in (None, *ADAGRADS):
            raise ValueError(
                f"{where}.optim.average_squares: table {table.name!r}: must be false with rows that train by "
                f"{part.optimizer!r}, which adds up no squares; use one of {', '.join(ADAGRADS)}"
            )
        found = RowOptimizer.of(
            FUSED_OPTIMIZERS[kind].__name__, {}, part, f"{where}.optim.tables: table {table.name!r}"
        )
        if found.kind == "sgd" and part.state_bits != 32:
            raise ValueError(
                f"{where}.optim.tables: table {table.name!r}: state_bits must be left out with rows that train by "
                f"'sgd', which keeps no state, got {part.state_bits}; use one of {', '.join(ADAGRADS)}"
            )


def check_trial(config: RunConfig) -> None:
    """Raise ValueError where a trial of widths could not train its candidates as the run says."""
    if config.start != "scratch":
        raise ValueError(f"start: must be 'scratch' with a trial in compression, got {config.start!r}")
    if config.retrain.optim.tables not in ADAGRADS:
        raise ValueError(
            f"retrain.optim.tables: must be one of {sorted(ADAGRADS)} with a trial in compression, whose candidates "
            f"add up squares of gradients in the backward, got {config.retrain.optim.tables!r}"
        )
    if not config.retrain.train_tables:
        raise ValueError(
            "retrain.train_tables: must be true with a trial in compression, which compares widths by training them"
        )


def check_widths(trial: WidthTrial, tables: list[EmbeddingBagConfig]) -> None:
    """Raise ValueError for a width that no table can have; one that some cannot have is tried with the others."""
    widest = max(table.embedding_dim for table in tables)
    wrong = [width for width in trial.widths if width % LANES or width >= widest]
    if wrong:
        raise ValueError(f"compression.widths: must be multiples of {LANES} below the tables' {widest}, got {wrong}")
