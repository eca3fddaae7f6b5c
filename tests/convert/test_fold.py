"""Projections that are multiplied into codebooks, or into the linear layer that reads the embeddings."""

import logging
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed import DistributedModelParallel

from tests.cases import CONFIGS, DIM, IDS, NUM_ROWS, at_rest, batch, contexts, counts, fit, fitted, table
from tests.tolerances import assert_near
from torchrec_compress import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    compress,
    fold_into_linear,
    fold_projections,
    get_default_sharders,
)
from torchrec_compress.convert import why_unfolded
from torchrec_compress.fit.mec import MECFit
from torchrec_compress.methods import (
    DenseConfig,
    HashConfig,
    Int8Config,
    MECConfig,
    NarrowConfig,
    PQConfig,
    RandomCodesConfig,
)

PROJECTED = [(name, c) for name, c in zip(IDS, CONFIGS, strict=True) if c.projected_width(table()) is not None]
MORE = [
    ("hot-fp32", PQConfig(num_codes=2, codebook_size=16, width=8, num_hot_rows=30, hot_dtype="fp32")),
    (
        "packed",
        PQConfig(num_codes=3, codebook_size=16, structure="residual", width=8, num_hot_rows=9, hot_dtype="int4"),
    ),
    ("mec", MECConfig(num_codes=2, codebook_size=16, width=8, num_hot_rows=9, fit_options=MECFit(num_steps=2))),
    ("mec-some", MECConfig(num_codes=2, codebook_size=16, width=8, num_coded=60, fit_options=MECFit(num_steps=2))),
]
CODED = [(name, config) for name, config in [*PROJECTED, *MORE] if config.codewords]
ROWS = [("rate", NarrowConfig(width=8, rate=0.3)), ("bits-rate", NarrowConfig(width=8, bits=8, rate=0.3))]
BAGS = batch([[3, 99, 7, 7], [], [402], [0, 1, 2, 3, 4, 5]])
PLAIN = RandomCodesConfig(num_codes=2, codebook_size=16, width=4)


def parametrize(cases):
    return pytest.mark.parametrize("config", [config for _, config in cases], ids=[name for name, _ in cases])


def two_tables(first, second, **options):
    """Return tables "a", of two features, and "b", which shares one of them, the second table dense in the source."""
    tables = [table(name="a", feature_names=["x", "y"]), table(name="b", feature_names=["y"])]
    source = EmbeddingBagCollection(tables, **options)
    given = {"counts": dict.fromkeys("ab", counts()), "contexts": dict.fromkeys("ab", contexts())}
    return at_rest(compress(source, {"a": first, "b": second}, **given))


def of_both(weights=None):
    ids = torch.tensor([3, 99, 7, 7, 402, 0, 1, 2, 5])
    return KeyedJaggedTensor.from_lengths_sync(["x", "y"], ids, torch.tensor([2, 0, 3, 1, 2, 1]), weights)


# into codebooks


@parametrize(CODED)
def test_codebooks_take_the_projection_in(config):
    """Outputs are those of a float64 product, codes are the same bits, and nothing is called a projection any more."""
    source = fitted(config)
    got = fold_projections(source, in_float32=True)
    assert_near(got(BAGS).values(), source(BAGS).values(), scale=5)
    ids = torch.arange(NUM_ROWS)
    assert_near(got.table_rows("item", ids), source.table_rows("item", ids), scale=5)
    before, after = source.table_state("item"), got.table_state("item")
    assert torch.equal(after.codes, before.codes) and after.codes.data_ptr() != before.codes.data_ptr()
    assert set(after.decoder) == set(before.decoder) - {"projection"}
    assert after.decoder["codebooks"].shape == (config.num_codes * config.codebook_size, DIM)
    method = got.methods()["item"]
    assert method.projected_width(table()) is None and why_unfolded(got) == {"item": "it has no projection"}
    assert got.footprint().tables["item"].total_bytes == method.stored_bytes(table())


