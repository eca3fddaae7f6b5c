"""What each part is charged, against numbers worked out by hand and against the stock estimators."""

import itertools

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.cases import CONFIGS, IDS, fresh, is_managed
from tests.planner.plans import BATCH, DIM, META, RANKS, model, options, topology
from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, native_parameters
from torchrec_compress.methods import (
    DenseConfig,
    HashConfig,
    Int8Config,
    MECConfig,
    MEmComConfig,
    MethodConfig,
    PQConfig,
)
from torchrec_compress.planner import (
    CompressedStorageEstimator,
    EmbeddingShardingPlanner,
    estimators,
    translate_constraints,
)
from torchrec_compress.sharding import RemappedEmbeddingBagCollectionSharder, get_default_sharders

ROWS = 1_000_000
POOLING = 20
LOOKUPS = {"t": ParameterConstraints(pooling_factors=[float(POOLING)])}
NUM_IDS = BATCH * POOLING
MANY = {"row_wise", "table_wise"}


def one(method: MethodConfig, *, pooled: bool = True, device: str = "cuda", **more):
    return options(model({"t": method}, ROWS, pooled), LOOKUPS, device=device, **more)


def bytes_of(option, rank: int = 0) -> int:
    storage = option.shards[rank].storage
    return storage.hbm + storage.ddr


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(("method", "row_bytes"), [(PQConfig(num_codes=8), 8), (Int8Config(), DIM + 4)])
def test_codes_are_frozen_and_unpooled(method, row_bytes, device):
    found = one(method, device=device)
    sharded = {key[1]: option for key, option in found.items() if key[0] == "code_tables.t"}
    assert set(sharded) == {"row_wise", "table_wise", "data_parallel"}
    for how, option in sharded.items():
        perf = option.shards[0].perf
        assert perf.bwd_compute == perf.bwd_comms == perf.prefetch_compute == 0 < perf.fwd_compute
        assert (perf.fwd_comms > 0) == (perf.input_dist_comms > 0) == (how in MANY)
    # the weights, the ids as int64, and one row of codes per id
    step = NUM_IDS * (8 + row_bytes)
    assert bytes_of(sharded["row_wise"]) == ROWS // RANKS * row_bytes + step
    assert bytes_of(sharded["table_wise"]) == ROWS * row_bytes + RANKS * step
    # kernels follow ids into a whole table; those of a CPU keep the codes for the backward
    assert bytes_of(sharded["data_parallel"]) == ROWS * row_bytes + (step if device == "cpu" else 8 * NUM_IDS)


def test_codes_are_padded_where_they_travel_and_only_there(monkeypatch):
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", "torch")
    found = one(PQConfig(num_codes=6, codebook_size=300, structure="residual"))  # twelve bytes
    assert bytes_of(found["code_tables.t", "row_wise", "fused"]) == ROWS // RANKS * 12 + NUM_IDS * (8 + 12)
    for num_codes, size in ((1, 32), (1, 16), (2, 16)):  # of 16 codewords, two codes take a byte
        found = one(PQConfig(num_codes=num_codes, codebook_size=size))
        assert bytes_of(found["code_tables.t", "row_wise", "fused"]) == ROWS // RANKS + NUM_IDS * (8 + 4)
        assert bytes_of(found["code_tables.t", "data_parallel", "dense"]) == ROWS + NUM_IDS * (8 + 1)


def test_traffic_of_codes_grows_with_the_ids_not_with_the_bags():
    few = options(model({"t": PQConfig(num_codes=8)}))["code_tables.t", "row_wise", "fused"]
    many = one(PQConfig(num_codes=8))["code_tables.t", "row_wise", "fused"]
    assert many.shards[0].perf.fwd_comms == pytest.approx(POOLING * few.shards[0].perf.fwd_comms)
    stock = options(model({"t": PQConfig(num_codes=8)}), LOOKUPS, stock=True)["code_tables.t", "row_wise", "fused"]
    assert stock.shards[0].perf.bwd_compute > 0  # what the wrapper is for


