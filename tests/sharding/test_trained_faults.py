"""What no row takes: gradients that are no numbers, an error on all ranks with the next batch; blends; any, frozen."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.sharding.test_trained import draw, loss_of, marked_model, sharded_model, sharded_of
from torchrec_compress import native_parameters


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


def frozen_or_blended(change: str) -> str | bool:
    """Return what sharding says of rows that are blends, or whether a step leaves rows alone that do not train."""
    model = marked_model("bags")
    if change == "frozen":
        for parameter in native_parameters(model):
            parameter.requires_grad_(False)
    else:
        bank = model.embeddings.trained.banks["user"]
        bank.rows.copy_(bank.rows // 2)
    try:
        sharded = sharded_of(model, "row_wise")
    except ValueError as error:
        return str(error)
    banks = sharded.module.embeddings.trained.banks.values()
    before = [table.rows.clone() for table in banks]
    for step in range(2):
        loss_of(sharded, draw("plain", step, dist.get_rank(), False)).backward()
    return all(torch.equal(table.rows, old) and not table.state.any() for table, old in zip(banks, before, strict=True))


def test_rows_that_do_not_train_stay_as_they_are(two_ranks):
    assert two_ranks.run(frozen_or_blended, "frozen") == [True, True]


def test_blends_are_refused_before_they_are_sharded(two_ranks):
    for told in two_ranks.run(frozen_or_blended, "blended"):
        assert "table 'user': rows of 8 bits must be as training, a fit or a checkpoint made them" in told


def blended_on_one_rank() -> str:
    """Return what the next look-up says on this rank, after rows of the last one became blends."""
    sharded = sharded_model("row_wise", "bags")
    if dist.get_rank() == 1:
        bank = sharded.module.embeddings.trained.banks["user"]
        bank.rows.copy_(bank.rows // 2)
    try:
        sharded(draw("plain", 0, dist.get_rank(), False))
    except ValueError as error:
        return str(error)
    return ""


def test_blends_of_one_rank_are_refused_on_all(two_ranks):
    for told in two_ranks.run(blended_on_one_rank):
        assert "table 'user': rows of 8 bits must be as training, a fit or a checkpoint made them" in told
