"""The C++ kernels of `codebook_bag`: values, gradients, errors, determinism, registration."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.made import Made
from tests.ops.bags import check, random_codes
from torchrec_compress.ops import code_dtype, codebook_bag, num_escape_codes, pack_codes
from torchrec_compress.ops.cpp import build
from torchrec_compress.ops.dispatch import cpp_serves
from torchrec_compress.ops.reference import reference_codebook_bag

STRUCTURES = ["product", "residual"]


def has_compiler() -> bool:
    """Whether this machine can build the kernels."""
    try:
        return bool(build.find_compiler())
    except build.CannotBuild:
        return False


pytestmark = [
    pytest.mark.usefixtures("kernels", "poisoned_memory"),
    pytest.mark.skipif(not has_compiler(), reason="no C++ compiler"),
]


@pytest.fixture(scope="module")
def kernels():
    """Take the C++ kernels, whatever the suite runs on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHREC_COMPRESS_BACKEND", "cpp")
        assert cpp_serves()
        yield


def lengths_of(num_bags: int) -> list[int]:
    """Bags of 0, 1 and more ids, the longest of 40."""
    return [(0, 1, 2, 1, 3, 0, 40 if bag % 60 == 6 else 1)[bag % 7] for bag in range(num_bags)]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("size", [2, 16, 255, 256, 4096])
@pytest.mark.parametrize("width", [2, 4, 5, 8, 10, 16, 32, 40])
def test_widths_and_codebook_sizes(width, size, structure):
    lengths = lengths_of(20)
    width = width * 3 if structure == "residual" else width
    num_hot = 5 if size > 2 else 0
    check(sum(lengths), lengths, 11, size, width, structure, num_hot, True, torch.float32)


@pytest.mark.parametrize("num_hot", [0, 7])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("width", [5, 8])
@pytest.mark.parametrize(("dtype", "size"), [(torch.int16, 200), (torch.int32, 200), (torch.int32, 40000)])
def test_types_of_codes(dtype, size, width, structure, num_hot):
    lengths = lengths_of(63)
    check(sum(lengths), lengths, 3, size, width, structure, num_hot, True, torch.float32, codes_as=dtype)


@pytest.mark.parametrize("num_hot", [0, 1])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("width", [5, 8])
@pytest.mark.parametrize("size", [2, 11, 16])
@pytest.mark.parametrize("num_codes", [1, 2, 7, 16, 33])
def test_packed_codes(num_codes, size, width, structure, num_hot):
    lengths = lengths_of(63)
    check(sum(lengths), lengths, num_codes, size, width, structure, num_hot, True, torch.float32, packed=True)


@pytest.mark.parametrize("num_hot", [0, 300])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("num_bags", [0, 1, 3, 63, 1000])
def test_numbers_of_bags(num_bags, structure, num_hot):
    lengths = lengths_of(num_bags)
    check(sum(lengths), lengths, 4, 256, 8, structure, num_hot, num_hot > 0, torch.float32)


@pytest.mark.parametrize("num_hot", [0, 7])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_bags_longer_than_a_window(structure, num_hot):
    """Codes are gathered 128 positions at a time; a bag begins and ends in any of them, or fills several."""
    lengths = [3, 125, 128, 300, 0, 129, 1, 111]
    check(sum(lengths), lengths, 4, 16, 8, structure, num_hot, True, torch.float32)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_id_is_a_bag_without_offsets(structure, weighted, index_dtype):
    check(63, None, 16, 256, 8, structure, 0, weighted, torch.float32)
    check(63, [63], 16, 256, 8, structure, 0, weighted, torch.float32, index_dtype)
    check(0, None, 16, 256, 8, structure, 0, weighted, torch.float32)


@pytest.mark.parametrize("num_codes", [16, 15])
def test_outputs_that_no_cache_holds(num_codes):
    """From 32 MiB on the kernels write past the caches, where rows are aligned to 64 bytes: 128 wide, not 120."""
    codes = torch.randint(256, (70_001, num_codes), dtype=torch.uint8)
    books = torch.randn(num_codes * 256, 8)
    whole = codebook_bag(codes, books, None)
    assert whole.nbytes >= 32 << 20
    parts = [codebook_bag(codes[first : first + 9000], books, None) for first in range(0, len(codes), 9000)]
    assert torch.equal(whole, torch.cat(parts))


