"""What the GPU kernels are tried on, in emulation, in Triton's interpreter and on a GPU, against float64."""

from dataclasses import dataclass

import torch

from tests.ops.bags import random_codes, reference
from tests.ops.test_layouts import columns as as_columns
from tests.tolerances import assert_near
from torchrec_compress.ops import BagLookup, IdBags, Span, code_dtype
from torchrec_compress.ops.gpu.lookup import pool_on_gpu


@dataclass(frozen=True)
class Case:
    """Features of one batch, all of one method; feature f looks up tables `tables[f]`."""

    num_codes: int = 4
    size: int = 16
    width: int = 4
    structure: str = "product"
    num_hot: int = 0
    lengths: tuple[tuple[int, ...], ...] | None = ((0, 2, 1, 0, 3, 1, 0),)
    num_ids: int = 0  # of each feature, without lengths
    tables: tuple[tuple[int, ...], ...] = ((0,),)
    rows: int | None = 50  # of a code table; None: codes are gathered
    weighted: bool = False
    mean: bool = False
    is_flat: bool = False
    dtype: torch.dtype = torch.float32
    code: torch.dtype | None = None
    index: torch.dtype = torch.int64
    views: bool = False  # whether tensors are columns of others

    @property
    def dim(self) -> int:
        return self.width * (1 if self.structure == "residual" else self.num_codes)


LONG = (0, 1, 70, 3, 0, 5)
SMALL = {
    "plain": Case(),
    "gathered, odd width": Case(num_codes=3, width=5, rows=None, size=255),
    "weights": Case(weighted=True, width=10, size=2),
    "mean of weights": Case(weighted=True, mean=True, num_codes=2, width=16),
    "hot rows": Case(num_hot=7, size=16, num_codes=3, weighted=True),
    "many hot rows": Case(num_hot=40, size=16, num_codes=2, mean=True, index=torch.int32),
    "residual": Case(structure="residual", width=12, num_codes=3, weighted=True),
    "residual, hot rows": Case(structure="residual", width=10, num_codes=2, num_hot=9, mean=True),
    "one id a bag": Case(lengths=None, num_ids=11, num_hot=3, tables=((0,), (0,))),
    "no bag": Case(lengths=((),)),
    "no id": Case(lengths=((0, 0, 0),), num_hot=3, weighted=True),
    "one code": Case(num_codes=1, width=40, num_hot=3, weighted=True),
    "two tables of a feature, a table of two features": Case(
        lengths=((1, 0, 2), (2, 2, 0)), tables=((0, 1), (1,)), num_hot=5, weighted=True
    ),
    "bags of different numbers": Case(
        lengths=((1, 0, 2), (), (2,)), tables=((0,), (1,), (0,)), is_flat=True, weighted=True
    ),
    "bfloat16": Case(dtype=torch.bfloat16, num_hot=3, weighted=True, width=8),
    "float16": Case(dtype=torch.float16, num_hot=3, mean=True, width=6),
    "16-bit codes": Case(size=300, index=torch.int32),
    "views": Case(
        views=True, num_hot=7, num_codes=3, weighted=True, lengths=((1, 0, 2), (2, 2, 0)), tables=((0,), (1,))
    ),
    "32-bit codes": Case(code=torch.int32, size=40, num_hot=5),
}
# too much for an interpreter
LARGE = {
    "many codes": Case(num_codes=40, size=256, width=4, lengths=(LONG,), num_hot=300),
    "wide": Case(num_codes=16, size=256, width=40, lengths=(LONG,), weighted=True),
    "wide, odd": Case(num_codes=7, size=256, width=75, lengths=(LONG,), weighted=True),
    "large codebook": Case(num_codes=4, size=4096, width=8, lengths=(LONG, LONG), tables=((0,), (1,))),
    "the sizes of a benchmark": Case(num_codes=16, size=256, width=8, lengths=((10,) * 63,), dtype=torch.bfloat16),
    "long bags": Case(num_codes=8, size=16, width=8, lengths=((700, 0, 500), (90, 900, 40)), tables=((0,), (1,))),
    "long bags, wide and odd": Case(num_codes=3, size=4, width=25, lengths=((700, 0, 500, 3000),), num_hot=9),
    "long bags, half of columns": Case(num_codes=48, size=16, width=24, lengths=((700, 2900),), weighted=True),
    "long bags of hot rows": Case(
        num_codes=3, size=16, width=20, lengths=((700, 0, 500),), num_hot=3, weighted=True, rows=None
    ),
    "more look-ups than a launch takes": Case(
        lengths=((1, 2),) * 40, tables=tuple((feature % 33,) for feature in range(40)), num_codes=2
    ),
    "a thousand bags": Case(lengths=((0, 1, 2, 1) * 250,), num_hot=3, weighted=True, index=torch.int32),
    "residual, large": Case(structure="residual", num_codes=8, size=256, width=128, lengths=(LONG,), num_hot=20),
}


@dataclass(frozen=True)
class Inputs:
    lookups: list[BagLookup]
    spans: list[Span]  # of look-ups
    codes: list[torch.Tensor]
    books: list[torch.Tensor]
    hot: list[torch.Tensor | None]
    batch: IdBags


