"""Projections that several tables have together."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor

from tests.methods.throwaway import SharedHashConfig
from tests.tolerances import assert_near
from torchrec_compress import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    compress,
    compress_into,
    decompress,
    fold_into_linear,
)
from torchrec_compress.methods import DenseConfig, NarrowConfig, TableState
from torchrec_compress.methods.base import stored_together

SIZES = {"a": 300, "b": 200, "c": 100}
DIM = 16
MINE = NarrowConfig(width=4, shared="kind")
TWO = {"a": MINE, "b": replace(MINE, bits=8), "c": NarrowConfig(width=4)}
KEY = "decoder.banks.kind.projection"


def tables(kind=EmbeddingBagConfig, dim=DIM, sizes=SIZES):
    return [
        kind(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[f"f_{name}"])
        for name, rows in sizes.items()
    ]


def pooled(methods=TWO, **more):
    torch.manual_seed(3)
    return CompressedEmbeddingBagCollection(tables(), compression=methods, **more).eval()


def batch():
    ids = torch.tensor([1, 5, 99, 3, 3, 7, 0, 98, 4, 4, 2, 11, 50, 60])
    return KeyedJaggedTensor.from_lengths_sync(
        [f"f_{n}" for n in SIZES], ids, torch.tensor([2, 0, 3, 1, 1, 0, 2, 4, 1])
    )


def test_it_serves_all_of_its_tables():
    ours = pooled()
    projection, out, features = ours.state_dict()[KEY], ours(batch()), batch()
    for name in ("a", "b"):
        state = ours.table_state(name)
        ids = features[f"f_{name}"].values()
        rows = state.native["rows"][ids] if name == "a" else ours.trained.banks[name].served(ids)
        assert_near(ours.table_rows(name, ids), rows @ projection)
        bags = torch.stack([bag.sum(0) for bag in (rows @ projection).split(features[f"f_{name}"].lengths().tolist())])
        assert_near(out[f"f_{name}"], bags)
    assert not torch.equal(projection, ours.state_dict()["decoder.banks.c.projection"])


def test_it_is_one_parameter_trained_by_the_sum_of_their_gradients():
    """As two of equal value would be, whose gradients are added by hand."""
    shared = pooled({"c": TWO["c"], "*": MINE})
    alone = pooled(NarrowConfig(width=4))
    state = shared.state_dict()
    known = {f"decoder.banks.{name}.projection": state[KEY] for name in ("a", "b")}
    for name, parameter in alone.named_parameters():
        with torch.no_grad():
            parameter.copy_(known[name] if name in known else state[name])
    upstream = torch.randn(3, 3 * DIM)
    for model in (shared, alone):
        (model(batch()).values() * upstream).sum().backward()
    grads = {name: parameter.grad for name, parameter in alone.named_parameters()}
    (mine,) = (parameter for name, parameter in shared.named_parameters() if name == KEY)
    assert len([*shared.parameters()]) == len([*alone.parameters()]) - 1
    assert_near(mine.grad, grads["decoder.banks.a.projection"] + grads["decoder.banks.b.projection"], scale=5)
    assert grads["decoder.banks.a.projection"].abs().sum() > 0 and grads["decoder.banks.b.projection"].abs().sum() > 0


def test_one_key_and_counted_once():
    ours = pooled()
    footprint, own = ours.footprint(), 4 * 4 * DIM
    assert [key for key in ours.state_dict() if "projection" in key] == [KEY, "decoder.banks.c.projection"]
    found = {name: table.decoder_bytes for name, table in footprint.tables.items()}
    assert found["a"] + found["b"] == found["c"] == own and found["a"] > found["b"] > 0
    for name, table in footprint.tables.items():
        assert table.total_bytes == ours.blueprint.stored_bytes(name)
    together = stored_together((ours.methods()[table.name], table) for table in tables())
    assert footprint.total_bytes == together == 4 * 4 * 300 + 5 * 200 + 4 * 4 * 100 + 2 * own
    assert pooled(device=torch.device("meta")).footprint() == footprint


def test_unpooled_tables_share_as_well():
    ours = CompressedEmbeddingCollection(tables(EmbeddingConfig), compression=TWO).eval()
    assert [key for key in ours.state_dict() if "projection" in key] == [KEY, "decoder.banks.c.projection"]
    for name in SIZES:
        ids = batch()[f"f_{name}"].values()
        assert_near(ours(batch())[f"f_{name}"].values(), ours.table_rows(name, ids))


def test_it_is_drawn_from_meta_and_loaded():
    source = pooled()
    ours = CompressedEmbeddingBagCollection(tables(), torch.device("meta"), compression=TWO).to_empty(device="cpu")
    ours.reset_parameters()
    projection = ours.state_dict()[KEY]
    assert_near(projection @ projection.T, 4 * torch.eye(4), scale=5)
    ours.load_state_dict(source.state_dict())
    assert torch.equal(ours.eval()(batch()).values(), source(batch()).values())


@pytest.mark.parametrize(
    "other", [NarrowConfig(width=4), {**TWO, "a": replace(MINE, shared="sort"), "b": replace(TWO["b"], shared="sort")}]
)
def test_a_checkpoint_of_tables_that_share_otherwise_is_refused(other):
    with pytest.raises(ValueError, match=r"table 'a': the checkpoint's method must be those of"):
        pooled(other).load_state_dict(pooled().state_dict())


def test_rows_are_read_from_it():
    source = pooled()
    dense = decompress(source)
    assert_near(dense(batch()).values(), source(batch()).values(), scale=5)
    again = compress(source, NarrowConfig(width=4))
    assert_near(again(batch()).values(), source(batch()).values(), scale=5)


def test_small_tables_pay_for_it_together():
    """Of ten rows, none makes up for a projection of its own."""

    def methods(names, config):
        few = tables(sizes=dict.fromkeys(names, 10))
        return {*CompressedEmbeddingBagCollection(few, compression=config).methods().values()}

    eight = replace(MINE, width=8)
    assert methods("abcdefgh", NarrowConfig(width=8)) == {DenseConfig()}
    assert methods("abcdefgh", eight) == {eight}
    assert methods("a", eight) == {DenseConfig()}


@pytest.mark.parametrize("folded", [None, ["a"], ["a", "b"]])
def test_it_folds_into_a_layer_of_some_of_its_tables(folded):
    source, linear = pooled(), nn.Linear(3 * DIM, 5)
    got, layer = fold_into_linear(source, linear, tables=folded)
    assert_near(layer(got(batch()).values()), linear(source(batch()).values()), scale=5)
    assert (KEY in got.state_dict()) == (folded == ["a"])


@pytest.mark.parametrize(
    ("other", "differ"),
    [(replace(MINE, width=8), "width"), (replace(MINE, rate=0.5), "rate"), (replace(MINE, bits=4, width=8), "width")],
)
def test_tables_that_disagree_are_refused(other, differ):
    with pytest.raises(ValueError, match=rf"decoder 'kind': tables 'a' and 'b' must agree in \['{differ}'\], got \["):
        pooled({"a": MINE, "b": other, "*": DenseConfig()})


def test_other_widths_of_embeddings_are_refused():
    both = [*tables(sizes={"a": 300}), *tables(sizes={"b": 300}, dim=32)]
    with pytest.raises(ValueError, match=r"must agree in \['embedding_dim'\], got \[16\] and \[32\]; let them share"):
        CompressedEmbeddingBagCollection(both, compression=MINE)


def test_its_name_is_that_of_nothing_else():
    for name in ("c", "no.dots", ""):
        with pytest.raises(ValueError, match=r"shared decoder"):
            pooled({"a": replace(MINE, shared=name), "*": NarrowConfig(width=4)})
    with pytest.raises(ValueError, match=r"shared decoders must not be called as tables are, got \['memory'\]"):
        pooled({"a": replace(MINE, shared="memory"), "*": SharedHashConfig(num_buckets=9)})


def test_rows_without_a_projection_share_none():
    with pytest.raises(ValueError, match=r"table 'a': shared must be left out with rows of the embedding's width, 16"):
        pooled(NarrowConfig(width=16, bits=8, shared="kind"))


def test_no_fit_of_one_table_changes_it():
    source = EmbeddingBagCollection(tables())
    with pytest.raises(ValueError, match=r"table 'a': shared must be left out of a fit, .* got 'kind'; train from the"):
        compress(source, TWO)
    ours = pooled()
    with pytest.raises(ValueError, match=r"table 'a': shared must be left out of a fit"):
        compress_into(ours, {"a": torch.randn(300, DIM)})
    compress_into(ours, {"c": torch.randn(100, DIM)})
    with pytest.raises(ValueError, match=r"table 'a': parts \['projection'\] are shared with other tables"):
        ours.load_table("a", TableState(decoder={"projection": torch.zeros(4, DIM)}))
    ours.load_table("a", TableState(native={"rows": torch.zeros(300, 4)}))


def test_a_narrower_method_of_it_has_its_own():
    assert replace(MINE, width=8).smaller(0) == NarrowConfig(width=4)
