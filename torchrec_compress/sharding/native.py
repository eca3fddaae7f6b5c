"""What all sharders of native tables share: TorchRec's own sharder, whose settings they take."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import BaseEmbeddingSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import QuantizedCommCodecs
from torchrec.modules.embedding_modules import EmbeddingBagCollection

Module = TypeVar("Module", bound=nn.Module)


class NativeSharder(BaseEmbeddingSharder[Module]):
    """A sharder that has another one of TorchRec's do the work.

    Args:
        stock: TorchRec's sharder, with the fused parameters and quantised collectives that are wanted.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self._stock = stock

    @property
    def fused_params(self) -> dict[str, Any] | None:
        """Parameters of the fused kernels, which the planner reads as well."""
        return self._stock.fused_params

    @property
    def qcomm_codecs_registry(self) -> dict[str, QuantizedCommCodecs] | None:
        """Codecs of what the native tables send, which the planner reads as well."""
        return self._stock.qcomm_codecs_registry


def rows_of_bags(bags: BaseEmbeddingSharder[EmbeddingBagCollection] | None) -> EmbeddingCollectionSharder:
    """Return TorchRec's sharder of unpooled rows with the settings of the user's bags; None has the default ones."""
    bags = EmbeddingBagCollectionSharder() if bags is None else bags
    return EmbeddingCollectionSharder(bags.fused_params, bags.qcomm_codecs_registry)
