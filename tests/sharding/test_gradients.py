"""Gradients in few bits: by hand, on 2 and 4 ranks; equal on all of them, nothing lost, no hook replaced."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper
from torchrec.distributed.types import ShardingPlan

from tests.sharding.models import Model, optimizer_of, shard
from torchrec_compress import CompressedEmbeddingBagCollection, compress_gradients, decompress
from torchrec_compress.methods import NarrowConfig, PQConfig
from torchrec_compress.sharding.gradients import GradientExchange, decode, encode

STEPS = 6
TABLES = {"item": 90, "user": 40, "day": 7}
METHODS = {
    "item": PQConfig(num_codes=4, codebook_size=16),
    "user": NarrowConfig(width=4),
    "*": PQConfig(num_codes=2, codebook_size=4),
}
FORMS = {"bfloat16": (16, 0.01), "int8": (8, 0.02), "int4": (4, 0.2)}
BITS = pytest.mark.parametrize("bits", [16, 8, 4])


@BITS
def test_numbers_come_back_within_half_a_step(bits):
    values = torch.randn(3, 128) * torch.logspace(-9, 9, 3)[:, None]
    packed, got = encode(values, bits), decode(encode(values, bits), bits)
    assert packed.shape == (3, 128 * bits // 8 + (0 if bits == 16 else 4)) and packed.dtype == torch.uint8
    largest = values.view(3, 2, 64).abs().amax(2, keepdim=True)
    # a scale is rounded to 8 bits, so that the largest may be cut by as much
    steps = largest / (2 ** (bits - 1) - 1) if bits < 16 else values.view(3, 2, 64).abs() / 128
    assert ((got - values).view(3, 2, 64).abs() <= 0.505 * steps + largest / 256 * (bits < 16)).all()
    assert torch.equal(decode(encode(got, bits), bits), got) or bits < 16


@BITS
def test_zeros_and_the_smallest_numbers_stay(bits):
    values = torch.zeros(1, 128)
    values[0, 3], values[0, 70] = 1.0, 1e-44
    got = decode(encode(values, bits), bits)
    assert got[0, 3] == pytest.approx(1.0, rel=0.01)
    assert got.count_nonzero() <= 2 and got[0, 70].abs() < 1e-40


@BITS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_arrives_as_such(bits, bad):
    values = torch.ones(1, 128)
    values[0, 3] = bad
    got = decode(encode(values, bits), bits)
    assert not got[0, 3].isfinite() and torch.allclose(got[0, 64:], torch.ones(64), atol=0.01)


def test_four_bits_by_hand():
    values = torch.zeros(1, 64)
    values[0, [0, 1, 32, 33]] = torch.tensor([7.0, -7.0, 2.4, -0.6])
    packed = encode(values, 4)[0]
    assert packed[:3].tolist() == [7 | 2 << 4, 9 | 15 << 4, 0]
    assert decode(packed[None], 4)[0, [0, 1, 2, 32, 33, 34]].tolist() == [7.0, -7.0, 0.0, 2.0, -1.0, 0.0]


class Toy(nn.Module):
    """A parameter whose gradient is what it is called with."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(7, 31, dtype=dtype))

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient).sum()


def wrapped(module: nn.Module, **options: Any) -> Any:
    return DistributedModelParallel(module, device=torch.device("cpu"), plan=ShardingPlan({}), sharders=[], **options)


def toy_gradient(step: int, rank: int) -> Tensor:
    return torch.randn(7, 31, generator=torch.Generator().manual_seed(100 * step + rank))


def by_hand(world: int, bits: int) -> list[Tensor]:
    """Return the gradients of each step, by loops over blocks and ranks; 217 numbers take four blocks."""
    errors, found = torch.zeros(world, 256), []
    for step in range(STEPS):
        whole, mean = errors.clone(), torch.zeros(256)
        for rank in range(world):
            whole[rank, :217] += toy_gradient(step, rank).flatten()
        for block in range(4):
            owner, mine, total = block % world, slice(64 * block, 64 * block + 64), torch.zeros(64)
            for rank in range(world):
                told = whole[rank, mine]
                if rank != owner:
                    told = decode(encode(whole[rank : rank + 1, mine], bits), bits)[0]
                errors[rank, mine] = whole[rank, mine] - told
                total += told
            mean[mine] = decode(encode(total[None] / world, bits), bits)[0]
            errors[owner, mine] = total - world * mean[mine]
        found.append(mean[:217].view(7, 31))
    return found


def toy_steps(sent_as: Any, resumed_at: int | None = None) -> list[Tensor]:
    model, found = wrapped(Toy()), []
    exchange = compress_gradients(model, sent_as)
    for step in range(STEPS):
        if step == resumed_at:
            errors = {name: error.clone() for name, error in exchange.state_dict().items()}
            model = wrapped(Toy())
            exchange = compress_gradients(model, sent_as)
            exchange.load_state_dict(errors)
        model.zero_grad()
        model(toy_gradient(step, dist.get_rank())).backward()
        found.append(model.module.weight.grad.clone())
    return found


