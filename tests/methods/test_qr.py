"""Compositional embeddings: against plain loops over ids, and what the public code of the paper gets wrong."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, PoolingType

from tests.cases import NUM_ROWS, batch, counts, fit, fresh, rows, table
from tests.tolerances import assert_trains_alike
from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, decompress
from torchrec_compress.methods import HashConfig, QRConfig, TableData

IDS = torch.arange(NUM_ROWS)
WAYS = [
    QRConfig(num_buckets=25, op=op, partition=partition, num_tables=k)
    for op in ("add", "concat", "mult")
    for partition, k in (("quotient", 2), ("remainders", 2), ("remainders", 3))
] + [QRConfig(num_buckets=7, op=op, num_tables=3) for op in ("add", "concat", "mult")]
every = pytest.mark.parametrize("config", WAYS, ids=[f"{way.op}-{way.partition}-{way.num_tables}" for way in WAYS])


def picks(config: QRConfig, number: int) -> list[int]:
    """Return the rows that an id picks, by the words of the paper."""
    if config.partition == "remainders":
        return [number % size for size in config.sizes(NUM_ROWS)]
    digits = []
    for _ in range(config.num_tables - 1):
        number, digit = divmod(number, config.num_buckets)
        digits.append(digit)
    return [*digits, number]


def row_of(config: QRConfig, stored: list[torch.Tensor], number: int) -> torch.Tensor:
    found = [weight[pick] for weight, pick in zip(stored, picks(config, number), strict=True)]
    if config.op == "concat":
        return torch.cat(found)
    return sum(found[1:], found[0]) if config.op == "add" else math.prod(found[1:], start=found[0])


def native(collection) -> list[torch.Tensor]:
    return [weight for _, weight in collection._native_weights("item")]


@every
@pytest.mark.parametrize("kind", ["sum", "mean", "weighted"])
def test_values_and_gradients_are_those_written_out(config, kind):
    """A bag of products is the sum of them, not the product of sums (dlrm's QREmbeddingBag with op mult)."""
    pooling = PoolingType.MEAN if kind == "mean" else PoolingType.SUM
    ours = CompressedEmbeddingBagCollection(
        [table(pooling=pooling)], is_weighted=kind == "weighted", compression=config
    )
    with torch.no_grad():
        for weight in native(ours):
            weight.normal_()
    leaves = [weight.detach().clone().requires_grad_() for weight in native(ours)]
    bags = [[1, 2, 2], [], [402, 0], [7], []]
    factors = torch.randn(6, requires_grad=True) if kind == "weighted" else None
    features = batch(bags)
    if factors is not None:
        features = KeyedJaggedTensor(["item"], features.values(), factors, features.lengths())
    ends, ids = features.offsets().tolist(), features.values().tolist()
    expected = []
    for first, last in pairwise(ends):
        total = torch.zeros(16)
        for place in range(first, last):
            row = row_of(config, leaves, ids[place])
            total = total + (row if factors is None else row * factors[place])
        expected.append(total / max(last - first, 1) if kind == "mean" else total)
    wanted = [] if factors is None else [factors]
    got = ours(features).values()
    assert_trains_alike(got, torch.stack(expected), [*native(ours), *wanted], [*leaves, *wanted])


@every
def test_unpooled_rows_are_the_same(config):
    tables = [EmbeddingConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=["item"])]
    ours = CompressedEmbeddingCollection(tables, compression=config)
    expected = torch.stack([row_of(config, native(ours), number) for number in range(NUM_ROWS)])
    torch.testing.assert_close(ours(batch([IDS.tolist()]))["item"].values(), expected)
    torch.testing.assert_close(ours.table_rows("item", IDS), expected)


def test_gradients_of_weights_where_one_feature_is_looked_up_in_several_tables():
    """FBGEMM's gradient of a permutation that repeats a feature ends in a segmentation fault."""
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=["b", "a"])
        for name in ("first", "second")
    ]
    config, lengths = QRConfig(num_buckets=7, num_tables=3), torch.tensor([2, 0, 3, 1])
    ours = CompressedEmbeddingBagCollection(tables, is_weighted=True, compression=config)
    ids, weights = torch.randint(0, NUM_ROWS, (6,)), torch.ones(6, requires_grad=True)
    ours(KeyedJaggedTensor(["a", "b"], ids, weights, lengths)).values().sum().backward()
    expected = sum(ours.table_rows(name, ids).sum(1) for name in ("first", "second"))
    torch.testing.assert_close(weights.grad, expected)


