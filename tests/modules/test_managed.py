"""Unsharded tables with managers: what a look-up serves, and what a loop must and must not do."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor

from tests.cases import NUM_ROWS, batch, counts, dense_collection, fit, fresh, rows, table
from torchrec_compress import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    after_step,
    compress,
    discard,
)
from torchrec_compress.methods import CafeConfig
from torchrec_compress.modules.turn import MOST_BACKWARDS

SMALL = CafeConfig(num_hot_rows=8, num_cold_rows=40, num_blocks=4, importance="frequency", decay=1.0)
TWO = CafeConfig(num_hot_rows=8, num_cold_rows=40, num_medium_rows=16, num_blocks=4, importance="frequency", decay=1.0)
BAGS = [[1, 1, 1], [2], [], [402, 1]]


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train(model, optimizer, step: int, bags=BAGS) -> None:
    optimizer.zero_grad()
    (model(batch(bags)).values() - 1).square().sum().backward()
    optimizer.step()
    after_step(model, step, optimizer)


def weight_of(model) -> torch.Tensor:
    return model.managed.native["item"].embeddings["item__rows"].weight


def rows_of(model, ids) -> torch.Tensor:
    (config,) = model.managed.configs()
    places = config.part.blocks.places(torch.tensor(ids))
    return model.managed.managers["item"].remap(places, train=False)


@pytest.mark.parametrize("config", [SMALL, TWO])
def test_a_promoted_row_is_served_and_has_its_state(config):
    model = fresh(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    train(model, optimizer, 0)
    ((hot, *_),) = rows_of(model, [1]).tolist()
    per_block = weight_of(model).shape[0] // 4
    assert hot % per_block < 2
    moments = optimizer.state[weight_of(model)]["exp_avg"]
    assert moments[hot].any()
    served = model.table_rows("item", torch.tensor([1])).detach()
    assert torch.equal(served[0], weight_of(model)[hot].detach())
    before = model.table_rows("item", torch.arange(NUM_ROWS)).detach().clone()
    train(model, optimizer, 1, [[1]])
    after = model.table_rows("item", torch.arange(NUM_ROWS)).detach()
    changed = (before != after).any(1).nonzero().view(-1).tolist()
    assert 1 in changed  # and with Adam every row that has a moment


def test_a_hot_id_moves_no_other():
    model = fresh(SMALL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, 0)
    before = model.table_rows("item", torch.arange(NUM_ROWS)).detach().clone()
    train(model, optimizer, 1, [[1, 1]])
    after = model.table_rows("item", torch.arange(NUM_ROWS)).detach()
    assert (before != after).any(1).nonzero().view(-1).tolist() == [1]


def test_medium_ids_train_both_rows():
    model = fresh(TWO)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, 0, [[7]])
    ((cold, medium),) = rows_of(model, [7]).tolist()
    assert medium >= 0
    before = weight_of(model).detach().clone()
    assert not before[medium].any()  # it starts with no say
    optimizer.zero_grad()
    out = model(batch([[7], [7, 8]])).values()
    out[0].sum().backward()
    gradient = weight_of(model).grad
    assert gradient[[cold, medium]].eq(1).all()
    assert gradient.any(1).nonzero().view(-1).tolist() == sorted([cold, medium])


def test_evaluation_changes_nothing():
    model = fit(SMALL).eval()
    before = state(model)
    with torch.no_grad():
        model(batch(BAGS))
    out = model(batch(BAGS)).values()
    out.sum().backward()
    model.train()
    with torch.no_grad():
        model(batch(BAGS))
    after_step(model, 0, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


def test_a_discarded_batch_changes_nothing():
    model = fresh(SMALL)
    before = state(model)
    model(batch(BAGS)).values().sum().backward()
    discard(model)
    late = model(batch(BAGS)).values().sum()
    discard(model)
    late.backward()  # comes after, and does not count either
    after_step(model, 0, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


def test_a_backward_after_the_end_of_its_step_is_an_error():
    """What TorchRec's semi-synchronous pipeline does: rows may have moved since they were looked up."""
    model = fresh(SMALL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model(batch(BAGS)).values().sum()
    second = model(batch(BAGS)).values().sum()  # ahead
    first.backward()
    after_step(model, 0, optimizer)
    with pytest.raises(RuntimeError, match="the backward of a look-up must come before the end of its step"):
        second.backward()


def test_a_loop_that_forgets_the_end_of_its_steps_is_told():
    model = fresh(SMALL)
    for _ in range(MOST_BACKWARDS):
        model(batch([[1]])).values().sum().backward()
    with pytest.raises(RuntimeError, match=r"must be told before 64 backwards.*after_step\(model, step\)"):
        model(batch([[1]]))
    model.eval()(batch([[1]]))
    after_step(model.train(), 0, torch.optim.SGD(model.parameters(), lr=0.1))
    model(batch([[1]]))


def test_gradients_add_up_over_several_batches():
    one, other = fresh(SMALL), fresh(SMALL)
    other.load_state_dict(one.state_dict())
    for model, parts in ((one, [BAGS]), (other, [[bag] for bag in BAGS])):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for part in parts:
            model(batch(part)).values().sum().backward()
        optimizer.step()
        after_step(model, 0, optimizer)
    assert all(torch.equal(value, state(other)[name]) for name, value in state(one).items())


@pytest.mark.parametrize("step", [-1, True, 0.0, None])
def test_steps_are_counted_from_zero(step):
    with pytest.raises(ValueError, match="after_step: step must be an int of at least 0, got"):
        after_step(torch.nn.Linear(1, 1), step)


def test_steps_may_be_counted_by_numpy():
    after_step(torch.nn.Linear(1, 1), np.int64(3))


def test_an_unknown_optimizer_is_an_error():
    model = fresh(SMALL)
    with pytest.raises(ValueError, match=r"optimizer that trains its rows must be known.*after_step\(model, step, opt"):
        after_step(model, 0)
    other = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="must train its rows, got SGD of other parameters"):
        after_step(model, 0, other)
    model.requires_grad_(False)
    after_step(model, 0)  # nothing trains them


