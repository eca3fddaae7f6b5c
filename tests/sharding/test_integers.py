"""Codes that something has changed are an error on every rank; marks are those of the whole table."""

import logging
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from tests.cases import NUM_ROWS, batch, dense_collection, fitted, table
from tests.sharding.models import Model, shard
from torchrec_compress import CompressedEmbeddingBagCollection, compress
from torchrec_compress.methods import Int8Config, PQConfig, RandomCodesConfig

TIERS = PQConfig(num_codes=2, codebook_size=32, num_hot_rows=70, popularity="count")  # of tests.cases
SOME = PQConfig(num_codes=4, codebook_size=16, num_coded=150, popularity="count")  # of tests.cases
FLAG, CODES = "embeddings.code_tables.banks.item.is_set", "embeddings.code_tables.banks.item.codes"
FEATURES = batch([[number] for number in range(0, NUM_ROWS, 7)])
KINDS = ["row_wise", "table_wise", "data_parallel"]


def model_of(seed: int = 0, config: PQConfig = TIERS) -> Model:
    made = CompressedEmbeddingBagCollection([table()], compression=config, seed=seed)
    made.load_state_dict(fitted(config).state_dict())
    return Model(made)


def error(sharded) -> str:
    try:
        sharded(FEATURES)
    except ValueError as caught:
        return str(caught)
    return ""


def damage(how: str, config: PQConfig, integers: str) -> list[str]:
    """Return the errors after one rank's codes, then other integers, were changed, and after each was put right."""
    sharded = shard(model_of(config=config), how)
    collection = sharded.module.embeddings
    wanted, found = sharded(FEATURES).detach(), []
    owner = (
        dist.get_world_size() - 1
        if how != "table_wise"
        else next(rank for rank in range(2) if collection.code_tables._plan["item"].ranks == [rank])
    )
    for tensor in (collection.code_tables.banks["item"].codes, getattr(collection.decoder.banks["item"], integers)):
        kept = tensor.clone()
        if dist.get_rank() == owner:
            tensor.copy_(tensor * 0.9)
        found.append(error(sharded))
        tensor.copy_(kept)
        found.append(error(sharded))
    assert torch.equal(sharded(FEATURES), wanted)
    return found


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize(("config", "integers"), [(TIERS, "hot_rows"), (SOME, "coded_ids")], ids=["tiers", "some"])
def test_a_change_on_one_rank_is_an_error_on_all(two_ranks, how, config, integers):
    for found in two_ranks.run(damage, how, config, integers):
        assert all("table 'item': codes and low-bit rows must be those" in message for message in found[::2])
        assert found[1::2] == ["", ""]


def load_and_start(how: str) -> list[str]:
    """Return errors of a blended state dict and of fits that differ over the ranks, and the marks of good ones."""
    sharded, found = shard(model_of(), how), []
    whole = {f"embeddings.{name}": value for name, value in fitted(TIERS).state_dict().items()}
    whole |= {name: value for name, value in sharded.state_dict().items() if name not in whole}
    blend = {**whole, CODES: (whole[CODES] * 0.5 + whole[CODES].flip(0) * 0.5).to(torch.uint8)}
    for state in (blend, whole, {**whole, FLAG: torch.ones(1, dtype=torch.uint8)}):
        sharded.load_state_dict(dict(state))
        found.append(error(sharded))
    found.append(str(int(sharded.state_dict()[FLAG])))
    with warnings.catch_warnings():  # of what this package does with shards; in their suites, users may have them so
        warnings.filterwarnings("error", module=r"torchrec_compress\b")
        sharded.load_state_dict(sharded.state_dict())
    try:
        sharded.load_state_dict({**whole, CODES: whole[CODES] * 0.9})
    except ValueError as caught:
        found.append(str(caught))
    dense = dense_collection()
    with torch.no_grad():
        dense.embedding_bags["item"].weight += dist.get_rank()
    apart = shard(Model(compress(dense, Int8Config())), how)
    found.append(error(apart) if how == "row_wise" else "")
    return found


@pytest.mark.parametrize("how", ["row_wise", "table_wise"])
def test_what_is_loaded_is_summed_up_over_the_ranks(two_ranks, how):
    mark = str(int(fitted(TIERS).state_dict()["code_tables.banks.item.is_set"]))
    for blend, whole, unmarked, marked, floats, apart in two_ranks.run(load_and_start, how):
        assert "table 'item': codes and low-bit rows must be those" in blend
        assert (whole, unmarked, marked) == ("", "", mark)
        assert "codes: must be integers, got torch.float32" in floats
        assert ("codes and low-bit rows must be those" in apart) == (how == "row_wise")


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def start(how: str, device: str) -> tuple[list[str], list[int]]:
    """Return the lines about start codes, and the marks after a look-up, of a collection that was never fitted."""
    configs = [table(name=name, feature_names=["item"]) for name in ("a", "b", "c")]
    compression = {"a": TIERS, "b": RandomCodesConfig(num_codes=2, codebook_size=16), "c": Int8Config()}
    made = CompressedEmbeddingBagCollection(configs, device=torch.device(device), compression=compression)
    handler, logger = Lines(), logging.getLogger("torchrec_compress.modules.code_tables")
    logger.addHandler(handler)
    try:
        sharded = shard(Model(made), how)
        sharded(FEATURES)
        sharded(FEATURES)
    finally:
        logger.removeHandler(handler)
    state = sharded.state_dict()
    assert isinstance(state["embeddings.code_tables.banks.a.codes"], ShardedTensor) == (how != "data_parallel")
    lines = [line for line in handler.lines if "never fitted" in line]
    return lines, [int(state[f"embeddings.code_tables.banks.{name}.is_set"]) for name in "abc"]


@pytest.mark.parametrize(("how", "device"), [("row_wise", "meta"), ("row_wise", "cpu"), ("data_parallel", "meta")])
def test_start_codes_are_said_by_one_rank_and_marked_alike(two_ranks, how, device):
    (said, marks), (others, same) = two_ranks.run(start, how, device)
    expected = ["tables ['a']", "tables ['c']"] if device == "meta" else []  # `shard` loads what comes from a CPU
    assert [line.split(" were")[0] for line in said] == expected
    assert others == [] and marks == same
    configs = [table(name=name, feature_names=["item"]) for name in ("a", "b", "c")]
    compression = {"a": TIERS, "b": RandomCodesConfig(num_codes=2, codebook_size=16), "c": Int8Config()}
    state = CompressedEmbeddingBagCollection(configs, compression=compression).state_dict()
    assert marks == [int(state[f"code_tables.banks.{name}.is_set"]) for name in "abc"]