@parametrize(CODED)
def test_what_is_folded_is_saved_and_loaded_by_its_method(config):
    got = fold_projections(fitted(config), in_float32=True)
    again = CompressedEmbeddingBagCollection([table()], compression=got.methods())
    again.load_state_dict(got.state_dict())
    assert torch.equal(again(BAGS).values(), got(BAGS).values())


def test_the_source_is_left_as_it_is():
    source = fit(PLAIN)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    got = fold_projections(source)
    with torch.no_grad():
        for tensor in [*got.parameters(), *got.buffers()]:
            tensor.zero_()
    assert all(torch.equal(before[name], value) for name, value in source.state_dict().items())


def test_folded_codebooks_train_on():
    got = fold_projections(fit(PLAIN))
    got(BAGS).values().sum().backward()
    assert got.decoder.banks["item"].codebooks.grad.abs().sum() > 0


def test_unpooled_collections_stay_unpooled():
    item = EmbeddingConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=DIM, feature_names=["item"])
    source = CompressedEmbeddingCollection([item], compression=PLAIN, need_indices=True)
    got = fold_projections(source)
    assert isinstance(got, CompressedEmbeddingCollection) and got.need_indices()
    ours, theirs = got(BAGS)["item"], source(BAGS)["item"]
    assert_near(ours.values(), theirs.values())
    assert torch.equal(ours.weights(), theirs.weights())


@pytest.mark.parametrize("other", CONFIGS, ids=IDS)
def test_other_tables_are_the_same_bits(other):
    """Whatever a table beside it is stored as, named or not."""
    source = two_tables(PLAIN, other)
    got = fold_projections(source, tables=["a"])
    assert got.methods()["b"] == source.methods()["b"] and got.methods()["a"].width is None
    theirs = {name: value for name, value in source.state_dict().items() if ".a." not in name and "layout" not in name}
    ours = got.state_dict()
    assert theirs.keys() <= ours.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())
    pooled, expected = got(of_both()), source(of_both())
    assert pooled.keys() == expected.keys()
    assert_near(pooled.values(), expected.values(), scale=5)


def test_weights_and_training_mode_are_kept():
    source = two_tables(PLAIN, PLAIN, is_weighted=True).eval()
    got = fold_projections(source)
    assert got.is_weighted() and not got.training
    weighted = of_both(torch.linspace(-2, 2, 9))
    assert_near(got(weighted).values(), source(weighted).values())


RESIDUAL = PQConfig(num_codes=2, codebook_size=16, structure="residual", width=8)
REASONS = [
    (NarrowConfig(width=8), r"its 8 numbers an id would become the 16 of the whole table, which decompress\(\) makes"),
    (NarrowConfig(width=8, bits=4), r"its 8 numbers an id would become the 16"),
    (NarrowConfig(width=16, bits=4), r"it has no projection"),
    (Int8Config(), r"it has no projection"),
    (replace(RESIDUAL, width=None), r"it has no projection"),
    (
        replace(RESIDUAL, codebook_dtype="int8"),
        r"its codebooks of few bits would be rounded once more; pass in_float32",
    ),
    (replace(RESIDUAL, num_hot_rows=9), r"its hot rows of few bits would be rounded once more; pass in_float32=True"),
    (replace(RESIDUAL, num_hot_rows=9, codebook_dtype="int8"), r"its codebooks and hot rows of few bits would be"),
    (RandomCodesConfig(num_codes=2, codebook_size=400, width=4), r"it would take 52816 bytes, the dense table 25792"),
]


@pytest.mark.parametrize(("config", "reason"), REASONS)
def test_a_table_that_cannot_be_folded_is_refused_with_the_reason(config, reason):
    source = two_tables(PLAIN, config)
    with pytest.raises(ValueError, match=r"fold_projections: table 'b' cannot be folded: " + reason):
        fold_projections(source, tables=["b", "a"])
    assert list(why_unfolded(source)) == ["b"]


