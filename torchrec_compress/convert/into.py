"""Fit the tables of a compressed collection to rows, whole ones or such as are read block by block."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from tqdm import tqdm

from torchrec_compress.convert.metrics import metrics_of
from torchrec_compress.fit.contexts import Contexts, ContextSketch
from torchrec_compress.fit.curvature import Curvature
from torchrec_compress.methods import MethodConfig, TableData, TableState
from torchrec_compress.methods.learned import RowReader, check_trained_rows
from torchrec_compress.modules import CompressedEmbeddingBagCollection, CompressedEmbeddingCollection
from torchrec_compress.modules.collection import check_unsharded
from torchrec_compress.names import kind_of

logger = logging.getLogger(__name__)

_COMPRESSED = (CompressedEmbeddingBagCollection, CompressedEmbeddingCollection)


class Fits(NamedTuple):
    """What the tables of a collection are fitted to, looked over.

    Attributes:
        collection: to be filled.
        rows: pre-trained ones by table name, or what reads them.
        inputs: the rest of what each fit learns from, by table name.
        curvature: by table name.
    """

    collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection
    rows: Mapping[str, Tensor | RowReader]
    inputs: Mapping[str, TableData]
    curvature: Mapping[str, Curvature]


def row_reader(collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection, name: str) -> RowReader:
    """Return what reads rows of one table of a collection that holds them whole, in the host's memory.

    Example:
        >>> from torchrec import EmbeddingBagConfig
        >>> from torchrec_compress.methods import NarrowConfig
        >>> table = EmbeddingBagConfig(name="user", num_embeddings=100, embedding_dim=8, feature_names=["user"])
        >>> small = CompressedEmbeddingBagCollection([table], compression=NarrowConfig(width=4))
        >>> row_reader(small, "user")(torch.tensor([3, 1])).shape
        torch.Size([2, 8])
    """

    @torch.no_grad()
    def read(ids: Tensor) -> Tensor:
        return collection.table_rows(name, ids.to(collection.device)).float().cpu()

    return read


def compress_into(
    collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection,
    rows: Mapping[str, Tensor | RowReader],
    *,
    counts: Mapping[str, Tensor] | None = None,
    contexts: Mapping[str, Contexts] | None = None,
    curvature: Mapping[str, Curvature] | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> None:
    """Fit the tables of a collection in place.

    Args:
        collection: to be filled.
        rows: pre-trained tables by table name: (N, D) float32, or what reads them by ids (`row_reader`), where the
            whole is never made. A table without rows keeps its start values where its method can be trained from them,
            and is an error where it cannot (MEC, PQ, int8, int4).
        counts, contexts, curvature, progress: as for `compress`.
        seed: of the fit; the collection's own, which is the default, since its hashes were made from that.

    Raises:
        ValueError: as for `compress`; the seed is not the collection's, or this was made under
            `torch.inference_mode()`.
    """
    run(prepare(collection, rows, counts, contexts, curvature, seed, progress), progress)


def prepare(
    collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection,
    rows: Mapping[str, Tensor | RowReader],
    counts: Mapping[str, Tensor] | None = None,
    contexts: Mapping[str, Contexts] | None = None,
    curvature: Mapping[str, Curvature] | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> Fits:
    """Return what to fit, or raise ValueError for whatever shows before the first fit; as `compress_into`."""
    if not isinstance(collection, CompressedEmbeddingBagCollection | CompressedEmbeddingCollection):
        raise ValueError(f"compress_into: collection must be a compressed one, got {kind_of(collection, *_COMPRESSED)}")
    if seed is not None and seed != collection.seed:
        raise ValueError(
            f"compress_into: seed must be the collection's own, {collection.seed}, got {seed}; leave it out"
        )
    check_whole("compress_into", collection)
    _check_trainable("compress_into", collection)
    given: dict[str, Mapping[str, Any]] = {
        "counts": {} if counts is None else counts,
        "contexts": {} if contexts is None else contexts,
        "curvature": {} if curvature is None else curvature,
    }
    _check_names({table.name for table in collection.table_configs()}, {"rows": rows, **given})
    _warn_of_ties(rows)
    inputs = checked_inputs(collection, rows, **given, progress=progress)
    return Fits(collection, rows, inputs, given["curvature"])


def checked_inputs(
    collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection,
    rows: Mapping[str, Tensor | RowReader],
    counts: Mapping[str, Tensor],
    contexts: Mapping[str, Contexts],
    curvature: Mapping[str, Curvature],
    progress: bool,
) -> dict[str, TableData]:
    """Return what each table's fit learns from beside the rows, or raise ValueError where one of them would fail."""
    tables = {table.name: table for table in collection.table_configs()}
    methods, known = collection.methods(), set(rows)
    metrics = metrics_of(curvature, (table for name, table in tables.items() if name in known), methods)
    inputs = {}
    for name, table in tables.items():
        if name not in known and methods[name].needs == "rows":
            TableData(None).trained_rows(table)
        if isinstance(rows, dict) and name in known:  # another mapping may read them one at a time
            _check_rows(table, methods[name], rows[name])
            _check_known(curvature.get(name), rows[name])
        inputs[name] = TableData(
            None, counts.get(name), contexts.get(name), collection.seed, progress, curvature=metrics.get(name)
        )
        if name in known or methods[name].needs != "nothing":
            methods[name].check_fit(table, inputs[name])
    told = [name for name in tables if name in counts and name in known]
    idle = [name for name in told if not methods[name].fits_by_counts(tables[name])]
    if idle:
        logger.info("counts change nothing in the fits of tables %s, as their methods are set", idle)
    return inputs


