"""From dense to compressed tables and back."""

from torchrec_compress.convert.compress import compress, compress_into, decompress, row_reader

__all__ = ["compress", "compress_into", "decompress", "row_reader"]
