"""Amounts of memory as people write them. This file imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

import re
from typing import Literal

_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(I?)(B?)", re.IGNORECASE)
_MOST = 2**63  # what counts bytes elsewhere is an int64


def parse_bytes(text: str, where: str, kilobyte: Literal[1000, 1024]) -> int:
    """Return an amount of memory in bytes.

    Args:
        text: such as "80GB", "512 MiB" or "1.5g", in digits of ASCII; a number alone has no unit and is none.
        where: the key, for the error.
        kilobyte: bytes of a KB, by which MB, GB and TB go; a KiB has 1024 in any case.

    Raises:
        ValueError: it is no amount, or none below 2**63 bytes.

    Example:
        >>> parse_bytes("4GB", "--memory", 1000), parse_bytes("4GB", "hbm", 1024), parse_bytes("4GiB", "--memory", 1000)
        (4000000000, 4294967296, 4294967296)
    """
    found = _AMOUNT.fullmatch(text.strip())
    prefix, binary, byte = ("", "", "") if found is None else (each.upper() for each in found.groups()[1:])
    if found is None or not prefix + byte or (binary and not (prefix and byte)):
        raise ValueError(
            f"{where}: must be a size such as '80GB' or '512MiB' ({kilobyte}**3 bytes to a GB, 1024**3 to a GiB), got "
            f"{text!r}"
        )
    value = float(found[1]) * (1024 if binary else kilobyte) ** " KMGT".index(prefix or " ")
    if value >= _MOST:
        raise ValueError(f"{where}: must be below 2**63 bytes, got {text!r}; give what there is")
    return int(value)
