"""The CUDA kernels without a GPU: run on the CPU by an emulator, and compiled by NVRTC for real ones."""

import dataclasses

import pytest
import torch

from tests.ops.gpu.cases import LARGE, SMALL, Case, check, draw
from tests.ops.gpu.emulator import DEVICE, Emulator
from torchrec_compress.ops.cpp import build
from torchrec_compress.ops.gpu import cuda_kernels, program
from torchrec_compress.ops.gpu.lookup import pool_on_gpu
from torchrec_compress.ops.gpu.operators import codebook_bags_gpu, codebook_bags_gpu_backward
from torchrec_compress.ops.gpu.plan import Device, gradient_plan, pool_plan
from torchrec_compress.ops.gpu.program import CannotCompile, Program, Signature, compile_program
from torchrec_compress.ops.gpu.task import Task


def _has_compiler() -> bool:
    try:
        return bool(build.find_compiler())
    except build.CannotBuild:
        return False


needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="no C++ compiler to emulate with")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulator")


@pytest.fixture
def emulate(folder, monkeypatch, poisoned_memory):
    def use(**options) -> Emulator:
        emulator = Emulator(folder, **options)
        monkeypatch.setattr(cuda_kernels, "driver_of", lambda index: emulator)
        return emulator

    return use


@needs_compiler
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("name", SMALL)
def test_values_and_gradients(name, reverse, emulate):
    emulate(reverse=reverse)
    check(SMALL[name], "cuda")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_values_and_gradients_of_large_cases(name, emulate):
    emulate(reverse=True)
    check(LARGE[name], "cuda")


def _sizes(emulator: Emulator, kernel: str) -> dict:
    return next(dict(program.sizes) for name, _, program in emulator.launched if name == kernel)


@needs_compiler
def test_long_bags_are_served_from_shared_memory_and_short_ones_are_not(emulate):
    emulator = emulate()
    check(LARGE["long bags"], "cuda")
    assert _sizes(emulator, "codebook_bag_forward")["STAGED"] == 1
    emulator = emulate()
    check(SMALL["plain"], "cuda")
    assert _sizes(emulator, "codebook_bag_forward")["STAGED"] == 0


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
def test_codebooks_that_fill_shared_memory_are_cut(dtype, reverse, emulate):
    small = Device((9, 0), num_sms=2, block_bytes=20_000, sm_bytes=30_000)
    emulator = emulate(device=small, reverse=reverse)
    check(Case(num_codes=8, size=64, width=8, lengths=((900, 700, 0, 1),), dtype=dtype, num_hot=5), "cuda")
    # forward: groups of columns; backward: pieces of columns and of codewords
    sizes = _sizes(emulator, "codebook_bag_forward")
    assert (sizes["STAGED"], sizes["BLOCK_COLUMNS"]) == (1, 32 if dtype == torch.float32 else 64)
    assert _sizes(emulator, "codebook_bag_backward")["TILE_ROWS"] < 64


@needs_compiler
def test_chunks_of_bags_are_added_up(emulate):
    emulator = emulate(device=dataclasses.replace(DEVICE, num_sms=7))
    check(Case(lengths=((1, 0, 2) * 50, (0, 1, 0) * 40), tables=((0,), (1, 0)), is_flat=True, weighted=True), "cuda")
    grids = [grid for name, grid, _ in emulator.launched if name == "codebook_bag_backward"]
    assert grids and grids[0][0] > 1


@needs_compiler
def test_codes_and_outputs_that_are_not_aligned(emulate):
    emulate()
    storage = torch.randint(0, 16, (1 + 16 * 30,), dtype=torch.uint8)
    codes, books = storage[1:].view(30, 16), torch.randn(1 + 16 * 16 * 8)[1:].view(16 * 16, 8)
    inputs = ([codes], [books], [], None, None, None, [0, -1, 4], [0, 30, 0, 30], False, "cuda")
    out = codebook_bags_gpu(*inputs)
    words = codes.long() + 16 * torch.arange(16)
    assert torch.equal(out, books[words].view(30, 128))


def _inputs(codes=None, ids=None, offsets=None, hot=0, num_ids=3):
    codes = torch.zeros(3, 2, dtype=torch.uint8) if codes is None else codes
    books, rows = torch.randn(2 * 4, 4), [torch.randn(hot, 8)] if hot else []
    num_bags = num_ids if offsets is None else len(offsets) - 1
    plan = [0, 0 if hot else -1, 4 if ids is None else 0]
    return [codes], [books], rows, ids, offsets, None, plan, [0, num_bags, 0, num_ids], False, "cuda"


