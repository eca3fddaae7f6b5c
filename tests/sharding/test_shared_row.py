"""Codes of some ids over many ranks: rows are found before they are asked for, and checkpoints bring the ids along."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tests.cases import NUM_ROWS, batch, fitted, table
from tests.sharding.models import Model, shard
from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.methods import PQConfig

SOME = PQConfig(num_codes=2, codebook_size=32, popularity="count", num_coded=90)
KINDS = ["row_wise", "table_wise", "data_parallel"]
FEATURES = batch([[number, (5 * number) % NUM_ROWS] for number in range(NUM_ROWS)])


def model_of(seed: int = 0, device: str = "cpu") -> Model:
    torch.manual_seed(0)
    made = CompressedEmbeddingBagCollection([table()], device=torch.device(device), compression=SOME, seed=seed)
    if device == "cpu":
        made.load_state_dict(fitted(SOME).state_dict())
    return Model(made)


def load(folder: str, how: str) -> torch.Tensor:
    sharded = shard(model_of(device="meta"), how)
    state = {"model": sharded.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    sharded.load_state_dict(state["model"])
    return sharded(FEATURES).detach()


@pytest.mark.parametrize("how", KINDS)
def test_a_checkpoint_serves_the_same_on_any_ranks(two_ranks, four_ranks, tmp_path, how):
    model = model_of()
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(tmp_path), no_dist=True)
    for ranks in (two_ranks, four_ranks):
        for found in ranks.run(load, str(tmp_path), how):
            assert torch.equal(found, model(FEATURES).detach())


def rows_asked(how: str) -> list[int]:
    """Return the rows that ranks hold of the code table, and how many are asked for when rare ids are looked up."""
    sharded = shard(model_of(), how)
    tables = sharded.module.embeddings.code_tables
    sharded(FEATURES)  # ranks have agreed on what they hold
    rows = tables.banks["item"].row_numbers(torch.arange(NUM_ROWS))
    rare = (rows == 0).nonzero().flatten().tolist()
    asked = tables.asked_by(tables.create_context(), batch([rare]))
    return [len(tables.banks["item"].codes), len(asked["item"]), len(rare)]


def test_rare_ids_ask_for_one_row(two_ranks):
    found = two_ranks.run(rows_asked, "row_wise")
    assert sum(held for held, _, _ in found) == 91
    assert all(asked == 1 and rare == NUM_ROWS - 90 for _, asked, rare in found)


def ask_beyond(how: str) -> str:
    """Return the error of a look-up where the index of one rank points behind the table, its mark forged."""
    sharded = shard(model_of(), how)
    bank = sharded.module.embeddings.decoder.banks["item"]
    sharded(FEATURES)
    if dist.get_rank() == 1:
        bank.coded_ids.fill_(255)
        sharded.module.embeddings.code_tables._check_intact = lambda config: None
    try:
        sharded(FEATURES)
    except ValueError as caught:
        return str(caught)
    return ""


def test_rows_behind_the_table_are_an_error_on_all_ranks(two_ranks):
    first, second = two_ranks.run(ask_beyond, "row_wise")
    assert "table 'item', rows of its ids: every id must be in [0, 91)" in first
    assert "table 'item', rows of its ids: every id must be in [0, 91)" in second
