"""The managers that the contract is held against, each by a method that stores a table with it."""

from __future__ import annotations

from torchrec_compress.methods import CafeConfig, CceConfig, MethodConfig

# few blocks and rows, so that ids come and go within some steps
CASES: dict[str, MethodConfig] = {
    "hot and cold by gradient": CafeConfig(num_hot_rows=8, num_cold_rows=20, num_blocks=4, threshold=1.5, decay=0.9),
    "hot, medium and cold by frequency": CafeConfig(
        num_hot_rows=8,
        num_cold_rows=20,
        num_medium_rows=8,
        num_blocks=4,
        num_sketch_slots=32,
        importance="frequency",
        threshold=3.0,
        medium_threshold=1.5,
        decay=0.8,
        every=2,
    ),
    "hot and cold by gradient, narrow": CafeConfig(
        num_hot_rows=8, num_cold_rows=20, num_blocks=4, threshold=1.5, decay=0.9, width=4
    ),
    "admission to narrow rows": CafeConfig(
        num_hot_rows=16,
        num_cold_rows=20,
        num_medium_rows=8,
        num_blocks=4,
        importance="frequency",
        threshold=3.0,
        decay=1.0,
        width=4,
        rate=0.5,
    ),
    "pointers": CceConfig(num_codes=2, codebook_size=8, cluster_every=3, cluster_until=9),
    "pointers, mean state": CceConfig(
        num_codes=4, codebook_size=16, cluster_every=2, cluster_until=8, optimizer_state="mean"
    ),
}
