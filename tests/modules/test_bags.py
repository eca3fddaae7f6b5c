"""Tables that are pooled natively and decoded afterwards: a projection, and a sum of two."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, PoolingType

from tests.cases import DIM, NUM_ROWS, dense_collection, fresh, rows, table
from tests.methods.throwaway import LowRankConfig, registered
from torchrec_compress import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    compress,
    decompress,
    native_parameters,
)
from torchrec_compress.methods import DenseConfig, HashConfig, MethodConfig, NativePart, Parts, PQConfig, QRConfig
from torchrec_compress.methods.storage import Remap

pytestmark = pytest.mark.usefixtures("poisoned_memory")
LOW_RANK, SUM_OF_TWO = LowRankConfig(width=4), QRConfig(num_buckets=20)
METHODS = {"low": LOW_RANK, "two": SUM_OF_TWO, "hashed": HashConfig(num_buckets=30), "coded": PQConfig(num_codes=2)}
EITHER = pytest.mark.parametrize("config", [LOW_RANK, SUM_OF_TWO], ids=["low rank", "quotient, remainder"])
# "y" is looked up in two tables, and two tables look up two features
SIZES = [
    ("low", 400, 16, ["x", "y"]),
    ("coded", 600, 8, ["z"]),
    ("two", 300, 12, ["y", "z"]),
    ("hashed", 300, 8, ["z"]),
    ("dense", 300, 8, ["z"]),
]


def tables(pooling: PoolingType = PoolingType.SUM) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(name=name, num_embeddings=n, embedding_dim=dim, feature_names=features, pooling=pooling)
        for name, n, dim, features in SIZES
    ]


def collection(pooling: PoolingType = PoolingType.SUM, weighted: bool = False) -> CompressedEmbeddingBagCollection:
    return CompressedEmbeddingBagCollection(
        tables(pooling), is_weighted=weighted, compression={**METHODS, "*": DenseConfig()}
    )


def batch(lengths: list[list[int]], weighted: bool = False) -> KeyedJaggedTensor:
    flat = torch.tensor([length for mine in lengths for length in mine])
    ids = torch.randint(0, 300, (int(flat.sum()),))
    weights = torch.randn(len(ids)) if weighted else None
    return KeyedJaggedTensor.from_lengths_sync(["x", "y", "z"], ids, flat, weights)


def leaves(of: torch.nn.Module) -> dict[str, Tensor]:
    """Return copies of the stored tensors of the two tables, to differentiate by."""
    state = {name: value.detach().clone() for name, value in of.named_parameters()}
    found = {name.split(".")[-2]: value for name, value in state.items() if "__" in name}
    found["projection"] = state["decoder.banks.low.projection"]
    return {name: value.requires_grad_() for name, value in found.items() if "hashed" not in name}


def row_of(name: str, number: int, stored: dict[str, Tensor]) -> Tensor:
    """Return the row of an id, written out."""
    if name == "low":
        return stored["low__factors"][number] @ stored["projection"]
    return stored["two__quotient"][number // 20] + stored["two__remainder_0"][number % 20]


def by_hand(stored: dict[str, Tensor], features: KeyedJaggedTensor, mean: bool = False) -> dict[str, Tensor]:
    """Return the outputs of the two tables: plain loops over features, bags and ids."""
    found = {}
    for name, _, _, keys in SIZES:
        for key in keys if name in ("low", "two") else ():
            jagged = features[key]
            bounds, ids, bags = jagged.offsets().tolist(), jagged.values().tolist(), []
            factors = jagged.weights() if features.weights_or_none() is not None else torch.ones(len(ids))
            for first, last in pairwise(bounds):
                total = 0 * row_of(name, 0, stored)
                for place in range(first, last):
                    total = total + factors[place] * row_of(name, ids[place], stored)
                bags.append(total / max(last - first, 1) if mean else total)
            found["x" if key == "x" else f"{key}@{name}"] = torch.stack(bags)
    return found


@pytest.mark.parametrize("kind", ["sum", "mean", "weighted"])
@pytest.mark.parametrize("lengths", [[[2, 0, 3]] * 3, [[0, 0]] * 3, [[1, 0], [4, 4], [0, 2]]])
def test_values_and_gradients_are_those_written_out(kind, lengths):
    ours = collection(PoolingType.MEAN if kind == "mean" else PoolingType.SUM, kind == "weighted")
    stored, features = leaves(ours), batch(lengths, kind == "weighted")
    got, expected = ours(features), by_hand(stored, features, kind == "mean")
    assert got.keys() == ["x", "y@low", "z@coded", "y@two", "z@two", "z@hashed", "z@dense"]
    assert got.length_per_key() == [16, 16, 8, 12, 12, 8, 8]
    for key, values in expected.items():
        torch.testing.assert_close(got[key], values, rtol=1e-5, atol=1e-5)
    factors = {key: torch.randn_like(values) for key, values in expected.items()}
    sum((got[key] * factors[key]).sum() for key in factors).backward()
    sum((expected[key] * factors[key]).sum() for key in factors).backward()
    mine = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, value in stored.items():
        (grad,) = [grad for path, grad in mine.items() if name in path]
        torch.testing.assert_close(grad, value.grad, rtol=1e-5, atol=1e-5)


@given(st.lists(st.lists(st.integers(0, NUM_ROWS - 1), max_size=4), min_size=1, max_size=5))
def test_any_jagged_batch_pools_as_its_rows(bags):
    flat = torch.tensor([number for bag in bags for number in bag], dtype=torch.int64)
    features = KeyedJaggedTensor.from_lengths_sync(["item"], flat, torch.tensor([len(bag) for bag in bags]))
    for config in (LOW_RANK, SUM_OF_TWO):
        ours = fresh(config)
        served = ours.table_rows("item", flat)
        expected = torch.stack([part.sum(0) for part in served.split([len(bag) for bag in bags])])
        torch.testing.assert_close(ours(features).values(), expected, rtol=1e-5, atol=1e-5)


def test_unpooled_rows_are_the_same():
    items = [
        EmbeddingConfig(name=name, num_embeddings=n, embedding_dim=16, feature_names=features)
        for name, n, _, features in SIZES
    ]
    ours = CompressedEmbeddingCollection(items, compression={**METHODS, "*": DenseConfig()})
    features = batch([[2, 0, 3], [1, 1, 0], [0, 4, 1]])
    got = ours(features)
    for name, _, _, keys in SIZES:
        for key in keys:
            output = got["x" if key == "x" else f"{key}@{name}"]
            torch.testing.assert_close(output.values(), ours.table_rows(name, features[key].values()))
            assert torch.equal(output.lengths(), features[key].lengths())
    stored = leaves(ours)
    ids = features["y"].values()
    for name in ("low", "two"):
        expected = torch.stack([row_of(name, number, stored) for number in ids.tolist()])
        torch.testing.assert_close(got[f"y@{name}"].values(), expected, rtol=1e-5, atol=1e-5)
    sum(output.values().square().sum() for output in got.values()).backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


def test_state_dict_keys():
    """Of the hashed table, which has no decoder, as ever."""
    keys = {key for key in collection().state_dict() if "banks.coded" not in key and "dense" not in key}
    assert keys == {
        "bags.native.embedding_bags.hashed__buckets.weight",
        "bags.native.embedding_bags.low__factors.weight",
        "bags.native.embedding_bags.two__quotient.weight",
        "bags.native.embedding_bags.two__remainder_0.weight",
        "decoder.banks.low.projection",
        "decoder.format_version",
        "decoder.layout",
    }
    one, other = collection(), collection()
    other.load_state_dict(one.state_dict())
    features = batch([[2, 1]] * 3)
    assert torch.equal(one(features).values(), other(features).values())


@EITHER
def test_bytes_are_those_of_the_real_tensors(config):
    with registered(LowRankConfig):
        ours = fresh(config)
        real = sum(tensor.nbytes for tensor in ours.parameters())
        assert config.stored_bytes(table()) == ours.footprint().total_bytes == real
        assert ours.footprint().compressed_ratio == NUM_ROWS * DIM * 4 / real
        assert ours.footprint().tables["item"].decoder_bytes == config.decoder_bytes(table())


@EITHER
def test_a_fit_is_served_and_expanded(config):
    ours = compress(dense_collection(), config)
    served = decompress(ours).embedding_bags["item"].weight
    torch.testing.assert_close(served, ours.table_rows("item", torch.arange(NUM_ROWS)))
    assert (served - rows()).square().sum() < (rows() - rows().mean(0)).square().sum()


@EITHER
def test_meta_construction_allocates_nothing_and_a_reset_fills_it(config):
    meta = CompressedEmbeddingBagCollection([table()], device=torch.device("meta"), compression=config)
    assert all(tensor.is_meta for tensor in [*meta.parameters(), *meta.buffers()])
    assert meta.footprint().total_bytes == config.stored_bytes(table())
    meta.to_empty(device="cpu").reset_parameters()
    meta.load_state_dict(meta.state_dict())
    assert all(torch.isfinite(parameter).all() for parameter in meta.parameters())


@EITHER
@pytest.mark.parametrize("kind", [CompressedEmbeddingBagCollection, CompressedEmbeddingCollection])
def test_it_is_traced_and_cast(config, kind):
    item = (
        table()
        if kind is CompressedEmbeddingBagCollection
        else EmbeddingConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=DIM, feature_names=["item"])
    )
    ours = kind([item], compression=config)
    features = KeyedJaggedTensor.from_lengths_sync(["item"], torch.tensor([1, 2, 402]), torch.tensor([2, 0, 1]))

    def values(of):
        out = of(features)
        return out.values() if kind is CompressedEmbeddingBagCollection else out["item"].values()

    expected = values(ours)
    assert torch.equal(values(torch.fx.symbolic_trace(ours)), expected)
    assert torch.equal(values(copy.deepcopy(ours)), expected)
    cast = values(copy.deepcopy(ours).to(torch.bfloat16))
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, expected, rtol=5e-2, atol=5e-2)


def test_matrices_belong_to_the_dense_optimizer():
    ours = collection()
    fused = {id(parameter) for parameter in native_parameters(ours)}
    left = {name for name, parameter in ours.named_parameters() if id(parameter) not in fused}
    assert left == {"decoder.banks.low.projection", "decoder.banks.coded.codebooks"}


@dataclass(frozen=True, kw_only=True)
class Undecoded(MethodConfig):
    """Rows too narrow, and nothing that widens them."""

    method: ClassVar[str] = "undecoded"
    new_ids: ClassVar[str] = "-"

    def parts(self, table, seed):
        return Parts(bags=(NativePart("rows", 9, 4, Remap("mod", 9)),))

    def learn(self, table, data):
        raise NotImplementedError


def test_a_bag_that_is_no_embedding_needs_a_decoder():
    with pytest.raises(
        ValueError, match=r"table 'item': .* one bag of width 16, got \{'rows': 4\}; return a BagDecoder"
    ):
        fresh(Undecoded())


def test_parts_that_do_not_go_together_are_refused():
    part = NativePart("rows", 9, 4, Remap())
    with pytest.raises(ValueError, match=r"names of native parts must differ, got \['rows', 'rows'\]"):
        Parts(bags=(part, part))
    with pytest.raises(ValueError, match=r"bags are pooled without other parts, got others beside \['rows'\]"):
        Parts(bags=(part,), dense=True)
    with pytest.raises(ValueError, match=r"native part 'a:b': name must be an identifier"):
        NativePart("a:b", 9, 4, Remap())
