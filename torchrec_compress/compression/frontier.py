"""What every table costs at every size: measured once, for any number of byte budgets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeAlias

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_compress.compression.candidates import can_store
from torchrec_compress.compression.knapsack import Candidate, allocate, undominated
from torchrec_compress.compression.parse import parse
from torchrec_compress.methods import MethodConfig

Unit: TypeAlias = Literal["loss", "squared error"]
_UNITS = ("loss", "squared error")
_MORE = 0.01  # of a budget, whose worth a choice tells


@dataclass(frozen=True)
class Share:
    """What one table has of a budget.

    Attributes:
        method: that stores it.
        num_bytes: all that it stores.
        error: in the unit of the choice.
        gain: by how much the error falls where one more percent of the budget, and what is left of it, is for
            this table alone.
    """

    method: MethodConfig
    num_bytes: int
    error: float
    gain: float


@dataclass(frozen=True, eq=False)
class Choice(Mapping[str, MethodConfig]):
    """The method of every table for a budget: a mapping by table name, as `compress` takes it.

    `str()` is a table of bytes, errors, and what one more percent of the budget would buy.

    Attributes:
        shares: what each table has, by name.
        budget_bytes: what all of them could have.
        unit: of errors: "loss", the predicted rise of the mean loss over examples (`predicted_rise`), or "squared
            error" of rows, each times its look-ups, which says little about tables of different meaning.
        gain: by how much the error of all falls with one more percent of the budget.
        excess: by how much the error can be above the least that there is, 0 where the choice is proven best.
    """

    shares: Mapping[str, Share]
    budget_bytes: float
    unit: Unit
    gain: float
    excess: float

    def __getitem__(self, name: str) -> MethodConfig:
        return self.shares[name].method

    def __iter__(self) -> Iterator[str]:
        return iter(self.shares)

    def __len__(self) -> int:
        return len(self.shares)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tables, within the budget."""
        return sum(share.num_bytes for share in self.shares.values())

    @property
    def error(self) -> float:
        """Error of all tables."""
        return sum(share.error for share in self.shares.values())

    def __str__(self) -> str:
        rows = [("table", "method", "bytes", self.unit, "1 % of bytes more")]
        for name, share in self.shares.items():
            rows.append((name, told(share.method), f"{share.num_bytes:,}", f"{share.error:.3g}", _fall(share.gain)))
        rows.append(("all", "", f"{self.num_bytes:,}", f"{self.error:.3g}", _fall(self.gain)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        aligned = (
            [
                cell.ljust(width) if n < 2 else cell.rjust(width)
                for n, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            for row in rows
        )
        return "\n".join("  ".join(row).rstrip() for row in aligned)


def told(method: MethodConfig) -> str:
    """Return a method with the options that are not its usual ones."""
    usual = {field.name: field.default for field in dataclasses.fields(method)}
    options = {name: value for name, value in vars(method).items() if value != usual[name]}
    return " ".join([method.method, *(f"{name}={value}" for name, value in options.items())])


def _fall(gain: float) -> str:
    return f"{-gain:.2g}" if gain else "0"


@dataclass(frozen=True)
class Frontier:
    """The undominated ways to store each of some tables: fewer bytes cost more error (`measure_frontier`).

    Attributes:
        sizes: rows and width by table name.
        candidates: by table name, bytes ascending.
        unit: of errors, see `Choice`.
    """

    sizes: Mapping[str, tuple[int, int]]
    candidates: Mapping[str, Sequence[Candidate[MethodConfig]]]
    unit: Unit

    def choose(self, budget_bytes: float) -> Choice:
        """Return the choice of least error within a budget; it takes milliseconds for a few tables.

        Args:
            budget_bytes: for all tables, everything counted (codes, codebooks, hot rows, dense tables).

        Raises:
            ValueError: the budget is no number of bytes, or below the smallest choice (which is named).

        Example:
            >>> from torchrec_compress.methods import DenseConfig, Int8Config
            >>> ways = [Candidate(112, 2.0, Int8Config()), Candidate(288, 0.0, DenseConfig())]
            >>> print(Frontier({"day": (9, 8)}, {"day": ways}, "squared error").choose(287))
            table  method  bytes  squared error  1 % of bytes more
            day    int8      112              2                 -2
            all              112              2                 -2
        """
        check_budget("choose", budget_bytes)
        found = allocate(self.candidates, budget_bytes)
        more = (1 + _MORE) * budget_bytes
        shares = {
            name: Share(each.option, each.num_bytes, each.error, self._gain(name, each, more - found.num_bytes))
            for name, each in found.choices.items()
        }
        gain = max(0.0, found.error - allocate(self.candidates, more).error)
        return Choice(shares, budget_bytes, self.unit, gain, found.error - found.lower_bound)

    def scaled(self, factors: Mapping[str, float]) -> Frontier:
        """Return the same with the errors of tables multiplied, by name: what was predicted made what was measured.

        Raises:
            ValueError: a factor is of no table, or not finite and above 0.

        Example:
            >>> from torchrec_compress.methods import Int8Config
            >>> some = Frontier({"day": (9, 8)}, {"day": [Candidate(112, 2.0, Int8Config())]}, "loss")
            >>> some.scaled({"day": 0.5}).candidates["day"][0].error
            1.0
        """
        unknown = sorted(set(factors) - set(self.candidates))
        if unknown:
            raise ValueError(f"scaled: factors must be of tables {sorted(self.candidates)}, got {unknown}")
        for name, factor in factors.items():
            if not 0 < factor < math.inf:
                raise ValueError(f"scaled: table {name!r}: the factor must be finite and above 0, got {factor}")
        candidates = {
            name: [dataclasses.replace(each, error=each.error * factors.get(name, 1.0)) for each in some]
            for name, some in self.candidates.items()
        }
        return dataclasses.replace(self, candidates=candidates)

    def _gain(self, name: str, chosen: Candidate[MethodConfig], left: float) -> float:
        within = (each.error for each in self.candidates[name] if each.num_bytes <= chosen.num_bytes + left)
        return chosen.error - min(within)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, which JSON holds exactly."""
        tables = {
            name: {
                "rows": self.sizes[name][0],
                "width": self.sizes[name][1],
                "candidates": [[each.num_bytes, each.error, each.option.to_dict()] for each in some],
            }
            for name, some in self.candidates.items()
        }
        return {"unit": self.unit, "tables": tables}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Frontier:
        """Return what `to_dict` gave; the values may come from a stranger.

        Raises:
            ValueError: a value is missing or of another kind, a method cannot store its table or takes other bytes.
        """
        tables = values.get("tables") if isinstance(values, Mapping) else None
        if not isinstance(tables, Mapping) or set(values) != {"unit", "tables"} or values["unit"] not in _UNITS:
            raise ValueError(f"frontier: must have tables and a unit of {list(_UNITS)}, got {values!r:.200}")
        sizes, candidates = {}, {}
        for name, told in tables.items():
            where = f"frontier: table {name!r}"
            if not isinstance(told, Mapping) or set(told) != {"rows", "width", "candidates"}:
                raise ValueError(f"{where}: must have rows, width and candidates, got {told!r:.200}")
            size = (told["rows"], told["width"])
            if not all(type(number) is int and number > 0 for number in size):
                raise ValueError(f"{where}: rows and width must be ints above 0, got {size}")
            if not isinstance(told["candidates"], list) or not told["candidates"]:
                raise ValueError(f"{where}: candidates must be a list of one at least, got {told['candidates']!r:.200}")
            sizes[name] = size
            table = EmbeddingBagConfig(name=name, num_embeddings=size[0], embedding_dim=size[1], feature_names=[name])
            candidates[name] = [_read(where, table, each) for each in told["candidates"]]
            if candidates[name] != undominated(name, candidates[name]):
                raise ValueError(f"{where}: candidates must have more bytes and less error one after another")
        return Frontier(sizes, candidates, values["unit"])


def _read(where: str, table: EmbeddingBagConfig, values: Any) -> Candidate[MethodConfig]:
    """Return one candidate from plain data, or raise ValueError."""
    if not isinstance(values, list) or len(values) != 3 or not isinstance(values[2], Mapping):
        raise ValueError(f"{where}: a candidate must be bytes, error and method, got {values!r:.200}")
    num_bytes, error, plain = values
    method = parse(plain)
    if not isinstance(method, MethodConfig) or not can_store(method, table):
        raise ValueError(f"{where}: must have methods that can store it, got {plain!r:.200}")
    if type(num_bytes) is not int or num_bytes != method.stored_bytes(table):
        raise ValueError(f"{where}: {method} takes {method.stored_bytes(table)} bytes, got {num_bytes!r}")
    if type(error) is not float or not 0 <= error < math.inf:
        raise ValueError(f"{where}: error must be a float >= 0, got {error!r}")
    return Candidate(num_bytes, error, method)


def check_budget(where: str, budget_bytes: object) -> None:
    """Raise ValueError unless a budget is a number of bytes above 0 and below 2**63."""
    is_number = isinstance(budget_bytes, Real) and not isinstance(budget_bytes, bool)
    number: Any = budget_bytes if is_number else 0
    if number >= 2**63:  # not shown: it may have thousands of digits
        raise ValueError(f"{where}: budget_bytes must be below 2**63, got more; give what there is")
    if not number > 0:
        raise ValueError(f"{where}: budget_bytes must be a number of bytes above 0, got {budget_bytes!r}")
