"""The CUDA kernels of trained rows without a GPU: run on the CPU by an emulator, and compiled by NVRTC for GPUs."""

import pytest
import torch

from tests.ops.gpu import trained_cases
from tests.ops.gpu.emulator import Emulator
from tests.ops.gpu.trained_cases import BATCHES, EVERY, FORM, MORE, NIBBLES, REFUSALS, SOME, Case, check, check_refusal
from tests.ops.trained import WHERE, bags_of, needs_compiler, step_of, table_of
from torchrec_compress.ops import TrainedFormat, trained_bag, trained_bags, update_trained
from torchrec_compress.ops.gpu import program, trained_kernels
from torchrec_compress.ops.gpu.program import Program, compile_program
from torchrec_compress.ops.gpu.trained_kernels import LookUpTables, UpdateTables

KERNELS = ["trained_bag_look_up", "trained_bag_step", "trained_bag_write"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulator")


@pytest.fixture
def emulate(folder, monkeypatch, poisoned_memory):
    """Have an emulator serve what is asked of "cuda"."""
    serving = trained_bags._serving

    def use(**options) -> Emulator:
        emulator = Emulator(folder, **options)
        monkeypatch.setattr(trained_kernels, "driver_of", lambda index: emulator)
        monkeypatch.setattr(
            trained_bags, "_serving", lambda rows, backend: "cuda" if backend == "cuda" else serving(rows, backend)
        )
        return emulator

    return use


def _launched(emulator: Emulator) -> list[str]:
    return [kernel for kernel, _, _ in emulator.launched]


@needs_compiler
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("name", SOME)
def test_every_optimizer_writes_the_bits_of_the_reference(name, reverse, emulate):
    emulator = emulate(reverse=reverse)
    check(Case(EVERY[name]))
    assert _launched(emulator) == KERNELS * 3


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_every_optimizer_at_another_width(name, emulate):
    emulate(reverse=True)
    check(Case(EVERY[name], weighted=True, mean=True))


@needs_compiler
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("name", BATCHES)
def test_batches(name, reverse, emulate):
    emulate(reverse=reverse)
    check(BATCHES[name])


@needs_compiler
@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_is_named_before_a_byte_is_written(name, emulate):
    emulator = emulate()
    check_refusal(name)
    assert _launched(emulator) == ["trained_bag_step"]


@needs_compiler
def test_states_come_before_values(emulate):
    emulate()
    trained_cases.check_states_come_before_values()


@needs_compiler
def test_far_rows(emulate):
    emulate()
    trained_cases.check_far_rows(5000)


@needs_compiler
@pytest.mark.parametrize("reverse", [False, True])
def test_bags_without_ids_and_gradients_of_zero_reach_no_row(reverse, emulate):
    emulate(reverse=reverse)
    trained_cases.check_bags_without_ids_reach_no_row()


@needs_compiler
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ids": torch.tensor([0, 30, 1])}, "every id must be a row of the table"),
        ({"ids": torch.tensor([0, -1, 1])}, "every id must be a row of the table"),
        ({"offsets": torch.tensor([0, 2, 1, 3])}, "offsets must not decrease"),
        ({"offsets": torch.tensor([0, 9, 3])}, "offsets must not decrease"),
        ({"offsets": torch.tensor([1, 3])}, "must run from 0 to the number of ids"),
        ({"offsets": torch.tensor([0, 2])}, "must run from 0 to the number of ids"),
        ({"weights": torch.tensor([1.0, float("nan"), 1.0])}, "weights must be finite"),
        ({"weights": torch.tensor([1.0, -float("inf"), 1.0])}, "weights must be finite"),
    ],
)
def test_values_that_do_not_fit_are_assertions_on_the_device(wrong, message, emulate):
    emulate()
    rows, state = table_of(30, FORM)
    right = {"ids": torch.tensor([0, 29, 1]), "offsets": torch.tensor([0, 2, 2, 3]), "weights": torch.ones(3)}
    options = {"format": FORM, "step": None, "where": WHERE, "backend": "cuda"}
    trained_bag(rows, state, **right, **options)
    with pytest.raises(RuntimeError, match=message):
        trained_bag(rows, state, **(right | wrong), **options)


@needs_compiler
def test_ids_of_an_update_are_rows_of_the_table(emulate):
    emulator = emulate()
    rows, state = table_of(30, FORM)
    before = rows.clone()
    with pytest.raises(RuntimeError, match="every id must be a row of the table"):
        update_trained(
            rows, state, torch.tensor([3, 30]), None, torch.ones(2, 20), FORM, step=step_of(), where=WHERE,
            backend="cuda",
        )  # fmt: skip
    assert torch.equal(rows, before) and _launched(emulator) == ["trained_bag_step"]


def test_ids_without_a_bag_are_an_error_before_anything_runs(monkeypatch):
    monkeypatch.setattr(trained_bags, "_serving", lambda rows, backend: "cuda")
    rows, state = table_of(30, FORM)
    for offsets, found in ((torch.zeros(1, dtype=torch.int64), 1), (torch.zeros(0, dtype=torch.int64), 0)):
        with pytest.raises(ValueError, match=f"table 't': offsets must start with 0 .* number of ids, 2, got {found}"):
            trained_bag(rows, state, torch.tensor([3, 3]), offsets, FORM, step=None, where=WHERE)


