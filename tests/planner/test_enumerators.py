"""Plans do not depend on the process that makes them."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from torchrec import EmbeddingBagConfig
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec_compress import MEmComEmbeddingBagCollection
from torchrec_compress.planner import EmbeddingShardingPlanner
sizes = {"num_embeddings": 10_000, "embedding_dim": 8}
tables = [EmbeddingBagConfig(name=name, feature_names=[name], **sizes) for name in ("a", "b", "c")]
model = torch.nn.ModuleDict({"sparse": MEmComEmbeddingBagCollection(tables, device="meta")})
kinds = ["table_wise", "row_wise", "column_wise", "table_row_wise"]
constraints = {table.name: ParameterConstraints(sharding_types=kinds) for table in tables}
planner = EmbeddingShardingPlanner(Topology(world_size=4, compute_device="cuda"), 64, constraints, stats=[])
from torchrec_compress.sharding import get_default_sharders
planner.plan(model)
print(planner.hash_planner_context_inputs_str())
options = planner._enumerator.enumerate(model, get_default_sharders())
print([(option.fqn, option.sharding_type, option.compute_kernel) for option in options])
"""


@pytest.mark.slow
def test_options_have_one_order_and_one_hash_in_every_process():
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, "PYTHONHASHSEED": seed},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for seed in ("1", "2")
    ]
    found = []
    for process in started:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        found.append(out)
    assert found[0].count("row_wise") > 3 and len(set(found)) == 1
