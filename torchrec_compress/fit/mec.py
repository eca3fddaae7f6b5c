"""MEC: codes from a product-quantised auto-encoder with popularity weights, balanced usage and a contrast.

MEC (arXiv 2502.15355, DASFAA 2025), built to the paper's intent: straight-through gradients, so that the encoder
learns; a usage regulariser with a gradient; negatives that differ from their positive in exactly one code; encoded
rows compared with quantised rows, in one space; weights instead of repeated rows. K-means start, commitment, dead-code
restart and a refit of the codebooks in the table's own space are additions; each is a switch of `MECFit`.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from torchrec_compress.fit.checks import check_rows, check_seed, check_sizes, check_weights
from torchrec_compress.fit.codes import Encoder, FittedCodes
from torchrec_compress.fit.kmeans import nearest
from torchrec_compress.fit.product import ProductEncoder, check_slices, learn_product
from torchrec_compress.fit.refit import refit_codebooks

# Keeps the slope of p log p finite for codewords that nothing chooses.
USAGE_FLOOR = 1e-4


@dataclass(frozen=True, kw_only=True)
class MECFit:
    """How `fit_mec` trains. Rows are scaled to mean square 1 first, so the factors suit a table of any scale.

    Attributes:
        num_steps: Adam steps, >= 0; 0 leaves the start.
        batch_size: rows per step; batches walk through random orders of the table.
        learning_rate: Adam's, at the first step; it falls linearly to zero.
        kmeans_start: codebooks start from weighted product k-means; False: uniform in +-1/K, as the public MEC code.
        straight_through: copy the reconstruction's gradient from codewords to the encoder (van den Oord et al.,
            NeurIPS 2017); False: the encoder learns from the other terms alone.
        commitment: factor of ||s - sg(z)||^2, which holds encoded rows near their codewords; 0 switches it off.
        usage: factor of sum_m (H(p_m) - log K)^2, p_m the share of the batch that each codeword of book m serves, with
            the gradient of softmax(-dist^2 / t); 0 switches it off.
        usage_rows: the first rows of a batch, which carry that gradient; the share counts all. With every row it would
            take four fifths of a step, to no other end.
        usage_temperature: t as a multiple of the batch's mean squared distance to the nearest codeword, over the rows
            of a weight above zero.
        contrast: factor of -log sigmoid((cos(s, z+) - cos(s, z-)) / temperature); 0 switches it off.
        contrast_temperature: 1 in the paper.
        restart_every: steps between restarts of codewords that no row chose since the last one; 0 switches it off.

    Raises:
        ValueError: a negative number, or a size, rate or temperature that is not above zero.

    Example:
        >>> MECFit(contrast=0.0).usage
        0.001
    """

    num_steps: int = 500
    batch_size: int = 2048
    learning_rate: float = 1e-3
    kmeans_start: bool = True
    straight_through: bool = True
    commitment: float = 0.25
    usage: float = 1e-3
    usage_rows: int = 256
    usage_temperature: float = 0.05
    contrast: float = 2e-3
    contrast_temperature: float = 1.0
    restart_every: int = 100

    def __post_init__(self) -> None:
        positive = ("batch_size", "learning_rate", "usage_rows", "usage_temperature", "contrast_temperature")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in positive and not 0 < value < math.inf:
                raise ValueError(f"MECFit: {field.name} must be finite and above 0, got {value}")
            if not 0 <= value < math.inf:
                raise ValueError(f"MECFit: {field.name} must be finite and >= 0, got {value}")


class MECAutoEncoder(nn.Module):
    """Encoder, M codebooks, decoder. Encoder and decoder are linear and start at the identity.

    Args:
        codebooks: [M, K, d] float32, the start.
        first_size: codewords of the first codebook that may be chosen.
    """

    def __init__(self, codebooks: Tensor, first_size: int) -> None:
        super().__init__()
        num_codes, codebook_size, slice_dim = codebooks.shape
        width = num_codes * slice_dim
        self.encoder = nn.Parameter(torch.eye(width, device=codebooks.device))
        self.decoder = nn.Parameter(torch.eye(width, device=codebooks.device))
        self.codebooks = nn.Parameter(codebooks.clone())
        self.sizes = [first_size] + [codebook_size] * (num_codes - 1)

    def encode(self, rows: Tensor) -> Tensor:
        """Map rows [B, D] to encoded slices [B, M, d]."""
        return (rows @ self.encoder.T).unflatten(1, (len(self.sizes), -1))

    def codes(self, rows: Tensor) -> Tensor:
        """Return the nearest codewords in the encoder's space, [B, M] int64."""
        slices = self.encode(rows)
        books = [book[:size] for book, size in zip(self.codebooks, self.sizes, strict=True)]
        return torch.stack([nearest(slices[:, m], book) for m, book in enumerate(books)], dim=1)

    def quantise(self, codes: Tensor) -> Tensor:
        """Return the codewords of codes [B, M] as [B, M, d]."""
        return self.codebooks[torch.arange(len(self.sizes), device=codes.device), codes]


