"""CCE: pointers that are learned by clustering while the table trains (Tsang and Ahle, NeurIPS 2023, 2210.05974)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.clustered import ResidualSums
from torchrec_compress.fit.codes import decode
from torchrec_compress.fit.product import ProductEncoder, learn_product
from torchrec_compress.managers import Clustering, drawn_codes, sum_of_halves
from torchrec_compress.methods.base import (
    MethodConfig,
    TableData,
    TableDecoder,
    TableState,
    init_like,
    register,
    spread,
)
from torchrec_compress.methods.learned import Learned
from torchrec_compress.methods.storage import CodePart, Parts
from torchrec_compress.ops import Rows, code_dtype, codebook_bag, hash_codes, stable_salt

_STATE_BYTES = 16  # the salt, and how often hashes were drawn
# of the salt: so few bits that averages of buffers in float32, rounded, leave it alone, as they leave codes
_SALT_BITS = 20


@register
@dataclass(frozen=True, kw_only=True)
class CceConfig(MethodConfig):
    """Store M pointers per id; each slice of a row is the codeword of a pointer plus one that a hash of the id picks.

    It is trained from the start, with a call of `torchrec_compress.after_step(model, step, optimizer)` after every step
    of the optimizers. Every `cluster_every` steps the vectors that ids are served are clustered: pointers become the
    nearest centroids, the hash is drawn anew, and its codewords keep the mean of what the centroids leave.

    Bytes: N M (one byte per pointer up to K = 256, two up to 32,768) + 8 K D + 16.

    Args:
        num_codes: pointers per id, M.
        codebook_size: codewords of each slice that pointers pick, and of those that the hash picks, K.
        cluster_every: steps from one clustering to the next.
        cluster_until: no clustering after so many steps, so that what was clustered last can be trained.
        optimizer_state: what a clustering leaves of the optimizer's state of the codewords: "reset", zeros; or "mean",
            for each the mean of its codebook.

    Example:
        >>> CceConfig(num_codes=2).to_dict()["codebook_size"]
        256
    """

    method: ClassVar[str] = "cce"
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "nothing"
    new_ids: ClassVar[str] = "its hashed pointers, then those of its like"
    learns_from: ClassVar[Literal["nothing", "sample", "all"]] = "sample"
    num_codes: int
    codebook_size: int = 256
    cluster_every: int = 1000
    cluster_until: int = 6000
    optimizer_state: Literal["mean", "reset"] = "reset"

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError when pointers and codewords do not fit the table, or steps are no steps."""
        super().check(table)
        where = f"table {table.name!r}"
        if self.num_codes < 1 or table.embedding_dim % self.num_codes:
            raise ValueError(
                f"{where}: num_codes must be a divisor of embedding_dim = {table.embedding_dim}, got {self.num_codes}"
            )
        if not 2 <= self.codebook_size <= table.num_embeddings:
            raise ValueError(
                f"{where}: codebook_size must be in [2, {table.num_embeddings}] (its rows), got {self.codebook_size}; "
                "choose fewer codewords, or leave the table dense"
            )
        if self.cluster_every < 1 or self.cluster_until < 0:
            raise ValueError(
                f"{where}: cluster_every must be at least 1 and cluster_until at least 0, got {self.cluster_every} and "
                f"{self.cluster_until}"
            )
        if self.optimizer_state not in ("mean", "reset"):
            raise ValueError(f"{where}: optimizer_state must be 'mean' or 'reset', got {self.optimizer_state!r}")

    @property
    def uses_counts(self) -> bool:
        """Whether look-ups per id matter: to a fit."""
        return True

    @property
    def codewords(self) -> int:
        """Codewords that a pointer picks from, K."""
        return self.codebook_size

    @property
    def codewords_per_id(self) -> int:
        """Codewords that a row is made of: one by pointer and one by hash in each slice."""
        return 2 * self.num_codes

    def fits(self, table: BaseEmbeddingConfig) -> bool:
        """Return whether there are rows enough for the codewords of a slice."""
        return self.codebook_size <= table.num_embeddings

    def smaller(self, level: int) -> CceConfig | None:
        """Return the same with half the codewords, a quarter, and so on."""
        size = self.codebook_size >> (level + 1)
        return replace(self, codebook_size=size) if size >= 2 else None

    def resized(self, table: BaseEmbeddingConfig) -> Iterator[MethodConfig]:
        """Yield the same with any number of pointers and codewords."""
        lengths = [number for number in range(1, table.embedding_dim + 1) if table.embedding_dim % number == 0]
        sizes = [size for size in spread(min(table.num_embeddings, 32768)) if size > 1]
        return (replace(self, num_codes=number, codebook_size=size) for number in lengths for size in sizes)

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the table of pointers, which start as hashes, and what clusters them."""
        manager = Clustering(
            self.num_codes, self.codebook_size, self.cluster_every, self.cluster_until, self.optimizer_state
        )
        start = partial(_start, config=self, salt=stable_salt(seed, table.name))
        return Parts(codes=CodePart(self.num_codes, code_dtype(self.codebook_size), start, manager=manager))

    def decoder(self, table: BaseEmbeddingConfig, device: torch.device | None) -> CceDecoder:
        """Return the codewords."""
        return CceDecoder(self, table, device)

    def decoder_bytes(self, table: BaseEmbeddingConfig) -> int:
        """Return the bytes of both kinds of codewords, and of what the hash is drawn from."""
        return 8 * self.codebook_size * table.embedding_dim + _STATE_BYTES

    def learn(self, table: BaseEmbeddingConfig, data: TableData) -> ClusteredTable:
        """Cluster the rows, or a sample of them, by look-ups where they are known."""
        self.check_fit(table, data)
        weights, rows = self.learning_weights(table, data), data.trained_rows(table)
        encoder, codebooks = learn_product(
            rows, self.num_codes, self.codebook_size, weights=data.row_weights(weights), seed=data.seed
        )
        return ClusteredTable(self, table, encoder, codebooks, weights)


def _start(ids: Tensor, config: CceConfig, salt: int) -> Tensor:
    return hash_codes(ids, config.num_codes, config.codebook_size, salt).to(code_dtype(config.codebook_size))


def _draw(table: BaseEmbeddingConfig) -> Tensor:
    """Return what the first hash is drawn from, (1, 2) int64, see `drawn_codes`: of the table's name, not of a seed.

    It is stored, so that a table may be loaded under any other name or seed.
    """
    return torch.tensor([[stable_salt(0, f"{table.name}:hashed") % 2**_SALT_BITS, 0]])


class ClusteredTable(Learned):
    """Point rows at the nearest centroids, and leave the mean of the rest to the hash.

    Args:
        config: the method.
        table: the user's config.
        encoder: the centroids of every slice.
        codebooks: the same, (M * K, D / M) float32.
        weights: (N,) float32, of every id.
    """

    def __init__(
        self,
        config: CceConfig,
        table: BaseEmbeddingConfig,
        encoder: ProductEncoder,
        codebooks: Tensor,
        weights: Tensor,
    ) -> None:
        super().__init__(table)
        self._config, self._encoder, self._codebooks = config, encoder, codebooks
        self._weights, self._draw = weights, _draw(table)
        self._residuals = ResidualSums(config.num_codes, config.codebook_size, codebooks.shape[1])

    def _encode(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        assert rows is not None
        config, codes = self._config, self._encoder(ids, rows)
        left = rows - decode(codes, self._codebooks, "product")
        self._residuals.add(
            left, drawn_codes(ids, self._draw, config.num_codes, config.codebook_size), self._weights[ids]
        )
        return codes.to(code_dtype(config.codebook_size))

    def _sums(self) -> list[Tensor]:
        """Return the sums of what pointers leave."""
        return [self._residuals.sums, self._residuals.masses]

    def _finish(self) -> TableState:
        """Return the codewords."""
        return TableState(
            decoder={"codebooks": torch.cat([self._codebooks, self._residuals.means()]), "draw": self._draw}
        )


class CceDecoder(TableDecoder):
    """The codewords of pointers and of the hash.

    Attributes:
        codebooks: parameter, (2 M * K, D / M) float32: M codebooks that pointers pick from, M that hashes pick from.
        draw: buffer, (1, 2) int64: the salt of the table's hashes, and how often they were drawn anew.
    """

    def __init__(self, config: CceConfig, table: BaseEmbeddingConfig, device: torch.device | None) -> None:
        super().__init__()
        self._config, self._table = config, table
        shape = (2 * config.num_codes * config.codebook_size, table.embedding_dim // config.num_codes)
        self.codebooks = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))
        self.register_buffer("draw", torch.zeros(1, 2, dtype=torch.int64, device=device))
        self.draw: Tensor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise codewords so that a sum of two has the spread of the user's table, and draw the first hash."""
        if self.codebooks.is_meta:
            return
        with torch.no_grad():
            init_like(self._table, self.codebooks)
            self.codebooks /= 2**0.5
            self.draw.copy_(_draw(self._table))

    def forward(
        self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, codes: Tensor | None, rows: list[Rows]
    ) -> Tensor:
        """Return the sums over bags; `codes` are pointers, (L, M)."""
        assert codes is not None
        return pool_clustered(ids, offsets, weights, codes, self.codebooks, self.draw, self._config.codebook_size)


@torch.fx.wrap
def pool_clustered(
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    codes: Tensor,
    codebooks: Tensor,
    draw: Tensor,
    codebook_size: int,
) -> Tensor:
    """Return the sums over bags, (B, D); arguments as in `CceDecoder`."""
    hashes = drawn_codes(ids, draw, codes.shape[1], codebook_size).to(codes.dtype)
    both = codebook_bag(torch.cat([codes, hashes], dim=1), codebooks, offsets, weights=weights, where="cce")
    return sum_of_halves(both)
