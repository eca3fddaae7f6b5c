"""MEC: every term moves what it should, the regulariser balances, negatives are real, the dead come back."""

import pytest
import torch

from torchrec_compress.fit import mec
from torchrec_compress.fit.mec import (
    MECAutoEncoder,
    MECFit,
    fit_mec,
    mec_terms,
    one_code_negatives,
    restart_dead,
    train_auto_encoder,
)

FAST = {"num_steps": 150, "batch_size": 512}


def skewed_table(num_rows: int = 4000, width: int = 8) -> torch.Tensor:
    """Most rows in one tight cloud, few rows far out: k-means spends its codewords on the few."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(num_rows, width, generator=generator)
    return rows * torch.rand(num_rows, 1, generator=generator) ** 2


def model_and_batch() -> tuple[MECAutoEncoder, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = MECAutoEncoder(torch.randn(2, 5, 3, generator=generator), first_size=4)
    return model, torch.randn(40, 6, generator=generator)


def perplexity(codes: torch.Tensor, codebook_size: int) -> float:
    shares = [torch.bincount(column, minlength=codebook_size) / len(codes) for column in codes.T]
    return sum(float(torch.special.entr(share).sum().exp()) for share in shares) / len(shares)


@pytest.mark.parametrize(
    ("term", "moved"),
    [
        ("reconstruction", {"encoder", "decoder"}),
        ("codebook", {"codebooks"}),
        ("commitment", {"encoder"}),
        ("usage", {"encoder", "codebooks"}),
        ("contrast", {"encoder", "codebooks"}),
    ],
)
def test_every_term_moves_what_it_should_and_nothing_else(term: str, moved: set[str]) -> None:
    model, rows = model_and_batch()
    options = MECFit(usage_temperature=1.0)
    terms, _ = mec_terms(model, rows, torch.ones(40), options, torch.Generator().manual_seed(0))
    terms[term].backward()
    for name, parameter in model.named_parameters():
        norm = 0.0 if parameter.grad is None else float(parameter.grad.norm())
        assert norm > 1e-6 if name in moved else norm == 0.0, (name, norm)
        if name == "codebooks" and parameter.grad is not None:
            assert not parameter.grad[0, 4:].any()  # beyond first_size
            assert parameter.grad.flatten(2).abs().sum(dim=2)[1].count_nonzero() > 1


def test_without_straight_through_the_reconstruction_moves_codebooks_and_not_the_encoder() -> None:
    model, rows = model_and_batch()
    options = MECFit(straight_through=False, commitment=0.0, usage=0.0, contrast=0.0)
    terms, _ = mec_terms(model, rows, torch.ones(40), options, torch.Generator().manual_seed(0))
    assert set(terms) == {"reconstruction"}
    terms["reconstruction"].backward()
    assert model.encoder.grad is None or not model.encoder.grad.any()
    assert model.codebooks.grad is not None
    assert model.decoder.grad is not None
    assert model.codebooks.grad.any()
    assert model.decoder.grad.any()


def test_switches_leave_terms_out() -> None:
    model, rows = model_and_batch()
    for name in ("commitment", "usage", "contrast"):
        terms, _ = mec_terms(model, rows, torch.ones(40), MECFit(**{name: 0.0}), torch.Generator().manual_seed(0))
        assert set(terms) == {"reconstruction", "codebook", "commitment", "usage", "contrast"} - {name}


def test_terms_by_hand() -> None:
    model = MECAutoEncoder(torch.tensor([[[0.0], [2.0]], [[0.0], [4.0]]]), first_size=2)
    rows, weights = torch.tensor([[1.8, 0.0], [0.0, 3.0]]), torch.tensor([1.5, 0.5])
    options = MECFit(contrast=0.0, usage=1.0)
    with torch.no_grad():
        terms, codes = mec_terms(model, rows, weights, options, torch.Generator().manual_seed(0))
    assert codes.tolist() == [[1, 0], [0, 1]]
    gap = (1.5 * 0.2**2 / 2 + 0.5 * 1.0**2 / 2) / 2
    assert float(terms["reconstruction"]) == pytest.approx(gap, rel=1e-5)
    assert float(terms["commitment"]) == pytest.approx(0.25 * gap, rel=1e-5)
    share = torch.tensor([0.25, 0.75])  # of the weight, in either codebook
    expected = 2 * float(torch.special.entr(share).sum() - torch.log(torch.tensor(2.0))) ** 2
    assert float(terms["usage"]) == pytest.approx(expected, rel=1e-2)


def test_negatives_differ_in_exactly_one_code() -> None:
    sizes = [3, 1, 7, 256]
    generator = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(size, (20000,), generator=generator) for size in sizes], dim=1)
    negatives = one_code_negatives(codes, sizes, generator)
    different = negatives != codes
    assert (different.sum(dim=1) == 1).all()
    assert (negatives < torch.tensor(sizes)).all()
    assert (negatives >= 0).all()
    assert not different[:, 1].any()  # one codeword has no other
    assert different[:, [0, 2, 3]].float().mean(dim=0).tolist() == pytest.approx([1 / 3] * 3, abs=0.02)
    other = negatives[different[:, 2] & (codes[:, 2] == 0), 2]
    assert torch.bincount(other, minlength=7)[1:].min() > 0.8 * len(other) / 6


def test_contrast_compares_encoded_with_quantised_rows_and_falls_in_training() -> None:
    rows = skewed_table()
    values = {}
    for contrast in (0.0, 1.0):
        generator = torch.Generator().manual_seed(0)
        model = MECAutoEncoder(torch.randn(2, 16, 4, generator=generator) * 0.3, first_size=16)
        options = MECFit(**FAST, contrast=contrast, usage=0.0, learning_rate=1e-2)
        train_auto_encoder(model, rows, torch.ones(len(rows)), options, generator, progress=False)
        probe = MECFit(contrast=1.0)
        with torch.no_grad():
            terms, _ = mec_terms(model, rows, torch.ones(len(rows)), probe, torch.Generator().manual_seed(9))
        values[contrast] = float(terms["contrast"])
    assert values[1.0] < values[0.0] - 0.02


def test_usage_regulariser_raises_perplexity_on_a_skewed_table() -> None:
    rows = skewed_table()
    options = {**FAST, "learning_rate": 5e-3, "restart_every": 0}
    off, on = (fit_mec(rows, 2, 64, options=MECFit(**options, usage=usage)) for usage in (0.0, 0.1))
    assert perplexity(on.codes, 64) > 1.4 * perplexity(off.codes, 64)
    assert on.error(rows) < 1.3 * off.error(rows)  # balance is not bought with arbitrary codes


def test_restart_moves_exactly_the_dead_codewords_and_clears_their_moments() -> None:
    model, rows = model_and_batch()
    optimizer = torch.optim.Adam(model.parameters())
    terms, _ = mec_terms(model, rows, torch.ones(40), MECFit(usage_temperature=1.0), torch.Generator().manual_seed(0))
    torch.stack(list(terms.values())).sum().backward()
    optimizer.step()
    used = torch.ones(2, 5, dtype=torch.int64)
    used[0, 1] = used[1, 4] = used[0, 4] = 0  # [0, 4] is beyond first_size: not ours to move
    before, slices = model.codebooks.detach().clone(), model.encode(rows).detach()
    chance = torch.zeros(40)
    chance[17] = 1.0
    assert restart_dead(model, optimizer, used, slices, chance, torch.Generator().manual_seed(0)) == 2
    changed = (model.codebooks.detach() != before).any(dim=2)
    assert changed.nonzero().tolist() == [[0, 1], [1, 4]]
    assert torch.equal(model.codebooks[0, 1], slices[17, 0])
    assert torch.equal(model.codebooks[1, 4], slices[17, 1])
    moments = optimizer.state[model.codebooks]["exp_avg_sq"]
    assert not moments[0, 1].any()
    assert moments[1, :4].any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_it_trains_where_gradients_are_switched_off(mode) -> None:
    rows = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    expected = fit_mec(rows, 2, 8, options=MECFit(num_steps=5, batch_size=32))
    with mode():
        found = fit_mec(rows, 2, 8, options=MECFit(num_steps=5, batch_size=32))
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.codebooks, expected.codebooks)
    assert not found.codebooks.requires_grad


def test_dead_codewords_come_back_to_life() -> None:
    rows, alive = skewed_table(), {}
    for every in (0, 25):
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(2, 32, 4, generator=generator)
        start[:, 8:] += 100.0  # nothing is near them
        model = MECAutoEncoder(start, first_size=32)
        options = MECFit(**FAST, usage=0.0, contrast=0.0, restart_every=every)
        train_auto_encoder(model, rows, torch.ones(len(rows)), options, generator, progress=False)
        alive[every] = min(len(column.unique()) for column in model.codes(rows).T)
    assert alive[0] <= 8
    assert alive[25] > 24


def test_weights_matter() -> None:
    rows, weights = skewed_table(), torch.ones(4000)
    weights[:200] = 50.0
    options = MECFit(**FAST)
    plain, weighted = fit_mec(rows, 2, 32, options=options), fit_mec(rows, 2, 32, options=options, weights=weights)
    heavy = (weights > 1).float()
    assert weighted.error(rows, heavy) < 0.9 * plain.error(rows, heavy)


def test_scale_of_the_table_and_of_the_weights_does_not_matter() -> None:
    rows, options = skewed_table(1000), MECFit(num_steps=20)
    weights = torch.rand(1000, generator=torch.Generator().manual_seed(1))
    codes = fit_mec(rows, 2, 16, options=options, weights=weights).codes
    assert torch.equal(codes, fit_mec(rows / 1024, 2, 16, options=options, weights=weights).codes)
    assert torch.equal(codes, fit_mec(rows, 2, 16, options=options, weights=weights * 1024).codes)


def test_every_epoch_has_an_order_of_its_own_and_the_rate_falls_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, rates = [], []
    terms, step = mec.mec_terms, torch.optim.Adam.step

    def noted_terms(model, rows, *others):
        seen.append(rows[:, 0])
        return terms(model, rows, *others)

    def noted_step(self):
        rates.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(mec, "mec_terms", noted_terms)
    monkeypatch.setattr(torch.optim.Adam, "step", noted_step)
    rows = torch.arange(100.0)[:, None].repeat(1, 4)
    options, generator = MECFit(num_steps=8, batch_size=25, learning_rate=0.5), torch.Generator().manual_seed(0)
    model = MECAutoEncoder(torch.randn(2, 4, 2, generator=generator), first_size=4)
    train_auto_encoder(model, rows, torch.ones(100), options, generator, progress=False)
    first, second = torch.cat(seen[:4]), torch.cat(seen[4:])
    assert torch.equal(first.sort().values, rows[:, 0]) and torch.equal(second.sort().values, rows[:, 0])
    assert not torch.equal(first, second)
    assert rates == [0.5 * (1 - number / 8) for number in range(8)]


def test_choices_are_counted_anew_after_a_restart_and_none_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    monkeypatch.setattr(mec, "restart_dead", lambda model, optimizer, used, *_: counted.append(int(used.sum())))
    options = MECFit(num_steps=20, batch_size=50, restart_every=5)
    model = MECAutoEncoder(torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)), first_size=4)
    generator = torch.Generator().manual_seed(0)
    train_auto_encoder(model, skewed_table(200), torch.ones(200), options, generator, progress=False)
    assert counted == [2 * 50 * 5] * 3


def test_codewords_that_only_weightless_rows_choose_are_dead() -> None:
    rows, weights = skewed_table(2000), torch.ones(2000)
    rows[1000:] += 100.0
    weights[1000:] = 0.0
    start = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0))
    start[:, 8:] += 100.0
    model, options = MECAutoEncoder(start, first_size=16), MECFit(**FAST, usage=0.0, contrast=0.0, restart_every=25)
    train_auto_encoder(model, rows, weights, options, torch.Generator().manual_seed(0), progress=False)
    assert float(model.codebooks.detach().max()) < 50


def test_codebooks_are_the_means_of_their_rows_and_first_size_is_kept() -> None:
    rows, weights = skewed_table(1000), torch.rand(1000, generator=torch.Generator().manual_seed(1))
    fitted = fit_mec(rows, 2, 16, first_size=11, weights=weights, options=MECFit(num_steps=30))
    assert fitted.kind == "product"
    assert int(fitted.codes[:, 0].max()) < 11
    assert not fitted.codebooks[11:16].any()
    chosen = fitted.codes[:, 1] == 3
    mean = (rows[chosen, 4:] * weights[chosen, None]).sum(dim=0) / weights[chosen].sum()
    torch.testing.assert_close(fitted.codebooks[16 + 3], mean)


@pytest.mark.parametrize("kmeans_start", [True, False])
def test_deterministic_and_global_generator_untouched(kmeans_start: bool) -> None:
    rows, options = skewed_table(800), MECFit(num_steps=30, kmeans_start=kmeans_start, restart_every=10)
    before = torch.get_rng_state()
    first, again = fit_mec(rows, 2, 16, options=options, seed=1), fit_mec(rows, 2, 16, options=options, seed=1)
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.codebooks, again.codebooks)
    assert not torch.equal(first.codes, fit_mec(rows, 2, 16, options=options, seed=2).codes)
    assert torch.equal(before, torch.get_rng_state())


def test_kmeans_start_is_better_than_the_public_code_s() -> None:
    rows = skewed_table()
    start, random = (fit_mec(rows, 2, 32, options=MECFit(**FAST, kmeans_start=on)).error(rows) for on in (True, False))
    assert start < random


def test_progress_bar_is_shown_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    rows, options = skewed_table(100), MECFit(num_steps=3)
    fit_mec(rows, 2, 4, options=options)
    assert capsys.readouterr().err == ""
    fit_mec(rows, 2, 4, options=options, progress=True)
    assert "MEC" in capsys.readouterr().err


def test_usage_counts_all_rows_and_moves_the_first() -> None:
    model, rows = model_and_batch()
    terms, grads = [], []
    for few in (7, 40):
        leaf = rows.clone().requires_grad_()
        found, _ = mec_terms(model, leaf, torch.ones(40), MECFit(usage_rows=few), torch.Generator().manual_seed(0))
        terms.append(float(found["usage"].detach()))
        (grad,) = torch.autograd.grad(found["usage"], leaf)
        grads.append(grad.abs().sum(dim=1) > 0)
    assert terms[0] == pytest.approx(terms[1])
    assert grads[0][:7].any() and not grads[0][7:].any() and grads[1][7:].any()


def test_usage_of_first_rows_that_weigh_nothing_takes_all() -> None:
    model, rows = model_and_batch()
    weights = torch.cat([torch.zeros(7), torch.ones(33)])
    found, _ = mec_terms(model, rows, weights, MECFit(usage_rows=7), torch.Generator().manual_seed(0))
    found["usage"].backward()
    assert bool(model.codebooks.grad.isfinite().all()) and bool(model.codebooks.grad.any())
