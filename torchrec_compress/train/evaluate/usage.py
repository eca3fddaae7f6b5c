"""How evenly codewords are used."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_compress.modules.code_bank import CodeBank
from torchrec_compress.ops import unpack_codes
from torchrec_compress.train.models.kinds import CompressedTables


def code_usage(collection: CompressedTables, counts: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return the perplexity of the codes of every coded table.

    Args:
        collection: any compressed collection.
        counts: look-ups per id in train, (N,) by table name.

    Returns:
        By table: `by_rows`, the mean over codebooks of the perplexity of codewords over rows, `by_lookups` the same
        with rows weighted by their look-ups, and `codebook_size`, which bounds both.
    """
    usage = {}
    for name, method in collection.methods().items():
        if not method.codewords or collection.blueprint.parts[name].codes is None:
            continue  # its codes are made where it is exported
        assert collection.code_tables is not None
        bank: CodeBank = collection.code_tables.banks[name]
        codes, seen = bank.codes, counts[name].double()
        if method.num_packed:
            codes = unpack_codes(codes, method.num_packed)
        by_row = torch.zeros(len(codes), dtype=torch.float64)
        by_row.index_add_(0, bank.row_numbers(torch.arange(len(seen))), seen)
        rows = torch.ones(len(codes), dtype=torch.float64)
        usage[name] = {
            "by_rows": _perplexity(codes, rows, method.codewords),
            "by_lookups": _perplexity(codes, by_row, method.codewords),
            "codebook_size": float(method.codewords),
        }
    return usage


def _perplexity(codes: Tensor, weights: Tensor, size: int) -> float:
    values = []
    for column in codes.long().unbind(1):
        share = torch.bincount(column, weights, minlength=size)
        share = share[share > 0] / share.sum().clamp(min=1e-12)
        values.append(float(torch.exp(-(share * share.log()).sum())))
    return sum(values) / len(values)
