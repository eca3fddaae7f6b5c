"""ROBE: against plain loops over ids and blocks, of one array for all tables."""

from itertools import pairwise

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, PoolingType

from tests.cases import DIM, NUM_ROWS, batch, counts, fit, fresh, rows, table
from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, compress
from torchrec_compress.methods import HashConfig, PQConfig, RobeConfig
from torchrec_compress.methods.robe import signs_of
from torchrec_compress.ops import hash_ids, stable_salt

IDS = torch.arange(NUM_ROWS)
EITHER = pytest.mark.parametrize("signs", [False, True])
WIDTHS = {"a": 16, "b": 8}  # of two tables that share


def sign(name: str, number: int, block: int) -> int:
    return int(signs_of(torch.tensor([number]), [stable_salt(0, f"{name}:sign {block}")]))


def row_of(config: RobeConfig, memory: torch.Tensor, name: str, width: int, number: int) -> torch.Tensor:
    found = []
    for block in range(width // config.block_size):
        place = int(hash_ids(torch.tensor([number]), config.num_blocks, stable_salt(0, f"{name}:{block}")))
        found.append(memory[place] * (sign(name, number, block) if config.signs else 1))
    return torch.cat(found)


def tables(**more):
    return [
        EmbeddingBagConfig(name=name, num_embeddings=400, embedding_dim=width, feature_names=[f"f_{name}"], **more)
        for name, width in WIDTHS.items()
    ]


@EITHER
@pytest.mark.parametrize("kind", ["sum", "mean", "weighted"])
def test_values_and_gradients_are_those_written_out(signs, kind):
    config = RobeConfig(num_blocks=50, block_size=4, signs=signs)
    pooling = PoolingType.MEAN if kind == "mean" else PoolingType.SUM
    ours = CompressedEmbeddingBagCollection(tables(pooling=pooling), is_weighted=kind == "weighted", compression=config)
    (memory,) = ours.parameters()
    assert memory.shape == (50, 4)
    leaf = memory.detach().clone().requires_grad_()
    lengths, ids = torch.tensor([2, 0, 3, 1, 1, 2]), torch.randint(0, 400, (9,))
    factors = torch.randn(9, requires_grad=True) if kind == "weighted" else None
    features = KeyedJaggedTensor(["f_b", "f_a"], ids, factors, lengths)
    expected, bags = {"a": [], "b": []}, [*pairwise(features.offsets().tolist())]
    for name, mine in (("b", bags[:3]), ("a", bags[3:])):
        for first, last in mine:
            total = torch.zeros(WIDTHS[name])
            for place in range(first, last):
                row = row_of(config, leaf, name, WIDTHS[name], int(ids[place]))
                total = total + (row if factors is None else row * factors[place])
            expected[name].append(total / max(last - first, 1) if kind == "mean" else total)
    right = torch.cat([torch.stack(expected["a"]), torch.stack(expected["b"])], dim=1)
    got, loss = ours(features).values(), torch.randn(3, 24)
    torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)
    wanted = [] if factors is None else [factors]
    mine = torch.autograd.grad((got * loss).sum(), [memory, *wanted])
    theirs = torch.autograd.grad((right * loss).sum(), [leaf, *wanted])
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@EITHER
def test_unpooled_rows_are_the_same(signs):
    config, ids = RobeConfig(num_blocks=50, block_size=4, signs=signs), torch.arange(400)
    both = [
        EmbeddingConfig(name=name, num_embeddings=400, embedding_dim=8, feature_names=[f"f_{name}"]) for name in "ab"
    ]
    ours = CompressedEmbeddingCollection(both, compression=config)
    (memory,) = ours.parameters()
    for name in "ab":
        expected = torch.stack([row_of(config, memory, name, 8, number) for number in range(400)])
        torch.testing.assert_close(ours.table_rows(name, ids), expected)
        features = KeyedJaggedTensor.from_lengths_sync(["f_a", "f_b"], torch.cat([ids, ids]), torch.tensor([400, 400]))
        torch.testing.assert_close(ours(features)[f"f_{name}"].values(), expected)


def test_signs_are_fair_and_independent():
    signs = signs_of(torch.arange(10_000), [stable_salt(0, f"item:sign {number}") for number in range(4)])
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert float(signs.mean(0).abs().max()) < 0.05
    assert float((signs.T @ signs / 10_000 - torch.eye(4)).abs().max()) < 0.05
    config = RobeConfig(num_blocks=90, block_size=8, signs=True)
    assert config.sign_salts(table()) != config.sign_salts(table(name="user")) and not RobeConfig(
        num_blocks=90, block_size=8
    ).sign_salts(table())


