"""Queries that train sharded: their state dict, whole, is exported, and serves what the ranks served."""

import pytest
import torch
from torch import Tensor, nn

from tests.cases import NUM_ROWS, batch, table
from tests.sharding.models import Model, local_state, loss_of, optimizer_of, shard, whole_state
from torchrec_compress import CompressedEmbeddingBagCollection, export_codes
from torchrec_compress.methods import DPQConfig

CONFIG = DPQConfig(num_codes=4, codebook_size=20, bound=0.5)
EACH = batch([[number] for number in range(NUM_ROWS)])


def model_of() -> Model:
    torch.manual_seed(0)
    tables = [table(init_fn=lambda weight: nn.init.normal_(weight, std=0.3))]
    return Model(CompressedEmbeddingBagCollection(tables, compression=CONFIG))


def train(how: str) -> tuple[dict, Tensor, str]:
    """Return this rank's part of what was trained, what it then serves, and the error of an export of shards."""
    sharded = shard(model_of(), how)
    optimizer = optimizer_of(sharded)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(sharded, EACH).backward()
        optimizer.step()
    try:
        export_codes(sharded.module.embeddings)
        message = ""
    except ValueError as error:
        message = str(error)
    return local_state(sharded), sharded.module.embeddings(EACH).values().detach(), message


@pytest.mark.parametrize("how", ["row_wise", "table_wise", "column_wise"])
def test_what_was_trained_on_ranks_is_exported_from_its_state_dict(two_ranks, how):
    found = two_ranks.run(train, how)
    model = model_of()
    before = export_codes(model.embeddings).table_state("item").codes
    model.load_state_dict(whole_state([state for state, _, _ in found], model.state_dict()))
    served = export_codes(model.embeddings)
    assert not torch.equal(served.table_state("item").codes, before)
    for _, rows, message in found:
        assert torch.equal(served(EACH).values().detach(), rows)
        assert "export_codes: collection must not be sharded, got sharded ['rows.queries_16'" in message
        assert "load its state dict into an unsharded one" in message
