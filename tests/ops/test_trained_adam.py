"""Adam on trained rows: its steps against torch's and plain maths, and its moments in 8 bits."""

import pytest
import torch

from tests.ops.trained import BACKENDS, WHERE, name_of, step_of, table_of
from torchrec_compress.ops import TrainedFormat, are_states, decode_trained, update_trained
from torchrec_compress.ops.trained import ROW_MOMENT, SCALE, SHARE, SIGNED_SHARE
from torchrec_compress.ops.trained_reference import _UPDATES, _Random, _read_moments, _read_of_numbers

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ROWS = 30
BETAS = {"beta1": 0.8, "beta2": 0.97}
FORMS = [
    TrainedFormat(width, bits, optimizer, state_bits)
    for width in (10, 16)
    for bits in (8, 4)
    for optimizer in ("adam", "partial_rowwise_adam")
    for state_bits in (32, 8)
]
EIGHT = [form for form in FORMS if form.state_bits == 8 and form.bits == 8]


def test_steps_before_rounding_are_torchs():
    """Where a batch has all ids; FBGEMM has no Adam on a CPU, and says the same in its GPU kernel's text."""
    form, eps = TrainedFormat(8, 8, "adam"), 0.3  # large, so that its place shows
    weight = torch.nn.Parameter(torch.randn(ROWS, 8))
    optimizer = torch.optim.Adam([weight], lr=0.05, betas=tuple(BETAS.values()), eps=eps)
    expected, state, ids = weight.detach().clone(), torch.zeros(ROWS, 64, dtype=torch.uint8), torch.arange(ROWS)
    for number in range(4):
        weight.grad = torch.randn(ROWS, 8)
        optimizer.step()
        step = step_of(number)._replace(eps=eps, **BETAS)
        updated = _UPDATES["adam"](state, weight.grad, form, step, _Random.of(ids, step))
        expected, state = expected - updated.change, updated.state
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_updates_are_those_of_plain_maths(form, backend):
    """Also of ids that batches lacked: their moments stay, and the steps of the table are counted."""
    rows, state = table_of(ROWS, form)
    first, second = torch.zeros(2, ROWS, form.width, dtype=torch.float64)
    for number in range(4):
        ids = torch.randperm(ROWS)[:20]
        grads = torch.randn(20, form.width)
        step = step_of(number)._replace(**BETAS)
        before = decode_trained(rows, form).double()
        update_trained(rows, state, ids, None, grads, form, step=step, where=WHERE, backend=backend)
        squares = grads.double() ** 2
        if form.optimizer == "partial_rowwise_adam":
            squares = squares.mean(1, keepdim=True).expand_as(squares)
        first[ids] = 0.8 * first[ids] + (1 - 0.8) * grads.double()
        second[ids] = 0.97 * second[ids] + (1 - 0.97) * squares
        sizes = first / (1 - 0.8 ** (number + 1))
        change = 0.05 * sizes / ((second / (1 - 0.97 ** (number + 1))).sqrt() + 1e-8)
        found, quantum = decode_trained(rows, form).double(), SCALE.decode(rows[:, -1]).unsqueeze(1)
        # moments of 8 bits were rounded, two or three times: what they begin with is off by some codes
        slack = 0.4 * change.abs() + 0.01 if form.state_bits == 8 and number else 1e-5
        off = (found - (before - change)).abs()[ids]
        assert (off <= (1.001 * quantum + slack)[ids]).all()
        lacking = torch.ones(ROWS, dtype=torch.bool).index_fill(0, ids, False)
        assert torch.equal(found[lacking], before[lacking])
        if form.state_bits == 32:
            kept = state.view(torch.float32).double()
            torch.testing.assert_close(kept[:, : form.width], first, rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(kept[:, form.width :].expand_as(second), second, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("form", EIGHT, ids=name_of)
def test_moments_of_8_bits_keep_their_mean(form):
    state, ids = torch.zeros(1, form.state_bytes, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    grads = torch.logspace(0, -3, form.width).unsqueeze(0) * torch.tensor([1.0, -1.0]).repeat(form.width // 2)
    found = []
    for seed in range(4000):
        step = step_of(0, seed=seed)
        found.append(_UPDATES[form.optimizer](state, grads, form, step, _Random.of(ids, step)).state)
    states, cut = torch.cat(found), form.bytes_of_numbers
    moments = _read_moments(states[:, :cut].contiguous(), form).double().mean(0)
    torch.testing.assert_close(moments, 0.1 * grads[0].double(), rtol=5e-3, atol=1e-6)
    if form.optimizer == "adam":
        squares = _read_of_numbers(states[:, cut:].contiguous(), form).double().mean(0)
        torch.testing.assert_close(squares, 0.001 * grads[0].double() ** 2, rtol=5e-3, atol=0)
    else:
        squares = ROW_MOMENT.decode(states[:, cut]).double().mean()
        torch.testing.assert_close(squares, 0.001 * (grads.double() ** 2).mean(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", EIGHT, ids=name_of)
def test_numbers_with_gradients_below_all_codes_take_no_leaps(form, backend):
    """A first moment is rounded up where it is small, and a second to zero would divide it by eps."""
    form = TrainedFormat(form.width, 8, form.optimizer, 8)
    rows, state = torch.zeros(200, form.row_bytes, dtype=torch.uint8), torch.zeros(200, form.state_bytes).byte()
    sizes = torch.logspace(0, -12, form.width)
    for number in range(40):
        grads = torch.randn(200, form.width) * sizes
        before = decode_trained(rows, form)
        update_trained(
            rows, state, torch.arange(200), None, grads, form, step=step_of(number, 0.01), where=WHERE, backend=backend
        )
        moved = (decode_trained(rows, form) - before).abs()
        assert float(moved.max()) < 0.01 * 10 + float(SCALE.decode(rows[:, -1]).max())
    assert bool((state[:, form.bytes_of_numbers + (2 if form.optimizer == "adam" else 0) :] > 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", EIGHT, ids=name_of)
def test_a_moment_of_zero_has_no_sign(form, backend):
    rows, state = torch.zeros(1, form.row_bytes, dtype=torch.uint8), torch.zeros(1, form.state_bytes).byte()
    state[:, 2:6] = torch.tensor([128, 0, 128, 0])  # zeros, two of them of a negative moment that was rounded to zero
    grads = torch.tensor([[-1e-45, -1e-45, 0.0, 0.0, -1.0]])  # a tenth of the least is a zero, below it
    grads = grads.repeat(1, 4)[:, : form.width]
    update_trained(rows, state, torch.tensor([0]), None, grads, form, step=step_of(0), where=WHERE, backend=backend)
    assert state[0, 2:6].tolist() == [0, 0, 0, 0]
    assert int(state[0, 6]) > 128


def test_codes_of_a_first_moment_are_as_wide_as_the_root_of_a_second():
    assert SIGNED_SHARE.decode(torch.tensor(127)) == 1.0 == SHARE.decode(torch.tensor(255))
    assert 0.5 < SIGNED_SHARE.smallest / SHARE.smallest**0.5 < 2


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_states_that_are_none(form):
    state = torch.zeros(3, form.state_bytes, dtype=torch.uint8)
    assert are_states(state, form)
    if form.state_bits == 32:
        state.view(torch.float32)[1, 0] = -1.0  # a first moment may be negative
        assert are_states(state, form)
        for wrong in (-1.0, float("nan"), float("inf")):
            state.view(torch.float32)[1, -1] = wrong
            assert not are_states(state, form)
    else:
        for place in (0, form.bytes_of_numbers) if form.optimizer == "adam" else (0,):
            wrong = state.clone()
            wrong[2, place + 1] = 0x80  # a negative largest value
            assert not are_states(wrong, form)