def test_ids_travel_as_int32_until_a_table_has_more_rows():
    few, many = (
        options(model({"t": PQConfig(num_codes=8)}, rows))["code_tables.t", "row_wise", "fused"].shards[0].perf
        for rows in (2**31 - 1, 2**31)
    )
    assert few.input_dist_comms * 2 == many.input_dist_comms


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("structure", ["product", "residual"])
def test_codebooks_are_charged_with_gradient_optimizer_and_decoded_embeddings(structure, pooled, device):
    method = PQConfig(num_codes=4, structure=structure)
    key = ("decoder.t.codebooks", "data_parallel", "dense")
    option = one(method, pooled=pooled, device=device)[key]
    values = 256 * DIM * (4 if structure == "residual" else 1)
    embeddings = 4 * DIM * (BATCH if pooled else NUM_IDS)
    for rank in range(RANKS):
        assert bytes_of(option, rank) == 4 * values * (1 + 1 + 2) + 4 + embeddings
    assert option.shards[0].perf.bwd_comms > 0
    plain = one(method, pooled=pooled, device=device, dense_optimizer="sgd")[key]
    assert bytes_of(option) - bytes_of(plain) == 8 * values + 4
    given = one(method, pooled=pooled, device=device, dense_optimizer=6.0)[key]
    assert bytes_of(given) - bytes_of(plain) == 6 * values


@pytest.mark.parametrize("wishes", [LOOKUPS, None], ids=["constraints", "none"])
@pytest.mark.parametrize("width", [None, 8])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("structure", ["product", "residual"])
def test_sums_of_int8_codebooks_are_charged_as_what_they_are_decoded_to(structure, pooled, width, wishes):
    method = PQConfig(num_codes=4, structure=structure, codebook_dtype="int8", width=width)
    kind = CompressedEmbeddingBagCollection if pooled else CompressedEmbeddingCollection
    config = (EmbeddingBagConfig if pooled else EmbeddingConfig)(
        name="t", num_embeddings=ROWS // 1000, embedding_dim=DIM, feature_names=["t"]
    )
    batch = KeyedJaggedTensor.from_lengths_sync(["t"], torch.zeros(3, dtype=torch.int64), torch.tensor([1, 2]))
    decoder = kind([config], compression=method).decoder  # type: ignore[list-item]
    out = decoder.banks["t"](batch.values(), None, None, torch.zeros(3, 4, dtype=torch.uint8), [])
    assert out.dtype == torch.float32 and out.shape == (3, DIM)
    found = options(model({"t": method}, ROWS, pooled), wishes)["decoder.t.codebooks", "data_parallel", "dense"]
    stored, num_rows = found.tensor, BATCH if pooled or wishes is None else NUM_IDS
    decoded = 4 * (DIM if width is None else width) * num_rows  # what a projection makes of them is counted elsewhere
    in_float32 = 4 * stored.shape[0] * (stored.shape[1] - 4)
    assert bytes_of(found) == stored.numel() + in_float32 + decoded


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_frozen_hot_rows_have_neither_gradient_nor_state_but_on_a_gpu_a_float_copy(device):
    key = ("decoder.t.hot_rows", "data_parallel", "dense")
    option = one(PQConfig(num_codes=4, num_hot_rows=1000, hot_dtype="int8"), device=device)[key]
    assert bytes_of(option) == 1000 * (DIM + 4) + (4 * 1000 * DIM if device == "cuda" else 0)
    assert option.shards[0].perf.total == 0
    narrow = one(PQConfig(num_codes=4, num_hot_rows=1000, hot_dtype="int8", width=8), device=device)[key]
    assert bytes_of(narrow) == 1000 * (8 + 4) + (4 * 1000 * 8 if device == "cuda" else 0)
    floats = one(PQConfig(num_codes=4, num_hot_rows=1000, hot_dtype="fp32"))[key]
    assert bytes_of(floats) == 1000 * DIM * 16 + 4
    assert floats.shards[0].perf.bwd_comms > 0


