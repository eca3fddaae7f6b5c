"""A byte budget is kept, and bytes follow look-ups."""

import logging

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from torchrec_compress import CompressedEmbeddingBagCollection, compress, predicted_rise
from torchrec_compress.compression import for_budget, measure_frontier
from torchrec_compress.compression.budget import smallest_bytes
from torchrec_compress.compression.candidates import Tried, families_of
from torchrec_compress.fit.curvature import Curvature, Witnesses
from torchrec_compress.fit.mec import MECFit
from torchrec_compress.methods import MECConfig, NarrowConfig, PQConfig, QuantileCodesConfig

FEW = PQConfig(num_codes=1, codebook_size=32, popularity="count")  # codewords, which are quick to fit


def trained(rows: dict[str, int], width: int = 16) -> EmbeddingBagCollection:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=number, embedding_dim=width, feature_names=[name])
        for name, number in rows.items()
    ]
    return EmbeddingBagCollection(tables)


def test_the_compressed_collection_fits_the_budget() -> None:
    dense = trained({"user": 1000, "item": 400, "day": 7})
    counts = {"user": torch.ones(1000), "item": 1e6 / torch.arange(1, 401), "day": torch.full((7,), 1000.0)}
    most = 12_000
    chosen = for_budget(dense, counts, most, num_codes=(1, 2), codes=FEW)
    footprint = compress(dense, chosen, counts=counts).footprint()
    assert footprint.total_bytes == chosen.num_bytes <= most
    assert footprint.total_bytes > 0.7 * most, "most of the budget should be used"
    assert chosen.shares["day"].error < 0.02 * chosen.error  # few rows, looked up often: int4 would cost most of all


def test_bytes_follow_look_ups() -> None:
    rows = {name: torch.randn(700, 16, generator=torch.Generator().manual_seed(1)) for name in ("hot", "cold")}
    counts = {"hot": torch.full((700,), 1000.0), "cold": torch.full((700,), 1.0)}
    chosen = for_budget(rows, counts, 20_000, num_codes=(1, 2), codes=FEW)
    table = EmbeddingBagConfig(name="t", num_embeddings=700, embedding_dim=16, feature_names=["t"])
    assert chosen["hot"].stored_bytes(table) > 1.5 * chosen["cold"].stored_bytes(table)


def test_bad_input_says_what_to_do() -> None:
    rows = {"user": torch.randn(500, 16)}
    with pytest.raises(ValueError, match="only one of the two for \\['user'\\]"):
        for_budget(rows, {}, 1000)
    with pytest.raises(ValueError, match="budget"):
        for_budget(rows, {"user": torch.ones(500)}, 10, num_codes=(1,), codes=FEW)


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({"item": 3.0}, r"noise must be look-ups by name of tables \['user'\]"),
        ([3.0], "noise must be look-ups by name"),
        ({"user": -1.0}, "table 'user': noise must be finite look-ups >= 0, got -1.0"),
        ({"user": float("nan")}, "table 'user': noise must be finite look-ups >= 0, got nan"),
        ({"user": True}, "table 'user': noise must be finite look-ups >= 0, got True"),
    ],
)
def test_noise_that_cannot_be_is_refused(noise, message):
    with pytest.raises(ValueError, match=message):
        for_budget({"user": torch.randn(500, 16)}, {"user": torch.ones(500)}, 9000, codes=FEW, noise=noise)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_candidates_that_train_in_their_fit_do_so_whatever_is_switched_off(mode) -> None:
    given = {"user": torch.randn(600, 8, generator=torch.Generator().manual_seed(0))}, {"user": torch.ones(600)}
    codes = MECConfig(num_codes=1, codebook_size=16, fit_options=MECFit(num_steps=3, batch_size=64))
    expected = for_budget(*given, 2500, num_codes=(1,), codes=codes)
    with mode():
        assert for_budget(*given, 2500, num_codes=(1,), codes=codes) == expected
    assert expected["user"].method == "mec"


def test_codes_that_need_contexts_are_refused() -> None:
    given = {"user": torch.randn(60, 8)}, {"user": torch.ones(60)}
    with pytest.raises(ValueError, match="codes must be fitted to rows alone, got 'quantile', which needs contexts"):
        for_budget(*given, 2500, codes=QuantileCodesConfig(num_codes=1, codebook_size=16))


def dense_of(rows: dict[str, torch.Tensor]) -> EmbeddingBagCollection:
    dense = trained({name: len(mine) for name, mine in rows.items()})
    with torch.no_grad():
        for name, mine in rows.items():
            dense.embedding_bags[name].weight.copy_(mine)  # type: ignore[operator]
    return dense


