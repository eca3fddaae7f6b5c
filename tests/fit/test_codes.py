"""Popularity weights, fitted codes, refit, product and residual codes."""

import pytest
import torch

from torchrec_compress.fit import refit, residual
from torchrec_compress.fit.codes import FittedCodes, decode, weighted_error
from torchrec_compress.fit.kmeans import kmeans
from torchrec_compress.fit.popularity import popularity_weights
from torchrec_compress.fit.product import fit_product
from torchrec_compress.fit.refit import RefitSums, refit_codebooks
from torchrec_compress.fit.residual import fit_prefixes, fit_residual, greedy_codes, recode


def table(num_rows: int = 3000, width: int = 16, seed: int = 0) -> torch.Tensor:
    """Rows with correlated columns of unequal scale, as trained tables have them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / torch.arange(1, width + 1).sqrt()
    return torch.randn(num_rows, width, generator=generator) @ mixing


def zipf(num_rows: int) -> torch.Tensor:
    return (10000 / torch.arange(1, num_rows + 1)).floor()


def test_popularity_kinds() -> None:
    counts = torch.tensor([0, 1, 2, 3, 4, 1023, 1024, 2**40])
    assert popularity_weights(counts, "count", 8).tolist() == [pytest.approx(1e-3), 1, 2, 3, 4, 1023, 1024, 2**40]
    assert popularity_weights(counts, "log2", 8).tolist() == [pytest.approx(1e-3), 1, 1, 1, 2, 9, 10, 40]
    assert popularity_weights(None, "none", 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("counts", "kind", "message"),
    [
        (None, "count", "kind 'count' needs counts, got None"),
        (torch.ones(3), "log2", r"counts must have shape \[2\], one per row, got \[3\]"),
        (torch.tensor([1.0, -2.0]), "count", "must be finite and >= 0, got -2.0 for row 1"),
        (torch.tensor([float("nan"), 1.0]), "log2", "got nan for row 0"),
        (torch.ones(2), "sqrt", "kind must be 'count', 'log2' or 'none', got 'sqrt'"),
    ],
)
def test_popularity_bad_input(counts: torch.Tensor | None, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        popularity_weights(counts, kind, 2)  # type: ignore[arg-type]


def test_weighted_error_by_hand() -> None:
    rows = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    assert weighted_error(rows, torch.zeros(2, 2)) == pytest.approx((2 + 4) / 2 / 2)
    assert weighted_error(rows, torch.zeros(2, 2), torch.tensor([3.0, 1.0])) == pytest.approx((3 * 2 + 4) / 4 / 2)


def test_reconstruct_by_hand() -> None:
    codes, books = torch.tensor([[2, 0], [1, 1]]), torch.arange(12.0).view(6, 2)
    assert decode(codes, books, "product").tolist() == [[4, 5, 6, 7], [2, 3, 8, 9]]
    assert decode(codes, books, "residual").tolist() == [[10, 12], [10, 12]]
    fitted = FittedCodes(codes, books, "product")
    assert (fitted.num_codes, fitted.codebook_size) == (2, 3)
    assert fitted.error(fitted.reconstruct() + 1) == 1.0


@pytest.mark.parametrize("kind", ["product", "residual"])
@pytest.mark.parametrize("way", ["solve", "sweep the sums", "sweep the rows"])
def test_refit_never_raises_the_weighted_error(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way != "solve":
        monkeypatch.setattr(refit, "MAX_NORMAL_EQUATIONS", 0)
    if way == "sweep the rows":
        monkeypatch.setattr(refit, "MAX_UNKNOWNS", 0)
    rows, weights = table(), zipf(3000)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(20, (3000, 4), generator=generator)
        codes[0] = 0
        start = torch.randn(80, 4 if kind == "product" else 16, generator=generator)
        books = refit_codebooks(codes, rows, weights, codebook_size=20, kind=kind, start=start)  # type: ignore[arg-type]
        before = weighted_error(rows, decode(codes, start, kind), weights)  # type: ignore[arg-type]
        after = weighted_error(rows, decode(codes, books, kind), weights)  # type: ignore[arg-type]
        assert after < before
        again = refit_codebooks(codes, rows, weights, codebook_size=20, kind=kind, start=books)  # type: ignore[arg-type]
        assert weighted_error(rows, decode(codes, again, kind), weights) <= after * (1 + 1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["product", "residual"])
def test_sums_of_blocks_are_the_sums_of_all_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weights = table(), zipf(3000)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(20, (3000, 4), generator=generator)
    start = torch.randn(80, 4 if kind == "product" else 16, generator=generator)
    whole = refit_codebooks(codes, rows, weights, codebook_size=20, kind=kind, start=start)  # type: ignore[arg-type]
    sums = RefitSums(start, 4, kind)  # type: ignore[arg-type]
    for first, last in ((0, 1), (1, 2000), (2000, 3000)):
        sums.add(codes[first:last], rows[first:last], weights[first:last])
    assert torch.equal(sums.codebooks(), whole)
    monkeypatch.setattr(refit, "CHUNK_ROWS", 100)
    assert torch.equal(refit_codebooks(codes, rows, weights, codebook_size=20, kind=kind, start=start), whole)  # type: ignore[arg-type]


def test_sweeps_over_sums_are_those_over_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "MAX_NORMAL_EQUATIONS", 0)
    rows, weights = table(), zipf(3000)
    codes = torch.randint(20, (3000, 4), generator=torch.Generator().manual_seed(0))
    codes[:, 1] = codes[:, 1].clamp(max=10)  # codewords that nothing uses keep their start
    start = torch.randn(80, 16, generator=torch.Generator().manual_seed(1))
    of_sums = refit_codebooks(codes, rows, weights, codebook_size=20, kind="residual", start=start)
    monkeypatch.setattr(refit, "MAX_UNKNOWNS", 0)
    of_rows = refit_codebooks(codes, rows, weights, codebook_size=20, kind="residual", start=start)
    torch.testing.assert_close(of_sums, of_rows, rtol=1e-4, atol=1e-4)
    assert torch.equal(of_sums[31:40], start[31:40])


def test_residual_refit_is_the_least_squares_solution() -> None:
    rows, weights = table(400, 6), zipf(400)
    codes = torch.randint(5, (400, 3), generator=torch.Generator().manual_seed(0))
    books = refit_codebooks(codes, rows, weights, codebook_size=5, kind="residual")
    design = torch.nn.functional.one_hot(codes, 5).flatten(1).double()
    root = weights.double().sqrt()[:, None]
    best = torch.linalg.lstsq(design * root, rows.double() * root, driver="gelsd").solution
    expected = weighted_error(rows, (design @ best).float(), weights)
    assert weighted_error(rows, decode(codes, books, "residual"), weights) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["product", "residual"])
def test_refit_keeps_codewords_that_no_weighted_row_uses(kind: str) -> None:
    rows, weights = table(50, 4), torch.ones(50)
    weights[7] = 0
    codes = torch.zeros(50, 2, dtype=torch.int64)
    codes[7] = 2
    start = torch.full((6, 2 if kind == "product" else 4), 9.0)
    books = refit_codebooks(codes, rows, weights, codebook_size=3, kind=kind, start=start)  # type: ignore[arg-type]
    assert torch.equal(books.view(2, 3, -1)[:, 1:], start.view(2, 3, -1)[:, 1:])
    unused = refit_codebooks(codes, rows, weights, codebook_size=3, kind=kind)  # type: ignore[arg-type]
    assert not unused.view(2, 3, -1)[:, 1:].any()
    assert torch.equal(start, torch.full_like(start, 9.0))


@pytest.mark.parametrize("num_codes", [1, 2, 4])
def test_residual_codes_are_no_worse_than_product_codes(num_codes: int) -> None:
    rows = table()
    product = fit_product(rows, num_codes, 64).error(rows)
    assert fit_residual(rows, num_codes, 64).error(rows) <= product * (1 + 1e-6)


def test_residual_refits_help_and_recode_never_hurts() -> None:
    rows, weights = table(), zipf(3000)
    greedy = fit_residual(rows, 4, 32, weights=weights, num_refits=0)
    assert fit_residual(rows, 4, 32, weights=weights).error(rows, weights) < 0.95 * greedy.error(rows, weights)
    codes = greedy_codes(rows, greedy.codebooks, [32] * 4)
    better = recode(codes, rows, greedy.codebooks, [32] * 4)
    before = (rows - decode(codes, greedy.codebooks, "residual")).square().sum(dim=1)
    after = (rows - decode(better, greedy.codebooks, "residual")).square().sum(dim=1)
    assert (after <= before * (1 + 1e-4) + 1e-5).all()
    assert after.sum() < before.sum()


def test_greedy_codes_are_nearest_to_what_is_left() -> None:
    books = torch.tensor([[0.0], [10.0], [0.0], [1.0]])
    assert greedy_codes(torch.tensor([[10.1], [10.9], [0.2]]), books, [2, 2]).tolist() == [[1, 0], [1, 1], [0, 0]]


@pytest.mark.parametrize("sampled", [False, True])
def test_residual_codebooks_solve_least_squares_for_the_codes_of_all_rows(sampled, monkeypatch) -> None:
    swept = []
    if sampled:
        monkeypatch.setattr(residual, "train_size", lambda *_: 160)
    monkeypatch.setattr(
        residual, "recode", lambda codes, rows, *books: (swept.append(len(rows)), recode(codes, rows, *books))[1]
    )
    rows, weights = table(700), zipf(700)
    fitted = fit_residual(rows, 3, 16, weights=weights, num_refits=4)
    again = refit_codebooks(fitted.codes, rows, weights, codebook_size=16, kind="residual", start=fitted.codebooks)
    best = weighted_error(rows, decode(fitted.codes, again, "residual"), weights)
    assert fitted.error(rows, weights) == pytest.approx(best, rel=1e-5)
    assert swept == ([160] * 3 + [700] * 2 if sampled else [700] * (3 + 4))  # to learn, then to encode


def test_every_slice_is_clustered_by_a_seed_of_its_own() -> None:
    rows = table(400)
    fitted = fit_product(rows, 4, 16, seed=5)
    for m, part in enumerate(rows.split(4, dim=1)):
        alone = kmeans(part.contiguous(), 16, seed=5 + m)
        assert torch.equal(fitted.codes[:, m], alone.assignment)
        assert torch.equal(fitted.codebooks[16 * m : 16 * (m + 1)], alone.centroids)


def test_product_error_is_the_mean_of_its_slices_and_falls_with_codes() -> None:
    rows = table()
    errors = [fit_product(rows, num_codes, 64).error(rows) for num_codes in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    fitted = fit_product(rows, 2, 64)
    halves = [weighted_error(rows[:, s], fitted.reconstruct()[:, s]) for s in (slice(0, 8), slice(8, 16))]
    assert fitted.error(rows) == pytest.approx(sum(halves) / 2)


@pytest.mark.parametrize("fit", [fit_product, fit_residual])
class TestBothFits:
    def test_first_size_leaves_room_for_escapes(self, fit) -> None:
        rows = table(500)
        fitted = fit(rows, 2, 16, first_size=13)
        assert int(fitted.codes[:, 0].max()) == 12
        assert int(fitted.codes[:, 1].max()) == 15
        books = fitted.codebooks.view(2, 16, -1)
        assert not books[0, 13:].any()
        assert books[0, :13].abs().sum(dim=1).all()

    def test_weights_matter(self, fit) -> None:
        rows, weights = table(), torch.ones(3000)
        weights[:100] = 50.0
        heavy = slice(0, 100)
        plain, weighted = fit(rows, 2, 32).reconstruct(), fit(rows, 2, 32, weights=weights).reconstruct()
        assert weighted_error(rows[heavy], weighted[heavy]) < 0.8 * weighted_error(rows[heavy], plain[heavy])

    def test_deterministic_in_seed(self, fit) -> None:
        rows = table(500)
        first, again, other = fit(rows, 2, 16, seed=1), fit(rows, 2, 16, seed=1), fit(rows, 2, 16, seed=2)
        assert torch.equal(first.codes, again.codes)
        assert torch.equal(first.codebooks, again.codebooks)
        assert not torch.equal(first.codes, other.codes)

    def test_input_is_not_written_to_and_shapes_hold(self, fit) -> None:
        rows, weights = table(200), zipf(200)
        copies = rows.clone(), weights.clone()
        fitted = fit(rows, 4, 8, weights=weights)
        assert torch.equal(rows, copies[0])
        assert torch.equal(weights, copies[1])
        assert fitted.codes.dtype == torch.int64
        assert fitted.codebooks.shape == (32, 4 if fit is fit_product else 16)
        assert fitted.codebooks.is_contiguous()

    def test_as_many_codewords_as_rows(self, fit) -> None:
        rows = table(20)
        assert fit(rows, 1, 20).error(rows) < 1e-9

    def test_sampled_training_codes_every_row(self, fit) -> None:
        rows = torch.randn(70000, 2, generator=torch.Generator().manual_seed(0))
        fitted = fit(rows, 1, 4, max_points_per_centroid=1)
        assert fitted.codes.shape == (70000, 1)
        assert fitted.error(rows) <= 1.02 * fit(rows, 1, 4, max_points_per_centroid=10**6).error(rows)


def test_prefixes_of_one_fit_are_near_fits_of_their_own() -> None:
    rows, weights = table(), zipf(3000)
    for fitted in fit_prefixes(rows, [1, 2, 4], 64, first_size=60, weights=weights):
        own = fit_residual(rows, fitted.num_codes, 64, first_size=60, weights=weights)
        assert fitted.codes.shape == own.codes.shape and fitted.codebooks.shape == own.codebooks.shape
        assert int(fitted.codes[:, 0].max()) < 60
        assert 0.95 < fitted.error(rows, weights) / own.error(rows, weights) < 1.1
