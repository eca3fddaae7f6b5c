"""Trained rows looked up and updated: against plain float maths, FBGEMM and one another, and what is refused."""

import itertools
import math
from contextlib import contextmanager, nullcontext

import fbgemm_gpu  # noqa: F401  (registers the operators)
import pytest
import torch
import torch.nn.functional as F
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.trained import (
    BACKENDS,
    WHERE,
    bags_of,
    formats,
    name_of,
    needs_compiler,
    step_of,
    table_of,
)
from torchrec_compress.ops import TrainedFormat, decode_trained, encode_trained, trained_bag, update_trained
from torchrec_compress.ops.trained import ROW_STATE, SCALE
from torchrec_compress.ops.trained_reference import _UPDATES, _Random

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ROWS = 30


def gradients(bags, is_mean):
    """The gradient of every id that a batch has, summed in float64."""
    found = {}
    offsets = range(len(bags.ids) + 1) if bags.offsets is None else bags.offsets.tolist()
    for bag, (first, last) in enumerate(itertools.pairwise(offsets)):
        for p in range(first, last):
            factor = 1.0 if bags.weights is None else float(bags.weights[p])
            grad = factor * bags.grads[bag].double() / (last - first if is_mean else 1)
            found[int(bags.ids[p])] = found.get(int(bags.ids[p]), 0) + grad
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_mean", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [1, 8, 10, 16, 50, 64])
def test_lookup_is_that_of_the_values(width, weighted, is_mean, backend):
    for bits in (8, 4) if width % 2 == 0 else (8,):
        form = TrainedFormat(width, bits)
        rows, state = table_of(ROWS, form)
        bags = bags_of([3, 0, 1, 40, 0], ROWS, width, weighted)
        found = trained_bag(
            rows, state, *bags[:2], form, weights=bags.weights, is_mean=is_mean, step=None, where=WHERE, backend=backend
        )
        values = decode_trained(rows, form).double()[bags.ids]
        values = values if bags.weights is None else values * bags.weights.double().unsqueeze(1)
        parts = values.tensor_split(bags.offsets[1:-1])
        expected = torch.stack([part.sum(0) / (max(1, len(part)) if is_mean else 1) for part in parts])
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", [f for w in (10, 16) for f in formats(w) if not f.has_moments], ids=name_of)
def test_updates_are_those_of_plain_maths(form, backend):
    """Within a rounding up or down of the numbers, and of the bits of a state."""
    rows, state = table_of(ROWS, form)
    values = decode_trained(rows, form).double()
    sums = torch.zeros(ROWS, form.width, dtype=torch.float64)
    for number in range(3):
        bags = bags_of([5, 0, 1, 20], ROWS, form.width, weighted=number == 1)
        step = step_of(number)
        update_trained(
            rows, state, *bags[:2], bags.grads, form, weights=bags.weights, is_mean=True, step=step, where=WHERE,
            backend=backend,
        )  # fmt: skip
        for row, grad in gradients(bags, is_mean=True).items():
            squares = grad**2 if form.optimizer == "adagrad" else (grad**2).mean().expand(form.width)
            sums[row] += squares
            # a state of 8 bits was rounded: what the next step begins with is off by a code
            slack = 0.3 if form.state_bits == 8 and number else 1e-5
            factor = 1.0 if form.optimizer == "sgd" else 1 / (sums[row].sqrt() + step.eps)
            change = step.learning_rate * factor * grad
            quantum = SCALE.decode(rows[row, -1]).item()
            found = decode_trained(rows[row : row + 1], form)[0].double()
            off = (found - (values[row] - change)).abs()
            assert (off <= 1.001 * quantum + slack * change.abs()).all()
        untouched = sorted(set(range(ROWS)) - set(gradients(bags, True)))
        assert torch.equal(decode_trained(rows, form)[untouched].double(), values[untouched])
        values = decode_trained(rows, form).double()
        if form.optimizer != "sgd" and form.state_bits == 32:
            kept = state.view(torch.float32).expand(-1, form.width).double()
            torch.testing.assert_close(kept, sums, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adagrad"])
def test_steps_before_rounding_are_fbgemms(optimizer):
    """The reference's step alone; the C++ kernels' bits are the reference's."""
    kind = EmbOptimType["EXACT_" + optimizer.replace("row_wise", "rowwise").upper()]
    eps = 0.3  # large, so that its place shows
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, 8, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=kind, learning_rate=0.05, eps=eps
    )
    weight = table.split_embedding_weights()[0]
    weight.copy_(torch.randn(ROWS, 8))
    form, expected = TrainedFormat(8, 8, optimizer), weight.clone()
    state = torch.zeros(ROWS, form.state_bytes, dtype=torch.uint8)
    ids = torch.arange(ROWS)
    for number in range(3):
        grads = torch.randn(ROWS, 8)
        table(ids, torch.arange(ROWS + 1)).backward(grads)
        step = step_of(number)._replace(eps=eps)
        updated = _UPDATES[optimizer](state, grads, form, step, _Random.of(ids, step))
        expected, state = expected - updated.change, updated.state
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)


