"""What a module would lose if another were put in its place: refused by name before anything is changed."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, pooling_type_to_str
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_compress.convert.collections import COMPRESSED, STOCK, Stock, empty_like
from torchrec_compress.convert.models import PLAIN, Place, check_copied
from torchrec_compress.modules import CompressedEmbedding, CompressedEmbeddingBag
from torchrec_compress.seams import has_own_forward, is_compiled

logger = logging.getLogger(__name__)

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_WEIGHTS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_OWN = ("torchrec", "torchrec_compress", "fbgemm_gpu")
_KINDS = (*STOCK, *COMPRESSED, CompressedEmbedding, CompressedEmbeddingBag)
_WRAPPERS = ("FullyShardedDataParallel", "FSDPModule")


def check_places(where: str, model: nn.Module, places: Sequence[Place], inplace: bool) -> None:
    """Raise ValueError where a module of a model cannot be replaced without a loss.

    Args:
        where: names the caller.
        model: holds the places.
        places: that are replaced.
        inplace: whether in the model itself, which may hold a module where none is found: in a list, as a method.
    """
    check_wrappers(where, model)
    for place in places:
        _check_module(f"{where}: {place.path or type(place.module).__name__!r}", place)
    _check_ties(where, model, places)
    if inplace:
        check_references(where, model, {id(place.module): place.path for place in places})
    elif all(place.path for place in places):  # else nothing is copied
        check_copied(where, model)


def check_wrappers(where: str, model: nn.Module) -> None:
    """Raise ValueError where a model, or a part of it, is wrapped for many ranks otherwise than by TorchRec."""
    for path, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        found = [name for name in _WRAPPERS if name in kinds]
        found += ["DistributedDataParallel"] if isinstance(module, DistributedDataParallel) else []
        if found:
            raise ValueError(
                f"{where}: the model must not be wrapped by {found[0]}, got {path or 'the model'!r}; compress what it "
                "wraps, and wrap it again"
            )


def _check_module(where: str, place: Place) -> None:
    """Raise ValueError where a module has what its successor would not: hooks, a forward, parts, settings."""
    module: Any = place.module
    if is_hooked([*module.modules()], [*module.parameters()]):
        raise ValueError(
            f"{where}: a module that is replaced must have no hooks, on its weight neither, got some; remove them, and "
            "register them on the new one"
        )
    if is_compiled([*module.modules()]):
        raise ValueError(
            f"{where}: a module that is replaced must not be compiled, as another takes its place, got one after "
            "compile(); hand over a copy (copy.deepcopy), which is not, and compile what is returned"
        )
    sharded = [part for part in module.modules() if isinstance(part, ShardedModule)]
    parts = [module, *sharded] if sharded else [*module.modules()]
    kind: Any = next((kind for kind in _KINDS if isinstance(module, kind)), type(module))
    if any(has_own_forward(part) for part in parts) or type(module).forward is not kind.forward:
        advice = "detach() train pipelines, or leave the table out" if sharded else "leave the table out"
        raise ValueError(f"{where}: must have the forward of its class, got one of its own; {advice}")
    found = {name for name, _ in [*module.named_modules(), *module.named_parameters(), *module.named_buffers()]}
    if place.is_compressed:  # what lies deeper is other where it is sharded
        found = {name for name in found if "." not in name}
    elif sharded:  # TorchRec keeps buffers there, by private names
        found = {name for name in found if not name.startswith("_")}
    if own := sorted(found - _known(module) - {""}):
        raise ValueError(f"{where}: must hold its tables alone, got {own} beside them; leave it out")
    if isinstance(module, STOCK):
        _check_settings(where, module)
    if not sharded and (gone := sorted(name for name in set(vars(module)) - _attributes(module) if name[0] != "_")):
        logger.warning("%s: attributes %s that were set on the module are gone", where, gone)
    if any(getattr(part, "sparse", False) for part in module.modules() if isinstance(part, PLAIN)):
        logger.warning("%s: gradients are dense now, of what is small; sparse=True is gone", where)


def _known(module: Any) -> set[str]:
    """Return what a module that holds tables and no more calls its parts, parameters and buffers.

    Of a compressed one, the first level alone.
    """
    if isinstance(module, PLAIN):
        return {"weight"}
    if isinstance(module, CompressedEmbedding | CompressedEmbeddingBag):
        return {"collection", "padding_row"}
    if isinstance(module, COMPRESSED):
        fresh = empty_like(module, torch.device("meta"), module.methods(), module.seed)
        return {name for name, _ in [*fresh.named_children(), *fresh.named_buffers(), *fresh.named_parameters()]}
    stored = "embedding_bags" if hasattr(module, "embedding_bags") else "embeddings"
    tables = [f"{stored}.{name}" for name in getattr(module, stored)]
    return {stored, *tables, *(f"{table}.weight" for table in tables)}


def _attributes(module: Any) -> set[str]:
    """Return what attributes a module that holds tables has when it is made."""
    if isinstance(module, COMPRESSED):
        return set(vars(empty_like(module, torch.device("meta"), module.methods(), module.seed)))
    if isinstance(module, STOCK):
        return _attributes_of(type(module))
    is_bag = isinstance(module, nn.EmbeddingBag | CompressedEmbeddingBag)
    return {*vars(PLAIN[is_bag](1, 1, device="meta")), "collection", "dtype", "name"}


@cache
def _attributes_of(kind: type[Stock]) -> set[str]:
    """Return what attributes a stock collection has when it is made."""
    sizes: Any = {"name": "t", "num_embeddings": 1, "embedding_dim": 4, "feature_names": ["t"]}
    table = (EmbeddingBagConfig if issubclass(kind, EmbeddingBagCollection) else EmbeddingConfig)(**sizes)
    return set(vars(kind([table], device=torch.device("meta"))))  # type: ignore[list-item]


def _check_settings(where: str, source: Stock) -> None:
    """Raise ValueError where a table of a stock collection is looked up otherwise than its config says."""
    pooled = isinstance(source, EmbeddingBagCollection)
    configs: Any = source.embedding_bag_configs() if pooled else source.embedding_configs()
    stored: Any = source.embedding_bags if pooled else source.embeddings
    wanted = {"padding_idx": None, "max_norm": None, "scale_grad_by_freq": False}
    for table in configs:
        module = stored[table.name]
        if pooled:
            wanted |= {"mode": pooling_type_to_str(table.pooling), "include_last_offset": True}
        if type(module) is not PLAIN[pooled]:
            raise ValueError(
                f"{where}: table {table.name!r}: must be the {PLAIN[pooled].__name__} that TorchRec makes, got "
                f"{type(module).__name__}; leave the collection out"
            )
        for name, value in wanted.items():
            if (got := getattr(module, name)) != value:
                raise ValueError(
                    f"{where}: table {table.name!r}: {name} must be {value!r}, as its config has it, got {got!r}; "
                    "compressed, it would be looked up by its config"
                )


def is_hooked(parts: Sequence[nn.Module], weights: Sequence[Tensor]) -> bool:
    """Return whether a user has registered hooks on modules or weights."""
    found = [hook for part in parts for each in _HOOKS for hook in (getattr(part, each, None) or {}).values()]
    found += [hook for one in weights for each in _WEIGHTS for hook in (getattr(one, each, None) or {}).values()]
    return any(not _is_own(hook) for hook in found)


def _is_own(hook: Any) -> bool:
    """Return whether a hook is one that sharded and compressed modules give themselves."""
    hook = getattr(hook, "hook", hook)  # torch wraps those that want to know their module
    return str(getattr(hook, "__module__", "")).split(".")[0] in _OWN


def _check_ties(where: str, model: nn.Module, places: Sequence[Place]) -> None:
    """Raise ValueError where a table shares its values with other modules."""
    owner = {id(part): place for place in places for part in place.module.modules()}
    for mine in holders_of(model).values():
        ours = {id(owner.get(id(module))) for _, module in mine}
        if len(ours) > 1 and any(id(module) in owner for _, module in mine):
            raise ValueError(
                f"{where}: a table must not share its weight with other modules, got {[path for path, _ in mine]} "
                "tied; use one module in all places, untie them, or leave the table out"
            )


def holders_of(model: nn.Module) -> dict[Any, list[tuple[str, nn.Module]]]:
    """Return who holds the same values: path and module of each parameter, buffer and tensor in an attribute."""
    found: dict[Any, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        mine = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                mine += [(name, each) for each in _held(value) if isinstance(each, Tensor)]
        for name, value in mine:
            found.setdefault(values_of(value), []).append((f"{path}.{name}" if path else name, module))
    return found


def values_of(tensor: Tensor) -> Any:
    """Return what two tensors of the same values have in common."""
    if isinstance(tensor, ShardedTensor):  # which has none, and warns of itself when it is asked
        return id(tensor)
    try:
        place = tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # of another kind
        return id(tensor)
    return (tensor.device, place) if place else id(tensor)


def check_references(where: str, model: nn.Module, old: Mapping[int, str]) -> None:
    """Raise ValueError where a module is held where no other can be put in its place.

    Args:
        where: names the caller.
        model: holds the modules.
        old: their paths by `id`.
    """
    going = {id(part) for module in model.modules() if id(module) in old for part in module.modules()}
    for path, module in model.named_modules():
        if id(module) in going:
            continue
        for name, value in vars(module).items():
            if name == "_modules":
                continue
            held = [old[id(each)] for each in _held(value) if id(each) in old]
            if held:
                holder = f"{path}.{name}" if path else name
                raise ValueError(
                    f"{where}: {held[0]!r} must be held as a submodule alone, got {holder!r} that holds it as "
                    "well; look it up by its attribute, or compress a copy (inplace=False)"
                )


def _held(value: Any, depth: int = 4) -> Iterator[Any]:
    """Yield what an attribute holds: itself, and what lies in containers, methods, partial and inner functions."""
    yield value
    if not depth:
        return
    inner: Iterable[Any] = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, list | tuple | set | frozenset | deque):
        inner = value
    elif isinstance(value, partial):
        inner = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        inner = (value.__self__,)
    elif isinstance(value, FunctionType):
        inner = _enclosed(value)
    for each in inner:
        yield from _held(each, depth - 1)


def _enclosed(function: FunctionType) -> Iterator[Any]:
    """Yield the values of variables around a function that it reads."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not set yet
            continue