def run(fits: Fits, progress: bool = False) -> None:
    """Fit all tables and fill the collection."""
    collection, rows, inputs, curvature = fits
    methods, known = collection.methods(), set(rows)  # another mapping would read a table to say that it has it
    bar = tqdm(collection.table_configs(), desc="fitting", unit="table", disable=not progress, leave=False)
    with bar, torch.inference_mode(False):
        for table in bar:
            name = table.name
            bar.set_postfix_str(f"{name}: {methods[name].method}")
            if name not in known and methods[name].needs == "nothing":
                start = methods[name].start(table, on_cpu(inputs[name]))
                if start is not None:
                    collection.load_table(name, start)
                continue  # the table trains from the start values it has
            _check_known(curvature.get(name), given := rows[name] if name in known else None)
            collection.load_table(name, _fit(methods[name], table, on_cpu(inputs[name]), given))


def _check_names(tables: set[str], inputs: Mapping[str, object]) -> None:
    """Raise ValueError unless every input is a mapping by names of tables."""
    for what, given in inputs.items():
        if not isinstance(given, Mapping):
            raise ValueError(f"compress: {what} must be a mapping by table name, got {type(given).__name__}")
        unknown = sorted(set(given) - tables, key=str)
        if unknown:
            raise ValueError(f"compress: {what} must name tables of {sorted(tables)}, got {unknown}")


def _check_known(curvature: Curvature | None, rows: Tensor | RowReader | None) -> None:
    """Raise ValueError unless a curvature was measured with these rows."""
    if curvature is not None and rows is not None:
        curvature.check_rows((lambda ids: rows[ids.to(rows.device)]) if isinstance(rows, Tensor) else rows)


def _warn_of_ties(rows: Mapping[str, Tensor | RowReader]) -> None:
    """Say which tables share one weight, where that shows before any is read; compressed, they share nothing."""
    by_place: dict[tuple[Any, ...], list[str]] = {}
    for name, weight in rows.items() if isinstance(rows, dict) else ():  # another mapping reads them one at a time
        if isinstance(weight, Tensor) and weight.layout == torch.strided and weight.numel():
            by_place.setdefault((weight.device, weight.data_ptr(), weight.shape, weight.stride()), []).append(name)
    for names in by_place.values():
        if len(names) > 1:
            logger.warning(
                "tables %s share one weight; compressed, each is stored and trained on its own: give one table the "
                "features of all to keep the tie",
                names,
            )


def check_whole(where: str, collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection) -> None:
    """Raise ValueError where a collection holds no values, or not all of them."""
    check_unsharded(collection, where)
    empty = [name for name, value in [*collection.named_parameters(), *collection.named_buffers()] if value.is_meta]
    if empty:
        raise ValueError(
            f"{where}: collection must hold values, got {empty[0]!r} on the meta device; call to_empty(device=...) and "
            "reset_parameters() first"
        )


def _check_trainable(where: str, collection: CompressedEmbeddingBagCollection | CompressedEmbeddingCollection) -> None:
    """Raise ValueError where tensors of a collection can only be read."""
    if any(value.is_inference() for value in [*collection.parameters(), *collection.buffers()]):
        raise ValueError(
            f"{where}: collection must not be made under torch.inference_mode(), whose tensors can never be trained, "
            "got inference tensors; make it outside"
        )


def _check_rows(table: BaseEmbeddingConfig, method: MethodConfig, rows: Tensor | RowReader) -> None:
    """Raise ValueError for rows that a fit cannot use, as far as that shows before they are read."""
    if callable(rows) and not isinstance(rows, Tensor):
        method.check_blocks(table)
    else:
        check_trained_rows(table, rows)


def _fit(
    method: MethodConfig, table: BaseEmbeddingConfig, data: TableData, rows: Tensor | RowReader | None
) -> TableState:
    """Return a table that is fitted to rows, or to rows that are read."""
    if rows is None or isinstance(rows, Tensor):
        return method.fit(table, dataclasses.replace(data, rows=None if rows is None else rows.detach().cpu()))
    return method.fit_blocks(table, data, rows)


def on_cpu(data: TableData) -> TableData:
    """Return the data of a fit, all of it in the host's memory."""
    counts = None if data.counts is None else data.counts.detach().cpu()
    contexts = data.contexts
    if contexts is not None and not isinstance(contexts, ContextSketch):
        contexts = (contexts[0].cpu().long(), contexts[1].cpu().long())
    return dataclasses.replace(data, counts=counts, contexts=contexts)
