"""What a plan costs, as records: bytes per tensor, per table and per rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["codes", "native", "managed", "decoder"]
KINDS: tuple[Kind, ...] = ("codes", "native", "managed", "decoder")


@dataclass(frozen=True)
class PartPlan:
    """One stored tensor of a table, as it is planned. Bytes other than `stored_bytes` are sums over all ranks.

    Args:
        kind: code table, native table (dense ones too), table with a manager, or replicated tensor of the decoder.
        path: of its module in the model, and its name there.
        sharding_type, compute_kernel: the planner's choice.
        ranks: that hold a shard.
        stored_bytes: of one copy, what a manager keeps included.
        weight_bytes: of all copies, the same.
        optimizer_bytes: state of the optimizer that trains it.
        gradient_bytes: which are DDP's buckets too.
        activation_bytes: ids, codes and embeddings of a step, and caches before the host's memory.
        training_bytes: of `stored_bytes`, those that serving a trained table does not take.
    """

    kind: Kind
    path: str
    sharding_type: str
    compute_kernel: str
    ranks: tuple[int, ...]
    stored_bytes: int
    weight_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    activation_bytes: int
    training_bytes: int = 0


@dataclass(frozen=True)
class TablePlan:
    """One of the user's tables.

    Args:
        method: how it is stored.
        num_embeddings, embedding_dim: its size.
        dense_bytes: what the user's own table would take.
        parts: its stored tensors.
        decoded_bytes: of embeddings that no stored tensor stands for, over all ranks.
    """

    method: str
    num_embeddings: int
    embedding_dim: int
    dense_bytes: int
    parts: tuple[PartPlan, ...]
    decoded_bytes: int = 0

    def stored(self, kind: Kind) -> int:
        """Return the stored bytes of one kind, of one copy."""
        return sum(part.stored_bytes for part in self.parts if part.kind == kind)

    @property
    def stored_bytes(self) -> int:
        """All stored bytes, of one copy: as `footprint()` counts them."""
        return sum(part.stored_bytes for part in self.parts)

    @property
    def served_bytes(self) -> int:
        """Stored bytes that serving the trained table takes, of one copy."""
        return self.stored_bytes - sum(part.training_bytes for part in self.parts)

    @property
    def held_bytes(self) -> int:
        """All that lasts while the table is trained, over all ranks: stored bytes, optimizer state and gradients."""
        return sum(part.weight_bytes for part in self.parts) + self.optimizer_bytes + self.gradient_bytes

    @property
    def ratio(self) -> float:
        """Dense bytes over stored bytes; bigger is better."""
        return self.dense_bytes / self.stored_bytes

    @property
    def optimizer_bytes(self) -> int:
        """Optimizer state, over all ranks."""
        return sum(part.optimizer_bytes for part in self.parts)

    @property
    def gradient_bytes(self) -> int:
        """Gradients, over all ranks."""
        return sum(part.gradient_bytes for part in self.parts)

    @property
    def activation_bytes(self) -> int:
        """Activations of a step, over all ranks."""
        return self.decoded_bytes + sum(part.activation_bytes for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        kinds = {f"{kind}_bytes": self.stored(kind) for kind in KINDS}
        names = ("stored_bytes", "served_bytes", "held_bytes", "ratio", "optimizer_bytes")
        names += ("gradient_bytes", "activation_bytes")
        parts = [{**asdict(part), "ranks": list(part.ranks)} for part in self.parts]
        return {**asdict(self), "parts": parts, **kinds, **{name: getattr(self, name) for name in names}}


def ratio_of(tables: Iterable[TablePlan]) -> float:
    """Return dense bytes over stored bytes of all tables; bigger is better."""
    tables = list(tables)
    return sum(table.dense_bytes for table in tables) / sum(table.stored_bytes for table in tables)


@dataclass
class RankPlan:
    """The bytes of one rank.

    Args:
        code_bytes, native_bytes, managed_bytes, decoder_bytes: weights that it holds, by kind; what managers keep too.
        optimizer_bytes, gradient_bytes, activation_bytes: as for `PartPlan`.
        device_bytes: what the planner charges to the memory of the device, reservations apart.
        host_bytes: what it charges to the host's memory, for a device that has its own.
        capacity_bytes: of the device's memory, less reservations.
    """

    code_bytes: int = 0
    native_bytes: int = 0
    managed_bytes: int = 0
    decoder_bytes: int = 0
    optimizer_bytes: int = 0
    gradient_bytes: int = 0
    activation_bytes: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    capacity_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        """All weights on the rank."""
        return self.code_bytes + self.native_bytes + self.managed_bytes + self.decoder_bytes
