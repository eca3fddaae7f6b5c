"""Methods that no release has, to try out what tables can be stored as; `registered` knows them for a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

from torchrec import DataType
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.methods import METHODS, HashConfig, MEmComConfig, MethodConfig, Parts


@contextmanager
def registered(*methods: type[MethodConfig]) -> Iterator[None]:
    """Know methods by their names, as `register` does, until the end of a block."""
    METHODS.update({method.method: method for method in methods})
    try:
        yield
    finally:
        for method in methods:
            del METHODS[method.method]


@dataclass(frozen=True, kw_only=True)
class HalfHashConfig(HashConfig):
    """Hashed rows in half precision, pooled natively."""

    method: ClassVar[str] = "half_hash"

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the buckets."""
        stored = super().parts(table, seed)
        assert stored.bag is not None
        return replace(stored, bag=replace(stored.bag, data_type=DataType.FP16))


@dataclass(frozen=True, kw_only=True)
class HalfMEmComConfig(MEmComConfig):
    """MEmCom's rows in half precision, its scalars in float32."""

    method: ClassVar[str] = "half_memcom"

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the rows and the scalars."""
        buckets, *rest = super().parts(table, seed).rows
        return Parts(rows=(replace(buckets, data_type=DataType.FP16), *rest))