@needs_compiler
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"codes": torch.tensor([[0, 1], [4, 0], [0, 0]], dtype=torch.uint8)}, "every code must be below"),
        ({"codes": torch.tensor([[0, 1], [-1, 0], [0, 0]], dtype=torch.int16)}, "every code must be below"),
        ({"codes": torch.tensor([[0, 1], [3, 3], [0, 0]], dtype=torch.uint8), "hot": 3}, "escape code must be a hot"),
        ({"ids": torch.tensor([0, 3, 1])}, "every id must be a row"),
        ({"ids": torch.tensor([0, -1, 1])}, "every id must be a row"),
        ({"offsets": torch.tensor([0, 2, 1, 3])}, "offsets must not decrease"),
        ({"offsets": torch.tensor([0, 9, 3])}, "offsets must not decrease"),
        ({"offsets": torch.tensor([1, 3])}, "offsets must start with"),
        ({"offsets": torch.tensor([0, 2])}, "offsets must start with"),
    ],
)
def test_values_that_do_not_fit_are_assertions_on_the_device(inputs, message, emulate):
    emulate()
    with pytest.raises(RuntimeError, match=message):
        codebook_bags_gpu(*_inputs(**inputs))


def test_shapes_that_do_not_fit_are_errors():
    inputs = list(_inputs())
    inputs[1] = [torch.randn(7, 4)]
    with pytest.raises(ValueError, match="same number of codewords, at least one, for each of 2 codes, got 7"):
        codebook_bags_gpu(*inputs)
    inputs = list(_inputs(hot=3))
    inputs[2] = [torch.randn(3, 7)]
    with pytest.raises(ValueError, match="hot_rows must be 8 wide, got 7"):
        codebook_bags_gpu(*inputs)
    with pytest.raises(ValueError, match="escapes reach, got 17"):
        codebook_bags_gpu(*_inputs(hot=17))


def _task(**given) -> Task:
    whole = {
        "codes": torch.zeros(3, 2, dtype=torch.uint8), "codebooks": torch.zeros(8, 4), "hot_rows": None, "ids": None,
        "offsets": None, "weights": None, "num_bags": 3, "first_id": 0, "num_ids": 3, "residual": False, "mean": False,
    }  # fmt: skip
    return Task(**{**whole, **given})


@pytest.mark.parametrize("name", ["codes", "hot_rows", "ids", "offsets", "weights"])
def test_a_tensor_of_another_device_is_an_error_and_no_wild_address(name):
    with pytest.raises(ValueError, match=f"{name} must be on cpu as the codebooks are, got meta; move it there"):
        _task(**{name: torch.zeros(4, 2, device="meta")}).check()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ids": torch.tensor([0, 1])}, "ids must be at least 3, got 2"),
        ({"weights": torch.zeros(3), "first_id": 1}, "weights must be at least 4, got 3"),
        ({"num_ids": 4, "num_bags": 4}, "there must be codes of 4 ids, got 3"),
        ({"num_bags": 4}, "there must be 4 bags, got 3"),
        ({"offsets": torch.tensor([0, 1, 3])}, "there must be 3 bags, got 2"),
        ({"codes": torch.zeros(2, 3, dtype=torch.uint8).t()}, "codes must be contiguous and torch.uint8 or .* strides"),
        ({"codebooks": torch.zeros(4, 8).t()}, "codebooks must be contiguous and torch.float32"),
        ({"weights": torch.ones(1).expand(3)}, "weights must be contiguous and torch.float32"),
        ({"weights": torch.ones(3).double()}, "weights must be contiguous and torch.float32, got torch.float64"),
        ({"hot_rows": torch.zeros(1, 8).half()}, "hot_rows must be contiguous and torch.float32, got torch.float16"),
        ({"ids": torch.zeros(3)}, "ids must be contiguous and torch.int32 or torch.int64, got torch.float32"),
        ({"offsets": torch.arange(8)[::2]}, "offsets must be contiguous and torch.int32 or torch.int64"),
    ],
)
def test_inputs_that_end_too_early_are_errors_and_no_wild_addresses(given, message):
    with pytest.raises(ValueError, match=message):
        _task(**given).check()


@needs_compiler
def test_hot_rows_of_which_there_are_none_start_no_kernel(emulate):
    emulator = emulate()
    inputs = list(_inputs(offsets=torch.tensor([0, 2, 3])))
    inputs[2], inputs[6] = [torch.randn(0, 8)], [0, 0, 4]
    inputs[1] = [inputs[1][0].requires_grad_()]
    inputs[2] = [inputs[2][0].requires_grad_()]
    codebook_bags_gpu(*inputs).sum().backward()
    assert inputs[2][0].grad.shape == (0, 8)
    assert "codebook_bag_sum_hot_rows" not in [kernel for kernel, _, _ in emulator.launched]


