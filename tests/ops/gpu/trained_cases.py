"""What the GPU kernels of trained rows are tried on, in emulation and on a GPU, against the reference on a CPU."""

import itertools
from dataclasses import dataclass

import pytest
import torch

from tests.ops.trained import OPTIMIZERS, WHERE, Bags, bags_of, formats, has_compiler, name_of, step_of, table_of
from torchrec_compress.ops import TrainedFormat, trained_bag, update_trained

NAN, INF = float("nan"), float("inf")
WIDTHS = (4, 8, 16, 20, 64, 128)
EVERY = {name_of(form): form for width in WIDTHS for form in formats(width)}


def _rotated(first: int) -> list[str]:
    """Return every optimizer with every number of bits once, each at another width."""
    kinds = enumerate(itertools.product((8, 4), OPTIMIZERS, (32, 8)), first)
    return [name_of(TrainedFormat(WIDTHS[number % len(WIDTHS)], *kind)) for number, kind in kinds]


SOME, MORE = _rotated(0), _rotated(3)
FORM, NIBBLES = TrainedFormat(20, 8, "adagrad", 8), TrainedFormat(64, 4, "adam", 8)
FLOATS = TrainedFormat(16, 4, "adagrad", 32)  # whose states show the last bit of a gradient


@dataclass(frozen=True)
class Case:
    """Batches of one table, one step after another; a number instead of lengths: so many ids, each a bag."""

    form: TrainedFormat = FORM
    lengths: tuple[int, ...] | int = (5, 0, 1, 40, 0, 7)
    num_rows: int = 30
    weighted: bool = False
    mean: bool = False
    index: torch.dtype = torch.int64
    size: float = 0.1  # of rows and of steps
    is_uneven: bool = False  # whether gradients fall from number to number of a row, by 2^-40 in all
    views: bool = False  # whether the tensors of a batch are parts of others
    first_id: int = 0


BATCHES = {
    "sums": Case(),
    "weights": Case(FLOATS, weighted=True),
    "means": Case(NIBBLES, mean=True),
    "means of weights": Case(FLOATS, weighted=True, mean=True, index=torch.int32),
    "one id a bag": Case(lengths=50, weighted=True),
    "no bag": Case(lengths=0),
    "no id": Case(lengths=(0, 0, 0)),
    "a row": Case(lengths=(3, 1), num_rows=1),
    "a hot id": Case(FLOATS, (0, 4000, 1, 5999), num_rows=1, mean=True),
    "hot ids": Case(FLOATS, lengths=(11,) * 900, num_rows=7),
    "rows that do not repeat": Case(NIBBLES, (9, 30, 0, 2), num_rows=5000),
    "small numbers": Case(size=1e-12, weighted=True),
    "small moments": Case(TrainedFormat(128, 8, "partial_rowwise_adam", 8), size=1e-12),
    "uneven moments": Case(NIBBLES, is_uneven=True),
    "large numbers": Case(NIBBLES, size=10.0),
    "views": Case(views=True, weighted=True, mean=True),
    "a shard": Case(first_id=2**40, lengths=17),
    "one number": Case(TrainedFormat(1, 8, "partial_rowwise_adam", 8), weighted=True),
    "an odd width": Case(TrainedFormat(7, 8, "rowwise_adagrad", 32), weighted=True),
    "pieces of columns": Case(TrainedFormat(298, 4, "adam", 32), weighted=True, mean=True),
}


def _placed(tensor: torch.Tensor | None, device: str, views: bool) -> torch.Tensor | None:
    """Return a copy on a device; a view: every second of its last dimension."""
    if tensor is None:
        return None
    copy = tensor.detach().clone().to(device)
    return copy.repeat_interleave(2, dim=-1)[..., ::2] if views else copy


def _run(case: Case, bags: Bags, table: tuple, number: int, backend: str, device: str) -> list[torch.Tensor | None]:
    """Return the bags, and what the backward makes of copies of rows and state, and the gradient of weights."""
    rows, state = (part.to(device, copy=True) for part in table)
    ids, offsets, weights, grads = (_placed(each, device, case.views) for each in bags)
    weights = None if weights is None else weights.requires_grad_()
    step = step_of(number, 0.05 * case.size, first_id=case.first_id)
    found = trained_bag(
        rows, state, ids, offsets, case.form, weights=weights, is_mean=case.mean, step=step, where=WHERE,
        backend=backend,
    )  # fmt: skip
    # rows of gradients lie apart, as in columns of a concatenation
    found.backward(grads if case.views else torch.cat([grads, grads * NAN], 1)[:, : case.form.width])
    results = [rows, state, found.detach(), None if weights is None else weights.grad]
    return [None if each is None else each.cpu() for each in results]


def check(case: Case, device: str = "cpu") -> None:
    """Compare three steps: the bits of rows and states, and of pooled rows with those of the C++ kernels."""
    torch.manual_seed(0)
    table = table_of(case.num_rows, case.form, case.size)
    lengths = case.lengths if isinstance(case.lengths, int) else list(case.lengths)
    for number in range(3):
        bags = bags_of(lengths, case.num_rows, case.form.width, case.weighted)
        offsets = None if bags.offsets is None else bags.offsets.to(case.index)
        fall = torch.logspace(0, -40 if case.is_uneven else 0, case.form.width, base=2.0)
        bags = bags._replace(ids=bags.ids.to(case.index), offsets=offsets, grads=bags.grads * case.size * fall)
        found = _run(case, bags, table, number, "cuda", device)
        expected = _run(case, bags, table, number, "torch", "cpu")
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert not len(bags.ids) or not all(torch.equal(*pair) for pair in zip(found[:2], table, strict=True))
        for ours, right in zip(found[2:], expected[2:], strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-3 * case.size)
        if has_compiler():
            kernels = _run(case, bags, table, number, "cpp", "cpu")
            assert torch.equal(found[2], kernels[2])
            assert not case.weighted or torch.equal(found[3], kernels[3])
        table = expected[:2]


