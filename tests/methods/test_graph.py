"""Graph codes: pairs, or a sketch of a stream of them, become codes; wrong ones are named errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cases import NUM_ROWS, contexts, counts, dense_collection, fresh, rows, table
from torchrec_compress import CompressedEmbeddingBagCollection, compress, compress_into
from torchrec_compress.conversion.memory import needed
from torchrec_compress.fit import GraphSketch
from torchrec_compress.methods import GraphCodesConfig, LMAConfig, QuantileCodesConfig, RandomCodesConfig, TableData
from torchrec_compress.ops import unpack_codes

CONFIG = GraphCodesConfig(num_codes=4, codebook_size=16)


def streamed(config: GraphCodesConfig, seed: int = 0, size: int = 100) -> GraphSketch:
    sketch = config.sketch(table(), seed)
    for ids, others in zip(*(part.split(size) for part in contexts()), strict=True):
        sketch.add(ids, others)
    return sketch


def codes(state) -> Tensor:
    return unpack_codes(state.codes, CONFIG.num_codes).long()


@pytest.mark.parametrize("given", [None, rows()], ids=["alone", "rows"])
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        GraphCodesConfig(num_codes=2, codebook_size=300, structure="residual", num_contexts=5),
        GraphCodesConfig(num_codes=2, codebook_size=32, width=4, num_clusterings=2),
    ],
)
def test_a_stream_is_fitted_as_all_pairs_at_once(config, given):
    whole = config.fit(table(), TableData(given, contexts=contexts(), seed=3))
    parts = config.fit(table(), TableData(given, contexts=streamed(config, seed=3), seed=3))
    assert torch.equal(whole.codes, parts.codes) and whole.decoder.keys() == parts.decoder.keys()
    for name, value in whole.decoder.items():
        assert torch.equal(value, parts.decoder[name]), name


def test_a_collection_takes_a_sketch_and_trains_from_it():
    made = fresh(CONFIG, seed=5)
    compress_into(made, {}, contexts={"item": streamed(CONFIG, seed=5)})
    alone = CONFIG.fit(table(), TableData(None, contexts=contexts(), seed=5))
    assert torch.equal(made.table_state("item").codes, alone.codes)
    made.table_rows("item", torch.arange(9)).sum().backward()
    assert made.decoder.banks["item"].codebooks.grad.abs().sum() > 0
    fitted = compress(dense_collection(), CONFIG, contexts={"item": streamed(CONFIG)})
    assert isinstance(fitted, CompressedEmbeddingBagCollection)
    error = (fitted.table_rows("item", torch.arange(NUM_ROWS)) - rows()).square().mean()
    assert error < rows().square().mean()


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


def test_tables_of_other_names_and_seeds_have_other_codes():
    data = TableData(None, contexts=contexts(), seed=0)
    first = CONFIG.fit(table(), data)
    assert torch.equal(first.codes, CONFIG.fit(table(), data).codes)
    for other in (
        CONFIG.fit(table(name="other"), data),
        CONFIG.fit(table(), TableData(None, contexts=contexts(), seed=1)),
    ):
        assert (codes(first) == codes(other)).float().mean() < 0.15


EMPTY = torch.empty(0, dtype=torch.int64)
WRONG = {
    "no pair": (CONFIG.sketch(table(), 0), "contexts' sketch must have seen a pair, got none; add pairs before"),
    "other seed": (streamed(CONFIG, seed=1), "contexts' sketch must have salt = .*; make it by sketch.* and seed 0"),
    "other bound": (
        streamed(GraphCodesConfig(num_codes=4, codebook_size=16, num_contexts=9)),
        "contexts' sketch must have num_contexts = 32, got 9",
    ),
    "other rows": (GraphSketch(9, 4, 0), "contexts' sketch must have num_rows = 403, got 9"),
    "another method's": (LMAConfig(num_codes=4).sketch(table(), 0), "contexts must be two vectors, .* MinHashSketch"),
    "nothing": (None, "graph codes must come with contexts, got none; pass contexts="),
    "empty": ((EMPTY, EMPTY), "contexts must be vectors of one length above 0"),
    "ids outside": ((torch.tensor([403]), torch.tensor([0])), r"contexts' ids must be in \[0, 403\), got 403"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_contexts_are_named_before_the_first_fit(kind):
    given, told = WRONG[kind]
    with pytest.raises(ValueError, match=f"table 'item': {told}"):
        CONFIG.fit(table(), TableData(None, contexts=given))
    made = fresh(CONFIG)
    with pytest.raises(ValueError, match=f"table 'item': {told}"):
        compress_into(made, {}, contexts={} if given is None else {"item": given})


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


def test_hot_rows_are_set_apart():
    config = GraphCodesConfig(num_codes=4, codebook_size=16, num_hot_rows=20, hot_dtype="fp32")
    made = compress(dense_collection(), config, counts={"item": counts()}, contexts={"item": streamed(config)})
    hot = counts().argsort(descending=True, stable=True)[:20]
    torch.testing.assert_close(made.table_rows("item", hot), rows()[hot])
