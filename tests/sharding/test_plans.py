"""Plans that a user writes by hand, as docs/planner.md shows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.sharding.swaps import METHODS, draw, filled, gap
from torchrec_compress import get_default_sharders

DOCS = Path(__file__).parents[2] / "docs" / "planner.md"


def by_hand(model: torch.nn.Module) -> ShardingPlan:
    """Run the example of the docs."""
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "HOW" in code]
    names: dict[str, Any] = {"model": model, "world_size": dist.get_world_size(), "device": torch.device("cpu")}
    exec(example, names)
    return names["plan"]


def output(change: str, marked: bool) -> tuple[float, list[str]]:
    """Shard by a plan made by hand, with a change; return the gap to unsharded and the plan's modules."""
    methods = list(METHODS)
    model = filled(methods, True)
    batch = draw(methods, 0, dist.get_rank())
    expected = model(batch)[1]
    values = {name: value.clone() for name, value in model.state_dict().items() if "embeddings.dense" in name}
    if marked:  # codebooks too, as scripts do with TorchRec's collections
        apply_optimizer_in_backward(torch.optim.SGD, model.embeddings.parameters(), {"lr": 0.1})
    plan = by_hand(model)
    parts: Any = plan.plan
    if change == "a table is missing":
        del parts["embeddings.code_tables"]["pq"]
    elif change == "another name":
        parts["embeddings.bags"] = {"hash__buckets": parts["embeddings.bags"]["hash"]}
    elif change == "a decoder cut":
        parts["embeddings.decoder"]["pq.codebooks"] = parts["embeddings.code_tables"]["pq"]
    elif change == "a decoder misspelt":
        parts["embeddings.decoder"] = {"pq": data_parallel_entry(parts)}
    elif change == "uneven rows":
        first, second = parts["embeddings.code_tables"]["pq"].sharding_spec.shards
        for shard, start, rows in ((first, 0, 1), (second, 1, first.shard_sizes[0] + second.shard_sizes[0] - 1)):
            shard.shard_offsets[0], shard.shard_sizes[0] = start, rows
    elif change:
        for path in [path for path in parts if change in path]:
            del parts[path]
    sharded = DistributedModelParallel(model, plan=plan, sharders=get_default_sharders())
    sharded.load_state_dict({**sharded.state_dict(), **values})  # TorchRec draws dense tables from a CPU anew
    loss, out = sharded(batch)
    loss.backward()
    return gap(out, expected), sorted(parts)


def data_parallel_entry(parts: Any) -> Any:
    return parts["embeddings.decoder"]["pq.codebooks"]


def without_each(marked: bool) -> dict[str, float]:
    return {part: output(part, marked)[0] for part in ("", "decoder", "code_tables", "bags", "rows", "dense")}


def errors() -> dict[str, str]:
    found = {}
    for change in ("a table is missing", "another name", "a decoder cut", "a decoder misspelt", "uneven rows"):
        try:
            output(change, marked=False)
        except ValueError as error:
            found[change] = str(error)
    return found


def test_entries_of_whole_parts_may_be_left_out(two_ranks):
    """Such a part is whole on every rank, as in TorchRec; the numbers are those of one process."""
    for result in two_ranks.run(without_each, True):
        assert {part: gap for part, gap in result.items() if gap > 1e-6} == {}


def test_one_rank_needs_no_entry_of_the_decoder_either():
    """Optimizers in the backward of replicated codebooks made DistributedDataParallel fail on a CPU."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        assert output("decoder", marked=True)[0] < 1e-6
    finally:
        dist.destroy_process_group()


def test_entries_that_do_not_fit_are_refused_by_name(two_ranks):
    for found in two_ranks.run(errors):
        assert re.search(
            r"embeddings.code_tables: the plan must have .* got none for \['pq'\]", found["a table is missing"]
        )
        assert re.search(r"embeddings.bags: .* for \['blocks.block_0', .* \['hash__buckets'", found["another name"])
        assert "entries must be data_parallel, got {'pq.codebooks': 'row_wise'}" in found["a decoder cut"]
        assert "embeddings.decoder: the plan" in found["a decoder misspelt"] and "['pq']" in found["a decoder misspelt"]
        assert re.search(
            r"table 'pq': shards must be whole rows, \d+ per rank in the order of ranks, got rows", found["uneven rows"]
        )