@given(
    lengths=st.lists(st.integers(0, 5), min_size=0, max_size=6),
    num_codes=st.integers(1, 9),
    size=st.integers(2, 300),
    width=st.integers(1, 17),
    structure=st.sampled_from(STRUCTURES),
    num_hot=st.integers(0, 40),
    weighted=st.booleans(),
)
def test_any_jagged_batch(lengths, num_codes, size, width, structure, num_hot, weighted):
    if num_escape_codes(num_hot, num_codes, size) >= size:
        num_hot = 0
    check(sum(lengths), lengths, num_codes, size, width, structure, num_hot, weighted, torch.float32)


def inputs(structure="product", size=256, num_hot=300, num_bags=1000, num_codes=6):
    """Return codes, codebooks, offsets, weights, hot rows; long enough bags for two threads to share."""
    offsets = torch.tensor([0, *(25 * length for length in lengths_of(num_bags))]).cumsum(0)
    codes = random_codes(int(offsets[-1]), num_codes, size, num_hot).to(code_dtype(size))
    dim = 8 * num_codes if structure == "product" else 40
    books = torch.randn(num_codes * size, 8 if structure == "product" else dim, requires_grad=True)
    hot = torch.randn(num_hot, dim, requires_grad=True) if num_hot else None
    return codes, books, offsets, torch.randn(len(codes), requires_grad=True), hot


