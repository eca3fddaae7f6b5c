"""LMA: codes by min-hash of what ids occur with (Desai et al., arXiv 2103.06124, "Semantically constrained memory")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.codes import HashEncoder
from torchrec_compress.fit.minhash import MinHashEncoder, MinHashSketch
from torchrec_compress.methods.base import register
from torchrec_compress.methods.context_codes import SketchedCodesConfig
from torchrec_compress.ops import stable_salt


@register
@dataclass(frozen=True, kw_only=True)
class LMAConfig(SketchedCodesConfig):
    """Ids share a codeword with the probability of their Jaccard similarity: of the sets that they occurred with.

    Of J > 0 it is J^p + (1 - J^p) / K for each code, of ids that have nothing in common 1 / K, as of random codes. The
    paper places each number of a row so in one array; here codewords take the place of numbers, and the array's is
    taken by M codebooks. Pairs are a stream, of which 4 M p bytes an id are kept until codes are made: give `compress`
    all of them, or a sketch that they were added to. Codebooks are then trained with the model; where a pre-trained
    table is at hand as well, it starts them. Bytes: see `CodebookConfig`.

    Args:
        hashes_per_code: min-hashes that a code is made of, p: the more, the more alike ids must be to share it.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingBagConfig
        >>> table = EmbeddingBagConfig(name="item", num_embeddings=1000, embedding_dim=16, feature_names=["item"])
        >>> sketch = LMAConfig(num_codes=4).sketch(table, seed=0)
        >>> sketch.add(torch.tensor([3, 7]), torch.tensor([11, 11]))  # batch by batch, then contexts={"item": sketch}
        >>> sketch.minima.shape
        torch.Size([1000, 4])
    """

    method: ClassVar[str] = "lma"
    sketch_type: ClassVar[type[MinHashSketch]] = MinHashSketch
    hashes_per_code: int = 1

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError for codes of no hash, too."""
        super().check(table)
        if self.hashes_per_code < 1:
            raise ValueError(
                f"table {table.name!r}: hashes_per_code must be at least 1, got {self.hashes_per_code}; choose more "
                "for codes that fewer ids share"
            )

    def sketch_bytes(self, table: BaseEmbeddingConfig) -> int:
        """Return 4 bytes a hash of every id."""
        return 4 * table.num_embeddings * self.num_codes * self.hashes_per_code

    def sketch_sizes(self, table: BaseEmbeddingConfig, seed: int) -> dict[str, int]:
        """Return rows, hashes and salt."""
        num_hashes = self.num_codes * self.hashes_per_code
        return {"num_rows": table.num_embeddings, "num_hashes": num_hashes, "salt": stable_salt(seed, table.name)}

    def encoder_of(self, sketch: MinHashSketch, counts: Tensor | None) -> MinHashEncoder:
        """Hash the minima; ids of no pair keep their start codes."""
        others = HashEncoder(self.num_codes, self.codebook_size, sketch.salt, self.first_size)
        return MinHashEncoder(sketch, others)