def test_features_that_share_a_table_count_a_batch_once():
    model = CompressedEmbeddingBagCollection([table(feature_names=["a", "b"])], compression=SMALL)
    features = KeyedJaggedTensor.from_lengths_sync(["a", "b"], torch.tensor([5, 5]), torch.tensor([1, 1]))
    for _ in range(MOST_BACKWARDS):
        model(features).values().sum().backward()
    with pytest.raises(RuntimeError, match="must be told before 64 backwards"):
        model(features)


def test_features_that_share_a_table_share_its_sketch():
    tables = [table(feature_names=["a", "b"])]
    model = CompressedEmbeddingBagCollection(tables, compression=SMALL)
    features = KeyedJaggedTensor.from_lengths_sync(["a", "b"], torch.tensor([5, 5]), torch.tensor([1, 1]))
    model(features).values().sum().backward()
    after_step(model, 0, torch.optim.SGD(model.parameters(), lr=0.1))
    assert float(model.managed.managers["item"].sketch.scores.sum()) == 2.0


def test_per_id_weights_scale_values_and_gradients():
    tables = [table()]
    weighted = CompressedEmbeddingBagCollection(tables, is_weighted=True, compression=SMALL)
    out = weighted(batch([[3, 4]], [2.0, -1.0])).values()
    alone = weighted.table_rows("item", torch.tensor([3, 4]))
    torch.testing.assert_close(out[0], 2 * alone[0] - alone[1])


def test_unpooled_tables_are_managed_too():
    item = EmbeddingConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=["item"])
    model = CompressedEmbeddingCollection([item], compression=SMALL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch([[9, 9], [9]]))["item"].values().sum().backward()
    optimizer.step()
    after_step(model, 0, optimizer)
    assert int(rows_of(model, [9])[0, 0]) % 12 < 2


def test_a_fit_gives_the_most_looked_up_their_own_rows():
    model, seen, trained = fit(SMALL), counts(), rows()
    (config,) = model.managed.configs()
    found = rows_of(model, range(NUM_ROWS))[:, 0]
    hot = (found % 12 < 2).nonzero().view(-1)
    assert len(hot) == 8
    for block in range(4):
        mine = torch.arange(block, NUM_ROWS, 4)  # ids are dealt like cards
        best = mine[seen[mine].argsort(descending=True)[:2]]
        assert set(best.tolist()) <= set(hot.tolist())
    assert torch.equal(model.table_rows("item", hot).detach(), trained[hot])
    first = torch.arange(NUM_ROWS)[found == found[~(found % 12 < 2)][0]]
    weights = seen[first].float().clamp(min=1e-3).unsqueeze(1)
    mean = (trained[first] * weights).sum(0) / weights.sum()
    torch.testing.assert_close(model.table_rows("item", first[:1])[0].detach(), mean)
    assert config.part.blocks.num_blocks == 4


