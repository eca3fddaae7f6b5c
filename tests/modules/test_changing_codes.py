"""Tables whose codes change while they train: what the loop must tell, and what stays checked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchrec import EmbeddingConfig, KeyedJaggedTensor

from tests.cases import batch, fresh, table
from torchrec_compress import CompressedEmbeddingCollection, after_step, discard
from torchrec_compress.methods import CceConfig
from torchrec_compress.modules.after_step import has_managers
from torchrec_compress.modules.turn import MOST_BACKWARDS

CCE = CceConfig(num_codes=4, codebook_size=16, cluster_every=3, cluster_until=6)
ALL = batch([[number] for number in range(403)])
Adagrad = torch.optim.Adagrad


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    """Pull every id's vector to one of its own."""
    targets = torch.randn(403, 16, generator=torch.Generator().manual_seed(1))
    for step in steps:
        optimizer.zero_grad()
        (model(ALL).values() - targets).square().sum().backward()
        optimizer.step()
        after_step(model, step, optimizer)


def made(config: CceConfig = CCE, seed: int = 0) -> tuple[Any, Any]:
    torch.manual_seed(3)
    model = fresh(config, seed=seed)
    return model, Adagrad(model.parameters(), lr=0.1)


def codes_of(model: Any) -> torch.Tensor:
    return model.code_tables.banks["item"].codes.clone()


def test_codes_change_at_the_stated_steps_and_at_no_others():
    model, optimizer = made()
    for step in range(12):
        before, draws = codes_of(model), model.decoder.banks["item"].draw.clone()
        train(model, optimizer, range(step, step + 1))
        moved = not torch.equal(before, codes_of(model))
        assert moved == (step in (2, 5)), step
        assert (int(model.decoder.banks["item"].draw[0, 1]) - int(draws[0, 1])) == int(moved)


def test_a_clustering_keeps_what_was_learned():
    """Fewer vectors are as far from the rows as a table of as many hashed codewords leaves them."""
    model, optimizer = made(CceConfig(num_codes=4, codebook_size=64, cluster_every=10, cluster_until=10))
    train(model, optimizer, range(9))
    with torch.no_grad():
        before = model(ALL).values()
    (model(ALL).values() - before).sum().backward()
    after_step(model, 9, optimizer)
    with torch.no_grad():
        after = model(ALL).values()
    spread = (before - before.mean(0)).square().sum()
    assert 0 < float((after - before).square().sum()) < 0.1 * float(spread)


def test_marks_are_right_after_a_change_and_others_changes_are_seen():
    model, optimizer = made()
    train(model, optimizer, range(3))
    state = model.state_dict()
    model(ALL)
    other, _ = made(seed=1)
    other.load_state_dict(state)
    assert torch.equal(other(ALL).values(), model(ALL).values())
    model.decoder.banks["item"].draw[0, 1] += 1
    with pytest.raises(ValueError, match="table 'item': codes and low-bit rows must be those that a fit or a checkpo"):
        model(ALL)


def test_a_change_launders_no_codes_of_something_else():
    model, optimizer = made()
    train(model, optimizer, range(2))
    model(ALL).values().sum().backward()
    model.code_tables.banks["item"].codes[7] += 1
    with pytest.raises(ValueError, match="table 'item': codes and low-bit rows must be those that a fit or a checkpo"):
        after_step(model, 2, optimizer)


def test_resumed_in_the_middle_it_ends_as_uninterrupted():
    model, optimizer = made()
    train(model, optimizer, range(4))
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(4, 8))
    other, its_own = made(seed=5)
    other.load_state_dict(state[0])
    its_own.load_state_dict(state[1])
    train(other, its_own, range(4, 8))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_the_optimizer_must_be_known_from_the_first_step():
    model, optimizer = made()
    model(ALL).values().sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"table 'item', codebooks: the optimizer .* must be known"):
        after_step(model, 0)
    frozen, _ = made()
    frozen.requires_grad_(False)
    before = codes_of(frozen)
    after_step(frozen, 2)
    assert torch.equal(codes_of(frozen), before)


