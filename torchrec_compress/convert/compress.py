"""Compress what was trained, and expand it again: a collection, a plain table, or all tables of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, overload

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_compress.compression import Compression
from torchrec_compress.convert.collections import (
    COMPRESSED,
    STOCK,
    Compressed,
    empty_like,
    expand,
    frozen_tables,
    parameters_by_table,
    rows_of,
    take_frozen,
    warn_of_optimizers,
)
from torchrec_compress.convert.into import Fits, prepare, run
from torchrec_compress.convert.models import (
    PLAIN,
    Place,
    chosen,
    errors_of,
    find_places,
    shared_out,
    with_modules,
)
from torchrec_compress.convert.plain import empty_plain, expanded_plain
from torchrec_compress.convert.safety import check_places
from torchrec_compress.convert.served import decompress_sharded
from torchrec_compress.convert.sharded import compress_sharded
from torchrec_compress.fit.contexts import Contexts
from torchrec_compress.fit.curvature import Curvature
from torchrec_compress.modules import (
    CompressedEmbedding,
    CompressedEmbeddingBag,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from torchrec_compress.names import kind_of

if TYPE_CHECKING:
    from typing import Unpack

Model = TypeVar("Model", bound=nn.Module)


class _Options(TypedDict, total=False):
    """What every form of `compress` may be given."""

    counts: Mapping[str, Tensor] | None
    contexts: Mapping[str, Contexts] | None
    curvature: Mapping[str, Curvature] | None
    seed: int
    progress: bool


@overload
def compress(
    source: EmbeddingBagCollection | CompressedEmbeddingBagCollection,
    compression: Compression,
    **options: Unpack[_Options],
) -> CompressedEmbeddingBagCollection: ...


@overload
def compress(
    source: EmbeddingCollection | CompressedEmbeddingCollection,
    compression: Compression,
    **options: Unpack[_Options],
) -> CompressedEmbeddingCollection: ...


@overload
def compress(
    source: nn.Embedding,
    compression: Compression,
    **options: Unpack[_Options],
) -> CompressedEmbedding: ...


@overload
def compress(
    source: nn.EmbeddingBag,
    compression: Compression,
    **options: Unpack[_Options],
) -> CompressedEmbeddingBag: ...


@overload
def compress(
    source: Model,
    compression: Compression,
    *,
    inplace: bool = False,
    wrap: Callable[[nn.Module], DistributedModelParallel] | None = None,
    **options: Unpack[_Options],
) -> Model: ...


def compress(
    source: nn.Module,
    compression: Compression,
    *,
    counts: Mapping[str, Tensor] | None = None,
    contexts: Mapping[str, Contexts] | None = None,
    curvature: Mapping[str, Curvature] | None = None,
    seed: int = 0,
    progress: bool = False,
    inplace: bool = False,
    wrap: Callable[[nn.Module], DistributedModelParallel] | None = None,
) -> nn.Module:
    """Fit compressed tables to trained ones: of a collection, of a plain `nn.Embedding(Bag)`, or all of a model.

    Rows of a compressed source, and of a sharded one, are read by blocks, codes learned from a weighted sample of them.

    Args:
        source: trained. Tables of a model are found wherever they are; compressed ones stay, unless a key names one.
            A `DistributedModelParallel` is compressed by all its ranks together, each of which encodes its own rows.
        compression: a method for all tables, or methods by table name or pattern; in a model also by "path.name", for a
            plain module by its path. Modules of a model of which no table fits a key are left as they are.
        counts: look-ups per id in training, (N,) by table name. Popularity weights and hot rows need them.
        contexts: pairs (ids, context ids), ((P,), (P,)) int64 by table name, which codes of them need; for LMA and
            graph codes a sketch of a stream of them as well (`LMAConfig.sketch`).
        curvature: of `measure_curvature`, by table name: errors count as the loss feels them, where a method can
            (`uses_curvature`); a table of which too little is known is fitted to squared error, which the log says.
        seed: of the fit.
        progress: whether to show a progress bar.
        inplace: whether to change the model, as one that is sharded must be; else a copy, of all but its tables, is
            returned. Optimizers that were made for it do not know its new parameters.
        wrap: of one that is sharded, what makes a `DistributedModelParallel` of it again, whose compressed tables come
            without values: gives them optimizers, plans, shards. Default: our planner and sharders, the same ranks.

    Returns:
        What is called as the source is: a collection, a `CompressedEmbedding(Bag)`, or a model, on the same device, in
        the same mode; frozen tables are frozen. Of a `DistributedModelParallel` a new one; the old one is used up.

    Raises:
        ValueError: there is no table to compress, one cannot be stored or fitted as asked, or would lose what it has
            (tied weights, hooks, settings); counts and the like are not what they should be. The source is as before.

    Example:
        >>> from torchrec_compress.methods import PQConfig
        >>> model = nn.Sequential(nn.EmbeddingBag(2000, 16), nn.Linear(16, 1))
        >>> small = compress(model, {"0": PQConfig(num_codes=4, codebook_size=64)})
        >>> small(torch.tensor([[3, 5], [7, 1999]])).shape, type(model[0]).__name__, small[0].footprint().ratio > 8
        (torch.Size([2, 1]), 'EmbeddingBag', True)
    """
    given = {"counts": counts, "contexts": contexts, "curvature": curvature}
    _check_inplace("compress", inplace)
    if isinstance(source, DistributedModelParallel):
        return compress_sharded(source, compression, given, seed, progress, inplace, wrap)
    _check_unwrapped("compress", source, wrap)
    if type(source) not in PLAIN and not isinstance(source, STOCK + COMPRESSED) and _has_tables(source):
        return _compress_model(source, compression, given, seed, progress, inplace)
    return _compress_alone(source, compression, given, seed, progress, inplace)


def _compress_alone(
    source: Any, compression: Compression, given: Mapping[str, Any], seed: int, progress: bool, inplace: bool
) -> nn.Module:
    """Return one collection, or one plain module, compressed; arguments as in `compress`."""
    if inplace:
        raise ValueError(
            f"compress: what is compressed in place must be a model that holds tables, got {type(source).__name__}; "
            "take what is returned"
        )
    place = Place("", source, ())
    if type(source) in PLAIN:
        place = find_places(source)[0]
        ((_, methods),) = chosen([place], compression)
        compression = methods
        given = {what: shared_out(what, mine, [place])[""] for what, mine in given.items()}
    made, fits = _empty(place, compression, given, seed, progress)
    check_places("compress", source, [place], inplace=False)
    run(fits, progress)
    _take_over(place, fits.collection)
    return made


def _check_inplace(where: str, inplace: object) -> None:
    """Raise ValueError unless it is said by a bool, as a word of any kind would count as yes."""
    if not isinstance(inplace, bool):
        raise ValueError(f"{where}: inplace must be True or False, got {inplace!r}")


def _check_unwrapped(where: str, model: object, wrap: object) -> None:
    """Raise ValueError where nothing is wrapped that could be wrapped again."""
    if wrap is not None:
        raise ValueError(
            f"{where}: wrap must be left out where nothing is wrapped, got a {type(model).__name__}; pass it with a "
            "DistributedModelParallel"
        )


def _has_tables(source: Any) -> bool:
    """Return whether something is a model that holds tables; raise ValueError where it is, but cannot be changed."""
    if not isinstance(source, nn.Module) or isinstance(source, torch.fx.GraphModule | torch.jit.ScriptModule):
        return False
    return any(place.path for place in find_places(source))


def _compress_model(
    model: nn.Module, compression: Compression, given: Mapping[str, Any], seed: int, progress: bool, inplace: bool
) -> nn.Module:
    """Return a model with compressed tables; arguments as in `compress`."""
    places = find_places(model)
    wanted = chosen(places, compression)
    check_places("compress", model, [place for place, _ in wanted], inplace)
    by_place = {what: shared_out(what, mine, places) for what, mine in given.items()}
    made: dict[int, nn.Module] = {}
    fits: list[tuple[Place, Fits]] = []
    for place, methods in wanted:
        mine = {what: found[place.path] for what, found in by_place.items()}
        with errors_of(place.path):
            new, fit = _empty(place, methods, mine, seed, progress)
        if type(place.module) in PLAIN and not any(each.is_compressed for each in fit.collection.methods().values()):
            continue  # it would not get smaller
        made[id(place.module)] = new
        fits.append((place, fit))
    for place, fit in fits:
        with errors_of(place.path):
            run(fit, progress)
        _take_over(place, fit.collection)
    return with_modules("compress", model, made, inplace)


def _empty(
    place: Place,
    compression: Compression,
    given: Mapping[str, Any],
    seed: int,
    progress: bool,
) -> tuple[nn.Module, Fits]:
    """Return a compressed module for one, not fitted yet, and what it is to be fitted to; all of it looked over."""
    made: Any
    if isinstance(place.module, nn.Embedding | nn.EmbeddingBag) and type(place.module) in PLAIN:
        (name,) = place.tables
        assert isinstance(compression, Mapping)
        made = empty_plain(place.module, compression[name], name, seed)
        collection, rows = made.collection, {name: place.module.weight.detach()}
    elif isinstance(place.module, CompressedEmbedding | CompressedEmbeddingBag):
        raise ValueError(
            "compress: a plain module must not be compressed twice, got a compressed one; decompress() it first"
        )
    else:
        rows, device = rows_of(place.module)
        made = collection = empty_like(place.module, device, compression, seed)  # type: ignore[arg-type]
    made.train(place.module.training)
    return made, prepare(collection, rows, **given, progress=progress)


def _take_over(place: Place, collection: Compressed) -> None:
    """Freeze what was frozen; say which optimizers are gone."""
    take_frozen(frozen_tables(place), collection)
    warn_of_optimizers(parameters_by_table(place))


@overload
def decompress(collection: CompressedEmbeddingBagCollection, *, inplace: bool = False) -> EmbeddingBagCollection: ...


@overload
def decompress(collection: CompressedEmbeddingCollection, *, inplace: bool = False) -> EmbeddingCollection: ...


@overload
def decompress(collection: CompressedEmbedding, *, inplace: bool = False) -> nn.Embedding: ...


@overload
def decompress(collection: CompressedEmbeddingBag, *, inplace: bool = False) -> nn.EmbeddingBag: ...


@overload
def decompress(
    collection: Model, *, inplace: bool = False, wrap: Callable[[nn.Module], DistributedModelParallel] | None = None
) -> Model: ...


def decompress(
    collection: nn.Module,
    *,
    inplace: bool = False,
    wrap: Callable[[nn.Module], DistributedModelParallel] | None = None,
) -> nn.Module:
    """Expand every table of a compressed collection, of a plain module, or of a model to its dense rows.

    Args:
        collection: compressed, fitted or not; or a model that holds such.
        inplace: whether to change the model itself, as one that is sharded must be; else a copy is returned.
        wrap: of one that is sharded, as of `compress`.

    Returns:
        A stock collection, or PyTorch's own module, on the same device whose rows are the ones that the compressed
        tables serve; a model for a model, for a `DistributedModelParallel` a new one.

    Raises:
        ValueError: nothing of it is compressed; a module would lose what it has (hooks, ties); of a sharded one, rows
            travel in another type than they have, or no feature looks up all rows of a table.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> from torchrec_compress.methods import HashConfig
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=100, embedding_dim=4, feature_names=["user"])
        >>> collection = CompressedEmbeddingBagCollection([table], compression=HashConfig(num_buckets=10))
        >>> decompress(collection).embedding_bags["user"].weight.unique(dim=0).shape[0] <= 10
        True
    """
    _check_inplace("decompress", inplace)
    if isinstance(collection, DistributedModelParallel):
        return decompress_sharded(collection, inplace, wrap)
    _check_unwrapped("decompress", collection, wrap)
    places = find_places(collection) if isinstance(collection, nn.Module) else []
    places = [place for place in places if place.is_compressed]
    if not places:
        raise ValueError(
            "decompress: collection must be a compressed one, or a model that holds some, got "
            f"{kind_of(collection, *COMPRESSED)}"
        )
    if inplace and not places[0].path:
        raise ValueError(
            "decompress: what is expanded in place must be a model that holds tables; take what is returned"
        )
    check_places("decompress", collection, places, inplace)
    made = {}
    for place in places:
        with errors_of(place.path):
            made[id(place.module)] = _expanded(place.module)
    return with_modules("decompress", collection, made, inplace) if places[0].path else made[id(collection)]


def _expanded(module: Any) -> nn.Module:
    if isinstance(module, CompressedEmbedding | CompressedEmbeddingBag):
        return expanded_plain(module).train(module.training)
    return expand(module).train(module.training)
