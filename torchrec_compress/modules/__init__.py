"""The unsharded compressed collections: the definition of correctness."""

from torchrec_compress.modules.after_step import after_step, discard
from torchrec_compress.modules.embedding import CompressedEmbeddingCollection
from torchrec_compress.modules.embedding_bag import (
    CompressedEmbeddingBagCollection,
    MECEmbeddingBagCollection,
    MEmComEmbeddingBagCollection,
    PQEmbeddingBagCollection,
    RandomCodesEmbeddingBagCollection,
    native_parameters,
)
from torchrec_compress.modules.footprint import Footprint, TableFootprint, optimizer_bytes
from torchrec_compress.modules.plain import CompressedEmbedding, CompressedEmbeddingBag

__all__ = [
    "CompressedEmbedding",
    "CompressedEmbeddingBag",
    "CompressedEmbeddingBagCollection",
    "CompressedEmbeddingCollection",
    "Footprint",
    "MECEmbeddingBagCollection",
    "MEmComEmbeddingBagCollection",
    "PQEmbeddingBagCollection",
    "RandomCodesEmbeddingBagCollection",
    "TableFootprint",
    "after_step",
    "discard",
    "native_parameters",
    "optimizer_bytes",
]
