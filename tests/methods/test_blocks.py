"""Blocks by popularity: against plain loops over ids, and what says which id is in which block."""

import logging
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torchrec import EmbeddingConfig, KeyedJaggedTensor, PoolingType

from tests.cases import DIM, NUM_ROWS, batch, counts, fit, fitted, fresh, rows, table
from torchrec_compress import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    compress,
    compress_into,
    decompress,
)
from torchrec_compress.methods import BlocksConfig, NarrowConfig, TableData
from torchrec_compress.methods.storage import NO_ROW
from torchrec_compress.ops import coded_ids_bytes

IDS = torch.arange(NUM_ROWS)
SORTED = BlocksConfig(order="ids", widths=(16, 8, 4))
COUNTED = BlocksConfig(shares=(0.1, 0.2), widths=(12, 8, 8))
every = pytest.mark.parametrize("config", [SORTED, COUNTED], ids=["ids", "counts"])
SIZES = {SORTED: [40, 121, 242], COUNTED: [40, 81, 282]}


def place_of(config: BlocksConfig, number: int) -> tuple[int, int]:
    """Return block and row of an id, written out: by its rank among look-ups; in a block in the order of ids."""
    ranked = list(range(NUM_ROWS))
    if config.order == "counts":
        ranked.sort(key=lambda each: -int(counts()[each]))  # stable
    first = 0
    for block, size in enumerate(SIZES[config]):
        mine = sorted(ranked[first : first + size])
        if number in mine:
            return block, mine.index(number)
        first += size
    raise AssertionError


PLACES = {config: [place_of(config, number) for number in range(NUM_ROWS)] for config in (SORTED, COUNTED)}


def row_of(config: BlocksConfig, stored: dict[str, Tensor], number: int) -> Tensor:
    block, row = PLACES[config][number]
    narrow = stored[f"item__block_{block}"][row]
    return narrow if len(narrow) == DIM else narrow @ stored[f"projection_{block}"]


def stored(collection) -> dict[str, Tensor]:
    found = {name.removesuffix(".weight").split(".")[-1]: value for name, value in collection.named_parameters()}
    assert sorted(found) == sorted(set(found))
    return found


@every
@pytest.mark.parametrize("kind", ["sum", "mean", "weighted"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_values_and_gradients_are_those_written_out(config, kind, dtype):
    pooling = PoolingType.MEAN if kind == "mean" else PoolingType.SUM
    ours = CompressedEmbeddingBagCollection(
        [table(pooling=pooling)], is_weighted=kind == "weighted", compression=config
    )
    compress_into(ours, {}, counts={"item": counts()})
    leaves = {name: value.detach().clone().requires_grad_() for name, value in stored(ours).items()}
    assert set(leaves) == {f"item__block_{n}" for n in range(3)} | {
        f"projection_{n}" for n, (_, width) in enumerate(config.sizes(table())) if width < DIM
    }
    bags = [[1, 2, 2], [], [402, 0, 60, 150], [7], []]
    factors = torch.randn(8, requires_grad=True) if kind == "weighted" else None
    features = batch(bags)
    features = KeyedJaggedTensor(["item"], features.values().to(dtype), factors, features.lengths().to(dtype))
    ends, ids = features.offsets().tolist(), features.values().tolist()
    expected = []
    for first, last in pairwise(ends):
        total = torch.zeros(DIM)
        for place in range(first, last):
            row = row_of(config, leaves, ids[place])
            total = total + (row if factors is None else row * factors[place])
        expected.append(total / max(last - first, 1) if kind == "mean" else total)
    got, loss = ours(features).values(), torch.randn(5, DIM)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-5)
    more = [] if factors is None else [factors]
    mine = torch.autograd.grad((got * loss).sum(), [*stored(ours).values(), *more])
    theirs = torch.autograd.grad((torch.stack(expected) * loss).sum(), [*leaves.values(), *more], allow_unused=True)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-5, atol=1e-5)


