"""PyTorch's own modules of one table, compressed, and expanded again."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import nn

from torchrec_compress.convert.collections import fill, generators
from torchrec_compress.convert.into import check_whole
from torchrec_compress.methods import MethodConfig
from torchrec_compress.modules import CompressedEmbedding, CompressedEmbeddingBag

Plain: TypeAlias = nn.Embedding | nn.EmbeddingBag
CompressedPlain: TypeAlias = CompressedEmbedding | CompressedEmbeddingBag


def empty_plain(
    module: Plain, method: MethodConfig, name: str, seed: int, device: torch.device | None = None
) -> CompressedPlain:
    """Return a module that is called as this one, with its padding row, to be fitted to it.

    Args:
        module: trained, of exactly these classes.
        method: of its table.
        name: of its table.
        seed: of the fit.
        device: of the table, default the module's own, where its padding row always is.

    Raises:
        ValueError: it holds no values, none in float32, float16 or bfloat16, or changes or counts rows as it looks
            them up.
    """
    weight, kind = module.weight, type(module).__name__
    if weight.is_meta or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        got = "no values (meta device)" if weight.is_meta else str(weight.dtype)
        raise ValueError(
            f"compress: weight of {kind} must hold float32, float16 or bfloat16 values, got {got}; load it, or call "
            "float()"
        )
    for setting in ("max_norm", "scale_grad_by_freq"):
        if (value := getattr(module, setting)) not in (None, False):
            raise ValueError(
                f"compress: {setting} of {kind} must be unset, as no compressed table knows it, got {value}; unset it, "
                "or leave the table out"
            )
    rows, width = weight.shape
    device = weight.device if device is None else device
    # what is made in inference mode can never be trained; start values are not what a user's seed is for
    with torch.inference_mode(False), torch.random.fork_rng(generators(device)):
        made: CompressedPlain
        if isinstance(module, nn.Embedding):
            made = CompressedEmbedding(
                rows, width, module.padding_idx, compression=method, name=name, device=device, seed=seed,
                will_fit=True, dtype=weight.dtype,
            )  # fmt: skip
        else:
            made = CompressedEmbeddingBag(
                rows, width, module.mode, module.padding_idx, module.include_last_offset,  # type: ignore[arg-type]
                compression=method, name=name, device=device, seed=seed, will_fit=True, dtype=weight.dtype,
            )  # fmt: skip
        if made.padding_row is not None:
            made.padding_row = weight.detach()[module.padding_idx].clone()
    return made


@torch.no_grad()
def expanded_plain(module: CompressedPlain) -> Plain:
    """Return PyTorch's own module, of the rows that a compressed one serves."""
    check_whole("decompress", module.collection)  # type: ignore[arg-type]
    made = plain_like(module, module.collection.device)
    fill(made.weight, module.collection, module.name)  # type: ignore[arg-type]
    put_padding(module, made)
    return made


def plain_like(module: CompressedPlain, device: torch.device) -> Plain:
    """Return PyTorch's own module that is called as a compressed one, to be filled."""
    rows, width, padding = module.num_embeddings, module.embedding_dim, module.padding_idx
    with torch.inference_mode(False), torch.random.fork_rng(generators(device)):
        if isinstance(module, CompressedEmbedding):
            return nn.Embedding(rows, width, padding, device=device, dtype=module.dtype)
        last = module.include_last_offset
        return nn.EmbeddingBag(
            rows, width, mode=module.mode, padding_idx=padding, include_last_offset=last, device=device,
            dtype=module.dtype,
        )  # fmt: skip


@torch.no_grad()
def put_padding(module: CompressedPlain, made: Plain) -> None:
    """Give PyTorch's own module the padding row that a compressed one has."""
    if module.padding_row is not None:
        made.weight[module.padding_idx] = module.padding_row
