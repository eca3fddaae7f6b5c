"""The tables of MLPerf's DLRM-DCNv2 benchmark on the Criteo 1TB click logs.

Source: https://github.com/mlcommons/training, recommendation_v2/torchrec_dlrm/README.MD, `--num_embeddings_per_feature`
and `--multi_hot_sizes`.
"""

from __future__ import annotations

FEATURES = [f"cat_{number}" for number in range(26)]
_BIG = 40_000_000  # larger tables are hashed to this
_ROWS = [
    *(_BIG, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, _BIG, 3067956, 405282, 10),
    *(2209, 11938, 155, 4, 976, 14, _BIG, _BIG, _BIG, 590152, 12973, 108, 36),
]
_SIZES = [3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1]
TABLE_ROWS = dict(zip(FEATURES, _ROWS, strict=True))
MULTI_HOT_SIZES = dict(zip(FEATURES, _SIZES, strict=True))
