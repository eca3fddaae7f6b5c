"""Tables that train otherwise than they are served (DPQ): what serves the rows that they were trained to."""

from __future__ import annotations

import torch

from torchrec_compress.convert.quantize import stored_by
from torchrec_compress.convert.rebuild import Compressed, check_source


@torch.no_grad()
def export_codes(collection: Compressed) -> Compressed:
    """Store tables as they are served once they were trained: those of method `dpq` as codes and codebooks of `pq`.

    Rows are the same to the bit, found by the same arithmetic on the device that the collection is on; sums over bags
    are added up in another order. All other tables stay as they are.

    Args:
        collection: unsharded; untouched, and nothing of it is shared with the result. The state dict of a sharded one
            has the same names, and loads into an unsharded one.

    Returns:
        A collection of the same kind, keys and widths.

    Raises:
        ValueError: `collection` is no compressed collection of values in float32, or is sharded.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> from torchrec_compress import CompressedEmbeddingBagCollection
        >>> from torchrec_compress.methods import DPQConfig
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=2000, embedding_dim=16, feature_names=["user"])
        >>> trained = CompressedEmbeddingBagCollection([table], compression=DPQConfig(num_codes=4, codebook_size=64))
        >>> served = export_codes(trained)
        >>> served.methods()["user"].method, trained.footprint().total_bytes, served.footprint().total_bytes
        ('pq', 132096, 12100)
        >>> torch.equal(trained.table_rows("user", torch.arange(9)), served.table_rows("user", torch.arange(9)))
        True
    """
    check_source("export_codes", collection)
    methods = collection.methods()
    return stored_by(collection, {name: each.exported() for name, each in methods.items() if each.exported() != each})
