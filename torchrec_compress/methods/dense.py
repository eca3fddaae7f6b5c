"""Dense: the user's own table, for what is too small to compress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType

from torchrec_compress.methods.base import MethodConfig, TableData, TableState, register
from torchrec_compress.methods.learned import Learned
from torchrec_compress.methods.storage import Parts


@register
@dataclass(frozen=True, kw_only=True)
class DenseConfig(MethodConfig):
    """Store the table as it is.

    Bytes: 4 N D.

    Example:
        >>> DenseConfig().to_dict()
        {'method': 'dense'}
    """

    method: ClassVar[str] = "dense"
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "nothing"
    new_ids: ClassVar[str] = "its untrained row"
    is_compressed: ClassVar[bool] = False

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError for a data type that TorchRec would change without a word."""
        if table.data_type not in (DataType.FP32, DataType.FP16):
            raise ValueError(
                f"table {table.name!r}: data_type must be FP32 or FP16, got {table.data_type.value}; "
                "TorchRec would silently store it as FP16"
            )

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the untouched table."""
        return Parts(dense=True)

    def learn(self, table: BaseEmbeddingConfig, data: TableData) -> DenseTable:
        """Learn nothing: rows stay what they are."""
        self.check_fit(table, data)
        return DenseTable(table)


class DenseTable(Learned):
    """Keep the pre-trained rows."""

    kept_as = ("native", "")

    def _encode(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        assert rows is not None
        largest = torch.finfo(torch.float16).max
        wrong = (rows.abs() > largest).any(dim=1) if self._table.data_type == DataType.FP16 else torch.zeros(0)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"table {self._table.name!r}: pre-trained values must be in +-{largest:.0f} for data_type FP16, got "
                f"{float(rows[first].abs().max()):g} in the row of id {int(ids[first])}; use FP32, or scale the table"
            )
        return rows

    def _finish(self) -> TableState:
        """Return nothing more."""
        return TableState()