LOUD = TrainedFormat(8, 8, "rowwise_adagrad", 8)
# the gradients of the ids at fault, beside others of ones, and what is said of which
REFUSALS = {
    "a gradient": (FORM, {9: NAN, 11: INF}, "the gradient of id 1009 must be finite at step 3, got NaN or infinity"),
    "a gradient of either sign": (NIBBLES, {11: -INF}, "the gradient of id 1011 must be finite"),
    "gradients before states": (FORM, {2: 1e20, 11: NAN}, "the gradient of id 1011 must be finite"),
    "a state": (FORM, {9: 1e20, 11: 1e20}, "optimizer state of id 1009 must be at most what 8 bits hold at step 3"),
    "a state in floats": (TrainedFormat(64, 8, "adam", 32), {4: 1e20}, "state of id 1004 must be at most what 32 bits"),
    "a state a row": (LOUD, {4: 1e5}, "optimizer state of id 1004 must be at most what 8 bits hold"),
    "a moment": (NIBBLES, {9: 1e20}, "optimizer state of id 1009 must be at most what 8 bits hold"),
    "values": (
        TrainedFormat(4, 8, "sgd", 32),
        {9: 1e20, 2: -1e20},
        "values of id 1002 must be .* at most 15240 at step",
    ),
    "values of 4 bits": (
        TrainedFormat(20, 4, "sgd", 8),
        {11: 1e9},
        "values of id 1011 must be .* at most 840 at step 3",
    ),
}


def check_refusal(name: str, device: str = "cpu") -> None:
    """See that an update says what is wrong with which id, and writes nothing."""
    form, wrong, message = REFUSALS[name]
    ids = [4, 9, 2, 11, 4]
    grads = torch.ones(5, form.width)
    for row, value in wrong.items():
        grads[ids.index(row), form.width // 2] = value
    refuse(form, ids, grads, message, device)


def refuse(form: TrainedFormat, ids: list[int], grads: torch.Tensor, message: str, device: str, **step: float) -> None:
    """See that an update of ids from 1,000 on is refused, and writes nothing."""
    rows, state = (part.to(device) for part in table_of(30, form))
    before = rows.clone(), state.clone()
    asked = step_of(3, first_id=1000)._replace(**step)
    with pytest.raises(ValueError, match=f"table 't': .*{message}"):
        update_trained(
            rows, state, torch.tensor(ids, device=device), None, grads.to(device), form, step=asked, where=WHERE,
            backend="cuda",
        )  # fmt: skip
    assert torch.equal(rows, before[0]) and torch.equal(state, before[1])


def check_states_come_before_values(device: str = "cpu") -> None:
    """Of an id with too large values and a later one with too large a state, the state is told, as by the reference."""
    grads = torch.ones(3, 8)
    grads[0], grads[2] = -1.0, 1e4
    # Adagrad's steps are at most as long as the rate times the root of the width
    refuse(LOUD, [2, 4, 9], grads, "optimizer state of id 1009", device, learning_rate=1e6)
    refuse(LOUD, [2, 4, 9], grads.clamp(max=1), "values of id 1002", device, learning_rate=1e6)


def check_bags_without_ids_reach_no_row(device: str = "cpu") -> None:
    """Gradients of bags without ids may be anything; ids whose gradients sum to zero are left as they are."""
    rows, state = (part.to(device) for part in table_of(30, NIBBLES))
    before = rows.clone(), state.clone()
    grads = torch.ones(4, 64)
    grads[1], grads[3] = NAN, 0.0
    ids, offsets = torch.tensor([4, 9, 2, 2, 5]), torch.tensor([0, 3, 3, 4, 5])
    weights = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0])
    update_trained(
        rows, state, ids.to(device), offsets.to(device), grads.to(device), NIBBLES, weights=weights.to(device),
        step=step_of(), where=WHERE, backend="cuda",
    )  # fmt: skip
    changed = [
        (now != then).any(1).nonzero().flatten().tolist() for now, then in zip((rows, state), before, strict=True)
    ]
    assert changed == [[4, 9], [4, 9]]


def check_far_rows(num_rows: int, device: str = "cpu") -> None:
    """See that the last three rows of a table are read and written as those of a table that has no others."""
    form, ids, grads = TrainedFormat(128, 8, "rowwise_adagrad", 8), torch.tensor([2, 0, 2]), torch.randn(3, 128)
    short = table_of(3, form)
    long = [torch.zeros(num_rows, part.shape[1], dtype=torch.uint8, device=device) for part in short]
    long[0][-3:] = short[0].to(device)
    found = []
    for table, first, backend in ((short, num_rows - 3, "torch"), (long, 0, "cuda")):
        mine = (ids + num_rows - 3 - first).to(table[0].device)
        options = {"step": step_of(first_id=first), "where": WHERE, "backend": backend}
        bags = trained_bag(*table, mine, None, form, **options)
        bags.backward(grads.to(bags.device))
        found.append([bags.detach().cpu(), *(part[-3:].cpu() for part in table)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not any(bool(part[:-3].any()) for part in long)
