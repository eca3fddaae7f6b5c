"""What a checkpoint must say of its tables, so that tensors of the same shapes that mean something else are refused."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig

from tests.cases import NUM_ROWS, batch, fit, fresh
from tests.methods.throwaway import registered
from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.methods import CafeConfig, CceConfig, HashConfig, NarrowConfig, Parts
from torchrec_compress.methods.storage import Remap

BASE = CafeConfig(num_hot_rows=8, num_cold_rows=24, num_medium_rows=16, num_blocks=4, importance="frequency")
# as an earlier version wrote BASE, without the layout of its manager
OLD = torch.tensor([[1759349233, 2038047732, 502979825]])


@pytest.mark.parametrize(
    "other",
    [
        replace(BASE, num_cold_rows=40, num_medium_rows=0),
        replace(BASE, num_cold_rows=16, num_medium_rows=24),
        replace(BASE, slots_per_bucket=2),
        replace(BASE, num_hot_rows=16, num_cold_rows=16, num_sketch_slots=32),
    ],
)
def test_rows_of_another_use_are_refused(other):
    saved = fresh(BASE).state_dict()
    assert saved["managed.native.item.embeddings.item__rows.weight"].shape == (48, 16)
    with pytest.raises(ValueError, match="table 'item': the checkpoint's sizes must be those of CafeConfig"):
        fresh(other).load_state_dict(saved)


def test_rules_that_say_nothing_of_rows_may_change():
    fresh(replace(BASE, threshold=5.0, decay=0.5, every=3)).load_state_dict(fresh(BASE).state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_that_does_not_say_is_taken_with_a_warning(caplog, assign):
    saved = fit(BASE)
    state = {**saved.state_dict(), "decoder.layout": OLD.clone()}
    loaded = fresh(BASE)
    loaded.load_state_dict(state, assign=assign)
    assert "tables ['item']: the state dict, of an earlier version, does not say which rows" in caplog.text
    assert torch.equal(state["decoder.layout"], OLD)  # the caller's own stays
    features = batch([[0, 5], [402]])
    assert torch.equal(loaded(features).values(), saved(features).values())
    caplog.clear()
    fresh(BASE).load_state_dict(loaded.state_dict())  # what is saved next says it
    assert not caplog.text
    with pytest.raises(ValueError, match="the checkpoint's sizes must be those"):
        fresh(replace(BASE, num_hot_rows=16, num_cold_rows=16)).load_state_dict(state)


@dataclass(frozen=True, kw_only=True)
class ModuloConfig(HashConfig):
    """Rows by the remainder of the id, of which the last may never be used."""

    method: ClassVar[str] = "modulo"
    divisor: int = 10

    def parts(self, table: BaseEmbeddingConfig, seed: int) -> Parts:
        """Return the rows."""
        stored = super().parts(table, seed)
        return replace(stored, bags=tuple(replace(bag, remap=Remap("mod", self.divisor)) for bag in stored.bags))


def test_another_divisor_of_ids_is_refused():
    assert NUM_ROWS > 40
    with registered(ModuloConfig):
        saved = fresh(ModuloConfig(num_buckets=40)).state_dict()
        fresh(ModuloConfig(num_buckets=40)).load_state_dict(saved)
        with pytest.raises(ValueError, match="the checkpoint's sizes must be those"):
            fresh(ModuloConfig(num_buckets=40, divisor=20)).load_state_dict(saved)


def _others(value):
    """Return what may stand in a damaged or hostile state dict in place of integers, whatever their shape."""
    others = [[1], "text", value.float(), value.to(torch.complex64), value.to_sparse(), value.flatten()[:0]]
    return [*others, torch.cat([value.flatten()] * 2), torch.zeros((), dtype=value.dtype)]


@pytest.mark.parametrize(
    "config",
    [BASE, NarrowConfig(width=8, bits=8), CceConfig(num_codes=2, codebook_size=16)],
    ids=lambda config: config.method,
)
def test_what_are_no_integers_is_refused_by_name(config):
    saved = fresh(config).state_dict()
    for name in [name for name, value in saved.items() if not value.is_floating_point()]:
        for other in _others(saved[name]):
            if isinstance(other, torch.Tensor) and other.dim() == 0 and saved[name].numel() == 1:
                continue  # torch takes a number for a tensor of one
            with pytest.raises((ValueError, RuntimeError)) as told:
                fresh(config).load_state_dict({**saved, name: other})
            assert name in str(told.value) or "table 'item': rows must be" in str(told.value)


def test_another_order_of_the_tables_is_named():
    """Where tables differ, so that it shows; the same tables in another order are others only by their names."""
    sizes = {"a": 300, "b": 200}

    def made(names: str) -> CompressedEmbeddingBagCollection:
        tables = [
            EmbeddingBagConfig(name=name, num_embeddings=sizes[name], embedding_dim=8, feature_names=[name])
            for name in names
        ]
        return CompressedEmbeddingBagCollection(tables, compression=HashConfig(num_buckets=20))

    with pytest.raises(ValueError, match=r"must stand in the order of the checkpoint, \['a', 'b'\], got \['b', 'a'\]"):
        made("ba").load_state_dict(made("ab").state_dict())
    made("ab").load_state_dict(made("ab").state_dict())
