"""What no kernel may be given: an argument of the wrong type, shape, length or device is a ValueError on every tier."""

import pytest
import torch

from tests.ops.test_codebook_bags import BACKENDS
from torchrec_compress.ops import (
    BagLookup,
    IdBags,
    Span,
    TableRows,
    code_gather,
    codebook_bag,
    codebook_bags,
    dequantize_rows,
    first_infinite,
    lookup_codes,
    low_bit_bag,
    pool_rows,
    pool_table,
    quantize_rows,
)

every_tier = pytest.mark.parametrize("backend", BACKENDS)
# what each argument must be, as errors say it
WORDS = {
    "codes": r"codes must .*shape \(rows, M\), M at least 1",
    "codebooks": r"codebooks must ",
    "hot_rows": r"hot_rows must ",
    "ids": r"ids must be int32 or int64 with 1 dimension",
    "offsets": r"offsets must be int32 or int64 with 1 dimension",
    "weights": r"weights must be (floating point|one per id|float32 with 1 dim)",
}


def right():
    """Return arguments of `codebook_bag` that fit."""
    return {
        "codes": torch.tensor([[0, 1], [1, 0], [1, 1]], dtype=torch.uint8),
        "codebooks": torch.arange(12.0).view(6, 2),
        "offsets": torch.tensor([0, 2, 3]),
        "weights": torch.ones(3),
        "hot_rows": torch.ones(1, 4),
        "ids": torch.tensor([0, 2, 1]),
    }


WRONG = [
    ("codes", lambda codes: codes.float()),
    ("codes", lambda codes: codes.bool()),
    ("codes", lambda codes: codes.view(-1)),
    ("codes", lambda codes: codes.view(3, 2, 1)),
    ("codes", lambda codes: codes[:, :0]),
    ("codebooks", lambda books: books.view(-1)),
    ("codebooks", lambda books: books.int()),
    ("codebooks", lambda books: books * 1j),
    ("codebooks", lambda books: books[:5]),
    ("codebooks", lambda books: books[:0]),
    ("hot_rows", lambda rows: rows.view(-1)),
    ("hot_rows", lambda rows: rows[:, :3]),
    ("hot_rows", lambda rows: rows.repeat(50, 1)),
    *(("ids", lambda ids, kind=kind: ids.to(kind)) for kind in (torch.int16, torch.uint8, torch.float32, torch.bool)),
    ("ids", lambda ids: ids.unsqueeze(1)),
    *(("offsets", lambda offsets, kind=kind: offsets.to(kind)) for kind in (torch.int16, torch.float32)),
    ("offsets", lambda offsets: offsets.unsqueeze(1)),
    *(("weights", lambda weights, kind=kind: weights.to(kind)) for kind in (torch.int64, torch.bool, torch.complex64)),
    *(("weights", lambda weights, shape=shape: torch.ones(shape)) for shape in (0, 1, 2, 4, 9, (3, 1), (1, 3))),
]


@every_tier
@pytest.mark.parametrize(("name", "spoil"), WRONG, ids=[f"{name}-{number}" for number, (name, _) in enumerate(WRONG)])
@pytest.mark.parametrize("structure", ["product", "residual"])
def test_codes(backend, structure, name, spoil):
    given = right()
    if structure == "residual":
        given["hot_rows"] = torch.ones(1, 2)
        if name == "hot_rows" and spoil(given[name]).shape == given[name].shape:
            return
    given[name] = spoil(given[name])
    codes, codebooks, offsets = (given.pop(key) for key in ("codes", "codebooks", "offsets"))
    with pytest.raises(ValueError, match=WORDS[name]):
        codebook_bag(codes, codebooks, offsets, structure=structure, **given, backend=backend)


