"""The dtype of embeddings that fused parameters and constraints ask for: one rule for all methods, TorchRec's."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor, nn
from torchrec import (
    DataType,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
)
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology

from tests.cases import CONFIGS, IDS, NUM_ROWS
from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, get_default_sharders
from torchrec_compress.methods import DenseConfig, HashConfig, MethodConfig, NarrowConfig, PQConfig
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.sharding import compressed_sharders
from torchrec_compress.sharding.sharders import DecoderSharder

CPU = torch.device("cpu")
ROWS = {"sharding_types": ["row_wise"]}


def batch() -> KeyedJaggedTensor:
    return KeyedJaggedTensor.from_lengths_sync(["f", "g"], torch.arange(8), torch.full((8,), 1))


def served(pooled: bool, config: Any, wishes: dict[str, Any], constraints: Any = None) -> tuple[Tensor, bool]:
    """Return what a sharded collection serves, and whether all is of one type and gradients are as they should."""
    options: dict[str, Any] = {"num_embeddings": NUM_ROWS, "embedding_dim": 16}
    kind: Any = EmbeddingBagConfig if pooled else EmbeddingConfig
    tables = [kind(name=name, feature_names=[feature], **options) for name, feature in (("a", "f"), ("b", "g"))]
    torch.manual_seed(0)
    if config is None:
        made: Any = (EmbeddingBagCollection if pooled else EmbeddingCollection)(tables)
    else:
        ours: Any = CompressedEmbeddingBagCollection if pooled else CompressedEmbeddingCollection
        made = ours(tables, compression=config)
    sharders = get_default_sharders(fused_params=wishes or None)
    planner = EmbeddingShardingPlanner(Topology(2, "cpu"), constraints=constraints)
    model = nn.Sequential(made)
    plan = planner.collective_plan(model, sharders, torch.distributed.group.WORLD)
    wrapped = DistributedModelParallel(model, device=CPU, sharders=sharders, plan=plan)
    trains = isinstance(config, PQConfig)
    wrapped.train(trains)
    found = wrapped(batch())
    parts = [found[name] if pooled else found[name].values() for name in ("f", "g")]
    values = torch.cat(parts, dim=1) if pooled else torch.cat(parts)
    if trains and values.requires_grad:
        values.float().square().sum().backward()
    trained = [each for name, each in wrapped.named_parameters() if trains and "codebooks" in name]
    gradients = [each.grad for each in trained if each.requires_grad]
    is_right = len({each.dtype for each in parts}) == 1
    is_right &= all(each is not None and each.dtype == torch.float32 and bool(each.any()) for each in gradients)
    return values.detach(), is_right


@pytest.mark.parametrize("pooled", [True, False], ids=["bags", "rows"])
@pytest.mark.parametrize("config", [None, *CONFIGS], ids=["stock", *IDS])
def test_outputs_are_of_the_type_that_fused_params_say(two_ranks, config: MethodConfig | None, pooled):
    for (plain, _), (half, is_right) in zip(
        two_ranks.run(served, pooled, config, {}),
        two_ranks.run(served, pooled, config, {"output_dtype": SparseType.FP16}),
        strict=True,
    ):
        assert (plain.dtype, half.dtype) == (torch.float32, torch.float16) and is_right
        torch.testing.assert_close(half.float(), plain, rtol=4e-3, atol=1e-3)


@pytest.mark.parametrize("pooled", [True, False], ids=["bags", "rows"])
def test_codes_and_rows_of_few_bits_are_bfloat16_on_a_cpu_too(two_ranks, pooled):
    """FBGEMM's own tables have no such output there, and say so."""
    for config in (PQConfig(num_codes=4, codebook_size=16), NarrowConfig(width=8, bits=8)):
        for wish in (SparseType.BF16, DataType.BF16):
            for values, is_right in two_ranks.run(served, pooled, config, {"output_dtype": wish}):
                assert values.dtype == torch.bfloat16 and is_right


def test_codewords_are_read_in_the_type_of_the_output():
    """So that no float32 embeddings are made, but where a projection or weights go into them."""
    item = [EmbeddingBagConfig(name="a", num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=["f"])]
    for config, weighted, wanted in (
        (PQConfig(num_codes=4, codebook_size=16), False, torch.bfloat16),
        (PQConfig(num_codes=2, codebook_size=16, structure="residual", num_hot_rows=9), False, torch.bfloat16),
        (PQConfig(num_codes=2, codebook_size=16, width=8), False, torch.float32),
        (PQConfig(num_codes=4, codebook_size=16), True, torch.float32),
    ):
        made = CompressedEmbeddingBagCollection(item, is_weighted=weighted, compression=config)
        codes = made.code_tables(batch())  # type: ignore[misc]
        for asked in (batch(), KeyedJaggedTensor(["f", "g"], torch.arange(8), torch.ones(8), torch.ones(8).int())):
            if weighted == (asked.weights_or_none() is not None):
                assert made.decoder(asked, codes, {}, torch.bfloat16).dtype == wanted
                assert made.decoder(asked, codes, {}).dtype == torch.float32


def test_constraints_come_first_and_the_widest_counts(two_ranks):
    half, full = (ParameterConstraints(output_dtype=each) for each in (DataType.FP16, DataType.FP32))
    of_all = {"output_dtype": SparseType.FP16}
    for other in (HashConfig(num_buckets=50), DenseConfig()):
        config = {"a": PQConfig(num_codes=4, codebook_size=16), "b": other}
        for pooled in (True, False):
            for mine, fused, wanted in (
                ({"a": half, "b": half}, {}, torch.float16),
                ({"a": half}, {}, torch.float32),
                ({"b": half}, {}, torch.float32),
                ({"a": full, "b": full}, of_all, torch.float32),
                ({"b": full}, of_all, torch.float32),
            ):
                for values, is_right in two_ranks.run(served, pooled, config, fused, mine):
                    assert values.dtype == wanted and is_right


def refused(wish: Any, constraints: Any = None) -> str:
    with pytest.raises(ValueError) as error:
        wishes = {} if wish is None else {"output_dtype": wish}
        served(True, PQConfig(num_codes=4, codebook_size=16), wishes, constraints)
    return str(error.value)


def test_other_types_are_refused(two_ranks):
    for said in two_ranks.run(refused, SparseType.INT8):
        assert re.search("compressed_sharders: output_dtype must be FP32, FP16 or BF16, got int8", said), said
    wish = {name: ParameterConstraints(output_dtype=DataType.INT8) for name in "ab"}
    for said in two_ranks.run(refused, None, wish):
        assert re.search("[ab]: output_dtype must be FP32, FP16 or BF16, got INT8", said), said


def test_code_tables_are_told_one_type():
    mine: Any = [
        EmbeddingBagCollectionSharder(fused_params={"output_dtype": SparseType.FP16}),
        EmbeddingCollectionSharder(fused_params={"output_dtype": SparseType.FP32}),
    ]
    with pytest.raises(ValueError, match="output_dtype must be the same in the sharders of EmbeddingBagCollection and"):
        compressed_sharders(mine)


def test_the_log_does_not_call_it_ignored():
    settings = {"output_dtype": SparseType.FP16, "learning_rate": 0.1}
    (decoders,) = [each for each in get_default_sharders(fused_params=settings) if type(each) is DecoderSharder]
    assert sorted(decoders._ignored) == ["learning_rate"]  # type: ignore[attr-defined]
