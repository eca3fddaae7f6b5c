"""Gradients of replicated parameters, sent in few bits: by hooks of DistributedDataParallel, with error feedback."""

# no postponed annotations here: torch compares those of a hook with its own types

from collections.abc import Mapping
from itertools import accumulate
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_compress.seams import environment_of

SentAs = Literal["bfloat16", "int8", "int4"]

BLOCK = 64  # numbers that share a scale
_BITS: dict[SentAs, int] = {"bfloat16": 16, "int8": 8, "int4": 4}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class GradientExchange:
    """How gradients of a model's replicated parameters travel, and what of them has not been sent yet.

    Attributes:
        sent_as: their form on the wire.
        errors: by parameter, what this rank has left to send; float32 of its shape.

    Example:
        >>> GradientExchange("int8", {"over.weight": torch.zeros(1, 24)}).num_bytes
        96
    """

    def __init__(self, sent_as: SentAs, errors: dict[str, Tensor]) -> None:
        self.sent_as, self.errors = sent_as, errors

    @property
    def num_bytes(self) -> int:
        """The bytes of `errors` on this rank, which every rank holds."""
        return sum(4 * error.numel() for error in self.errors.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's errors, live: other ones on every rank, and of use on as many ranks alone."""
        return dict(self.errors)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what the same rank of as many had left to send.

        Raises:
            ValueError: errors of other parameters or shapes.
        """
        shapes = {name: tuple(error.shape) for name, error in self.errors.items()}
        got = {name: tuple(error.shape) for name, error in state.items()}
        if shapes != got:
            differ = sorted(name for name in shapes.keys() | got.keys() if shapes.get(name) != got.get(name))
            raise ValueError(
                f"errors of gradients: must be of this model's parameters, got others, such as {differ[0]!r} "
                f"({got.get(differ[0])} for {shapes.get(differ[0])}); leave them out to start from zero"
            )
        for name, error in state.items():
            self.errors[name].copy_(error)


def compress_gradients(model: nn.Module, sent_as: SentAs = "int8") -> GradientExchange:
    """Send the gradients of a sharded model's replicated parameters in few bits from now on; every rank calls it.

    Codebooks, projections, dense layers: all that the model's DistributedDataParallel reduces; stock data-parallel
    tables have wrappers of their own, and stay as they are. "bfloat16", "int8" and "int4" take 50, 26 and 13 % of
    float32's bytes, on any number of ranks: a rank sends each other one its part of a bucket, integers with a scale for
    every 64; who owns a part adds up in float32 and sends the mean back in the same form. What rounding leaves is kept
    and added to the next gradient (error feedback, arXiv 1901.09847; in both directions, arXiv 1905.05957), so that
    nothing is lost, only late. All ranks decode the same bytes, and their parameters stay equal to the bit. A block
    with a gradient that is not finite is so on all ranks, and leaves no error behind. Each rank holds 4 bytes more for
    every replicated number.

    torch's `bf16_compress_hook` needs NCCL, adds up in bfloat16 and forgets what it rounds.

    Args:
        model: in DistributedModelParallel, all of it wrapped. What is wrapped anew later sends float32 again.
        sent_as: the form on the wire.

    Raises:
        ValueError: no such model, no replicated parameters, one of another dtype than float32, float16 and bfloat16,
            or a hook is there already; on all ranks when on one.

    Example:
        >>> exchange = compress_gradients(sharded_model, "int8")  # doctest: +SKIP
    """
    if not isinstance(model, DistributedModelParallel):
        raise ValueError(
            f"compress_gradients: the model must be in DistributedModelParallel, got {type(model).__name__}; wrap it "
            "first, and of a wrapped one give all"
        )
    wrappers = {path: module for path, module in model.named_modules() if isinstance(module, DistributedDataParallel)}
    _raise_together(_problem(wrappers, sent_as), sent_as, environment_of(model).process_group)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    errors: dict[str, Tensor] = {}
    for path, wrapper in wrappers.items():
        of_wrapper = {}
        for name, parameter in _reduced(wrapper).items():
            of_wrapper[parameter] = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            errors[names.get(id(parameter), f"{path}.{name}")] = of_wrapper[parameter]
        assert wrapper.process_group is not None
        wrapper.register_comm_hook(_Sender(wrapper.process_group, _BITS[sent_as], of_wrapper), send_with_errors)
    return GradientExchange(sent_as, errors)


def communication_hooks(model: nn.Module) -> list[str]:
    """Return the names of functions that send gradients of a model in place of DistributedDataParallel."""
    wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    return [getattr(hook, "__qualname__", str(hook)) for wrapper in wrappers for hook, _ in wrapper._comm_hooks]


def _reduced(wrapper: DistributedDataParallel) -> dict[str, nn.Parameter]:
    """Return the parameters whose gradients a wrapper reduces."""
    ignored = wrapper.parameters_to_ignore
    return {
        name: parameter
        for name, parameter in wrapper.module.named_parameters()
        if parameter.requires_grad and name not in ignored
    }


def _problem(wrappers: dict[str, DistributedDataParallel], sent_as: str) -> str | None:
    """Return what is wrong with a request, or None."""
    if sent_as not in get_args(SentAs):
        return f"sent_as must be one of {list(get_args(SentAs))}, got {sent_as!r}"
    if not wrappers:
        return (
            "the model must have replicated parameters under DistributedDataParallel, got none; call "
            "init_data_parallel() first, if there are any"
        )
    for path, wrapper in wrappers.items():
        hooks = communication_hooks(wrapper)
        if hooks:
            return (
                f"{path}: must have no communication hook yet, got {hooks[0]!r}, which stays; there can be one alone: "
                "leave that one out (DefaultDataParallelWrapper's allreduce_comm_precision sets one, too), or this"
            )
        for name, parameter in _reduced(wrapper).items():
            if parameter.dtype not in _DTYPES:
                return f"{path}: parameters must be of {list(map(str, _DTYPES))}, got {parameter.dtype} of {name!r}"
    return None


def _raise_together(problem: str | None, sent_as: str, group: dist.ProcessGroup | None) -> None:
    """Raise on all ranks what is wrong on one, or that they ask for several forms."""
    told = [(problem, sent_as)]
    if group is not None and group.size() > 1:
        told = [(None, "")] * group.size()
        dist.all_gather_object(told, (problem, sent_as), group=group)
    for rank, (other, _) in enumerate(told):
        if other is not None:
            raise ValueError(
                f"compress_gradients: rank {rank}: {other}" if len(told) > 1 else f"compress_gradients: {other}"
            )
    if len({form for _, form in told}) > 1:
        raise ValueError(f"compress_gradients: all ranks must ask for one form, got {[form for _, form in told]}")


class _Sender:
    """What the hook of one wrapper knows: its ranks, its bits, and what each parameter has left to send.

    Blocks are dealt to ranks by their place among all of the wrapper's, so that no value hangs on which parameters come
    together in a bucket, which changes after the first step.
    """

    def __init__(self, group: dist.ProcessGroup, bits: int, errors: dict[nn.Parameter, Tensor]) -> None:
        self.group, self.bits, self._errors = group, bits, errors
        sizes = [_num_blocks(parameter) for parameter in errors]
        self._first = dict(zip(errors, accumulate(sizes, initial=0), strict=False))
        self._places: dict[tuple[int, ...], Tensor] = {}

    def collect(self, bucket: dist.GradBucket) -> tuple[Tensor, Tensor]:
        """Return gradients and errors of a bucket, by the rank that owns them, and which block each is.

        Returns:
            (ranks, C) float32, and (ranks * C / 64,) int64; a part that is smaller than others ends in zeros.
        """
        parameters = bucket.parameters()
        rows = []
        for gradient, parameter in zip(bucket.gradients(), parameters, strict=True):
            flat = (gradient.float() + self._errors[parameter]).flatten()  # type: ignore[index]
            rows.append(F.pad(flat, (0, -flat.numel() % BLOCK)))
        whole = torch.cat([*rows, rows[0].new_zeros(BLOCK)]).view(-1, BLOCK)
        places = self._dealt(parameters, len(whole) - 1)
        return whole[places].view(self.group.size(), -1), places

    def _dealt(self, parameters: list[Tensor], zeros: int) -> Tensor:
        """Return the blocks of a bucket in the order of their owners, as many for each: `zeros` where one has fewer."""
        key = tuple(map(id, parameters))
        if key not in self._places:
            firsts = [self._first[parameter] for parameter in parameters]  # type: ignore[index]
            runs = zip(firsts, map(_num_blocks, parameters), strict=True)
            owners = torch.cat([torch.arange(first, first + size) for first, size in runs]) % self.group.size()
            parts = [(owners == rank).nonzero().flatten() for rank in range(self.group.size())]
            most = max(map(len, parts))
            padded = [F.pad(part, (0, most - len(part)), value=zeros) for part in parts]
            self._places[key] = torch.cat(padded).to(parameters[0].device)
        return self._places[key]

    def write(self, bucket: dist.GradBucket, places: Tensor, mean: Tensor, left: Tensor) -> None:
        """Put the mean into the bucket, and what is left where the next step finds it; both as `collect` returns."""
        size = sum(map(_num_blocks, bucket.parameters())) + 1
        blocks = mean.new_empty(2, size, BLOCK)
        blocks[0, places], blocks[1, places] = mean.view(-1, BLOCK), left.view(-1, BLOCK)
        start = 0
        for gradient, parameter in zip(bucket.gradients(), bucket.parameters(), strict=True):
            stop = start + _num_blocks(gradient)
            mine = blocks[:, start:stop].flatten(1)[:, : gradient.numel()]
            gradient.copy_(mine[0].view_as(gradient))
            self._errors[parameter].copy_(mine[1].view_as(gradient))  # type: ignore[index]
            start = stop


def _num_blocks(parameter: Tensor) -> int:
    return -(-parameter.numel() // BLOCK)


@torch.no_grad()
def send_with_errors(sender: _Sender, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Mean a bucket over the ranks; the next bucket waits, so that all ranks call their collectives in one order."""
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    group, rank, world = sender.group, sender.group.rank(), sender.group.size()
    if world > 1:
        mine, places = sender.collect(bucket)
        sent = encode(mine, sender.bits)
        arrived = torch.empty_like(sent)
        dist.all_to_all_single(arrived, sent, group=group)
        parts = decode(arrived, sender.bits)
        parts[rank] = mine[rank]  # what this rank owns did not travel
        mean = parts.sum(0, keepdim=True).div_(world)
        answer = encode(mean, sender.bits)
        answers = [torch.empty_like(answer) for _ in range(world)]
        dist.all_gather(answers, answer, group=group)
        left = mine.sub_(decode(sent, sender.bits))
        # the owner of a part knows what the others got of its mean; times all ranks, as the next mean divides by them
        left[rank] = mean.sub_(decode(answer, sender.bits))[0].mul_(world)
        left.nan_to_num_(0.0, 0.0, 0.0)
        sender.write(bucket, places, decode(torch.cat(answers), sender.bits), left)
    done.set_result(bucket.buffer())
    return done


def encode(values: Tensor, bits: int) -> Tensor:
    """Return numbers as integers and a bfloat16 scale a block; zero stays zero.

    Args:
        values: (R, C) float32, C a multiple of 64; a block with one that is not finite becomes NaN.
        bits: 8 or 4.

    Returns:
        (R, C * bits / 8 + C / 32) uint8: integers, then scales.
    """
    if bits == 16:
        return values.bfloat16().view(torch.uint8)
    top = 2 ** (bits - 1) - 1
    blocks = values.view(len(values), -1, BLOCK)
    scales = torch.maximum(blocks.amax(2), -blocks.amin(2)).div_(top).bfloat16()
    divisors = scales.float().unsqueeze(2)
    # in place: new memory takes longer than the arithmetic
    whole = (blocks / divisors.where(divisors > 0, 1.0)).round_().nan_to_num_(0.0).clamp_(-top, top)
    packed = whole.to(torch.int8).view(len(values), -1).view(torch.uint8)
    if bits == 4:  # the first half of a row and the second
        low, high = (packed & 15).chunk(2, dim=1)
        packed = low | high << 4
    return torch.cat([packed, scales.view(torch.uint8)], dim=1)


def decode(packed: Tensor, bits: int) -> Tensor:
    """Return what `encode` made of numbers: (R, C) float32."""
    if bits == 16:
        return packed.view(torch.bfloat16).float()
    size = packed.shape[1] * 4 * bits // (4 * bits + 1)  # the scales are 1 part in 4 * bits + 1
    whole, scales = packed[:, :size], packed[:, size:].contiguous().view(torch.bfloat16).float()
    if bits == 4:
        # four bits with their sign, moved to the top of eight and back
        digits = torch.cat([whole << 4, whole & 240], dim=1).view(torch.int8).float().div_(16)
    else:
        digits = whole.contiguous().view(torch.int8).float()
    return digits.view(len(packed), -1, BLOCK).mul_(scales.unsqueeze(2)).view(len(packed), -1)
