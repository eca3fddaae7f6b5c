"""One look-up as the GPU kernels see it, and its description in the kernels' arguments."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_compress.ops.checks import INDICES
from torchrec_compress.ops.codebooks import num_escape_codes
from torchrec_compress.ops.gpu.program import Signature

MAX_LOOKUPS = 31  # of one launch, as in cuda/common.cuh


@dataclass(frozen=True)
class Task:
    """The bags of one feature, looked up in one table.

    Args:
        codes: (N, M) code table, or (L of the feature, M) codes that were gathered before.
        codebooks: (M * K, width).
        hot_rows: (H, D), or None.
        ids: (L of the batch,) rows of the code table, or None where codes were gathered.
        offsets: (B + 1,) of the feature's bags; they count the ids of the whole batch. None: every id is a bag.
        weights: (L of the batch,) float32, or None.
        num_bags: of the feature.
        first_id: of the feature's ids in the batch.
        num_ids: of the feature.
        residual: whether a row is the sum of its codewords.
        mean: whether bags are averaged.
    """

    codes: Tensor
    codebooks: Tensor
    hot_rows: Tensor | None
    ids: Tensor | None
    offsets: Tensor | None
    weights: Tensor | None
    num_bags: int
    first_id: int
    num_ids: int
    residual: bool
    mean: bool

    @functools.cached_property
    def signature(self) -> Signature:
        """What decides which program serves."""
        num_codes = self.codes.shape[1]
        return Signature(
            num_codes=num_codes,
            codebook_size=self.codebooks.shape[0] // num_codes,
            width=self.codebooks.shape[1],
            residual=self.residual,
            code=self.codes.dtype,
            word=self.codebooks.dtype,
            index=None if self.ids is None else self.ids.dtype,
            offset=None if self.offsets is None else self.offsets.dtype,
            has_weights=self.weights is not None,
            has_hot=self.hot_rows is not None,
            mean=self.mean and self.offsets is not None,
        )

    def check(self) -> None:
        """Raise ValueError where shapes do not fit; values are checked by the kernels."""
        self._check_tensors()
        self._check_ids()
        signature = self.signature
        num_words, size = self.codebooks.shape[0], signature.codebook_size
        if num_words == 0 or num_words % signature.num_codes:
            raise ValueError(
                "codebook_bag: codebooks must hold the same number of codewords, at least one, for each of "
                f"{signature.num_codes} codes, got {num_words} in all"
            )
        if self.hot_rows is not None:
            if self.hot_rows.shape[1] != signature.dim:
                raise ValueError(f"codebook_bag: hot_rows must be {signature.dim} wide, got {self.hot_rows.shape[1]}")
            if self.first_size < 0:
                raise ValueError(
                    "codebook_bag: hot_rows must be at most what the first codebook's escapes reach, got "
                    f"{len(self.hot_rows)} with {signature.num_codes} codes of {size}"
                )

    def _check_tensors(self) -> None:
        """Raise where a kernel would follow the address of another device, or take one type or layout for another."""
        device, word = self.codebooks.device, self.codebooks.dtype
        tensors: dict[str, tuple[Tensor | None, Sequence[torch.dtype]]] = {
            "codes": (self.codes, (torch.uint8, torch.int16, torch.int32)),
            "codebooks": (self.codebooks, (word,)),
            "hot_rows": (self.hot_rows, (word,)),
            "ids": (self.ids, INDICES),
            "offsets": (self.offsets, INDICES),
            "weights": (self.weights, (torch.float32,)),
        }
        for name, (tensor, dtypes) in tensors.items():
            if tensor is None:
                continue
            if tensor.device != device:
                raise ValueError(
                    f"codebook_bag: {name} must be on {device} as the codebooks are, got {tensor.device}; move it there"
                )
            if tensor.dtype not in dtypes or not tensor.is_contiguous():
                wanted = " or ".join(str(dtype) for dtype in dtypes)
                raise ValueError(
                    f"codebook_bag: {name} must be contiguous and {wanted}, got {tensor.dtype} with strides "
                    f"{tensor.stride()}; call torchrec_compress.ops.codebook_bags"
                )

    def _check_ids(self) -> None:
        """Raise where ids, weights, gathered codes or offsets end before the look-up's part of them does."""
        last = self.first_id + self.num_ids
        for name, tensor in (("ids", self.ids), ("weights", self.weights)):
            if tensor is not None and tensor.shape[0] < last:
                raise ValueError(f"codebook_bag: {name} must be at least {last}, got {tensor.shape[0]}; mend the spans")
        if self.ids is None and self.codes.shape[0] < self.num_ids:
            raise ValueError(f"codebook_bag: there must be codes of {self.num_ids} ids, got {self.codes.shape[0]}")
        num_bags = self.num_ids if self.offsets is None else self.offsets.shape[0] - 1
        if num_bags != self.num_bags:
            raise ValueError(f"codebook_bag: there must be {self.num_bags} bags, got {num_bags}; mend the offsets")

    @property
    def num_hot(self) -> int:
        """Hot rows, H."""
        return 0 if self.hot_rows is None else self.hot_rows.shape[0]

    @property
    def first_size(self) -> int:
        """First codes from here on are escapes to hot rows."""
        num_codes, size = self.signature.num_codes, self.signature.codebook_size
        return size - (num_escape_codes(self.num_hot, num_codes, size) if self.num_hot else 0)

    @property
    def dim(self) -> int:
        """Columns of the output, D."""
        return self.signature.dim


