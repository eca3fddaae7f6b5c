"""Drop-ins for `nn.Embedding` and `nn.EmbeddingBag`: against PyTorch's own, which hold the decoded table."""

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchrec import EmbeddingConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.cases import CASES, CONFIGS, DIM, IDS, NUM_ROWS, at_rest, has_manager, steps_itself
from torchrec_compress import CompressedEmbedding, CompressedEmbeddingBag, after_step, discard, native_parameters
from torchrec_compress.methods import (
    CafeConfig,
    CceConfig,
    DenseConfig,
    HashConfig,
    MEmComConfig,
    NarrowConfig,
    PQConfig,
    RandomCodesConfig,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
PQ, NARROW, HASH = PQConfig(num_codes=4, codebook_size=16), NarrowConfig(width=4), HashConfig(num_buckets=40)
KINDS = [CompressedEmbedding, CompressedEmbeddingBag]
FIRST = [configs[0] for configs in CASES.values()]
PADDING = 5
IDS_2D = torch.tensor([[1, PADDING, 2], [PADDING, PADDING, PADDING], [402, 1, 0]])
# torch 2.13 copies pytrees of its own deprecated class
exports = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")


def made(kind, config, **options):
    """Return a module whose trained rows, which would want an optimizer, are at rest."""
    module = kind(NUM_ROWS, DIM, compression=config, **options)
    at_rest(module.collection)
    if module.padding_row is not None:
        module.padding_row.copy_(torch.linspace(1, 2, DIM))
    return module


@cache
def shared(kind, config, **options):
    """Return the same, made once: never to be written to."""
    return made(kind, config, **options)


def decoded(module):
    """Return the table that a plain module would hold, whose gradients flow on into the compressed one."""
    rows = module.collection.table_rows(module.name, torch.arange(NUM_ROWS))
    if module.padding_idx is None:
        return rows
    return rows.index_copy(0, torch.tensor([module.padding_idx]), module.padding_row[None])


def gradients(module, values, *others):
    """Return the gradients of a loss in what the module trains and in others; a graph without any has zeros."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad and parameter.numel()]
    wanted += [other for other in others if other is not None]
    loss = (values * torch.linspace(-1, 1, values.numel()).reshape(values.shape)).sum()
    if not loss.requires_grad:
        return [torch.zeros_like(each) for each in wanted]
    return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)


def assert_same(module, got, expected, *others):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    mine, theirs = gradients(module, got, *others), gradients(module, expected, *others)
    discard(module)
    for gradient, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("padding", [None, PADDING])
def test_rows_are_those_of_an_embedding(config, padding):
    ours = shared(CompressedEmbedding, config, padding_idx=padding)
    for shape in ((), (7,), (0,), (2, 0), (2, 3, 2)):
        ids = torch.randint(0, NUM_ROWS, shape)
        for each in (ids, torch.where(ids > 100, PADDING, ids).int()):
            assert_same(ours, ours(each), F.embedding(each, decoded(ours), padding_idx=padding))
    strided = IDS_2D.T
    assert_same(ours, ours(strided), F.embedding(strided, decoded(ours), padding_idx=padding))


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("mode", ["sum", "mean"])
@given(data=st.data())
@settings(max_examples=6)
def test_bags_are_those_of_an_embedding_bag(config, mode, data):
    padding, has_last = data.draw(st.sampled_from([None, PADDING])), data.draw(st.booleans())
    options = {"mode": mode, "padding_idx": padding, "include_last_offset": has_last}
    ours = shared(CompressedEmbeddingBag, config, **options)
    lengths = data.draw(st.lists(st.integers(0, 4), max_size=5))
    number = st.integers(0, NUM_ROWS - 1) | st.just(PADDING)
    ids = torch.tensor([data.draw(number) for _ in range(sum(lengths))], dtype=torch.int64)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    offsets = ends if has_last else ends[:-1]
    weights = torch.randn(len(ids), requires_grad=True) if mode == "sum" and data.draw(st.booleans()) else None
    types = data.draw(st.lists(st.sampled_from([torch.int32, torch.int64]), min_size=2, max_size=2))
    given_ids, given_offsets = ids.to(types[0]), offsets.to(types[1])
    if has_last or lengths or not len(ids):
        expected = F.embedding_bag(ids, decoded(ours), offsets, per_sample_weights=weights, **options)
        assert_same(ours, ours(given_ids, given_offsets, weights), expected, weights)


@pytest.mark.parametrize("config", FIRST, ids=CASES)
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, PADDING])
def test_bags_of_one_length_come_as_rows_of_ids(config, mode, padding):
    ours = shared(CompressedEmbeddingBag, config, mode=mode, padding_idx=padding)
    for ids in (IDS_2D, IDS_2D.T.int(), IDS_2D[:0], IDS_2D[:, :0], torch.zeros(0, 0, dtype=torch.int64)):
        weights = torch.randn(ids.shape, requires_grad=True) if mode == "sum" else None
        for each in (None, weights):
            right = None
            if ids.numel():
                options = {"mode": mode, "padding_idx": padding, "per_sample_weights": each}
                right = F.embedding_bag(ids.contiguous(), decoded(ours), **options)
            else:  # torch has no words for bags of no ids
                right = torch.zeros(len(ids), DIM)
            assert_same(ours, ours(ids, per_sample_weights=each), right, each)


@pytest.mark.parametrize("config", [DenseConfig(), PQ, MEmComConfig(num_buckets=40)])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_trains_nothing(kind, config):
    ours = made(kind, config, padding_idx=PADDING - NUM_ROWS)
    assert ours.padding_idx == PADDING
    out = ours(torch.full((2, 3), PADDING))
    assert torch.equal(
        out, torch.zeros(2, DIM) if kind is CompressedEmbeddingBag else ours.padding_row.expand(2, 3, -1)
    )
    assert not any(gradient.any() for gradient in gradients(ours, out))
    assert any(gradient.any() for gradient in gradients(ours, ours(torch.tensor([[PADDING, 1]]))))


def test_means_count_no_padding():
    ours = made(CompressedEmbeddingBag, PQ, padding_idx=PADDING)
    rows = decoded(ours)
    assert_same(ours, ours(IDS_2D), torch.stack([(rows[1] + rows[2]) / 2, torch.zeros(DIM), rows[[402, 1, 0]].mean(0)]))


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_the_weight_is_the_decoded_table(config):
    ours = shared(CompressedEmbedding, config, padding_idx=PADDING)
    assert_same(ours, ours.weight, decoded(ours))
    assert torch.equal(ours.weight[PADDING], ours.padding_row) and ours.weight is not ours.weight
    torch.testing.assert_close(ours(torch.arange(NUM_ROWS)), ours.weight, rtol=1e-5, atol=1e-6)
    bags = shared(CompressedEmbeddingBag, config, padding_idx=PADDING)
    assert torch.equal(bags.weight[PADDING], ours.padding_row)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_copies_and_bytes(kind, config):
    ours = made(kind, config, padding_idx=0, name="item")
    state = {key: value.clone() for key, value in ours.state_dict().items()}
    assert all(key == "padding_row" or key.startswith("collection.") for key in state)
    other = kind(NUM_ROWS, DIM, padding_idx=0, compression=config, name="item")
    copied = copy.deepcopy(ours)
    ours.padding_row.zero_()
    other.load_state_dict(state)
    assert torch.equal(copied.padding_row, other.padding_row) and bool(copied.padding_row.any())
    assert torch.equal(copied.weight, other.weight)
    at_rest(other.collection)
    assert torch.equal(copied(IDS_2D), other(IDS_2D))
    table = EmbeddingConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=DIM, feature_names=["item"])
    assert ours.method == config
    assert ours.footprint().total_bytes == config.stored_bytes(table) + 4 * DIM
    bare = kind(NUM_ROWS, DIM, compression=config, device="meta")
    assert bare.footprint().total_bytes == config.stored_bytes(table)
    assert "padding_row" not in bare.state_dict() and bare.padding_row is None


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("kind", KINDS)
def test_meta_construction_and_reset(kind, config):
    late = kind(NUM_ROWS, DIM, padding_idx=0, compression=config, device="meta")
    assert all(tensor.is_meta for tensor in late.state_dict().values())
    late.to_empty(device="cpu")
    late.reset_parameters()
    at_rest(late.collection)
    assert torch.equal(late.padding_row, torch.zeros(DIM))
    at_once = made(kind, config, padding_idx=0).state_dict()
    for key, value in late.state_dict().items():
        if not value.dtype.is_floating_point and "low_bit" not in key and "is_set" not in key:
            assert torch.equal(value, at_once[key]), key
    assert bool(late.weight.isfinite().all()) and bool(late(IDS_2D).isfinite().all())


GRADIENT = [PQ, RandomCodesConfig(num_codes=4, codebook_size=16), HASH, NARROW, MEmComConfig(num_buckets=40)]


def losses(module, optimizer, steps=25):
    """Train rows towards ones, and return the losses; managers are told the ends of steps through a model."""
    model, found = nn.Sequential(module), []
    for step in range(steps):
        optimizer.zero_grad()
        loss = (model(IDS_2D) - 1).square().mean()
        loss.backward()
        optimizer.step()
        after_step(model, step, optimizer)
        found.append(loss.item())
    return found


@pytest.mark.parametrize("config", [*GRADIENT, CASES["cafe"][0], CASES["cce"][0]])
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_optimizer_trains_it(kind, config):
    ours = made(kind, config, padding_idx=PADDING)
    row, before = ours.padding_row.clone(), ours.weight.detach()
    found = losses(ours, torch.optim.Adam(ours.parameters(), lr=0.05))
    assert found[-1] < found[0] / 2
    assert torch.equal(ours.padding_row, row) and torch.equal(ours.weight[PADDING], row)
    assert not torch.equal(ours.weight[1], before[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_step_reaches_managers(kind):
    def train(config):
        ours = made(kind, config, padding_idx=PADDING)
        before = {key: value.clone() for key, value in ours.state_dict().items()}
        losses(ours, torch.optim.Adagrad(ours.parameters(), lr=0.1), 4)
        return before, ours.state_dict()

    before, after = train(CafeConfig(num_hot_rows=8, num_cold_rows=40, num_blocks=4))
    hot = "collection.managed.managers.embedding.hot_ids"
    assert not before[hot].any() and after[hot].any()
    before, after = train(CceConfig(num_codes=2, codebook_size=8, cluster_every=2))
    codes = "collection.code_tables.banks.embedding.codes"
    assert not torch.equal(before[codes], after[codes])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [NarrowConfig(width=16, bits=8), NarrowConfig(width=8, bits=8)])
def test_trained_rows_train_in_the_backward(kind, config):
    ours = kind(NUM_ROWS, DIM, padding_idx=PADDING, compression=config)
    with pytest.raises(ValueError, match="call apply_optimizer_in_backward"):
        ours(IDS_2D).sum().backward()
    model = nn.ModuleList([ours])
    apply_optimizer_in_backward(torch.optim.SGD, native_parameters(model), {"lr": 0.5})
    rows = ours.collection.trained.banks["embedding"].rows
    before, found = rows.clone(), []
    for _ in range(10):
        loss = (ours(IDS_2D) - 1).square().mean()
        loss.backward()
        found.append(loss.item())
    moved = (rows != before).any(1).nonzero().flatten().tolist()
    assert moved == [0, 1, 2, 402]
    assert found[-1] < found[0]


class Scored(nn.Module):
    """Both modules, and all items scored against the table."""

    def __init__(self, config, mode="mean"):
        super().__init__()
        self.rows = made(CompressedEmbedding, config, padding_idx=PADDING)
        self.bags = made(CompressedEmbeddingBag, config, mode=mode, padding_idx=PADDING, name="bags")

    def forward(self, ids, flat, offsets):
        rows = self.rows(ids).mean(1)
        return rows, rows @ self.rows.weight.T, self.bags(ids), self.bags(flat, offsets)


BATCHES = [
    (torch.randint(0, 9, (count, size)), torch.randint(0, 9, (3 * count,)), torch.arange(count) * 2)
    for count, size in ((2, 3), (7, 5), (4, 2))
]


@pytest.mark.parametrize("config", [PQ, PQConfig(num_codes=2, codebook_size=32, num_hot_rows=70), NARROW, HASH])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_it_compiles_as_one_graph(config, mode):
    torch.compiler.reset()
    model = Scored(config, mode)
    expected = [torch.cat([each.flatten() for each in model(*batch)]) for batch in BATCHES]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for number, batch in enumerate(BATCHES):
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            got = torch.cat([each.flatten() for each in compiled(*batch)])
        assert_same(model, got, expected[number])


@pytest.mark.parametrize("config", [PQ, PQConfig(num_codes=2, codebook_size=32, num_hot_rows=70), NARROW])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@exports
def test_it_is_exported_for_any_batch_size(config, mode):
    model = Scored(config, mode).eval()
    count, size, flat, bags = (torch.export.Dim(name, min=2) for name in ("count", "size", "flat", "bags"))
    shapes = ({0: count, 1: size}, {0: flat}, {0: bags})
    with torch.no_grad():
        program = torch.export.export(model, BATCHES[0], dynamic_shapes=shapes)
        # nothing waits for a device to say how many ids there are
        assert torch.ops.aten.item.default not in {node.target for node in program.graph.nodes}
        for batch in BATCHES:
            for got, expected in zip(program.module()(*batch), model(*batch), strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("config", FIRST, ids=CASES)
def test_it_is_traced(config):
    for kind in KINDS:
        ours = made(kind, config, padding_idx=PADDING).train(not (steps_itself(config) or has_manager(config)))
        assert torch.equal(torch.fx.symbolic_trace(ours)(IDS_2D), ours(IDS_2D))


@pytest.mark.parametrize("config", FIRST, ids=CASES)
@pytest.mark.parametrize("number", [-1, NUM_ROWS])
def test_ids_out_of_range_raise_by_name(config, number):
    said = rf"table 'item', feature 'item': every id must be in \[0, 403\), got {number}"
    for kind in KINDS:
        ours = made(kind, config, padding_idx=0, name="item")
        with pytest.raises(ValueError, match=said):
            ours(torch.tensor([[1, number]]))


@pytest.mark.parametrize(
    ("options", "arguments", "said"),
    [
        ({}, (IDS_2D, torch.tensor([0])), "offsets must be None with input of 2 dimensions"),
        ({}, (IDS_2D[0],), "offsets must be given with input of 1 dimension"),
        ({}, (torch.tensor(1),), r"input must have 1 or 2 dimensions, got shape \[\]"),
        ({}, ([[1, 2]],), "input must be a tensor, got list"),
        ({}, (IDS_2D.float(),), r"input must be int32 or int64, got torch.float32; call input.long\(\)"),
        ({}, (IDS_2D[0], torch.zeros(1)), "offsets must be int32 or int64, got torch.float32"),
        ({}, (IDS_2D[0], torch.tensor([[0]])), r"offsets must have 1 dimension, got shape \[1, 1\]"),
        ({}, (IDS_2D[0], torch.tensor([1, 2])), r"offsets must start with 0 .* got \[1, 3\]"),
        ({}, (IDS_2D[0], torch.tensor([0, 9])), "offsets must not decrease"),
        ({}, (IDS_2D[0], torch.tensor([], dtype=torch.int64)), "offsets must start with 0"),
        ({"include_last_offset": True}, (IDS_2D[0], torch.tensor([0, 2])), r"number of ids, 3, got \[0, 2\]"),
        ({"mode": "mean"}, (IDS_2D, None, torch.ones(3, 3)), "per_sample_weights must be None with mode 'mean'"),
        ({}, (IDS_2D, None, torch.ones(3)), r"must have the shape of input, \[3, 3\], got \[3\]; give one per id"),
        ({}, (IDS_2D, None, torch.full((3, 3), torch.nan)), "weights must be finite"),
    ],
)
def test_calls_that_torch_refuses_too(options, arguments, said):
    ours = made(CompressedEmbeddingBag, PQ, name="item", **{"mode": "sum", **options})
    with pytest.raises(ValueError, match=said):
        ours(*arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compression": {"*": PQ}}, r"compression must be one method, .* give the method of this table alone"),
        ({"padding_idx": NUM_ROWS}, r"padding_idx must be None or an int in \[-403, 403\), got 403"),
        ({"padding_idx": -NUM_ROWS - 1}, r"\[-403, 403\), got -404"),
        ({"padding_idx": True}, "got True"),
        ({"num_embeddings": 0}, "num_embeddings must be an int of at least 1, got 0"),
        ({"embedding_dim": 16.0}, "embedding_dim must be an int of at least 1, got 16.0"),
        ({"name": "layers.0"}, "table 'layers.0': must not hold '.', which separates modules; choose another name"),
        ({"device": 0}, "device must be a torch.device or its name, got 0"),
    ],
)
def test_arguments_that_are_refused(kind, options, said):
    with pytest.raises(ValueError, match=said):
        kind(**{"num_embeddings": NUM_ROWS, "embedding_dim": DIM, "compression": PQ, **options})


def test_a_maximum_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"must be linear: for a maximum .* CompressedEmbedding and take rows.amax"):
        made(CompressedEmbeddingBag, PQ, mode="max")


@pytest.mark.parametrize("kind", KINDS)
def test_seed_and_a_fit_to_come_are_handed_on(kind):
    codes = [kind(NUM_ROWS, DIM, compression=PQ, seed=seed).state_dict() for seed in (0, 0, 1)]
    first, same, other = (each["collection.code_tables.banks.embedding.codes"] for each in codes)
    assert torch.equal(first, same) and not torch.equal(first, other)
    with pytest.raises(RuntimeError, match="the code table must be filled before it is used"):
        kind(NUM_ROWS, DIM, compression=PQ, will_fit=True)(IDS_2D)


def test_its_line_of_text():
    assert repr(made(CompressedEmbedding, HASH, name="item")).splitlines()[1] == (
        "  403, 16, name='item', method=HashConfig(num_buckets=40)"
    )
    bags = made(CompressedEmbeddingBag, HASH, padding_idx=-1, include_last_offset=True)
    assert "padding_idx=402" in repr(bags) and "mode='mean', include_last_offset=True" in repr(bags)
