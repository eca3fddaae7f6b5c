"""torch.distributed.checkpoint: saved under one plan and world size, loaded under another, optimizer state included."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import PoolingType
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from tests.modules import batches
from tests.sharding.models import Model, local_state, loss_of, make_plan, whole_state
from torchrec_compress import native_parameters, optimizer_bytes
from torchrec_compress.methods import DenseConfig, HashConfig, Int8Config, MEmComConfig, PQConfig, RandomCodesConfig
from torchrec_compress.sharding import get_default_sharders

COMPRESSION = {
    "user": PQConfig(num_codes=4, codebook_size=16, num_hot_rows=20),
    "item": HashConfig(num_buckets=30),
    "shop": MEmComConfig(num_buckets=30, bias=True),
    "tag": RandomCodesConfig(num_codes=2, codebook_size=16),
    "word": Int8Config(),
    "*": DenseConfig(),
}


def build(kind: str, seed: int, compression=None) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Return a sharded model with other values for every seed: Adagrad in the backward, Adam for the rest."""
    torch.manual_seed(seed)
    model = Model(batches.collection(compression or COMPRESSION, PoolingType.SUM))
    apply_optimizer_in_backward(torch.optim.Adagrad, native_parameters(model.embeddings), {"lr": 0.1})
    values = {name: value.clone() for name, value in model.state_dict().items()}
    sharders = get_default_sharders()
    plan = make_plan(model, kind, sharders)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    sharded.load_state_dict(values)
    rest = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    dense = KeyedOptimizerWrapper(rest, lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    return sharded, CombinedOptimizer([sharded.fused_optimizer, dense])


def step(model, optimizer, number: int) -> None:
    torch.manual_seed(100 + number)
    features = batches.batch([[2, 0, 1, 3]] * 5)
    optimizer.zero_grad()
    loss_of(model, features).backward()
    optimizer.step()


def train_and_save(kind: str, folder: str) -> tuple:
    model, optimizer = build(kind, seed=0)
    for number in range(2):
        step(model, optimizer, number)
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    before = local_state(model)
    step(model, optimizer, 2)
    return before, local_state(model)


def load_and_train(kind: str, folder: str) -> tuple:
    model, optimizer = build(kind, seed=1)  # other values, to be replaced
    step(model, optimizer, 7)  # the optimizer's state exists
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    loaded = local_state(model)
    step(model, optimizer, 2)
    return loaded, local_state(model)


def optimizer_state_bytes(kind: str) -> int:
    model, optimizer = build(kind, seed=0)
    step(model, optimizer, 0)
    return optimizer_bytes(model.fused_optimizer)


def test_the_bytes_of_a_sharded_optimizer_are_those_of_this_rank(two_ranks):
    """Adagrad keeps one number per weight of the native tables: hashed rows, MEmCom's rows, scalars, biases, dense."""
    native = 30 * 8 + 30 * 12 + 2 * 76 * 4 + 9 * 4
    assert sum(two_ranks.run(optimizer_state_bytes, "row_wise")) == 4 * native


def unsharded_state():
    torch.manual_seed(0)
    return Model(batches.collection(COMPRESSION)).state_dict()


@pytest.mark.parametrize(
    ("saved", "loaded"), [("row_wise", "table_wise"), ("table_wise", "row_wise"), ("data_parallel", "data_parallel")]
)
def test_any_plan_loads_any_other(two_ranks, four_ranks, tmp_path, saved, loaded):
    """Saved on four ranks, loaded on two; one more step moves both alike, so the optimizer's state came along."""
    like = unsharded_state()
    first = four_ranks.run(train_and_save, saved, str(tmp_path))
    second = two_ranks.run(load_and_train, loaded, str(tmp_path))
    before, after = (whole_state([result[part] for result in first], like) for part in (0, 1))
    ours, stepped = (whole_state([result[part] for result in second], like) for part in (0, 1))
    assert before.keys() == ours.keys() == like.keys()
    for name, value in before.items():
        assert torch.equal(ours[name], value), name
    for name, value in after.items():
        torch.testing.assert_close(stepped[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def load_unsharded(folder: str) -> dict:
    torch.manual_seed(5)
    model = Model(batches.collection(COMPRESSION))
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(state["model"])
    return model.state_dict()


def test_an_unsharded_model_loads_it_and_four_ranks_load_an_unsharded_one(four_ranks, tmp_path):
    """Of 301 and 350 rows four ranks hold unequal parts."""
    like = unsharded_state()
    first = four_ranks.run(train_and_save, "row_wise", str(tmp_path / "sharded"))
    before = whole_state([result[0] for result in first], like)
    plain = load_unsharded(str(tmp_path / "sharded"))
    for name, value in before.items():
        assert torch.equal(plain[name], value), name
    for got in four_ranks.run(save_plain_and_load, str(tmp_path / "plain")):
        assert got == []


def save_plain_and_load(folder: str) -> list[str]:
    """Save an unsharded model on the first rank, load it row-wise on all; return the names that differ."""
    torch.manual_seed(3)
    plain = Model(batches.collection(COMPRESSION))
    dcp.save({"model": plain.state_dict()}, checkpoint_id=folder)
    model, _ = build("row_wise", seed=1)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    differ = []
    for name, value in local_state(model).items():
        whole = plain.state_dict()[name]
        for (row, _), mine in value if isinstance(value, list) else [((0, 0), value)]:
            there = whole[row : row + len(mine)] if isinstance(value, list) else whole
            if not torch.equal(there, mine):
                differ.append(name)
    return differ


def refuse(folder: str) -> list[str]:
    """Return the errors of loading a checkpoint into collections of another size, method and seed."""
    model, _ = build("row_wise", seed=0)
    state = model.state_dict()
    messages = []
    others = [
        {**COMPRESSION, "user": PQConfig(num_codes=2, codebook_size=16, num_hot_rows=20)},
        {**COMPRESSION, "tag": MEmComConfig(num_buckets=30)},
    ]
    for compression in others:
        other, _ = build("row_wise", seed=0, compression=compression)
        try:
            other.load_state_dict(dict(state))  # TorchRec writes into the one that it is given
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))
    dist.barrier()
    return messages


def test_another_size_or_method_is_refused(two_ranks, tmp_path):
    for size, method in two_ranks.run(refuse, str(tmp_path)):
        assert "table 'user': the checkpoint's sizes must be those of PQConfig(num_codes=2" in size
        assert "table 'tag': the checkpoint's method and sizes" in method
