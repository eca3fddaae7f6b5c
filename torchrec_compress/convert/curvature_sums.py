"""The sums that curvatures are made of, over batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_compress.convert.taps import Collection, Tapped
from torchrec_compress.fit.curvature import NUM_WITNESSES, WITNESS_IDS, Curvature, Witnesses

_WHERE = "measure_curvature"


class CurvatureSums:
    """Of all tables, what a rank has seen.

    Args:
        collections: that hold the tables.
        group: ranks that add up what they have seen, or None for this one alone.

    Attributes:
        rank: of this process in the group.
    """

    def __init__(self, collections: Sequence[Collection], group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank, self._world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        tables = [table for collection in collections for table in collection.tables]
        self._sizes = {table.name: table.num_embeddings for table in tables}
        self._sums = {table.name: TableSums(table.name, table.embedding_dim) for table in tables}
        self._examples = self._batches = 0
        self._device = torch.device("cpu")

    def add(self, tapped: Sequence[Tapped], gradients: Sequence[Tensor | None], examples: int) -> None:
        """Add a batch.

        Args:
            tapped: its look-ups.
            gradients: (B, D) or (L, D) of each, or None.
            examples: of the batch.

        Raises:
            ValueError: one is not finite; where other ranks wait, `result` raises instead, on all of them.
        """
        self._examples += examples
        self._batches += 1
        self._device = tapped[0].leaf.device
        for each, gradient in zip(tapped, gradients, strict=True):
            mine = self._sums[each.table]
            if mine.bad_batch:
                continue
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                mine.bad_batch = self._batches
                if self._world == 1:
                    raise _not_finite(each.table, self._batches, 0, 1)
                continue
            mine.add(each, gradient)
        if self._batches & (self._batches - 1) == 0:
            for mine in self._sums.values():
                mine.mark()

    def result(self) -> dict[str, Curvature]:
        """Return the curvature of every table over the batches of all ranks, after one all-reduce.

        Raises:
            ValueError: a gradient was not finite on a rank, or no rank has seen an example; on all ranks alike.
        """
        parts = [torch.tensor([float(self._examples)], dtype=torch.float64, device=self._device)]
        parts += [mine.packed(self.rank, self._world, self._device) for mine in self._sums.values()]
        whole = torch.cat(parts)
        if self._world > 1:
            dist.all_reduce(whole, group=self._group)
        examples, *vectors = whole.cpu().split([len(part) for part in parts])
        for mine, vector in zip(self._sums.values(), vectors, strict=True):
            mine.unpack(vector, self._world)
        if not int(examples):
            raise ValueError(f"{_WHERE}: batches must hold at least one example, got none in {self._batches} batches")
        return {name: mine.result(self._sizes[name], int(examples)) for name, mine in self._sums.items()}


class TableSums:
    """The sum of one table's terms.

    Args:
        table: its name.
        width: D.
    """

    def __init__(self, table: str, width: int) -> None:
        self._table = table
        self.matrix = torch.zeros(width, width, dtype=torch.float64)
        self.lookups = 0
        self.bad_batch = 0  # the first whose gradient was not finite, counted from 1
        # as it was after the last two powers of two of batches: the older is of a quarter to half of them
        self.marks = [(torch.zeros_like(self.matrix), 0)] * 2
        self.witnesses: Witnesses | None = None

    def add(self, each: Tapped, gradient: Tensor | None) -> None:
        """Add one look-up of a batch, gradient (B, D)."""
        self.lookups += len(each.ids)
        if self.witnesses is None and len(each.ids):
            self.witnesses = _witnesses(each)
        if gradient is not None and gradient.numel():
            exact = gradient.double()
            term = (exact * each.shares().unsqueeze(1)).T @ exact
            self.matrix = self.matrix.to(term.device) + term

    def mark(self) -> None:
        """Keep the sum as it is now, beside the one kept before."""
        self.marks = [self.marks[1], (self.matrix.clone(), self.lookups)]

    def packed(self, rank: int, world: int, device: torch.device) -> Tensor:
        """Return everything in one float64 vector that ranks can add up."""
        half, half_lookups = self.marks[0]
        known = torch.zeros(NUM_WITNESSES, 2 * WITNESS_IDS + len(self.matrix), dtype=torch.float64, device=device)
        if rank == 0 and self.witnesses is not None:
            ids, factors, bags = self.witnesses
            known[: len(ids)] = torch.cat([ids.double() + 1, factors, bags], dim=1)
        bad = torch.zeros(world, dtype=torch.float64, device=device)
        bad[rank] = self.bad_batch
        counts = torch.tensor([self.lookups, half_lookups], dtype=torch.float64, device=device)
        matrices = [self.matrix.to(device).flatten(), half.to(device).flatten()]
        return torch.cat([*matrices, known.flatten(), counts, bad])

    def unpack(self, vector: Tensor, world: int) -> None:
        """Take the sum of all ranks' `packed`."""
        width, row = len(self.matrix), 2 * WITNESS_IDS + len(self.matrix)
        sizes = [width * width, width * width, NUM_WITNESSES * row, 2, world]
        matrix, half, known, counts, bad = vector.split(sizes)
        failed = bad.nonzero().flatten()
        if len(failed):
            raise _not_finite(self._table, int(bad[failed[0]]), int(failed[0]), world)
        self.matrix, self.lookups = matrix.view(width, width), int(counts[0])
        self.marks = [(half.view(width, width), int(counts[1]))] * 2
        known = known.view(NUM_WITNESSES, row)
        known = known[known[:, :WITNESS_IDS].sum(dim=1) > 0]
        ids, factors, bags = known.split([WITNESS_IDS, WITNESS_IDS, width], dim=1)
        self.witnesses = Witnesses(ids.long() - 1, factors.clone(), bags.clone())

    def result(self, num_embeddings: int, examples: int) -> Curvature:
        """Return the curvature, the sums being those of all ranks."""
        assert self.witnesses is not None
        half, half_lookups = self.marks[0]
        # sums round: a matrix and its transpose may differ in the last bit
        matrix = (self.matrix + self.matrix.T) / (2 * max(self.lookups, 1))
        change, size = matrix - half / max(half_lookups, 1), float(matrix.norm())
        moved = float(change.norm()) / size if size > 0 else 0.0
        return Curvature(self._table, num_embeddings, matrix, examples, self.lookups, moved, self.witnesses)


