"""Look-ups of native tables that have a row for some ids alone: the others are not sent, and add zeros."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchrec.modules.embedding_modules import process_pooled_embeddings, reorder_inverse_indices
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_compress.methods.decoders import Bank
from torchrec_compress.methods.storage import NO_ROW
from torchrec_compress.modules.features import split_features


class Places:
    """Where ids have their rows, for tables of which the decoder says so.

    Args:
        banks: the decoders of tables by name; they are no part of the module that asks here.
    """

    def __init__(self, banks: Mapping[str, Bank]) -> None:
        self._banks = dict(banks)
        self._is_ready = False

    def make_ready(self) -> None:
        """Have the decoders see to what they say, before the first look-up."""
        if not self._is_ready:
            for name, bank in self._banks.items():
                bank.make_ready(f"table {name!r}")
            self._is_ready = True

    def tensors(self) -> dict[str, Tensor]:
        """Return the buffers `places` by table, live."""
        found = {name: bank._buffers["places"] for name, bank in self._banks.items()}  # past what fx records
        return {name: buffer for name, buffer in found.items() if buffer is not None}


def with_rows_alone(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Return a batch without the ids that have no row, `NO_ROW`; bags, their weights and VBE strides are kept.

    The host waits for the number of ids that are left.
    """
    has_row = features.values() > NO_ROW
    before = torch.zeros(len(has_row) + 1, dtype=torch.int64, device=has_row.device)
    torch.cumsum(has_row, 0, out=before[1:])
    offsets = before.index_select(0, features.offsets().long())
    weights, variable = features.weights_or_none(), features.variable_stride_per_key()
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values()[has_row],
        weights=None if weights is None else weights[has_row],
        lengths=offsets.diff().to(features.lengths().dtype),
        stride=None if variable else features.stride(),
        stride_per_key_per_rank=features.stride_per_key_per_rank() if variable else None,
        inverse_indices=features.inverse_indices_or_none(),
    )


def with_row(numbers: Tensor) -> Tensor:
    """Return the row numbers, (l,), of those of (L,) ids that have a row."""
    return numbers[numbers > NO_ROW]


def some_rows(weight: Tensor, numbers: Tensor) -> Tensor:
    """Return rows, (L, width) float32, of a whole table, (n, width); zeros for `NO_ROW`."""
    found = weight.index_select(0, numbers.clamp(min=0)).float()
    return found * (numbers > NO_ROW).unsqueeze(1)


def put_in_place(found: Tensor, numbers: Tensor) -> Tensor:
    """Return rows in the order of ids, (L, width), of those that have one, (l, width); zeros for the others."""
    places = (numbers > NO_ROW).nonzero().squeeze(1)
    return found.new_zeros(len(numbers), found.shape[1]).index_copy(0, places, found)


@torch.fx.wrap
def whole_means(bags: dict[str, Tensor], features: KeyedJaggedTensor, means: Mapping[str, str]) -> dict[str, Tensor]:
    """Divide sums of bags, (B, D) by look-up key, by all ids of a bag: TorchRec would divide by those with a row.

    Args:
        bags: sums, and what is left as it is.
        features: the batch.
        means: the feature of the look-ups that are means, by key.
    """
    jagged, names = split_features(features), list(means.values())
    lengths = [jagged[name].lengths().clamp(min=1).unsqueeze(1) for name in names]
    inverse = reorder_inverse_indices(inverse_indices=features.inverse_indices_or_none(), feature_names=names)
    flat = process_pooled_embeddings(pooled_embeddings=lengths, inverse_indices=inverse)
    return {**bags, **{key: bags[key] / flat[:, number, None] for number, key in enumerate(means)}}
