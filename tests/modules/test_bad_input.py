"""Bad input: a clear error with what must hold, what came and what to do."""

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, PoolingType

from tests.cases import CASES, CONFIGS, IDS, NUM_ROWS, batch, fitted, fresh, table
from torchrec_compress import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    MECEmbeddingBagCollection,
    MEmComEmbeddingBagCollection,
    PQEmbeddingBagCollection,
    RandomCodesEmbeddingBagCollection,
    compress,
)
from torchrec_compress.compression import parse
from torchrec_compress.methods import DenseConfig, HashConfig, Int8Config, PQConfig, TableState
from torchrec_compress.ops import pack_codes, unpack_codes

every = pytest.mark.parametrize("config", CONFIGS, ids=IDS)
PQ = PQConfig(num_codes=4, codebook_size=16)
VARIANTS = {
    "mec": MECEmbeddingBagCollection,
    "memcom": MEmComEmbeddingBagCollection,
    "pq": PQEmbeddingBagCollection,
    "random": RandomCodesEmbeddingBagCollection,
}


@every
@pytest.mark.parametrize("wrong", [-1, NUM_ROWS, 10**12])
def test_ids_out_of_range(config, wrong):
    if config.method == "dense":
        with pytest.raises((IndexError, RuntimeError)):  # TorchRec's own table
            fitted(config)(batch([[0, wrong]]))
        return
    message = rf"table 'item', feature 'item': every id must be in \[0, {NUM_ROWS}\), got {wrong}; map ids"
    with pytest.raises(ValueError, match=message):
        fitted(config)(batch([[0, wrong]]))


@every
@pytest.mark.parametrize("wrong", ["item", "seen"])
def test_every_feature_of_a_table_is_checked(config, wrong):
    if config.method == "dense":
        return  # TorchRec's own table
    collection = fresh(config, feature_names=["item", "seen"])
    collection.load_state_dict(fitted(config).state_dict())
    ids = [NUM_ROWS if key == wrong else 0 for key in ("item", "seen")]
    features = KeyedJaggedTensor(keys=["item", "seen"], values=torch.tensor(ids), lengths=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=f"table 'item', feature '{wrong}': every id must be in"):
        collection(features)


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(config, bad):
    collection = CompressedEmbeddingBagCollection([table()], is_weighted=True, compression=config)
    if config.method in ("int8", "int4"):
        collection.load_table("item", TableState(codes=fitted(config).code_tables.banks["item"].codes))
    with pytest.raises(ValueError, match="weights must be finite, got NaN or infinity"):
        collection(batch([[0, 1]], [1.0, bad]))


@every
def test_a_weighted_collection_needs_weights(config):
    collection = CompressedEmbeddingBagCollection([table()], is_weighted=True, compression=config)
    if config.method in ("int8", "int4"):
        collection.load_table("item", TableState(codes=fitted(config).code_tables.banks["item"].codes))
    with pytest.raises(ValueError, match="the batch must carry weights with is_weighted=True, got none"):
        collection(batch([[0, 1]]))


@every
def test_a_missing_feature(config):
    with pytest.raises(ValueError, match=r"the batch must have the features \['item'\], got only \['other'\]"):
        fitted(config)(batch([[0]], key="other"))


def test_mean_pooling_with_weights():
    mean = table(pooling=PoolingType.MEAN)
    with pytest.raises(ValueError, match="table 'item': pooling must be SUM with is_weighted=True, got MEAN"):
        CompressedEmbeddingBagCollection([mean], is_weighted=True, compression=PQ)


@pytest.mark.parametrize("kind", [CompressedEmbeddingBagCollection, CompressedEmbeddingCollection])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "tables must not be empty"),
        (["a", "a"], "table 'a': names must differ, got it twice"),
        (["a.b"], "table 'a.b': must not hold '.'"),
        ([""], "table '': must be printable text, and not empty"),
    ],
)
def test_bad_table_names(kind, names, message):
    config = EmbeddingBagConfig if kind is CompressedEmbeddingBagCollection else EmbeddingConfig
    made = [config(name=name, num_embeddings=99, embedding_dim=8, feature_names=["f"]) for name in names]
    with pytest.raises(ValueError, match=message):
        kind(made, compression=DenseConfig())


def test_a_width_that_codes_do_not_divide():
    with pytest.raises(ValueError, match="embedding_dim must be a multiple of num_codes = 5, got 16; choose a divisor"):
        fresh(PQConfig(num_codes=5, codebook_size=16))


def test_more_codewords_than_rows_stays_dense_and_is_logged(caplog):
    with caplog.at_level("INFO"):
        collection = fresh(PQConfig(num_codes=4), num_embeddings=100)
    assert collection.methods()["item"] == DenseConfig()
    assert "table 'item' stays dense: pq would not save bytes" in caplog.text
    with pytest.raises(ValueError, match=r"codebook_size must be in \[2, 100\] \(its rows\), got 256; choose fewer"):
        PQConfig(num_codes=4).check(table(num_embeddings=100))