def curvature_of(name: str, rows: torch.Tensor, scale: float = 1.0, **changes) -> Curvature:
    """Return a curvature that feels two directions of a table, looked up once an example."""
    width = rows.shape[1]
    felt = torch.randn(width, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(width))
    ids = torch.full((1, 8), -1)
    ids[0, 0], factors = 1, torch.zeros(1, 8, dtype=torch.float64)
    factors[0, 0] = 1
    values = {
        "table": name,
        "num_embeddings": len(rows),
        "matrix": scale * felt @ felt.T,
        "examples": 1000,
        "lookups": 1000,
        "moved": 0.0,
        "witnesses": Witnesses(ids, factors, rows[1:2].double()),
    }
    return Curvature(**{**values, **changes})


def felt_tables() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Curvature]]:
    """Return two tables of one size and popularity, of which the model feels one a hundred times as much."""
    generator = torch.Generator().manual_seed(4)
    rows = {name: torch.randn(600, 16, generator=generator) for name in ("felt", "idle")}
    counts = {name: 1 + 3000 // torch.arange(1, 601) for name in rows}
    return rows, counts, {name: curvature_of(name, rows[name], 1.0 if name == "felt" else 0.01) for name in rows}


def test_with_a_curvature_bytes_lower_the_predicted_rise() -> None:
    rows, counts, curvature = felt_tables()
    dense = trained({name: 600 for name in rows})
    with torch.no_grad():
        for name, mine in rows.items():
            dense.embedding_bags[name].weight.copy_(mine)  # type: ignore[operator]
    rises, budget = [], 12_000
    for known in (curvature, None):
        chosen = for_budget(rows, counts, budget, curvature=known, num_codes=(1, 2, 4), codes=FEW)
        made = compress(dense, chosen, counts=counts, curvature=curvature)
        assert made.footprint().total_bytes == chosen.num_bytes <= budget
        found = {name: made.table_rows(name, torch.arange(600)).detach() for name in rows}
        rises.append(sum(predicted_rise(rows[name], found[name], counts[name], curvature[name]) for name in rows))
        if known is not None:
            assert chosen.unit == "loss" and rises[0] < chosen.error < 1.5 * rises[0]
            assert chosen.shares["felt"].num_bytes > 1.5 * chosen.shares["idle"].num_bytes
        else:
            assert chosen.unit == "squared error"
    assert rises[0] < 0.7 * rises[1]


def test_errors_of_exact_methods_are_predicted_rises() -> None:
    """int8 and int4 rows are not estimated: all rows are measured as they would be served."""
    rows, counts, curvature = felt_tables()
    counts["felt"][3] = 0  # an id without look-ups costs nothing
    given = {"felt": rows["felt"]}, {"felt": counts["felt"]}
    frontier = measure_frontier(*given, curvature={"felt": curvature["felt"]}, num_codes=(1,), codes=FEW)
    dense = trained({"felt": 600})
    with torch.no_grad():
        dense.embedding_bags["felt"].weight.copy_(rows["felt"])  # type: ignore[operator]
    plain = [each for each in frontier.candidates["felt"] if each.option.method in ("int8", "int4")]
    assert len(plain) == 2
    for each in plain:
        served = compress(dense, each.option).table_rows("felt", torch.arange(600)).detach()
        rise = predicted_rise(rows["felt"], served, counts["felt"], curvature["felt"])
        assert each.error == pytest.approx(rise, rel=1e-6)


def test_a_table_that_is_never_looked_up_costs_nothing_and_gets_little(caplog) -> None:
    rows, counts, curvature = felt_tables()
    counts["idle"] = torch.zeros(600)
    with caplog.at_level(logging.INFO):
        found = for_budget(rows, counts, 30_000, curvature={"felt": curvature["felt"]}, num_codes=(1, 2), codes=FEW)
    assert found.shares["idle"].error == 0 and found.shares["idle"].num_bytes == 4 * 16
    assert "table 'idle': never looked up" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows, found: found.pop("idle"), "table 'idle': must have a curvature .* got none; measure more"),
        (
            lambda rows, found: found.update(idle=curvature_of("idle", rows["idle"], lookups=0)),
            "table 'idle': must have a curvature .* got one of no look-ups",
        ),
        (lambda rows, found: found.update(other=found["idle"]), r"curvature must name tables .* got \['other'\]"),
        (lambda rows, found: found.update(idle=found["felt"]), "table 'idle': curvature must be its own"),
        (lambda rows, found: rows["idle"].add_(1), "table 'idle': curvature must be of the model"),
    ],
)
def test_a_curvature_that_tells_nothing_of_a_table_is_refused(change, message) -> None:
    rows, counts, curvature = felt_tables()
    change(rows, curvature)
    with pytest.raises(ValueError, match=message):
        for_budget(rows, counts, 30_000, curvature=curvature, num_codes=(1,), codes=FEW)