def one_code_negatives(codes: Tensor, sizes: list[int], generator: torch.Generator) -> Tensor:
    """Replace exactly one code of every row by another one of the same codebook, both chosen uniformly.

    Args:
        codes: [B, M] int64, codes[:, m] < sizes[m].
        sizes: M codebook sizes; those below 2 are never chosen.
        generator: on the CPU.

    Returns:
        [B, M] int64, a new tensor.

    Example:
        >>> codes = torch.zeros(4, 3, dtype=torch.int64)
        >>> (one_code_negatives(codes, [2, 2, 2], torch.Generator().manual_seed(0)) != codes).sum(dim=1)
        tensor([1, 1, 1, 1])
    """
    choices = torch.tensor([m for m, size in enumerate(sizes) if size > 1])
    book = choices[torch.randint(len(choices), (len(codes),), generator=generator)]
    # A shift of 1 .. size - 1, modulo size, is uniform over the other codewords.
    shift = 1 + (torch.rand(len(codes), generator=generator) * (torch.tensor(sizes)[book] - 1)).long()
    row, book, shift = torch.arange(len(codes), device=codes.device), book.to(codes.device), shift.to(codes.device)
    negatives = codes.clone()
    negatives[row, book] = (codes[row, book] + shift) % torch.tensor(sizes, device=codes.device)[book]
    return negatives


