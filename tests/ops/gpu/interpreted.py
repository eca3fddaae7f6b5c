"""The Triton kernels in Triton's interpreter, which must be chosen before Triton is imported.

Run by test_triton_kernels.py in a process of its own, with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch

from tests.ops.gpu.cases import SMALL, check
from torchrec_compress.ops.gpu.operators import codebook_bags_gpu

assert os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("name", SMALL)
def test_values_and_gradients(name):
    check(SMALL[name], "triton")


@pytest.fixture(autouse=True)
def assertions(monkeypatch):
    """Have the interpreter look at assertions, which a launch asks for by debug=True."""
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))


@pytest.mark.parametrize(
    ("codes", "hot", "ids", "offsets"),
    [
        ([[0, 1], [4, 0]], 0, None, None),
        ([[0, 1], [3, 3]], 3, None, None),
        ([[0, 1], [0, 0]], 0, [0, 2], None),
        ([[0, 1], [0, 0]], 0, None, [0, 3]),
    ],
)
def test_values_that_do_not_fit_are_assertions(codes, hot, ids, offsets):
    rows = [torch.zeros(hot, 8)] if hot else []
    bags = 2 if offsets is None else len(offsets) - 1
    with pytest.raises(Exception, match="codebook_bag: "):
        codebook_bags_gpu(
            [torch.tensor(codes, dtype=torch.uint8)],
            [torch.zeros(8, 4)],
            rows,
            None if ids is None else torch.tensor(ids),
            None if offsets is None else torch.tensor(offsets),
            None,
            [0, 0 if hot else -1, 4 if ids is None else 0],
            [0, bags, 0, 2],
            False,
            "triton",
        )


def test_operators_are_registered_as_torch_expects():
    books = torch.randn(8, 4, requires_grad=True)
    codes, offsets, weights = torch.zeros(3, 2, dtype=torch.uint8), torch.tensor([0, 2, 3]), torch.ones(3)
    inputs = [codes], [books], [], None, offsets, weights, [0, -1, 4], [0, 2, 0, 3], False, "triton"
    torch.library.opcheck(torch.ops.torchrec_compress.codebook_bags_gpu.default, inputs)