@EITHER
def test_a_fit_is_the_mean_of_what_a_block_stands_for(signs):
    config = RobeConfig(num_blocks=90, block_size=4, signs=signs)
    (memory,) = fit(config).parameters()
    seen, sums, totals = counts().double().clamp(min=1e-3), torch.zeros(90, 4).double(), torch.zeros(90).double()
    for block in range(4):
        places = hash_ids(IDS, 90, stable_salt(0, f"item:{block}"))
        factors = torch.tensor([sign("item", number, block) if signs else 1 for number in range(NUM_ROWS)])
        pieces = rows()[:, 4 * block : 4 * block + 4].double() * (factors * seen).unsqueeze(1)
        sums.index_add_(0, places, pieces)
        totals.index_add_(0, places, seen)
    torch.testing.assert_close(memory.detach().double(), sums / totals.unsqueeze(1), rtol=1e-4, atol=1e-5)


def test_blocks_of_whole_rows_are_the_hash_trick():
    ours = fresh(RobeConfig(num_blocks=40, block_size=DIM, memory=None))
    served = ours.table_rows("item", IDS)
    assert len(served.unique(dim=0)) <= 40
    assert torch.equal(served[3], next(ours.parameters())[int(hash_ids(IDS[3:4], 40, stable_salt(0, "item:0")))])
    assert RobeConfig(num_blocks=40, block_size=DIM).stored_bytes(table()) == HashConfig(num_buckets=40).stored_bytes(
        table()
    )


@EITHER
def test_one_array_for_all_tables_is_counted_once(signs):
    config = RobeConfig(num_blocks=50, block_size=4, signs=signs)
    ours = CompressedEmbeddingBagCollection(tables(), compression=config)
    assert ours.footprint().total_bytes == 50 * 4 * 4 == sum(value.nbytes for value in ours.parameters())
    assert ours.blueprint.common("a") == {"robe"}
    alone = RobeConfig(num_blocks=50, block_size=4, memory=None, signs=signs)
    apart = CompressedEmbeddingBagCollection(tables(), compression=alone)
    assert apart.footprint().total_bytes == 2 * 50 * 4 * 4 and not apart.blueprint.common("a")
    mixed = {"a": config, "b": PQConfig(num_codes=2, codebook_size=16)}
    assert CompressedEmbeddingBagCollection(tables(), compression=mixed).methods() == mixed


def test_tables_that_share_must_agree_and_are_not_fitted_one_by_one():
    robe = RobeConfig(num_blocks=50, block_size=4)
    for other, field in (
        (RobeConfig(num_blocks=60, block_size=4), "num_embeddings"),
        (RobeConfig(num_blocks=50, block_size=8), "embedding_dim"),
        (RobeConfig(num_blocks=50, block_size=4, signs=True), "use"),
    ):
        with pytest.raises(
            ValueError, match=rf"shared native table 'robe': tables 'a' and 'b' must agree in .*{field}"
        ):
            CompressedEmbeddingBagCollection(tables(), compression={"a": robe, "b": other})
    with pytest.raises(ValueError, match=r"table 'a': parts \['block_0', .*\] are shared with other tables"):
        compress(EmbeddingBagCollection(tables()), robe)
    compress(EmbeddingBagCollection(tables()), RobeConfig(num_blocks=50, block_size=4, memory=None))


def test_how_the_array_starts():
    """A table's own start cannot be that of what others read: it is refused, unless the method says another."""
    plain, told = RobeConfig(num_blocks=50, block_size=4), RobeConfig(num_blocks=50, block_size=4, bound=0.5)
    own = tables(init_fn=torch.nn.init.normal_)
    with pytest.raises(ValueError, match="'robe': table 'a' must not say how it starts"):
        CompressedEmbeddingBagCollection(own, compression=plain)
    for made, bound in (
        (CompressedEmbeddingBagCollection(own, compression=told), 0.5),
        (CompressedEmbeddingBagCollection(tables(), compression=plain), 50**-0.5),
    ):
        (memory,) = made.parameters()
        assert 0.9 * bound < float(memory.detach().abs().max()) <= bound
    with pytest.raises(ValueError, match=r"tables 'a' and 'b' must agree in \['init_fn'\]"):
        CompressedEmbeddingBagCollection(tables(), compression={"a": plain, "b": told})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bound": 0.0}, r"bound must be in \(0, 1e\+18\], got 0"),
        ({"bound": 1e300}, r"bound must be in \(0, 1e\+18\], got 1e\+300"),
        ({"memory": 3.5}, "robe: memory must be a name or None, got 3.5"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"block_size": 6}, "multiple of 4 that divides embedding_dim = 16, got 6; the nearest is 4"),
        ({"block_size": 12}, "got 12; the nearest is 8"),
        ({"block_size": 100}, "got 100; the nearest is 16"),
        ({"memory": "a.b"}, r"shared native table 'a\.b': must not hold '\.'"),
    ],
)
def test_bad_settings_name_what_works(options, message):
    with pytest.raises(ValueError, match=message):
        fresh(RobeConfig(**{"num_blocks": 40, "block_size": 8, **options}))
    with pytest.raises(ValueError, match="got 8; there is none; leave the table dense"):
        fresh(RobeConfig(num_blocks=40, block_size=8), embedding_dim=6)


def test_an_empty_batch_of_signed_blocks():
    ours = fresh(RobeConfig(num_blocks=40, block_size=8, signs=True))
    assert not ours(batch([[], []])).values().any()
