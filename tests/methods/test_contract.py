"""What every method must keep to, over every config of `tests.cases`."""

import copy
import io

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from tests.cases import (
    ALL,
    CASES,
    CONFIGS,
    DIM,
    IDS,
    NUM_ROWS,
    batch,
    code_size,
    contexts,
    counts,
    dense_collection,
    fit,
    fitted,
    fresh,
    rows,
    table,
)
from torchrec_compress import CompressedEmbeddingBagCollection, compress, decompress
from torchrec_compress.compression import parse
from torchrec_compress.fit import MECFit
from torchrec_compress.methods import (
    METHODS,
    CodebookConfig,
    HashConfig,
    MECConfig,
    MEmComConfig,
    MethodConfig,
    PQConfig,
    TableData,
)
from torchrec_compress.ops import unpack_codes

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every = pytest.mark.parametrize("config", CONFIGS, ids=IDS)
CODED = [config for config in CONFIGS if config.parts(table(), 0).codes is not None]
coded = pytest.mark.parametrize("config", CODED, ids=[IDS[CONFIGS.index(config)] for config in CODED])
HASHED = [config for config in CODED if config.method != "given"]
BATCH = batch([[1, 2, 2], [], [402, 0], [7], []])


def tensors(collection: nn.Module) -> list[torch.Tensor]:
    return [*collection.parameters(), *collection.buffers()]


