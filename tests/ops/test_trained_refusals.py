"""What trained rows refuse: before any byte is written, by table, id and step, on every backend."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.trained import BACKENDS, WHERE, bags_of, formats, name_of, needs_compiler, step_of, table_of
from torchrec_compress.ops import TrainedFormat, decode_trained, encode_trained, trained_bag, update_trained

ROWS = 30
FORM = TrainedFormat(8, 8)


def refused(match, backend, form=FORM, lookup=True, **changed):
    """Assert that an update, and a look-up, with these arguments changed raise ValueError and write nothing."""
    rows, state = table_of(ROWS, form)
    bags = bags_of([4, 0, 7], ROWS, form.width)
    given = {"rows": rows, "state": state, "ids": bags.ids, "offsets": bags.offsets, "format": form}
    given |= {"weights": None, "step": step_of(3), "where": WHERE, "backend": backend, "grads": bags.grads} | changed
    before = given["rows"].clone(), given["state"].clone()
    with pytest.raises(ValueError, match=match):
        update_trained(**given)
    assert torch.equal(given["rows"], before[0]) and torch.equal(given["state"], before[1])
    del given["grads"]
    if lookup:
        with pytest.raises(ValueError, match=match):
            trained_bag(**given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_offsets_and_weights(dtype, backend):
    ids = torch.randint(ROWS, (11,), dtype=dtype)
    for wrong in (-1, ROWS):
        ids[6] = wrong
        refused(rf"table 't': every id must be in \[0, 30\), got {wrong}", backend, ids=ids)
    refused("ids must be int32 or int64", backend, ids=torch.ones(11))
    refused("offsets must not decrease", backend, offsets=torch.tensor([0, 6, 5, 11], dtype=dtype))
    refused("offsets must end with|must end with the number of ids, 11", backend, offsets=torch.tensor([0, 4, 4, 9]))
    refused("offsets must start with 0", backend, offsets=torch.tensor([1, 4, 4, 11]))
    refused("weights must be one per id, 11", backend, weights=torch.ones(1))
    refused("weights must be one per id, 11", backend, weights=torch.ones(12))
    refused("weights must be floating point", backend, weights=torch.ones(11, dtype=dtype))
    for wrong in (math.nan, math.inf):
        refused("weights must be finite", backend, weights=torch.full((11,), wrong))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables(backend):
    rows, state = table_of(ROWS, FORM)
    refused(r"rows must be uint8 of shape \(rows, 9\), got torch.float32 of shape .*encode_trained makes them", backend,
            rows=torch.zeros(ROWS, 8))  # fmt: skip
    refused(r"rows must be uint8 of shape \(rows, 9\), got torch.uint8 of shape \[30, 8\]", backend, rows=rows[:, 1:])
    refused(r"state must be uint8 of shape \(rows, 4\)", backend, state=state[:, 1:])
    refused("state must be one per row, 30, got 29", backend, state=state[1:])
    wide = torch.zeros(ROWS, 20, dtype=torch.uint8)
    refused(r"rows must be contiguous where they are updated, got strides \[20, 1\]", backend, rows=wide[:, :9])
    refused(r"state must be contiguous", backend, state=wide[:, :4])
    refused("one device", backend, ids=torch.zeros(11, dtype=torch.int64, device="meta"))
    refused("grads must be float32 of shape", backend, lookup=False, grads=torch.zeros(3, 7))
    refused("grads must be float32 of shape", backend, lookup=False, grads=torch.zeros(3, 8, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps(backend):
    for wrong in (math.nan, math.inf, -0.1):
        refused("learning_rate must be finite and at least 0", backend, step=step_of(learning_rate=wrong))
        refused("eps must be finite and at least 0", backend, step=step_of()._replace(eps=wrong))
    for name in ("beta1", "beta2"):
        for wrong in (-0.1, 1.0, math.nan):
            refused(rf"{name} must be in \[0, 1\), got", backend, step=step_of()._replace(**{name: wrong}))
    for name in ("seed", "step", "first_id"):
        for wrong in (-1, 2**63):
            refused(rf"{name} must be in \[0, 2\*\*63\)", backend, step=step_of()._replace(**{name: wrong}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", formats(8), ids=name_of)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite(wrong, form, backend):
    ids = torch.arange(11).flip(0)
    grads = torch.ones(3, 8)
    grads[2, 5] = wrong  # of ids 6 to 0
    refused("table 't': the gradient of id 0 must be finite at step 3", backend, form, False, ids=ids, grads=grads)
    # a bag without ids reaches no row
    rows, state = table_of(ROWS, form)
    grads = torch.ones(3, 8)
    grads[1] = wrong
    update_trained(rows, state, ids, torch.tensor([0, 4, 4, 11]), grads, form, step=step_of(), where=WHERE,
                   backend=backend)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_and_values_that_no_bits_hold(backend):
    ids, offsets = torch.tensor([4, 9, 2]), torch.tensor([0, 1, 2, 3])
    grads = torch.ones(3, 8)
    grads[1] = 1e4
    small = TrainedFormat(8, 8, "rowwise_adagrad", 8)
    refused("optimizer state of id 9 must be at most what 8 bits hold at step 3", backend, small, False,
            ids=ids, offsets=offsets, grads=grads)  # fmt: skip
    grads[1] = 1e20
    for form in formats(8):
        if form.optimizer != "sgd":
            refused("optimizer state of id 9 must be", backend, form, False, ids=ids, offsets=offsets, grads=grads)
    for bits, most in ((8, 15240), (4, 840)):
        refused(rf"values of id 9 must be finite and at most {most} at step 3", backend, TrainedFormat(8, bits, "sgd"),
                False, ids=ids, offsets=offsets, grads=grads)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_that_are_only_read(backend):
    wide = torch.zeros(ROWS, 20, dtype=torch.uint8)
    rows, state = table_of(ROWS, FORM)
    wide[:, :9] = rows
    bags = bags_of([4, 0, 7], ROWS, 8, weighted=True)
    ids, offsets = bags.ids.repeat_interleave(2)[::2], bags.offsets.repeat_interleave(3)[::3]
    weights = torch.ones(1).expand(11)
    assert not any(tensor.is_contiguous() for tensor in (ids, offsets, weights))
    options = {"step": None, "where": WHERE, "backend": backend}
    expected = trained_bag(rows, state, bags.ids, bags.offsets, FORM, weights=torch.ones(11), **options)
    assert torch.equal(trained_bag(wide[:, :9], state, ids, offsets, FORM, weights=weights, **options), expected)
    after = rows.clone(), state.clone()
    update_trained(rows, state, ids, offsets, bags.grads.t().contiguous().t(), FORM, weights=weights, step=step_of(),
                   where=WHERE, backend=backend)  # fmt: skip
    update_trained(*after, bags.ids, bags.offsets, bags.grads, FORM, weights=torch.ones(11), step=step_of(),
                   where=WHERE, backend="torch")  # fmt: skip
    assert torch.equal(rows, after[0]) and torch.equal(state, after[1])


def check_every_format() -> None:
    """Compare the bits that the kernels write with the reference's."""
    torch.manual_seed(0)
    for form in (form for width in (8, 10, 64) for form in formats(width)):
        tables = [table_of(200, form)]
        tables.append(tuple(part.clone() for part in tables[0]))
        for number in range(3):
            bags = bags_of([3] * 100, 200, form.width, weighted=True)
            for table, backend in zip(tables, ("cpp", "torch"), strict=True):
                update_trained(
                    *table, *bags[:2], bags.grads, form, weights=bags.weights, step=step_of(number), where=WHERE,
                    backend=backend,
                )  # fmt: skip
        assert all(torch.equal(one, other) for one, other in zip(*tables, strict=True)), form
        pooled = trained_bag(*tables[0], *bags[:2], form, step=None, where=WHERE, backend="cpp")
        values = decode_trained(tables[0][0], form)[bags.ids].view(100, 3, form.width).sum(1)
        torch.testing.assert_close(pooled, values, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_writes_the_same_bits(capability):
    code = "from tests.ops.test_trained_refusals import check_every_format; check_every_format()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_shard_names_the_id_of_the_whole_table(backend):
    form = TrainedFormat(8, 8)
    rows, state = encode_trained(torch.randn(5, 8), form), torch.zeros(5, 4, dtype=torch.uint8)
    grads = torch.full((1, 8), float("nan"))
    with pytest.raises(ValueError, match="the gradient of id 1003 must be finite"):
        update_trained(
            rows, state, torch.tensor([3]), None, grads, form, step=step_of(first_id=1000), where=WHERE, backend=backend
        )
