"""Which columns of Parquet files are what: decided by the config, the files' metadata, and what pandas left in them."""

from __future__ import annotations

import ast
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_compress.names import check_feature_names, check_table_names
from torchrec_compress.schema import nearest
from torchrec_compress.train.config import DataConfig
from torchrec_compress.train.data.inputs import is_data
from torchrec_compress.train.data.source import SPLITS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schema:
    """Which columns of Parquet files are what.

    Args:
        features: id columns, of ints or of lists of ints.
        dense: columns of dense values.
        label: the label column.
        kind: the column with the kind of negative, or None.
        others: columns that decide which rows are kept and where they go.
        stated: rows per table that the schema metadata `vocab` states.
    """

    features: list[str]
    dense: list[str]
    label: str
    kind: str | None
    others: list[str]
    stated: dict[str, int]

    @property
    def columns(self) -> list[str]:
        """Return all columns that are read."""
        special = [self.label, *([self.kind] if self.kind else []), *self.others]
        return list(dict.fromkeys([*self.features, *self.dense, *special]))


def parquet_files(path: Path) -> list[Path]:
    """Return a file, or the Parquet files of a folder by name.

    Raises:
        ValueError: there are none.
    """
    inside = sorted(file for file in path.iterdir() if is_data(file)) if path.is_dir() else [path]
    check_folders(path)
    hidden = sorted(file.name for file in path.glob("*.parquet") if not is_data(file))
    if hidden:
        logger.warning("%s: files whose names begin with '.' or '_' are no data: %s", path, hidden)
    files = [file for file in inside if file.suffix == ".parquet" or file == path]
    others = [file.name for file in inside if file.suffix.lower() == ".parquet" and file not in files]
    if others:
        raise ValueError(f"{path}: Parquet files of a folder must end in .parquet, got {others}; rename them")
    if not files or not files[0].is_file():
        state = "which has none" if path.is_dir() else "which does not exist"
        raise ValueError(f"data.path: must be a Parquet file or a folder of *.parquet, got {str(path)!r}, {state}")
    return files


def check_folders(path: Path, known: Sequence[str] = ()) -> None:
    """Raise ValueError where Parquet files lie in folders of a folder, which would be left out without a word."""
    inside = sorted(folder.name for folder in path.iterdir() if folder.is_dir()) if path.is_dir() else []
    inside = [name for name in inside if name not in known and is_data(path / name)]
    found = [name for name in inside if any(is_data(file) for file in (path / name).rglob("*.parquet"))]
    if not found:
        return
    advice = "write the files side by side"
    if not known and set(found) <= set(SPLITS):
        advice = "folders of splits are read with data.streaming, and without files beside them"
    elif all("=" in name for name in found):
        keys = sorted({name.partition("=")[0] for name in found})
        advice = f"write partitions (Hive) as files side by side, with the columns {keys} in them"
    raise ValueError(f"{path}: Parquet files must not lie in folders inside it, got {found[:5]}; {advice}")