def test_a_loop_that_forgets_after_step_is_told():
    model, _ = made()
    for _ in range(MOST_BACKWARDS):
        model(ALL).values().sum().backward()
    with pytest.raises(RuntimeError, match="table 'item': the end of a step must be told before 64 backwards"):
        model(ALL)


def test_a_backward_after_the_end_of_its_step_is_an_error():
    model, optimizer = made()
    ahead = model(ALL).values().sum()
    after_step(model, 0, optimizer)
    with pytest.raises(RuntimeError, match="table 'item': the backward of a look-up must come before the end"):
        ahead.backward()


def test_discarded_batches_change_nothing_and_are_not_counted():
    model, _ = made()
    before = copy.deepcopy(model.state_dict())
    for _ in range(MOST_BACKWARDS + 1):
        model(ALL).values().sum().backward()
        discard(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_evaluation_takes_no_turn():
    model, _ = made()
    model.eval()
    for _ in range(MOST_BACKWARDS + 1):
        model(ALL).values().sum().backward()
    assert has_managers(model)


def test_copies_of_a_model_follow_it_and_averages_of_codes_are_refused():
    model, optimizer = made()
    follower, mean = AveragedModel(model), AveragedModel(model, use_buffers=True)
    for step in range(6):
        train(model, optimizer, range(step, step + 1))
        follower.update_parameters(model)
        mean.update_parameters(model)
    assert torch.equal(codes_of(follower.module), codes_of(model))
    follower(ALL)
    with pytest.raises(ValueError, match="table 'item': codes and low-bit rows must be those that a fit or a checkpo"):
        mean(ALL)


def test_unpooled_and_pooled_serve_the_same_before_and_after_a_change():
    model, optimizer = made()
    config = EmbeddingConfig(name="item", num_embeddings=403, embedding_dim=16, feature_names=["item"])
    rows = CompressedEmbeddingCollection([config], compression=CCE)
    for steps in (range(1), range(1, 4)):
        train(model, optimizer, steps)
        rows.load_state_dict(model.state_dict())
        assert torch.equal(rows(ALL)["item"].values(), model(ALL).values())
        assert torch.equal(model.table_rows("item", torch.arange(403)), model(ALL).values())


def test_traces_are_of_evaluation():
    model, _ = made()
    with pytest.raises(ValueError, match="table 'item': a table whose codes change must be traced in evaluation mode"):
        torch.fx.Tracer().trace(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codes": 3}, "num_codes must be a divisor of embedding_dim = 16, got 3"),
        ({"codebook_size": 404}, r"codebook_size must be in \[2, 403\] \(its rows\), got 404"),
        ({"cluster_every": 0}, "cluster_every must be at least 1"),
        ({"cluster_until": -1}, "cluster_until at least 0"),
        ({"optimizer_state": "keep"}, "optimizer_state must be 'mean' or 'reset', got 'keep'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=f"table 'item': .*{message}"):
        CceConfig(**{"num_codes": 4, "codebook_size": 16, **options}).check(table())


def test_two_byte_pointers():
    config = CceConfig(num_codes=1, codebook_size=300, cluster_every=1)
    big = table(num_embeddings=5000)
    assert config.parts(big, 0).codes.dtype == torch.int16
    model = fresh(config, num_embeddings=5000)
    ids = KeyedJaggedTensor.from_lengths_sync(["item"], torch.arange(5000), torch.ones(5000, dtype=torch.int64))
    optimizer = Adagrad(model.parameters(), lr=0.1)
    model(ids).values().square().sum().backward()
    optimizer.step()
    after_step(model, 0, optimizer)
    assert int(codes_of(model).max()) > 255
    assert torch.isfinite(model(ids).values()).all()