def run(function, structure, codes, books, offsets, weights, hot):
    out = function(codes, books, offsets, structure=structure, weights=weights, hot_rows=hot)
    upstream = torch.arange(out.numel()).view(out.shape).sin()
    return [out, *torch.autograd.grad(out, (books, weights, hot), upstream)]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_two_threads_give_the_bits_of_one(structure):
    given_inputs = inputs(structure)
    one = run(codebook_bag, structure, *given_inputs)
    torch.set_num_threads(2)
    try:
        two = run(codebook_bag, structure, *given_inputs)
        again = run(codebook_bag, structure, *given_inputs)
    finally:
        torch.set_num_threads(1)
    for a, b, c in zip(one, two, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_nothing_is_larger_than_inputs_and_outputs(structure):
    codes, books, offsets, weights, hot = inputs(structure, num_hot=20, size=16)
    with Made() as made:
        out, *_ = run(codebook_bag, structure, codes, books, offsets, weights, hot)
    assert len(codes) * out.shape[1] > 10 * out.numel()
    assert max(made.floats + made.integers)[0] <= max(out.numel(), codes.numel())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_are_only_taken_where_they_are_asked_for(structure):
    codes, books, offsets, weights, hot = inputs(structure, num_bags=30)
    grads = run(codebook_bag, structure, codes, books, offsets, weights, hot)[1:]
    for chosen, expected in zip((books, weights, hot), grads, strict=True):
        parts = [tensor if tensor is chosen else tensor.detach() for tensor in (books, weights, hot)]
        out = codebook_bag(codes, parts[0], offsets, structure=structure, weights=parts[1], hot_rows=parts[2])
        (got,) = torch.autograd.grad(out, chosen, torch.arange(out.numel()).view(out.shape).sin())
        assert torch.equal(got, expected)


def test_codebooks_may_change_between_forward_and_backward():
    # as with F.embedding_bag: without a gradient of weights only indices are kept
    codes, books, offsets, _, _ = inputs(num_hot=0, num_bags=10)
    out = codebook_bag(codes, books, offsets)
    with torch.no_grad():
        books.mul_(2)
    out.sum().backward()


def test_inputs_of_any_stride_and_shared_upstream():
    codes, books, offsets, weights, _ = inputs(num_hot=0, num_bags=30)
    mixed = codebook_bag(
        codes.t().contiguous().t(), books.t().contiguous().t(), offsets.int(), weights=weights.repeat(2)[::2]
    )
    plain = codebook_bag(codes, books, offsets, weights=weights.repeat(2)[::2].contiguous())
    assert torch.equal(mixed, plain)
    # the gradient of sum() is one number, expanded
    assert torch.equal(*(torch.autograd.grad(out.sum(), books)[0] for out in (mixed, plain)))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_of_concatenated_outputs_are_read_in_place(structure):
    codes, books, offsets, weights, hot = inputs(structure, num_bags=30)

    def pooled():
        return codebook_bag(codes, books, offsets, structure=structure, weights=weights, hot_rows=hot)

    width = pooled().shape[1]
    upstream = torch.randn(30, 3 + 2 * width)
    columns = torch.cat([torch.zeros(30, 3), pooled(), pooled()], dim=1)
    plain = upstream[:, 3 : 3 + width].contiguous(), upstream[:, 3 + width :].contiguous()
    expected = [torch.autograd.grad(pooled(), (books, weights, hot), grad) for grad in plain]
    for got, first, second in zip(
        torch.autograd.grad(columns, (books, weights, hot), upstream), *expected, strict=True
    ):
        torch.testing.assert_close(got, first + second)
    # columns that are not side by side are copied
    got = torch.autograd.grad(pooled(), books, plain[0].t().contiguous().t())
    assert torch.equal(got[0], expected[0][0])


@pytest.mark.parametrize(
    ("codes", "num_hot"),
    [
        (torch.tensor([[0, 1], [2, 3], [255, 1]], dtype=torch.uint8), 0),
        (torch.tensor([[0, 1], [2, -1], [0, 1]], dtype=torch.int16), 0),
        (torch.tensor([[0, 1], [2, 1], [0, 254]], dtype=torch.int16), 0),
        (torch.tensor([[0, 1], [2, 1], [0, 254]], dtype=torch.int32), 0),
        (torch.tensor([[0, 1], [2, 1], [-(2**31), 0]], dtype=torch.int32), 0),
        # 254 is the one escape code, and the hot rows are 0 to 6
        (torch.tensor([[0, 1], [2, 1], [253, 7]], dtype=torch.uint8), 7),
    ],
)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_codes_out_of_range_are_errors(codes, num_hot, structure):
    width = 4 if structure == "product" else 8
    hot = torch.zeros(num_hot, 8) if num_hot else None
    with pytest.raises(ValueError, match="every code must be in \\[0, 254\\)"):
        codebook_bag(codes, torch.zeros(508, width), None, structure=structure, hot_rows=hot)


@pytest.mark.parametrize("num_codes", [3, 4])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_packed_codes_out_of_range_are_errors(num_codes, place):
    codes = torch.zeros(200, num_codes, dtype=torch.uint8)
    codes[150, place] = 11
    with pytest.raises(ValueError, match=r"every code must be in \[0, 11\).* at position 150"):
        codebook_bag(pack_codes(codes), torch.zeros(11 * num_codes, 4), None, num_packed=num_codes)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_packed_escape_codes_that_lead_nowhere_are_errors(structure):
    # 15 is the one escape code, and the hot rows are 0 to 6
    codes = pack_codes(torch.tensor([[0, 1], [15, 7], [15, 0]]))
    width = 4 if structure == "product" else 8
    with pytest.raises(ValueError, match=r"every escape code a hot row in \[0, 7\), got another at position 1"):
        codebook_bag(codes, torch.zeros(32, width), None, structure=structure, hot_rows=torch.zeros(7, 8), num_packed=2)


@pytest.mark.parametrize(
    ("codes", "num_packed", "size", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.int16), 4, 16, "packed codes must be uint8"),
        (torch.zeros(3, 2, dtype=torch.uint8), 4, 17, "packed codes must be of at most 16 codewords, got 17"),
    ],
)
def test_packed_codes_of_another_kind_are_errors(codes, num_packed, size, message):
    with pytest.raises(ValueError, match=message):
        codebook_bag(codes, torch.zeros(size * num_packed, 4), None, num_packed=num_packed)