@needs_compiler
def test_operators_are_registered_as_torch_expects(emulate):
    emulate()
    rows, _ = table_of(30, FORM)
    bags = bags_of([4, 0, 7], 30, 20, weighted=True)
    operators = torch.ops.torchrec_compress
    tables, opcheck = (20, 8, True, WHERE), torch.library.opcheck
    opcheck(operators.trained_bag_gpu.default, (rows, *bags[:3], *tables))
    opcheck(operators.trained_bag_gpu_weight_gradients.default, (bags.grads, rows, *bags[:2], *tables))


@needs_compiler
def test_torch_counts_the_writes_that_are_made(emulate):
    emulate()
    rows, state = table_of(30, FORM)
    ids, before = torch.tensor([3, 3]), [rows._version, state._version]
    options = {"step": step_of(), "where": WHERE, "backend": "cuda"}
    with pytest.raises(ValueError, match="must be finite"):
        update_trained(rows, state, ids, None, torch.full((2, 20), float("nan")), FORM, **options)
    assert [rows._version, state._version] == before
    update_trained(rows, state, ids, None, torch.ones(2, 20), FORM, **options)
    assert [rows._version, state._version] == [count + 1 for count in before]


@needs_compiler
def test_rows_that_are_columns_of_others_are_read_in_place(emulate, monkeypatch):
    emulate()
    wide = torch.full((30, 30), 255, dtype=torch.uint8)
    rows, state = table_of(30, FORM)
    wide[:, 3:24] = rows
    bags = bags_of([4, 0, 7], 30, 20)
    options = {"step": None, "where": WHERE}
    expected = trained_bag(rows, state, *bags[:2], FORM, **options, backend="torch")
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda tensor: tensor if tensor.is_contiguous() else 1 / 0)
    found = trained_bag(wide[:, 3:24], state, *bags[:2], FORM, **options, backend="cuda")
    torch.testing.assert_close(found, expected)


@needs_compiler
def test_states_that_begin_within_a_float_are_updated_by_the_reference(emulate):
    emulator = emulate()
    form = TrainedFormat(16, 8, "adagrad", 32)
    rows, state = table_of(30, form)
    storage = torch.zeros(1 + state.numel(), dtype=torch.uint8)
    shifted, bags = storage[1:].view(state.shape), bags_of([4, 0, 7], 30, 16)
    expected = rows.clone()
    for table, of_rows, backend in ((expected, state, "torch"), (rows, shifted, "cuda")):
        update_trained(table, of_rows, *bags[:2], bags.grads, form, step=step_of(), where=WHERE, backend=backend)
    assert torch.equal(rows, expected) and torch.equal(shifted, state) and state.any()
    assert emulator.launched == []


PROGRAMS = {
    "a look-up": Program("TRAINED_LOOK_UP", LookUpTables(64, 8, torch.int64, torch.int32), ()),
    "a look-up of 4 bits": Program("TRAINED_LOOK_UP", LookUpTables(20, 4, torch.int32, torch.int64), ()),
    "a wide look-up": Program("TRAINED_LOOK_UP", LookUpTables(1001, 8, torch.int64, torch.int64), ()),
    "sgd": Program("TRAINED_UPDATE", UpdateTables(TrainedFormat(1, 8, "sgd")), ()),
    "row-wise": Program("TRAINED_UPDATE", UpdateTables(TrainedFormat(16, 4, "rowwise_adagrad", 8)), ()),
    "element-wise": Program("TRAINED_UPDATE", UpdateTables(TrainedFormat(128, 8, "adagrad", 32)), ()),
    "adam": Program("TRAINED_UPDATE", UpdateTables(TrainedFormat(64, 4, "adam", 8)), ()),
    "wide adam": Program("TRAINED_UPDATE", UpdateTables(TrainedFormat(1000, 8, "partial_rowwise_adam", 8)), ()),
}


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("name", PROGRAMS)
def test_compiles_for_gpus(name, capability, tmp_path, monkeypatch):
    if program.missing():
        pytest.skip(program.missing())
    monkeypatch.setenv("TORCHREC_COMPRESS_CACHE", str(tmp_path))  # nothing is compiled there yet
    assert compile_program(PROGRAMS[name], capability)[:4] == b"\x7fELF"


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_compiler_rounds_every_product_quotient_and_root_as_a_cpu_does(name):
    if program.missing():
        pytest.skip(program.missing())
    text = _assembly(PROGRAMS[name])
    kinds = {word for word in text.split() if word.endswith(".f32") and word.split(".")[0] in _ROUNDED}
    assert kinds and kinds <= {f"{kind}.rn.f32" for kind in _ROUNDED} - {"fma.rn.f32", "mad.rn.f32"}, kinds


_ROUNDED = ("add", "sub", "mul", "div", "rcp", "sqrt", "rsqrt", "fma", "mad", "ex2", "lg2")


def _assembly(each: Program) -> str:
    """Return the assembly text of a program."""
    from cuda.bindings import nvrtc

    handle = program._call(nvrtc.nvrtcCreateProgram, each.source().encode(), b"program.cu", 0, [], [])
    options = each.options("compute_90")
    program._call(nvrtc.nvrtcCompileProgram, handle, len(options), options)
    text = bytearray(program._call(nvrtc.nvrtcGetPTXSize, handle))
    program._call(nvrtc.nvrtcGetPTX, handle, text)
    return text.decode()


def test_lanes_are_the_halves_that_sums_of_squares_are_added_in():
    assert [UpdateTables(TrainedFormat(width, 8)).defines()["LANES"] for width in (1, 2, 3, 8, 9, 16, 64)] == [
        1, 2, 4, 8, 16, 16, 16,
    ]  # fmt: skip
    assert NIBBLES.width % 16 == 0