@pytest.mark.parametrize(("device", "backend"), [("cpu", "torch"), ("cpu", "fbgemm"), ("cuda", "torch")])
def test_tiers_without_kernels_are_charged_with_codeword_numbers_and_stacked_tables(device, backend, monkeypatch):
    method = PQConfig(num_codes=4, num_hot_rows=1000, hot_dtype="fp32")
    charged = []
    for wanted in ("auto", backend):
        monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", wanted)
        found = one(method, device=device)
        names = ("decoder.t.codebooks", "decoder.t.hot_rows", "code_tables.t")
        charged.append([bytes_of(found[name, "data_parallel", "dense"]) for name in names])
    gathered = 4 * NUM_IDS * (device == "cuda")
    more = [plain - kernels for kernels, plain in zip(*charged, strict=True)]
    assert more == [8 * 4 * NUM_IDS, 4 * (256 + 1000) * DIM, gathered]


def test_rows_behind_rewritten_ids_are_unpooled_and_bags_are_not():
    rows = one(MEmComConfig(num_buckets=1000))["rows.buckets_64.t", "table_wise", "fused"]
    bag = one(HashConfig(num_buckets=1000))["bags.t", "table_wise", "fused"]
    assert bytes_of(rows) == 4000 * DIM + RANKS * NUM_IDS * (8 + 4 * DIM)
    assert bytes_of(bag) == 4000 * DIM + RANKS * (8 * NUM_IDS + 4 * DIM * BATCH)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("ranks", [8, 3])  # 1,000,000 rows do not divide by three
def test_stock_tables_are_estimated_as_ever_unless_replicated(device, ranks):
    of = model(None)
    apply_optimizer_in_backward(RowWiseAdagrad, of.parameters(), {"lr": 0.1})
    ours, stock = (options(of, LOOKUPS, device=device, ranks=ranks, stock=flag) for flag in (False, True))
    assert ours.keys() == stock.keys() and len(ours) >= 8
    for key, option in ours.items():
        for mine, theirs in zip(option.shards, stock[key].shards, strict=True):
            assert mine.size == theirs.size and mine.perf == theirs.perf
            if key[1] != "data_parallel":
                assert mine.storage == theirs.storage, key
            else:  # gradient and Adam; the optimizer in the backward never runs
                extra = mine.storage.hbm + mine.storage.ddr - theirs.storage.hbm - theirs.storage.ddr
                assert extra == 4 * ROWS * DIM * 3 + 4 - 4 * ROWS


def test_the_state_of_a_fused_optimizer_is_that_of_its_shards():
    of = model({"t": HashConfig(num_buckets=2000)}, dim=512)
    without = options(of)
    apply_optimizer_in_backward(RowWiseAdagrad, native_parameters(of), {"lr": 0.1})
    found = options(of)
    key = ("bags.t", "column_wise", "fused")
    assert len(found[key].shards) == 4  # each keeps a state for all rows, which the stock estimate spreads over them
    assert [bytes_of(found[key], n) - bytes_of(without[key], n) for n in range(4)] == [4 * 2000] * 4
    key = ("bags.t", "data_parallel", "dense")
    assert bytes_of(found[key]) == bytes_of(without[key])


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_stored_bytes_are_the_footprint_of_the_real_tensors(config, ranks):
    collection = fresh(config)
    planner = EmbeddingShardingPlanner(topology("cpu", ranks), BATCH, stats=[])
    planner.plan(torch.nn.ModuleList([collection]))
    table, real = planner.report.tables["item"], collection.footprint().tables["item"]
    assert table.stored("codes") == real.code_bytes
    assert table.stored("native") + table.stored("managed") == real.native_bytes + real.managed_bytes
    assert (table.stored("managed") > 0, table.served_bytes) == (is_managed(config), real.served_bytes)
    assert (table.stored("decoder"), table.stored_bytes) == (real.decoder_bytes, real.total_bytes)
    assert (table.dense_bytes, table.ratio, table.method) == (real.dense_bytes, real.ratio, real.method)
    for part in table.parts:  # buffers of decoders are on all ranks, and in no plan
        copies = ranks if part.sharding_type in ("data_parallel", "unplanned") else 1
        assert part.weight_bytes == copies * (part.stored_bytes - 4 * (part.kind == "codes"))