@pytest.mark.parametrize("code", [-1, -(2**15)])
@pytest.mark.parametrize("size", [40000, 70000])
def test_negative_codes_are_errors_where_codebooks_are_larger_than_their_type(size, code):
    codes = torch.tensor([[0], [2], [code]], dtype=torch.int16)
    with pytest.raises(ValueError, match=f"every code must be in \\[0, {size}\\).* at position 2"):
        codebook_bag(codes, torch.zeros(size, 4), None)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 2, 1, 3], "must not decrease"),
        ([0, 9, 3], "must not decrease"),
        ([-1, 3], "must start with 0"),
        ([1, 3], "must start with 0"),
        ([0, 2], "must end with the number of ids, 3"),
        ([0, 4], "must end with the number of ids, 3"),
        ([0], "must end with the number of ids, 3"),
        ([], r"of shape|got \[\]"),
    ],
)
def test_offsets_that_do_not_fit_are_errors(offsets, message):
    codes = torch.zeros(3, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        codebook_bag(codes, torch.zeros(8, 4), torch.tensor(offsets, dtype=torch.int64))


@pytest.mark.parametrize(
    ("books", "weights", "hot", "message"),
    [
        ((7, 4), None, None, "same number of codewords"),
        ((0, 4), None, None, "at least one"),
        ((8, 4), 2, None, "one per id, 3"),
        ((8, 4), None, (1, 7), "hot_rows must be 8 wide"),
        ((8, 4), None, (100, 8), "at most what"),
        ((8,), None, None, "2 dimensions"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(books, weights, hot, message):
    codes = torch.zeros(3, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        codebook_bag(
            codes,
            torch.zeros(books),
            None,
            weights=None if weights is None else torch.ones(weights),
            hot_rows=None if hot is None else torch.ones(hot),
        )


@pytest.mark.parametrize("structure", STRUCTURES)
def test_operators_are_registered_as_torch_expects(structure):
    codes, books, offsets, weights, hot = inputs(structure, num_bags=7, num_codes=3, size=16, num_hot=9)
    ops, residual = torch.ops.torchrec_compress, int(structure == "residual")
    table, ids = codes[:20].contiguous(), torch.randint(0, 20, (len(codes),))
    # two look-ups of one table: one by ids, one of gathered codes
    plan, bags = [0, 0, residual, 0, 0, 0, residual + 4, 0], [0, 7, 0, 7]
    both, where = [table, codes], "table 't'\ntable 't'"
    for factors in (None, weights):
        leaves = ([books], [hot], ids, offsets, factors)
        torch.library.opcheck(ops.codebook_bags.default, (both, *leaves, plan, bags, 4, False, where))
    torch.library.opcheck(
        ops.codebook_bags.default, ([codes], [books], [hot], None, None, None, plan[4:], [0, len(codes)], 0, True, "t")
    )
    books, weights, hot = [tensor.detach() for tensor in (books, weights, hot)]
    grad, saved = torch.ones(7, 2 * hot.shape[1]), torch.zeros(len(codes), 4, dtype=torch.uint8)
    sizes = ([*books.shape], [len(hot)], [1, 1])
    layout = (plan, bags, False)
    torch.library.opcheck(ops.codebook_bags_backward.default, (grad, both, saved, offsets, weights, *layout, *sizes))
    torch.library.opcheck(
        ops.codebook_bags_backward_weights.default, (grad, both, saved, [books], [hot], offsets, weights, *layout)
    )
    torch.library.opcheck(ops.code_gather.default, (table, ids, 8, "table 't'"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    compiled = torch.compile(codebook_bag, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for num_bags in (7, 20):
        given_inputs = inputs(num_bags=num_bags)
        eager = run(codebook_bag, "product", *given_inputs)
        for got, expected in zip(run(compiled, "product", *given_inputs), eager, strict=True):
            assert torch.equal(got, expected)


def test_exports():
    class Lookup(torch.nn.Module):
        def __init__(self, books):
            super().__init__()
            self.books = torch.nn.Parameter(books)

        def forward(self, codes, offsets):
            return codebook_bag(codes, self.books, offsets)

    codes, books, offsets, _, _ = inputs(num_bags=9, num_hot=0)
    ids, bags = torch.export.Dim("ids"), torch.export.Dim("bags", min=3)
    program = torch.export.export(
        Lookup(books.detach()), (codes, offsets), dynamic_shapes={"codes": {0: ids}, "offsets": {0: bags}}
    )
    assert "torchrec_compress.codebook_bags" in str(program.graph)
    more, _, longer, _, _ = inputs(num_bags=20, num_hot=0)
    assert torch.equal(program.module()(more, longer), codebook_bag(more, books, longer))


def test_other_inputs_go_to_the_reference():
    codes, books, offsets, weights, hot = inputs(num_bags=9)
    for other, words in ((codes.long(), books), (codes, books.detach().double())):
        got = codebook_bag(other, words, offsets, weights=weights, hot_rows=hot)
        assert torch.equal(got, reference_codebook_bag(other, words, offsets, "product", weights, hot))
