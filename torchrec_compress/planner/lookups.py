"""How many ids a table is asked for per step, and what decoding them takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig

from torchrec_compress.modules.collection import CompressedParts

Constraints = Mapping[str, ParameterConstraints]


@dataclass(frozen=True)
class Lookups:
    """The look-ups of one table in one local batch; one entry per feature, as in `ParameterConstraints`.

    Args:
        pooling_factors: ids per bag.
        num_poolings: bags per example.
        batch_sizes: examples of a rank.
    """

    pooling_factors: list[float]
    num_poolings: list[float]
    batch_sizes: list[int]

    @classmethod
    def of(cls, name: str, constraints: Constraints | None, batch_size: int) -> Lookups:
        """Read a table's constraints; one id per bag of one feature where there are none, as TorchRec assumes.

        Raises:
            ValueError: the lists of the constraints differ in length.

        Example:
            >>> Lookups.of("user", {"user": ParameterConstraints(pooling_factors=[20.0])}, 512).num_ids
            10240
        """
        mine = (constraints or {}).get(name, ParameterConstraints())
        factors = list(mine.pooling_factors)
        poolings = list(mine.num_poolings or [1.0] * len(factors))
        batches = list(mine.batch_sizes or [batch_size] * len(factors))
        if not len(factors) == len(poolings) == len(batches):
            raise ValueError(
                f"constraints[{name!r}]: pooling_factors, num_poolings and batch_sizes must have one entry per feature "
                f"each, got {len(factors)}, {len(poolings)} and {len(batches)}"
            )
        return cls(factors, poolings, batches)

    @property
    def num_ids(self) -> int:
        """Ids of a local batch, over all features, rounded up."""
        return math.ceil(sum(x * y * z for x, y, z in self._entries()))

    @property
    def num_bags(self) -> int:
        """Bags of a local batch, over all features, rounded up."""
        return math.ceil(sum(y * z for _, y, z in self._entries()))

    def scaled(self, ids_per_id: int, bags_per_bag: int) -> Lookups:
        """Return look-ups with more ids in every bag, or more bags for every bag."""
        factors = [factor * ids_per_id for factor in self.pooling_factors]
        poolings = [poolings * bags_per_bag for poolings in self.num_poolings]
        return Lookups(factors, poolings, self.batch_sizes)

    def unpooled(self) -> Lookups:
        """Return the same ids, each a bag of its own."""
        poolings = [factor * poolings for factor, poolings, _ in self._entries()]
        return Lookups([1.0] * len(poolings), poolings, self.batch_sizes)

    def _entries(self) -> list[tuple[float, float, int]]:
        return list(zip(self.pooling_factors, self.num_poolings, self.batch_sizes, strict=True))


def decoded_bytes(table: BaseEmbeddingConfig, lookups: Lookups, makes_rows: bool, row_width: int | None = None) -> int:
    """Return the bytes of a step's embeddings of one table on the rank that asked: float32, of the user's width.

    Args:
        table: the user's config; bags are pooled, other tables are not.
        lookups: of a local batch.
        makes_rows: whether the decoder makes a row per id before it pools.
        row_width: numbers of these rows, which a projection follows; None: the user's width.

    Example:
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=9, embedding_dim=16, feature_names=["user"])
        >>> decoded_bytes(table, Lookups([3.0], [1.0], [10]), makes_rows=True)
        2560
    """
    if not isinstance(table, EmbeddingBagConfig):
        return 4 * lookups.num_ids * table.embedding_dim
    each = table.embedding_dim if row_width is None else row_width
    return 4 * (lookups.num_bags * table.embedding_dim + makes_rows * lookups.num_ids * each)


def decode_bytes(module: nn.Module, constraints: Constraints | None, batch_size: int) -> dict[str, int]:
    """Return the bytes of a step's embeddings that no stored tensor of a decoder stands for, by table name.

    Low-bit rows, MEmCom and bags with a decoder are decoded without codebooks, so the estimators have no option to
    charge it to. MEmCom makes a row per id before it pools; low-bit rows are pooled where they lie, on a GPU a piece at
    a time; bags are decoded when they are pooled. What a projection makes of pooled codewords is beside what codebooks
    are charged; rows per id before a projection are of the width.

    Args:
        module: the model.
        constraints: by table name, for pooling factors.
        batch_size: of a rank.
    """
    found: dict[str, int] = {}
    for part in module.modules():
        if isinstance(part, CompressedParts):
            tensors = [name.partition(".") for name in part.decoder.replicated_tensors()]
            charged = {table for table, _, tensor in tensors if tensor == "codebooks"}
            projected = {table for table, _, tensor in tensors if tensor == "projection"}
            for name in part.methods():
                if part.decoder.bank(name) is not None and (name not in charged or name in projected):
                    table = part.blueprint.by_table[name][0].table
                    lookups = Lookups.of(name, constraints, batch_size)
                    makes_rows = part.blueprint.methods[name].makes_rows and not part.blueprint.parts[name].are_bags
                    makes_rows &= name not in charged
                    width = part.blueprint.methods[name].projected_width(table)
                    found[name] = found.get(name, 0) + decoded_bytes(table, lookups, makes_rows, width)
    return found
