"""Narrow rows behind a projection."""

from dataclasses import replace

import pytest
import torch
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.cases import DIM, NUM_ROWS, batch, counts, dense_collection, fresh, rows, table
from torchrec_compress import CompressedEmbeddingBagCollection, compress, decompress, native_parameters
from torchrec_compress.methods import NarrowConfig, TableData


@pytest.mark.parametrize("weighted", [False, True])
def test_a_fit_loses_least_for_its_width_as_look_ups_weigh_it(weighted):
    config, weights = NarrowConfig(width=4), counts().double().clamp(min=1e-3) if weighted else torch.ones(NUM_ROWS)
    given = {"counts": {"item": counts()}} if weighted else {}
    served = decompress(compress(dense_collection(), config, **given)).embedding_bags["item"].weight.double()
    root = weights.double().sqrt()[:, None]
    left = torch.linalg.svdvals(rows().double() * root)[4:].square().sum()  # Eckart and Young
    torch.testing.assert_close(((served - rows()) * root).square().sum(), left, rtol=1e-4, atol=1e-6)


def test_a_fit_has_orthogonal_directions_in_one_order_and_sign():
    config = NarrowConfig(width=8)
    state = config.fit(table(), TableData(rows(), counts()))
    projection = state.decoder["projection"]
    torch.testing.assert_close(projection @ projection.T, DIM / 8 * torch.eye(8), rtol=0, atol=1e-5)
    assert bool((projection.gather(1, projection.abs().argmax(1, keepdim=True)) > 0).all())
    energy = (state.native["rows"].square() * counts()[:, None].clamp(min=1e-3)).sum(0)
    assert torch.equal(energy.argsort(descending=True), torch.arange(8))


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_embeddings_start_as_wide_as_the_users(rate):
    given = {"num_embeddings": 20_000, "weight_init_min": -0.3, "weight_init_max": 0.3}
    torch.manual_seed(0)
    collection = fresh(NarrowConfig(width=4, rate=rate), **given)
    projection = collection.decoder.banks["item"].projection
    torch.testing.assert_close(projection @ projection.T, rate**2 * DIM / 4 * torch.eye(4), rtol=0, atol=1e-5)
    served = collection.table_rows("item", torch.arange(20_000)).detach()
    assert float(served.square().mean().sqrt()) == pytest.approx(0.3 / 3**0.5, rel=0.03)


@pytest.mark.parametrize(("width", "rate"), [(4, 1.0), (8, 1.0), (8, 0.25)])
def test_a_step_moves_embeddings_as_far_as_it_moves_rows_of_full_width_times_the_rate(width, rate):
    torch.manual_seed(0)
    collection = fresh(NarrowConfig(width=width, rate=rate))
    (rows_of,) = (value for name, value in collection.named_parameters() if value.shape == (NUM_ROWS, width))
    before = collection.table_rows("item", torch.arange(NUM_ROWS)).detach().clone()
    optimizer = torch.optim.Adagrad([rows_of], lr=0.1)
    (collection(batch([list(range(NUM_ROWS))]))["item"] * torch.randn(DIM)).sum().backward()
    optimizer.step()
    moved = (collection.table_rows("item", torch.arange(NUM_ROWS)).detach() - before).norm(dim=1)
    torch.testing.assert_close(moved, torch.full_like(moved, rate * 0.1 * DIM**0.5), rtol=1e-4, atol=0)


def test_what_one_id_teaches_the_projection_serves_all():
    collection = fresh(NarrowConfig(width=4))
    before = collection.table_rows("item", torch.tensor([300])).detach().clone()
    optimizer = torch.optim.SGD(collection.parameters(), lr=1.0)
    collection(batch([[3, 5], [5]]))["item"].square().sum().backward()
    optimizer.step()
    assert not torch.equal(collection.table_rows("item", torch.tensor([300])), before)


