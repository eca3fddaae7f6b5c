"""Compressed collections over many ranks: their parts sharded, each by its own sharder."""

from torchrec_compress.sharding.gradients import GradientExchange, compress_gradients
from torchrec_compress.sharding.managed_sharders import ManagedBagRowsSharder, ManagedCollectionSharder
from torchrec_compress.sharding.settings import compressed_sharders, get_default_sharders
from torchrec_compress.sharding.sharders import (
    CodeTableCollectionSharder,
    DecoderSharder,
    RemappedEmbeddingBagCollectionSharder,
    RemappedEmbeddingBagRowsSharder,
    RemappedEmbeddingCollectionSharder,
)
from torchrec_compress.sharding.trained_sharders import TrainedBagsSharder, TrainedCollectionSharder

__all__ = [
    "CodeTableCollectionSharder",
    "DecoderSharder",
    "GradientExchange",
    "ManagedBagRowsSharder",
    "ManagedCollectionSharder",
    "RemappedEmbeddingBagCollectionSharder",
    "RemappedEmbeddingBagRowsSharder",
    "RemappedEmbeddingCollectionSharder",
    "TrainedBagsSharder",
    "TrainedCollectionSharder",
    "compress_gradients",
    "compressed_sharders",
    "get_default_sharders",
]