def run(form, backend, bags, rows, state, is_mean=False, **step):
    """Update copies of a table, and return them."""
    rows, state = rows.clone(), state.clone()
    update_trained(
        rows, state, *bags[:2], bags.grads, form, weights=bags.weights, is_mean=is_mean, step=step_of(**step),
        where=WHERE, backend=backend,
    )  # fmt: skip
    return rows, state


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@needs_compiler
@given(data=st.data())
def test_kernels_write_the_bits_of_the_reference(data):
    width = data.draw(st.sampled_from([1, 2, 7, 8, 16, 24, 32, 64, 66, 128]))
    form = data.draw(st.sampled_from(formats(width)))
    lengths = data.draw(st.one_of(st.integers(0, 30), st.lists(st.integers(0, 9), max_size=12)))
    weighted, is_mean = data.draw(st.booleans()), data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    num_rows = data.draw(st.sampled_from([1, 5, 3000]))
    size = 10.0 ** data.draw(st.integers(-12, 1))
    rows, state = table_of(num_rows, form, size)
    for number in range(3):
        bags = bags_of(lengths, num_rows, width, weighted)
        bags = bags._replace(grads=bags.grads * size)
        if data.draw(st.booleans()):
            bags = bags._replace(ids=bags.ids.int(), offsets=None if bags.offsets is None else bags.offsets.int())
        options = {"is_mean": is_mean, "number": number, "first_id": data.draw(st.sampled_from([0, 2**40]))}
        options["learning_rate"] = 0.05 * size
        expected = run(form, "torch", bags, rows, state, **options)
        assert same(run(form, "cpp", bags, rows, state, **options), expected)
        looked_up = [
            trained_bag(*expected, *bags[:2], form, weights=bags.weights, is_mean=is_mean, step=None, where=WHERE,
                        backend=backend)
            for backend in ("cpp", "torch")
        ]  # fmt: skip
        torch.testing.assert_close(*looked_up, rtol=1e-5, atol=1e-5 * size)
        rows, state = expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", formats(8), ids=name_of)
def test_rounding_keeps_the_mean_and_neighbours_apart(form, backend):
    """Over many steps from one table: what is lost to rounding has mean zero, for numbers and for states."""
    rows, state = table_of(ROWS, form)
    bags = bags_of(ROWS, ROWS, 8)._replace(ids=torch.arange(ROWS))
    rows, state = run(form, backend, bags, rows, state)
    # what Adam does hangs on the number of the step, too
    options = [{"number": 1, "seed": n} if form.has_moments else {"number": n} for n in range(1, 400)]
    found = [run(form, backend, bags, rows, state, **each) for each in options]
    exact = _UPDATES[form.optimizer](state, bags.grads, form, step_of(1), _Random.of(bags.ids, step_of(1)))
    expected = decode_trained(rows, form) - exact.change
    values = torch.stack([decode_trained(each, form) for each, _ in found])
    error = (values - expected).double()
    quantum = SCALE.decode(found[0][0][:, -1]).double().unsqueeze(1)
    # at most half a quantum of deviation a draw; the largest number of a row may be exact
    assert (error.mean(0).abs() <= 4.5 * 0.5 * quantum / math.sqrt(len(found)) + 1e-7).all()
    assert error.abs().max() > 0.2 * quantum.min()
    # of numbers that are as often rounded up as down, or nearly so
    signs = (error / quantum).flatten(1)
    signs = signs[:, signs.std(0) > 0.3]
    assert signs.shape[1] > 50
    normal = (signs - signs.mean(0)) / signs.std(0)
    correlation = (normal.t() @ normal / len(found)).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(len(found))
    if form.state_bits == 8 and form.optimizer == "rowwise_adagrad":
        sums = torch.stack([ROW_STATE.decode(each[:, 0]) for _, each in found]).double()
        exact_sums = ROW_STATE.decode(state[:, 0]).double() + (bags.grads.double() ** 2).mean(1)
        assert ((sums.mean(0) / exact_sums - 1).abs() < 4.5 * 0.125 / math.sqrt(len(found))).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", formats(16), ids=name_of)
