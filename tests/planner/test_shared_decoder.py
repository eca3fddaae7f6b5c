"""Plans of projections that several tables have together: counted once."""

from dataclasses import replace

import pytest
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

from tests.planner.plans import BATCH, DIM, RANKS, model, options, topology
from torchrec_compress.methods import NarrowConfig, PQConfig
from torchrec_compress.planner import EmbeddingShardingPlanner

SHARED = NarrowConfig(width=16, shared="kind")
METHODS = {"a": SHARED, "b": replace(SHARED, bits=8), "c": SHARED, "own": PQConfig(num_codes=4, codebook_size=16)}
WEIGHTS = 4 * 16 * DIM
STOCK = [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()]


@pytest.mark.parametrize("pooled", [True, False])
def test_it_is_one_tensor_of_the_planner(pooled):
    names = {name for name, _, _ in options(model(METHODS, pooled=pooled))}
    assert {name for name in names if "projection" in name} == {"decoder.kind.projection"}


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("sharders", [None, STOCK], ids=["ours", "TorchRec's"])
def test_the_report_is_the_footprint_and_counts_it_once(pooled, sharders):
    of = model(METHODS, pooled=pooled)
    planner = EmbeddingShardingPlanner(topology(), BATCH, stats=[])
    planner.plan(of, sharders)
    report, real = planner.report, of.sparse.footprint()
    assert list(report.tables) == [*METHODS]
    assert {name: table.stored_bytes for name, table in report.tables.items()} == {
        name: table.total_bytes for name, table in real.tables.items()
    }
    if sharders is None:
        assert sum(report.tables[name].stored("decoder") for name in "abc") == WEIGHTS
        codebooks = report.tables["own"].stored("decoder")
        assert [rank.decoder_bytes for rank in report.ranks] == [WEIGHTS + codebooks] * RANKS
        # Adam's two moments and its gradient, on every rank, once
        assert sum(
            part.optimizer_bytes for name in "abc" for part in report.tables[name].parts if part.kind == "decoder"
        ) == pytest.approx(2 * WEIGHTS * RANKS, abs=8 * RANKS)


def test_each_table_is_charged_the_embeddings_that_it_makes():
    """As much as with projections of their own: those are no fewer."""
    alone = {name: replace(method, shared=None) if name != "own" else method for name, method in METHODS.items()}
    decoded = []
    for methods in (METHODS, alone):
        planner = EmbeddingShardingPlanner(topology(), BATCH, stats=[])
        planner.plan(model(methods))
        decoded.append([planner.report.tables[name].decoded_bytes for name in methods])
    assert decoded[0] == decoded[1] and all(decoded[0][:3])