@needs_compiler
def test_the_gradient_of_weights_takes_no_more_memory_than_the_weights(emulate, monkeypatch):
    emulate()
    given = draw(Case(lengths=((1, 0, 2),) * 9, tables=tuple((0,) for _ in range(9)), weighted=True), "cpu")
    out = pool_on_gpu(given.lookups, given.spans, given.codes, given.books, given.hot, given.batch, "cuda")
    made, new_empty = [], torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *given, **named: made.append(new_empty(*given, **named)) or made[-1]
    )
    out.sum().backward()
    assert sum(tensor.numel() for tensor in made if tensor.dim() == 1) == 27


@needs_compiler
def test_the_bits_do_not_depend_on_the_order_of_threads(emulate):
    codes, books = torch.randint(0, 16, (900, 4), dtype=torch.uint8), torch.randn(64, 4)
    spans, found = [0, 30, 0, 900], []
    offsets, weights, grad = torch.arange(0, 901, 30), torch.randn(900), torch.randn(30, 16)
    for reverse in (False, True):
        emulate(reverse=reverse)
        inputs = ([codes], [books], [], None, offsets, weights, [0, -1, 4], spans, False, "cuda")
        of_books, _, of_weights = codebook_bags_gpu_backward(grad, *inputs, [64, 4], [], [True, True])
        found.append((codebook_bags_gpu(*inputs), of_books[0], of_weights))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


@needs_compiler
def test_operators_are_registered_as_torch_expects(emulate):
    emulate()
    inputs = list(_inputs(offsets=torch.tensor([0, 2, 3]), hot=3))
    inputs[1], inputs[2] = [inputs[1][0].requires_grad_()], [inputs[2][0].requires_grad_()]
    inputs[5] = torch.randn(3, requires_grad=True)
    torch.library.opcheck(torch.ops.torchrec_compress.codebook_bags_gpu.default, tuple(inputs))
    inputs[1], inputs[2] = [inputs[1][0].detach()], [inputs[2][0].detach()]
    inputs[5] = inputs[5].detach()
    backward = (torch.randn(2, 8), *inputs, [8, 4], [3], [True, False, True])
    torch.library.opcheck(torch.ops.torchrec_compress.codebook_bags_gpu_backward.default, backward)


SIGNATURE = Signature(16, 256, 8, False, torch.uint8, torch.bfloat16, torch.int64, torch.int64, False, False, False)
VARIANTS = {
    "benchmark": {},
    "float32": {"word": torch.float32, "index": torch.int32},
    "everything": {"word": torch.float16, "has_weights": True, "has_hot": True, "mean": True, "code": torch.int16},
    "residual": {"residual": True, "width": 128, "offset": None, "code": torch.int32, "codebook_size": 1000},
    "awkward": {"num_codes": 7, "width": 75, "index": None, "word": torch.float32, "codebook_size": 4096},
}
H200 = Device((9, 0), num_sms=132, block_bytes=232448, sm_bytes=233472)


def _programs(signature: Signature) -> list[Program]:
    """Return every program of a signature; the forward for bags of 1 and of 50 ids."""
    pools = [
        pool_plan(signature, purpose, H200, 16, 16, 26, 8192, length).program
        for purpose, length in (("FORWARD", 1), ("FORWARD", 50), ("BACKWARD_WEIGHTS", 10))
    ]
    return [*pools, gradient_plan(signature, H200, 26, 8192).program, Program("HOT_ROWS", signature, ())]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_for_gpus(variant, capability, tmp_path, monkeypatch):
    if program.missing():
        pytest.skip(program.missing())
    monkeypatch.setenv("TORCHREC_COMPRESS_CACHE", str(tmp_path))  # nothing is compiled there yet
    for each in _programs(dataclasses.replace(SIGNATURE, **VARIANTS[variant])):
        assert compile_program(each, capability)[:4] == b"\x7fELF"


def test_a_source_that_does_not_compile_is_reported():
    if program.missing():
        pytest.skip(program.missing())
    broken = Program("FORWARD", SIGNATURE, (("VECTOR", "nonsense"),))
    with pytest.raises(CannotCompile, match="NVRTC refused"):
        compile_program(broken, (9, 0))


def test_the_sizes_chosen_for_the_benchmark_fill_an_h200():
    short, long, _, gradient, _ = _programs(SIGNATURE)
    assert dict(short.sizes)["STAGED"] == 0
    sizes = dict(long.sizes)
    assert (sizes["STAGED"], sizes["BLOCKS"], sizes["VECTOR"], sizes["CODE_VECTOR"]) == (1, 3, 4, "uint4")
    plan = gradient_plan(SIGNATURE, H200, 26, 8192)
    assert plan.program == gradient
    assert 3 * (plan.shared_bytes + 1024) <= H200.sm_bytes
    # one wave of blocks, three to a multiprocessor
    assert 300 < plan.num_chunks * 26 * plan.num_pieces <= 3 * 132
    assert plan.num_chunks * plan.chunk_bags >= 8192
