"""TorchRec walks models by the names of attributes; ours bear none of them by accident, and serve those they bear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed.types import ShardedModule
from torchrec.distributed.utils import _group_sharded_modules

from tests.sharding.swaps import METHODS, filled, sharded_as
from torchrec_compress import native_parameters
from torchrec_compress.modules.collection import CompressedParts

# by hasattr or getattr, on any module, in TorchRec 1.6 to 1.9
WALKED = {
    *("_lookups", "_lookup", "_updates", "_input_dists", "_output_dists", "_has_uninitialized_input_dist"),
    *("_emb_modules", "_emb_module", "_feature_processor", "_embedding_module", "_embedding_bag_collection"),
    *("tables", "ph_key", "prefetch", "module_sharding_plan", "_free_features_storage_early", "_dmp_wrapped_module"),
    *("_FORCE_STATE_DICT_LOAD", "_is_pytorch_fx_traceable", "_initialize_torch_state", "get_resize_awaitables"),
}


def of_ours(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, part) for path, part in model.named_modules() if type(part).__module__.startswith("torchrec_compr")]


def bearers(model: nn.Module) -> dict[str, set[str]]:
    """Return the walked names that modules of ours bear, by path; sharded modules are meant to bear some."""
    found = {
        path: {name for name in WALKED if hasattr(part, name)}
        for path, part in of_ours(model)
        if not isinstance(part, ShardedModule)
    }
    return {path: names for path, names in found.items() if names}


@pytest.mark.parametrize("pooled", [True, False], ids=["bags", "rows"])
def test_no_unsharded_module_bears_a_walked_name(pooled):
    model = filled(list(METHODS), pooled)
    assert len(of_ours(model)) > 10
    assert bearers(model) == {}


def walk(pooled: bool) -> dict[str, Any]:
    """Return what TorchRec's walk over the kernels finds in a sharded model, and what is there."""
    methods = list(METHODS)
    model = sharded_as(filled(methods, pooled), methods, "ours", "TorchRec's planner")
    native = [part for part in model.modules() if type(part).__name__.startswith("ShardedEmbedding")]
    there = {
        id(kernel)
        for part in native
        for lookup in part._lookups
        for kernel in lookup.modules()
        if isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen)
    }
    found = [id(kernel) for kernel in _group_sharded_modules(model)]
    unready = [
        path
        for path, part in model.named_modules()  # TorchRec calls it on whatever has look-ups
        if hasattr(part, "_lookups") and not hasattr(part, "_initialize_torch_state")
    ]
    try:
        native_parameters(model)
        late = ""
    except ValueError as error:
        late = str(error)
    (collection,) = [part for part in model.modules() if isinstance(part, CompressedParts)]
    return {
        "found": sorted(found) == sorted(there),
        "kernels": len(there),
        "unready": unready,
        "bearers": bearers(collection),
        "late": late,
    }


@pytest.mark.parametrize("pooled", [True, False], ids=["bags", "rows"])
def test_walks_over_a_sharded_model_find_every_kernel_once(two_ranks, pooled):
    results = two_ranks.run(walk, pooled)
    for result in results:
        assert result["found"] and result["unready"] == [] and result["bearers"] == {}
        assert "native_parameters: the model must not be sharded yet" in result["late"]
    assert sum(result["kernels"] for result in results) >= 4


def test_the_walk_of_two_dimensional_sharding_passes_an_unsharded_decoder():
    """`DMPCollection` calls `named_children` on whatever a module called `_lookups` holds."""
    decoder = filled(list(METHODS), True).embeddings.decoder
    assert _group_sharded_modules(decoder) == [] and len(decoder.lookups) > 4
    assert torch.equal(decoder.layout, torch.tensor(decoder._format.layout))
