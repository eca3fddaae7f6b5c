"""Tables of trained rows, unsharded: what their backward does, who may write to them, and what is refused."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, PoolingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import SGD as StandIn
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.cases import batch
from torchrec_compress import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    compress,
    compress_into,
    native_parameters,
)
from torchrec_compress.methods import NarrowConfig, RandomCodesConfig
from torchrec_compress.ops import TrainedFormat, TrainedStep, decode_trained, update_trained

INT8 = NarrowConfig(width=8, bits=8)
WHOLE = NarrowConfig(width=16, bits=8)
NUM_ROWS = 300


def collection(config=WHOLE, is_weighted=False, pooling=PoolingType.SUM, features=("item",), seed=0, **options):
    torch.manual_seed(0)
    table = EmbeddingBagConfig(
        name="item", num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=list(features), pooling=pooling, **options
    )
    return CompressedEmbeddingBagCollection([table], is_weighted=is_weighted, compression=config, seed=seed)


def trained(config=WHOLE, kind=torch.optim.SGD, rate=0.5, **options):
    made = collection(config, **options)
    apply_optimizer_in_backward(kind, native_parameters(made), {"lr": rate})
    return made


def rows_of(made):
    return made.trained.banks["item"].served(torch.arange(NUM_ROWS)).clone()


@pytest.mark.parametrize("config", [WHOLE, INT8], ids=["whole", "projected"])
@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
@given(data=st.data())
@settings(max_examples=8)
def test_a_step_is_that_of_float_rows_rounded(config, pooling, data):
    lengths = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
    ids = [data.draw(st.lists(st.integers(0, NUM_ROWS - 1), min_size=n, max_size=n)) for n in lengths]
    made = trained(config, pooling=pooling)
    before = rows_of(made).requires_grad_()
    upstream = torch.randn(len(lengths), 16, generator=torch.Generator().manual_seed(1))
    made(batch(ids))["item"].backward(upstream)

    flat = torch.tensor([number for bag in ids for number in bag], dtype=torch.int64)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    mode = "mean" if pooling == PoolingType.MEAN else "sum"
    bags = torch.nn.functional.embedding_bag(flat, before, offsets, mode=mode, include_last_offset=True)
    out = bags @ made.decoder.banks["item"].projection.detach() if config is INT8 else bags
    out.backward(upstream)
    moved = before.detach() - 0.5 * before.grad
    scales = decode_scales(made)
    assert bool(((rows_of(made) - moved).abs() <= scales * 1.01).all())  # one quantum of the new scale
    untouched = before.grad.eq(0).all(1)
    assert torch.equal(rows_of(made)[untouched], before.detach()[untouched])


def decode_scales(made):
    rows = made.trained.banks["item"].rows.clone()
    form = TrainedFormat(1, 8)
    return decode_trained(torch.stack([torch.ones_like(rows[:, 0]), rows[:, -1]], 1), form)


def test_the_rate_is_read_at_each_step_and_zero_leaves_rows_alone():
    made = trained(kind=torch.optim.Adagrad)
    (group,) = made.trained.banks["item"].handle._in_backward_optimizers[0].param_groups
    for rate, moves in ((0.5, True), (0.0, False), (0.25, True)):
        group["lr"] = rate
        before = made.trained.banks["item"].rows.clone(), made.trained.banks["item"].state.clone()
        made(batch([[1, 2], [2]]))["item"].square().sum().backward()
        table = made.trained.banks["item"]
        assert torch.equal(table.rows, before[0]) is not moves
        assert (table.state.long().sum() != before[1].long().sum()).item() is moves


def test_a_bag_that_no_gradient_reaches_changes_nothing():
    made = trained(kind=torch.optim.Adagrad)
    before = made.trained.banks["item"].rows.clone()
    out = made(batch([[1], [2]]))["item"]
    (out[0].square().sum() + 0 * out[1].sum()).backward()
    changed = (made.trained.banks["item"].rows != before).any(1).nonzero().flatten().tolist()
    assert changed == [1]


def test_all_features_of_a_table_are_one_step():
    """Row-wise Adagrad sums the gradients of an id before it squares them."""
    one = trained(kind=RowWiseAdagrad, features=("a", "b"))
    other = trained(kind=RowWiseAdagrad, features=("a",))
    ids, lengths = torch.tensor([5, 5]), torch.tensor([1, 1])
    both = KeyedJaggedTensor.from_lengths_sync(["a", "b"], ids, lengths)
    out = one(both)
    (out["a"] + out["b"]).sum().backward()
    other(KeyedJaggedTensor.from_lengths_sync(["a"], ids, torch.tensor([2])))["a"].sum().backward()
    assert torch.equal(one.trained.banks["item"].rows, other.trained.banks["item"].rows)
    assert torch.equal(one.trained.banks["item"].state, other.trained.banks["item"].state)


@pytest.mark.parametrize(
    ("config", "kind", "wanted"),
    [
        (WHOLE, torch.optim.SGD, ("sgd", 0)),
        (WHOLE, torch.optim.Adagrad, ("adagrad", 64)),
        (WHOLE, RowWiseAdagrad, ("rowwise_adagrad", 4)),
        (NarrowConfig(width=16, bits=8, state_bits=8), torch.optim.Adagrad, ("adagrad", 18)),
        (NarrowConfig(width=8, bits=4, state_bits=8), RowWiseAdagrad, ("rowwise_adagrad", 1)),
        (NarrowConfig(width=8, bits=8, optimizer="rowwise_adagrad"), torch.optim.Adagrad, ("rowwise_adagrad", 4)),
        (WHOLE, torch.optim.Adam, ("adam", 128)),
        (NarrowConfig(width=16, bits=8, state_bits=8), torch.optim.Adam, ("adam", 36)),
        (
            NarrowConfig(width=8, bits=8, state_bits=8, optimizer="partial_rowwise_adam"),
            torch.optim.Adam,
            ("partial_rowwise_adam", 11),
        ),
    ],
)
def test_the_optimizer_is_the_users_unless_the_method_names_one(config, kind, wanted):
    made = trained(config, kind)
    made(batch([[1, 2]]))["item"].square().sum().backward()
    rows = made.trained.banks["item"]
    assert (rows.optimizer.kind, rows.state.shape[1]) == wanted
    assert torch.isfinite(rows_of(made)).all()


REFUSED = [
    (
        WHOLE,
        torch.optim.RMSprop,
        {},
        "must be trained by one of SGD, Adagrad, RowWiseAdagrad, Adam and .*, got RMSprop",
    ),
    (WHOLE, torch.optim.Adam, {"amsgrad": True}, r"are trained without \['amsgrad'\]"),
    (WHOLE, torch.optim.AdamW, {}, "got AdamW"),
    (NarrowConfig(width=8, bits=8, optimizer="adam"), torch.optim.Adagrad, {}, "got adam for adagrad"),
    (WHOLE, torch.optim.SGD, {"momentum": 0.9}, r"are trained without \['momentum'\], got \{'momentum': 0.9\}"),
    (WHOLE, torch.optim.Adagrad, {"weight_decay": 0.1}, r"are trained without \['weight_decay'\]"),
    (NarrowConfig(width=8, bits=8, optimizer="adagrad"), torch.optim.SGD, {}, "got adagrad for sgd"),
]


@pytest.mark.parametrize(("config", "kind", "options", "message"), REFUSED)
def test_optimizers_that_rows_cannot_be_trained_by_are_refused(config, kind, options, message):
    made = collection(config)
    apply_optimizer_in_backward(kind, native_parameters(made), {"lr": 0.1, **options})
    with pytest.raises(ValueError, match=f"table 'item': .*{message}"):
        made(batch([[1]]))


def test_without_an_optimizer_the_backward_says_so_and_a_frozen_table_takes_none():
    made = collection(INT8)
    out = made(batch([[1, 2]]))["item"]
    with pytest.raises(
        ValueError, match=r"table 'item': rows of 8 bits must be trained .* before the look-up, got none"
    ):
        out.sum().backward()
    before = made.trained.banks["item"].rows.clone()
    for frozen in (copy.deepcopy(made).eval(), made.requires_grad_(False)):
        frozen.decoder.requires_grad_(True)
        frozen(batch([[1, 2]]))["item"].sum().backward()
        assert torch.equal(frozen.trained.banks["item"].rows, before)


def test_evaluation_writes_nothing():
    made = trained(INT8)
    before = made.trained.banks["item"].rows.clone(), made.trained.banks["item"].num_steps.clone()
    with torch.no_grad():
        made(batch([[1, 2]]))
    made.eval()
    made(batch([[1, 2]]))["item"].sum().backward()
    table = made.trained.banks["item"]
    assert torch.equal(table.rows, before[0]) and torch.equal(table.num_steps, before[1])


def test_a_gradient_that_is_not_finite_reaches_no_row():
    made = trained()
    before = made.trained.banks["item"].rows.clone()
    out = made(batch([[1], [2]]))["item"]
    with pytest.raises(ValueError, match="table 'item': the gradient of id 2 must be finite at step 0, got NaN"):
        out.backward(torch.stack([torch.ones(16), torch.full((16,), float("nan"))]))
    assert torch.equal(made.trained.banks["item"].rows, before)


def test_averages_are_refused_and_copies_are_told(caplog):
    made = trained(rate=0.1)
    average = AveragedModel(made, use_buffers=True)
    average.update_parameters(made)
    for number in range(3):
        made(batch([[*range(100)]]))["item"].square().sum().backward()
        average.update_parameters(made)
        assert number < 3
    with pytest.raises(ValueError, match=r"table 'item': rows of 8 bits must be as training.*average"):
        average.module(batch([[1]]))
    other = collection(seed=3)
    other.trained.banks["item"].rows.copy_(made.trained.banks["item"].rows)
    other(batch([[1]]))
    assert "written by something else than training" in caplog.text


def test_a_blend_of_state_dicts_is_refused_and_a_copy_is_taken():
    first, second = collection(seed=1), collection(seed=2)
    key = "trained.banks.item.rows"
    states = [first.state_dict(), second.state_dict()]
    floats = {**states[0], key: (states[0][key].float() + states[1][key].float()) / 2}
    with pytest.raises(ValueError, match=f"{key}: must be integers, got torch.float32"):
        first.load_state_dict(floats)
    before = first.trained.banks["item"].rows.clone()
    with pytest.raises(ValueError, match=r"rows of 8 bits must be as training"):
        first.load_state_dict({**floats, key: floats[key].to(torch.uint8)})
    assert torch.equal(first.trained.banks["item"].rows, before) and len(native_parameters(first)) == 1
    first(batch([[1]]))


def test_rows_of_another_width_or_number_of_bits_are_refused():
    for other in (NarrowConfig(width=12, bits=8), NarrowConfig(width=16, bits=4), NarrowConfig(width=8)):
        with pytest.raises(
            (ValueError, RuntimeError), match=r"table 'item': the checkpoint's|trained\.banks\.item\.rows"
        ):
            collection(INT8).load_state_dict(collection(other).state_dict())
    state = collection(INT8).state_dict()
    state["trained.banks.item.rows"] = state["trained.banks.item.rows"].to(torch.int8)
    with pytest.raises(ValueError, match=r"table 'item': rows must be uint8 of shape \(rows, 9\), got torch\.int8"):
        collection(INT8).load_state_dict(state)


def test_start_and_training_follow_from_the_seed():
    made = [trained(INT8, torch.optim.Adagrad, seed=seed) for seed in (1, 1, 2)]
    for each in made:
        for number in range(3):
            each(batch([[number, 7], [8]]))["item"].square().sum().backward()
    rows = [each.trained.banks["item"].rows for each in made]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_a_fit_keeps_rows_to_the_rounding_of_their_bits():
    table = EmbeddingBagConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=["item"])
    stock = EmbeddingBagCollection([table])
    right = stock.embedding_bags["item"].weight.detach()
    served = compress(stock, WHOLE).table_rows("item", torch.arange(NUM_ROWS))
    assert bool(((served - right).abs() <= right.abs().amax(1, keepdim=True) * 1.13 / 127 / 2).all())


def test_unpooled_rows_train():
    table = EmbeddingConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=["item"])
    made = CompressedEmbeddingCollection([table], compression=INT8)
    apply_optimizer_in_backward(torch.optim.SGD, native_parameters(made), {"lr": 0.5})
    before = made.trained.banks["item"].rows.clone()
    rows = made(batch([[3, 3], [9]]))["item"].values()
    rows.square().sum().backward()
    changed = (made.trained.banks["item"].rows != before).any(1).nonzero().flatten().tolist()
    assert changed == [3, 9]


def test_no_tensor_of_the_tables_floats_is_made():
    """Neither when it is made, nor in a step: the largest one is of the batch, or of a block of rows."""

    class Largest(TorchDispatchMode):
        floats = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    self.floats = max(self.floats, tensor.numel())
            return out

    table = EmbeddingBagConfig(name="item", num_embeddings=300_000, embedding_dim=16, feature_names=["item"])
    with Largest() as seen:
        made = CompressedEmbeddingBagCollection([table], compression=NarrowConfig(width=8, bits=8, state_bits=8))
        apply_optimizer_in_backward(torch.optim.Adagrad, native_parameters(made), {"lr": 0.5})
        made(batch([[3, 3], [9]]))["item"].square().sum().backward()
    assert seen.floats <= 65536 * 8


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
def test_rows_from_a_state_dict_that_is_assigned_to_meta_tensors_train(kind):
    table = EmbeddingBagConfig(name="item", num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=["item"])
    made = CompressedEmbeddingBagCollection([table], device="meta", compression=WHOLE)
    made.load_state_dict(collection().state_dict(), assign=True)
    made = made.to_empty(device="cpu") if made.trained.banks["item"].rows.is_meta else made
    apply_optimizer_in_backward(kind, native_parameters(made), {"lr": 0.5})
    before = made.trained.banks["item"].rows.clone()
    made(batch([[1]]))["item"].square().sum().backward()
    assert (made.trained.banks["item"].rows != before).any(1).nonzero().flatten().tolist() == [1]


def test_torchrecs_stand_in_for_an_optimizer_is_refused_where_nothing_is_sharded():
    made = collection()
    apply_optimizer_in_backward(StandIn, native_parameters(made), {"lr": 0.1})
    with pytest.raises(ValueError, match=r"an optimizer of torch\.optim, got TorchRec's stand-in SGD"):
        made(batch([[1]]))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_trained_by_an_optimizer_of_its_own(twin):
    made = trained(kind=torch.optim.Adagrad)
    made(batch([[1]]))["item"].square().sum().backward()
    other = twin(made)
    with pytest.raises(ValueError, match="by an optimizer that is given before the look-up, got none"):
        other(batch([[1]]))["item"].square().sum().backward()
    apply_optimizer_in_backward(torch.optim.Adagrad, native_parameters(other), {"lr": 0.5})
    for each in (made, other):  # the state came along
        each(batch([[1]]))["item"].square().sum().backward()
    assert torch.equal(made.trained.banks["item"].state, other.trained.banks["item"].state)


@pytest.mark.parametrize("anew", ["drawn", "fitted"])
def test_rows_that_begin_anew_have_a_state_of_none(anew):
    made = trained(kind=torch.optim.Adam)
    made(batch([[1]]))["item"].sum().backward()
    bank = made.trained.banks["item"]
    assert bank.state.any() and bank.num_steps.any()
    if anew == "drawn":
        made.reset_parameters()
    else:
        compress_into(made, {"item": torch.ones(NUM_ROWS, 16)})
    assert not bank.state.any() and not bank.num_steps.any()


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.Adam, {"lr": 0.2, "betas": (0.5, 0.7), "eps": 0.5}), (torch.optim.Adagrad, {"lr": 0.2, "eps": 0.5})],
)
def test_every_setting_of_an_optimizer_counts(kind, options):
    made = collection()
    apply_optimizer_in_backward(kind, native_parameters(made), dict(options))
    right = nn.Parameter(rows_of(made)[1])
    optimizer, goal = kind([right], **options), torch.linspace(-2, 2, 16)
    for _ in range(6):
        optimizer.zero_grad()
        (right * goal).sin().sum().backward()
        optimizer.step()
        (made(batch([[1]]))["item"] * goal).sin().sum().backward()
    torch.testing.assert_close(rows_of(made)[1], right.detach(), rtol=0, atol=0.04)


def test_an_optimizer_of_another_kind_begins_with_steps_of_its_own():
    """Adam's first step moves by its rate, however often others have stepped before."""
    made = trained(kind=torch.optim.SGD, rate=0.01)
    for _ in range(100):
        made(batch([[1]]))["item"].sum().backward()
    other = copy.deepcopy(made)
    other(batch([[1]]))  # as the copy is, trained by nothing
    apply_optimizer_in_backward(torch.optim.Adam, native_parameters(other), {"lr": 0.5, "betas": (0.5, 0.999)})
    before = rows_of(other)[1]
    other(batch([[1]]))["item"].sum().backward()
    torch.testing.assert_close(before - rows_of(other)[1], torch.full((16,), 0.5), rtol=0, atol=0.03)