def mec_terms(
    model: MECAutoEncoder, rows: Tensor, weights: Tensor, options: MECFit, generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """Return MEC's loss terms, each times its factor, and the codes of the batch.

    Terms that are off are absent. Gradients reach: reconstruction: encoder and decoder (without straight-through:
    codebooks and decoder); codebook: codebooks; commitment: encoder; usage and contrast: encoder and codebooks.

    Args:
        model: the auto-encoder.
        rows: [B, D] float32.
        weights: [B] float32, scaled so that their mean over the table is 1.
        options: factors and switches.
        generator: draws the negatives.

    Returns:
        name -> scalar, and codes [B, M] int64.
    """
    slices = model.encode(rows)
    with torch.no_grad():
        codes = model.codes(rows)
    positive = model.quantise(codes)
    passed = slices + (positive - slices).detach() if options.straight_through else positive
    squares = (passed.flatten(1) @ model.decoder.T - rows).square().mean(dim=1)
    terms = {"reconstruction": (weights * squares).mean()}
    if options.straight_through:  # without it the reconstruction itself moves the codebooks
        terms["codebook"] = (weights * (positive - slices.detach()).square().flatten(1).mean(dim=1)).mean()
    if options.commitment:
        gap = (slices - positive.detach()).square().flatten(1).mean(dim=1)
        terms["commitment"] = options.commitment * (weights * gap).mean()
    if options.usage:
        terms["usage"] = options.usage * _usage_term(model, slices, codes, positive, weights, options)
    if options.contrast:
        encoded, real = slices.flatten(1), positive.flatten(1)
        fake = model.quantise(one_code_negatives(codes, model.sizes, generator)).flatten(1)
        margin = F.cosine_similarity(encoded, real) - F.cosine_similarity(encoded, fake)
        terms["contrast"] = -options.contrast * (weights * F.logsigmoid(margin / options.contrast_temperature)).mean()
    return terms, codes


def _usage_term(
    model: MECAutoEncoder, slices: Tensor, codes: Tensor, positive: Tensor, weights: Tensor, options: MECFit
) -> Tensor:
    """Return sum_m (H(p_m) - log K_m)^2, p_m the weighted share of the batch that each codeword serves.

    The value counts the real choices; the gradient goes through softmax(-dist^2 / t). With soft shares in the value
    too, the entropy is raised most cheaply by making every assignment vague, and the real usage gets worse (measured).
    """
    share, counts = weights / weights.sum(), weights > 0
    few = slice(0, options.usage_rows) if (weights[: options.usage_rows] > 0).any() else slice(None)
    shown = weights[few] / weights[few].sum()
    books, sizes = model.codebooks, torch.tensor(model.sizes, device=slices.device)
    num_books, size = books.shape[:2]
    # ||s||^2 is the same for all codewords of a row: softmax does not see it.
    norms = books.square().sum(dim=2).unsqueeze(1)
    scores = torch.baddbmm(-norms, slices[few].transpose(0, 1), books.transpose(1, 2), alpha=2)
    gaps = (slices - positive).square().sum(dim=2).detach()
    scale = options.usage_temperature * gaps[counts].mean(dim=0).clamp(min=1e-12)
    beyond = torch.arange(size, device=slices.device) >= sizes.unsqueeze(1)  # escapes: never chosen
    scores = (scores / scale.view(-1, 1, 1)).masked_fill(beyond.unsqueeze(1), -math.inf)
    soft = torch.einsum("b,mbk->mk", shown, torch.softmax(scores, dim=2))
    numbers = codes + size * torch.arange(num_books, device=slices.device)
    real = torch.bincount(numbers.flatten(), share.repeat_interleave(num_books), minlength=num_books * size)
    usage = soft + (real.view(num_books, size) - soft).detach()
    entropy = -(usage * (usage + USAGE_FLOOR).log()).sum(dim=1)
    return (entropy - sizes.log()).square().sum()


def restart_dead(
    model: MECAutoEncoder, optimizer: torch.optim.Adam, used: Tensor, slices: Tensor, chance: Tensor,
    generator: torch.Generator,
) -> int:  # fmt: skip
    """Move codewords that no row chose onto encoded slices of random rows; return how many moved.

    Args:
        model: its codebooks are written to.
        optimizer: Adam; its moments of the moved codewords are cleared.
        used: [M, K] choices since the last restart.
        slices: [B, M, d] encoded rows to choose from.
        chance: [B] >= 0, how probable each row is.
        generator: on the CPU.
    """
    moved = 0
    state = optimizer.state.get(model.codebooks, {})
    if not (chance > 0).any():
        return 0
    for m, size in enumerate(model.sizes):
        dead = (used[m, :size] == 0).nonzero().flatten()
        if not len(dead):
            continue
        pick = torch.multinomial(chance.cpu(), len(dead), replacement=True, generator=generator)
        with torch.no_grad():
            model.codebooks[m, dead] = slices[pick.to(slices.device), m]
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state:
                    state[name][m, dead] = 0
        moved += len(dead)
    return moved


@torch.enable_grad()  # whatever the caller has switched off
def train_auto_encoder(
    model: MECAutoEncoder, rows: Tensor, weights: Tensor, options: MECFit, generator: torch.Generator, progress: bool
) -> None:
    """Train the auto-encoder in place: Adam, weighted batches, a restart of dead codewords now and then.

    Args:
        model: trained in place.
        rows: [N, D] float32, mean square 1.
        weights: [N] float32, mean 1.
        options: `MECFit`.
        generator: on the CPU; draws orders, negatives and restarts.
        progress: show a tqdm bar.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    size = min(options.batch_size, len(rows))
    used = torch.zeros(model.codebooks.shape[:2], dtype=torch.int64, device=rows.device)
    order, at = torch.randperm(len(rows), generator=generator), 0
    for step in tqdm(range(options.num_steps), desc="MEC", unit="step", disable=not progress):
        if at + size > len(order):
            order, at = torch.randperm(len(rows), generator=generator), 0
        index = order[at : at + size].to(rows.device)
        at += size
        batch, batch_weights = rows[index], weights[index]
        if not (batch_weights > 0).any():
            continue  # nothing to learn from rows that weigh nothing
        optimizer.param_groups[0]["lr"] = options.learning_rate * (1 - step / options.num_steps)
        terms, codes = mec_terms(model, batch, batch_weights, options, generator)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        for m in range(len(model.sizes)):
            used[m] += torch.bincount(codes[batch_weights > 0, m], minlength=used.shape[1])
        # Not after the last steps: a moved codeword needs some time to settle.
        every = options.restart_every
        if every and (step + 1) % every == 0 and step + every < options.num_steps:
            restart_dead(model, optimizer, used, model.encode(batch).detach(), batch_weights, generator)
            used.zero_()


def _start_codebooks(
    rows: Tensor, num_codes: int, codebook_size: int, first_size: int, weights: Tensor, options: MECFit,
    generator: torch.Generator, seed: int,
) -> Tensor:  # fmt: skip
    """Return the codebooks to start from, [M, K, D/M]."""
    shape = (num_codes, codebook_size, rows.shape[1] // num_codes)
    if not options.kmeans_start:
        return (2 * torch.rand(shape, generator=generator) - 1).to(rows.device) / codebook_size
    _, codebooks = learn_product(
        rows, num_codes, codebook_size, first_size=first_size, weights=weights, num_iterations=10, seed=seed
    )
    return codebooks.view(shape)


@dataclass(frozen=True)
class MECEncoder(Encoder):
    """The nearest codewords in the encoder's space.

    Attributes:
        matrix: [D, D] float32, the encoder.
        scale: float32 scalar that rows are divided by first.
        inner: nearest codewords there.
    """

    matrix: Tensor
    scale: Tensor
    inner: ProductEncoder

    def __call__(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        """Return the codes of rows; see `Encoder`."""
        assert rows is not None
        return self.inner(ids, (rows / self.scale) @ self.matrix.T)


def fit_mec(
    rows: Tensor,
    num_codes: int,
    codebook_size: int,
    *,
    first_size: int | None = None,
    weights: Tensor | None = None,
    options: MECFit | None = None,
    seed: int = 0,
    progress: bool = False,
) -> FittedCodes:
    """Fit MEC's codes to a trained table.

    The codes are the nearest codewords in the encoder's space; the codebooks are then the weighted means of their rows
    in the table's own space, so that encoder and decoder are dropped at serving time.

    Args:
        rows: [N, D] float32, finite; D a multiple of M.
        num_codes: M.
        codebook_size: K <= N.
        first_size: codewords the first codebook may use (the others are left for escapes, as zeros); None: all K.
        weights: [N] >= 0, not all zero; None for equal weights.
        options: None means `MECFit()`.
        seed: one seed, one result.
        progress: show a tqdm bar.

    Returns:
        `FittedCodes` of kind "product", codebooks [M*K, D/M]; codewords without rows are zeros.

    Raises:
        ValueError: rows, weights or sizes that do not hold (see `checks`), or a contrast without a second codeword.

    Example:
        >>> rows = torch.tensor([[0.0, 5.0], [1.0, 5.0], [0.0, 7.0], [1.0, 7.0]])
        >>> fit_mec(rows, num_codes=2, codebook_size=2, options=MECFit(num_steps=2)).error(rows)
        0.0
    """
    encoder, start = learn_mec(
        rows,
        num_codes,
        codebook_size,
        first_size=first_size,
        weights=weights,
        options=options,
        seed=seed,
        progress=progress,
    )
    codes = encoder(torch.arange(len(rows)), rows)
    books = refit_codebooks(codes, rows, weights, codebook_size=codebook_size, kind="product", start=start)
    return FittedCodes(codes, books, "product")


def learn_mec(
    rows: Tensor,
    num_codes: int,
    codebook_size: int,
    *,
    first_size: int | None = None,
    weights: Tensor | None = None,
    options: MECFit | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[MECEncoder, Tensor]:
    """Return what makes the codes of `fit_mec`, and zeros to refit its codebooks from, [M*K, D/M].

    Arguments and errors as there.
    """
    options = MECFit() if options is None else options
    seed = check_seed("fit_mec", seed)
    check_rows("fit_mec", rows)
    first_size = check_sizes("fit_mec", len(rows), num_codes, codebook_size, first_size)
    check_slices("fit_mec", rows.shape[1], num_codes)
    weights = check_weights("fit_mec", weights, len(rows), rows.device)
    if options.contrast and max(first_size, codebook_size if num_codes > 1 else 0) < 2:
        raise ValueError("fit_mec: contrast must be 0 when codebooks have one codeword, got no second one to contrast")
    weights = weights / weights.mean()
    scale = (weights @ rows.square().mean(dim=1) / len(rows)).sqrt().clamp(min=1e-30)
    scaled = rows / scale
    generator = torch.Generator().manual_seed(seed)
    start = _start_codebooks(scaled, num_codes, codebook_size, first_size, weights, options, generator, seed)
    model = MECAutoEncoder(start, first_size)
    train_auto_encoder(model, scaled, weights, options, generator, progress)
    books = [book[:size] for book, size in zip(model.codebooks.detach(), model.sizes, strict=True)]
    encoder = MECEncoder(model.encoder.detach(), scale, ProductEncoder(books))
    return encoder, torch.zeros_like(model.codebooks.detach()).flatten(0, 1)
