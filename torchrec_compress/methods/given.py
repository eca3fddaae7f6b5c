"""Given codes: semantic ids, or any other codes that were made elsewhere, from content, an RQ-VAE or a taxonomy."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_compress.fit.given import CodeShape, GivenEncoder, check_given
from torchrec_compress.methods.base import TableData, register
from torchrec_compress.methods.codebook import CodebookConfig
from torchrec_compress.methods.coded_table import stored_codes
from torchrec_compress.methods.learned_codes import LearnedCodes, Sample, with_refit
from torchrec_compress.methods.storage import Parts


@register
@dataclass(frozen=True, kw_only=True)
class GivenCodesConfig(CodebookConfig):
    """Codes are read from a file, row i those of id i; codebooks are trained from the start, or fitted to a table.

    Ids that are alike share codewords, so what one teaches serves the others (semantic ids, arXiv 2306.08121, with the
    "residual" codes of an RQ-VAE). The file is checked whole where a table is built, on every rank, and read by each
    for the rows that it holds; checkpoints hold the codes. Codes in memory: `np.save` them.

    Bytes: see `CodebookConfig`.

    Args:
        codes: path of the file: a .npy of (N, M) integers in [0, K); a .parquet of M columns of integers, in their
            order; or "file.parquet:column", a column of lists of M.

    Example:
        >>> GivenCodesConfig(codes="semantic_ids.npy", num_codes=3, structure="residual").method
        'given'
    """

    method: ClassVar[str] = "given"
    needs: ClassVar[Literal["rows", "contexts", "nothing"]] = "nothing"
    new_ids: ClassVar[str] = "the codes that the file has for it"
    codes: str

    def __post_init__(self) -> None:
        """Take a path object as well, and raise ValueError for anything else."""
        if isinstance(self.codes, os.PathLike):
            object.__setattr__(self, "codes", os.fspath(self.codes))
        if not isinstance(self.codes, str) or not self.codes:
            raise ValueError(f"GivenCodesConfig.codes: must be the path of a file, got {type(self.codes).__name__}")
        super().__post_init__()

    def check(self, table: BaseEmbeddingConfig) -> None:
        """Raise ValueError unless the file holds codes for every id, in range, as well."""
        super().check(table)
        check_given(self.codes, self._shape(table))

    def smaller(self, level: int) -> None:
        """Return None: nobody has given shorter codes."""
        return None

    def _shape(self, table: BaseEmbeddingConfig) -> CodeShape:
        where = f"table {table.name!r}"
        return CodeShape(where, table.num_embeddings, self.num_codes, self.codebook_size, self.first_size)

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the code table; it starts from the file's codes."""
        codes = super().parts(table, seed).codes
        assert codes is not None
        start = partial(_read, encoder=GivenEncoder(self.codes, self._shape(table)), codebook_size=self.codebook_size)
        return Parts(codes=replace(codes, start=start))

    def learn_codes(self, table: BaseEmbeddingConfig, data: TableData, sample: Sample | None) -> LearnedCodes:
        """Keep the given codes and fit the codebooks to the pre-trained rows by least squares."""
        assert sample is not None
        width = table.embedding_dim // (self.num_codes if self.structure == "product" else 1)
        start = torch.zeros(self.num_codes * self.codebook_size, width)
        return with_refit(
            GivenEncoder(self.codes, self._shape(table)), start, sample, self.codebook_size, self.structure
        )


def _read(ids: Tensor, encoder: GivenEncoder, codebook_size: int) -> Tensor:
    return stored_codes(encoder(ids, None), codebook_size)
