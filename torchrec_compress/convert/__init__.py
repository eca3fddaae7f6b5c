"""From dense to compressed tables and back, and what a loss feels of the difference."""

from torchrec_compress.convert.compress import compress, decompress
from torchrec_compress.convert.curvature import measure_curvature
from torchrec_compress.convert.dense_layers import compress_dense
from torchrec_compress.convert.export import export_codes
from torchrec_compress.convert.fold import fold_into_linear, fold_projections, why_unfolded
from torchrec_compress.convert.into import compress_into, row_reader
from torchrec_compress.convert.quantize import dequantize_codebooks, dequantized, quantize_codebooks
from torchrec_compress.fit.curvature import Curvature, predicted_rise

__all__ = [
    "Curvature",
    "compress",
    "compress_dense",
    "compress_into",
    "decompress",
    "dequantize_codebooks",
    "dequantized",
    "export_codes",
    "fold_into_linear",
    "fold_projections",
    "measure_curvature",
    "predicted_rise",
    "quantize_codebooks",
    "row_reader",
    "why_unfolded",
]
