"""Trained rows on the CUDA kernels of a GPU; arguments as in `trained_bag`, checked but for their values."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_compress.ops import trained_reference, trained_shapes
from torchrec_compress.ops.gpu import trained_kernels
from torchrec_compress.ops.trained import TrainedFormat, TrainedStep

_BATCH = "Tensor ids, Tensor? offsets"


def cuda_look_up(
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    format: TrainedFormat,
    is_mean: bool,
    where: str,
) -> Tensor:
    """Return the pooled rows, (B, r) float32.

    Raises:
        ValueError: there are ids, and no bag to hold them. Values that do not fit, such as an id out of range, end the
            process's work on the GPU with a device-side assertion, as in torch's own kernels; so in what follows.
    """
    return trained_bag_gpu(rows, ids, offsets, weights, format.width, format.bits, is_mean, where)


def cuda_weight_gradients(
    rows: Tensor, ids: Tensor, offsets: Tensor | None, grads: Tensor, format: TrainedFormat, is_mean: bool, where: str
) -> Tensor:
    """Return the gradient of every id's weight, (L,) float32."""
    return trained_bag_gpu_weight_gradients(grads, rows, ids, offsets, format.width, format.bits, is_mean, where)


# no operator: torch would count a write before it is made, and one that is refused makes none
@torch.compiler.disable
def cuda_update(
    rows: Tensor,
    state: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    grads: Tensor,
    format: TrainedFormat,
    is_mean: bool,
    step: TrainedStep,
    where: str,
) -> None:
    """Update rows and state in place.

    Raises:
        ValueError: as `cuda_look_up`; or a gradient is not finite, or a row or a state larger than the format holds,
            and nothing is written.
    """
    _num_bags(ids, offsets, where)
    if ids.shape[0] == 0:
        return
    # kernels read whole floats, which a state that is cut out of other bytes may lack
    is_aligned = format.state_bits == 8 or state.data_ptr() % 4 == 0
    update = trained_kernels.update if is_aligned else trained_reference.update
    update(rows, state, ids, offsets, weights, grads, format, is_mean, step, where)


def _num_bags(ids: Tensor, offsets: Tensor | None, where: str) -> int:
    """Return the bags of a batch, B, in which its ids must lie."""
    num_bags = ids.shape[0] if offsets is None else offsets.shape[0] - 1
    if num_bags < 0 or (num_bags == 0 and ids.shape[0]):
        raise ValueError(
            f"{where}: offsets must start with 0 and must end with the number of ids, {ids.shape[0]}, got "
            f"{num_bags + 1} of them"
        )
    return num_bags


@torch.library.custom_op(
    "torchrec_compress::trained_bag_gpu",
    mutates_args=(),
    schema=f"(Tensor rows, {_BATCH}, Tensor? weights, int width, int bits, bool is_mean, str where) -> Tensor",
)
def trained_bag_gpu(
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    width: int,
    bits: int,
    is_mean: bool,
    where: str,
) -> Tensor:
    """Return the pooled rows, (B, width) float32; called by `cuda_look_up`.

    Args:
        rows: (N, bytes per row) uint8.
        ids: (L,) int32 or int64.
        offsets: (B + 1,) int32 or int64, or None.
        weights: (L,) float32, or None.
        width, bits: of the rows.
        is_mean: whether sums are divided by the ids of a bag.
        where: names the table in errors.
    """
    out = rows.new_empty(_num_bags(ids, offsets, where), width, dtype=torch.float32)
    if out.shape[0]:
        trained_kernels.look_up(rows, ids, offsets, weights, out, width, bits, is_mean)
    return out


@torch.library.custom_op(
    "torchrec_compress::trained_bag_gpu_weight_gradients",
    mutates_args=(),
    schema=f"(Tensor grads, Tensor rows, {_BATCH}, int width, int bits, bool is_mean, str where) -> Tensor",
)
def trained_bag_gpu_weight_gradients(
    grads: Tensor,
    rows: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    width: int,
    bits: int,
    is_mean: bool,
    where: str,
) -> Tensor:
    """Return the gradient of every id's weight, (L,) float32; called by `cuda_weight_gradients`.

    Args:
        grads: (B, width) float32 of the bags; everything else is as in the look-up.
    """
    _num_bags(ids, offsets, where)
    out = grads.new_empty(ids.shape[0])
    if out.shape[0]:
        trained_kernels.weight_gradients(rows, ids, offsets, grads, out, width, bits, is_mean)
    return out


trained_bag_gpu.register_fake(trained_shapes.bags)
trained_bag_gpu_weight_gradients.register_fake(trained_shapes.weight_gradients)
