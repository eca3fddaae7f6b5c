"""Min-hash of what ids occur with, as a stream, and codes of it: ids that occur together share codewords.

Of two sets the least hash is the same with the probability of their Jaccard similarity, the share of what both have in
what either has (Broder, 1997), so a code that is a hash of it is shared as often, and by chance one time in K else:
memory allocation by locality-sensitive hashing (LMA; Desai et al., arXiv 2103.06124, sections 3 and 4).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchrec_compress.fit.codes import Encoder, HashEncoder
from torchrec_compress.fit.contexts import NEVER, ContextSketch
from torchrec_compress.ops import hash_ids

_SALT_STEP = 7919


@dataclass(eq=False)
class MinHashSketch(ContextSketch):
    """The least hashes of the contexts that each id occurred with: all that is kept of any number of pairs.

    A pair counts once, however often it comes, in whatever order and batches: the minima are the same to the bit.
    Memory: 4 N H bytes, and a few MB while pairs are added.

    Args:
        num_rows: N, ids.
        num_hashes: H, independent hashes of an id's contexts.
        salt: of the hashes.
        where: names it in errors; sketches of a method name their table.

    Attributes:
        minima: (N, H) int32, the least hash of the contexts of each id; 2**31 - 1 where it has none.

    Raises:
        ValueError: sizes that are no sizes.

    Example:
        >>> sketch = MinHashSketch(num_rows=3, num_hashes=64, salt=0)
        >>> sketch.add(torch.tensor([0, 0, 1]), torch.tensor([5, 8, 5]))
        >>> sketch.add(torch.tensor([1]), torch.tensor([8]))
        >>> bool((sketch.minima[0] == sketch.minima[1]).all()), sketch.is_seen(torch.arange(3)).tolist()
        (True, [True, True, False])
    """

    num_rows: int
    num_hashes: int
    salt: int
    where: str = "MinHashSketch"
    minima: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Begin without pairs, or raise ValueError for sizes that are none."""
        self._check_sizes("num_rows", "num_hashes")
        self.minima = torch.full((self.num_rows, self.num_hashes), NEVER, dtype=torch.int32)

    def _take(self, ids: Tensor, contexts: Tensor) -> None:
        for number in range(self.num_hashes):
            found = hash_ids(contexts, NEVER, self.salt + _SALT_STEP * number).to(torch.int32)
            self.minima[:, number].scatter_reduce_(0, ids, found, "amin")

    def join(self, minima: Tensor) -> None:
        """Take what another sketch of the same sizes and salt has seen, such as that of another rank.

        Args:
            minima: (N, H) int32, its own.

        Raises:
            ValueError: they are of another shape or dtype.
        """
        torch.minimum(self.minima, self._check_joined("minima", minima), out=self.minima)

    @property
    def is_empty(self) -> bool:
        """Whether no pair was added yet."""
        return not bool((self.minima[:, 0] != NEVER).any())

    def is_seen(self, ids: Tensor) -> Tensor:
        """Return whether ids were in any pair, (L,) int64 -> (L,) bool."""
        return self.minima[ids, 0] != NEVER


@dataclass(frozen=True)
class MinHashEncoder(Encoder):
    """Codes that are hashes of an id's least hashes, several of which make a code; other ids have those of `others`.

    Attributes:
        sketch: of M times p hashes.
        others: codes of ids that were in no pair; its sizes are those of all codes.
    """

    sketch: MinHashSketch
    others: HashEncoder

    def __call__(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        """Return the codes of ids; see `Encoder`."""
        codes, sizes = self.others(ids, None), self.others
        minima = self.sketch.minima[ids].long().unflatten(1, (sizes.num_codes, -1))
        is_seen = self.sketch.is_seen(ids)
        for m in range(sizes.num_codes):
            key = minima[:, m, 0]
            for one in minima[:, m, 1:].unbind(1):
                key = hash_ids(key, 2**31, self.sketch.salt) << 31 | one
            size = sizes.codebook_size if m else sizes.first_size
            found = hash_ids(key, size, self.sketch.salt + _SALT_STEP * (self.sketch.num_hashes + m))
            codes[:, m] = torch.where(is_seen, found, codes[:, m])
        return codes