@pytest.mark.parametrize(("config", "reason"), REASONS)
def test_unasked_it_is_left_and_the_log_says_so(config, reason, caplog):
    source = two_tables(PLAIN, config)
    with caplog.at_level(logging.WARNING):
        got = fold_projections(source)
    assert got.methods()["b"] == config
    said = [record.getMessage() for record in caplog.records if "keeps its projection" in record.getMessage()]
    assert [text.split(":")[0] for text in said] == ["table 'b' keeps its projection"] * ("has no" not in reason)


# into a linear layer


@parametrize([*PROJECTED, *MORE, *ROWS])
def test_a_linear_layer_takes_the_projection_in(config):
    """Logits are the same, and what is stored per id is the same bits in a table of r numbers."""
    source, width = fitted(config), config.projected_width(table())
    linear = nn.Linear(DIM, 7)
    got, layer = fold_into_linear(source, linear)
    assert layer.in_features == width and got.embedding_bag_configs()[0].embedding_dim == width
    assert got(BAGS).values().shape == (4, width)
    assert_near(layer(got(BAGS).values()), linear(source(BAGS).values()), scale=5)
    before, after = source.table_state("item"), got.table_state("item")
    assert "projection" not in after.decoder
    rows = after.native.get("", after.native.get("rows"))
    ours = {**after.decoder, **after.trained, **after.managed, "codes": after.codes, "rows": rows}
    rows = before.native.get("rows")
    theirs = {**before.decoder, **before.trained, **before.managed, "codes": before.codes, "rows": rows}
    for name, tensor in ours.items():
        assert tensor is theirs[name] is None or torch.equal(tensor, theirs[name]), name
    stored = source.footprint().total_bytes - 4 * width * DIM
    assert got.footprint().total_bytes == stored
    again = CompressedEmbeddingBagCollection(got.embedding_bag_configs(), compression=got.methods())
    again.load_state_dict(got.state_dict())
    assert torch.equal(again(BAGS).values(), got(BAGS).values())


class Net(nn.Module):
    """A small model: embeddings and dense columns side by side, in an order of its own, into a net."""

    def __init__(self, embeddings, layer):
        super().__init__()
        self.embeddings, self.layer, self.top = embeddings, layer, nn.Linear(5, 1)

    def forward(self, features, dense):
        pooled = self.embeddings(features)
        read = [pooled["y@b"], dense[:, :2], pooled["x"], pooled["y@a"], dense[:, 2:], pooled["x"]]
        return self.top(torch.relu(self.layer(torch.cat(read, dim=1))))