@every
def test_no_two_ids_pick_the_same_rows_and_all_rows_are_there(config):
    parts = config.parts(table(), 0).native
    numbers = torch.stack([part.remap(IDS) for part in parts], dim=1)
    assert numbers.tolist() == [picks(config, number) for number in range(NUM_ROWS)]
    assert len(numbers.unique(dim=0)) == NUM_ROWS
    assert [int(mine.max()) + 1 for mine in numbers.T] == [part.num_embeddings for part in parts]
    assert [part.remap(IDS.int()).dtype for part in parts] == [torch.int32] * len(parts)


@every
def test_it_starts_with_the_spread_of_the_users_table(config):
    """Dlrm's own start, uniform_(w, sqrt(1 / n)), sets the lower bound alone: nothing below it, up to 1."""
    options = {name: value for name, value in config.to_dict().items() if name != "method"}
    larger = QRConfig(**{**options, "num_buckets": 34 if config.num_tables == 3 else 201})
    start = fresh(larger, num_embeddings=39_000, init_fn=lambda weight: nn.init.uniform_(weight, -0.3, 0.3))
    served = start.table_rows("item", torch.arange(39_000)).detach()
    assert abs(float(served.mean())) < 0.05
    assert float(served.std()) == pytest.approx(0.3 / 3**0.5, rel=0.1)


@every
def test_rows_of_the_model_are_found_again(config):
    seeded = torch.Generator().manual_seed(3)
    shapes = [(part.num_embeddings, part.embedding_dim) for part in config.parts(table(), 0).native]
    stored = [torch.rand(*shape, generator=seeded) + 0.5 for shape in shapes]
    data = torch.stack([row_of(config, stored, number) for number in range(NUM_ROWS)])
    collection = fresh(config)
    collection.load_table("item", config.fit(table(), TableData(data)))
    error = (collection.table_rows("item", IDS) - data).square().mean() / data.var()
    assert error < 1e-3


@pytest.mark.parametrize("op", ["add", "concat"])
def test_a_fit_is_the_least_squares_as_look_ups_weigh_it(op):
    config, weights = QRConfig(num_buckets=20, op=op), counts().double().clamp(min=1e-3)
    served = fit(config).table_rows("item", IDS).detach().double()
    picked = torch.tensor([picks(config, number) for number in range(NUM_ROWS)])
    first, second = (nn.functional.one_hot(mine).double() for mine in picked.T)
    root, data = weights.sqrt().unsqueeze(1), rows().double()
    pieces = [(first, data[:, :8]), (second, data[:, 8:])]
    if op == "add":
        pieces = [(torch.cat([first, second], dim=1), data)]
    best = torch.cat([design @ torch.linalg.pinv(root * design) @ (root * mine) for design, mine in pieces], dim=1)
    least = ((best - data) * root).square().sum()
    assert ((served - data) * root).square().sum() < 1.01 * least


def test_bytes():
    item = table()
    assert QRConfig(num_buckets=25).stored_bytes(item) == 4 * 16 * (25 + 17)
    assert QRConfig(num_buckets=25, op="mult").stored_bytes(item) == 4 * 16 * (25 + 17)
    assert QRConfig(num_buckets=25, op="concat").stored_bytes(item) == 4 * 8 * (25 + 17)
    assert QRConfig(num_buckets=25, op="concat", width=4).stored_bytes(item) == 4 * (4 * 25 + 12 * 17)
    assert QRConfig(num_buckets=7, num_tables=3).stored_bytes(item) == 4 * 16 * (7 + 7 + 9)
    assert QRConfig(num_buckets=9, num_tables=3, partition="remainders").sizes(NUM_ROWS) == [9, 10, 11]
    assert QRConfig(num_buckets=9, op="concat", num_tables=3).widths(32) == [8, 8, 16]


