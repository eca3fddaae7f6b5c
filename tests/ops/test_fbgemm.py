"""Code look-ups on FBGEMM: the cases of the C++ kernels, and what is FBGEMM's own."""

import subprocess
import sys

import pytest
import torch

from tests.ops.bags import random_codes

# the same cases, collected here once more and run with this file's fixtures
from tests.ops.cpp.test_kernels import (  # noqa: F401
    STRUCTURES,
    inputs,
    run,
    test_any_jagged_batch,
    test_codebooks_may_change_between_forward_and_backward,
    test_compiles_as_one_graph,
    test_every_id_is_a_bag_without_offsets,
    test_gradients_are_only_taken_where_they_are_asked_for,
    test_gradients_of_concatenated_outputs_are_read_in_place,
    test_inputs_of_any_stride_and_shared_upstream,
    test_numbers_of_bags,
    test_offsets_that_do_not_fit_are_errors,
    test_two_threads_give_the_bits_of_one,
    test_types_of_codes,
    test_widths_and_codebook_sizes,
)
from torchrec_compress.ops import codebook_bag
from torchrec_compress.ops.dispatch import fbgemm_serves
from torchrec_compress.ops.fbgemm import (
    virtual_table_bags,
    virtual_table_bags_backward,
    virtual_table_bags_backward_weights,
)
from torchrec_compress.ops.reference import codewords, reference_codebook_bag

pytestmark = pytest.mark.usefixtures("fbgemm", "poisoned_memory")


@pytest.fixture(scope="module")
def fbgemm():
    """Take FBGEMM, whatever the suite runs on."""
    torch.compiler.reset()  # what is compiled keeps the tier that it was traced with
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHREC_COMPRESS_BACKEND", "fbgemm")
        assert fbgemm_serves()
        yield
    torch.compiler.reset()


def words_of(structure, num_bags=7):
    """Return what the operator takes for a small table with hot rows."""
    codes, books, offsets, weights, hot = inputs(structure, num_bags=num_bags, num_codes=3, size=16, num_hot=9)
    words, table = codewords(codes, books.detach(), hot.detach(), structure)
    return words, table.requires_grad_(), offsets, weights, structure == "residual"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_operators_are_registered_as_torch_expects(structure, dtype):
    words, table, offsets, weights, is_residual = words_of(structure)
    words = words.to(dtype)
    for factors in (None, weights):
        torch.library.opcheck(virtual_table_bags, (words, table, offsets, factors, is_residual))
    table, weights = table.detach(), weights.detach()
    grad = torch.ones_like(virtual_table_bags(words, table, offsets, weights, is_residual))
    torch.library.opcheck(virtual_table_bags_backward, (grad, words, offsets, weights, table.shape[0], is_residual))
    torch.library.opcheck(virtual_table_bags_backward_weights, (grad, words, table, offsets, is_residual))


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
    assert "torchrec_compress.virtual_table_bags" in str(program.graph)
    more, _, longer, _, _ = inputs(num_bags=20, num_hot=0)
    assert torch.equal(program.module()(more, longer), codebook_bag(more, books, longer))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_sums_are_the_bits_of_the_reference(structure):
    codes, books, offsets, weights, hot = inputs(structure, num_bags=60)
    got = codebook_bag(codes, books, offsets, structure=structure, weights=weights, hot_rows=hot)
    assert torch.equal(got, reference_codebook_bag(codes, books, offsets, structure, weights, hot))


@pytest.mark.parametrize(
    ("codes", "num_hot"),
    [
        (torch.tensor([[0, 1], [2, 3], [255, 1]], dtype=torch.uint8), 0),
        (torch.tensor([[0, 1], [2, 3], [-1, 1]], dtype=torch.int16), 0),
        (torch.tensor([[0, 1], [2, 1], [0, 2**62]]), 0),
        # 254 is the one escape code, and the hot rows are 0 to 6
        (torch.tensor([[0, 1], [2, 1], [253, 7]], dtype=torch.uint8), 7),
    ],
)
def test_codes_out_of_range_are_errors(codes, num_hot):
    hot = torch.zeros(num_hot, 8) if num_hot else None
    with pytest.raises(RuntimeError, match=r"(?i)out of (bounds|range)"):
        codebook_bag(codes, torch.zeros(508, 4), None, hot_rows=hot)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_shapes_that_do_not_fit_are_errors(structure):
    codes = torch.zeros(3, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"weights must be one per id, 3, got shape \[2\]"):
        codebook_bag(codes, torch.zeros(8, 4), None, structure=structure, weights=torch.ones(2))
    with pytest.raises(ValueError, match="at least one, for each of 2 codes, got 0 in all"):
        codebook_bag(codes, torch.zeros(0, 4), None, structure=structure)


def test_a_compiled_graph_still_looks_at_offsets():
    compiled = torch.compile(codebook_bag, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="offsets must not decrease"):
        compiled(torch.zeros(3, 2, dtype=torch.uint8), torch.zeros(8, 4), torch.tensor([0, 2, 1, 3]))


def test_the_default_device_is_not_asked():
    codes, books = random_codes(4, 7, 3, 0).to(torch.uint8), torch.randn(21, 2)
    with torch.device("meta"):
        first = codebook_bag(codes, books, None)
    assert torch.equal(codebook_bag(codes, books, None), first)


def operators_behind(out):
    """Return the names of the operators that made a tensor, last first."""
    names, nodes = "", [out.grad_fn]
    while nodes:
        node = nodes.pop()
        names += node.name().lower() + " "
        nodes += [before for before, _ in node.next_functions if before is not None]
    return names


def test_float64_goes_to_the_reference():
    codes, books, offsets, weights, hot = inputs(num_bags=9)
    got = codebook_bag(codes, books.detach().double(), offsets, weights=weights, hot_rows=hot)
    assert "embeddingbagbackward" in operators_behind(got)
    assert torch.equal(got, reference_codebook_bag(codes, books.detach().double(), offsets, "product", weights, hot))


@pytest.mark.parametrize("wanted", ["cpp", "auto", "fbgemm"])
def test_codes_that_the_kernels_do_not_read_go_to_fbgemm(wanted, monkeypatch):
    monkeypatch.setenv("TORCHREC_COMPRESS_BACKEND", wanted)
    codes, books, offsets, *_ = inputs(num_bags=9, num_hot=0)
    out = codebook_bag(codes.long(), books, offsets)
    assert "virtual_table_bags" in operators_behind(out)


def test_a_step_prints_nothing():
    # FBGEMM's own operator says on stderr that it has no kernel for autograd
    code = """
import torch
from torchrec_compress.ops import codebook_bag
books, weights = torch.ones(4, 2, requires_grad=True), torch.ones(3, requires_grad=True)
codebook_bag(torch.zeros(3, 2, dtype=torch.uint8), books, None, weights=weights).sum().backward()
print(books.grad.sum().item())
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "12.0\n", "")
