"""Dense: the user's own table, for what is too small to compress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.methods.base import MethodConfig, TableData, TableState, register
from torchrec_compress.methods.learned import Learned
from torchrec_compress.methods.storage import Parts, native_type


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
        native_type(table)

    def fits_by_counts(self, table: BaseEmbeddingConfig) -> bool:
        """Return whether look-ups change the fit: no."""
        return False

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
        return rows

    def _finish(self) -> TableState:
        """Return nothing more."""
        return TableState()