def unpooled_table():
    return EmbeddingConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=["item"])


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (True, "got True; pass is_weighted and need_indices by name"),
        ("gpu", "got 'gpu'"),
        ("cuda:x", "got 'cuda:x'"),
        (3, "got 3"),
    ],
)
def test_a_device_must_be_one(device, message):
    message = f"device must be a torch.device or its name, {message}"
    with pytest.raises(ValueError, match=message):
        CompressedEmbeddingBagCollection([table()], device, compression=PQ)
    with pytest.raises(ValueError, match=message):
        CompressedEmbeddingCollection([unpooled_table()], device, compression=PQ)


@pytest.mark.parametrize("config", [PQ, DenseConfig(), HashConfig(num_buckets=50)])
def test_the_name_of_a_device_is_one(config):
    for made in (
        CompressedEmbeddingBagCollection([table()], "meta", compression=config),
        CompressedEmbeddingCollection([unpooled_table()], "meta", compression=config),
    ):
        assert made.device == torch.device("meta") and made.state_dict()
        assert all(value.is_meta for value in made.state_dict().values())
        inside = [module for module in made.modules() if hasattr(module, "device")]
        assert all(isinstance(module.device, torch.device) for module in inside), "TorchRec's own keep what they get"


def test_the_base_class_demands_compression_and_names_the_variants():
    with pytest.raises(ValueError, match=r"compression must be given, got None; .*a variant with a default") as found:
        CompressedEmbeddingBagCollection([table()])
    for variant in VARIANTS.values():
        assert variant.__name__ in str(found.value)
    with pytest.raises(ValueError, match="CompressedEmbeddingCollection: compression must be given"):
        CompressedEmbeddingCollection(
            [EmbeddingConfig(name="a", num_embeddings=9, embedding_dim=4, feature_names=["a"])]
        )


@pytest.mark.parametrize("method", sorted(VARIANTS))
def test_variants_have_a_default_and_take_another(method):
    big = [table(num_embeddings=5000, embedding_dim=64)]
    stock = EmbeddingBagCollection(big)
    collection = VARIANTS[method](big)  # one changed import
    assert collection.methods()["item"].method == method
    features = batch([[1, 2], [4999]])
    assert collection(features).keys() == stock(features).keys()
    assert collection(features).values().shape == stock(features).values().shape
    assert VARIANTS[method](big, compression=HashConfig(num_buckets=9)).methods()["item"].method == "hash"
    assert isinstance(collection, CompressedEmbeddingBagCollection)


