"""What a conversion is told: a YAML file of plain data, looked over whole before a checkpoint is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from torchrec_compress.compression import Compression
from torchrec_compress.compression.parse import parse
from torchrec_compress.schema import Positive, Range, build
from torchrec_compress.train.command_line import read_file
from torchrec_compress.train.sealed import check_regular

_Seed = Annotated[int, Range(0, 2**63 - 1)]


@dataclass(frozen=True)
class TableEntry:
    """What is said of one table, or of all that fit a pattern.

    Args:
        pooled: whether bags are looked up, as `nn.EmbeddingBag` does; a key of TorchRec's says so itself.
        plain: whether it is a module of its own, although its key looks like one of TorchRec's.
        mode: of bags of a plain module, "sum" or "mean".
        padding_idx: of a plain module.
        name: that the table of a plain module shall have; its path otherwise.
        num_embeddings, embedding_dim: of a table that is compressed in the checkpoint, which does not say them.
        data_type: of the table's config, of its rows where they are dense; None: what they are in the checkpoint, of a
            table that is compressed there FP32.
    """

    pooled: bool | None = None
    plain: bool = False
    mode: Literal["sum", "mean"] = "mean"
    padding_idx: int | None = None
    name: str | None = None
    num_embeddings: Positive | None = None
    embedding_dim: Positive | None = None
    data_type: Literal["FP32", "FP16", "BF16"] | None = None


@dataclass(frozen=True)
class _Keys:
    """The keys of the file; `from_` is called `from` there."""

    compression: dict[str, Any]
    tables: dict[str, TableEntry] = field(default_factory=dict)
    from_: dict[str, Any] | None = None
    counts: dict[str, str] | Literal["optimizer"] | None = None
    contexts: dict[str, str] | None = None
    seed: _Seed = 0
    from_seed: _Seed | None = None


@dataclass(frozen=True)
class ConversionConfig:
    """A conversion.

    Args:
        compression: how tables shall be stored, by name or pattern, as `compress` takes it.
        tables: what is said of tables, by the state-dict key of their dense weight, or a pattern for it.
        source: how tables are stored in the checkpoint, or None: all are dense.
        counts: files of look-ups per id by table name, "optimizer" for what Adagrad has summed up, or None.
        contexts: files of pairs (id, context id) by table name.
        seed: of the fits.
        source_seed: of the collections in the checkpoint.
        plain: all of it as the file says it.
    """

    compression: Compression
    tables: dict[str, TableEntry]
    source: Compression | None
    counts: dict[str, str] | Literal["optimizer"] | None
    contexts: dict[str, str]
    seed: int
    source_seed: int
    plain: dict[str, Any]


def read_config(path: Path) -> ConversionConfig:
    """Return what a file says.

    Args:
        path: of a YAML file, or of the report of a conversion, whose way back it is then.

    Raises:
        ValueError: it is missing, a link or no YAML; an unknown key (the nearest one is named), method or value.
    """
    problem = check_regular(path)
    if problem is not None:
        raise ValueError(f"{path}: {problem}; name the YAML file of the conversion")
    try:
        values = read_file(path)
        if {"identity", "back"} <= set(values):  # the report of a conversion, whose way back is meant
            values = values["back"]
            if not isinstance(values, Mapping):
                raise ValueError(f"{path}: must hold a way back, got the report of a conversion to dense tables")
        return parse_config(values)
    except ValueError as error:
        said = str(error)
        raise ValueError(said if said.startswith(f"{path}:") else f"{path}: {said}") from error


def parse_config(values: Mapping[str, Any]) -> ConversionConfig:
    """Return what plain data says.

    Raises:
        ValueError: as `read_config`.

    Example:
        >>> parse_config({"compression": {"*": {"method": "pq", "num_codes": 4}}}).compression["*"].num_codes
        4
        >>> parse_config({"compressions": {}})
        Traceback (most recent call last):
        ValueError: unknown key 'compressions'; did you mean 'compression'? the keys are ...
    """
    try:
        keys = build(_Keys, {"from_" if key == "from" else key: value for key, value in values.items()})
    except ValueError as error:
        raise ValueError(str(error).replace("from_:", "from:").replace("'from_'", "'from'")) from None
    for key, entry in keys.tables.items():
        if (entry.num_embeddings is None) != (entry.embedding_dim is None):
            raise ValueError(f"tables.{key}: num_embeddings and embedding_dim must come together, got one of them")
        if entry.num_embeddings is not None and keys.from_ is None:
            raise ValueError(
                f"tables.{key}: num_embeddings must be left out of a dense checkpoint, which says it, got "
                f"{entry.num_embeddings}; say in 'from' how the table is compressed there"
            )
    source = None if keys.from_ is None else _parsed(keys.from_)
    seed = keys.seed if keys.from_seed is None else keys.from_seed
    if keys.from_seed is not None and source is None:
        raise ValueError("from_seed: must come with 'from', got it alone; leave it out")
    compression = parse(keys.compression)
    return ConversionConfig(
        compression, keys.tables, source, keys.counts, keys.contexts or {}, keys.seed, seed, dict(values)
    )


def _parsed(text: Mapping[str, Any]) -> Compression:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(str(error).replace("compression", "from", 1)) from None
