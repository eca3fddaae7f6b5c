"""Graph codes: a bounded graph of a stream, parts of equally many ids, and codes that differ where they can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fit.test_minhash import BAD, Largest
from torchrec_compress.fit import contexts as streams
from torchrec_compress.fit import graph
from torchrec_compress.fit.codes import HashEncoder
from torchrec_compress.fit.graph import GraphSketch, learn_graph_codes
from torchrec_compress.ops import hash_codes, hash_ids

NUM_ROWS = 850


def pairs(own: float = 0.7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids of 20 groups of 40 (id % 20) with contexts of their group and of all; the last fifty ids have none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.cat([torch.arange(800), torch.randint(0, 800, (15_000,), generator=generator)])
    near = torch.randint(0, 15, ids.shape, generator=generator) + 15 * (ids % 20)
    anywhere = torch.randint(0, 300, ids.shape, generator=generator)
    return ids, torch.where(torch.rand(ids.shape, generator=generator) < own, near, anywhere)


def sketched(*batches: tuple[Tensor, Tensor], num_contexts: int = 64, num_rows: int = NUM_ROWS) -> GraphSketch:
    sketch = GraphSketch(num_rows, num_contexts, salt=7)
    for ids, contexts in batches:
        sketch.add(ids, contexts)
    return sketch


def coded(
    sketch: GraphSketch,
    num_codes: int,
    codebook_size: int,
    clusterings: int = 1,
    first: int | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Return the codes of all ids."""
    others = HashEncoder(num_codes, codebook_size, 7, codebook_size if first is None else first)
    return learn_graph_codes(sketch, others, clusterings, counts)(torch.arange(sketch.num_rows), None)


@pytest.mark.parametrize("num_contexts", [1, 5, 64])
def test_the_least_hashes_of_each_id_are_kept(num_contexts: int) -> None:
    ids, contexts = pairs()
    sketch = sketched((ids, contexts), num_contexts=num_contexts)
    hashes = hash_ids(contexts, 2**31 - 1, 7)
    for row in range(NUM_ROWS):
        expected = sorted(set(hashes[ids == row].tolist()))[:num_contexts]
        assert sketch.kept[row].tolist() == expected + [2**31 - 1] * (num_contexts - len(expected))
    seen, found = sketch.graph()
    assert torch.equal(seen, torch.arange(800)) and not sketch.is_empty
    assert len(found.left) == int((sketch.kept < 2**31 - 1).sum()) and found.num_left == 800
    names = torch.zeros(found.num_right, dtype=torch.int64).scatter_(
        0, found.right, sketch.kept[sketch.kept < 2**31 - 1].long()
    )
    assert found.num_right == len(names.unique())
    for node in (0, 399):
        assert (
            names[found.right[found.left == node]].tolist() == sketch.kept[node][sketch.kept[node] < 2**31 - 1].tolist()
        )


