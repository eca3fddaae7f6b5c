"""Graph codes: pairs, or a sketch of a stream of them, become codes; wrong ones are named errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cases import NUM_ROWS, contexts, counts, rows, table
from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.conversion.memory import needed
from torchrec_compress.methods import GraphCodesConfig, QuantileCodesConfig, RandomCodesConfig, TableData
from torchrec_compress.ops import unpack_codes

CONFIG = GraphCodesConfig(num_codes=4, codebook_size=16)


def codes(state) -> Tensor:
    return unpack_codes(state.codes, CONFIG.num_codes).long()


def test_ids_of_a_cluster_share_their_first_codes_alone_and_others_keep_those_of_the_start():
    ids, others = torch.tensor([1, 1, 2, 2, 3, 4]), torch.tensor([70, 80, 80, 70, 90, 90])
    config = GraphCodesConfig(num_codes=4, codebook_size=2, num_clusterings=1)
    state = config.fit(table(), TableData(None, contexts=(ids, others), seed=0))
    found = unpack_codes(state.codes, 4).long()
    assert found[1, 0] == found[2, 0] != found[3, 0] == found[4, 0]
    assert found[1, 1] != found[2, 1] and found[3, 1] != found[4, 1]
    random = RandomCodesConfig(num_codes=4, codebook_size=2).fit(table(), TableData(rows()))
    unseen = torch.ones(NUM_ROWS, dtype=torch.bool).index_fill_(0, torch.tensor([1, 2, 3, 4]), False)
    assert torch.equal(found[unseen], unpack_codes(random.codes, 4).long()[unseen])


def test_counts_share_clusters_out_by_look_ups():
    seen = counts().clamp(min=1)
    without = CONFIG.fit(table(), TableData(None, contexts=contexts()))
    uniform = CONFIG.fit(table(), TableData(None, torch.full_like(seen, 7), contexts=contexts()))
    steep = CONFIG.fit(table(), TableData(None, seen, contexts=contexts()))
    assert torch.equal(without.codes, uniform.codes) and not torch.equal(without.codes, steep.codes)
    looked_up = [torch.zeros(16).index_add_(0, codes(each)[:, 0], seen.float()) for each in (without, steep)]
    assert looked_up[1].max() < looked_up[0].max() and looked_up[1].min() > looked_up[0].min()


def test_more_codes_may_be_clusters():
    data = TableData(None, contexts=contexts(), seed=0)
    one, two = (GraphCodesConfig(num_codes=4, codebook_size=16, num_clusterings=number) for number in (1, 2))
    first, second = codes(one.fit(table(), data)), codes(two.fit(table(), data))
    assert torch.equal(first[:, 0], second[:, 0]) and not torch.equal(first[:, 1], second[:, 1])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_clusterings": 0}, r"num_clusterings must be in \[1, 4\] \(its codes\), got 0"),
        ({"num_clusterings": 5}, r"num_clusterings must be in \[1, 4\] \(its codes\), got 5"),
        ({"num_contexts": 0}, "num_contexts must be at least 1, got 0"),
        ({"codebook_size": 404}, r"codebook_size must be in \[2, 403\] \(its rows\), got 404"),
        ({"num_codes": 3}, "embedding_dim must be a multiple of num_codes = 3"),
        ({"num_coded": 50}, "graph"),
        ({"codebook_dtype": "int8"}, "codebook_dtype must be 'fp32' with 'graph'"),
    ],
)
def test_sizes_that_cannot_work(changes, told):
    config = GraphCodesConfig(**{"num_codes": 4, "codebook_size": 16, **changes})
    for use in (lambda: config.check(table()), lambda: config.sketch(table(), 0)):
        with pytest.raises(ValueError, match=f"table 'item': .*{told}"):
            use()


def test_a_conversion_counts_what_the_sketch_and_its_edges_take():
    big, small = GraphCodesConfig(num_codes=4, num_contexts=3), QuantileCodesConfig(num_codes=4)
    item = table(num_embeddings=10**6)
    made = CompressedEmbeddingBagCollection([item], torch.device("meta"), compression=big, will_fit=True)
    assert needed(item, big, made, has_contexts=5) - needed(item, small, made, has_contexts=5) == 194 * 3 * 10**6
    assert CONFIG.sketch(table(), 0).kept.nbytes == 4 * 32 * NUM_ROWS