def same_state(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_configs_made_in_code_take_integers_of_numpy_and_hold_pythons():
    made = MECConfig(num_codes=np.int64(2), num_hot_rows=np.int32(5), fit_options=MECFit(num_steps=np.int64(20)))
    assert made == MECConfig(num_codes=2, num_hot_rows=5, fit_options=MECFit(num_steps=20))
    assert parse(yaml.safe_load(yaml.safe_dump(made.to_dict()))) == made
    assert parse({"method": "hash", "num_buckets": np.int64(5)}) == HashConfig(num_buckets=np.int64(5))
    for bad in (True, np.bool_(True), 5.0, np.float64(5)):
        with pytest.raises(ValueError, match=r"HashConfig.num_buckets: must be int, got"):
            HashConfig(num_buckets=bad)
    with pytest.raises(ValueError, match=r"MECFit.num_steps: must be int, got True"):
        MECConfig(num_codes=2, fit_options=MECFit(num_steps=True))


def test_every_method_has_cases():
    assert CASES.keys() == METHODS.keys()
    assert all(config.method == name for name, configs in CASES.items() for config in configs)


@every
def test_the_case_is_not_silently_dense(config):
    assert fresh(config).methods() == {"item": config}


@every
def test_stored_bytes_are_the_bytes_of_the_real_tensors(config):
    collection = fitted(config)
    footprint = collection.footprint().tables["item"]
    labels = (collection.decoder.format_version, collection.decoder.layout)  # of the collection, not of a table
    real = sum(t.nbytes for t in tensors(collection)) - sum(t.nbytes for t in labels)
    assert config.stored_bytes(table()) == footprint.total_bytes == real
    assert footprint.dense_bytes == NUM_ROWS * DIM * 4
    assert footprint.method == config.method


@every
def test_decompress_equals_what_is_served(config):
    collection = fitted(config)
    dense = decompress(collection)
    one_by_one = batch([[number] for number in range(NUM_ROWS)])
    torch.testing.assert_close(
        dense.embedding_bags["item"].weight, collection(one_by_one).values(), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(dense(BATCH).values(), collection(BATCH).values(), rtol=1e-5, atol=1e-5)


@every
def test_a_fit_is_near_the_rows_that_it_was_fitted_to(config):
    data, served = rows(), decompress(fitted(config)).embedding_bags["item"].weight
    weights = counts().clamp(min=1).double().unsqueeze(1)
    mean = (data * weights).sum(0) / weights.sum()
    error = ((served - data).square() * weights).sum()
    assert error < ((mean - data).square() * weights).sum()


@every
def test_a_fit_leaves_the_trained_collection_alone(config):
    dense = dense_collection()
    before = copy.deepcopy(dense)
    seen = counts()
    compress(dense, config, counts={"item": seen}, contexts={"item": contexts()})
    assert same_state(dense, before)
    assert str(dense.embedding_bag_configs()[0]).split("init_fn")[0] == str(table()).split("init_fn")[0]
    assert torch.equal(seen, counts())


@every
def test_a_fit_is_a_function_of_its_seed(config):
    torch.manual_seed(5)
    assert same_state(fit(config), fitted(config))


@pytest.mark.parametrize("config", HASHED, ids=[IDS[CONFIGS.index(config)] for config in HASHED])
def test_start_codes_are_a_function_of_seed_name_and_id(config):
    def start(ids, seed=0, **changes):
        of = table(init_fn=nn.init.normal_, **changes)  # TorchRec's own spreads rows by the size of the table
        return config.parts(of, seed).codes.start(ids)

    many = torch.arange(5 * NUM_ROWS)
    state = torch.get_rng_state()
    codes = start(many, num_embeddings=len(many))
    assert torch.equal(codes[:NUM_ROWS], start(many[:NUM_ROWS]))
    assert torch.equal(codes[1000:1100], start(many[1000:1100]))  # of the id alone: any shard makes its own
    assert torch.equal(codes[[1500, 3, 1100, 3]], start(torch.tensor([1500, 3, 1100, 3])))
    assert torch.equal(torch.get_rng_state(), state)
    for other in (start(many, seed=1), start(many, name="user")):
        assert not torch.equal(codes[:NUM_ROWS], other[:NUM_ROWS])
        assert not torch.equal(codes[1024:], other[1024:])
    assert not torch.equal(codes[:900], codes[1024:1924])


@every
def test_unfitted_collections_agree_under_one_seed(config):
    torch.manual_seed(3)
    one = fresh(config, seed=4)
    torch.manual_seed(3)
    assert same_state(one, fresh(config, seed=4))


@coded
@pytest.mark.parametrize("is_fitted", [False, True])
def test_codes_are_in_range(config, is_fitted):
    codes = (fitted(config) if is_fitted else fresh(config)).code_tables.banks["item"].codes
    part = config.parts(table(), 0).codes
    assert codes.shape == (part.num_rows(NUM_ROWS), part.row_size)
    if isinstance(config, CodebookConfig) and config.num_packed:
        codes = unpack_codes(codes, config.num_packed)
    assert int(codes.min()) >= 0
    assert int(codes.max()) < code_size(config)
    if isinstance(config, CodebookConfig) and config.num_hot_rows and not is_fitted:
        assert int(codes[:, 0].max()) < config.first_size  # no start code is an escape


@every
def test_gradients_reach_every_trainable_tensor(config):
    collection = fit(config)
    out = collection(batch([[number, (number * 7) % NUM_ROWS] for number in range(NUM_ROWS)])).values()
    trainable = {name: parameter for name, parameter in collection.named_parameters() if parameter.numel()}
    if not trainable:
        assert config.method in ("int4", "int8", "narrow") or config.codebook_dtype == "int8"
        assert not out.requires_grad
        return
    out.backward(torch.randn_like(out))
    for name, parameter in trainable.items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert float(parameter.grad.abs().sum()) > 0, name
        if "hot_rows" in name or "biases" in name or "scalars" in name:
            moved = parameter.grad.flatten()[:NUM_ROWS].ne(0).float().mean()
            assert moved > 0.99, name


@every
@pytest.mark.parametrize("mean", [False, True])
def test_pooling_commutes_with_the_look_up(config, mean):
    collection = fitted(config)
    if mean:
        from torchrec import PoolingType

        state = collection.state_dict()
        collection = fresh(config, pooling=PoolingType.MEAN)
        collection.load_state_dict(state)
    alone = collection(batch([[1], [2], [402], [0], [7]])).values()
    pooled = collection(BATCH).values()
    zero = torch.zeros(DIM)
    first = alone[0] + 2 * alone[1]
    third = alone[2] + alone[3]
    expected = torch.stack([first / 3 if mean else first, zero, third / 2 if mean else third, alone[4], zero])
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)


@every
@pytest.mark.parametrize("bags", [[[]], [[], [], []]])
def test_empty_batches(config, bags):
    # a batch of no bags at all already fails in TorchRec's own KeyedJaggedTensor.to_dict
    out = fitted(config)(batch(bags)).values()
    assert out.shape == (len(bags), DIM)
    assert not out.any()


@every
def test_state_dict_round_trip_is_bit_equal(config):
    collection = fitted(config)
    file = io.BytesIO()
    torch.save(collection.state_dict(), file)
    file.seek(0)
    is_hashed = any(part.remap.salt for part in config.parts(table(), 0).native)
    other = fresh(config, seed=0 if is_hashed else 9)  # which a state dict holds to, where ids are hashed by it
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same_state(other, collection)
    assert torch.equal(other(BATCH).values(), collection(BATCH).values())


def on_meta(config: MethodConfig) -> CompressedEmbeddingBagCollection:
    return CompressedEmbeddingBagCollection([table()], device=torch.device("meta"), compression=config)


@every
def test_meta_construction_allocates_nothing_and_counts_the_same(config):
    collection = on_meta(config)
    assert all(tensor.is_meta for tensor in tensors(collection))
    assert collection.footprint() == fitted(config).footprint()


@every
def test_meta_then_reset_equals_direct_construction(config):
    collection = on_meta(config).to_empty(device="cpu")
    collection.reset_parameters()
    direct = fresh(config)
    for name, buffer in direct.named_buffers():
        assert torch.equal(dict(collection.named_buffers())[name], buffer), name
    for name, parameter in collection.named_parameters():
        if not parameter.numel():
            continue
        assert torch.isfinite(parameter).all(), name
        theirs = dict(direct.named_parameters())[name]
        assert torch.allclose(parameter.detach().std(), theirs.detach().std(), rtol=0.25, atol=1e-6), name
    assert collection.footprint() == direct.footprint()
    assert torch.isfinite(collection(BATCH).values()).all()


@coded
@pytest.mark.parametrize("fill", ["garbage", "zeros"])
def test_meta_without_reset_raises_instead_of_serving_garbage(config, fill):
    collection = on_meta(config).to_empty(device="cpu")
    if fill == "zeros":  # what DistributedModelParallel does with meta buffers
        for buffer in collection.buffers():
            buffer.zero_()
    with pytest.raises(RuntimeError, match=r"table 'item'.*: the code table must be filled .*reset_parameters\(\)"):
        collection(BATCH)


@coded
def test_meta_then_load_state_dict_serves(config):
    collection = on_meta(config).to_empty(device="cpu")
    collection.load_state_dict(fitted(config).state_dict())
    assert torch.equal(collection(BATCH).values(), fitted(config)(BATCH).values())


@every
def test_config_survives_yaml(config):
    text = yaml.safe_dump({"item": config.to_dict(), "*": config.to_dict()})
    read = parse(yaml.safe_load(text))
    assert read == {"item": config, "*": config}
    assert parse(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@every
def test_configs_are_frozen_values(config):
    assert copy.deepcopy(config) == config
    assert hash(copy.deepcopy(config)) == hash(config)
    with pytest.raises(AttributeError):
        config.method = "other"
    assert config.new_ids


@every
def test_table_configs_handed_in_are_never_written_to(config):
    mine = table(feature_names=[])
    before = dict(vars(mine))
    CompressedEmbeddingBagCollection([mine], compression=config)
    assert vars(mine) == before
    assert mine.feature_names == []


@every
def test_nothing_is_copied_between_collections_of_one_config(config):
    one, other = fresh(config), fresh(config)
    mine = {tensor.data_ptr() for tensor in tensors(one) if tensor.numel()}
    assert not mine & {tensor.data_ptr() for tensor in tensors(other)}


BAD = [
    ("num_codes", "pq", {"num_codes": 0}, {}),
    ("embedding_dim must be a multiple of num_codes", "pq", {"num_codes": 3}, {}),
    ("embedding_dim must be a multiple of num_codes", "mec", {"num_codes": 5}, {}),
    ("codebook_size", "pq", {"num_codes": 4, "codebook_size": 1}, {}),
    ("num_hot_rows", "pq", {"num_codes": 4, "num_hot_rows": -1}, {}),
    ("num_hot_rows", "pq", {"num_codes": 4, "num_hot_rows": NUM_ROWS}, {}),
    ("num_hot_rows", "pq", {"num_codes": 1, "codebook_size": 16, "num_hot_rows": 16}, {}),
    ("hot_dtype", "pq", {"num_codes": 4, "hot_dtype": "int2"}, {}),
    ("codebook_dtype must be 'fp32' or 'int8'", "pq", {"num_codes": 4, "codebook_dtype": "int4"}, {}),
    ("codebook_dtype must be 'fp32' with 'random'", "random", {"num_codes": 4, "codebook_dtype": "int8"}, {}),
    ("codebook_dtype must be 'fp32' with 'quantile'", "quantile", {"num_codes": 4, "codebook_dtype": "int8"}, {}),
    ("an even number of values in int8, got 1", "pq", {"num_codes": DIM, "codebook_dtype": "int8"}, {}),
    (
        "embedding_dim must be a multiple of 4 for int4",
        "pq",
        {"num_codes": 2, "num_hot_rows": 9, "hot_dtype": "int4"},
        {"embedding_dim": 6},
    ),
    ("structure", "pq", {"num_codes": 4, "structure": "tree"}, {}),
    ("structure", "mec", {"num_codes": 4, "structure": "residual"}, {}),
    ("popularity", "pq", {"num_codes": 4, "popularity": "log10"}, {}),
    ("popularity", "mec", {"num_codes": 4, "popularity": "log10"}, {}),
    ("structure", "quantile", {"num_codes": 4, "structure": "tree"}, {}),
    ("num_codes", "random", {"num_codes": -1}, {}),
    ("num_buckets", "hash", {"num_buckets": 0}, {}),
    ("num_buckets", "memcom", {"num_buckets": 0}, {}),
    ("scalars", "memcom", {"num_buckets": 4, "scalars": "loose"}, {}),
    ("embedding_dim", "memcom", {"num_buckets": 4, "scalars": "grouped"}, {"embedding_dim": 6}),
    ("embedding_dim", "int4", {}, {"embedding_dim": 10}),
    ("embedding_dim", "int8", {}, {"embedding_dim": 15}),
    ("embedding_dim", "pq", {"num_codes": 3, "num_hot_rows": 9}, {"embedding_dim": 15}),
]


@pytest.mark.parametrize(("word", "method", "options", "changes"), BAD, ids=[f"{b[1]}-{b[0][:14]}" for b in BAD])
def test_bad_configs_raise_with_the_name_of_the_field(word, method, options, changes):
    with pytest.raises(ValueError, match=rf"table 'item': .*{word}"):
        fresh(METHODS[method](**options), **changes)


def test_every_case_is_listed_once():
    assert len(ALL) == len(set(CONFIGS)) == sum(map(len, CASES.values()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PQConfig(num_codes=True), "PQConfig.num_codes: must be int, got True"),
        (lambda: PQConfig(num_codes=4.0), "PQConfig.num_codes: must be int, got 4.0"),
        (lambda: PQConfig(num_codes="4"), "PQConfig.num_codes: must be int, got '4'"),
        (lambda: PQConfig(num_codes=4, num_hot_rows=1.5), "PQConfig.num_hot_rows: must be int, got 1.5"),
        (lambda: HashConfig(num_buckets=None), "HashConfig.num_buckets: must be int, got None"),
        (lambda: MEmComConfig(num_buckets=9, bias="yes"), "MEmComConfig.bias: must be bool, got"),
        (lambda: MECConfig(num_codes=4, fit_options={"num_steps": 2}), "MECConfig.fit_options: must be a MECFit, got"),
    ],
)
def test_options_given_in_code_have_their_types(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every
def test_a_fit_depends_on_its_seed_alone(config):
    """Whatever the process drew before, and without rows where the method needs none of them."""
    data = [TableData(rows(), counts(), contexts())]
    if config.needs == "contexts" and not config.num_hot_rows:
        data.append(TableData(None, counts(), contexts()))
    for given in data:
        found = []
        for before in (1, 2):
            torch.manual_seed(before)
            state = config.fit(table(), given)
            found.append(
                [*state.decoder.values(), *state.native.values(), *([] if state.codes is None else [state.codes])]
            )
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
