"""Code tables: where codes and low-bit rows are stored, and looked at before every batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_compress.modules.code_bank import CodeBank, CodeTableConfig
from torchrec_compress.modules.features import IdRange, split_features
from torchrec_compress.modules.replicated import SHARDERS, warn_of_missing_sharders
from torchrec_compress.ops import check_ids, check_intact, lookup_codes

logger = logging.getLogger(__name__)

# fx.wrap patches the globals of the module that defines a function; imported ones must be wrapped where they are used
torch.fx.wrap("intact_table")
torch.fx.wrap("own_codes")


class CodeTable(NamedTuple):
    """A whole code table, where nobody has gathered the codes of a batch: its decoder does, while it decodes."""

    codes: Tensor
    is_set: Tensor


def intact_table(
    _: KeyedJaggedTensor, codes: Tensor, is_set: Tensor, low_bit_rows: list[Tensor], table: str, is_sampled: bool
) -> CodeTable:
    """Return a whole code table; arguments and errors as in `ops.check_intact`.

    It is given the batch because fx records only calls that depend on the input, and traced modules shall check too.
    """
    check_intact([codes, *low_bit_rows], is_set, table, is_sampled)
    return CodeTable(codes, is_set)


def own_codes(features: KeyedJaggedTensor, table: CodeTable, bank: CodeBank, feature: str) -> Tensor:
    """Return the codes of a feature's ids, (L, row_size), where not each id has a row of its own.

    Raises:
        ValueError: an id is out of range.
        RuntimeError: the code table was never filled.
    """
    where = f"table {bank.config.name!r}, feature {feature!r}"
    ids = check_ids(split_features(features)[feature].values(), bank.config.num_ids, where)
    return lookup_codes(table.codes, table.is_set, bank.row_numbers(ids), where)


class HeldCodes(NamedTuple):
    """The codes of a table that this rank holds, live.

    Args:
        first_id: ids from it on lie here.
        codes: (rows here, row_size) integer.
        group: the ranks that share the table, or None where this is the only one.
        is_whole: whether each of them holds all codes.
    """

    first_id: int
    codes: Tensor
    group: dist.ProcessGroup | None
    is_whole: bool


class CodeTableCollection(nn.Module):
    """Hold code tables: integers, never trained by gradient. Its sharded form gathers the codes of a batch.

    Args:
        tables: one config per code table.
        device: of the buffers.

    Attributes:
        also_checked: ids of dense tables beside it, which its sharded form checks before any rank waits for another.
    """

    also_checked: Sequence[IdRange] = ()

    def __init__(self, tables: Sequence[CodeTableConfig], device: torch.device | None = None) -> None:
        super().__init__()
        self._configs = tuple(tables)
        # not "tables": TorchRec 1.9's planner calls an attribute of that name
        # Any: a ModuleDict forgets the type of its values
        self.banks: Any = nn.ModuleDict({table.name: CodeBank(table, device) for table in tables})
        self._is_checked = False
        self._said: set[str] = set()
        self._turn = 0
        self.register_forward_pre_hook(_check_once)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodeTableCollection:
        self._is_checked = False
        return super()._apply(fn, recurse)  # type: ignore[return-value]

    def configs(self) -> tuple[CodeTableConfig, ...]:
        """Return the configs of the code tables."""
        return self._configs

    def reset_parameters(self) -> None:
        """Fill every table with its start codes; call it after materialising from the meta device."""
        for bank in self.banks.values():
            bank.reset_parameters()
        self._said.clear()

    def warn_of_start_codes(self, table: str | None = None) -> None:
        """Log, once for a table, that it serves start codes which a fit should have replaced.

        Args:
            table: whose rows are served; None is all of them.
        """
        names = [name for name in self.banks if table in (None, name)]
        found = [name for name in names if name not in self._said and self.banks[name].is_start]
        self._said.update(found)
        warn_of_start_codes([config for config in self._configs if config.name in found], self.banks)

    def held(self, table: str) -> HeldCodes:
        """Return the codes of a table that are to change.

        Raises:
            ValueError: several ranks would change copies of them.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"table {table!r}: several ranks must share a table whose codes change, got a copy on each, which "
                f"would drift apart; {SHARDERS}"
            )
        return HeldCodes(0, self.banks[table].codes, None, True)

    def check_held(self, table: str) -> None:
        """Raise ValueError where something else than a fit, a checkpoint or a manager has changed the integers."""
        self.banks[table].check()

    def take_changed(self, table: str) -> None:
        """Take the integers of a table as they are: their manager has changed them."""
        self.banks[table].take_changed()

    def forward(self, features: KeyedJaggedTensor) -> dict[str, CodeTable | Tensor]:
        """Return the code table of every feature by output name.

        Once sharded, and where ids share a row, (L, row_size) codes of its ids.

        Raises:
            ValueError: something other than a fit or a checkpoint has changed codes or low-bit rows; an id that may
                share a row is out of range.
        """
        if not torch.compiler.is_compiling():  # one table in turn, as looking at values takes longer than the rest
            self._turn = (self._turn + 1) % len(self._configs)
        found: dict[str, CodeTable | Tensor] = {}
        for number, (config, bank) in enumerate(zip(self._configs, self.banks.values(), strict=True)):
            rows, is_sampled = bank.low_bit_rows(), number == self._turn
            table = intact_table(features, bank.codes, bank.is_set, rows, config.name, is_sampled)
            for name, feature in zip(config.output_names, config.feature_names, strict=True):
                found[name] = table if config.part.num_coded is None else own_codes(features, table, bank, feature)
        return found


def _check_once(module: CodeTableCollection, _: Any) -> None:
    """Before the first batch: fill tables that DistributedModelParallel took off the meta device, warn of whole copies.

    It turns meta buffers into zeros and calls `reset_parameters` on modules with parameters only, as codebooks are.
    """
    # in this order, so that no compiled graph asks whether it was checked
    if torch.compiler.is_compiling() or module._is_checked:
        return
    module._is_checked = True
    for bank in module.banks.values():
        is_set = bank._buffers["is_set"]
        if not is_set.is_meta and not bank.awaits_reset and not bool(is_set):
            bank.reset_parameters()
    module.warn_of_start_codes()
    warn_of_missing_sharders([config.name for config in module.configs()], "code tables are whole on every rank")


def warn_of_start_codes(configs: Sequence[CodeTableConfig], banks: Any) -> None:
    """Log, once for all ranks, which tables serve start codes that a fit should have replaced.

    Args:
        configs: of the code tables.
        banks: `CodeRows` by table name.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    by_start: dict[str, list[str]] = {}
    for config in configs:
        if config.part.unfitted and banks[config.name].is_start:
            by_start.setdefault(config.part.unfitted, []).append(config.name)
    for what, tables in by_start.items():
        logger.warning("tables %s were never fitted: they serve %s; fit them by compress()", tables, what)
