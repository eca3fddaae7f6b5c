"""Which tables are fitted in the metric of the loss, and which have to do without it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.curvature import Curvature, check_own
from torchrec_compress.methods import MethodConfig

logger = logging.getLogger(__name__)


def metrics_of(
    curvature: Mapping[str, Curvature], tables: Iterable[BaseEmbeddingConfig], methods: Mapping[str, MethodConfig]
) -> dict[str, Tensor]:
    """Return the curvature that each table is fitted in, (D, D) float64; the others are fitted to squared error.

    Args:
        curvature: by table name.
        tables: to be fitted.
        methods: of them.

    Raises:
        ValueError: a curvature is of another table, or of another size.
    """
    found: dict[str, Tensor] = {}
    idle: dict[str, list[str]] = {}
    for table in tables:
        mine = curvature.get(table.name)
        if mine is None:
            continue
        check_own(table.name, mine, table.num_embeddings, table.embedding_dim)
        method = methods[table.name]
        if not method.uses_curvature:
            if method.is_compressed:
                idle.setdefault(method.method, []).append(table.name)
        elif mine.too_little:
            logger.warning("table %r: fitted to squared error, not to the loss: %s", table.name, mine.too_little)
        else:
            found[table.name] = mine.matrix
    if idle:
        logger.info("a curvature does nothing for methods that cannot use one: %s", idle)
    return found
