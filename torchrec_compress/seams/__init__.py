"""Every seam of TorchRec that is not in its documented interface, in one place.

Checked on TorchRec 1.6 to 1.9; where a release moves one, this is the folder to change.
"""

from __future__ import annotations

from torchrec.distributed.embedding import EmbeddingCollectionContext
from torchrec.distributed.embedding_sharding import KJTListSplitsAwaitable
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.sharding.sequence_sharding import SequenceShardingContext

from torchrec_compress.seams.backward import (
    backward_optimizer,
    backward_settings,
    copy_backward_optimizer,
    freeze,
    hold_still,
    is_frozen,
    num_backward_optimizers,
    optimizers_in_backward,
    steps_in_backward,
    steps_uncounted,
)
from torchrec_compress.seams.exchange import (
    RowTable,
    fused_rows,
    look_up_local,
    rescaled,
    row_exchange,
    sequence_context,
    shard_bounds,
    without_input_exchange,
)
from torchrec_compress.seams.planner import (
    plan_as,
    planner_parts,
    reserved_share,
)
from torchrec_compress.seams.sharded import (
    as_dtype,
    copy_to_host,
    data_parallel_wrapper_of,
    environment_of,
    forget_inputs,
    has_codecs,
    has_own_forward,
    is_compiled,
    is_cut_by_rows,
    let_go,
    local_shards,
    needs_indices,
    output_types,
    shape_and_dtype,
    sharded_configs,
    sharded_tensor,
)

__all__ = [
    "EmbeddingCollectionContext",
    "KJTList",
    "KJTListSplitsAwaitable",
    "RowTable",
    "SequenceShardingContext",
    "as_dtype",
    "backward_optimizer",
    "backward_settings",
    "copy_backward_optimizer",
    "copy_to_host",
    "data_parallel_wrapper_of",
    "environment_of",
    "forget_inputs",
    "freeze",
    "fused_rows",
    "has_codecs",
    "has_own_forward",
    "hold_still",
    "is_compiled",
    "is_cut_by_rows",
    "is_frozen",
    "let_go",
    "local_shards",
    "look_up_local",
    "needs_indices",
    "num_backward_optimizers",
    "optimizers_in_backward",
    "output_types",
    "plan_as",
    "planner_parts",
    "rescaled",
    "reserved_share",
    "row_exchange",
    "sequence_context",
    "shape_and_dtype",
    "shard_bounds",
    "sharded_configs",
    "sharded_tensor",
    "steps_in_backward",
    "steps_uncounted",
    "without_input_exchange",
]