@pytest.mark.parametrize("sent_as", FORMS)
@pytest.mark.parametrize("world", [2, 4])
def test_each_step_is_as_by_hand(two_ranks, four_ranks, world, sent_as):
    expected = by_hand(world, FORMS[sent_as][0])
    for found in (two_ranks if world == 2 else four_ranks).run(toy_steps, sent_as):
        for got, want in zip(found, expected, strict=True):
            # a sum in another order may fall on the other side of a half, rarely, by a step
            assert torch.isclose(got, want, atol=1e-5).float().mean() >= 0.99


def sharded_model() -> DistributedModelParallel:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=8, feature_names=[name])
        for name, rows in TABLES.items()
    ]
    return shard(Model(CompressedEmbeddingBagCollection(tables, compression=METHODS)), "in turn")


def draw(step: int) -> KeyedJaggedTensor:
    seeded = torch.Generator().manual_seed(100 * step + dist.get_rank())
    lengths = torch.randint(0, 4, (len(TABLES), 5), generator=seeded)
    counts = zip(TABLES.values(), lengths.sum(1).tolist(), strict=True)
    ids = [torch.randint(0, rows, (count,), generator=seeded) for rows, count in counts]
    return KeyedJaggedTensor.from_lengths_sync(list(TABLES), torch.cat(ids), lengths.view(-1))


def replicated(model: DistributedModelParallel) -> dict[str, nn.Parameter]:
    wrapper: Any = next(module for module in model.modules() if isinstance(module, DistributedDataParallel))
    ignored = wrapper.parameters_to_ignore
    return {name: p for name, p in wrapper.module.named_parameters() if p.requires_grad and name not in ignored}


def train(sent_as: Any, moves: bool) -> dict[str, Any]:
    """Return the sums of gradients, what is left to send, and the parameters, all by name."""
    model = sharded_model()
    exchange = GradientExchange("int8", {}) if sent_as == "float32" else compress_gradients(model, sent_as)
    optimizer, sums = optimizer_of(model), {}
    begun = {name: parameter.detach().clone() for name, parameter in replicated(model).items()}
    for step in range(STEPS):
        optimizer.zero_grad()
        (model(draw(step)) - 1).square().mean().backward()
        for name, parameter in replicated(model).items():
            sums[name] = sums.get(name, 0.0) + parameter.grad
        if moves:
            optimizer.step()
    moved = {name: parameter.detach() - begun[name] for name, parameter in replicated(model).items()}
    return {"sums": sums, "errors": exchange.errors, "moved": moved, "bytes": exchange.num_bytes}


@pytest.mark.parametrize("sent_as", FORMS)
@pytest.mark.parametrize("world", [2, 4])
def test_nothing_is_lost(two_ranks, four_ranks, world, sent_as):
    """What came and what is left, in the mean over ranks, are the gradients."""
    pool = two_ranks if world == 2 else four_ranks
    exact, found = pool.run(train, "float32", False)[0]["sums"], pool.run(train, sent_as, False)
    assert {"over.weight", "over.bias"} < exact.keys() and sum("decoder" in name for name in exact) == 3
    for name, whole in exact.items():
        assert all(torch.equal(each["sums"][name], found[0]["sums"][name]) for each in found), name
        left = torch.stack([each["errors"][name] for each in found]).mean(0)
        assert torch.allclose(found[0]["sums"][name] + left, whole, rtol=1e-5, atol=1e-6 * float(whole.abs().max()))
    # errors are there, other ones on each rank, and small beside the gradients
    lefts = [torch.cat([each["errors"][name].flatten() for name in exact]) for each in found]
    assert all(left.count_nonzero() > 0 for left in lefts) and not torch.equal(*lefts[:2])
    assert found[0]["bytes"] == 4 * sum(whole.numel() for whole in exact.values())


@pytest.mark.parametrize("sent_as", FORMS)
@pytest.mark.parametrize("world", [2, 4])
def test_training_stays_near_and_equal_over_ranks(two_ranks, four_ranks, world, sent_as):
    pool = two_ranks if world == 2 else four_ranks
    exact, found = pool.run(train, "float32", True)[0]["moved"], pool.run(train, sent_as, True)
    for name, value in exact.items():
        assert all(torch.equal(each["moved"][name], found[0]["moved"][name]) for each in found), name
        assert (found[0]["moved"][name] - value).norm() <= FORMS[sent_as][1] * value.norm(), name


