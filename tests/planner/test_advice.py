"""Where tables do not fit, the error says what is missing and a line that helps; the line is applied and does help."""

import ast
import json
import pickle
import re

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingConfig
from torchrec.distributed.planner import EmbeddingShardingPlanner as StockPlanner
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, PlannerErrorType
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.planner.plans import BATCH, META, model, topology
from torchrec_compress import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    methods,
    native_parameters,
)
from torchrec_compress.compression import parse
from torchrec_compress.methods import DenseConfig, HashConfig, Int8Config, MECConfig, MEmComConfig, PQConfig
from torchrec_compress.planner import CompressedEnumerator, DecodeReservation, EmbeddingShardingPlanner, PlanStats
from torchrec_compress.planner.advice import InsufficientStorageError, missing_bytes
from torchrec_compress.sharding import get_default_sharders

SIZES = {"huge": 300_000_000, "big": 100_000_000, "small": 100_000}


def build(compression, pooled: bool = True, optimizer=RowWiseAdagrad):
    kind = EmbeddingBagConfig if pooled else EmbeddingConfig
    tables = [
        kind(name=name, num_embeddings=rows, embedding_dim=64, feature_names=[name]) for name, rows in SIZES.items()
    ]
    collection = CompressedEmbeddingBagCollection if pooled else CompressedEmbeddingCollection
    of = torch.nn.ModuleDict({"sparse": collection(tables, device=META, compression=compression)})
    apply_optimizer_in_backward(optimizer, native_parameters(of), {"lr": 0.1})
    return of


def planner(gigabytes: float, constraints=None, device: str = "cuda") -> EmbeddingShardingPlanner:
    reservation = FixedPercentageStorageReservation(0.0)
    return EmbeddingShardingPlanner(
        topology(device, gigabytes=gigabytes), BATCH, constraints, storage_reservation=reservation, stats=[]
    )


def refused(of, gigabytes: float, constraints=None, device: str = "cuda") -> InsufficientStorageError:
    with pytest.raises(InsufficientStorageError) as raised:
        planner(gigabytes, constraints, device).plan(of)
    return raised.value


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize(
    ("compression", "gigabytes", "expected"),
    [
        ({"*": DenseConfig()}, 10, {"huge": "int8"}),
        ({"*": DenseConfig()}, 5, {"huge": "int8", "big": "int8"}),
        ({"*": DenseConfig()}, 3, {"huge": "int4", "big": "int4"}),
        ({"*": DenseConfig()}, 1, {"huge": "pq", "big": "pq"}),
        ({"*": DenseConfig()}, 0.3, {"huge": "pq", "big": "pq"}),
        ({"*": MECConfig(num_codes=16)}, 0.6, {"huge": "mec"}),
        ({"*": MECConfig(num_codes=16, codebook_size=300)}, 0.4, {"huge": "mec", "big": "mec"}),
        ({"*": HashConfig(num_buckets=50_000_000)}, 2.0, {"huge": "hash", "big": "hash"}),
        ({"*": Int8Config()}, 2, {"huge": "int4", "big": "int4"}),
        ({"*": MEmComConfig(num_buckets=10_000_000, scalars="grouped")}, 0.5, {"huge": "pq", "big": "pq"}),
    ],
)
def test_the_pasted_line_makes_the_plan_fit(compression, gigabytes, expected, pooled):
    error = refused(build(compression, pooled), gigabytes)
    message = str(error)
    line = re.search(r"YAML, under compression:  (.*)", message).group(1)
    assert {name: text["method"] for name, text in json.loads(line).items()} == expected
    for name in expected:
        assert repr(name) in message.splitlines()[0]
    planner(gigabytes).plan(build({**parse(json.loads(line)), **compression}, pooled))  # does not raise
    python = re.search(r"Python: +(compression=.*)", message).group(1)
    assert ast.parse(f"f({python})")
    assert eval(python.removeprefix("compression="), vars(methods)) == error.advice.changes


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_advice_leaves_room_for_what_the_new_method_decodes(device):
    """A batch so large that pooled rows of int8 tables, which no codebook stands for, take as much as the tables."""

    def plan(compression, megabytes: int) -> None:
        tables = [EmbeddingBagConfig(name="t", num_embeddings=10**6, embedding_dim=64, feature_names=["t"])]
        of = torch.nn.ModuleList([CompressedEmbeddingBagCollection(tables, device=META, compression=compression)])
        machine = topology(device, ranks=1, gigabytes=megabytes / 2**10)
        reservation = FixedPercentageStorageReservation(0.0)
        EmbeddingShardingPlanner(machine, 10**5, storage_reservation=reservation, stats=[]).plan(of)

    advised = set()
    for megabytes in range(60, 300, 12):
        try:
            plan({"*": DenseConfig()}, megabytes)
        except InsufficientStorageError as error:
            advised |= {method.method for method in error.advice.changes.values()}
            if error.advice.changes:
                plan({**error.advice.changes, "*": DenseConfig()}, megabytes)  # does not raise
    assert {"int8", "int4"} <= advised


