"""Other ways to store a table: the next smaller one, and all that a budget may choose from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.methods import CodebookConfig, Int4Config, Int8Config, MethodConfig, PQConfig

# a step that saves less than a twentieth is none
_WORTH = 0.95
# Hot heads that are tried, as shares of a table's rows, and the longest residual code: longer ones take minutes to fit.
_HOT_SHARES = (0.01, 0.03, 0.07, 0.15, 0.25)
_MAX_RESIDUAL_CODES = 4


def step(table: BaseEmbeddingConfig, method: MethodConfig, level: int) -> MethodConfig | None:
    """Return the method of a level for a table, or None where it cannot store it or would hardly save bytes.

    Codes stay with their own method and lose codes, hashed tables lose buckets; all others become int8, int4, then
    product codes.

    Args:
        table: the user's config.
        method: that it has now.
        level: from 0, the gentlest, to NUM_LEVELS - 1.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> from torchrec_compress.methods import DenseConfig
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=10**6, embedding_dim=64, feature_names=["user"])
        >>> [step(table, DenseConfig(), level).method for level in (0, 1, 3)], step(table, PQConfig(num_codes=2), 4)
        (['int8', 'int4', 'pq'], None)
    """
    found = method.smaller(level)
    if found is None:
        return None
    try:
        found.check(table)
    except ValueError:
        return None  # this table cannot be stored this way
    return found if found.stored_bytes(table) < _WORTH * method.stored_bytes(table) else None


def candidates_of(table: BaseEmbeddingConfig, base: CodebookConfig, num_codes: Sequence[int]) -> Iterator[MethodConfig]:
    """Yield everything that a budget may try for a table; arguments as for `for_budget`, unchecked."""
    yield Int8Config()
    yield Int4Config()
    hot = sorted({0, *(round(table.num_embeddings * share) for share in _HOT_SHARES)})
    residual = PQConfig(num_codes=1, codebook_size=base.codebook_size, structure="residual", popularity="count")
    for length in num_codes:
        for num_hot in hot:
            yield dataclasses.replace(base, num_codes=length, num_hot_rows=num_hot, hot_dtype="int4")
            if 1 < length <= _MAX_RESIDUAL_CODES:
                yield dataclasses.replace(residual, num_codes=length, num_hot_rows=num_hot, hot_dtype="int4")


def with_finer_heads(config: MethodConfig) -> list[MethodConfig]:
    """Return a config and, where it has a hot head in int4, the same with one in int8."""
    finer = config.with_finer_head()
    return [config] if finer is None else [config, finer]
