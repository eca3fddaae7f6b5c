"""The GPU operators of trained rows traced: on tensors of a GPU without data, and compiled over the emulator."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops.gpu.emulator import Emulator
from tests.ops.gpu.trained_cases import FORM
from tests.ops.trained import WHERE, bags_of, needs_compiler, step_of, table_of
from torchrec_compress.ops import trained_bag, trained_bags
from torchrec_compress.ops.gpu import trained_kernels

OPERATOR = torch.ops.torchrec_compress.trained_bag_gpu.default


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    """Have the CUDA kernels serve, and see that no GPU is touched."""
    monkeypatch.setattr(trained_bags, "_serving", lambda rows, backend: "cuda")
    before = torch.cuda.is_initialized()
    yield
    assert torch.cuda.is_initialized() == before


@pytest.fixture
def emulate(tmp_path, monkeypatch):
    emulator = Emulator(tmp_path)
    monkeypatch.setattr(trained_kernels, "driver_of", lambda index: emulator)


class Rows(torch.nn.Module):
    """A look-up that serves, with weights or without."""

    def __init__(self, rows: torch.Tensor, state: torch.Tensor) -> None:
        super().__init__()
        self.rows, self.state = torch.nn.Buffer(rows), torch.nn.Buffer(state)

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor | None, weights: torch.Tensor | None) -> torch.Tensor:
        return trained_bag(self.rows, self.state, ids, offsets, FORM, weights=weights, step=None, where=WHERE)


@pytest.fixture
def on_gpu():
    """A mode, a module and a batch without data on a GPU."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given = [*table_of(30, FORM), *bags_of([4, 0, 7], 30, 20, weighted=True)]
    with mode:
        rows, state, *bags = (torch.empty(each.shape, dtype=each.dtype, device="cuda") for each in given)
        return mode, Rows(rows, state), bags


def test_shapes_on_a_gpu(on_gpu):
    mode, module, (ids, offsets, weights, grads) = on_gpu
    with mode:
        for given, num_bags in (((ids, offsets, weights), 3), ((ids, offsets, None), 3), ((ids, None, weights), 11)):
            out = module(*given)
            assert (out.shape, out.dtype, out.device) == ((num_bags, 20), torch.float32, torch.device("cuda", 0))
        given = grads, module.rows, ids, offsets, 20, 8, False, WHERE
        of_weights = torch.ops.torchrec_compress.trained_bag_gpu_weight_gradients(*given)
        assert (of_weights.shape, of_weights.device) == ((11,), torch.device("cuda", 0))


def test_exports_for_a_gpu_with_any_number_of_ids_and_bags(on_gpu):
    _, module, (ids, offsets, weights, _) = on_gpu
    sizes = {0: torch.export.Dim("ids", min=2)}, {0: torch.export.Dim("bounds", min=3)}
    exported = torch.export.export(module, (ids, offsets, weights), dynamic_shapes=(*sizes, sizes[0]))
    (call,) = (node for node in exported.graph.nodes if node.op == "call_function" and node.target == OPERATOR)
    bags, columns = call.meta["val"].shape
    assert columns == 20 and isinstance(bags, torch.SymInt)


@needs_compiler
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_look_up_that_serves_compiles_into_one_graph(dynamic, emulate):
    module = Rows(*table_of(30, FORM))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths in ([4, 0, 7], [1, 2, 3, 9]):
        ids, offsets, weights, _ = bags_of(lengths, 30, 20, weighted=True)
        with torch.no_grad():
            assert torch.equal(compiled(ids, offsets, weights), module(ids, offsets, weights))
    torch._dynamo.reset()


@needs_compiler
def test_a_step_of_training_compiles_with_its_update_aside(emulate):
    bags = bags_of([4, 0, 7], 30, 20)

    def loss(rows: torch.Tensor, state: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return trained_bag(rows, state, ids, offsets, FORM, step=step_of(), where=WHERE).square().sum()

    table = table_of(30, FORM)
    found = []
    for run in (loss, torch.compile(loss, backend="aot_eager")):
        rows, state = (part.clone() for part in table)
        run(rows, state, *bags[:2]).backward()
        found.append((rows, state))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not torch.equal(found[0][0], table[0])
    torch._dynamo.reset()