INPUTS = ["y@b", 2, "x", "y@a", 1, "x"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tables", [None, ["a"], ["a", "b"]])
def test_a_model_gives_the_same_logits(tables, bias):
    """Keys in any order, twice, of two tables with one feature, and dense columns among them."""
    source = two_tables(NarrowConfig(width=8), RESIDUAL)
    model, dense = Net(source, nn.Linear(4 * DIM + 3, 5, bias=bias)), torch.randn(3, 3)
    expected = model(of_both(), dense)
    model.embeddings, model.layer = fold_into_linear(source, model.layer, INPUTS, tables=tables)
    assert model.layer.in_features == 3 * 8 + (DIM if tables == ["a"] else 8) + 3
    assert_near(model(of_both(), dense), expected, scale=5)
    assert [config.embedding_dim for config in source.embedding_bag_configs()] == [DIM, DIM]


def test_tables_without_a_projection_stay_as_they_are():
    source = two_tables(NarrowConfig(width=8), HashConfig(num_buckets=40))
    linear = nn.Linear(3 * DIM, 4)
    got, layer = fold_into_linear(source, linear)
    assert got.methods() == {"a": DenseConfig(), "b": HashConfig(num_buckets=40)}
    assert torch.equal(layer.weight[:, 16:], linear.weight[:, 32:])
    assert_near(layer(got(of_both()).values()), linear(source(of_both()).values()), scale=5)


def test_codes_of_few_rows_become_the_rows_that_ids_have():
    """Of rows of few numbers, codes would save nothing: the dense rows that replace them are found by id."""
    config = PQConfig(num_codes=4, codebook_size=200, structure="residual", width=4, num_coded=220)
    source = fitted(config)
    collection, _ = fold_into_linear(source, nn.Linear(DIM, 3), inputs=["item"])
    assert collection.methods()["item"].method == "dense"
    ids = torch.arange(NUM_ROWS)
    projection = source.table_state("item").decoder["projection"]
    assert_near(collection.table_rows("item", ids) @ projection, source.table_rows("item", ids), scale=5)


def test_means_fold_as_sums_do():
    source = CompressedEmbeddingBagCollection([table(pooling=PoolingType.MEAN)], compression=NarrowConfig(width=4))
    linear = nn.Linear(DIM, 3)
    got, layer = fold_into_linear(source, linear)
    assert_near(layer(got(BAGS).values()), linear(source(BAGS).values()))


def test_a_layer_of_another_dtype_keeps_it():
    source = fitted(NarrowConfig(width=8))
    linear = nn.Linear(DIM, 3, dtype=torch.float64).eval()
    got, layer = fold_into_linear(source, linear)
    assert layer.weight.dtype == layer.bias.dtype == torch.float64 and not layer.training
    assert_near(layer(got(BAGS).values().double()).float(), linear(source(BAGS).values().double()).float(), scale=5)


def test_codes_that_save_nothing_over_narrow_rows_become_those():
    """150 rows of 4 numbers take fewer bytes than 2 codebooks of 128 codewords."""
    few = EmbeddingBagConfig(name="few", num_embeddings=150, embedding_dim=64, feature_names=["item"])
    source = EmbeddingBagCollection([few])
    config = PQConfig(num_codes=2, codebook_size=128, structure="residual", width=4, num_hot_rows=9)
    coded = compress(source, config, counts={"few": torch.arange(150)})
    assert coded.methods()["few"] == config
    linear, asked = nn.Linear(64, 3), batch([[3, 99], [], [149, 145, 0]])
    got, layer = fold_into_linear(coded, linear)
    assert got.methods()["few"] == DenseConfig()
    assert_near(layer(got(asked).values()), linear(coded(asked).values()))


def test_what_is_folded_trains_on():
    got, layer = fold_into_linear(fit(NarrowConfig(width=8)), nn.Linear(DIM, 3))
    layer(got(BAGS).values()).sum().backward()
    assert all(value.grad.abs().sum() > 0 for value in [*got.parameters(), *layer.parameters()])


def test_folding_under_inference_mode_makes_what_can_be_trained():
    with torch.inference_mode():
        got, layer = fold_into_linear(fitted(PLAIN), nn.Linear(DIM, 3))
        folded = fold_projections(fitted(PLAIN))
    tensors = [*got.parameters(), *layer.parameters(), *folded.parameters()]
    assert not any(tensor.is_inference() for tensor in tensors) and all(tensor.requires_grad for tensor in tensors)


# bad input


@pytest.mark.parametrize("fold", [fold_projections, lambda *given, **more: fold_into_linear(*given, **more)[0]])
@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (["a", "c"], r"tables must be a list of names of \['a', 'b'\], got \['a', 'c'\]"),
        ("a", r"tables must be a list of names of \['a', 'b'\], got 'a'"),
        (["b"], r"table 'b' cannot be folded: it has no projection; leave it out of tables"),
        ([], r"at least one table must have a projection to fold, got none \(tables=\[\]\)"),
    ],
)
def test_tables_that_cannot_be_meant_are_refused(fold, tables, message):
    source = two_tables(PLAIN, Int8Config())
    given = [source] if fold is fold_projections else [source, nn.Linear(3 * DIM, 2)]
    with pytest.raises(ValueError, match=message):
        fold(*given, tables=tables)


