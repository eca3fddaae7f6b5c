"""By what look-ups a fit may weigh rows, checked before anything is trained."""

from __future__ import annotations

from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.methods.base import TableData


def check_popularity(table: BaseEmbeddingConfig, popularity: str) -> None:
    """Raise ValueError unless popularity is one that `tail_weights` knows, before anything is trained."""
    if popularity not in ("count", "log2", "none"):
        raise ValueError(f"table {table.name!r}: popularity must be 'count', 'log2' or 'none', got {popularity!r}")


def check_popularity_counts(table: BaseEmbeddingConfig, data: TableData, popularity: str) -> None:
    """Raise ValueError where rows are to be weighed by counts and there are none."""
    if popularity != "none" and data.counts is None:
        raise ValueError(
            f"table {table.name!r}: popularity={popularity!r} must come with counts, got none; pass "
            "counts={table: look-ups per id} to compress(), or popularity='none'"
        )
