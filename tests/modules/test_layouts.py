"""Batches and parameters of any layout: a collection reads views as if they were copied, as TorchRec's own does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor

from tests.cases import CONFIGS, IDS, NUM_ROWS, at_rest, fitted, table
from tests.ops.test_layouts import SAME, one_number, transposed
from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.methods import HashConfig

every = pytest.mark.parametrize("config", CONFIGS, ids=IDS)
layouts = st.sampled_from(SAME)
KEYS = ["a", "b", "c"]


def collection(config):
    """Return a weighted collection whose table has two of three features, in another order than the batch."""
    tables = [table(feature_names=["c", "a"])]
    made = CompressedEmbeddingBagCollection(tables, is_weighted=True, compression=config)
    made.load_state_dict(fitted(config).state_dict())
    return at_rest(made)


def stock():
    return EmbeddingBagCollection([table(feature_names=["c", "a"])], is_weighted=True)


def pooled(module, values, weights, lengths=None, offsets=None):
    return module(KeyedJaggedTensor(KEYS, values, weights, lengths, offsets)).values()


@every
@given(data=st.data())
@settings(max_examples=6)
def test_batches(config, data):
    torch.manual_seed(0)
    index = data.draw(st.sampled_from([torch.int32, torch.int64]))
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=6, max_size=6))).to(index)
    given_views = {
        "values": data.draw(layouts)(torch.randint(NUM_ROWS, (int(lengths.sum()),)).to(index)),
        "weights": data.draw(st.sampled_from([*SAME, one_number]))(torch.rand(int(lengths.sum()))),
    }
    if data.draw(st.booleans()):
        given_views["offsets"] = data.draw(layouts)(torch.cat([lengths.new_zeros(1), lengths.cumsum(0).to(index)]))
    else:
        given_views["lengths"] = data.draw(layouts)(lengths)
    plain = {name: view.clone(memory_format=torch.contiguous_format) for name, view in given_views.items()}
    for module in (collection(config), stock()):
        torch.testing.assert_close(pooled(module, **given_views), pooled(module, **plain), rtol=1e-5, atol=1e-6)


@every
@pytest.mark.parametrize("layout", SAME[1:])
def test_stored_tensors(config, layout):
    plain, views = collection(config), collection(config)
    for tensor in (*views.parameters(), *views.buffers()):
        if tensor.dim() == 2:
            tensor.data = layout(tensor.detach())
    lengths = torch.tensor([2, 0, 1, 3, 1, 1])
    values, weights = torch.randint(NUM_ROWS, (8,)), torch.rand(8)
    outs = [pooled(module, values, weights, lengths) for module in (plain, views)]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-6)
    if not outs[0].requires_grad:  # low-bit rows
        return
    upstream = transposed(torch.randn_like(outs[0]))
    grads = [
        torch.autograd.grad(out, [p for p in m.parameters() if p.numel()], upstream)
        for out, m in zip(outs, (plain, views), strict=True)
    ]
    for got, right in zip(*grads, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)


@every
@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_floats_are_errors(config, kind):
    with pytest.raises(ValueError, match=f"weights must be floating point, got {kind}; call weights.float()"):
        pooled(collection(config), torch.tensor([1]), torch.ones(1, dtype=kind), torch.tensor([1, 0, 0]))


@every
@pytest.mark.parametrize("num_weights", [0, 1, 3, 9])
def test_another_number_of_weights_is_an_error(config, num_weights):
    lengths = torch.tensor([2, 0, 1, 3, 1, 1])
    for module in (collection(config), stock()):
        with pytest.raises((ValueError, RuntimeError)):
            pooled(module, torch.zeros(8, dtype=torch.int64), torch.ones(num_weights), lengths)


@every
@pytest.mark.parametrize("lengths", [[2, 0, 1, 3, 1, 2], [2, 0, 1, 3, 1, 0], [-5, 5, 1, 5, 1, 1], [900, 0, 1, 3, 1, 1]])
def test_lengths_that_do_not_fit_are_errors(config, lengths):
    if config.method == "dense" and lengths[0] < 0:
        pytest.skip("TorchRec's own table reads memory that nobody has written")
    with pytest.raises((ValueError, RuntimeError)):
        pooled(collection(config), torch.zeros(8, dtype=torch.int64), torch.ones(8), torch.tensor(lengths))


def test_native_tables_in_the_order_of_the_batch_look_at_lengths_too():
    one = CompressedEmbeddingBagCollection([table()], compression=HashConfig(num_buckets=40))
    for lengths in ([-1, 3], [9, -7], [1, 2], [1, 0]):
        with pytest.raises(ValueError, match=r"offsets must|lengths must add up"):
            one(KeyedJaggedTensor(["item"], torch.tensor([1, 2]), lengths=torch.tensor(lengths)))