def test_a_curvature_of_too_few_examples_still_predicts_but_is_no_metric(caplog) -> None:
    rows, counts, curvature = felt_tables()
    curvature["idle"] = curvature_of("idle", rows["idle"], examples=9, lookups=9)
    found = for_budget(rows, counts, 30_000, curvature=curvature, num_codes=(1,), codes=FEW)
    assert found.unit == "loss"
    assert "table 'idle': fitted to squared error, not to the loss: 9 examples" in caplog.text


def narrow_table(num_rows: int = 900, rank: int = 8, width: int = 32) -> CompressedEmbeddingBagCollection:
    table = EmbeddingBagConfig(name="user", num_embeddings=num_rows, embedding_dim=width, feature_names=["user"])
    return CompressedEmbeddingBagCollection([table], compression=NarrowConfig(width=rank, bits=8))


def test_codes_of_a_table_that_was_trained_small_are_codes_of_its_narrow_rows() -> None:
    small, counts = narrow_table(), {"user": 1 + 3000 // torch.arange(1, 901)}
    frontier = measure_frontier(small, counts, num_codes=(1, 2, 4), codes=FEW, widths=(16, 4))
    coded = [each.option for each in frontier.candidates["user"] if isinstance(each.option, PQConfig)]
    # more numbers than rows have buy nothing; fewer may
    assert coded and {method.width for method in coded} == {8, 4}
    chosen = frontier.choose(12_000)
    made = compress(small, chosen, counts=counts)
    assert made.footprint().total_bytes == chosen.num_bytes <= 12_000
    # rows of rank 8 lose nothing by the width, so that the same bytes buy more codes than of full rows
    rows = {"user": small.table_rows("user", torch.arange(900)).detach()}
    wide = measure_frontier(rows, counts, num_codes=(1, 2, 4), codes=FEW).choose(12_000)
    assert chosen.error < 0.7 * wide.error


def test_no_codes_have_more_numbers_than_rows_have_directions() -> None:
    """They would be dominated in the end; their fits are what is saved."""
    table = EmbeddingBagConfig(name="user", num_embeddings=900, embedding_dim=32, feature_names=["user"])
    tried = Tried(FEW, (2,), (4, 8, 16, 64))
    assert [family.width for family, _ in families_of(table, tried, 8)] == [8, 8, 4, 4]
    assert [family.width for family, _ in families_of(table, tried, 32)] == [None, None, 16, 16, 8, 8, 4, 4]


def test_widths_are_tried_where_rows_have_more_numbers() -> None:
    rows = {"user": torch.randn(600, 16, generator=torch.Generator().manual_seed(4))}
    rows["user"][:, 6:] *= 0.01  # of which hardly more than six directions matter
    counts = {"user": torch.ones(600)}
    frontier = measure_frontier(rows, counts, num_codes=(1, 2), codes=FEW, widths=(8, 16, 64))
    widths = {each.option.width for each in frontier.candidates["user"] if isinstance(each.option, PQConfig)}
    assert 8 in widths and widths <= {8, None}
    plain = measure_frontier(rows, counts, num_codes=(1, 2), codes=FEW)
    assert frontier.choose(5000).error < plain.choose(5000).error
    chosen = frontier.choose(5000)
    dense = trained({"user": 600})
    with torch.no_grad():
        dense.embedding_bags["user"].weight.copy_(rows["user"])  # type: ignore[operator]
    assert compress(dense, chosen, counts=counts).footprint().total_bytes == chosen.num_bytes


def test_what_hardly_counts_is_one_row_for_all_ids() -> None:
    rows, counts, curvature = felt_tables()
    sizes = [EmbeddingBagConfig(name=name, num_embeddings=600, embedding_dim=16, feature_names=[name]) for name in rows]
    frontier = measure_frontier(rows, counts, curvature=curvature, num_codes=(1, 2), codes=FEW)
    least = frontier.choose(smallest_bytes(sizes))
    assert [method.method for method in least.values()] == ["hash", "hash"] and least.num_bytes == 2 * 4 * 16
    with pytest.raises(ValueError, match="budget"):
        frontier.choose(smallest_bytes(sizes) - 1)
    made = compress(dense_of(rows), least, counts=counts)
    for name, share in least.shares.items():  # the error is no estimate
        served = made.table_rows(name, torch.arange(600)).detach()
        assert bool((served == served[0]).all())
        assert share.error == pytest.approx(predicted_rise(rows[name], served, counts[name], curvature[name]), rel=1e-4)
    more = frontier.choose(4_000)
    assert more["felt"].method != "hash" and more["idle"].method == "hash"


@pytest.mark.parametrize("given", [(0,), (True,), (8.0,), ("8",)])
def test_widths_that_are_none_are_refused(given) -> None:
    with pytest.raises(ValueError, match=r"^measure_frontier: widths must be numbers of at least 1, got "):
        measure_frontier({"user": torch.randn(60, 8)}, {"user": torch.ones(60)}, widths=given)
