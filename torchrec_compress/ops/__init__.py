"""Tensor operations behind the compressed lookups. Callers import from here, never from the files below."""

from torchrec_compress.ops.bags import BagLookup, IdBags, Span, codebook_bag, codebook_bags
from torchrec_compress.ops.codebooks import (
    code_dtype,
    hot_row_codes,
    is_packed,
    num_escape_codes,
    pack_codes,
    packed_width,
    unpack_codes,
)
from torchrec_compress.ops.dispatch import requested_backend, tiers
from torchrec_compress.ops.ids import (
    check_filled,
    check_ids,
    code_gather,
    hash_codes,
    hash_ids,
    lookup_codes,
    stable_salt,
)
from torchrec_compress.ops.lowbit import SCALE_BYTES, dequantize_rows, quantize_rows, quantized_row_bytes
from torchrec_compress.ops.lowbit_bags import low_bit_bag
from torchrec_compress.ops.pooling import check_weights, pool_rows
from torchrec_compress.ops.table_bags import Rows, TableRows, pool_table

__all__ = [
    "SCALE_BYTES",
    "BagLookup",
    "IdBags",
    "Rows",
    "Span",
    "TableRows",
    "check_filled",
    "check_ids",
    "check_weights",
    "code_dtype",
    "code_gather",
    "codebook_bag",
    "codebook_bags",
    "dequantize_rows",
    "hash_codes",
    "hash_ids",
    "hot_row_codes",
    "is_packed",
    "lookup_codes",
    "low_bit_bag",
    "num_escape_codes",
    "pack_codes",
    "packed_width",
    "pool_rows",
    "pool_table",
    "quantize_rows",
    "quantized_row_bytes",
    "requested_backend",
    "stable_salt",
    "tiers",
    "unpack_codes",
]