def test_they_stand_beside_codes_without_a_stock_table():
    """Codes alone are the whole output; with trained rows beside them they are not."""
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=NUM_ROWS, embedding_dim=16, feature_names=[name])
        for name in ("item", "code")
    ]
    methods = {"item": WHOLE, "code": RandomCodesConfig(num_codes=2, codebook_size=8)}
    made, ids = CompressedEmbeddingBagCollection(tables, compression=methods), torch.tensor([3, 5])
    pooled = made(KeyedJaggedTensor.from_lengths_sync(["item", "code"], ids, torch.ones(2, dtype=torch.int64)))
    rows = [made.table_rows(name, number[None]) for name, number in zip(methods, ids, strict=True)]
    assert torch.equal(pooled.values(), torch.cat(rows, dim=1))


def test_rows_made_for_inference_are_not_trained():
    with torch.inference_mode():
        made = collection()
        served = made(batch([[1, 2]]))["item"].clone()
    apply_optimizer_in_backward(torch.optim.SGD, native_parameters(made), {"lr": 0.5})
    assert torch.equal(made.eval()(batch([[1, 2]]))["item"], served)
    with pytest.raises(ValueError, match=r"table 'item': rows of 8 bits must be made outside of torch\.inference_mode"):
        made.train()(batch([[1, 2]]))


def test_backwards_through_a_kept_graph_round_by_dithers_of_their_own():
    made = trained()
    table, form = made.trained.banks["item"], TrainedFormat(16, 8, "sgd")
    rows, seed = table.rows.clone(), made.trained.table("item").seed
    ids, grads = torch.arange(100), torch.full((100, 16), 1e-4)
    out = made(batch([[number] for number in range(100)]))["item"]
    for again in range(3):
        out.backward(grads, retain_graph=True)
        step = TrainedStep(0.5, 0.0, seed + again, 0)
        update_trained(rows, rows.new_empty(NUM_ROWS, 0), ids, None, grads, form, step=step, where="plain maths")
        assert torch.equal(table.rows, rows)
