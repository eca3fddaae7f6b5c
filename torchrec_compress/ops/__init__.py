"""Tensor operations behind the compressed lookups. Callers import from here, never from the files below."""

from torchrec_compress.ops.bags import codebook_bag, codebook_bags
from torchrec_compress.ops.checks import check_weight_count, first_infinite, first_not_finite
from torchrec_compress.ops.codebooks import (
    code_dtype,
    hot_row_codes,
    is_packed,
    num_escape_codes,
    pack_codes,
    packed_width,
    unpack_codes,
)
from torchrec_compress.ops.coded_ids import coded_ids_bytes, coded_ids_shape, coded_rows, index_coded_ids
from torchrec_compress.ops.dispatch import requested_backend, tiers
from torchrec_compress.ops.ids import (
    check_filled,
    check_ids,
    code_gather,
    hash_codes,
    hash_ids,
    lookup_codes,
    mix,
    stable_salt,
)
from torchrec_compress.ops.integers import (
    NOT_FILLED,
    NOT_SUMMED,
    can_check,
    changed,
    check_intact,
    checksum,
    flag_of,
    keep_integers,
    known,
    mark_of,
    num_writes,
    total_of,
)
from torchrec_compress.ops.lowbit import SCALE_BYTES, dequantize_rows, quantize_rows, quantized_row_bytes
from torchrec_compress.ops.lowbit_bags import low_bit_bag
from torchrec_compress.ops.nearest import BLOCK_FLOATS, centroid_sums, nearest_with_distance
from torchrec_compress.ops.pooling import check_offsets, check_weights, pool_rows, scale_rows
from torchrec_compress.ops.slices import quantize_slices, slice_codes
from torchrec_compress.ops.table_bags import Rows, TableRows, gathered, pool_table
from torchrec_compress.ops.trained import (
    TrainedFormat,
    TrainedOptimizer,
    TrainedStep,
    are_encoded,
    are_states,
    decode_trained,
    encode_trained,
)
from torchrec_compress.ops.trained_bags import trained_bag, update_trained
from torchrec_compress.ops.types import BagLookup, IdBags, Span

__all__ = [
    "BLOCK_FLOATS",
    "NOT_FILLED",
    "NOT_SUMMED",
    "SCALE_BYTES",
    "BagLookup",
    "IdBags",
    "Rows",
    "Span",
    "TableRows",
    "TrainedFormat",
    "TrainedOptimizer",
    "TrainedStep",
    "are_encoded",
    "are_states",
    "can_check",
    "centroid_sums",
    "changed",
    "check_filled",
    "check_ids",
    "check_intact",
    "check_offsets",
    "check_weight_count",
    "check_weights",
    "checksum",
    "code_dtype",
    "code_gather",
    "codebook_bag",
    "codebook_bags",
    "coded_ids_bytes",
    "coded_ids_shape",
    "coded_rows",
    "decode_trained",
    "dequantize_rows",
    "encode_trained",
    "first_infinite",
    "first_not_finite",
    "flag_of",
    "gathered",
    "hash_codes",
    "hash_ids",
    "hot_row_codes",
    "index_coded_ids",
    "is_packed",
    "keep_integers",
    "known",
    "lookup_codes",
    "low_bit_bag",
    "mark_of",
    "mix",
    "nearest_with_distance",
    "num_escape_codes",
    "num_writes",
    "pack_codes",
    "packed_width",
    "pool_rows",
    "pool_table",
    "quantize_rows",
    "quantize_slices",
    "quantized_row_bytes",
    "requested_backend",
    "scale_rows",
    "slice_codes",
    "stable_salt",
    "tiers",
    "total_of",
    "trained_bag",
    "unpack_codes",
    "update_trained",
]
