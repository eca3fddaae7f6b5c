"""Compressed collections over many ranks: their parts sharded, each by its own sharder."""

from torchrec_compress.sharding.sharders import (
    CodeTableCollectionSharder,
    DecoderSharder,
    RemappedEmbeddingBagCollectionSharder,
    RemappedEmbeddingCollectionSharder,
    compressed_sharders,
    get_default_sharders,
)

__all__ = [
    "CodeTableCollectionSharder",
    "DecoderSharder",
    "RemappedEmbeddingBagCollectionSharder",
    "RemappedEmbeddingCollectionSharder",
    "compressed_sharders",
    "get_default_sharders",
]
