"""One method at a budget: it fits, wastes little, and says so where it cannot."""

import pytest
from torchrec import EmbeddingBagConfig

from tests.cases import CASES
from torchrec_compress import CompressedEmbeddingBagCollection, export_codes
from torchrec_compress.compression import sized
from torchrec_compress.methods import (
    DenseConfig,
    HashConfig,
    HashEmbeddingsConfig,
    Int8Config,
    MEmComConfig,
    PQConfig,
    QRConfig,
    RobeConfig,
)
from torchrec_compress.methods.base import stored_together

D = 16
SIZES = {"user": 20_000, "item": 5_000, "place": 300, "day": 7}
DENSE = sum(SIZES.values()) * D * 4


def tables(**changes: object) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=D, feature_names=[name], **changes)
        for name, rows in SIZES.items()
    ]


def total(chosen):
    return stored_together((chosen[table.name].exported(), table) for table in tables())


# what a size may leave of a budget: one step of the coarsest table
WASTE = {
    "narrow": 0.3,
    "mec": 0.55,
    "dpq": 0.55,
    "pq": 0.55,
    "quantile": 0.55,
    "graph": 0.55,
    "lma": 0.55,
    "random": 0.55,
    "cce": 0.3,
    "cafe": 0.15,
}
CANNOT = ("blocks", "narrow", "memcom", "hash_embeddings", "cafe", "cce")  # become as small as that
RESIZED = [name for name in CASES if name not in ("dense", "given", "int8", "int4")]


@pytest.mark.parametrize("ratio", [4, 8, 20])
@pytest.mark.parametrize("name", RESIZED)
def test_it_fits_the_budget_and_wastes_little(name, ratio):
    config, budget = CASES[name][0], DENSE // ratio
    if name == "robe":
        config = RobeConfig(num_blocks=90, block_size=8)
    try:
        chosen = sized(tables(), config, budget)
    except ValueError as error:
        assert "must be at least" in str(error) and name in CANNOT
        return
    assert total(chosen) <= budget
    assert total(chosen) >= (1 - WASTE.get(name, 0.05)) * budget
    made = CompressedEmbeddingBagCollection(tables(), compression=chosen)
    assert (export_codes(made) if name == "dpq" else made).footprint().total_bytes == total(chosen)
    assert {each.method for each in chosen.values()} <= {name, "dense"}
    assert chosen["user"].method == name