def _witnesses(each: Tapped) -> Witnesses:
    """Return a few short bags of a look-up with their ids, on the CPU."""
    lengths, starts = each.lengths.long(), each.lengths.long().cumsum(0) - each.lengths
    fit = ((lengths > 0) & (lengths <= WITNESS_IDS)).nonzero().flatten()
    chosen = fit[torch.linspace(0, max(len(fit) - 1, 0), min(len(fit), NUM_WITNESSES)).long().to(fit.device)]
    ids = torch.full((len(chosen), WITNESS_IDS), -1, dtype=torch.int64)
    factors = torch.zeros(len(chosen), WITNESS_IDS, dtype=torch.float64)
    for row, bag in enumerate(chosen.tolist()):
        first, count = int(starts[bag]), int(lengths[bag])
        ids[row, :count] = each.ids[first : first + count].cpu()
        factors[row, :count] = each.factors[first : first + count].cpu()
    return Witnesses(ids, factors, each.bags[chosen].double().cpu())


def _not_finite(table: str, batch: int, rank: int, world: int) -> ValueError:
    of_rank = f" of rank {rank}" if world > 1 else ""
    return ValueError(
        f"{_WHERE}: table {table!r}: gradients must be finite, got NaN or infinity in batch {batch}{of_rank} (counted "
        "from 1); look at that batch's logits, weights and dense columns"
    )
