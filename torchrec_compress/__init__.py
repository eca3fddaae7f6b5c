"""Compressed embedding tables for TorchRec."""

from torchrec_compress.versions import check_versions

check_versions()

from torchrec_compress import methods  # noqa: E402
from torchrec_compress.convert import compress, compress_into, decompress  # noqa: E402
from torchrec_compress.modules import (  # noqa: E402
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    Footprint,
    MECEmbeddingBagCollection,
    MEmComEmbeddingBagCollection,
    PQEmbeddingBagCollection,
    RandomCodesEmbeddingBagCollection,
    native_parameters,
    optimizer_bytes,
)

__version__ = "0.1.0"
__all__ = [
    "CompressedEmbeddingBagCollection",
    "CompressedEmbeddingCollection",
    "Footprint",
    "MECEmbeddingBagCollection",
    "MEmComEmbeddingBagCollection",
    "PQEmbeddingBagCollection",
    "RandomCodesEmbeddingBagCollection",
    "__version__",
    "compress",
    "compress_into",
    "decompress",
    "methods",
    "native_parameters",
    "optimizer_bytes",
]