@every
def test_unpooled_rows_and_their_gradients_are_the_same(config):
    tables = [EmbeddingConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=DIM, feature_names=["item"])]
    ours = CompressedEmbeddingCollection(tables, compression=config)
    compress_into(ours, {}, counts={"item": counts()})
    leaves = {name: value.detach().clone().requires_grad_() for name, value in stored(ours).items()}
    expected = torch.stack([row_of(config, leaves, number) for number in range(NUM_ROWS)])
    got = ours(batch([IDS.tolist()]))["item"].values()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours.table_rows("item", IDS), expected)
    loss = torch.randn(NUM_ROWS, DIM)
    mine = torch.autograd.grad((got * loss).sum(), [*stored(ours).values()])
    theirs = torch.autograd.grad((expected * loss).sum(), [*leaves.values()])
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@every
def test_an_id_has_one_row_and_every_row_an_id(config):
    parts, places = config.parts(table(), 0).bags, fitted(config).decoder.bank("item")._buffers.get("places")
    numbers = [part.remap(IDS, places) for part in parts]
    assert [(numbers[block][i], block) for i, (block, _) in enumerate(PLACES[config])] == [
        (row, block) for block, row in PLACES[config]
    ]
    assert all(int((mine > NO_ROW).sum()) == part.num_embeddings for mine, part in zip(numbers, parts, strict=True))
    assert [part.remap(IDS.int(), places).dtype for part in parts] == [torch.int32] * 3


def test_an_id_is_looked_up_in_its_own_block_alone():
    collection, seen = fresh(SORTED), []
    collection.bags.native.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    collection(batch([[0, 39, 40], [402], []]))
    (features,) = seen
    assert features.values().tolist() == [0, 39, 0, 241]
    assert features.lengths().tolist() == [2, 0, 0, 1, 0, 0, 0, 1, 0]
    assert features.length_per_key() == [2, 1, 1]


def test_bytes_are_rows_projections_and_what_says_where_ids_are():
    rows_of = sum(4 * size * width for size, width in zip(SIZES[SORTED], (16, 8, 4), strict=True))
    assert SORTED.stored_bytes(table()) == rows_of + 4 * DIM * (8 + 4)
    rows_of = sum(4 * size * width for size, width in zip(SIZES[COUNTED], (12, 8, 8), strict=True))
    assert COUNTED.stored_bytes(table()) == rows_of + 4 * DIM * (12 + 8 + 8) + 3 * coded_ids_bytes(NUM_ROWS) + 1


def test_widths_follow_the_ratio():
    wide = table(embedding_dim=64)
    assert [width for _, width in BlocksConfig(shares=(0.1, 0.1, 0.2)).sizes(wide)] == [64, 32, 16, 8]
    assert [width for _, width in BlocksConfig(shares=(0.1, 0.1, 0.2), ratio=4).sizes(wide)] == [64, 16, 4, 4]


@every
def test_a_fit_keeps_popular_rows_and_the_best_directions_of_the_others(config):
    """Of each block as well as narrow rows of that width fitted to that block alone."""
    served = decompress(fitted(config)).embedding_bags["item"].weight
    among = torch.tensor([block for block, _ in PLACES[config]])
    for block, (size, width) in enumerate(config.sizes(table())):
        mine = among == block
        if width == DIM:
            assert torch.equal(served[mine], rows()[mine])
            continue
        alone = table(num_embeddings=size)
        state = NarrowConfig(width=width).fit(alone, TableData(rows()[mine], counts()[mine]))
        torch.testing.assert_close(
            served[mine], state.native["rows"] @ state.decoder["projection"], rtol=1e-4, atol=1e-5
        )


def test_a_fit_in_the_metric_of_the_loss_errs_less_in_it():
    root = torch.diag(torch.tensor([30.0] + [1.0] * (DIM - 1), dtype=torch.float64))
    errors = []
    for curvature in (None, root):
        state = SORTED.fit(table(), TableData(rows(), counts(), curvature=curvature))
        collection = fresh(SORTED)
        collection.load_table("item", state)
        error = (decompress(collection).embedding_bags["item"].weight.detach() - rows()).double()
        errors.append(float(((error @ root) * error).sum(1) @ counts().double()))
    assert errors[1] < errors[0]