@pytest.mark.parametrize(
    ("width", "dim", "message"),
    [
        (
            5,
            DIM,
            "width must be a multiple of 4 in .4, 12., with bits=32 and embedding_dim 16, got 5; the nearest is 4",
        ),
        (16, DIM, "got 16; the nearest is 12"),
        (0, DIM, "got 0; the nearest is 4"),
        (-8, DIM, "got -8; the nearest is 4"),
        (4, 4, "embedding_dim must be above 4 with narrow rows, got 4; leave the table dense"),
    ],
)
def test_a_width_that_no_kernel_takes_or_that_saves_nothing_is_refused(width, dim, message):
    with pytest.raises(ValueError, match=f"table 'item': .*{message}"):
        NarrowConfig(width=width).check(table(embedding_dim=dim))


@pytest.mark.parametrize("width", [5, 16, 20])
def test_a_width_that_does_not_fit_is_found_when_the_collection_is_made(width):
    with pytest.raises(ValueError, match="table 'item': width must be a multiple of 4"):
        fresh(NarrowConfig(width=width))


def test_a_table_too_short_to_shrink_stays_dense():
    collection = fresh(NarrowConfig(width=12), num_embeddings=40)
    assert collection.methods()["item"].method == "dense"


def test_smaller_widths_are_multiples_of_four():
    assert [NarrowConfig(width=24).smaller(level) for level in range(3)] == [
        NarrowConfig(width=12),
        NarrowConfig(width=4),
        None,
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 16}, r"bits must be one of \[32, 8, 4\], got 16"),
        ({"bits": 8.0}, r"bits must be one of \[32, 8, 4\], got 8.0"),
        ({"bits": 8, "state_bits": 16}, r"state_bits must be one of \[32, 8\], got 16"),
        ({"bits": 8, "optimizer": "lamb"}, "optimizer must be one of .*got 'lamb'"),
        ({"optimizer": "adagrad"}, "optimizer must be left out with bits=32"),
        ({"state_bits": 8}, "state_bits must be left out with bits=32"),
        ({"bits": 8, "state_bits": 8, "optimizer": "sgd"}, "state_bits must be left out with optimizer='sgd'"),
        ({"rate": 0.0}, r"rate must be in \[0.001, 1000\], got 0.0"),
        ({"rate": float("nan")}, r"NarrowConfig\.rate: must be finite, got nan"),
    ],
)
def test_options_that_do_nothing_or_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NarrowConfig(width=8, **options)


def test_few_bits_may_have_the_whole_width_and_no_projection():
    collection = fresh(NarrowConfig(width=16, bits=4))
    assert collection.methods()["item"].method == "narrow" and not collection.decoder.banks
    with pytest.raises(ValueError, match=r"width must be a multiple of 4 in .4, 16., with bits=8 .*got 20"):
        NarrowConfig(width=20, bits=8).check(table())
    with pytest.raises(ValueError, match="table 'item': rate must be left out with rows of the embedding's width, 16"):
        NarrowConfig(width=16, bits=8, rate=0.5).check(table())


@pytest.mark.parametrize("bits", [32, 8])
def test_the_rate_changes_nothing_of_what_a_fit_serves(bits):
    config = NarrowConfig(width=8, bits=bits)
    one, other = (
        decompress(compress(dense_collection(), each)).embedding_bags["item"].weight
        for each in (config, replace(config, rate=0.5))
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_rows_that_few_bits_do_not_hold_are_named_with_their_table_and_id():
    config, large = NarrowConfig(width=DIM, bits=8), rows().clone()
    large[3] = 1e6
    learned = config.learn(table(), TableData(rows()))
    with pytest.raises(ValueError, match="table 'item': the values of id 3 must be finite and at most 15240"):
        learned.encode(torch.tensor([7, 3]), large[[7, 3]])
    with pytest.raises(ValueError, match="table 'item': the values of id 0 must be finite and at most 15240"):
        fresh(config, init_fn=lambda weight: weight.fill_(1e6))


def test_a_state_of_few_bits_that_is_none_is_told(caplog):
    config = NarrowConfig(width=DIM, bits=8, state_bits=8)
    made = CompressedEmbeddingBagCollection([table()], compression=config)
    apply_optimizer_in_backward(torch.optim.SGD, native_parameters(made), {"lr": 0.1})
    with caplog.at_level("INFO"):
        made(batch([[1, 2], [3]]))
    assert "table 'item': state_bits changes nothing, as sgd keeps no state" in caplog.text