def draw(case: Case, device: str) -> Inputs:
    """Draw the inputs of a case."""
    by_feature, offsets = _spans(case)
    pairs = [(feature, table) for feature, tables in enumerate(case.tables) for table in tables]
    spans = [by_feature[feature]._replace(is_gathered=case.rows is None) for feature, _ in pairs]
    num_tables = 1 + max(table for _, table in pairs)
    num_ids = sum(span.num_ids for span in by_feature)

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        view = as_columns(tensor) if case.views else tensor
        return view if device == "cpu" else torch.empty_strided(view.shape, view.stride(), device=device).copy_(view)

    def codes_of(rows: int) -> torch.Tensor:
        codes = random_codes(rows, case.num_codes, case.size, case.num_hot)
        return placed(codes.to(case.code or code_dtype(case.size)))

    def leaf(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return placed(torch.randn(shape).to(dtype)).requires_grad_()

    by_table = [codes_of(case.rows or 0) for _ in range(num_tables)]
    codes = [
        codes_of(span.num_ids) if case.rows is None else by_table[table]
        for span, (_, table) in zip(spans, pairs, strict=True)
    ]
    batch = IdBags(
        None if case.rows is None else placed(torch.randint(0, case.rows, (num_ids,), dtype=case.index)),
        None if offsets is None else placed(offsets),
        leaf(num_ids, dtype=torch.float32) if case.weighted else None,
        case.is_flat,
    )
    return Inputs(
        [BagLookup(table, str(feature), "case", case.structure, case.mean) for feature, table in pairs],
        spans,
        codes,
        [leaf(case.num_codes * case.size, case.width) for _ in range(num_tables)],
        [leaf(case.num_hot, case.dim) if case.num_hot else None for _ in range(num_tables)],
        batch,
    )


def check(case: Case, tier: str, device: str = "cpu") -> None:
    """Compare values and every gradient of a case with the reference."""
    torch.manual_seed(0)
    given = draw(case, device)
    ids, offsets, weights, _ = given.batch
    out = pool_on_gpu(given.lookups, given.spans, given.codes, given.books, given.hot, given.batch, tier)
    assert out.dtype == case.dtype
    upstream = torch.randn(out.shape).to(case.dtype)
    out.backward(as_columns(upstream).to(device) if case.views else upstream.to(device))
    num_ids = max([0, *(span.first_id + span.num_ids for span in given.spans)])
    grads = [torch.zeros(books.shape, dtype=torch.float64) for books in given.books]
    grads_hot = [torch.zeros(case.num_hot, case.dim, dtype=torch.float64) for _ in given.books]
    grad_weights = torch.zeros(num_ids, dtype=torch.float64)
    columns = 0
    for lookup, span, table in zip(given.lookups, given.spans, given.codes, strict=True):
        mine = slice(span.first_id, span.first_id + span.num_ids)
        rows = (table if ids is None else table[ids[mine].long()]).cpu()
        bounds = None
        if offsets is not None:
            bounds = offsets[span.first_bag : span.first_bag + span.num_bags + 1].long().cpu() - span.first_id
        counts = torch.ones(span.num_bags, 1) if bounds is None else (bounds[1:] - bounds[:-1]).clamp(min=1)[:, None]
        scale = 1 / counts if case.mean else torch.ones_like(counts)
        piece, part = _piece(out, case, span, columns), _piece(upstream, case, span, columns)
        columns += span.num_bags * case.dim if case.is_flat else case.dim
        factors = None if weights is None else weights[mine].cpu()
        books, hot = given.books[lookup.table].cpu(), given.hot[lookup.table]
        found = reference(
            rows, books, bounds, case.structure, factors, None if hot is None else hot.cpu(), part * scale
        )
        assert_near(piece.detach().cpu(), found[0] * scale, max(1, span.num_ids))
        grads[lookup.table] += found[1]
        grads_hot[lookup.table] += found[2] if found[2] is not None else 0
        grad_weights[mine] += found[3]
    for tensor, expected in zip((*given.books, *given.hot), (*grads, *grads_hot), strict=True):
        if tensor is not None:
            assert_near(tensor.grad.cpu(), expected, num_ids + 1)
    if weights is not None:
        assert_near(weights.grad.cpu(), grad_weights, case.dim)


def _piece(whole: torch.Tensor, case: Case, span: Span, first: int) -> torch.Tensor:
    if case.is_flat:
        return whole[first : first + span.num_bags * case.dim].view(span.num_bags, case.dim)
    return whole[:, first : first + case.dim]


def _spans(case: Case) -> tuple[list[Span], torch.Tensor | None]:
    """Return the spans of the features and the offsets of the batch."""
    spans, first_bag, first_id = [], 0, 0
    for feature in range(len(case.tables)):
        lengths = (1,) * case.num_ids if case.lengths is None else case.lengths[feature]
        spans.append(Span(first_bag, len(lengths), first_id, sum(lengths)))
        first_bag, first_id = first_bag + len(lengths), first_id + sum(lengths)
    if case.lengths is None:
        return spans, None
    counts = [0, *(length for lengths in case.lengths for length in lengths)]
    return spans, torch.tensor(counts).cumsum(0).to(case.index)
