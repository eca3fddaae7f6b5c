"""Min-hash of a stream of pairs: codes are shared as often as sets are alike, whatever the batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchrec_compress.fit import contexts as streams
from torchrec_compress.fit.codes import HashEncoder
from torchrec_compress.fit.minhash import MinHashEncoder, MinHashSketch
from torchrec_compress.ops import hash_codes


def pairs(num_rows: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids of 20 groups with contexts of their own group and of all; the last ten ids have none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, num_rows - 10, (6000,), generator=generator)
    own = torch.randint(0, 12, ids.shape, generator=generator) + 12 * (ids % 20)
    anywhere = torch.randint(0, 240, ids.shape, generator=generator)
    return ids, torch.where(torch.rand(ids.shape, generator=generator) < 0.7, own, anywhere)


def sketched(*batches: tuple[Tensor, Tensor], num_rows: int = 200, num_hashes: int = 64) -> MinHashSketch:
    sketch = MinHashSketch(num_rows, num_hashes, salt=7)
    for ids, contexts in batches:
        sketch.add(ids, contexts)
    return sketch


def encoder(sketch: MinHashSketch, num_codes: int, codebook_size: int, first_size: int | None = None) -> MinHashEncoder:
    others = HashEncoder(num_codes, codebook_size, 7, codebook_size if first_size is None else first_size)
    return MinHashEncoder(sketch, others)


def similarities(ids: Tensor, contexts: Tensor, num_rows: int) -> Tensor:
    """Return the Jaccard similarity of the contexts of every two ids, by sets."""
    sets = [set(contexts[ids == row].tolist()) for row in range(num_rows)]
    return torch.tensor([[len(a & b) / max(len(a | b), 1) for b in sets] for a in sets])


@pytest.mark.parametrize(("per_code", "codebook_size"), [(1, 1 << 15), (1, 4), (2, 1 << 15), (3, 8)])
def test_the_share_of_common_codes_is_the_jaccard_similarity(per_code: int, codebook_size: int) -> None:
    ids, contexts = pairs()
    num_codes = 512
    codes = encoder(sketched((ids, contexts), num_hashes=num_codes * per_code), num_codes, codebook_size)
    found = codes(torch.arange(190), None)
    same = torch.stack([(found == row).float().mean(dim=1) for row in found])
    alike = similarities(ids, contexts, 190) ** per_code
    expected = alike + (1 - alike) / codebook_size
    apart = ~torch.eye(190, dtype=torch.bool)
    # of 512 codes a share errs by sqrt(p (1 - p) / 512), at most 0.022
    errors = (same - expected)[apart]
    assert errors.abs().max() < 5 * 0.0221 and errors.square().mean().sqrt() < 0.022
    assert abs(float(errors.mean())) < 0.003
    level = alike[apart]
    for low in (0.05, 0.2, 0.4):
        some = (level > low) & (level < low + 0.2)
        if int(some.sum()) > 200:
            assert abs(float(errors[some].mean())) < 0.01


def test_ids_of_equal_sets_have_equal_codes_and_of_disjoint_ones_as_random_codes_do() -> None:
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    contexts = torch.tensor([4, 9, 1, 9, 1, 4, 5, 6])
    found = encoder(sketched((ids, contexts), num_rows=3, num_hashes=1000), 1000, 8)(torch.arange(3), None)
    assert torch.equal(found[0], found[1])
    assert 0.09 < float((found[0] == found[2]).float().mean()) < 0.16


@pytest.mark.parametrize("size", [1, 7, 1000, 6000])
def test_batches_are_as_all_at_once_to_the_bit(size: int) -> None:
    ids, contexts = pairs()
    whole = sketched((ids, contexts))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    order = torch.cat([order, order[:500]])  # a pair that comes again changes nothing
    batches = (
        [(ids[some], contexts[some]) for some in order.split(size)]
        if size > 1
        else [(ids[i : i + 1], contexts[i : i + 1]) for i in order.tolist()]
    )
    assert torch.equal(sketched(*batches).minima, whole.minima)


def test_blocks_of_pairs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sketched(pairs())
    monkeypatch.setattr(streams, "_PAIRS_AT_ONCE", 7)
    assert torch.equal(sketched(pairs()).minima, whole.minima)


def test_sketches_of_ranks_are_joined() -> None:
    ids, contexts = pairs()
    one, other = sketched((ids[:2500], contexts[:2500])), sketched((ids[2500:], contexts[2500:]))
    one.join(other.minima)
    assert torch.equal(one.minima, sketched((ids, contexts)).minima)
    for wrong in (other.minima[:-1], other.minima.long()):
        with pytest.raises(ValueError, match=r"minima must be \(200, 64\) of torch.int32, got"):
            one.join(wrong)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made, and is not one that was there."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        there = {each.data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.data_ptr() not in there:
                self.num_bytes = max(self.num_bytes, made.nbytes)
        return out


def test_memory_is_that_of_the_sketch_however_long_the_stream() -> None:
    sketch = MinHashSketch(1000, 32, salt=0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, (400_000,), generator=generator)
    contexts = torch.randint(0, 10**9, ids.shape, generator=generator)
    with Largest() as seen:
        sketch.add(ids, contexts)
    assert 2**18 < seen.num_bytes <= 2**20  # one hash of all pairs would be 3.2 MB, all of them 102 MB
    kept = [value for value in vars(sketch).values() if isinstance(value, Tensor)]
    assert len(kept) == 1 and kept[0] is sketch.minima and sketch.minima.nbytes == 4 * 32 * 1000


def test_ids_of_no_pair_have_the_codes_of_the_start() -> None:
    sketch = sketched(pairs())
    found = encoder(sketch, 64, 16, first_size=5)(torch.arange(200), None)
    start = hash_codes(torch.arange(200), 64, 16, 7, 5)
    assert torch.equal(found[190:], start[190:]) and sketch.is_seen(torch.arange(200)).sum() == 190
    assert not (found[:190] == start[:190]).all(dim=1).any()
    assert found[:, 0].max() == 4 and found[:, 1:].max() == 15 and found.min() == 0
    for column in found[:190, 1:].T:
        assert len(column.unique()) > 8
    assert torch.equal(encoder(sketch, 64, 16, first_size=5)(torch.tensor([199, 3]), None), found[[199, 3]])


def test_codes_of_several_hashes_take_all_of_them() -> None:
    sketch = sketched(pairs(), num_hashes=6)
    before = encoder(sketch, 2, 1 << 15)(torch.arange(190), None)
    for number in range(6):
        changed = sketched(pairs(), num_hashes=6)
        changed.minima[:190, number] ^= 1
        after = encoder(changed, 2, 1 << 15)(torch.arange(190), None)
        assert (after != before)[:, number // 3].all() and torch.equal(
            after[:, 1 - number // 3], before[:, 1 - number // 3]
        )


BAD = {
    "empty": ((torch.tensor([1]), torch.empty(0, dtype=torch.int64)), "contexts must be vectors of one length above 0"),
    "large": ((torch.tensor([200]), torch.tensor([1])), r"contexts' ids must be in \[0, 200\), got 200"),
    "low": ((torch.tensor([-1]), torch.tensor([1])), r"contexts' ids must be in \[0, 200\), got -1"),
    "lower": ((torch.tensor([1]), torch.tensor([-1])), "contexts' context ids must be >= 0, got -1"),
    "floats": ((torch.tensor([1.0]), torch.tensor([1])), "contexts' ids must be integers, got torch.float32"),
    "lists": (([1], [2]), "contexts must be two vectors"),
}


@pytest.mark.parametrize("kind", BAD)
def test_pairs_that_are_none(kind: str) -> None:
    given, told = BAD[kind]
    sketch = sketched(pairs())
    before = sketch.minima.clone()
    with pytest.raises(ValueError, match=f"MinHashSketch: {told}"):
        sketch.add(*given)  # type: ignore[arg-type]
    assert torch.equal(sketch.minima, before)


def test_a_batch_without_pairs_changes_nothing() -> None:
    sketch = MinHashSketch(3, 2, salt=0)
    sketch.add(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32))
    assert sketch.is_empty
    sketch.add(torch.tensor([1], dtype=torch.int32), torch.tensor([2**40]))
    assert not sketch.is_empty and sketch.is_seen(torch.arange(3)).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("num_rows", "num_hashes", "told"), [(0, 4, "num_rows"), (4, 0, "num_hashes"), (4, True, "num_hashes")]
)
def test_sizes_that_are_none(num_rows: int, num_hashes: int, told: str) -> None:
    with pytest.raises(ValueError, match=f"MinHashSketch: {told} must be an int of at least 1"):
        MinHashSketch(num_rows, num_hashes, salt=0)