def test_fits_from_a_sample_serve_the_same_popular_rows():
    sample = TableData(rows()[::2], counts(), ids=IDS[::2])
    state = COUNTED.learn(table(), sample).encode_all(rows())
    assert torch.equal(state.decoder["places"], COUNTED.fit(table(), TableData(rows(), counts())).decoder["places"])
    none = TableData(rows()[60:80], counts(), ids=IDS[60:80])  # of the first block
    assert SORTED.learn(table(), none).encode_all(rows()).native["block_0"].equal(rows()[:40])


def said(caplog, collection) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        collection(batch([[1]]))
        collection(batch([[2]]))
        collection.table_rows("item", IDS[:3])
    return [record.getMessage() for record in caplog.records if "cut in the order of ids" in record.getMessage()]


def test_an_order_that_nobody_gave_is_said(caplog):
    collection = fresh(COUNTED)
    (message, *_) = said(caplog, collection)
    assert message.startswith("table 'item': its blocks are cut in the order of ids, as if 0 were the most looked up")
    compress_into(collection := fresh(COUNTED), {}, counts={"item": counts()})
    assert said(caplog, collection) == said(caplog, fitted(COUNTED)) == said(caplog, fresh(SORTED)) == []
    collection = fresh(COUNTED)
    collection.load_state_dict(fitted(COUNTED).state_dict())
    assert said(caplog, collection) == []
    compress_into(collection := fresh(COUNTED), {}, counts={"item": NUM_ROWS - IDS})  # as sorted as it starts
    assert said(caplog, collection) == []


def test_places_that_came_as_zeros_from_the_meta_device_are_those_of_a_start(caplog):
    collection, other = fresh(COUNTED), fresh(COUNTED)
    other.load_state_dict(collection.state_dict())
    other.decoder.bank("item").places.zero_()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(other(batch([[1, 200]])).values(), collection(batch([[1, 200]])).values())
    assert "cut in the order of ids" in caplog.text


def test_counts_that_a_fit_needs_are_asked_for():
    with pytest.raises(ValueError, match="order='counts' must be given look-ups per id, got no counts"):
        compress(decompress(fitted(SORTED)), COUNTED)
    compress(decompress(fitted(SORTED)), SORTED)


def test_a_checkpoint_brings_the_blocks_along():
    collection = fresh(COUNTED)
    collection.load_state_dict(fitted(COUNTED).state_dict())
    assert torch.equal(collection.table_rows("item", IDS), fitted(COUNTED).table_rows("item", IDS))
    with pytest.raises(ValueError, match="the checkpoint's method and sizes must be those of"):
        fresh(SORTED).load_state_dict(fitted(COUNTED).state_dict())


def test_two_features_of_a_table_and_two_tables_of_a_feature():
    tables = [
        table(name="a", feature_names=["x", "y"], pooling=PoolingType.MEAN),
        table(name="b", feature_names=["x"], pooling=PoolingType.MEAN),
    ]
    ours = CompressedEmbeddingBagCollection(tables, compression={"a": SORTED, "b": NarrowConfig(width=4)})
    ids = torch.tensor([1, 50, 400, 3, 300])
    out = ours(KeyedJaggedTensor.from_lengths_sync(["x", "y"], ids, torch.tensor([3, 0, 1, 1])))
    assert out.keys() == ["x@a", "y", "x@b"]
    mine = ours.table_rows("a", ids)
    torch.testing.assert_close(out["x@a"], torch.stack([mine[:3].mean(0), torch.zeros(DIM)]))
    torch.testing.assert_close(out["y"], mine[3:])
    torch.testing.assert_close(out["x@b"][0], ours.table_rows("b", ids[:3]).mean(0))


