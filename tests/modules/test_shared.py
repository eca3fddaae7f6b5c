"""Native tables that several of the user's tables share."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, PoolingType

from tests.methods.throwaway import SharedHashConfig, registered
from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, compress
from torchrec_compress.methods import MethodConfig, Parts, RobeConfig
from torchrec_compress.methods.start import SeededInit
from torchrec_compress.modules.shared import cut

HASH = SharedHashConfig(num_buckets=50)
PIECES = RobeConfig(num_blocks=60, block_size=4, memory="memory", signs=True)  # which come back unpooled
EITHER = pytest.mark.parametrize("config", [HASH, PIECES], ids=["bags", "rows"])
SIZES = {"a": 300, "b": 200, "c": 100}


def tables(kind=EmbeddingBagConfig, order="abc", **more):
    return [
        kind(name=name, num_embeddings=SIZES[name], embedding_dim=8, feature_names=[f"f_{name}"], **more)
        for name in order
    ]


def pooled(config: MethodConfig, order="abc", **more) -> CompressedEmbeddingBagCollection:
    return CompressedEmbeddingBagCollection(tables(order=order), compression=config, **more)


def batch() -> KeyedJaggedTensor:
    lengths = torch.tensor([2, 0, 3, 1, 1, 0, 2, 4, 1])
    return KeyedJaggedTensor.from_lengths_sync(["f_a", "f_b", "f_c"], torch.randint(0, 100, (14,)), lengths)


@EITHER
def test_one_weight_serves_all_and_gets_all_gradients(config):
    ours, features = pooled(config), batch()
    (weight,) = ours.parameters()
    out, uses = ours(features), torch.zeros_like(weight)
    for name in SIZES:
        jagged, parts = features[f"f_{name}"], ours.blueprint.parts[name].native
        rows = ours.table_rows(name, jagged.values())
        for part, piece in zip(parts, rows.split(parts[0].embedding_dim, dim=1), strict=True):
            stored = weight[part.remap(jagged.values())]
            signs = torch.sign(piece * stored) if config is PIECES else torch.ones_like(piece)
            assert torch.equal(piece, signs * stored)
            uses.index_add_(0, part.remap(jagged.values()), signs.detach())
        expected = torch.stack([mine.sum(0) for mine in rows.split(jagged.lengths().tolist())])
        torch.testing.assert_close(out[f"f_{name}"], expected, rtol=1e-5, atol=1e-6)
    out.values().sum().backward()
    torch.testing.assert_close(weight.grad, uses)


@EITHER
def test_unpooled_tables_share_as_well(config):
    ours, features = CompressedEmbeddingCollection(tables(EmbeddingConfig), compression=config), batch()
    assert len([*ours.parameters()]) == 1
    for name in SIZES:
        ids = features[f"f_{name}"].values()
        assert torch.equal(ours(features)[f"f_{name}"].values(), ours.table_rows(name, ids))


@EITHER
def test_one_key_and_counted_once(config):
    ours = pooled(config)
    with registered(SharedHashConfig):
        footprint = ours.footprint()
        (weight,) = ours.parameters()
        assert sum("memory" in key for key in ours.state_dict()) == 1
        assert footprint.total_bytes == weight.nbytes == config.stored_bytes(tables()[0])
        for name, table in footprint.tables.items():
            assert table.native_bytes == ours.blueprint.stored_bytes(name)
            assert table.ratio == pytest.approx(footprint.ratio, rel=1e-2)
        assert footprint.compressed_ratio == footprint.ratio
        assert pooled(config, device=torch.device("meta")).footprint() == footprint


@EITHER
def test_it_starts_from_the_seed_and_its_name_alone(config):
    torch.manual_seed(1)
    (one,) = pooled(config).parameters()
    torch.manual_seed(2)
    (other,) = pooled(config, order="cab").parameters()
    assert torch.equal(one, other)
    (alone,) = pooled(config, order="b").parameters()
    assert torch.equal(one, alone)
    assert not torch.equal(one, next(pooled(config, seed=1).parameters()))
    meta = pooled(config, device=torch.device("meta")).to_empty(device="cpu")
    meta.reset_parameters()
    assert torch.equal(one, next(meta.parameters()))


def test_any_piece_of_a_start_is_the_same():
    init = SeededInit(7, 9000, 8, torch.nn.init.normal_)
    whole = torch.empty(9000, 8)
    init(whole)
    piece = torch.empty(5000, 4)
    init.fill(piece, 3500, 4)
    assert torch.equal(piece, whole[3500:8500, 4:])
    assert not torch.equal(whole[:4096], whole[4096:8192])


@pytest.mark.parametrize("init_fn", [None, torch.nn.init.normal_])
def test_a_start_leaves_the_random_numbers_of_others_alone(init_fn):
    state = torch.get_rng_state()
    SeededInit(7, 100, 8, init_fn)(torch.empty(100, 8))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_init_fn_it_starts_as_torchrec_starts_a_table_of_its_size():
    (weight,) = pooled(HASH).parameters()
    assert 0.9 * 50**-0.5 < float(weight.detach().abs().max()) <= 50**-0.5
    shard = torch.full((20, 8), 9.0)  # of rows that TorchRec's own sharders do not tell
    SeededInit(7, 100, 8, None)(shard)
    assert 0.09 < float(shard.abs().max()) <= 0.1


@pytest.mark.parametrize("more", [{"init_fn": torch.nn.init.zeros_}, {"weight_init_max": 0.5}])
def test_a_users_start_of_one_table_is_refused(more):
    with pytest.raises(
        ValueError, match=r"'memory': table 'a' must not say how it starts, got init_fn .*leave init_fn"
    ):
        CompressedEmbeddingBagCollection(tables(**more), compression=HASH)


@dataclass(frozen=True, kw_only=True)
class Odd(SharedHashConfig):
    method: ClassVar[str] = "odd"
    decay: bool = False
    init: bool = False

    def parts(self, table, seed):
        (bag,) = super().parts(table, seed).bags
        return Parts(bags=(replace(bag, decay=not self.decay, init_fn=torch.nn.init.zeros_ if self.init else None),))


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (Odd(num_buckets=40), "num_embeddings"),
        (Odd(num_buckets=50, decay=True), "decay"),
        (Odd(num_buckets=50, init=True), "init_fn"),
        (replace(PIECES, num_blocks=50), "embedding_dim"),
    ],
)
def test_parts_that_disagree_are_refused_by_name(other, field):
    with pytest.raises(ValueError, match=rf"shared native table 'memory': tables 'a' and 'b' must agree in .*{field}"):
        pooled({"b": other, "*": HASH})


def test_pooling_that_differs_and_names_that_are_taken_are_refused():
    mixed = tables()
    mixed[1].pooling = PoolingType.MEAN
    with pytest.raises(ValueError, match=r"'memory': tables 'a' and 'b' must agree in \['pooling'\]"):
        CompressedEmbeddingBagCollection(mixed, compression=HASH)
    taken = tables()
    taken[2].name = "memory"
    with pytest.raises(ValueError, match=r"stored as \['memory'\], which must not be names of other"):
        CompressedEmbeddingBagCollection(taken, compression=HASH)


def test_tables_that_take_more_together_than_dense_stay_dense():
    few = replace(PIECES, num_blocks=1200)  # two pieces a row: as much as all rows together
    assert {config.method for config in pooled(few).methods().values()} == {"dense"}
    assert {config.method for config in pooled(replace(few, num_blocks=1100)).methods().values()} == {"robe"}


def test_a_fit_of_one_table_does_not_overwrite_what_others_share():
    with pytest.raises(ValueError, match=r"table 'a': parts \['buckets'\] are shared with other tables"):
        compress(EmbeddingBagCollection(tables()), HASH)


def test_shares_are_whole_and_sum_up():
    assert cut(100, [1, 1, 1]) == [33, 33, 34]
    assert sum(cut(12345, [7, 300, 1, 90])) == 12345


def test_a_checkpoint_of_tables_that_share_another_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Elsewhere(SharedHashConfig):
        def parts(self, table, seed):
            (bag,) = super().parts(table, seed).bags
            return Parts(bags=(replace(bag, shared="other"),))

    state = pooled(HASH).state_dict()
    loaded = pooled(HASH, device=torch.device("meta")).to_empty(device="cpu")
    loaded.load_state_dict(state)
    assert torch.equal(next(loaded.parameters()), next(pooled(HASH).parameters()))
    with pytest.raises(ValueError, match="table 'a': the checkpoint's method must be those of"):
        pooled(Elsewhere(num_buckets=50)).load_state_dict(state, strict=False)
