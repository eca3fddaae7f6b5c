"""A compression read from plain data, as YAML holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchrec_compress.compression.resolve import Compression
from torchrec_compress.methods import METHODS, MethodConfig
from torchrec_compress.schema import build, nearest


def parse(text: Mapping[str, Any]) -> Compression:
    """Read a compression from plain data, as YAML holds it.

    Args:
        text: {"method": name, option: value, ...} or {table name or pattern: such a mapping, ...}.

    Returns:
        The method, or methods by key.

    Raises:
        ValueError: an unknown method or option (the nearest name is given), or a missing or wrongly typed one.

    Example:
        >>> parse({"user": {"method": "pq", "num_codes": 4}, "*": {"method": "dense"}})["user"].num_codes
        4
    """
    if not isinstance(text, Mapping):
        raise ValueError(f"compression: must be a mapping with the key 'method', or of such by table, got {text!r:.60}")
    if "method" in text and not isinstance(text["method"], Mapping):  # which would be a table called "method"
        return _parse_method(text, "compression")
    if not text:
        raise ValueError(
            "compression: must name a method or tables, got nothing; {'*': {'method': 'dense'}} is no compression"
        )
    wrong = [key for key, value in text.items() if not isinstance(value, Mapping) or "method" not in value]
    if wrong:
        raise ValueError(f"compression.{wrong[0]}: must be a mapping with the key 'method', got {text[wrong[0]]!r}")
    return {key: _parse_method(value, f"compression.{key}") for key, value in text.items()}


def _parse_method(text: Mapping[str, Any], where: str) -> MethodConfig:
    name = text["method"]
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"{where}.method: must be one of {sorted(METHODS)}, got {name!r}{nearest(str(name), METHODS)}")
    options = {key: value for key, value in text.items() if key != "method"}
    try:
        return build(METHODS[name], options, where)
    except ValueError as error:  # what a config checks itself names no key
        raise error if str(error).startswith((where, "unknown key")) else ValueError(f"{where}: {error}") from error
