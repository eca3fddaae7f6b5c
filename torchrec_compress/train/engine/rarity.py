"""How rare ids are, for an l2 that pulls what a rare id learns as hard as what a frequent one does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

_STEPS = 8.0  # of a code of a count in a doubling: within 4.5 % of the count, up to 2^31


class Rarity:
    """The inverse of the share of train rows that look an id up, from one byte an id.

    Args:
        counts: look-ups per id in train, (N,) int64 by feature; ids that were never seen count as seen once.
        num_rows: rows of train.
        device: where ids are asked for.

    Example:
        >>> rarity = Rarity({"day": torch.tensor([50, 100, 0])}, num_rows=100, device=torch.device("cpu"))
        >>> ids = KeyedJaggedTensor(["day"], torch.tensor([0, 1, 0, 1]), lengths=torch.tensor([1, 1, 2]))
        >>> [round(each, 1) for each in rarity(ids, ["day"]).flatten().tolist()]
        [2.0, 1.0, 1.5]
    """

    def __init__(self, counts: Mapping[str, Tensor], num_rows: int, device: torch.device) -> None:
        self._codes = {
            name: (_STEPS * each.clamp(min=1).double().log2()).round().to(torch.uint8).to(device)
            for name, each in counts.items()
        }
        codes = torch.arange(256, dtype=torch.float64, device=device)
        self._values = (num_rows * (-codes / _STEPS).exp2()).float()

    @property
    def num_bytes(self) -> int:
        """Bytes that training holds for it."""
        return sum(codes.numel() for codes in self._codes.values())

    def __call__(self, features: KeyedJaggedTensor, names: list[str]) -> Tensor:
        """Return the mean rarity of the ids of every bag, (B, F) float32; 0 of an empty one.

        Args:
            features: of a batch.
            names: of F features.
        """
        return torch.stack([self._mean(features, name) for name in names], dim=1)

    def _mean(self, features: KeyedJaggedTensor, name: str) -> Tensor:
        jagged = features[name]
        found = self._values[self._codes[name][jagged.values().long()].long()]
        lengths = jagged.lengths()
        sums = torch.cat([found.new_zeros(1, dtype=torch.float64), found.double().cumsum(0)])
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).long()
        return ((sums[offsets[1:]] - sums[offsets[:-1]]) / lengths.clamp(min=1)).float()
