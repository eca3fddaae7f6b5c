"""What every rank needs beside its shards: the embeddings that it decodes itself."""

from __future__ import annotations

import copy
import warnings

from torch import nn
from torchrec.distributed.planner.storage_reservations import HeuristicalStorageReservation
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    PlannerError,
    PlannerErrorType,
    StorageReservation,
    Topology,
)
from torchrec.distributed.types import ModuleSharder

from torchrec_compress.modules.collection import CompressedParts
from torchrec_compress.planner.lookups import decode_bytes
from torchrec_compress.seams import reserved_share


def _as_stock() -> StorageReservation:
    """Return the stock planner's default, without its advice to give another one: the user gave none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return HeuristicalStorageReservation(percentage=0.15)


class DecodeReservation(StorageReservation):
    """Hold back, on every rank, the memory of embeddings that are decoded there, beside what another policy holds back.

    Args:
        inner: the other policy, default the stock planner's (`HeuristicalStorageReservation(0.15)`).

    Attributes:
        inner: the other policy.
        decoded: bytes by table name, after `reserve`.

    Example:
        >>> from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
        >>> reservation = DecodeReservation(FixedPercentageStorageReservation(0.1))
    """

    def __init__(self, inner: StorageReservation | None = None) -> None:
        self.inner = _as_stock() if inner is None else inner
        self._percentage = reserved_share(self.inner)
        self._last_reserved_topology: Topology | None = None  # TorchRec 1.6 hashes it by this name
        self.decoded: dict[str, int] = {}

    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]],
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> Topology:
        """Return a copy of the topology with what is left for the planner.

        Raises:
            PlannerError: nothing is left.
        """
        # decoder tensors have no ids of their own, but TorchRec holds 20 id lists back for every name
        tensors = {
            name
            for part in module.modules()
            if isinstance(part, CompressedParts)
            for name in part.decoder.replicated_tensors()
        }
        known = {**(constraints or {}), **{name: ParameterConstraints(pooling_factors=[0.0]) for name in tensors}}
        reserved = copy.deepcopy(self.inner.reserve(topology, batch_size, module, sharders, known))
        self.decoded = decode_bytes(module, constraints, batch_size)
        needed = sum(self.decoded.values())
        for device in reserved.devices:
            storage = device.storage
            if topology.compute_device == "cpu":
                storage.ddr -= needed
            else:
                storage.hbm -= needed
            if min(storage.hbm, storage.ddr) < 0:
                raise PlannerError(
                    f"storage reservation: rank {device.rank} must have memory left for tables, got none after "
                    f"{needed:,} bytes for decoded embeddings; use a smaller batch, or fewer low-bit or MEmCom tables",
                    PlannerErrorType.INSUFFICIENT_STORAGE,
                )
        self._last_reserved_topology = reserved
        return reserved

    @property
    def last_reserved_topology(self) -> Topology | None:
        """What `reserve` returned last."""
        return copy.deepcopy(self._last_reserved_topology)
