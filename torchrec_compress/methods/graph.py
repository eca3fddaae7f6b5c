"""Graph codes: clusters of the graph of ids and what they occur with (GraphHash, arXiv 2412.17245)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.codes import HashEncoder, SeenEncoder
from torchrec_compress.fit.graph import EDGE_BYTES, GraphSketch, learn_graph_codes
from torchrec_compress.methods.base import register
from torchrec_compress.methods.context_codes import SketchedCodesConfig
from torchrec_compress.ops import stable_salt


@register
@dataclass(frozen=True, kw_only=True)
class GraphCodesConfig(SketchedCodesConfig):
    """Ids of one cluster of the graph of ids and contexts share a codeword; the other codes tell them apart.

    Clusters are of most modularity, and of equally many look-ups each (without counts: of ids), so that no codeword is
    left over and none is crowded, which BACO (arXiv 2604.18351) asks for. GraphHash stores one row for a cluster, or a
    hashed row beside it; here a row has M codes, of which the first are clusters and the others differ within them
    where they can. Pairs are a stream, of which 4 C N bytes are kept until codes are made: give `compress` all of them,
    or a sketch that they were added to. Codebooks are then trained with the model; where a pre-trained table is at hand
    as well, it starts them. Bytes: see `CodebookConfig`.

    Args:
        num_clusterings: codes that are clusters, of 1 to M; each breaks ties its own way, so that they differ somewhat.
            Where all codes are clusters, ids of one are told apart by nothing else.
        num_contexts: contexts of an id that are kept, C: those of the least hashes, one hash for all ids.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingBagConfig
        >>> table = EmbeddingBagConfig(name="item", num_embeddings=1000, embedding_dim=16, feature_names=["item"])
        >>> sketch = GraphCodesConfig(num_codes=4).sketch(table, seed=0)
        >>> sketch.add(torch.tensor([3, 7]), torch.tensor([11, 11]))  # batch by batch, then contexts={"item": sketch}
        >>> sketch.kept.shape
        torch.Size([1000, 32])
    """

    method: ClassVar[str] = "graph"
    sketch_type: ClassVar[type[GraphSketch]] = GraphSketch
    num_clusterings: int = 1
    num_contexts: int = 32

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError for clusterings that are no codes, and for a graph without edges, too."""
        super().check(table)
        where = f"table {table.name!r}"
        if not 1 <= self.num_clusterings <= self.num_codes:
            raise ValueError(
                f"{where}: num_clusterings must be in [1, {self.num_codes}] (its codes), got {self.num_clusterings}; "
                "for codes of no cluster choose the method random"
            )
        if self.num_contexts < 1:
            raise ValueError(
                f"{where}: num_contexts must be at least 1, got {self.num_contexts}; the more, the more of the graph "
                "is clustered"
            )

    def sketch_bytes(self, table: BaseEmbeddingConfig) -> int:
        """Return 4 bytes a context of every id, and what clustering takes of as many edges."""
        return (4 + EDGE_BYTES) * table.num_embeddings * self.num_contexts

    def sketch_sizes(self, table: BaseEmbeddingConfig, seed: int) -> dict[str, int]:
        """Return rows, contexts of each and salt."""
        sizes = {"num_rows": table.num_embeddings, "num_contexts": self.num_contexts}
        return {**sizes, "salt": stable_salt(seed, table.name)}

    def encoder_of(self, sketch: GraphSketch, counts: Tensor | None) -> SeenEncoder:
        """Cluster the graph; ids of no pair keep their start codes."""
        others = HashEncoder(self.num_codes, self.codebook_size, sketch.salt, self.first_size)
        return learn_graph_codes(sketch, others, self.num_clusterings, counts)
