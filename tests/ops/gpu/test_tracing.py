"""The GPU operators traced: on tensors of a GPU without data, which needs no GPU, and compiled over the emulator.

Autograd refuses such tensors where torch is built without CUDA, so their gradients are traced by the backward's
operator, and torch.compile runs forward and backward on a CPU. A trace that asks for a value, and so waits, fails.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.ops.gpu.cases import SMALL, draw
from tests.ops.gpu.emulator import Emulator
from torchrec_compress.ops import BagLookup, IdBags, Span, bags, codebook_bags
from torchrec_compress.ops.cpp import build
from torchrec_compress.ops.gpu import cuda_kernels
from torchrec_compress.ops.gpu.lookup import pool_on_gpu
from torchrec_compress.ops.gpu.operators import codebook_bags_gpu_backward

OPERATOR = torch.ops.torchrec_compress.codebook_bags_gpu.default
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def tier(monkeypatch):
    """Have the CUDA kernels serve, and see that no GPU is touched."""
    monkeypatch.setattr(bags, "gpu_tier", lambda backend: "cuda")
    before = torch.cuda.is_initialized()
    yield
    assert torch.cuda.is_initialized() == before


@pytest.fixture
def emulate(tmp_path, monkeypatch):
    try:
        build.find_compiler()
    except build.CannotBuild as error:
        pytest.skip(str(error))
    emulator = Emulator(tmp_path)
    monkeypatch.setattr(cuda_kernels, "driver_of", lambda index: emulator)


def _on_gpu(mode: FakeTensorMode, tensors):
    """Return tensors without data on a GPU, of the same shapes."""
    with mode:
        return [None if each is None else torch.empty(each.shape, dtype=each.dtype, device="cuda") for each in tensors]


def _kind(tensor: torch.Tensor) -> tuple:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


@pytest.mark.parametrize("name", SMALL)
def test_shapes_and_strides_on_a_gpu_are_those_that_kernels_return(name, emulate):
    given, mode = draw(SMALL[name], "cpu"), FakeTensorMode()
    leaves = [tensor for tensor in (*given.books, *given.hot, given.batch.weights) if tensor is not None]
    out = pool_on_gpu(given.lookups, given.spans, given.codes, given.books, given.hot, given.batch, "cuda")
    grads = torch.autograd.grad(out, leaves, torch.zeros_like(out))
    codes, books, hot = (_on_gpu(mode, tensors) for tensors in (given.codes, given.books, given.hot))
    batch = IdBags(*_on_gpu(mode, given.batch[:3]), given.batch.is_flat)
    with mode:
        found = codebook_bags(given.lookups, given.spans, codes, books, hot, batch)
        assert found.device == GPU and _kind(found) == _kind(out)
        rows = [table for table in hot if table is not None]
        places = [sum(table is not None for table in hot[:number]) if rows else -1 for number in range(len(hot))]
        plan = [
            number
            for lookup, span in zip(given.lookups, given.spans, strict=True)
            for number in (
                lookup.table,
                places[lookup.table],
                (lookup.structure == "residual") + 2 * lookup.is_mean + 4 * span.is_gathered,
            )
        ]
        spans = [number for span in given.spans for number in span[:4]]
        words = [size for table in books for size in table.shape]
        wants = [True] * (len(books) + len(rows)) + [batch.weights is not None]
        of_books, of_hot, of_weights = codebook_bags_gpu_backward(
            found, codes, books, rows, *batch[:3], plan, spans, batch.is_flat, "cuda",
            words, [len(table) for table in rows], wants,
        )  # fmt: skip
    got = [*of_books, *of_hot, *([of_weights] if batch.weights is not None else [])]
    assert [_kind(tensor) for tensor in got] == [_kind(tensor) for tensor in grads]
    assert {tensor.device for tensor in got} == {GPU}


class Bags(torch.nn.Module):
    """Two tables of one feature, whose numbers of ids and bags are those of the batch."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.codes = torch.nn.Buffer(torch.randint(0, 16, (50, 4), device=device).to(torch.uint8))
        self.first, self.second = (
            torch.nn.Parameter(torch.randn(64, 4, device=device), requires_grad=device == "cpu") for _ in range(2)
        )

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        lookups = [BagLookup(table, "item", "table", is_mean=bool(table)) for table in range(2)]
        span = Span(0, offsets.shape[0] - 1, 0, ids.shape[0])
        inputs = [self.codes] * 2, [self.first, self.second], [None] * 2, IdBags(ids, offsets)
        if self.codes.is_cuda:
            return codebook_bags(lookups, [span] * 2, *inputs)
        return pool_on_gpu(lookups, [span] * 2, *inputs, "cuda")


def _batch(device: str, num_ids: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = torch.tensor([0, num_ids // 2, num_ids // 2, num_ids], device=device)
    return torch.arange(num_ids, device=device), offsets


@pytest.fixture
def traced():
    """A module and a batch without data on a GPU."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        return mode, Bags("cuda"), (torch.empty(9, dtype=torch.long, device="cuda"), torch.arange(4, device="cuda"))


def test_exports_for_a_gpu_with_any_number_of_ids_and_bags(traced):
    _, module, batch = traced
    sizes = {0: torch.export.Dim("ids", min=2)}, {0: torch.export.Dim("bounds", min=3)}
    exported = torch.export.export(module, batch, dynamic_shapes=sizes)
    (call,) = (node for node in exported.graph.nodes if node.op == "call_function" and node.target == OPERATOR)
    assert call.args[-1] == "cuda"
    assert call.meta["val"].device == GPU
    bags_, columns = call.meta["val"].shape
    assert columns == 32 and isinstance(bags_, torch.SymInt)


def test_is_one_operator_in_a_graph(traced):
    mode, module, batch = traced
    with mode:
        graph = make_fx(lambda ids, offsets: module(ids, offsets), tracing_mode="fake")(*batch).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"].count(OPERATOR) == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph_with_gradients(dynamic, emulate):
    module = Bags("cpu")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for num_ids in (9, 14):
        found = []
        for run in (module, compiled):
            module.zero_grad()
            out = run(*_batch("cpu", num_ids))
            (out * torch.arange(32.0)).sum().backward()
            found.append((out.detach(), module.first.grad, module.second.grad))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    torch._dynamo.reset()
