"""Other ways to store a table: the next smaller one, and all that a budget may choose from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.methods import CodebookConfig, HashConfig, MethodConfig, PQConfig

# a step that saves less than a twentieth is none
_WORTH = 0.95
# Hot heads that are tried, as shares of a table's rows, and the longest residual code: longer ones take minutes to fit.
_HOT_SHARES = (0.003, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.25)
_MAX_RESIDUAL_CODES = 8
# Shares of a table's rows that have codes of their own, where not all of them do.
_CODED_SHARES = (0.03, 0.06, 0.12, 0.25, 0.4, 0.55, 0.7, 0.85)


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
    if found is None or not can_store(found, table):
        return None
    return found if found.stored_bytes(table) < _WORTH * method.stored_bytes(table) else None


USUAL = PQConfig(num_codes=1, popularity="count")
LENGTHS = (1, 2, 3, 4, 6, 8, 16)
ONE_ROW = HashConfig(num_buckets=1)  # the mean of all, for tables whose rows hardly count


@dataclass(frozen=True)
class Tried:
    """The codes that a budget tries for a table, beside dense, int8 and int4 rows and one row for all ids.

    They are a method's own, and residual ones.

    Attributes:
        codes: the method; its num_codes, tiers and width are replaced.
        num_codes: code lengths; of residual codes 2 to 8, of product codes those that divide the width.
        widths: numbers of a codeword beside those of the table's rows, where these have more.
    """

    codes: CodebookConfig = USUAL
    num_codes: Sequence[int] = LENGTHS
    widths: Sequence[int] = ()


def families_of(table: BaseEmbeddingConfig, tried: Tried, rank: int) -> list[tuple[CodebookConfig, list[int]]]:
    """Return the methods of codes that a budget may try for a table, without hot rows, and their lengths, ascending.

    Args:
        table: the user's config.
        tried: codes of all tables.
        rank: directions that the table's rows lie in, which codewords need no more numbers than.
    """
    base = tried.codes
    residual = PQConfig(
        num_codes=1,
        codebook_size=base.codebook_size,
        codebook_dtype=base.codebook_dtype,
        structure="residual",
        popularity="count",
    )
    plain = dataclasses.replace(base, num_codes=1, num_hot_rows=0)
    own = None if rank >= table.embedding_dim else rank
    found = []
    for width in (own, *sorted({width for width in tried.widths if width < rank}, reverse=True)):
        for kind, shortest, longest in ((plain, 1, math.inf), (residual, 2, _MAX_RESIDUAL_CODES)):
            family = dataclasses.replace(kind, width=width)
            wanted = sorted({int(length) for length in tried.num_codes if shortest <= length <= longest})
            lengths = [m for m in wanted if can_store(dataclasses.replace(family, num_codes=m), table)]
            if lengths and family not in [other for other, _ in found]:
                found.append((family, lengths))
    return found


def heads_of(table: BaseEmbeddingConfig, config: CodebookConfig) -> Iterator[CodebookConfig]:
    """Yield a method of codes without hot rows, and with heads of several sizes in int4 and int8 that it can have."""
    yield config
    for num_hot in sorted({round(table.num_embeddings * share) for share in _HOT_SHARES} - {0}):
        for dtype in ("int4", "int8"):
            found = dataclasses.replace(config, num_hot_rows=num_hot, hot_dtype=dtype)
            if can_store(found, table):
                yield found


def partly_coded(table: BaseEmbeddingConfig, config: CodebookConfig) -> Iterator[CodebookConfig]:
    """Yield a method of codes for all ids, and for several shares of them that save bytes, the rest one row."""
    yield config
    whole = config.stored_bytes(table)
    for share in _CODED_SHARES:
        found = dataclasses.replace(config, num_coded=round(table.num_embeddings * share))
        if can_store(found, table) and found.stored_bytes(table) < _WORTH * whole:
            yield found


def can_store(config: MethodConfig, table: BaseEmbeddingConfig) -> bool:
    """Return whether a method can store a table."""
    with suppress(ValueError):
        config.check(table)
        return True
    return False
