"""The small replicated part of a compressed table: what turns stored parts into embeddings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

from torch import Tensor, nn

from torchrec_compress.ops import BagLookup, Rows


class Bank(nn.Module, ABC):
    """What decoders of all kinds are: a module that every rank holds, trained by the dense optimizer.

    Attributes:
        has_low_bit_rows: whether bytes of the table are rows of `ops.quantize_rows`.
    """

    has_low_bit_rows = False

    def reset_parameters(self) -> None:
        """Initialise what is trained; called at construction and after a move from the meta device."""

    def make_ready(self, where: str) -> None:
        """See that what look-ups read of it means something; called before the first of them.

        Args:
            where: names the table in what is said.
        """


class TableDecoder(Bank):
    """Turns codes and native rows into pooled embeddings.

    Attributes:
        row_dtype: "int8" or "int4" where the code table's rows are such rows, which are pooled where they lie.
    """

    row_dtype: Literal["int8", "int4"] | None = None

    def bag_lookup(self, number: int, feature: str, where: str, is_mean: bool) -> BagLookup | None:
        """Return a look-up of `ops.codebook_bags`, which serves all tables that have one in one call, or None.

        A decoder that has one has `codewords()`, and `hot_rows` and `projection`, a tensor or None: what is pooled is
        multiplied by the projection, (r, D), if there is one.

        Args:
            number: of the table's codebooks in that call.
            feature: name of the feature.
            where: names table and feature in errors.
            is_mean: whether sums are divided by the ids of a bag.
        """
        return None

    @abstractmethod
    def forward(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, codes: Tensor | None, rows: list[Rows]
    ) -> Tensor:
        """Return the sums over bags.

        Args:
            ids: (L,) integer.
            offsets: (B + 1,) integer, or None for one bag per id.
            weights: (L,) factors, or None.
            codes: (L, row_size) integer, or None where the method has no code table.
            rows: per native row part (L, dim), or where to find them.

        Returns:
            (B, D) floating point.
        """


class SharedDecoder(NamedTuple):
    """A decoder that several tables of a collection have together.

    Args:
        name: of it, in a state dict in place of the table's.
        terms: what these tables must agree in, by name.
    """

    name: str
    terms: dict[str, object]


class BagDecoder(Bank):
    """Turns bags that were pooled natively, `Parts.bags`, into embeddings: a projection, or a sum of several bags.

    It is applied after pooling, once per bag and not per id, so it must be linear and without a constant. Then sums,
    means and weights per id commute with it, and an empty bag is zeros; a maximum over a bag would not. In an unpooled
    collection it is applied to rows.
    """

    @abstractmethod
    def forward(self, bags: list[Tensor]) -> Tensor:
        """Return the embeddings.

        Args:
            bags: per part of `Parts.bags` (B, its width), of the dtype of this module's parameters, float32 without
                any.

        Returns:
            (B, D) floating point.
        """