def test_more_bytes_are_never_a_smaller_table():
    budgets = [DENSE // ratio for ratio in (100, 50, 20, 10, 5, 2)]
    buckets = [sized(tables(), HashConfig(num_buckets=1), budget)["user"].num_buckets for budget in budgets]
    assert buckets == sorted(set(buckets))


def test_all_tables_shrink_by_one_ratio():
    chosen = sized(tables(), HashConfig(num_buckets=1), DENSE // 10, dense_share=0)
    for name in ("user", "item", "place"):
        assert SIZES[name] / chosen[name].num_buckets == pytest.approx(10, rel=0.05)
    assert chosen["day"] == HashConfig(num_buckets=1)


@pytest.mark.parametrize("config", [HashConfig(num_buckets=1), RobeConfig(num_blocks=1, block_size=8)])
def test_the_smallest_tables_stay_dense_while_they_take_a_share_of_the_budget(config):
    def dense(share, budget=DENSE // 20):
        chosen = sized(tables(), config, budget, dense_share=share)
        assert list(chosen) == list(SIZES) and 0.9 * budget < total(chosen) <= budget
        return [name for name, each in chosen.items() if each == DenseConfig()]

    day, place = 7 * D * 4, 300 * D * 4
    budget = DENSE // 20
    assert dense(0) == dense((day - 1) / budget) == []
    assert dense(day / budget) == dense((day + place - 1) / budget) == ["day"]
    assert dense((day + place) / budget) == dense(0.5) == ["place", "day"]
    assert dense(1, DENSE - 1) == ["item", "place", "day"]  # never all
    for most in (day / 0.1 + 1, day / 0.1 - 1):  # a tenth, where nothing is said
        assert sized(tables(), config, most) == sized(tables(), config, most, dense_share=0.1)
        assert (sized(tables(), config, most)["day"] == DenseConfig()) == (most > day / 0.1)


def test_no_table_stays_dense_whose_bytes_others_need():
    with pytest.raises(ValueError, match="must be at least") as told:
        sized(tables(), QRConfig(num_buckets=2), DENSE // 10_000, dense_share=0)
    least = int(str(told.value).split("at least ")[1].split(",")[0])
    for budget in (least, least + 3 * 7 * D * 4):
        chosen = sized(tables(), QRConfig(num_buckets=2), budget, dense_share=1)
        assert total(chosen) <= budget and isinstance(chosen["day"], DenseConfig) == (budget > least)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), True, "a tenth", None])
def test_a_share_that_is_none(share):
    with pytest.raises(ValueError, match=r"sized: dense_share must be a number in \[0, 1\], got"):
        sized(tables(), HashConfig(num_buckets=1), DENSE // 10, dense_share=share)


def test_what_tables_share_has_one_size_for_all():
    chosen = sized(tables(), RobeConfig(num_blocks=1, block_size=8), DENSE // 20, dense_share=0)
    assert len(set(chosen.values())) == 1 and total(chosen) <= DENSE // 20


@pytest.mark.parametrize(
    ("config", "budget", "said"),
    [
        (Int8Config(), DENSE // 20, "the least that method 'int8' can store these tables in"),
        (MEmComConfig(num_buckets=4), DENSE // 50, "must be at least .* method 'memcom'"),
        (QRConfig(num_buckets=4), 2_000, "must be at least .* method 'qr'"),
        (DenseConfig(), DENSE // 2, f"must be at least {DENSE}, .* method 'dense'"),
        (RobeConfig(num_blocks=1, block_size=16), 10, "must be at least .* method 'robe'"),
        (HashConfig(num_buckets=1), 0, "budget_bytes must be"),
        (HashConfig(num_buckets=1), float("nan"), "budget_bytes must be"),
    ],
)
def test_what_cannot_be_is_told(config, budget, said):
    with pytest.raises(ValueError, match=rf"sized: .*{said}|sized: {said}"):
        sized(tables(), config, budget)


def test_hashes_into_one_table_of_its_own_are_not_shared():
    for config, field in (
        (HashEmbeddingsConfig(num_buckets=1), "num_buckets"),
        (RobeConfig(num_blocks=1, block_size=8, memory=None), "num_blocks"),
    ):
        chosen = sized(tables(), config, DENSE // 3, dense_share=0)
        sizes = [getattr(chosen[name], field) for name in ("user", "item", "place")]
        assert sizes[0] > 3 * sizes[1] > 3 * sizes[2]
        made = CompressedEmbeddingBagCollection(tables(), compression=chosen)
        assert made.footprint().total_bytes == total(chosen) <= DENSE // 3


def test_no_size_is_larger_than_the_table():
    for config in (
        RobeConfig(num_blocks=1, block_size=8),
        HashEmbeddingsConfig(num_buckets=1),
        HashConfig(num_buckets=1),
    ):
        assert total(sized(tables(), config, 10 * DENSE)) <= DENSE


@pytest.mark.parametrize(
    ("asked", "config", "said"),
    [
        ([], HashConfig(num_buckets=1), "tables must have different names, one at least"),
        ([*tables(), tables()[0]], HashConfig(num_buckets=1), "tables must have different names"),
        (None, HashConfig(num_buckets=1), "tables must be a list of TorchRec's configs, got NoneType"),
        (["user"], HashConfig(num_buckets=1), "tables must be a list of TorchRec's configs, got list"),
        (tables(), {"method": "hash"}, "method must be one such as"),
        (tables(), HashConfig, "method must be one such as"),
    ],
)
def test_what_is_asked_is_looked_over(asked, config, said):
    with pytest.raises(ValueError, match=f"sized: {said}"):
        sized(asked, config, 1000)


@pytest.mark.parametrize("size", [0, 3, -4])
def test_a_method_that_can_store_none_says_why(size):
    with pytest.raises(ValueError, match=f"block_size must be a multiple of 4 .*got {size}"):
        sized(tables(), RobeConfig(num_blocks=1, block_size=size), 1000)


def test_other_settings_stay():
    chosen = sized(tables(), PQConfig(num_codes=1, structure="residual", codebook_dtype="int8"), DENSE // 20)
    coded = [each for each in chosen.values() if isinstance(each, PQConfig)]
    assert coded and all(each.structure == "residual" and each.codebook_dtype == "int8" for each in coded)