def test_a_fit_without_counts_is_an_error():
    with pytest.raises(ValueError, match="a fit of 'cafe' must be given look-ups per id, got no counts"):
        compress(dense_collection(), SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hot_rows": 10}, "num_hot_rows must be a multiple of 4 and at least 4, got 10; take 8"),
        ({"num_hot_rows": 0}, "num_hot_rows must be a multiple of 4 and at least 4, got 0; take 4"),
        ({"num_cold_rows": 3}, "num_cold_rows must be a multiple of 4 and at least 4, got 3; take 4"),
        ({"num_medium_rows": 3}, "num_medium_rows must be a multiple of 4 and at least 0, got 3; take 4"),
        ({"num_sketch_slots": 20}, "num_sketch_slots must be a multiple of 16 and at least 16, got 20; take 16"),
        ({"num_blocks": 0}, "num_blocks, slots_per_bucket and every must be at least 1, got 0, 4 and 1"),
        ({"importance": "age"}, "importance must be 'gradient' or 'frequency', got 'age'"),
        ({"decay": 0.0}, r"decay must be in \(0, 1\], got 0.0"),
        ({"threshold": -1.0}, "threshold must be a finite score of at least 0, got -1.0"),
    ],
)
def test_sizes_are_checked(options, message):
    with pytest.raises(ValueError, match=f"table 'item': {message}"):
        fresh(replace(SMALL, **options))


def test_a_table_that_would_not_shrink_stays_dense():
    tiny = EmbeddingBagConfig(name="day", num_embeddings=7, embedding_dim=16, feature_names=["day"])
    model = CompressedEmbeddingBagCollection([tiny], compression=SMALL)
    assert model.methods()["day"].method == "dense"


def test_bytes_of_training_and_of_serving():
    footprint = fresh(SMALL).footprint()
    mine = footprint.tables["item"]
    assert mine.native_bytes == 48 * 16 * 4
    assert mine.managed_bytes == 32 * 12 + 8 * 4  # slots: id, score and row; hot rows: id
    assert mine.training_bytes == 32 * 4 + 8 * 4
    assert mine.served_bytes == SMALL.served_bytes(table()) == mine.total_bytes - mine.training_bytes
    assert footprint.served_bytes == footprint.to_dict()["served_bytes"] == mine.served_bytes
    two = fresh(TWO).footprint().tables["item"]
    assert two.training_bytes == 8 * 4  # look-ups read scores


def test_another_seed_or_size_of_a_checkpoint_is_refused():
    saved = fit(SMALL).state_dict()
    with pytest.raises(ValueError, match="checkpoint's seed must be those"):
        fresh(SMALL, seed=1).load_state_dict(saved)
    other = CafeConfig(num_hot_rows=8, num_cold_rows=40, num_blocks=2, importance="frequency")
    with pytest.raises(ValueError, match="checkpoint's sizes must be those"):
        fresh(other).load_state_dict(saved)
    by_gradient = CafeConfig(num_hot_rows=8, num_cold_rows=40, num_blocks=4)
    with pytest.raises(ValueError, match="checkpoint's method and sizes must be those"):
        fresh(by_gradient).load_state_dict(saved)


def test_training_goes_on_from_a_state_dict():
    one = fresh(SMALL)
    ours = torch.optim.SGD(one.parameters(), lr=0.1)
    for step in range(2):
        train(one, ours, step)
    other = fresh(SMALL)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    theirs = torch.optim.SGD(other.parameters(), lr=0.1)
    train(one, ours, 2, [[2, 2, 2], [9]])
    train(other, theirs, 2, [[2, 2, 2], [9]])
    assert all(torch.equal(value, state(other)[name]) for name, value in state(one).items())


def test_rows_without_a_batch_are_no_training_look_up():
    model = fresh(SMALL)
    before = state(model)
    model.table_rows("item", torch.tensor([5, 5, 5])).sum().backward()
    after_step(model, 0, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(torch.equal(before[name], value) for name, value in state(model).items())
