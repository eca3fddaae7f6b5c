"""From dense to compressed tables and back, and what a loss feels of the difference."""

from torchrec_compress.convert.compress import compress, compress_into, decompress, row_reader
from torchrec_compress.convert.curvature import measure_curvature
from torchrec_compress.fit.curvature import Curvature, predicted_rise

__all__ = ["Curvature", "compress", "compress_into", "decompress", "measure_curvature", "predicted_rise", "row_reader"]
