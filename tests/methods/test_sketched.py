"""What codes of contexts that a sketch keeps have in common: a stream of pairs is as good as all of them at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import NUM_ROWS, contexts, counts, dense_collection, fresh, rows, table
from torchrec_compress import CompressedEmbeddingBagCollection, compress, compress_into
from torchrec_compress.fit import GraphSketch, MinHashSketch
from torchrec_compress.methods import GraphCodesConfig, LMAConfig, MethodConfig, QuantileCodesConfig, TableData
from torchrec_compress.ops import unpack_codes

LMA, GRAPH = LMAConfig(num_codes=4, codebook_size=16), GraphCodesConfig(num_codes=4, codebook_size=16)
METHODS = {"lma": LMA, "graph": GRAPH}
EMPTY = torch.empty(0, dtype=torch.int64)
every = pytest.mark.parametrize("method", METHODS)


def streamed(config: Any, seed: int = 0, size: int = 100) -> Any:
    sketch = config.sketch(table(), seed)
    for ids, others in zip(*(part.split(size) for part in contexts()), strict=True):
        sketch.add(ids, others)
    return sketch


def codes(config: MethodConfig, data: TableData, name: str = "item") -> Tensor:
    found = config.fit(table(name=name), data).codes
    assert found is not None
    return unpack_codes(found, 4).long()


@pytest.mark.parametrize("given", [None, rows()], ids=["alone", "rows"])
@pytest.mark.parametrize(
    "config",
    [
        LMA,
        LMAConfig(num_codes=2, codebook_size=300, structure="residual", hashes_per_code=3),
        LMAConfig(num_codes=2, codebook_size=32, width=4),
        GRAPH,
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


@every
def test_a_collection_takes_a_sketch_and_trains_from_it(method):
    config, made = METHODS[method], fresh(METHODS[method], seed=5)
    compress_into(made, {}, contexts={"item": streamed(config, seed=5)})
    alone = config.fit(table(), TableData(None, contexts=contexts(), seed=5))
    assert torch.equal(made.table_state("item").codes, alone.codes)
    made.table_rows("item", torch.arange(9)).sum().backward()
    assert made.decoder.banks["item"].codebooks.grad.abs().sum() > 0
    fitted = compress(dense_collection(), config, contexts={"item": streamed(config)})
    assert isinstance(fitted, CompressedEmbeddingBagCollection)
    error = (fitted.table_rows("item", torch.arange(NUM_ROWS)) - rows()).square().mean()
    assert error < rows().square().mean()


@every
def test_tables_of_other_names_and_seeds_have_other_codes(method):
    config, data = METHODS[method], TableData(None, contexts=contexts(), seed=0)
    first = codes(config, data)
    assert torch.equal(first, codes(config, data))
    for other in (
        codes(config, data, name="other"),
        codes(config, TableData(None, contexts=contexts(), seed=1)),
    ):
        assert (first == other).float().mean() < 0.15


@every
def test_hot_rows_are_set_apart(method):
    config = type(METHODS[method])(num_codes=4, codebook_size=16, num_hot_rows=20, hot_dtype="fp32")
    made = compress(dense_collection(), config, counts={"item": counts()}, contexts={"item": streamed(config)})
    hot = counts().argsort(descending=True, stable=True)[:20]
    torch.testing.assert_close(made.table_rows("item", hot), rows()[hot])


@every
def test_errors_of_a_sketch_name_its_table(method):
    sketch: Any = METHODS[method].sketch(table(), 0)
    kept = sketch.minima if method == "lma" else sketch.kept
    for use in (
        lambda: sketch.add(torch.tensor([NUM_ROWS]), torch.tensor([0])),
        lambda: sketch.add(torch.tensor([1.5]), torch.tensor([0])),
        lambda: sketch.add([1], torch.tensor([0])),
        lambda: sketch.join(kept[1:]),
        lambda: sketch.join(kept.long()),
        lambda: sketch.join(sketch),
    ):
        with pytest.raises(ValueError, match=r"^table 'item': sketch: "):
            use()


WRONG = {
    "no pair": (
        {"lma": LMA.sketch(table(), 0), "graph": GRAPH.sketch(table(), 0)},
        "contexts' sketch must have seen a pair, got none; add pairs before",
    ),
    "other seed": (
        {"lma": streamed(LMA, seed=1), "graph": streamed(GRAPH, seed=1)},
        "contexts' sketch must have salt = .*; make it by sketch.* and seed 0",
    ),
    "other sizes": (
        {
            "lma": streamed(LMAConfig(num_codes=8, codebook_size=16)),
            "graph": streamed(GraphCodesConfig(num_codes=4, codebook_size=16, num_contexts=9)),
        },
        r"contexts' sketch must have num_(hashes = 4, got 8|contexts = 32, got 9)",
    ),
    "other rows": (
        {"lma": MinHashSketch(9, 4, 0), "graph": GraphSketch(9, 4, 0)},
        "contexts' sketch must have num_rows = 403, got 9",
    ),
    "another method's": (
        {"lma": GRAPH.sketch(table(), 0), "graph": LMA.sketch(table(), 0)},
        "contexts must be two vectors, .* (MinHashSketch|GraphSketch)",
    ),
    "nothing": ({}, "(lma|graph) codes must come with contexts, got none; pass contexts="),
    "empty": (dict.fromkeys(METHODS, (EMPTY, EMPTY)), "contexts must be vectors of one length above 0"),
    "ids outside": (
        dict.fromkeys(METHODS, (torch.tensor([403]), torch.tensor([0]))),
        r"contexts' ids must be in \[0, 403\), got 403",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
@every
def test_wrong_contexts_are_named_before_the_first_fit(method, kind):
    given, told = WRONG[kind][0].get(method), WRONG[kind][1]
    with pytest.raises(ValueError, match=f"table 'item': {told}"):
        METHODS[method].fit(table(), TableData(None, contexts=given))
    made = fresh(METHODS[method])
    with pytest.raises(ValueError, match=f"table 'item': {told}"):
        compress_into(made, {}, contexts={} if given is None else {"item": given})


@every
def test_a_sketch_is_of_methods_that_take_one(method):
    quantile = QuantileCodesConfig(num_codes=4, codebook_size=16)
    with pytest.raises(ValueError, match=r"contexts must be two vectors, \(ids, context ids\), got \w+Sketch"):
        compress(dense_collection(), quantile, contexts={"item": streamed(METHODS[method])})
    assert quantile.sketch(table(), 0) is None and quantile.sketch_bytes(table()) == 0