def test_no_gentler_or_shorter_advice_would_do():
    error = refused(build({"*": DenseConfig()}), 3)
    both = dict.fromkeys(("huge", "big"), Int8Config())
    for less in (both, {"huge": error.advice.changes["huge"]}, {"big": error.advice.changes["big"]}):
        refused(build({**less, "*": DenseConfig()}), 3)


@pytest.mark.parametrize(("device", "method", "row_bytes"), [("cuda", DenseConfig(), 260), ("cpu", Int8Config(), 68)])
def test_the_missing_bytes_are_those_that_are_missing(device, method, row_bytes):
    of = build({"*": method})
    missing = refused(of, 1, device=device).advice.missing_bytes
    planner(1 + missing / 2**30, device=device).plan(of)
    refused(of, 1 + 0.99 * missing / 2**30, device=device)
    # weights and row-wise state over eight ranks, less one GiB
    assert missing == pytest.approx(400_100_000 * row_bytes / 8 - 2**30, rel=0.01)


@pytest.mark.parametrize(("gigabytes", "num_codes"), [(2, 4), (1, 2), (0.5, 1)])
def test_one_table_that_is_too_large_for_any_rank_is_named_though_all_would_fit_together(gigabytes, num_codes):
    wish = {"huge": ParameterConstraints(sharding_types=["table_wise"])}
    error = refused(build({"*": PQConfig(num_codes=8)}), gigabytes, wish)
    assert error.advice.changes == {"huge": PQConfig(num_codes=num_codes)}
    assert error.error_type == PlannerErrorType.STRICT_CONSTRAINTS
    planner(gigabytes, wish).plan(build({**error.advice.changes, "*": PQConfig(num_codes=8)}))


def test_tables_of_torchrec_itself_get_the_advice_to_be_compressed():
    tables = [
        EmbeddingBagConfig(name=n, num_embeddings=r, embedding_dim=64, feature_names=[n]) for n, r in SIZES.items()
    ]
    stock = torch.nn.ModuleDict({"sparse": EmbeddingBagCollection(tables, device=META)})
    assert list(refused(stock, 10).advice.changes) == ["huge"]


def test_nothing_that_helps_is_said():
    error = refused(model({"t": MECConfig(num_codes=1)}, rows=10**11), 1)
    assert error.advice.changes == {} and "No compression of single tables was found to fit" in str(error)
    assert "Too large: 't' (93.1 GiB)" in str(error)


def test_the_error_travels_between_processes_and_keeps_what_torchrec_said():
    error = refused(build({"*": DenseConfig()}), 10)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.advice, copy.error_type) == (str(error), error.advice, error.error_type)
    assert "TorchRec says: Unable to find a plan" in str(error) and isinstance(error, PlannerError)


def test_the_explicit_way_explains_itself_too():
    of, machines = build({"*": DenseConfig()}), topology(gigabytes=10)
    stats = PlanStats(of)
    stock = StockPlanner(
        topology=machines,
        batch_size=BATCH,
        enumerator=CompressedEnumerator(machines, BATCH),
        storage_reservation=DecodeReservation(FixedPercentageStorageReservation(0.0)),
        stats=[stats],
    )
    with pytest.raises(PlannerError) as raised:
        stock.plan(of, get_default_sharders())
    explained = stats.explain(raised.value)
    assert isinstance(explained, InsufficientStorageError) and list(explained.advice.changes) == ["huge"]
    assert missing_bytes(stats.failure.options, stats.failure.topology) == explained.advice.missing_bytes


def test_other_errors_stay_as_they_are():
    error = PlannerError("no such thing", PlannerErrorType.OTHER)
    assert PlanStats(model({"t": DenseConfig()})).explain(error) is error


def test_the_state_of_the_optimizer_is_part_of_what_must_fit():
    def hashed(optimizer, changes):
        return build({**changes, "*": HashConfig(num_buckets=50_000_000)}, optimizer=optimizer)

    error = refused(hashed(torch.optim.Adam, {}), 2)
    without = refused(hashed(torch.optim.SGD, {}), 2)
    assert error.advice.changes["huge"].num_buckets < without.advice.changes["huge"].num_buckets
    planner(2).plan(hashed(torch.optim.Adam, error.advice.changes))
    refused(hashed(torch.optim.Adam, without.advice.changes), 2)
