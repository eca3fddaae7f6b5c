"""The curvature of the loss in a table's rows, and the rise of the loss that an error of them is predicted to cost.

Gauss-Newton: to second order an error d of an embedding raises the loss of an example by 1/2 d^T J H J^T d, J the
derivative of its logits by the embedding and H the curvature of the loss in the logits. See docs/curvature.md; cousins
are Optimal Brain Surgeon (Hassibi, Stork, NeurIPS 1992) and SqueezeLLM's sensitivities (arXiv 2306.07629).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from torchrec_compress.fit.checks import check_counts

NUM_WITNESSES = 8  # bags that are kept of a table, to know it again
WITNESS_IDS = 8  # of a bag; longer ones are not kept
_TOLERANCE = 1e-2  # of a witness, relative: bfloat16 on the wire is within it, a training step on its ids is not
_SYMMETRY = 1e-6
_BLOCK_ROWS = 65536
# of a table: all of them, or what reads those of ids
Rows: TypeAlias = Tensor | Callable[[Tensor], Tensor]


class Witnesses(NamedTuple):
    """A few bags as the model was served them: the table that a curvature belongs to must give them again.

    Attributes:
        ids: (W, 8) int64; -1 where a bag has fewer ids.
        factors: (W, 8) float64, of each row in its bag; 0 beyond its ids.
        bags: (W, D) float64.
    """

    ids: Tensor
    factors: Tensor
    bags: Tensor


@dataclass(frozen=True)
class Curvature:
    """What `measure_curvature` found of one table.

    An error d_r of the row of every id r raises the loss, a mean over examples, by 1/2 sum_r (n_r / n) d_r^T F d_r, n_r
    the look-ups of r in n examples.

    Attributes:
        table: its name.
        num_embeddings: its rows, N.
        matrix: (D, D) float64, F: the mean over look-ups of s J H J^T, J of the bag that an id was looked up for and s
            the square of its factor there: 1 in a sum, 1 / L^2 in a mean of L ids, w^2 with a weight w.
        examples: that were seen, n.
        lookups: ids of the table that were looked up for them.
        moved: by how much F has moved since the first quarter to half of the batches, relative to its Frobenius norm:
            0.1 and below is settled; 1 where there was one batch.
        witnesses: bags that identify the table.
    """

    table: str
    num_embeddings: int
    matrix: Tensor
    examples: int
    lookups: int
    moved: float
    witnesses: Witnesses

    @property
    def width(self) -> int:
        """Width of the table, D."""
        return len(self.matrix)

    @property
    def too_little(self) -> str:
        """What it lacks to be a metric, or "" where it is one."""
        if not self.lookups:
            return "it was never looked up"
        seen = min(self.examples, self.lookups)
        if seen < self.width:
            return f"{seen} examples or look-ups say little about {self.width} directions"
        if is_flat(self.matrix):
            return "the loss does not depend on it"
        return ""

    def check_table(self, num_embeddings: int, width: int) -> None:
        """Raise ValueError unless a table is as large as the one that was measured."""
        if (num_embeddings, width) != (self.num_embeddings, self.width):
            raise ValueError(
                f"table {self.table!r}: curvature must be of the {num_embeddings} x {width} table, got one of "
                f"{self.num_embeddings} x {self.width}; measure it on the model that is compressed"
            )

    def check_rows(self, rows_of: Callable[[Tensor], Tensor]) -> None:
        """Raise ValueError unless rows are those of the model that was measured.

        Args:
            rows_of: (L,) int64 -> (L, D), the rows of ids.
        """
        ids, factors, bags = self.witnesses
        if not len(ids):
            return
        rows = rows_of(ids.clamp(min=0).flatten()).double().cpu().unflatten(0, ids.shape)
        found = (rows * factors.unsqueeze(2)).sum(dim=1)
        limit = _TOLERANCE * bags.norm(dim=1).clamp(min=1e-12)
        wrong = (~((found - bags).norm(dim=1) <= limit)).nonzero().flatten()  # NaN, too
        if len(wrong):
            first = [number for number in ids[wrong[0]].tolist() if number >= 0]
            raise ValueError(
                f"table {self.table!r}: curvature must be of the model that is compressed, but {len(wrong)} of "
                f"{len(ids)} bags that were served when it was measured differ now, the first of ids {first}; measure "
                "it anew, after the last step of training"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain numbers, text and tensors, which `torch.save` writes and `weights_only=True` reads."""
        return {
            "table": self.table,
            "num_embeddings": self.num_embeddings,
            "matrix": self.matrix,
            "examples": self.examples,
            "lookups": self.lookups,
            "moved": self.moved,
            "witness_ids": self.witnesses.ids,
            "witness_factors": self.witnesses.factors,
            "witness_bags": self.witnesses.bags,
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Curvature:
        """Return what `to_dict` gave; the values may come from a stranger.

        Raises:
            ValueError: a value is missing, of another type or shape, or the matrix is not finite, symmetric and
                positive semi-definite.
        """
        numbers = {"num_embeddings": int, "examples": int, "lookups": int, "moved": float, "table": str}
        tensors = {
            **{"matrix": torch.float64, "witness_ids": torch.int64},
            **{"witness_factors": torch.float64, "witness_bags": torch.float64},
        }
        if not isinstance(values, Mapping) or set(values) != {*numbers, *tensors}:
            got = sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"curvature: must have {sorted([*numbers, *tensors])}, got {got}")
        for name, kind in numbers.items():
            if type(values[name]) is not kind:
                raise ValueError(f"curvature: {name} must be {kind.__name__}, got {values[name]!r}")
        for name, dtype in tensors.items():
            value = values[name]
            fine = isinstance(value, Tensor) and value.layout == torch.strided and value.dtype == dtype
            if not fine or value.is_meta or value.dim() != 2:
                raise ValueError(f"curvature: {name} must be a matrix of {dtype}, got {type(value).__name__}")
        matrix, ids, factors, bags = (values[name].detach().cpu() for name in tensors)
        seen = (values["examples"], values["lookups"], values["num_embeddings"])
        if min(seen) < 0 or not 0 <= values["moved"] < math.inf:
            raise ValueError(f"curvature: counts and moved must be >= 0, got {seen} and {values['moved']}")
        check_matrix(f"curvature of table {values['table']!r}", matrix)
        shapes = (tuple(ids.shape), tuple(factors.shape), tuple(bags.shape))
        count = len(ids)
        if shapes != ((count, WITNESS_IDS), (count, WITNESS_IDS), (count, len(matrix))):
            raise ValueError(f"curvature: witnesses must be (W, 8), (W, 8) and (W, {len(matrix)}), got {shapes}")
        are_ids = bool(((ids >= -1) & (ids < values["num_embeddings"])).all())
        if not (are_ids and bool(torch.isfinite(factors).all()) and bool(torch.isfinite(bags).all())):
            raise ValueError("curvature: witnesses must be ids of the table, finite factors and finite bags")
        plain = {name: values[name] for name in numbers}
        return Curvature(**plain, matrix=matrix, witnesses=Witnesses(ids, factors, bags))