def test_errors_are_taken_back(two_ranks):
    whole, again = two_ranks.run(toy_steps, "int4"), two_ranks.run(toy_steps, "int4", 3)
    for one, other in zip(whole, again, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    exchange = GradientExchange("int8", {"weight": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"such as 'weight' \(\(3, 2\) for \(2, 3\)\); leave them out"):
        exchange.load_state_dict({"weight": torch.zeros(3, 2)})


def sent_bytes(sent_as: Any) -> tuple[float, float]:
    """Return what this rank hands to collectives in a step, and float32's all-reduce of the same."""
    model, world, sent = wrapped(nn.Linear(500, 300)), dist.get_world_size(), [0.0]
    compress_gradients(model, sent_as)
    exchange, gather = dist.all_to_all_single, dist.all_gather

    def counted_exchange(output: Tensor, given: Tensor, **options: Any) -> Any:
        sent[0] += given.numel() * given.element_size() * (world - 1) / world
        return exchange(output, given, **options)

    def counted_gather(output: list[Tensor], given: Tensor, **options: Any) -> Any:
        sent[0] += given.numel() * given.element_size() * (world - 1)
        return gather(output, given, **options)

    dist.all_to_all_single, dist.all_gather = counted_exchange, counted_gather
    try:
        model(torch.randn(4, 500)).sum().backward()
    finally:
        dist.all_to_all_single, dist.all_gather = exchange, gather
    return sent[0], 2 * (world - 1) / world * 4 * (500 * 300 + 300)


@pytest.mark.parametrize(("sent_as", "share"), [("bfloat16", 0.5), ("int8", 0.2578), ("int4", 0.1328)])
def test_shares_of_the_bytes_are_as_told(two_ranks, four_ranks, sent_as, share):
    for pool in (two_ranks, four_ranks):
        sent, full = pool.run(sent_bytes, sent_as)[0]
        assert sent / full == pytest.approx(share, rel=0.01)


def bad_step() -> list[bool]:
    """Return whether gradients, those of other blocks, errors and the next gradients are finite."""
    model, found = wrapped(Toy()), []
    exchange = compress_gradients(model, "int8")
    for bad in (True, False):
        model.zero_grad()
        given = toy_gradient(0, dist.get_rank())
        if bad and dist.get_rank() == 1:
            given[0, 0] = math.inf
        model(given).backward()
        finite = model.module.weight.grad.isfinite()
        found += [bool(finite[0, 0]), bool(finite.flatten()[64:].all())]
        found.append(all(bool(error.isfinite().all()) for error in exchange.errors.values()))
    return found


def test_a_bad_gradient_is_seen_by_all_and_leaves_nothing(two_ranks):
    assert two_ranks.run(bad_step) == [[False, True, True, True, True, True]] * 2


def refusals() -> dict[str, str]:
    rank, found = dist.get_rank(), {}

    def note(what: str, model: nn.Module, sent_as: Any = "int8") -> None:
        with pytest.raises(ValueError) as caught:
            compress_gradients(model, sent_as)
        found[what] = str(caught.value)

    note("bare", Toy())
    note("no wrapper", wrapped(Toy(), init_data_parallel=False))
    note("word", wrapped(Toy()), "int3")
    note("float64", wrapped(Toy(torch.float64)))
    note("forms", wrapped(Toy()), ["int8", "int4"][rank])
    note("own", wrapped(Toy(), data_parallel_wrapper=DefaultDataParallelWrapper(allreduce_comm_precision="fp16")))
    hooked = wrapped(Toy())
    hooked._dmp_wrapped_module.register_comm_hook(None, fp16_compress_hook)
    note("hook", hooked)
    assert hooked._dmp_wrapped_module._comm_hooks == [(fp16_compress_hook, None)]
    hooked(toy_gradient(0, rank)).backward()
    found["kept"] = str(torch.equal(hooked.module.weight.grad, hooked.module.weight.grad.half().float()))
    on_one = wrapped(Toy())
    if rank == 1:
        on_one._dmp_wrapped_module._comm_hooks.append((fp16_compress_hook, None))
    note("on one", on_one)
    twice = wrapped(Toy())
    compress_gradients(twice, "int4")
    note("twice", twice)
    return found


def test_what_cannot_be_is_refused_by_name_on_all_ranks(two_ranks):
    parts = {
        "bare": "must be in DistributedModelParallel, got Toy",
        "no wrapper": "got none; call init_data_parallel() first",
        "word": "must be one of ['bfloat16', 'int8', 'int4'], got 'int3'",
        "float64": "got torch.float64 of 'weight'",
        "forms": "all ranks must ask for one form, got ['int8', 'int4']",
        "own": "got 'fp16_compress_hook', which stays",
        "hook": "got 'fp16_compress_hook', which stays",
        "kept": "True",
        "on one": "rank 1: _dmp_wrapped_module: must have no communication hook yet",
        "twice": "got 'send_with_errors', which stays",
    }
    for found in two_ranks.run(refusals):
        assert found.keys() == parts.keys()
        for what, text in parts.items():
            assert text in found[what], what


def wrapped_anew() -> list[str]:
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, listener = logging.getLogger("torchrec_compress.convert.wrapping"), Listener()
    logger.addHandler(listener)
    try:
        model = sharded_model()
        compress_gradients(model)
        decompress(model, inplace=True)
    finally:
        logger.removeHandler(listener)
    return said


def test_a_new_wrapper_tells_of_the_hook_that_it_has_not(two_ranks):
    first, second = two_ranks.run(wrapped_anew)
    assert any("['send_with_errors']: the model is wrapped anew" in text for text in first) and second == []
