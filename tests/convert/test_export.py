"""Tables that train otherwise than they are served become what is served, rows to the bit."""

import copy

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingConfig
from torchrec.modules.embedding_configs import DataType

from tests.cases import NUM_ROWS, batch, fresh, table
from tests.tolerances import assert_near
from torchrec_compress import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    export_codes,
    quantize_codebooks,
)
from torchrec_compress.methods import DPQConfig, HashConfig, Int8Config, PQConfig

IDS = torch.arange(NUM_ROWS)
BAGS = batch([[3, 99, 7, 7], [], [402], [*range(NUM_ROWS)]])
WAYS = {
    "packed": DPQConfig(num_codes=4, codebook_size=16),
    "odd": DPQConfig(num_codes=1, codebook_size=16),
    "bytes": DPQConfig(num_codes=2, codebook_size=200, bound=0.1),
    "words": DPQConfig(num_codes=2, codebook_size=300),
}
every = pytest.mark.parametrize("method", WAYS.values(), ids=WAYS)


def trained(method, kind="bags", **changes):
    """Return a collection that was trained for a few steps."""
    if kind == "bags":
        ours = CompressedEmbeddingBagCollection([table(**changes)], compression=method)
    else:
        of = EmbeddingConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=["item"])
        ours = CompressedEmbeddingCollection([of], compression=method)
    torch.manual_seed(0)
    target = torch.randn(NUM_ROWS, 16)
    optimizer = torch.optim.Adam(ours.parameters(), lr=0.05)
    for _ in range(8):
        found = ours(batch([[number] for number in range(NUM_ROWS)]))
        rows = found.values() if kind == "bags" else found["item"].values()
        optimizer.zero_grad()
        (rows - target).square().sum().backward()
        optimizer.step()
    return ours


@every
@pytest.mark.parametrize("kind", ["bags", "rows"])
@pytest.mark.parametrize("block", [65536, 50])
def test_rows_are_the_same_to_the_bit(method, kind, block, monkeypatch):
    monkeypatch.setattr("torchrec_compress.methods.dpq.BLOCK_ROWS", block)
    ours = trained(method, kind)
    before = copy.deepcopy(ours.state_dict())
    served = export_codes(ours)
    assert served.methods() == {"item": PQConfig(num_codes=method.num_codes, codebook_size=method.codebook_size)}
    assert torch.equal(served.table_rows("item", IDS), ours.table_rows("item", IDS))
    for ids in (IDS[:1], IDS[5:8]):  # in whatever batch they are
        assert torch.equal(served.table_rows("item", ids), ours.table_rows("item", ids))
    if kind == "bags":
        assert_near(served(BAGS).values(), ours(BAGS).values())
    assert torch.equal(served.table_state("item").decoder["codebooks"], ours.table_state("item").decoder["codewords"])
    with torch.no_grad():  # nothing is shared
        for value in served.parameters():
            value.fill_(7.0)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_means_and_modes_are_kept_and_codebooks_train_on():
    ours = trained(WAYS["bytes"], pooling=table().pooling.MEAN).eval()
    served = export_codes(ours)
    assert not served.training and [each.requires_grad for each in served.parameters()] == [True]
    assert_near(served(BAGS).values(), ours(BAGS).values())
    served(BAGS).values().sum().backward()
    small = quantize_codebooks(served, {"item": PQConfig(num_codes=2, codebook_size=200, codebook_dtype="int8")})
    assert small.footprint().total_bytes < served.footprint().total_bytes


def test_other_tables_stay_as_they_are():
    tables = [table(name=name, feature_names=[name]) for name in "abc"]
    methods = {"a": WAYS["packed"], "b": HashConfig(num_buckets=9), "c": Int8Config()}
    ours = CompressedEmbeddingBagCollection(tables, compression=methods)
    served = export_codes(ours)
    assert {name: each.method for name, each in served.methods().items()} == {"a": "pq", "b": "hash", "c": "int8"}
    for name in "abc":
        assert torch.equal(served.table_rows(name, IDS), ours.table_rows(name, IDS))
    again = export_codes(served)  # nothing is left to export
    assert again is not served and again.methods() == served.methods()
    mine, theirs = served.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_tables_of_fp16_are_exported_once_they_are_float32():
    ours = trained(WAYS["packed"], data_type=DataType.FP16)
    rows = ours.table_rows("item", IDS)
    with pytest.raises(ValueError, match=r"export_codes: collection must be in float32, got .*call float\(\) first"):
        export_codes(ours)
    assert torch.equal(export_codes(ours.float()).table_rows("item", IDS), rows)


@pytest.mark.parametrize("collection", [EmbeddingBagCollection([table()]), nn.Linear(2, 2), None])
def test_what_is_no_compressed_collection_is_refused(collection):
    with pytest.raises(ValueError, match="export_codes: collection must be a compressed one, got"):
        export_codes(collection)


def test_a_collection_without_values_is_refused():
    meta = CompressedEmbeddingBagCollection([table()], device=torch.device("meta"), compression=WAYS["packed"])
    with pytest.raises(ValueError, match=r"export_codes: collection must hold values, got .* on the meta device"):
        export_codes(meta)
    with pytest.raises(ValueError, match=r"export_codes: collection must be in float32, got"):
        export_codes(fresh(WAYS["packed"]).half())