@pytest.mark.parametrize(
    ("compression", "message"),
    [
        ({"user": PQ}, r"table 'item' must fit a key, got \['user'\]; add it, or a '\*' for the rest"),
        ({"*": PQ, "usr": PQ}, r"every key must fit a table, got \['usr'\]; the tables are \['item'\]"),
        ({}, "table 'item' must fit a key"),
    ],
)
def test_compression_that_fits_no_table(compression, message):
    with pytest.raises(ValueError, match=message):
        CompressedEmbeddingBagCollection([table()], compression=compression)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({}, "must name a method or tables, got nothing"),
        ({"method": "pqq"}, "compression.method: must be one of .*got 'pqq'; did you mean 'pq'"),
        ({"method": "pq"}, r"compression: must set \['num_codes'\]"),
        ({"method": "pq", "num_codse": 4}, "unknown key 'compression.num_codse'; did you mean 'compression.num_codes'"),
        ({"method": "pq", "num_codes": "4"}, "compression.num_codes: must be int, got '4'"),
        ({"method": "pq", "num_codes": True}, "compression.num_codes: must be int, got True"),
        ({"user": {"num_codes": 4}}, "compression.user: must be a mapping with the key 'method'"),
        ({"user": 4}, "compression.user: must be a mapping with the key 'method', got 4"),
        (
            {"u": {"method": "mec", "num_codes": 2, "fit_options": {"comitment": 1}}},
            "did you mean 'compression.u.fit_options.commitment'",
        ),
        ({"u": {"method": "mec", "num_codes": 2, "fit_options": {"usage": "x"}}}, "u.fit_options.usage: must be float"),
    ],
)
def test_bad_compression_text(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_counts_of_an_unknown_table():
    with pytest.raises(ValueError, match=r"counts must name tables of \['item'\], got \['itm'\]"):
        compress(EmbeddingBagCollection([table()]), PQ, counts={"itm": torch.ones(NUM_ROWS)})


def test_load_table_checks_names_and_shapes():
    collection = fresh(PQ)
    with pytest.raises(ValueError, match=r"load_table: must name one of \['item'\], got 'itm'"):
        collection.load_table("itm", TableState())
    with pytest.raises(
        ValueError, match=r"table 'item': codes must have shape \(403, 2\) and be integers, got \(403, 4\)"
    ):
        collection.load_table("item", TableState(codes=torch.zeros(NUM_ROWS, 4, dtype=torch.uint8)))
    with pytest.raises(ValueError, match=r"codes must have shape .* and be integers, got \(403, 2\) of torch.float32"):
        collection.load_table("item", TableState(codes=torch.zeros(NUM_ROWS, 2)))
    with pytest.raises(ValueError, match=r"codes must be integers in the range of torch.uint8, got 300"):
        collection.load_table("item", TableState(codes=torch.full((NUM_ROWS, 2), 300)))
    with pytest.raises(ValueError, match=r"table 'item': stored tensors are .*got 'codebooks' of shape"):
        collection.load_table("item", TableState(decoder={"codebooks": torch.zeros(3, 3)}))


def test_a_checkpoint_of_another_format_version():
    state = fresh(PQ).state_dict()
    state["decoder.format_version"] += 1
    with pytest.raises(ValueError, match=r"decoder.format_version: must be 1, got 2; convert the checkpoint"):
        fresh(PQ).load_state_dict(state)


def test_a_checkpoint_of_another_size():
    state = fresh(PQ).state_dict()
    with pytest.raises(
        ValueError, match=r"table 'item': the checkpoint's sizes must be those of PQConfig\(num_codes=2"
    ):
        fresh(PQConfig(num_codes=2, codebook_size=16)).load_state_dict(state)


def test_a_checkpoint_with_one_code_in_a_byte_must_be_packed():
    """As an earlier version wrote it, with the layout that it had."""
    collection = fitted(PQ)
    state = dict(collection.state_dict())
    codes = unpack_codes(state["code_tables.banks.item.codes"], 4)
    old = {
        **state,
        "code_tables.banks.item.codes": codes,
        "decoder.layout": torch.tensor([[619246479, 154899329, 223132457]]),
    }
    words = r"table 'item': the checkpoint's codes must be packed, .*code_tables.banks.item.codes, .*decoder.layout"
    with pytest.raises(ValueError, match=words):
        fresh(PQ).load_state_dict(old)
    old["code_tables.banks.item.codes"], old["decoder.layout"] = pack_codes(codes), state["decoder.layout"]
    loaded = fresh(PQ, seed=1)
    loaded.load_state_dict(old)
    features = batch([[0, 5], [402]])
    assert torch.equal(loaded(features).values(), collection(features).values())


def test_a_checkpoint_with_the_scale_behind_its_low_bit_rows_must_be_turned():
    """As an earlier version wrote it, with the layout that it had."""
    collection = fitted(Int8Config())
    state = dict(collection.state_dict())
    key = "code_tables.banks.item.codes"
    old = {
        **state,
        key: state[key].roll(-4, dims=1),
        "decoder.layout": torch.tensor([[48969399, 1972190528, 223132457]]),
    }
    with pytest.raises(ValueError, match=r"low-bit rows must have scale and bias before .* put rows.roll\(4, dims=1\)"):
        fresh(Int8Config()).load_state_dict(old)
    old[key], old["decoder.layout"] = old[key].roll(4, dims=1), state["decoder.layout"]
    loaded = fresh(Int8Config())
    loaded.load_state_dict(old)
    features = batch([[0, 5], [402]])
    assert torch.equal(loaded(features).values(), collection(features).values())


def test_packed_rows_of_one_width_may_be_of_other_codes():
    """15 x 16 and 16 x 15 codewords: every tensor has the shape of the other's."""
    configs = [PQConfig(num_codes=m, codebook_size=k, structure="residual") for m, k in ((15, 16), (16, 15))]
    states = [fresh(config).state_dict() for config in configs]
    assert {key: value.shape for key, value in states[0].items()} == {k: v.shape for k, v in states[1].items()}
    with pytest.raises(ValueError, match="the checkpoint's sizes must be those of"):
        fresh(configs[0]).load_state_dict(states[1])


def test_a_checkpoint_of_another_method_or_seed():
    """Hashed rows of another seed have the right shape and would be served to the wrong ids."""
    with pytest.raises(ValueError, match="the checkpoint's method and sizes and seed must be"):
        fresh(PQ).load_state_dict(fresh(HashConfig(num_buckets=40)).state_dict())
    with pytest.raises(ValueError, match="the checkpoint's seed must be"):
        fresh(HashConfig(num_buckets=40), seed=1).load_state_dict(fresh(HashConfig(num_buckets=40)).state_dict())


def test_a_weight_vector_of_the_wrong_length_never_passes():
    features = KeyedJaggedTensor(["item"], torch.tensor([1, 2]), torch.ones(1), torch.tensor([2]))
    collection = CompressedEmbeddingBagCollection([table()], is_weighted=True, compression=CASES["pq"][0])
    with pytest.raises((ValueError, RuntimeError)):
        collection(features)


@every
def test_tensors_of_a_batch_that_do_not_go_together(config):
    """Whatever the method: FBGEMM's kernels would read memory that is not theirs."""
    collection = CompressedEmbeddingBagCollection([table()], is_weighted=True, compression=config)
    ids, lengths, weights = torch.arange(6), torch.tensor([2, 1, 3]), torch.ones(6)
    wrong = {
        "on one device": (ids, lengths, weights.to("meta")),
        "on one device, got": (ids, lengths.to("meta"), weights),
        "one per id, 6": (ids, lengths, weights[:5]),
        "int32 or int64, got torch.int16": (ids, lengths.to(torch.int16), weights),
        "ids must be a list of int32 or int64, got torch.int16": (ids.short(), lengths, weights),
        "ids must be a list of int32 or int64, got torch.float32": (ids.float(), lengths, weights),
        r"ids must be a list of int32 or int64, got torch.int64 of shape \(6, 1\)": (ids[:, None], lengths, weights),
        "lengths must add up to the 6 ids of the batch, got 5": (ids, lengths - torch.tensor([1, 0, 0]), weights),
        "lengths must add up to the 6 ids of the batch, got 7": (ids, lengths + torch.tensor([1, 0, 0]), weights),
        r"of shape \(\)": (ids, torch.tensor(6), weights),
    }
    for message, (values, counts, factors) in wrong.items():
        batch = KeyedJaggedTensor(keys=["item"], values=values, lengths=counts, weights=factors)
        with pytest.raises(ValueError, match=message):
            collection(batch)


@every
def test_a_batch_without_values(config):
    """TorchRec's own tables return what lay in memory."""
    ids, lengths, weights = torch.arange(6), torch.tensor([2, 1, 3]), torch.ones(6)
    batch = KeyedJaggedTensor(keys=["item"], values=ids, lengths=lengths, weights=weights).to(torch.device("meta"))
    collection = CompressedEmbeddingBagCollection([table()], is_weighted=True, compression=config)
    with pytest.raises(ValueError, match="the batch must have values, got one on the meta device"):
        collection(batch)
    if config.method != "blocks":  # how many ids a block is asked for is a matter of values
        assert collection.to("meta")(batch).values().is_meta


@every
@pytest.mark.parametrize("wrong", [None, torch.tensor([1]), {"item": torch.tensor([1])}], ids=["none", "ids", "dict"])
def test_a_batch_that_is_none(config, wrong):
    with pytest.raises(ValueError, match="CompressedEmbeddingBagCollection: a batch must be a KeyedJaggedTensor, got "):
        fitted(config)(wrong)


@every
def test_rows_that_are_asked_of_a_table(config):
    collection = fitted(config)
    for wrong in (
        [1],
        None,
        torch.zeros(1, dtype=torch.int64, device="meta"),
        torch.tensor([1.0]),
        torch.tensor([[1]]),
    ):
        with pytest.raises(ValueError, match="table_rows: table 'item': ids must be"):
            collection.table_rows("item", wrong)
    for wrong in (["item"], None, 3, {}):
        for call in (
            lambda name: collection.table_rows(name, torch.tensor([1])),
            collection.table_state,
            lambda name: collection.load_table(name, TableState()),
        ):
            with pytest.raises(ValueError, match=r"must name one of \['item'\], got "):
                call(wrong)
    with pytest.raises(ValueError, match="load_table: table 'item': must be given what a fit returns, got NoneType"):
        collection.load_table("item", None)
    assert collection.table_rows("item", torch.empty(0, dtype=torch.int32)).shape == (0, 16)


@every
def test_a_state_dict_of_other_numbers_is_named(config):
    made = fresh(config)
    for name, parameter in made.named_parameters():
        if name not in made.state_dict():
            continue  # it stands for rows that train in their backward
        with pytest.raises(ValueError, match=f"{name}: must be real numbers, got torch.complex64"):
            made.load_state_dict({**made.state_dict(), name: parameter.detach().to(torch.complex64)})
        with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
            made.load_state_dict({**made.state_dict(), name: parameter.detach()[:0]})


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70, True, 1.0, "1", None])
def test_a_seed_is_one_that_every_generator_takes(seed):
    with pytest.raises(ValueError, match=r"seed must be an int in \[0, 2\*\*63\), got"):
        CompressedEmbeddingBagCollection([table()], compression=PQ, seed=seed)