class LookupStruct(ctypes.Structure):
    """`Lookup` of cuda/common.cuh, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "ids", "offsets", "weights", "codebooks", "hot_rows", "rows")),
        *((name, ctypes.c_longlong) for name in ("row_stride", "num_bags", "first_id", "num_ids", "num_rows")),
        *((name, ctypes.c_int) for name in ("num_hot", "first_size", "num_chunks", "unused")),
        *((name, ctypes.c_void_p) for name in ("result", "second")),
    ]


LookupStructs = LookupStruct * MAX_LOOKUPS


def describe(task: Task, rows: Tensor | None, result: int = 0, second: int = 0, num_chunks: int = 0) -> LookupStruct:
    """Return a task's description.

    Args:
        task: the look-up.
        rows: (B, D) output or upstream gradient, columns side by side.
        result: address of what the kernel writes besides.
        second: address of its second result.
        num_chunks: of partial gradients.
    """

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    return LookupStruct(
        codes=address(task.codes),
        ids=address(task.ids),
        offsets=address(task.offsets),
        weights=address(task.weights),
        codebooks=address(task.codebooks),
        hot_rows=address(task.hot_rows),
        rows=address(rows),
        row_stride=0 if rows is None else rows.stride(0),
        num_bags=task.num_bags,
        first_id=task.first_id,
        num_ids=task.num_ids,
        num_rows=task.codes.shape[0],
        num_hot=task.num_hot,
        first_size=task.first_size,
        num_chunks=num_chunks,
        result=result,
        second=second,
    )


def word_alignment(task: Task, rows: Tensor) -> int:
    """Return the bytes, 16 at most, that the starts of all codewords and rows of a task are a multiple of."""
    tensors = [tensor for tensor in (task.codebooks, task.hot_rows, rows) if tensor is not None]
    return math.gcd(16, rows.stride(0) * rows.element_size(), *(tensor.data_ptr() for tensor in tensors))


def launches(tasks: Sequence[Task]) -> Iterator[tuple[Signature, list[int]]]:
    """Yield what one launch serves: a signature, and the numbers of at most `MAX_LOOKUPS` tasks with bags."""
    groups: dict[Signature, list[int]] = {}
    for number, task in enumerate(tasks):
        if task.num_bags:
            groups.setdefault(task.signature, []).append(number)
    for signature, numbers in groups.items():
        for first in range(0, len(numbers), MAX_LOOKUPS):
            yield signature, numbers[first : first + MAX_LOOKUPS]