@every_tier
def test_gathered_codes_are_one_row_per_id(backend):
    codes, books = right()["codes"], right()["codebooks"]
    for num_weights in (0, 1, 2, 4):
        for offsets in (None, torch.tensor([0, 2, 3])):
            with pytest.raises(ValueError, match=r"must be one per id|must end with the number of ids"):
                codebook_bag(codes, books, offsets, weights=torch.ones(num_weights), backend=backend)
    with pytest.raises(ValueError, match="must end with the number of ids"):
        codebook_bag(codes, books, torch.tensor([0, 2]), backend=backend)
    lookup, span = BagLookup(0, "t", "table 't'"), Span(0, 2, 0, 2, is_gathered=True)
    wanted = r"codes must be one row per id, 2, got|must end with the number of ids|must be among"
    for rows in (codes, codes[:1]):
        for offsets in (None, torch.tensor([0, 1, 2])):
            with pytest.raises(ValueError, match=wanted):
                codebook_bags([lookup], [span], [rows], [books], [None], IdBags(None, offsets), backend)


@every_tier
@pytest.mark.parametrize("name", list(right()))
def test_a_tensor_without_memory_is_no_question_about_shapes(backend, name):
    """With one tensor on the meta device torch asks for the shape of the output, whose memory nobody writes."""
    given = right()
    given[name] = given[name].to("meta")
    codes, codebooks, offsets = (given.pop(key) for key in ("codes", "codebooks", "offsets"))
    with pytest.raises(ValueError, match=r"all tensors must be on one device, got .* on meta.*; move them to one"):
        codebook_bag(codes, codebooks, offsets, **given, backend=backend)


ROWS = {dtype: quantize_rows(torch.linspace(-1, 1, 32).view(4, 8), dtype) for dtype in ("int8", "int4")}


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        *(
            ("ids", torch.tensor([0, 1, 2]).to(kind), "ids must be")
            for kind in (torch.int16, torch.bool, torch.float32)
        ),
        ("ids", torch.tensor([[0], [1], [2]]), "ids must be int32 or int64 with 1 dim"),
        ("ids", torch.tensor([0, 4, 1]), r"every id must be in \[0, 4\), got 4"),
        ("ids", torch.tensor([0, -1, 1]), r"every id must be in \[0, 4\), got -1"),
        ("offsets", torch.tensor([0.0, 2.0, 3.0]), "offsets must be int32 or int64"),
        ("offsets", torch.tensor([[0], [2], [3]]), "offsets must be int32 or int64"),
        ("offsets", torch.tensor([0, 2, 9]), "must end with the number of ids, 3"),
        ("offsets", torch.tensor([0, 2, 1, 3]), "must not decrease"),
        *(("weights", torch.ones(shape), "one per id, 3") for shape in (0, 1, 2, 4, (3, 1))),
        ("weights", torch.ones(3, dtype=torch.int64), "weights must be floating point"),
        *((name, torch.ones(3, device="meta", dtype=torch.int64), "one device") for name in ("ids", "offsets")),
        ("weights", torch.ones(3, device="meta"), "one device"),
    ],
)
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_low_bit_rows(dtype, name, wrong, message):
    given = {"ids": torch.tensor([0, 1, 2]), "offsets": torch.tensor([0, 2, 3]), "weights": torch.ones(3), name: wrong}
    with pytest.raises(ValueError, match=message):
        low_bit_bag(ROWS[dtype], dtype, **given)