def test_a_sharded_fit_adds_up():
    """Ranks encode ids of their own, then sum."""
    data = TableData(rows(), counts())
    halves = [COUNTED.learn(table(), data) for _ in range(2)]
    halves[0].encode(IDS[:200], rows()[:200])
    halves[1].encode(IDS[200:], rows()[200:])
    told: list[Tensor] = []
    halves[1].add_up(lambda each: told.append(each.clone()))
    left = iter(told)
    halves[0].add_up(lambda each: each.add_(next(left)))
    found, expected = halves[0].finish(), COUNTED.fit(table(), data)
    assert found.native.keys() == expected.native.keys()
    assert all(torch.equal(found.native[name], value) for name, value in expected.native.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": ()}, "shares must be above 0 and sum up to less than 1, one at least"),
        ({"shares": (0.5, 0.5)}, "shares must be above 0 and sum up to less than 1"),
        ({"shares": (0.5, -0.1)}, "shares must be above 0"),
        ({"shares": (float("nan"),)}, r"BlocksConfig.shares\[0\]: must be finite"),
        ({"shares": 0.5}, "BlocksConfig.shares: must be a list, got 0.5"),
        ({"widths": (16, 8)}, "widths must be one more than shares"),
        ({"widths": (8, 16, 4)}, "widths must not ascend"),
        ({"widths": (16, 8, 4), "ratio": 4}, "ratio must be left out with widths"),
        ({"ratio": 1}, "ratio must be at least 2"),
        ({"order": "popularity"}, "order must be 'counts' or 'ids'"),
    ],
)
def test_bad_settings_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        BlocksConfig(**options)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"widths": (16, 8, 6)}, {}, r"table 'item': width must be a multiple of 4 in \[4, 12\].*the last block"),
        ({"widths": (16, 16, 16)}, {}, r"width must be a multiple of 4 in \[4, 12\]"),
        ({"widths": (20, 8, 4)}, {}, r"width must be a multiple of 4 in \[4, 16\]"),
        ({}, {"embedding_dim": 10}, "embedding_dim must be a multiple of 4 above 4 with blocks"),
    ],
)
def test_tables_that_it_cannot_store_are_told(options, changes, message):
    with pytest.raises(ValueError, match=message):
        fresh(BlocksConfig(**options), **changes)


def test_a_table_too_small_for_all_blocks_stays_dense():
    assert fresh(COUNTED, num_embeddings=3).methods()["item"].method == "dense"
    with pytest.raises(ValueError, match=r"every block must have a row, got \[1, 1, 0\] of 2 ids"):
        COUNTED.check(table(num_embeddings=2))


def test_it_starts_with_the_spread_of_the_users_table():
    wide = {"num_embeddings": 20_000, "init_fn": lambda weight: torch.nn.init.uniform_(weight, -0.3, 0.3)}
    start = (
        fresh(BlocksConfig(order="ids", widths=(16, 8, 4)), **wide).table_rows("item", torch.arange(20_000)).detach()
    )
    for first, last in ((0, 2000), (2000, 8000), (8000, 20_000)):
        assert float(start[first:last].std()) == pytest.approx(0.3 / 3**0.5, rel=0.1)


def test_fits_of_half_precision_tables_are_told_what_does_not_fit():
    from torchrec.modules.embedding_configs import DataType

    half = table(data_type=DataType.FP16)
    state = SORTED.fit(half, TableData(rows(), counts()))
    collection = fresh(SORTED, data_type=DataType.FP16)
    collection.load_table("item", state)
    assert {weight.dtype for _, weight in collection._native_weights("item")} == {torch.float16}
    torch.testing.assert_close(
        collection(batch([[5], [300]])).values(), fit(SORTED)(batch([[5], [300]])).values(), rtol=1e-2, atol=1e-2
    )
    with pytest.raises(ValueError, match=r"must be in .* for data_type FP16"):
        SORTED.fit(half, TableData(rows() * 1e6, counts()))
