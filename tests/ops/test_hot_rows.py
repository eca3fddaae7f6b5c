"""Hot rows of every dtype in `codebook_bags`: against float64, on every tier of a CPU and for every instruction set."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.bags import random_codes, reference
from tests.ops.cpp.test_kernels import has_compiler
from tests.tolerances import assert_near
from torchrec_compress.ops import (
    BagLookup,
    IdBags,
    Span,
    code_dtype,
    codebook_bag,
    codebook_bags,
    dequantize_rows,
    num_escape_codes,
    pack_codes,
    quantize_rows,
    tiers,
)

pytestmark = [pytest.mark.usefixtures("poisoned_memory")]
DTYPES = ["fp32", "int8", "int4"]
LOW_DTYPES = ["int8", "int4"]
STRUCTURES = ["product", "residual"]
SIZES = [16, 255, 256]  # packed codes, codes that are checked, codes that fill their byte
NUM_ROWS = 70
needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
CAPABILITIES = ["default", "avx2", "avx512"]  # each has those before it
MINE = torch.backends.cpu.get_cpu_capability().lower()
HAD = CAPABILITIES[: CAPABILITIES.index(MINE) + 1] if MINE in CAPABILITIES else CAPABILITIES[:1]
BACKENDS = [pytest.param("cpp", marks=needs_compiler), "fbgemm", "torch"]


def hot_rows_of(num_hot, dim, dtype):
    """Return hot rows as they are stored and as floats; scales of low-bit ones go below float16's normal numbers."""
    rows = torch.randn(num_hot, dim) * torch.logspace(0, -4, num_hot).unsqueeze(1)
    if dtype == "fp32":
        return rows.requires_grad_(), rows
    stored = quantize_rows(rows, dtype)
    return stored, dequantize_rows(stored, dtype)


def check(dtype, structure, size, lengths, weighted, is_mean, index_dtype, num_codes=3, width=8, num_hot=40):
    """Pool one table, and compare values and gradients."""
    dim = width * num_codes if structure == "product" else width
    codes = random_codes(NUM_ROWS, num_codes, size, num_hot).to(code_dtype(size))
    books = torch.randn(num_codes * size, width, requires_grad=True)
    stored, floats = hot_rows_of(num_hot, dim, dtype)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(0, NUM_ROWS, (int(offsets[-1]),))
    weights = torch.randn(len(ids), requires_grad=True) if weighted else None
    num_packed = num_codes if size <= 16 else 0
    lookup = BagLookup(0, "f", "table 't'", structure, is_mean, num_packed)
    batch = IdBags(ids.to(index_dtype), offsets.to(index_dtype), weights)
    table = pack_codes(codes) if num_packed else codes
    out = codebook_bags([lookup], [Span(0, len(lengths), 0, len(ids))], [table], [books], [stored], batch)
    upstream = torch.randn_like(out)
    leaves = [books, *([stored] if dtype == "fp32" else []), *([weights] if weighted else [])]
    got = torch.autograd.grad(out, leaves, upstream)
    scale = 1 / (offsets[1:] - offsets[:-1]).clamp(min=1).double().unsqueeze(1) if is_mean else 1.0
    right, of_books, of_hot, of_weights = reference(
        codes[ids], books, offsets, structure, weights, floats, upstream.double() * scale
    )
    expected = [of_books, *([of_hot] if dtype == "fp32" else []), *([of_weights] if weighted else [])]
    assert_near(out, right * scale, 8)
    for mine, theirs in zip(got, expected, strict=True):
        assert_near(mine, theirs, len(ids) + 40)


def check_all():
    """Check every kind of hot rows with every kind of codes and bags; nothing here asks for a tier."""
    lengths = [0, 1, 2, 0, 170, 3, 1, 0]
    for dtype, structure, size in itertools.product(DTYPES, STRUCTURES, SIZES):
        for weighted, is_mean in itertools.product([False, True], [False, True]):
            index_dtype = torch.int32 if weighted == is_mean else torch.int64  # every pair of the three
            check(dtype, structure, size, lengths, weighted, is_mean, index_dtype)
        for num_codes, width in ((5, 4), (18, 16), (33, 4), (9, 32), (4, 9), (2, 70)):  # pieces and remainders of rows
            if num_codes * width % 4 == 0 and (structure == "product" or width % 4 == 0):
                check(dtype, structure, size, lengths, True, False, torch.int64, num_codes, width)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, dtype, structure, size, monkeypatch):
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", backend)
    for index_dtype, is_mean in ((torch.int32, True), (torch.int64, False)):
        check(dtype, structure, size, [0, 1, 2, 0, 170, 3, 1], True, is_mean, index_dtype)
        check(dtype, structure, size, [1] * 200, False, is_mean, index_dtype)
    check(dtype, structure, size, [], True, False, torch.int64)


