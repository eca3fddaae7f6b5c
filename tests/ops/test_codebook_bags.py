"""All look-ups of a collection in one call: `codebook_bags` against float64, on every tier of a CPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.bags import random_codes, reference
from tests.ops.cpp.test_kernels import has_compiler
from tests.tolerances import assert_near
from torchrec_compress.ops import BagLookup, IdBags, Span, code_dtype, codebook_bags, pack_codes

pytestmark = [pytest.mark.usefixtures("poisoned_memory")]
BACKENDS = [
    pytest.param("cpp", marks=pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")),
    "fbgemm",
    "torch",
]
# tables: (rows, M, K, width of a codeword, structure, hot rows)
TABLES = [
    (50, 8, 256, 8, "product", 0),
    (70, 5, 16, 5, "product", 7),
    (40, 3, 300, 24, "residual", 0),
    (90, 16, 256, 4, "product", 40),
    (30, 2, 4096, 33, "residual", 9),
    (60, 3, 40000, 4, "product", 11),
    (45, 18, 2, 10, "residual", 0),
]
PACKED = (1, 6)  # tables of which a byte holds two codes
# look-ups: (table, feature, is_mean); two features look up table 0, feature 1 four tables of four types
LOOKUPS = [
    (0, 0, False),
    (1, 1, True),
    (0, 1, False),
    (2, 2, False),
    (3, 1, True),
    (4, 4, False),
    (5, 1, False),
    (6, 3, True),
]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", request.param)
    return request.param


class Case:
    """Tables, a batch of five features, and the same in float64."""

    def __init__(self, lengths, index_dtype=torch.int64, weighted=True, is_gathered=None, dtype=torch.float32):
        self.dims = [width * (m if structure == "product" else 1) for _, m, _, width, structure, _ in TABLES]
        self.codes = [random_codes(n, m, k, h).to(code_dtype(k)) for n, m, k, _, _, h in TABLES]
        self.books = [torch.randn(m * k, width, dtype=dtype, requires_grad=True) for _, m, k, width, _, _ in TABLES]
        self.hot = [
            torch.randn(table[5], dim, dtype=dtype, requires_grad=True) if table[5] else None
            for table, dim in zip(TABLES, self.dims, strict=True)
        ]
        self.lookups = [
            BagLookup(
                t,
                f"f{feature}",
                f"table 't{t}', feature 'f{feature}'",
                TABLES[t][4],
                is_mean,
                TABLES[t][1] if t in PACKED else 0,
            )
            for t, feature, is_mean in LOOKUPS
        ]
        self.is_gathered = is_gathered or [False] * len(LOOKUPS)
        flat = [length for bags in lengths for length in bags]
        self.offsets = torch.tensor([0, *flat]).cumsum(0).to(index_dtype)
        self.ids = torch.randint(0, 30, (sum(flat),)).to(index_dtype)
        self.weights = torch.randn(len(self.ids), requires_grad=True) if weighted else None
        self.spans, bag, first = [], 0, 0
        of_features = []
        for bags in lengths:
            of_features.append(Span(bag, len(bags), first, sum(bags)))
            bag, first = bag + len(bags), first + sum(bags)
        self.spans = [of_features[feature] for _, feature, _ in LOOKUPS]

    def leaves(self):
        return [
            *self.books,
            *(rows for rows in self.hot if rows is not None),
            *([self.weights] * (self.weights is not None)),
        ]

    def ids_of(self, span):
        return self.ids[span.first_id : span.first_id + span.num_ids].long()

    def pool(self, is_flat=False):
        stored = [pack_codes(codes) if t in PACKED else codes for t, codes in enumerate(self.codes)]
        codes = [
            stored[lookup.table][self.ids_of(span)] if gathered else stored[lookup.table]
            for lookup, span, gathered in zip(self.lookups, self.spans, self.is_gathered, strict=True)
        ]
        batch = IdBags(self.ids, self.offsets, self.weights, is_flat)
        spans = [
            span._replace(is_gathered=gathered) for span, gathered in zip(self.spans, self.is_gathered, strict=True)
        ]
        out = codebook_bags(self.lookups, spans, codes, self.books, self.hot, batch)
        if not is_flat:
            return list(out.split([self.dims[lookup.table] for lookup in self.lookups], dim=1))
        sizes = [self.dims[a.table] * span.num_bags for a, span in zip(self.lookups, self.spans, strict=True)]
        return [
            part.view(span.num_bags, self.dims[a.table])
            for part, a, span in zip(out.split(sizes), self.lookups, self.spans, strict=True)
        ]

    def expected(self, upstream):
        """Return outputs, and gradients of `leaves`, one look-up at a time in float64."""
        outs = []
        of_books = [torch.zeros(books.shape, dtype=torch.float64) for books in self.books]
        of_hot = [None if rows is None else torch.zeros(rows.shape, dtype=torch.float64) for rows in self.hot]
        of_weights = torch.zeros(len(self.ids), dtype=torch.float64)
        for lookup, span, up in zip(self.lookups, self.spans, upstream, strict=True):
            t, where = lookup.table, slice(span.first_id, span.first_id + span.num_ids)
            offsets = (self.offsets[span.first_bag : span.first_bag + span.num_bags + 1] - span.first_id).long()
            scale = 1 / (offsets[1:] - offsets[:-1]).clamp(min=1).double().unsqueeze(1) if lookup.is_mean else 1.0
            weights = None if self.weights is None else self.weights[where]
            out, books, hot, factors = reference(
                self.codes[t][self.ids_of(span)],
                self.books[t],
                offsets,
                lookup.structure,
                weights,
                self.hot[t],
                up.double() * scale,
            )
            outs.append(out * scale)
            of_books[t] += books
            of_weights[where] += factors
            if hot is not None:
                of_hot[t] += hot
        found = [*of_books, *(rows for rows in of_hot if rows is not None)]
        return outs, found + ([of_weights] if self.weights is not None else [])

    def check(self, is_flat=False):
        outs = self.pool(is_flat)
        upstream = [torch.randn_like(out) for out in outs]
        grads = torch.autograd.grad(outs, self.leaves(), upstream)
        expected, expected_grads = self.expected(upstream)
        for got, right in zip(outs, expected, strict=True):
            assert got.dtype == self.books[0].dtype
            assert_near(got, right, 8)
        for got, right in zip(grads, expected_grads, strict=True):
            assert_near(got, right, len(self.ids) + 40)


def lengths_of(num_bags, num_features=5):
    return [[(0, 1, 2, 0, 90, 3, 1)[(bag + f) % 7] for bag in range(num_bags)] for f in range(num_features)]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_bags", [0, 1, 3, 63])
def test_many_tables_of_all_kinds(backend, num_bags, weighted, index_dtype):
    Case(lengths_of(num_bags), index_dtype, weighted).check()


@pytest.mark.parametrize("is_flat", [False, True])
def test_codes_may_be_gathered_before(backend, is_flat):
    Case(lengths_of(9), is_gathered=[True] * 8).check(is_flat)
    Case(lengths_of(9), is_gathered=[True, False, False, True, True, False, False, False]).check(is_flat)


def test_features_may_have_bags_of_their_own_number(backend):
    Case([[1, 0, 70, 2], [3], [], [0, 0], [5, 1, 1]]).check(is_flat=True)


@given(lengths=st.lists(st.lists(st.integers(0, 70), max_size=3), min_size=5, max_size=5), weighted=st.booleans())
@pytest.mark.parametrize("name", BACKENDS)
def test_any_jagged_batch(name, lengths, weighted):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHREC_COMPRESS_BACKEND", name)
        Case(lengths, weighted=weighted).check(is_flat=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["auto", "fbgemm"])
def test_codebooks_of_low_precision_are_summed_in_float32(name, dtype, monkeypatch):
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", name)
    case = Case(lengths_of(9), dtype=dtype)
    low = case.pool()
    case.books = [books.detach().float() for books in case.books]
    case.hot = [None if rows is None else rows.detach().float() for rows in case.hot]
    for got, right in zip(low, case.pool(), strict=True):
        assert torch.equal(got, right.to(dtype))
    Case(lengths_of(3), dtype=dtype).check()


def test_codebooks_of_several_dtypes_are_an_error(backend):
    case = Case(lengths_of(2))
    case.books[1] = case.books[1].double()
    with pytest.raises(ValueError, match=r"codebooks must be of one dtype, got \['torch.float32', 'torch.float64'\]"):
        case.pool()


@pytest.mark.parametrize("wrong", [-1, 70, 2**31 - 1])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_an_id_out_of_range_is_an_error_that_names_table_and_feature(backend, index_dtype, wrong):
    case = Case(lengths_of(50), index_dtype)
    case.ids[case.spans[1].first_id + 200] = wrong
    with pytest.raises(ValueError, match=rf"^table 't1', feature 'f1': every id must be in \[0, 70\), got {wrong};"):
        case.pool()


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_a_code_out_of_range_is_an_error_that_names_table_and_feature(monkeypatch):
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", "cpp")
    case = Case(lengths_of(50))
    case.codes[2][:, 1] = 300
    with pytest.raises(ValueError, match=r"^table 't2', feature 'f2': every code must be in \[0, 300\)"):
        case.pool()
    case = Case(lengths_of(50))
    case.codes[3][:] = 255
    with pytest.raises(ValueError, match=r"^table 't3', feature 'f1': .* every escape code a hot row in \[0, 40\)"):
        case.pool()


def test_two_threads_give_the_bits_of_one(backend):
    if backend == "torch":
        pytest.skip("F.embedding_bag promises no such thing")
    case = Case([[length * 7 for length in lengths] for lengths in lengths_of(500)])
    found = []
    for num_threads in (1, 2, 2):
        torch.set_num_threads(num_threads)
        try:
            outs = case.pool()
            upstream = [torch.arange(out.numel()).view(out.shape).sin() for out in outs]
            found.append([*outs, *torch.autograd.grad(outs, case.leaves(), upstream)])
        finally:
            torch.set_num_threads(1)
    for one, two, again in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, again)


def test_the_codes_of_the_forward_are_those_of_the_backward(backend):
    case = Case(lengths_of(9))
    outs = case.pool()
    upstream = [torch.randn_like(out) for out in outs]
    case.ids.zero_()  # the caller's buffer may be filled with the next batch
    (got,) = torch.autograd.grad(outs, case.books[0], upstream, allow_unused=True)
    assert got.abs().sum() > 0
