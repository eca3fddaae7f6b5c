"""What travels for the codes of a batch: their rows in words, what the way back must know, and the answer to come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.types import Awaitable, LazyAwaitable

from torchrec_compress.modules.code_bank import CodeTableConfig
from torchrec_compress.modules.codes import Codes
from torchrec_compress.seams import EmbeddingCollectionContext


def row_words(config: CodeTableConfig) -> int:
    """Return the 32-bit words that one row of codes takes on the wire.

    FBGEMM permutes what it receives, and has no kernel for bytes.
    """
    return -(-config.part.row_size * config.part.dtype.itemsize // 4)


def unpack_rows(words: Tensor, row_size: int, dtype: torch.dtype) -> Tensor:
    """Return the codes in 32-bit words that `code_gather` padded: (L, words) int32 -> (L, row_size) of `dtype`.

    Example:
        >>> unpack_rows(torch.tensor([[300 * 2**16 + 7, 9]], dtype=torch.int32), 3, torch.int16).tolist()
        [[7, 300, 9]]
    """
    as_bytes = words.contiguous().view(torch.uint8)
    return as_bytes[:, : row_size * dtype.itemsize].contiguous().view(dtype)


class CodeContext(EmbeddingCollectionContext):
    """What the way back needs to know of one batch.

    Attributes:
        inverse: by table, (ids before de-duplication,) int64 positions among the distinct ids; absent if not done.
        num_ids: by table, ids of each of its features.
        num_changes: of codes by managers, when they were looked up.
        gathered: by output name, codes of the ids, (L, row_size), of tables that this rank holds whole, where ids share
            rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inverse: dict[str, Tensor] = {}
        self.num_ids: dict[str, list[int]] = {}
        self.num_changes = 0
        self.gathered: dict[str, Tensor] = {}

    def record_stream(self, stream: Any) -> None:
        """Keep the tensors alive until the stream is done with them."""
        super().record_stream(stream)
        for tensor in [*self.inverse.values(), *self.gathered.values()]:
            tensor.record_stream(stream)


class CodesAwaitable(LazyAwaitable[dict[str, Codes]]):
    """The codes of a batch, on their way back, beside the tables that this rank holds whole."""

    def __init__(
        self,
        rows: list[Awaitable[Tensor]],
        tables: list[list[CodeTableConfig]],
        context: CodeContext,
        whole: Mapping[str, Codes],
        num_changes: Callable[[], int],
    ) -> None:
        super().__init__()
        self._rows, self._tables, self._context, self._whole = rows, tables, context, whole
        self._num_changes = num_changes

    def _wait_impl(self) -> dict[str, Codes]:
        if self._context.num_changes != self._num_changes():
            raise RuntimeError(
                "code tables: codes must be read in the step that they were looked up in, got it after "
                "torchrec_compress.after_step has changed them; use no pipeline that looks up ahead of the last step "
                "(TrainPipelineSemiSync)"
            )
        codes: dict[str, Codes] = {**self._whole}
        for awaitable, tables, sent in zip(self._rows, self._tables, self._context.sharding_contexts, strict=True):
            assert sent.features_before_input_dist is not None
            counts = sent.features_before_input_dist.length_per_key()
            for config, words in zip(tables, awaitable.wait().split(counts), strict=True):
                inverse = self._context.inverse.get(config.name)
                found = words if inverse is None else words.index_select(0, inverse)
                rows = unpack_rows(found, config.part.row_size, config.part.dtype)
                parts = rows.split(self._context.num_ids[config.name])
                codes.update(zip(config.output_names, parts, strict=True))
        return codes
