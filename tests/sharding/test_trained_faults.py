"""Gradients that no row takes: an error on all ranks, with the next batch, and no byte is written."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.sharding.test_trained import draw, loss_of, sharded_model


def poisoned(how: str) -> tuple[list[str], bool]:
    """Return what the next batches say on this rank after gradients that are NaN, and whether rows stayed."""
    sharded = sharded_model(how, "bags")
    features = draw("plain", 0, 0, False)
    banks = sharded.module.embeddings.trained.banks.values()
    before = [torch.cat([table.rows, table.state], 1) for table in banks]
    loss = loss_of(sharded, features)
    (loss * (float("nan") if dist.get_rank() == 0 else 0.0)).backward()
    after = [torch.cat([table.rows, table.state], 1) for table in banks]
    is_same = all(map(torch.equal, before, after))
    told = []
    for _ in range(4):
        try:
            sharded(features)
        except ValueError as error:
            told.append(str(error))
    return told, is_same


@pytest.mark.parametrize("how", ["row_wise", "table_wise"])
def test_gradients_that_are_not_finite_are_an_error_on_all_ranks(two_ranks, how):
    results = two_ranks.run(poisoned, how)
    for told, is_same in results:
        assert is_same
        # every table, one after another; then batches are looked up again
        assert 1 <= len(told) <= 3 and len(told) == len(results[0][0])
        assert all("must be finite at step 0, got NaN or infinity; nothing has been updated" in text for text in told)
    # where a table lies on one rank, the other one quotes it
    assert how == "row_wise" or any(text.startswith("rank ") for told, _ in results for text in told)