@pytest.mark.parametrize("size", [1, 7, 1000, 20_000])
def test_batches_are_as_all_at_once_to_the_bit(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, contexts = (part[:3000] for part in pairs())
    whole = sketched((ids, contexts), num_contexts=4)
    monkeypatch.setattr(graph, "_ROWS_AT_ONCE", 9)
    monkeypatch.setattr(streams, "_PAIRS_AT_ONCE", 700)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    order = torch.cat([order, order[:500]])  # a pair that comes again changes nothing
    batches = [(ids[some], contexts[some]) for some in order.split(size)]
    again = sketched(*batches, num_contexts=4)
    assert torch.equal(again.kept, whole.kept)
    assert torch.equal(coded(again, 3, 16), coded(whole, 3, 16))


def test_sketches_of_ranks_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, contexts = pairs()
    monkeypatch.setattr(graph, "_ROWS_AT_ONCE", 100)
    one, other = (sketched((ids[half::2], contexts[half::2]), num_contexts=8) for half in (0, 1))
    one.join(other.kept)
    assert torch.equal(one.kept, sketched((ids, contexts), num_contexts=8).kept)
    for wrong in (other.kept[:-1], other.kept.long()):
        with pytest.raises(ValueError, match=r"kept must be \(850, 8\) of torch.int32, got"):
            one.join(wrong)


def test_memory_is_that_of_the_sketch_however_long_the_stream() -> None:
    sketch = GraphSketch(100_000, 8, salt=0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 100_000, (400_000,), generator=generator)
    contexts = torch.randint(0, 10**9, ids.shape, generator=generator)
    with Largest() as seen:
        sketch.add(ids, contexts)
    assert seen.num_bytes <= 2**20  # all pairs would be 3.2 MB, the sketch in int64 6.4
    kept = [value for value in vars(sketch).values() if not isinstance(value, int | str)]
    assert len(kept) == 1 and kept[0] is sketch.kept and sketch.kept.nbytes == 4 * 8 * 100_000


@pytest.mark.parametrize("kind", BAD)
def test_pairs_that_are_none(kind: str) -> None:
    given, told = BAD[kind]
    sketch = GraphSketch(200, 4, salt=0)
    with pytest.raises(ValueError, match=f"GraphSketch: {told}"):
        sketch.add(*given)  # type: ignore[arg-type]
    assert sketch.is_empty
    sketch.add(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    assert sketch.is_empty


@pytest.mark.parametrize(("wrong", "told"), [({"num_rows": 0}, "num_rows"), ({"num_contexts": True}, "num_contexts")])
def test_sizes_that_are_none(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"GraphSketch: {told} must be an int of at least 1"):
        GraphSketch(**{"num_rows": 3, "num_contexts": 2, "salt": 0, **wrong})


@pytest.mark.parametrize(("codebook_size", "clusterings"), [(20, 1), (20, 2), (64, 1), (7, 2)])
def test_clusters_are_of_equally_many_ids_and_no_codeword_is_left_over(codebook_size: int, clusterings: int) -> None:
    codes = coded(sketched(pairs()), 3, codebook_size, clusterings)[:800]
    for m in range(clusterings):
        sizes = torch.bincount(codes[:, m], minlength=codebook_size)
        assert len(sizes) == codebook_size and int(sizes.max() - sizes.min()) <= 1
    for m in range(clusterings, 3):
        sizes = torch.bincount(codes[:, m], minlength=codebook_size)
        assert len(sizes) == codebook_size and sizes.max() < 800 / codebook_size + 6 * (800 / codebook_size) ** 0.5


@pytest.mark.parametrize("steep", [0.5, 1.0, 3.0])
def test_clusters_are_of_equally_many_look_ups(steep: float) -> None:
    order = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(2))
    counts = (10_000 / (order + 1) ** steep).long()
    codes = coded(sketched(pairs()), 3, 16, 2, counts=counts)[:800]
    weights = counts[:800].double().clamp(min=1)
    while weights.max() > weights.sum() / 16 * (1 + 1e-9):
        weights = weights.clamp(max=float(weights.sum()) / 16)
    for m in range(2):
        found = torch.zeros(16).double().index_add_(0, codes[:, m], weights)
        share = weights.sum() / 16
        assert found.min() > 0 and (found - share).abs().max() <= weights.max() * (1 + 1e-9)
    if steep == 0.5:
        plain = torch.zeros(16).double().index_add_(0, coded(sketched(pairs()), 3, 16, 2)[:800, 0], weights)
        assert plain.std() > 3 * torch.zeros(16).double().index_add_(0, codes[:, 0], weights).std()


@pytest.mark.parametrize("number", [5, 16, 17, 400])
def test_parts_of_any_weights_are_all_used(number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for spread in (0, 1, 10, 30):
        weights = torch.exp2(spread * torch.rand(number, generator=generator, dtype=torch.float64))
        parts = graph._parts(weights, 16)
        assert len(parts.unique()) == min(number, 16) and parts[0] >= 0 and parts[-1] <= 15
        assert (parts.diff() >= 0).all()
    assert graph._parts(torch.ones(800).double(), 16).bincount().tolist() == [50] * 16


def test_planted_groups_share_their_first_code_and_nothing_else() -> None:
    codes, group = coded(sketched(pairs()), 3, 20)[:800], torch.arange(800) % 20
    assert all(len(codes[group == number, 0].unique()) == 1 for number in range(20))
    assert len(codes[:20, 0].unique()) == 20
    for number in range(20):  # 40 ids, 20 codewords: each twice
        assert torch.bincount(codes[group == number, 1]).tolist() == [2] * 20


def test_all_codes_may_be_clusters_which_differ() -> None:
    codes = coded(sketched(pairs(own=0.3)), 3, 20, clusterings=3)[:800]
    same = [(codes[:, m][:, None] == codes[:, m]).float() for m in range(3)]
    for one, other in ((0, 1), (1, 2)):
        both = float((same[one] * same[other]).sum() - 800) / float(same[one].sum() - 800)
        assert 0.1 < both < 0.9  # by chance it would be .05


@pytest.mark.parametrize(
    ("num_codes", "codebook_size", "distinct"), [(2, 40, 800), (2, 20, 400), (3, 20, 800), (4, 6, 800), (2, 2, 4)]
)
def test_two_ids_share_all_codes_only_where_there_are_too_few(
    num_codes: int, codebook_size: int, distinct: int
) -> None:
    codes = coded(sketched(pairs()), num_codes, codebook_size)[:800]
    found, sizes = codes.unique(dim=0, return_counts=True)
    assert len(found) == distinct and int(sizes.max()) == -(-800 // distinct)


def test_ids_of_no_pair_have_the_codes_of_the_start_and_first_codes_leave_room() -> None:
    sketch = sketched(pairs())
    codes = coded(sketch, 4, 16, first=5)
    assert torch.equal(codes[800:], hash_codes(torch.arange(800, NUM_ROWS), 4, 16, 7, 5))
    assert torch.bincount(codes[:800, 0]).tolist() == [160] * 5  # not 16 parts, of which the last join one
    assert codes[:800, 1:].max() == 15 and codes.min() == 0
    others = HashEncoder(4, 16, 7, 5)
    assert torch.equal(learn_graph_codes(sketch, others, 1)(torch.tensor([849, 3]), None), codes[[849, 3]])


def test_fewer_ids_than_codewords_have_one_each() -> None:
    sketch = sketched((torch.tensor([3, 9, 11]), torch.tensor([0, 0, 5])), num_rows=300)
    codes = coded(sketch, 2, 256)
    assert len(codes[[3, 9, 11], 0].unique()) == 3


def test_another_salt_makes_other_codes() -> None:
    first = coded(sketched(pairs()), 2, 20)[:800]
    other = GraphSketch(NUM_ROWS, 64, salt=8)
    other.add(*pairs())
    assert (coded(other, 2, 20)[:800] == first).float().mean() < 0.2