def test_shards_write_the_bits_of_the_whole(form, backend):
    rows, state = table_of(ROWS, form)
    bags = bags_of([4, 0, 9, 30], ROWS, 16)
    whole = run(form, backend, bags, rows, state)
    parts = []
    for first, last in ((0, 11), (11, ROWS)):
        mine = (bags.ids >= first) & (bags.ids < last)
        lengths = [int(part.sum()) for part in mine.tensor_split(bags.offsets[1:-1])]
        of_shard = bags._replace(ids=bags.ids[mine] - first, offsets=torch.tensor([0, *lengths]).cumsum(0))
        parts.append(run(form, backend, of_shard, rows[first:last], state[first:last], first_id=first))
    assert same(whole, [torch.cat(part) for part in zip(*parts, strict=True)])
    assert not same(whole, run(form, backend, bags, rows, state, seed=8))
    assert not same(whole, run(form, backend, bags, rows, state, number=1))
    assert not same(whole, run(form, backend, bags, rows, state, first_id=1))


@needs_compiler
def test_threads_write_the_same_bits():
    form = TrainedFormat(16, 8, "adagrad", 8)
    rows, state = table_of(500, form)
    bags = bags_of([7] * 2000, 500, 16, weighted=True)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = trained_bag(rows, state, *bags[:2], form, weights=bags.weights, step=None, where=WHERE, backend="cpp")
        found.append((*run(form, "cpp", bags, rows, state, is_mean=True), out))
    torch.set_num_threads(1)
    assert same(found[0], found[1]) and same(found[0], found[2])
    assert same(found[0][:2], run(form, "torch", bags, rows, state, is_mean=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backward_updates_and_returns_the_gradient_of_weights(backend):
    form = TrainedFormat(8, 8)
    rows, state = table_of(ROWS, form)
    bags = bags_of([4, 0, 7], ROWS, 8, weighted=True)
    weights = bags.weights.double().requires_grad_()
    asked = []

    @contextmanager
    def step():
        asked.append(len(asked))
        yield step_of(asked[-1])

    expected = run(form, backend, bags, rows, state, is_mean=True)
    plain = bags.weights.clone().requires_grad_()
    values = decode_trained(rows, form)
    pooled = F.embedding_bag(
        bags.ids, values, bags.offsets, mode="sum", per_sample_weights=plain, include_last_offset=True
    ) / torch.tensor([[4.0], [1.0], [7.0]])
    pooled.backward(bags.grads)
    before = rows.clone()
    out = trained_bag(
        rows, state, *bags[:2], form, weights=weights, is_mean=True, step=step, where=WHERE, backend=backend
    )
    torch.testing.assert_close(out, pooled)
    assert torch.equal(rows, before) and asked == []
    # columns of a wider gradient, as those of a concatenation
    out.backward(torch.cat([bags.grads, bags.grads], 1)[:, 8:], retain_graph=True)
    assert same((rows, state), expected) and asked == [0]
    assert weights.grad.dtype == torch.float64
    torch.testing.assert_close(weights.grad.float(), plain.grad, rtol=1e-4, atol=1e-5)
    out.backward(bags.grads)  # the graph was kept: it updates again
    assert not same((rows, state), expected) and asked == [0, 1]
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward(bags.grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_step_or_gradients_nothing_is_written(backend):
    form = TrainedFormat(8, 4)
    rows, state = table_of(ROWS, form)
    bags = bags_of([4, 0, 7], ROWS, 8, weighted=True)
    before = rows.clone(), state.clone()
    weights = bags.weights.requires_grad_()
    with torch.no_grad():
        out = trained_bag(rows, state, *bags[:2], form, weights=weights, step=step_of(), where=WHERE, backend=backend)
    assert not out.requires_grad
    out = trained_bag(rows, state, *bags[:2], form, weights=weights, step=None, where=WHERE, backend=backend)
    out.backward(bags.grads)
    assert weights.grad.abs().sum() > 0
    assert not trained_bag(rows, state, *bags[:2], form, step=None, where=WHERE, backend=backend).requires_grad
    assert same((rows, state), before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("bits", "optimizer", "rate"),
    [(8, "adagrad", 0.3), (4, "adagrad", 0.3), (8, "adam", 0.05), (8, "partial_rowwise_adam", 0.05)],
)
def test_a_regression_is_learnt_as_by_floats(bits, optimizer, rate, backend):
    form = TrainedFormat(8, bits, optimizer, 8)
    wanted = torch.randn(40, 8)
    rows, state = table_of(40, form, 0.01)
    floats = decode_trained(rows, form).requires_grad_()
    kind = torch.optim.Adagrad if optimizer == "adagrad" else torch.optim.Adam
    optimizer = kind([floats], lr=rate)
    losses = []
    for number in range(150):
        ids = torch.randint(40, (64,))
        offsets = torch.arange(0, 65, 2)
        target = F.embedding_bag(ids, wanted, offsets[:-1], mode="sum")
        step = step_of(number, rate)
        small = trained_bag(rows, state, ids, offsets, form, step=step, where=WHERE, backend=backend)
        large = F.embedding_bag(ids, floats, offsets[:-1], mode="sum")
        optimizer.zero_grad()
        both = [((out - target) ** 2).mean() for out in (small, large)]
        losses.append([loss.item() for loss in both])
        for loss in both:
            loss.backward()
        optimizer.step()
    (first, _), *_, (small, large) = losses
    assert large < 0.01 * first
    assert small < large + (0.001 if bits == 8 else 0.08) * first  # 4 bits: the noise of rounding


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", formats(8), ids=name_of)
def test_nothing_to_do(form, backend):
    rows, state = table_of(ROWS, form)
    empty = torch.zeros(0, dtype=torch.int64)
    for offsets, num_bags in (
        (None, 0),
        (torch.zeros(4, dtype=torch.int64), 3),
        (torch.zeros(1, dtype=torch.int64), 0),
    ):
        for table in ((rows, state), (rows[:0], state[:0])):
            out = trained_bag(*table, empty, offsets, form, step=step_of(), where=WHERE, backend=backend)
            assert torch.equal(out, torch.zeros(num_bags, 8))
            before = rows.clone(), state.clone()
            out.sum().backward()
            assert same((rows, state), before)


def test_a_step_of_none_leaves_rows_alone():
    form = TrainedFormat(8, 8)
    rows, state = encode_trained(torch.randn(5, 8), form), torch.zeros(5, 4, dtype=torch.uint8)
    before = rows.clone()
    out = trained_bag(rows, state, torch.tensor([1]), None, form, step=lambda: nullcontext(None), where=WHERE)
    out.sum().backward()
    assert torch.equal(rows, before) and not state.any()


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_gradients_that_sum_to_zero_leave_a_row_alone(backend):
    form = TrainedFormat(8, 8)
    rows, state = encode_trained(torch.randn(5, 8), form), torch.zeros(5, 4, dtype=torch.uint8)
    rows[1] = torch.tensor([115, 57, 57, 57, 57, 57, 57, 57, 200])  # rounded anew, it would take a smaller scale
    before, grads = rows.clone(), torch.ones(3, 8)
    grads[1] = -1
    update_trained(
        rows, state, torch.tensor([1, 1, 2]), None, grads, form, step=step_of(), where=WHERE, backend=backend
    )
    assert (rows != before).any(1).tolist() == [False, False, True, False, False]
    assert state.any(1).tolist() == [False, False, True, False, False]
