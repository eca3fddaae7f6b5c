"""The dtype of embeddings that fused parameters and constraints ask for: one rule for all methods, TorchRec's."""

from __future__ import annotations

import dataclasses
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
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingPlan

from tests.cases import CONFIGS, IDS, NUM_ROWS
from torchrec_compress import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection, get_default_sharders
from torchrec_compress.methods import DenseConfig, HashConfig, MethodConfig, NarrowConfig, PQConfig
from torchrec_compress.planner import EmbeddingShardingPlanner
from torchrec_compress.sharding import compressed_sharders
from torchrec_compress.sharding.sharders import DecoderSharder

CPU = torch.device("cpu")


def batch() -> KeyedJaggedTensor:
    return KeyedJaggedTensor.from_lengths_sync(["f", "g"], torch.arange(8), torch.full((8,), 1))


def served(pooled: bool, config: Any, wishes: dict[str, Any], constraints: Any = None) -> tuple[Tensor, bool]:
    """Return what a sharded collection serves, and whether gradients come back as they should."""
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


@dataclasses.dataclass(frozen=True)
class FewCodes:
    """Two ids are all that is looked up, so that gradients of codewords are large."""

    pooled: bool
    config: Any
    output: Any

    def gradients(self) -> dict[str, Tensor]:
        kind: Any = EmbeddingBagConfig if self.pooled else EmbeddingConfig
        ours: Any = CompressedEmbeddingBagCollection if self.pooled else CompressedEmbeddingCollection
        made = ours(
            [kind(name="a", num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=["f"])], compression=self.config
        )
        sharders = get_default_sharders(fused_params={"output_dtype": self.output})
        wrapped = DistributedModelParallel(nn.Sequential(made), device=CPU, sharders=sharders)
        found = wrapped(KeyedJaggedTensor.from_lengths_sync(["f"], torch.tensor([1, 2] * 40), torch.full((80,), 1)))
        values = found.values() if self.pooled else found["f"].values()
        (values.float() * 2000).sum().backward()
        return {name: each.grad for name, each in wrapped.named_parameters() if each.grad is not None}


def gradients(asked: FewCodes) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return asked.gradients()


@pytest.mark.parametrize("pooled", [True, False], ids=["bags", "rows"])
@pytest.mark.parametrize(
    "config",
    [
        PQConfig(num_codes=4, codebook_size=16),
        PQConfig(num_codes=2, codebook_size=16, structure="residual", num_hot_rows=9),
        PQConfig(num_codes=2, codebook_size=16, width=8),
    ],
    ids=["product", "residual", "projected"],
)
def test_gradients_are_added_up_in_float32(two_ranks, config, pooled):
    """Sums of 80 gradients of 2,000 are beyond what float16 holds."""
    half, full = (
        two_ranks.run(gradients, FewCodes(pooled, config, output)) for output in (SparseType.FP16, SparseType.FP32)
    )
    for mine, theirs in zip(half, full, strict=True):
        assert mine.keys() == theirs.keys() and mine
        if config.width is None:
            assert max(float(each.abs().max()) for each in theirs.values()) > 70_000
        for name, expected in theirs.items():
            assert mine[name].dtype == torch.float32
            torch.testing.assert_close(mine[name], expected)


def beyond(config: Any) -> Tensor:
    torch.manual_seed(0)
    item = [EmbeddingBagConfig(name="a", num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=["f"])]
    made = CompressedEmbeddingBagCollection(item, compression=config) if config else EmbeddingBagCollection(item)
    with torch.no_grad():
        for each in made.parameters():
            each.fill_(1e5)
    sharders = get_default_sharders(fused_params={"output_dtype": SparseType.FP16})
    plan = None
    if not config:
        (stock,) = [each for each in sharders if each.module_type is EmbeddingBagCollection]
        how = {"a": row_wise(compute_kernel="fused")}
        plan = ShardingPlan({"0": construct_module_sharding_plan(made, how, stock, 2, 2, "cpu")})
    wrapped = DistributedModelParallel(nn.Sequential(made), device=CPU, sharders=sharders, plan=plan)
    if not config:  # TorchRec draws anew
        for shard in wrapped.state_dict()["0.embedding_bags.a.weight"].local_shards():
            shard.tensor.fill_(1e5)
    return wrapped(batch()).values().detach()


def test_embeddings_beyond_the_type_are_infinite_as_torchrecs(two_ranks):
    for config in (None, PQConfig(num_codes=4, codebook_size=16), HashConfig(num_buckets=50)):
        for values in two_ranks.run(beyond, config):
            assert values.dtype == torch.float16 and torch.isinf(values).all(), config


HALF, BRAIN, FULL = (ParameterConstraints(output_dtype=getattr(DataType, name)) for name in ("FP16", "BF16", "FP32"))
PQ, ROWS_OF_FEW_BITS = PQConfig(num_codes=4, codebook_size=16), NarrowConfig(width=8, bits=8)
WIDTHS = [
    (HashConfig(num_buckets=50), {"a": HALF, "b": HALF}, torch.float16),
    (HashConfig(num_buckets=50), {"a": HALF}, torch.float32),
    (HashConfig(num_buckets=50), {"b": HALF}, torch.float32),
    (DenseConfig(), {"a": HALF, "b": HALF}, torch.float16),
    (DenseConfig(), {"a": HALF}, torch.float32),
    (DenseConfig(), {"b": HALF}, torch.float32),
    (ROWS_OF_FEW_BITS, {"a": HALF, "b": BRAIN}, torch.float32),
    (ROWS_OF_FEW_BITS, {"a": BRAIN, "b": BRAIN}, torch.bfloat16),
]


@pytest.mark.parametrize("pooled", [True, False], ids=["bags", "rows"])
@pytest.mark.parametrize(("other", "mine", "wanted"), WIDTHS)
def test_the_widest_counts(two_ranks, other, mine, wanted, pooled):
    """Also where a dense table, which TorchRec's sharder takes, is told nothing."""
    for values, is_right in two_ranks.run(served, pooled, {"a": PQ, "b": other}, {}, mine):
        assert values.dtype == wanted and is_right


def test_constraints_come_before_fused_params(two_ranks):
    for config in (PQ, {"a": PQ, "b": DenseConfig()}):
        for mine, wanted in (
            ({"a": FULL}, torch.float32),
            ({"a": FULL, "b": FULL}, torch.float32),
            ({}, torch.float16),
        ):
            for values, _ in two_ranks.run(served, True, config, {"output_dtype": SparseType.FP16}, mine):
                assert values.dtype == wanted


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