def is_flat(matrix: Tensor) -> bool:
    """Return whether a curvature, (D, D) float64, is nothing, or so little that shares of its trace overflow."""
    return float(matrix.trace()) < len(matrix) * sys.float_info.min


def check_own(name: str, curvature: object, num_embeddings: int, width: int) -> None:
    """Raise ValueError unless this is the curvature of a table of that name and size."""
    if not isinstance(curvature, Curvature) or curvature.table != name:
        got = f"that of {curvature.table!r}" if isinstance(curvature, Curvature) else type(curvature).__name__
        raise ValueError(f"table {name!r}: curvature must be its own, as measure_curvature returns it, got {got}")
    curvature.check_table(num_embeddings, width)


def check_matrix(where: str, matrix: Tensor) -> None:
    """Raise ValueError unless a matrix can be a curvature: [D, D], finite, symmetric, positive semi-definite."""
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.numel():
        raise ValueError(f"{where}: must be a square matrix, got {tuple(matrix.shape)}")
    if not bool(torch.isfinite(matrix).all()) or not bool(torch.isfinite(matrix.diagonal().sum())):
        raise ValueError(f"{where}: must be finite, its trace too, got NaN or infinity")
    size = float(matrix.abs().max())
    if float((matrix - matrix.T).abs().max()) > _SYMMETRY * size:
        raise ValueError(f"{where}: must be symmetric, got {float((matrix - matrix.T).abs().max())} between halves")
    lowest = float(torch.linalg.eigvalsh(matrix.to(torch.float64))[0])
    if lowest < -_SYMMETRY * size:
        raise ValueError(f"{where}: must be positive semi-definite, got an eigenvalue of {lowest}")


def predicted_rise(before: Rows, served: Rows, counts: Tensor, curvature: Curvature) -> float:
    """Return by how much the loss rises, to second order, where a table's rows are served with errors.

    1/2 (look-ups per example) sum_r (n_r / sum n) d_r^T F d_r with d = served - before. Errors of different ids, of one
    bag too, are taken for independent of each other and of the loss's slope.

    Args:
        before: (N, D) floating point, rows of the model that was measured; or what reads those of ids, (L,) -> (L, D).
        served: in their place, likewise.
        counts: (N,) look-ups per id, of any number of examples.
        curvature: of the table.

    Returns:
        In units of the loss: the mean over examples that was measured.

    Raises:
        ValueError: the table was never read, so that nothing is known of it; shapes or counts do not hold.

    Example:
        >>> none = Witnesses(torch.empty(0, 8, dtype=torch.int64), torch.empty(0, 8), torch.empty(0, 1))
        >>> found = Curvature("user", 2, torch.ones(1, 1, dtype=torch.float64), 100, 100, 0.0, none)
        >>> predicted_rise(torch.zeros(2, 1), torch.tensor([[0.5], [0.0]]), torch.tensor([30, 10]), found)
        0.09375
    """
    where = f"table {curvature.table!r}"
    if not curvature.lookups:
        raise ValueError(f"{where}: must be read to predict anything, got no look-up in {curvature.examples} examples")
    expected = (curvature.num_embeddings, curvature.width)
    shapes = [tuple(rows.shape) for rows in (before, served) if isinstance(rows, Tensor)]
    if any(shape != expected for shape in shapes):
        raise ValueError(f"{where}: rows must be {expected}, got {shapes}")
    counts = check_counts(where, counts, expected[0])
    if not bool((counts > 0).any()):
        raise ValueError(f"{where}: at least one count must be above 0, got all zeros")
    total = 0.0
    for first in range(0, expected[0], _BLOCK_ROWS):  # blocks bound the float64 copies
        ids = torch.arange(first, min(first + _BLOCK_ROWS, expected[0]))
        errors = _read(served, ids) - _read(before, ids)
        total += float(((errors @ curvature.matrix) * errors).sum(dim=1) @ counts[ids].to(torch.float64))
    return 0.5 * curvature.lookups / curvature.examples * total / float(counts.to(torch.float64).sum())


def _read(rows: Rows, ids: Tensor) -> Tensor:
    """Return rows of ids that follow each other, (L, D) float64 in the host's memory."""
    found = rows[int(ids[0]) : int(ids[-1]) + 1] if isinstance(rows, Tensor) else rows(ids)
    return found.detach().double().cpu()
