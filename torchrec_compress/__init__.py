"""Compressed embedding tables for TorchRec.

Names are imported when they are first used, so that the command line answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchrec_compress.versions import check_versions

check_versions()

if TYPE_CHECKING:
    from torchrec_compress import methods
    from torchrec_compress.convert import (
        Curvature,
        compress,
        compress_dense,
        compress_into,
        decompress,
        dequantize_codebooks,
        export_codes,
        fold_into_linear,
        fold_projections,
        measure_curvature,
        predicted_rise,
        quantize_codebooks,
    )
    from torchrec_compress.modules import (
        CompressedEmbedding,
        CompressedEmbeddingBag,
        CompressedEmbeddingBagCollection,
        CompressedEmbeddingCollection,
        Footprint,
        MECEmbeddingBagCollection,
        MEmComEmbeddingBagCollection,
        PQEmbeddingBagCollection,
        RandomCodesEmbeddingBagCollection,
        after_step,
        discard,
        native_parameters,
        optimizer_bytes,
    )
    from torchrec_compress.sharding import compress_gradients, get_default_sharders

__version__ = "0.1.0"
__all__ = [
    "CompressedEmbedding",
    "CompressedEmbeddingBag",
    "CompressedEmbeddingBagCollection",
    "CompressedEmbeddingCollection",
    "Curvature",
    "Footprint",
    "MECEmbeddingBagCollection",
    "MEmComEmbeddingBagCollection",
    "PQEmbeddingBagCollection",
    "RandomCodesEmbeddingBagCollection",
    "__version__",
    "after_step",
    "compress",
    "compress_dense",
    "compress_gradients",
    "compress_into",
    "decompress",
    "dequantize_codebooks",
    "discard",
    "export_codes",
    "fold_into_linear",
    "fold_projections",
    "get_default_sharders",
    "measure_curvature",
    "methods",
    "native_parameters",
    "optimizer_bytes",
    "predicted_rise",
    "quantize_codebooks",
]
# what the documentation calls torchrec_compress.ops.tiers and the like
_PACKAGES = ("compression", "modules", "ops", "planner", "sharding")
_HOMES = {
    **dict.fromkeys(("Curvature", "measure_curvature", "predicted_rise"), "convert"),
    **dict.fromkeys(
        ("compress", "compress_dense", "compress_into", "decompress", "fold_into_linear", "fold_projections"), "convert"
    ),
    **dict.fromkeys(("dequantize_codebooks", "export_codes", "quantize_codebooks"), "convert"),
    **dict.fromkeys(("compress_gradients", "get_default_sharders"), "sharding"),
}


def __getattr__(name: str) -> Any:
    if name == "methods" or name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'modules')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
