"""Tables with managers in plans: what they hold in training, what they serve, and how they may be cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.planner import ParameterConstraints

from tests.cases import fresh, table
from tests.planner.plans import BATCH, topology
from torchrec_compress.methods import CafeConfig
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.planner.lookups import decode_bytes
from torchrec_compress.sharding import get_default_sharders

CAFE = CafeConfig(num_hot_rows=16, num_cold_rows=40, num_blocks=4)
STATE = 64 * 12 + 16 * 4 + 4 * 8  # slots, hot rows, blocks


def planned(config: CafeConfig, ranks: int, how: str | None = None) -> EmbeddingShardingPlanner:
    wishes = {} if how is None else {"item": ParameterConstraints(sharding_types=[how])}
    planner = EmbeddingShardingPlanner(topology("cpu", ranks), BATCH, wishes, stats=[])
    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD}
    planner.plan(torch.nn.ModuleDict({"sparse": fresh(config)}), get_default_sharders(fused_params=fused))
    return planner


@pytest.mark.parametrize("how", ["row_wise", "table_wise"])
def test_what_is_held_in_training_and_what_is_served(how):
    found = planned(CAFE, 2, how).report.tables["item"]
    (part,) = [part for part in found.parts if part.kind == "managed"]
    assert (part.sharding_type, part.stored_bytes) == (how, 56 * 16 * 4 + STATE)
    assert found.stored_bytes == CAFE.stored_bytes(table())
    assert found.served_bytes == CAFE.served_bytes(table()) == 56 * 16 * 4 + 64 * 8
    assert found.optimizer_bytes == 56 * 4
    assert found.held_bytes == found.stored_bytes + found.optimizer_bytes
    assert {"served_bytes", "held_bytes", "managed_bytes"} <= found.to_dict().keys()


def test_a_width_is_planned_as_narrow_rows_and_a_projection_on_every_rank():
    config = replace(CAFE, width=8)
    planner = planned(config, 2, "row_wise")
    found = planner.report.tables["item"]
    kinds = {part.kind: (part.sharding_type, part.stored_bytes, part.training_bytes) for part in found.parts}
    matrix = 8 * 16 * 4
    assert kinds == {
        "managed": ("row_wise", 56 * 8 * 4 + STATE, STATE - 64 * 8),
        "decoder": ("data_parallel", matrix, 0),
    }
    assert found.stored_bytes == config.stored_bytes(table())
    assert found.served_bytes == config.served_bytes(table()) == 56 * 8 * 4 + 64 * 8 + matrix
    assert found.optimizer_bytes == 56 * 4 + 2 * (2 * matrix + 4)  # of two ranks' Adam
    assert [rank.managed_bytes for rank in planner.report.ranks] == [(56 * 8 * 4 + STATE) // 2] * 2
    wish = {"item": ParameterConstraints(pooling_factors=[20.0])}
    decoded = 4 * BATCH * (16 + 20 * 8)  # bags, and rows of the width
    assert decode_bytes(torch.nn.ModuleDict({"sparse": fresh(config)}), wish, BATCH) == {"item": decoded}


def test_every_rank_holds_the_state_of_its_blocks():
    ranks = planned(CAFE, 2, "row_wise").report.ranks
    assert [rank.managed_bytes for rank in ranks] == [(56 * 16 * 4 + STATE) // 2] * 2
    assert all(rank.weight_bytes == rank.managed_bytes for rank in ranks)


def test_rows_are_charged_unpooled():
    few, many = (
        EmbeddingShardingPlanner(
            topology("cpu", 2),
            BATCH,
            {"item": ParameterConstraints(sharding_types=["row_wise"], pooling_factors=[factor])},
            stats=[],
        )
        for factor in (1.0, 20.0)
    )
    for planner in (few, many):
        planner.plan(torch.nn.ModuleDict({"sparse": fresh(CAFE)}), get_default_sharders(fused_params={}))
    assert many.report.ranks[0].activation_bytes > 12 * few.report.ranks[0].activation_bytes


def test_no_plan_cuts_a_block():
    assert planned(CAFE, 3).report.tables["item"].parts[0].sharding_type == "table_wise"
    with pytest.raises(ValueError, match=r"\['item'\]: num_blocks must be a multiple of the 3 ranks that would share"):
        planned(CAFE, 3, "row_wise")


def test_other_sharding_types_are_translated(caplog):
    assert planned(CAFE, 2, "column_wise").report.tables["item"].parts[0].sharding_type == "row_wise"
    assert "table 'item', table with a manager 'sparse.managed' cannot be sharded column_wise" in caplog.text


def test_the_report_is_text():
    text = str(planned(CAFE, 2, "row_wise").report)
    assert "managed row_wise fused on 0-1" in text