def test_a_compiled_graph_looks_at_its_batches_too():
    compiled = torch.compile(
        lambda *given: low_bit_bag(ROWS["int8"], "int8", given[0], ids=given[1], weights=given[2]),
        backend="aot_eager",
        dynamic=True,
    )
    offsets, ids, weights = torch.tensor([0, 2, 3, 3]), torch.tensor([0, 1, 2]), torch.ones(3)
    compiled(offsets, ids, weights)
    for wrong, message in (
        ((offsets, ids - 1, weights), r"low_bit_bag: every id must be in \[0, 4\), got -1"),
        ((offsets, ids + 2, weights), r"low_bit_bag: every id must be in \[0, 4\), got 4"),
        ((torch.tensor([0, 2, 1, 3]), ids, weights), "must not decrease"),
        ((torch.tensor([0, 2, 3, 9]), ids, weights), "must end with the number of ids, 3"),
        ((offsets, ids, torch.ones(5)), "one per id, 3"),
    ):
        with pytest.raises(ValueError, match=message):
            compiled(*wrong)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_rows_that_are_no_low_bit_rows(dtype):
    rows, ids = ROWS[dtype], torch.tensor([0])
    for wrong in (rows.float(), rows.view(torch.int8), rows.int(), rows.view(-1), rows[:, :3], rows[:, :4]):
        with pytest.raises(ValueError, match="low-bit rows: must be uint8"):
            low_bit_bag(wrong, dtype, None, ids=ids)
        with pytest.raises(ValueError, match="low-bit rows: must be uint8"):
            dequantize_rows(wrong, dtype)
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        low_bit_bag(rows.to("meta"), dtype, torch.tensor([0, 1]), ids=ids)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_rows_are_quantised_from_float32(dtype):
    rows = torch.linspace(-1, 1, 32).view(4, 8)
    for kind in (torch.float64, torch.float16, torch.bfloat16):
        given = rows.to(kind)
        assert torch.equal(quantize_rows(given, dtype), quantize_rows(given.float(), dtype))
    for wrong in (rows.int(), rows.view(-1), rows[:, :7], rows[:, :0], rows * 1j):
        with pytest.raises(ValueError, match="quantize_rows: rows must be floating point of shape"):
            quantize_rows(wrong, dtype)


@every_tier
def test_rows_of_a_table(backend):
    rows, offsets = TableRows(torch.ones(4, 2), torch.tensor([0, 1, 3])), torch.tensor([0, 2, 3])
    for wrong in (torch.ones(1), torch.ones(3, 1), torch.ones(3).int(), torch.ones(3, device="meta")):
        with pytest.raises(ValueError, match=r"one per id, 3|floating point|one device"):
            pool_table(rows, offsets, wrong, backend)
        with pytest.raises(ValueError, match=r"one per id, 3|floating point|one device"):
            pool_rows(torch.ones(3, 2), offsets, wrong)
    for kind in (torch.float64, torch.float16):
        assert torch.equal(pool_table(rows, offsets, torch.ones(3, dtype=kind), backend), pool_table(rows, offsets))
    for wrong in ([1, 3], [0, 2], [0, 2, 1, 3], [0, 9]):
        with pytest.raises(ValueError, match="offsets must"):
            pool_table(rows, torch.tensor(wrong), None, backend)
        with pytest.raises(ValueError, match="offsets must"):
            pool_rows(torch.ones(3, 2), torch.tensor(wrong))


@every_tier
def test_gathered_rows(backend):
    codes, ids = right()["codes"], right()["ids"]
    is_set = torch.ones(1, dtype=torch.uint8)
    for wrong_codes, wrong_ids in (
        (codes.view(-1), ids),
        (codes, ids.unsqueeze(1)),
        (codes, ids.short()),
        (codes, ids.to("meta")),
        (codes.to("meta"), ids),
    ):
        with pytest.raises(ValueError, match=r"^t: (codes must have 2|all tensors must be on|ids must be int32)"):
            code_gather(wrong_codes, wrong_ids, "t", backend=backend)
        with pytest.raises(ValueError, match=r"^t: (codes must have 2|all tensors must be on|ids must be int32)"):
            lookup_codes(wrong_codes, is_set, wrong_ids, "t")


@pytest.mark.parametrize("at", [0, 65535, 65536])
def test_the_first_row_that_would_be_infinite_is_found_by_blocks(at):
    values = torch.zeros(70001, 2)
    assert first_infinite(values, torch.float16) is None
    values[at, 1], values[at, 0], values[-1, 0] = -7e4, torch.inf, 8e4
    assert first_infinite(values, torch.float16) == (at, 7e4)
    assert first_infinite(values, torch.bfloat16) is None and first_infinite(values.half(), torch.float32) is None