def test_a_collection_with_nothing_to_fold_is_refused():
    source = two_tables(Int8Config(), NarrowConfig(width=16, bits=8))
    for fold in (fold_projections, lambda given: fold_into_linear(given, nn.Linear(3 * DIM, 2))):
        with pytest.raises(ValueError, match=r"at least one .*got none \('a': it has no projection; 'b': it has no"):
            fold(source)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["x", "y@a"], r"linear must have in_features 32, of inputs of the widths \[16, 16\], got 48"),
        (["x", "y@a", 15], r"in_features 47"),
        (
            ["x", "y", 16],
            r"inputs must be keys of \['x', 'y@a', 'y@b'\] and numbers of other columns, above 0, got 'y'",
        ),
        (["x", "y@a", True], r"got True"),
        (["x", "y@a", 16, 0], r"got 0"),
        (["x", "y@a", 16.0], r"got 16.0"),
        (
            ["x", 16, "y@b"],
            r"must have every key of a table that is folded, got none of \['y@a'\]; what else reads them",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        fold_into_linear(two_tables(PLAIN, Int8Config()), nn.Linear(3 * DIM, 2), inputs)


def test_a_layer_that_is_not_plain_is_refused():
    class Lora(nn.Linear):
        pass

    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(DIM, 2))
    hooked = torch.nn.utils.spectral_norm(nn.Linear(DIM, 2))
    for layer in (Lora(DIM, 2), nn.Sequential(nn.Linear(DIM, 2)), normed, hooked, nn.LazyLinear(2)):
        with pytest.raises(ValueError, match=r"linear must be a plain torch.nn.Linear, got .*; fold before it is"):
            fold_into_linear(fitted(PLAIN), layer)
    with pytest.raises(ValueError, match=r"linear must hold values, got it on the meta device"):
        fold_into_linear(fitted(PLAIN), nn.Linear(DIM, 2, device="meta"))


def test_collections_that_cannot_be_folded_are_refused():
    linear, stock = nn.Linear(DIM, 2), EmbeddingBagCollection([table()])
    item = EmbeddingConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=DIM, feature_names=["item"])
    unpooled = CompressedEmbeddingCollection([item], compression=PLAIN)
    meta = CompressedEmbeddingBagCollection([table()], torch.device("meta"), compression=PLAIN)
    half = CompressedEmbeddingBagCollection([table()], compression=PLAIN).half()
    with pytest.raises(ValueError, match=r"fold_into_linear: collection must be pooled, got CompressedEmbeddingColl"):
        fold_into_linear(unpooled, linear)
    for fold in (fold_projections, lambda given: fold_into_linear(given, linear)):
        with pytest.raises(ValueError, match=r"collection must be a compressed one, got EmbeddingBagCollection"):
            fold(stock)
        with pytest.raises(ValueError, match=r"collection must hold values, got .* on the meta device"):
            fold(meta)
        with pytest.raises(
            ValueError, match=r"must be in float32, got 'decoder.banks.item.codebooks' in torch.float16;"
        ):
            fold(half)
    with pytest.raises(ValueError, match=r"why_unfolded: collection must be a compressed one"):
        why_unfolded(stock)


def test_a_sharded_collection_is_refused():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model = nn.Sequential(CompressedEmbeddingBagCollection([table()], compression=PLAIN))
        sharded = DistributedModelParallel(model, device=torch.device("cpu"), sharders=get_default_sharders())
        (source,) = (part for part in sharded.modules() if isinstance(part, CompressedEmbeddingBagCollection))
        assert why_unfolded(source) == {}
        for fold in (fold_projections, lambda given: fold_into_linear(given, nn.Linear(DIM, 2))):
            with pytest.raises(ValueError, match=r"collection must not be sharded, got sharded \['code_tables'\]"):
                fold(source)
    finally:
        dist.destroy_process_group()


def test_a_table_that_nothing_has_filled_is_refused():
    empty = CompressedEmbeddingBagCollection([table()], compression=RESIDUAL, will_fit=True)
    for fold in (fold_projections, lambda given: fold_into_linear(given, nn.Linear(DIM, 2))):
        with pytest.raises(RuntimeError, match=r"table 'item'"):
            fold(empty)