def test_estimators_take_the_second_argument_by_any_name_and_refuse_unknown_optimizers():
    of = model({"t": DenseConfig()})
    found = list(options(of).values())
    before = [bytes_of(option) for option in found]
    inner = CompressedStorageEstimator(topology(), inner=_Counting())
    inner.estimate(found, sharder_map={})
    inner.estimate(found, {})
    assert [bytes_of(option) for option in found] != before
    with pytest.raises(ValueError, match=r"dense_optimizer: must be one of .* got 'adan'"):
        estimators(topology(), dense_optimizer="adan")
    with pytest.raises(ValueError, match="got -1"):
        CompressedStorageEstimator(topology(), dense_optimizer=-1.0)


class _Counting:
    """An inner estimator that charges a megabyte."""

    def estimate(self, sharding_options, *_, **__):
        for option in sharding_options:
            assert len(option.shards) == len({tuple(shard.size) for shard in option.shards})
            for shard in option.shards:
                shard.storage = topology().devices[0].storage.__class__(hbm=2**40, ddr=0)


@pytest.mark.parametrize("marked", [False, True])
def test_an_optimizer_named_by_the_sharder_counts_where_the_tensor_has_no_mark(marked):
    of = model({"t": HashConfig(num_buckets=2000)})
    if marked:
        apply_optimizer_in_backward(torch.optim.SGD, native_parameters(of), {"lr": 0.1})
    stock = EmbeddingBagCollectionSharder(fused_params={"optimizer": EmbOptimType.EXACT_ADAGRAD})
    sharders = [RemappedEmbeddingBagCollectionSharder(stock)]
    wish = {"t": ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])}
    planner = EmbeddingShardingPlanner(topology(), BATCH, wish, stats=[])
    planner.plan(of, sharders)
    assert planner.report.tables["t"].optimizer_bytes == (0 if marked else 4 * 2000 * DIM)
    assert planner.report.tables["t"].activation_bytes == RANKS * BATCH * (8 + 4 * DIM)


def test_replicating_a_code_table_is_seen_to_be_cheap():
    """The stock planner charges an all-reduce of the whole table, and so never replicates codes."""
    slowest = {}
    for stock in (False, True):
        found = options(model({"t": PQConfig(num_codes=8)}), LOOKUPS, stock=stock, ranks=16)
        for how, kernel in (("row_wise", "fused"), ("data_parallel", "dense")):
            option = found["code_tables.t", how, kernel]
            slowest[stock, how] = max(shard.perf.total for shard in option.shards)
    assert slowest[False, "data_parallel"] < slowest[False, "row_wise"]
    assert slowest[True, "data_parallel"] > slowest[True, "row_wise"]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("uneven", [1.0, 1.5])
def test_a_table_costs_among_others_what_it_costs_alone(device, uneven):
    """Rows do not matter to most kinds, so not all sizes are estimated; to replicated tables they do."""
    methods = [MECConfig(num_codes=8), MECConfig(num_codes=4), MEmComConfig(num_buckets=5), Int8Config(), DenseConfig()]
    sizes, wishes, tables, compression = (5, 7, 1000, 1001, 1002, 1003, 10**5, 10**6), {}, [], {}
    for number, (method, rows) in enumerate(itertools.product(methods, sizes)):
        name = f"t{number}"
        tables.append(EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=16, feature_names=[name]))
        compression[name] = method
        if rows in (7, 10**5):  # those between are of another kind than those at the ends
            wishes[name] = ParameterConstraints(pooling_factors=[20.0], batch_sizes=[64])
    of = nn.ModuleDict({"sparse": CompressedEmbeddingBagCollection(tables, META, compression=compression)})
    machines = Topology(world_size=4, local_world_size=2, compute_device=device, uneven_sharding_perf_multiplier=uneven)
    constraints = translate_constraints(of, wishes, device)
    enumerator = EmbeddingEnumerator(machines, BATCH, constraints, estimators(machines, constraints))
    together = enumerator.enumerate(of, get_default_sharders())
    kinds = set()
    for option in together:
        found = [(shard.perf, shard.storage) for shard in option.shards]
        enumerator.populate_estimates([option])
        assert found == [(shard.perf, shard.storage) for shard in option.shards], option.fqn
        kinds.add((option.module_type_key, option.sharding_type, option.compute_kernel))
    assert len(kinds) > 10