def test_products_of_ones_start_as_the_hash_trick_and_are_not_pulled_to_zero():
    collection = fresh(QRConfig(num_buckets=25, op="mult"))
    first, second = native(collection)
    assert torch.equal(collection.table_rows("item", IDS), first[IDS % 25]) and bool((second == 1).all())
    assert [part.decay for part in QRConfig(num_buckets=25, op="mult").parts(table(), 0).rows] == [True, False]
    assert all(part.decay for part in QRConfig(num_buckets=25).parts(table(), 0).bags)


def test_ids_of_one_bucket_differ_where_the_hash_trick_serves_them_alike():
    served = decompress(fresh(QRConfig(num_buckets=25))).embedding_bags["item"].weight
    assert len(served.unique(dim=0)) == NUM_ROWS
    assert len(decompress(fresh(HashConfig(num_buckets=42))).embedding_bags["item"].weight.unique(dim=0)) <= 42


def test_a_fit_of_zeros_trains_on():
    """A factor of zeros on a row of zeros would never get a gradient."""
    config = QRConfig(num_buckets=25, op="mult")
    state = config.fit(table(), TableData(torch.zeros(NUM_ROWS, 16)))
    assert not state.native["remainder_0"].any() and bool((state.native["quotient"] == 1).all())


BAD = [
    ({"op": "xor"}, r"qr: op must be one of \['add', 'concat', 'mult'\], got 'xor'"),
    ({"partition": "hash"}, "qr: partition must be one of .*got 'hash'"),
    ({"num_tables": 1}, r"qr: num_tables must be in \[2, 64\], got 1"),
    ({"num_buckets": 1}, "qr: num_buckets must be at least 2, got 1"),
    ({"width": 8}, "qr: width must be left out with op='add'"),
    ({"num_buckets": 25, "num_tables": 3}, r"'item': num_buckets must be in \[2, 20\].*got 25; the nearest is 20"),
    ({"num_tables": 64}, "'item': num_tables must be at most 9 with 403 rows, got 64"),
    ({"num_buckets": 19, "partition": "remainders"}, "num_buckets must be at least 20, .* got 19"),
    ({"op": "concat", "width": 6}, r"width must be a multiple of 4 in \[4, 12\].*got 6; the nearest is 8"),
    ({"op": "concat", "width": 16}, r"got 16; the nearest is 12"),
    ({"op": "concat", "num_tables": 5, "num_buckets": 3}, "at least 20 with 5 rows .* got 16; set num_tables=4, or"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_settings_name_what_works(options, message):
    def make():
        config = QRConfig(**{"num_buckets": 9, **options})
        config.check(table())

    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("num_ids", "count"), [(403, 2), (400, 2), (1_000_000, 2), (10**9, 3), (2**40, 5), (17, 2), (10**18, 2)]
)
def test_the_nearest_that_works_is_the_nearest(num_ids, count):
    of = table(num_embeddings=num_ids)
    with pytest.raises(ValueError, match="at least") as raised:
        QRConfig(num_buckets=2, num_tables=count, partition="remainders").check(of)
    least = int(str(raised.value).split("at least ")[1].split(",")[0])
    QRConfig(num_buckets=least, num_tables=count, partition="remainders").check(of)
    with pytest.raises(ValueError, match=f"at least {least},"):
        QRConfig(num_buckets=least - 1, num_tables=count, partition="remainders").check(of)
    with pytest.raises(ValueError, match="the nearest is") as raised:
        QRConfig(num_buckets=num_ids, num_tables=count).check(of)
    most = int(str(raised.value).split("nearest is ")[1])
    QRConfig(num_buckets=most, num_tables=count).check(of)
    with pytest.raises(ValueError, match=f"the nearest is {most}"):
        QRConfig(num_buckets=most + 1, num_tables=count).check(of)


def test_a_small_table_stays_dense():
    assert fresh(QRConfig(num_buckets=25), num_embeddings=25).methods()["item"].method == "dense"
    assert (
        fresh(QRConfig(num_buckets=20, partition="remainders"), num_embeddings=40).methods()["item"].method == "dense"
    )
