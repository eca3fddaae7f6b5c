"""What every manager must keep to under TorchRec's train pipelines, over every case of `tests.managers.cases`."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.cases import has_manager, is_managed
from tests.managers.cases import CASES
from tests.managers.training import draw, run, shard, share, state_of, together
from torchrec_compress import after_step, discard
from torchrec_compress.methods import METHODS

STEPS = 12
every = pytest.mark.parametrize("case", CASES)


def same(one: dict, other: dict, near: float = 1e-5) -> None:
    """Compare states: whole numbers equal, the rest near."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if value.is_floating_point():
            torch.testing.assert_close(
                other[name], value, rtol=near, atol=near, msg=lambda text, n=name: f"{n}: {text}"
            )
        else:
            assert torch.equal(other[name], value), name


def trained(case: str, how: str, optimizer: str, pipelined: bool) -> dict:
    model, optimizers = shard(CASES[case], how, optimizer)
    before = state_of(model)
    run(model, optimizers, range(STEPS), pipelined)
    return {**state_of(model), "before": before}


def by_world(ranks, *arguments) -> tuple[dict, dict]:
    results = ranks.run(trained, *arguments)
    return together([result.pop("before") for result in results]), together(results)


def test_every_manager_has_a_case():
    from tests.cases import CASES as METHOD_CASES

    managed = {name for name in METHODS if has_manager(METHOD_CASES[name][0])}
    assert managed == {config.method for config in CASES.values()}


@every
@pytest.mark.parametrize("how", ["row_wise", "table_wise"])
def test_one_two_and_four_ranks_train_alike(one_rank, two_ranks, four_ranks, case, how):
    before, expected = by_world(one_rank, case, how, "rowwise", False)
    moved = [name for name in expected if name.endswith(("hot_ids", ".draw"))]
    assert len(moved) == 2
    assert all(expected[name][..., -1].any() for name in moved)
    for ranks in (two_ranks, four_ranks):
        start, got = by_world(ranks, case, how, "rowwise", True)
        same(
            {k: v for k, v in before.items() if "embeddings" in k},
            {k: v for k, v in start.items() if "embeddings" in k},
        )
        same(expected, got)


@every
@pytest.mark.parametrize("optimizer", ["adagrad", "sgd"])
def test_any_optimizer_in_the_backward(one_rank, two_ranks, case, optimizer):
    _, expected = by_world(one_rank, case, "row_wise", optimizer, False)
    _, got = by_world(two_ranks, case, "row_wise", optimizer, True)
    same(expected, got, near=1e-4)


def save(case: str, how: str, folder: str) -> tuple[dict, dict]:
    model, optimizers = shard(CASES[case], how)
    run(model, optimizers, range(6))
    dcp.save({"model": model.state_dict(), "optimizer": optimizers.state_dict()}, checkpoint_id=folder)
    saved = state_of(model)
    run(model, optimizers, range(6, 10))
    return saved, state_of(model)


def load(case: str, how: str, folder: str) -> tuple[dict, dict]:
    model, optimizers = shard(CASES[case], how, seed=1)
    run(model, optimizers, range(20, 22))  # other values and another sketch, to be replaced
    state = {"model": model.state_dict(), "optimizer": optimizers.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    optimizers.load_state_dict(state["optimizer"])
    loaded = state_of(model)
    run(model, optimizers, range(6, 10))
    return loaded, state_of(model)


@every
@pytest.mark.parametrize(
    ("saved", "loaded"), [("row_wise", "table_wise"), ("table_wise", "row_wise"), ("row_wise",) * 2]
)
def test_saved_by_one_number_of_ranks_loaded_by_another(two_ranks, four_ranks, tmp_path: Path, case, saved, loaded):
    first = four_ranks.run(save, case, saved, str(tmp_path))
    second = two_ranks.run(load, case, loaded, str(tmp_path))
    for number in (0, 1):
        same(
            together([pair[number] for pair in first]), together([pair[number] for pair in second]), near=1e-5 * number
        )


def evaluated(case: str) -> tuple[dict, dict, bool]:
    model, optimizers = shard(CASES[case], "row_wise")
    run(model, optimizers, range(3))
    before = state_of(model)
    model.eval()
    outputs = []
    for _ in range(2):
        with torch.no_grad():
            outputs.append(model(share(draw(3)))[1])
    model.train()
    with torch.no_grad():
        model(share(draw(4)))
    return before, state_of(model), torch.equal(*outputs)


@every
def test_evaluation_writes_nothing(two_ranks, case):
    results = two_ranks.run(evaluated, case)
    assert all(equal for _, _, equal in results)
    same(together([before for before, _, _ in results]), together([after for _, after, _ in results]), near=0.0)


def skipped(case: str, skip: bool) -> dict:
    """Train, and in the middle look a batch up that is left out."""
    model, optimizers = shard(CASES[case], "row_wise", "sgd")
    run(model, optimizers, range(4), pipelined=False)
    if skip:
        model.train()
        loss = model(share(draw(9)))[0]
        (loss * 0).backward()  # a fused optimizer steps in the backward: by nothing
        discard(model)
        torch.zeros((), requires_grad=True).backward()  # as `Loss` does: a loss that hangs on nothing
        model(share(draw(10)))
        discard(model)
    run(model, optimizers, range(4, 6), pipelined=False)
    return state_of(model)


@every
def test_a_skipped_step_changes_nothing(two_ranks, case):
    same(together(two_ranks.run(skipped, case, False)), together(two_ranks.run(skipped, case, True)), near=0.0)


def forgets(case: str) -> str:
    model, optimizers = shard(CASES[case], "row_wise")
    try:
        run(model, optimizers, range(70), tells=False)
    except RuntimeError as error:
        return str(error)
    return ""


def looks_ahead(case: str) -> str:
    model, optimizers = shard(CASES[case], "row_wise")
    model.train()
    first, second = (model(share(draw(step)))[0] for step in (0, 1))
    first.backward()
    after_step(model, 0, optimizers)
    try:
        second.backward()
    except RuntimeError as error:
        return str(error)
    return ""


@every
def test_a_loop_that_forgets_after_step_is_told(two_ranks, case):
    for message in two_ranks.run(forgets, case):
        assert (
            "the end of a step must be told before 64 backwards, got none; call torchrec_compress.after_step" in message
        )


@every
def test_a_look_up_ahead_of_the_last_step_is_an_error(two_ranks, case):
    for message in two_ranks.run(looks_ahead, case):
        assert "the backward of a look-up must come before the end of its step" in message


def from_meta(case: str) -> tuple[dict, bool]:
    model, optimizers = shard(CASES[case], "row_wise", meta=True)
    state = state_of(model)
    run(model, optimizers, range(2))
    with torch.no_grad():
        return state, bool(torch.isfinite(model(share(draw(3)))[1]).all())


@every
def test_shards_made_from_meta_start_empty(two_ranks, case):
    results = two_ranks.run(from_meta, case)
    assert all(finite for _, finite in results)
    whole = together([state for state, _ in results])
    managed = {name: value for name, value in whole.items() if ".managers." in name}
    if is_managed(CASES[case]):
        assert managed
        assert not any(value.any() for value in managed.values())
        return
    for table in ("item", "user"):
        assert whole[f"embeddings.code_tables.banks.{table}.codes"].any()
        salt, draws = whole[f"embeddings.decoder.banks.{table}.draw"][0].tolist()
        assert salt > 0
        assert draws == 0
