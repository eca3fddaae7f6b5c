"""What all sharders of native tables share: TorchRec's own sharder, whose settings they take."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import BaseEmbeddingSharder, EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import ParameterSharding, QuantizedCommCodecs, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_compress.modules.outputs import OutputType, dtype_asked
from torchrec_compress.seams import freeze, hold_still
from torchrec_compress.sharding.checks import check_env, check_names, tell_of_defaults, tell_of_missing_codec
from torchrec_compress.sharding.fused_params import check_fused_params
from torchrec_compress.sharding.rows import SHARDING_TYPES, ShardedRowCollection

Module = TypeVar("Module", bound=nn.Module)


class NativeSharder(BaseEmbeddingSharder[Module]):
    """A sharder that has another one of TorchRec's do the work.

    Args:
        stock: TorchRec's sharder, with the fused parameters and quantised collectives that are wanted.

    Raises:
        ValueError: fused parameters that FBGEMM's tables do not take.
    """

    def __init__(self, stock: Any) -> None:
        check_fused_params(type(self).__name__, stock.fused_params)
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


def output_type(
    where: str, fused_params: Mapping[str, Any] | None, params: Mapping[str, ParameterSharding]
) -> OutputType:
    """Return what is said of the dtype that embeddings of these tables shall have.

    Args:
        where: names the module in errors.
        fused_params: whose "output_dtype" is for all tables.
        params: the plan; a table's own output_dtype, of its constraints, comes first. Where they differ, the widest
            counts, as where TorchRec puts the outputs of its tables side by side.

    Raises:
        ValueError: it is none of float32, float16 and bfloat16.
    """
    of_all = dtype_asked(where, (fused_params or {}).get("output_dtype"))
    return OutputType([dtype_asked(where, each.output_dtype) or of_all for each in params.values()], of_all)


class RowSharder(NativeSharder[Module]):
    """Shard tables of rows row-wise or table-wise.

    Args:
        stock: TorchRec's sharder of the user's tables, whose fused parameters and codecs are taken.

    Attributes:
        of_bags: whether these are the user's bags; rows travel all the same.
    """

    of_bags: ClassVar[bool] = False

    def __init__(self, stock: BaseEmbeddingSharder[Any] | None = None) -> None:
        super().__init__(rows_of_bags(stock) if self.of_bags else stock or EmbeddingCollectionSharder())

    @abstractmethod
    def make(
        self, module: Module, params: dict[str, ParameterSharding], env: ShardingEnv, device: torch.device
    ) -> ShardedRowCollection:
        """Return the sharded collection; arguments as in `shard`, checked."""

    @abstractmethod
    def marked(self, module: Module) -> Iterable[nn.Parameter]:
        """Return what `apply_optimizer_in_backward` marks."""

    def shard(
        self,
        module: Module,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedRowCollection:
        """Return the sharded collection."""
        where = module_fqn or self.module_type.__name__
        check_env(env, where)
        check_names(where, params, self.shardable_parameters(module), optional=False)
        frozen = hold_still(module)
        tell_of_defaults(self.marked(module), sorted(params), self.fused_params)
        if self.of_bags:
            tell_of_missing_codec(self.qcomm_codecs_registry, params)
        made = self.make(module, params, env, torch.device("cpu") if device is None else device)
        freeze(made, frozen)
        made.output_type = output_type(where, self.fused_params, params)
        return made

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return what keeps rows whole, and on one rank each."""
        return list(SHARDING_TYPES)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Return the kernel whose rows and optimizer state lie where they can be written, in no cache."""
        return [EmbeddingComputeKernel.FUSED.value]