@pytest.fixture(scope="module")
def on_other_processors():
    """Processes that check everything, one for each instruction set, side by side."""
    script = "import sys; from tests.ops.test_hot_rows import check_all, tiers\nprint(tiers()[0].detail)\ncheck_all()"
    started = {}
    for capability in HAD:
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "TORCHREC_COMPRESS_BACKEND": "cpp"}
        command = [sys.executable, "-c", script]
        started[capability] = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    yield started
    for process in started.values():
        process.kill()


@needs_compiler
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability, on_other_processors):
    if capability not in HAD:
        pytest.skip(f"this processor is {MINE}")
    out, error = on_other_processors[capability].communicate(timeout=280)
    assert on_other_processors[capability].returncode == 0, error[-3000:]
    assert capability != "default" or "(base)" in out


@needs_compiler
@given(
    lengths=st.lists(st.integers(0, 90), max_size=5),
    num_codes=st.integers(1, 17),
    width=st.sampled_from([4, 8, 12, 16, 32]),
    size=st.sampled_from([2, 16, 255, 256, 300]),
    num_hot=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    structure=st.sampled_from(STRUCTURES),
    weighted=st.booleans(),
    is_mean=st.booleans(),
)
def test_any_jagged_batch(lengths, num_codes, width, size, num_hot, dtype, structure, weighted, is_mean):
    if num_escape_codes(num_hot, num_codes, size) >= size:
        num_hot = 1
    if size == 2 and num_codes == 1:  # one codeword and one hot row
        num_hot = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHREC_COMPRESS_BACKEND", "cpp")
        check(dtype, structure, size, lengths, weighted, is_mean, torch.int64, num_codes, width, num_hot)


def low_bit_case(dtype, structure="product", size=256, num_codes=4, num_ids=500):
    width = 8 if structure == "product" else 32
    codes = random_codes(num_ids, num_codes, size, 300).to(code_dtype(size))
    stored, floats = hot_rows_of(300, 32, dtype)
    offsets = torch.tensor([0, 3, 3, 90, num_ids])
    return codes, torch.randn(num_codes * size, width), offsets, stored, floats


@pytest.mark.parametrize("size", [255, 256])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_bit_hot_rows_have_the_bits_of_their_floats(backend, dtype, structure, size, monkeypatch):
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", backend)
    codes, books, offsets, stored, floats = low_bit_case(dtype, structure, size)
    weights = torch.randn(len(codes), requires_grad=True)
    found = []
    for rows in (stored, floats):
        out = codebook_bag(codes, books, offsets, structure=structure, weights=weights, hot_rows=rows)
        found.append([out, *torch.autograd.grad(out.sin().sum(), weights)])
    # a value of 8 bits times a float16 is exact in float32: fused with the addition of the bias or not is all one
    for got, right in zip(*found, strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_bit_hot_rows_of_another_width_are_errors(backend, monkeypatch):
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", backend)
    codes, books, offsets, stored, _ = low_bit_case("int8")
    with pytest.raises(ValueError, match=r"32 wide, or 32 \+ 4 or 32 / 2 \+ 4 bytes, got 35|of 32 values .* got 35"):
        codebook_bag(codes, books, offsets, hot_rows=stored[:, :35])


@needs_compiler
def test_escape_codes_that_lead_nowhere_are_reported_before_what_follows(monkeypatch):
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", "cpp")
    codes, books, _, stored, _ = low_bit_case("int8")
    codes[270], codes[320] = (
        torch.tensor([255, 0, 1, 44], dtype=torch.uint8),
        torch.tensor([255] * 4, dtype=torch.uint8),
    )
    with pytest.raises(ValueError, match=r"every escape code a hot row in \[0, 300\), got another at position 270"):
        codebook_bag(codes, books, torch.tensor([0, 500]), hot_rows=stored)
    ids = torch.arange(500)
    ids[400] = 500
    with pytest.raises(ValueError, match="position 270"):
        codebook_bag(codes, books, torch.tensor([0, 500]), hot_rows=stored, ids=ids)


@needs_compiler
@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_operators_and_graphs_take_low_bit_hot_rows(dtype, monkeypatch):
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", "cpp")
    codes, books, offsets, stored, _ = low_bit_case(dtype, num_ids=120)
    books.requires_grad_()
    weights = torch.randn(len(codes), requires_grad=True)
    assert not tiers()[0].passed_over  # loads the operators
    arguments = ([codes], [books], [stored], None, offsets, weights, [0, 0, 4, 0], [0, 4], 0, False, "table 't'")
    torch.library.opcheck(torch.ops.torchrec_compress.codebook_bags.default, arguments)
    ids = torch.arange(len(codes))

    def pool(books, weights):
        return codebook_bag(codes, books, offsets, weights=weights, hot_rows=stored, ids=ids)

    compiled = torch.compile(pool, backend="aot_eager", fullgraph=True)
    for got, right in zip(step(compiled, books, weights), step(pool, books, weights), strict=True):
        assert torch.equal(got, right)


def step(pool, books, weights):
    out = pool(books, weights)
    return [out, *torch.autograd.grad(out.sin().sum(), (books, weights))]
