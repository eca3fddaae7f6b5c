"""DLRM and a two-tower model, written as TorchRec's users write them, with the one-line swap."""

import pytest
import torch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

from tests.sharding.scripts import train, train_unsharded
from torchrec_compress import CompressedEmbeddingBagCollection, get_default_sharders
from torchrec_compress.methods import HashConfig, MEmComConfig, PQConfig

METHODS = {
    "pq": PQConfig(num_codes=4, codebook_size=16),
    "hash": HashConfig(num_buckets=30),
    "memcom": MEmComConfig(num_buckets=30),
}
STEPS = 4


def with_ours(script: str, method: str, device: str) -> dict:
    compression = METHODS[method]
    return train(script, CompressedEmbeddingBagCollection, compression, get_default_sharders(), device, STEPS)


def with_stock(script: str, method: str, device: str) -> dict:
    sharders = [EmbeddingBagCollectionSharder()]
    return train(script, CompressedEmbeddingBagCollection, METHODS[method], sharders, device, STEPS)


@pytest.mark.parametrize("script", ["dlrm", "two tower"])
@pytest.mark.parametrize("method", METHODS)
def test_the_swap_trains_as_one_process(two_ranks, script, method):
    """Built on the CPU, so that both start from the same values; the pipeline runs ahead of every part."""
    expected = train_unsharded(script, CompressedEmbeddingBagCollection, METHODS[method], STEPS)
    results = two_ranks.run(with_ours, script, method, "cpu")
    for rank, result in enumerate(results):
        wanted = [losses[rank] for losses in expected]
        torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(wanted), rtol=1e-5, atol=1e-5)
        assert not any("will NOT be pipelined" in line for line in result["log"])
        assert sum("will be pipelined" in line for line in result["log"]) >= (2 if script == "two tower" else 1)


@pytest.mark.parametrize("script", ["dlrm", "two tower"])
@pytest.mark.parametrize("method", METHODS)
def test_constraints_that_name_the_users_tables_reach_our_parts(two_ranks, script, method):
    """Built on the meta device, as large tables are."""
    first, second = two_ranks.run(with_ours, script, method, "meta")
    assert first["kinds"] == second["kinds"]
    parts = {name: kind for name, kind in first["kinds"].items() if name.split(".")[-1] in ("user", "shop")}
    assert len(parts) >= 2 and set(parts.values()) == {"table_wise"}
    replicated = {kind for name, kind in first["kinds"].items() if name.endswith("codebooks")}
    assert replicated <= {"data_parallel"} and bool(replicated) == (method == "pq")
    assert all(loss == loss for loss in first["losses"] + second["losses"])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("method", METHODS)
def test_stock_sharders_alone_are_right_with_a_warning(two_ranks, method, device):
    """Code tables stay whole on every rank; native tables are sharded by TorchRec, but not pipelined."""
    results = two_ranks.run(with_stock, "dlrm", method, device)
    for result in results:
        assert any("pass sharders=torchrec_compress.get_default_sharders()" in line for line in result["log"])
    if method == "pq":
        assert results[0]["trained"] == results[1]["trained"]
    if device == "cpu" and method == "pq":
        expected = train_unsharded("dlrm", CompressedEmbeddingBagCollection, METHODS[method], STEPS)
        for rank, result in enumerate(results):
            wanted = torch.tensor([losses[rank] for losses in expected])
            torch.testing.assert_close(torch.tensor(result["losses"]), wanted, rtol=1e-5, atol=1e-5)
