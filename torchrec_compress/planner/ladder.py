"""Ways to store a table in fewer bytes, from the gentlest."""

from __future__ import annotations

import dataclasses

from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.methods import CodebookConfig, HashConfig, Int4Config, Int8Config, MethodConfig, PQConfig

_CODES = (16, 8, 4, 2, 1)
NUM_STEPS = 2 + len(_CODES)
# a step that saves less than a twentieth is none
_WORTH = 0.95


def step(table: BaseEmbeddingConfig, method: MethodConfig, level: int) -> MethodConfig | None:
    """Return the method of a level for a table, or None where it cannot store it or would hardly save bytes.

    Codes stay with their own method and lose codes, hashed tables lose buckets; all others become int8, int4, then
    product codes.

    Args:
        table: the user's config.
        method: that it has now.
        level: from 0, the gentlest, to NUM_STEPS - 1.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> from torchrec_compress.methods import DenseConfig
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=10**6, embedding_dim=64, feature_names=["user"])
        >>> [step(table, DenseConfig(), level).method for level in (0, 1, 3)], step(table, PQConfig(num_codes=2), 4)
        (['int8', 'int4', 'pq'], None)
    """
    found: MethodConfig
    if isinstance(method, HashConfig):
        found = HashConfig(num_buckets=max(1, method.num_buckets >> (level + 1)))
    elif isinstance(method, CodebookConfig):
        if level < 2:
            return None
        found = dataclasses.replace(method, num_codes=_CODES[level - 2])
    elif level < 2:
        found = (Int8Config(), Int4Config())[level]
    else:
        found = PQConfig(num_codes=_CODES[level - 2])
    try:
        found.check(table)
    except ValueError:
        return None  # this table cannot be stored this way
    return found if found.stored_bytes(table) < _WORTH * method.stored_bytes(table) else None
