"""Integers of managers, which no checksum can mark: what has averaged or blended them is found out."""

import copy
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from tests.cases import NUM_ROWS, batch, fresh
from tests.modules.test_managed import BAGS, SMALL, TWO, train
from torchrec_compress import after_step
from torchrec_compress.managers import HotCold
from torchrec_compress.methods import TableState


def trained(config=SMALL, steps: int = 3, seed: int = 0):
    model = fresh(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seeded = torch.Generator().manual_seed(seed)
    for step in range(steps):
        train(model, optimizer, step, torch.randint(0, NUM_ROWS, (6, 40), generator=seeded).tolist())
    return model


AVERAGED = (
    r"table 'item': the integers of its manager must be those that after_step or a checkpoint left, got .*; average"
)


@pytest.mark.parametrize("config", [SMALL, TWO])
def test_averaged_integers_are_an_error_of_the_next_look_up_and_step(config):
    model = trained(config)
    averaged = AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    averaged(batch(BAGS))  # the first is a copy
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3, 6):
        train(model, optimizer, step, torch.randint(0, NUM_ROWS, (6, 40)).tolist())
        averaged.update_parameters(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=AVERAGED):
            averaged(batch(BAGS))
        with pytest.raises(ValueError, match=AVERAGED):
            averaged.module.table_rows("item", torch.arange(3))
        with pytest.raises(ValueError, match=AVERAGED):
            after_step(averaged, 0, torch.optim.SGD(averaged.parameters(), lr=0.1))
    model(batch(BAGS))
    averaged.module.load_state_dict(model.state_dict())
    averaged(batch(BAGS))


def test_copied_integers_are_warned_of_once(caplog):
    model = trained()
    averaged = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3, 6):
        train(model, optimizer, step)
        averaged.update_parameters(model)
        averaged(batch(BAGS))
    (told,) = caplog.messages
    assert "table 'item': the integers of its manager were written by something else than after_step" in told
    key = "managed.managers.item.hot_ids"
    assert torch.equal(averaged.module.state_dict()[key], model.state_dict()[key])


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model,
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.half(),
        lambda model: model._apply(torch.clone),
        lambda model: model.reset_parameters() or model,
        lambda model: model.load_state_dict(trained(seed=1).state_dict()) and model,
        lambda model: model.load_state_dict(trained(seed=1).state_dict(), assign=True) and model,
        lambda model: model.to_empty(device="cpu").reset_parameters() or model,
        lambda model: model.load_table("item", TableState(managed=managed_state(trained(seed=1)))) or model,
    ],
)
def test_what_may_write_to_integers_says_nothing(caplog, change):
    model = change(trained())
    model(batch(BAGS))
    model.table_rows("item", torch.arange(3))
    assert not caplog.messages
    changed = model.managed.managers["item"].hot_ids
    changed.copy_(changed.clone())
    model(batch(BAGS))
    assert len(caplog.messages) == 1


def managed_state(model) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.managed.managers["item"].named_buffers()}


def test_no_step_looks_at_the_integers(monkeypatch):
    looks = []
    fault = HotCold.fault
    monkeypatch.setattr(HotCold, "fault", lambda self: looks.append(self) or fault(self))
    model = trained(steps=6).eval()
    model(batch(BAGS))
    assert len(looks) == 1  # the first


@pytest.mark.parametrize("name", ["sketch.rows", "sketch.ids", "hot_ids"])
def test_integers_out_of_range_are_not_loaded(name):
    model, key = trained(), f"managed.managers.item.{name}"
    saved = copy.deepcopy(model.state_dict())
    saved[key][0] = 10_000
    words = rf"table 'item': the integers of its manager must be .*, got {name} out of \[0, "
    with pytest.raises(ValueError, match=words):
        fresh(SMALL).load_state_dict(saved)
    stored = TableState(managed={**managed_state(model), name: saved[key]})
    with pytest.raises(ValueError, match=words):
        fresh(SMALL).load_table("item", stored)


def test_a_blend_of_state_dicts_is_not_loaded():
    one, other = trained(seed=1).state_dict(), trained(seed=2).state_dict()
    blend = {name: ((value.double() + other[name].double()) / 2).to(value.dtype) for name, value in one.items()}
    blend["decoder.layout"] = one["decoder.layout"]
    with pytest.raises(ValueError, match=AVERAGED):
        fresh(SMALL).load_state_dict(blend)
