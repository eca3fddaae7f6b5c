"""Gradients in few bits in the training loop: resumed to the bit, and what another number of ranks does."""

from __future__ import annotations

import contextlib
import io
from itertools import islice
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.methods import RandomCodesConfig
from torchrec_compress.sharding.gradients import communication_hooks
from torchrec_compress.train.config import (
    DataConfig,
    GeneratorConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
    lasting,
    override,
)
from torchrec_compress.train.data.memory import ClickData
from torchrec_compress.train.data.open import load_data
from torchrec_compress.train.engine.checkpoint import Checkpoints
from torchrec_compress.train.engine.trainable import Trainable
from torchrec_compress.train.models.click import make_model
from torchrec_compress.train.models.kinds import make_tables
from torchrec_compress.train.ranks import Ranks, start

GENERATOR = GeneratorConfig(num_rows=2000, num_users=100, num_items=40, num_clusters=4)
SAVED = 3


def trainable_of(data: ClickData, ranks: Ranks, gradients: str) -> Trainable:
    torch.manual_seed(3)
    config = override(RunConfig(), {"model.embedding_dim": 8, "model.hidden": [16]})
    tables = make_tables(config.model, data)
    embeddings = CompressedEmbeddingBagCollection(tables, compression=RandomCodesConfig(num_codes=2, codebook_size=8))
    stage = StageConfig(batch_size=64, optim=override(OptimConfig(), {"gradients": gradients}))
    return Trainable(make_model(embeddings, data.num_dense, config.model), stage, ranks, ParallelConfig())


def go_on(trainable: Trainable, data: ClickData, first: int, num_steps: int) -> dict[str, torch.Tensor]:
    """Do steps, other batches on every rank, and return copies of the parameters."""
    trainable.module.train()
    every = data.batches("train", 64, trainable.ranks.rank).epoch(0)
    stream, pipeline = islice(every, first, first + num_steps), trainable.pipeline(first)
    for _ in range(num_steps):
        pipeline.progress(stream)
    if hasattr(pipeline, "detach"):
        pipeline.detach()  # type: ignore[attr-defined]
    return {name: parameter.detach().clone() for name, parameter in trainable.module.named_parameters()}


def resumed(folder: str) -> tuple[list[dict[str, torch.Tensor]], int, int, float]:
    """Return the parameters after six steps, whole and resumed; bytes of states with and without; what was left."""
    data, ranks = load_data(DataConfig(generator=GENERATOR)), start(ParallelConfig(device="cpu"))
    store = Checkpoints(Path(folder), {}, ranks)
    first, plain = trainable_of(data, ranks, "int4"), trainable_of(data, ranks, "float32")
    go_on(plain, data, 0, SAVED)
    go_on(first, data, 0, SAVED)
    store.save(SAVED, first.state(), {})
    store.wait()
    left = [error.clone() for error in first.state()[f"unsent_{ranks.rank}"].values()]
    whole = go_on(first, data, SAVED, SAVED)
    second, saved = trainable_of(data, ranks, "int4"), store.newest()
    assert saved is not None
    second.load(store, saved)
    taken = second.state()[f"unsent_{ranks.rank}"].values()
    assert all(torch.equal(*pair) for pair in zip(left, taken, strict=True))
    sizes = first.state_bytes(), plain.state_bytes()
    return [whole, go_on(second, data, SAVED, SAVED)], *sizes, float(sum(error.abs().sum() for error in left))


def loaded(folder: str) -> tuple[str, float]:
    """Load what other ranks have saved, and return what is said and what is left to send."""
    data, ranks, said = load_data(DataConfig(generator=GENERATOR)), start(ParallelConfig(device="cpu")), io.StringIO()
    store, trainable = Checkpoints(Path(folder), {}, ranks), trainable_of(data, ranks, "int4")
    saved = store.newest()
    assert saved is not None
    with contextlib.redirect_stdout(said):
        trainable.load(store, saved)
    unsent = trainable.state().get(f"unsent_{ranks.rank}", {})
    go_on(trainable, data, SAVED, 1)
    return said.getvalue(), float(sum(error.abs().sum() for error in unsent.values())) if not unsent else 0.0


def test_training_goes_on_to_the_bit_and_other_ranks_start_from_zero(two_ranks, four_ranks, tmp_path):
    found = two_ranks.run(resumed, str(tmp_path))
    for (whole, again), size, plain, left in found:
        assert all(torch.equal(again[name], value) for name, value in whole.items())
        assert all(torch.equal(found[0][0][0][name], value) for name, value in whole.items() if "decoder" in name)
        codebooks = sum(value.numel() for name, value in whole.items() if "decoder" in name)
        assert size - plain == 4 * codebooks > 0 and left > 0
    others = four_ranks.run(loaded, str(tmp_path))
    assert "what gradients of 2 ranks had left to send is dropped" in others[0][0]
    assert [text for text, _ in others[1:]] == [""] * 3
    assert loaded(str(tmp_path)) == ("", 0.0)  # one rank sends nothing


def test_one_rank_and_float32_have_no_hook(ranks, data):
    for gradients in ("int8", "float32"):
        module = trainable_of(data, ranks, gradients).module
        assert any(isinstance(part, DistributedDataParallel) for part in module.modules())
        assert communication_hooks(module) == []


def test_what_was_trained_before_goes_on():
    assert "gradients" not in lasting(OptimConfig()) and lasting(OptimConfig(gradients="int8"))["gradients"] == "int8"
