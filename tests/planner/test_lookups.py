"""Ids and bags of a step, and the bytes of decoding them, worked out by hand."""

import pytest
from torchrec import EmbeddingBagConfig, EmbeddingConfig
from torchrec.distributed.planner import ParameterConstraints

from torchrec_compress.planner.lookups import Lookups, decoded_bytes

# two features: 2 bags of 3 ids for each of 10 examples, and 1 bag of 0.5 ids for each of 7
WISH = {"t": ParameterConstraints(pooling_factors=[3.0, 0.5], num_poolings=[2.0, 1.0], batch_sizes=[10, 7])}
FOUND = Lookups.of("t", WISH, 512)


def test_ids_and_bags_are_those_of_every_feature():
    assert Lookups([3.0, 0.5], [2.0, 1.0], [10, 7]) == FOUND
    assert (FOUND.num_ids, FOUND.num_bags) == (64, 27)  # 60 and 3.5, rounded up
    assert Lookups.of("other", WISH, 512) == Lookups.of("t", None, 512) == Lookups([1.0], [1.0], [512])
    assert (FOUND.unpooled().num_ids, FOUND.unpooled().num_bags) == (64, 64)
    assert (FOUND.scaled(4, 1).num_ids, FOUND.scaled(4, 1).num_bags) == (254, 27)
    assert (FOUND.scaled(1, 4).num_ids, FOUND.scaled(1, 4).num_bags) == (254, 108)


@pytest.mark.parametrize("makes_rows", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_decoded_bytes_are_floats_of_bags_and_where_they_are_made_of_rows(pooled, makes_rows):
    kind = EmbeddingBagConfig if pooled else EmbeddingConfig
    table = kind(name="t", num_embeddings=9, embedding_dim=16, feature_names=["a", "b"])
    rows = (27 if pooled else 0) + (64 if makes_rows or not pooled else 0)
    assert decoded_bytes(table, FOUND, makes_rows) == 4 * 16 * rows
    narrow = 4 * 64 * (16 - 4) if pooled and makes_rows else 0  # rows of 4 numbers before a projection
    assert decoded_bytes(table, FOUND, makes_rows, row_width=4) == 4 * 16 * rows - narrow
