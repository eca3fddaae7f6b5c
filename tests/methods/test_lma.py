"""LMA: pairs, or a sketch of a stream of them, become codes; wrong ones are named errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cases import NUM_ROWS, fresh, rows, table
from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.conversion.memory import needed
from torchrec_compress.methods import LMAConfig, QuantileCodesConfig, RandomCodesConfig, TableData
from torchrec_compress.ops import unpack_codes

CONFIG = LMAConfig(num_codes=4, codebook_size=16)


def codes(state) -> Tensor:
    return unpack_codes(state.codes, CONFIG.num_codes).long()


def test_ids_that_occurred_with_the_same_share_all_codes_and_others_keep_those_of_the_start():
    ids, others = torch.tensor([1, 1, 2, 2, 3]), torch.tensor([70, 80, 80, 70, 90])
    state = CONFIG.fit(table(), TableData(None, contexts=(ids, others), seed=0))
    found, start = codes(state), codes(RandomCodesConfig(num_codes=4, codebook_size=16).fit(table(), TableData(rows())))
    assert torch.equal(found[1], found[2]) and not torch.equal(found[1], found[3])
    unseen = torch.ones(NUM_ROWS, dtype=torch.bool).index_fill_(0, torch.tensor([1, 2, 3]), False)
    assert torch.equal(found[unseen], start[unseen])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hashes_per_code": 0}, "hashes_per_code must be at least 1, got 0"),
        ({"codebook_size": 1}, r"codebook_size must be in \[2, 403\]"),
        ({"num_codes": 3}, "embedding_dim must be a multiple of num_codes = 3"),
        ({"num_coded": 50}, "lma"),
        ({"codebook_dtype": "int8"}, "codebook_dtype must be 'fp32' with 'lma'"),
    ],
)
def test_sizes_that_cannot_work(changes, told):
    config = LMAConfig(**{"num_codes": 4, "codebook_size": 16, **changes})
    for use in (lambda: fresh(config), lambda: config.sketch(table(), 0)):
        with pytest.raises(ValueError, match=f"table 'item': .*{told}"):
            use()
    with pytest.raises(ValueError, match=r"table 'item': codebook_size must be in \[2, 403\] \(its rows\), got 404"):
        LMAConfig(num_codes=4, codebook_size=404).sketch(table(), 0)


def test_a_conversion_counts_what_the_sketch_takes():
    big, small = LMAConfig(num_codes=4, hashes_per_code=3), QuantileCodesConfig(num_codes=4)
    item = table(num_embeddings=10**6)
    made = CompressedEmbeddingBagCollection([item], torch.device("meta"), compression=big, will_fit=True)
    assert big.sketch_bytes(item) == 4 * 12 * 10**6
    assert needed(item, big, made, has_contexts=5) - needed(item, small, made, has_contexts=5) == 48 * 10**6
    assert CONFIG.sketch(table(), 0).minima.nbytes == CONFIG.sketch_bytes(table())
