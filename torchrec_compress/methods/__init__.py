"""Compression methods. A new one is a file, a line below, a test case, a config, a row and a section in the docs."""

from torchrec_compress.methods.base import METHODS, MethodConfig, TableData, TableState, dense_bytes
from torchrec_compress.methods.blocks import BlocksConfig
from torchrec_compress.methods.cafe import CafeConfig
from torchrec_compress.methods.cce import CceConfig
from torchrec_compress.methods.codebook import CodebookConfig, as_codebook
from torchrec_compress.methods.decoders import BagDecoder, TableDecoder
from torchrec_compress.methods.dense import DenseConfig
from torchrec_compress.methods.dpq import DPQConfig
from torchrec_compress.methods.given import GivenCodesConfig
from torchrec_compress.methods.graph import GraphCodesConfig
from torchrec_compress.methods.hash import HashConfig
from torchrec_compress.methods.hash_embeddings import HashEmbeddingsConfig
from torchrec_compress.methods.lma import LMAConfig
from torchrec_compress.methods.lowbit import Int4Config, Int8Config
from torchrec_compress.methods.mec import MECConfig
from torchrec_compress.methods.memcom import MEmComConfig
from torchrec_compress.methods.memrec import MemRecConfig
from torchrec_compress.methods.narrow import NarrowConfig
from torchrec_compress.methods.pq import PQConfig
from torchrec_compress.methods.qr import QRConfig
from torchrec_compress.methods.quantile import QuantileCodesConfig
from torchrec_compress.methods.random_codes import RandomCodesConfig
from torchrec_compress.methods.robe import RobeConfig
from torchrec_compress.methods.storage import NativePart, Parts

__all__ = [
    "METHODS",
    "BagDecoder",
    "BlocksConfig",
    "CafeConfig",
    "CceConfig",
    "CodebookConfig",
    "DPQConfig",
    "DenseConfig",
    "GivenCodesConfig",
    "GraphCodesConfig",
    "HashConfig",
    "HashEmbeddingsConfig",
    "Int4Config",
    "Int8Config",
    "LMAConfig",
    "MECConfig",
    "MEmComConfig",
    "MemRecConfig",
    "MethodConfig",
    "NarrowConfig",
    "NativePart",
    "PQConfig",
    "Parts",
    "QRConfig",
    "QuantileCodesConfig",
    "RandomCodesConfig",
    "RobeConfig",
    "TableData",
    "TableDecoder",
    "TableState",
    "as_codebook",
    "dense_bytes",
]