def open_parquet(path: Path, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """Open a Parquet file.

    Raises:
        ValueError: it is none, or has no rows.
    """
    try:
        file = pq.ParquetFile(path, metadata=metadata)
    except (pa.ArrowInvalid, OSError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise ValueError(f"{path}: must be a Parquet file, got {size} bytes that are not ({error})") from error
    if file.metadata.num_rows == 0:
        raise ValueError(f"{path}: must have rows, got none")
    return file


def read_schema(file: pq.ParquetFile, path: Path, config: DataConfig) -> Schema:
    """Return which columns are what.

    Raises:
        ValueError: a column that the config names is missing, or cannot be a table's name, or there is no id column.
    """
    names = file.schema_arrow.names
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: columns must have different names, got {twice[0]!r} twice")
    for name in config.drop:
        if name not in names:
            raise ValueError(f"data.drop: must name columns of {path}, {names}, got {name!r}{nearest(name, names)}")
    stated = _stated(path, (file.schema_arrow.metadata or {}).get(b"vocab"))
    filtered = [parse_filter(config.row_filter)[0]] if config.row_filter else []
    others = [name for name in (config.split, config.subsample_by, *filtered) if name]
    used = [config.label, config.kind_column, *config.drop, *config.dense, *(set(others) - set(stated))]
    special = {name for name in used if name is not None}
    features = list(config.features) or _usual_features(file, path, stated, special)
    schema = Schema(features, list(config.dense), config.label, config.kind_column, others, stated)
    check_columns(file, path, schema)
    if not features:
        raise ValueError(f"{path}: must have id columns besides those of other use, {sorted(special)}, got {names}")
    _check_uses(config, features)
    check_table_names(features, f"{path}: column")
    check_feature_names(features, f"{path}: column")
    for key, given in (("vocab", config.vocab), ("pooling", config.pooling)):
        unknown = sorted(set(given) - set(features))
        if unknown:
            raise ValueError(f"data.{key}: must name features of {features}, got {unknown}")
    return schema


def _check_uses(config: DataConfig, features: list[str]) -> None:
    """Raise ValueError where a column has two uses, of which the model would see one that it must not."""
    uses = {
        "label": [config.label],
        "kind_column": [config.kind_column],
        "split": [config.split],
        "drop": config.drop,
        "dense": config.dense,
        "features": features,
    }
    first: dict[str | None, str] = {None: ""}
    for key, names in uses.items():
        for name in names:
            if name is not None and first.setdefault(name, key) != key:
                raise ValueError(
                    f"data.{key}: must not hold the column {name!r}, which is data.{first[name]}; give a column one use"
                )


def check_columns(file: pq.ParquetFile, path: Path, schema: Schema) -> None:
    """Raise ValueError where a file lacks a column, or has one of another type than its use asks for."""
    fields = file.schema_arrow
    twice = [name for name, count in Counter(fields.names).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: columns must have different names, got {twice[0]!r} twice")
    stated = _stated(path, (fields.metadata or {}).get(b"vocab"))
    if stated and stated != schema.stated:
        raise ValueError(
            f"{path}: the schema metadata 'vocab' must be that of the first file, {schema.stated}, got {stated}; "
            "write the files alike"
        )
    for name in schema.columns:
        if name not in fields.names:
            raise ValueError(f"{path}: must have the column {name!r}, got {fields.names}{nearest(name, fields.names)}")
        kind = fields.field(name).type
        if is_list(kind) and name in schema.features and name not in (schema.label, schema.kind, *schema.others):
            kind = kind.value_type
        number = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        if name in schema.dense and not number and not pa.types.is_floating(kind):
            raise ValueError(f"{path}: column {name!r} must be of numbers, got {kind}")
        if name not in schema.dense and not number:
            raise ValueError(f"{path}: column {name!r} must be of an int type, got {kind}")


def list_columns(file: pq.ParquetFile, schema: Schema) -> list[str]:
    """Return the features of which a row may have several ids."""
    return [name for name in schema.features if is_list(file.schema_arrow.field(name).type)]


def is_list(kind: pa.DataType) -> bool:
    """Return whether a column is one of lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _usual_features(file: pq.ParquetFile, path: Path, stated: Mapping[str, int], special: set[str | None]) -> list[str]:
    """Return the id columns where `data.features` names none; see there."""
    if stated:
        return [name for name in stated if name not in special]
    index = [name for name in _index_columns(file, path) if name not in special]
    if index:
        logger.warning(
            "%s: %s is an index that pandas wrote, no feature; name it in data.features to use it", path, index
        )
    return [name for name in file.schema_arrow.names if name not in special and name not in index]


def _index_columns(file: pq.ParquetFile, path: Path) -> list[str]:
    """Return the columns that pandas made of the index of a frame."""
    try:
        noted = (file.schema_arrow.pandas_metadata or {}).get("index_columns", [])
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: the schema metadata 'pandas' must be a JSON mapping, got an error: {error}"
        ) from error
    if not isinstance(noted, list):
        raise ValueError(f"{path}: the schema metadata 'pandas' must list index_columns, got {noted!r}")
    known = [name for name in noted if isinstance(name, str)]  # the rest are ranges, which are not stored
    return [name for name in file.schema_arrow.names if name in known or re.fullmatch(r"__index_level_\d+__", name)]


def _stated(path: Path, text: bytes | None) -> dict[str, int]:
    """Return the rows per table that the schema metadata `vocab` states."""
    if not text:
        return {}
    try:
        found = ast.literal_eval(text.decode())  # reads JSON of numbers as well
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{path}: the schema metadata 'vocab' must be a mapping, got {text[:60]!r}") from error
    is_mapping = isinstance(found, dict) and all(type(name) is str for name in found)
    bad = {} if not is_mapping else {name: size for name, size in found.items() if not _is_size(size)}
    if not is_mapping or bad:
        raise ValueError(f"{path}: the schema metadata 'vocab' must map columns to sizes, got {str(bad or found)[:60]}")
    return found


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= 2**31


def rows_of(path: Path, name: str, largest: int) -> int:
    """Return the rows of a table by its largest id.

    Raises:
        ValueError: no table has as many; ids are int32 in memory.
    """
    if largest >= 2**31:
        raise ValueError(
            f"{path}: ids of column {name!r} must be below 2**31, got {largest}; number them anew, or leave the column "
            "out by data.drop"
        )
    return largest + 1


def warn_of_row_numbers(path: Path, name: str) -> None:
    """Warn of a feature that has as many ids as there are rows, of which nothing can be learnt."""
    logger.warning(
        "%s: column %r has an id of its own in every row, and its table a row for each; if it only numbers the rows, "
        "leave it out by data.drop",
        path,
        name,
    )


def parse_filter(text: str) -> tuple[str, str, int]:
    """Return column, comparison and number of a `data.row_filter`.

    Raises:
        ValueError: it is not such a comparison.

    Example:
        >>> parse_filter("rating != 3")
        ('rating', '!=', 3)
    """
    match = re.fullmatch(r"\s*(\w+)\s*(!=|==|>=|<=|>|<)\s*(-?\d+)\s*", text)
    if not match:
        raise ValueError(f"data.row_filter: must be like 'rating != 3', got {text!r}")
    return match[1], match[2], int(match[3])
