"""A failure leaves the model exactly as it was; one that can be seen early is told before anything is fitted."""

import sys
import threading

import pytest
import torch
from torch import nn

from tests.convert.test_models import D, N, pooled
from torchrec_compress import compress, compress_dense, decompress
from torchrec_compress.convert import models
from torchrec_compress.methods import PQConfig

PQ = PQConfig(num_codes=2, codebook_size=16)


class Picky(nn.Module):
    """Does not take another module in place of its second table, once it is made; the first stands in two places."""

    def __init__(self, is_small):
        super().__init__()
        make = (lambda: compress(nn.Embedding(N, D), PQ)) if is_small else (lambda: nn.Embedding(N, D))
        self.a = make()
        self.inner = nn.ModuleList([self.a, pooled("user")])
        self.b = make()
        self.is_made = True

    def __setattr__(self, name, value):
        if name == "b" and getattr(self, "is_made", False):
            raise RuntimeError("b stays")
        super().__setattr__(name, value)


def state(model):
    """Return what a model is made of."""
    modules = [(path, id(each), each.training) for path, each in model.named_modules(remove_duplicate=False)]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return modules, [(name, id(each), each._version, each.requires_grad) for name, each in tensors]


@pytest.mark.parametrize("is_small", [False, True])
def test_in_the_middle_of_a_change(is_small):
    model = Picky(is_small)
    before = state(model)
    with pytest.raises(RuntimeError, match="b stays"):
        decompress(model, inplace=True) if is_small else compress(model, PQ, inplace=True)
    assert state(model) == before


class Uncopied(nn.Module):
    """Holds what cannot be copied."""

    def __init__(self, table, held):
        super().__init__()
        self.table, self.net, self.held = table, nn.Linear(D, 64), held

    def forward(self, ids):
        return self.net(self.table(ids))


class Own:
    def __deepcopy__(self, memo):
        raise KeyError("no copies")


HELD = {
    "lock": threading.Lock,
    "generator": lambda: (each for each in range(3)),
    "own": Own,
    "not a leaf": lambda: nn.Parameter(torch.ones(1)) * 2,
}


@pytest.mark.parametrize("what", HELD.values(), ids=HELD)
def test_what_cannot_be_copied_is_told_before_anything_is_fitted(what, monkeypatch):
    model, small = Uncopied(nn.Embedding(N, D), what()), Uncopied(compress(nn.Embedding(N, D), PQ), what())
    read = []
    changes = sys.modules["torchrec_compress.convert.compress"]  # whose name the function has taken
    with monkeypatch.context() as patch:
        for name in ("run", "expanded_plain"):
            patch.setattr(changes, name, lambda *_: read.append(1))
        message = "must be one that can be copied, got .*; pass inplace=True to change itself"
        with pytest.raises(ValueError, match=f"compress: the model {message}"):
            compress(model, PQ)
        with pytest.raises(ValueError, match=f"decompress: the model {message}"):
            decompress(small)
        with pytest.raises(ValueError, match=f"compress_dense: the model {message}"):
            compress_dense(model, (read.append(1) for _ in range(1)), 2.0)
    assert not read
    assert compress(model, PQ, inplace=True) is model and decompress(model, inplace=True) is model


def test_no_tensor_is_copied_to_tell(monkeypatch):
    model = nn.Sequential(nn.Embedding(N, D), nn.BatchNorm1d(D))
    kept = []
    monkeypatch.setattr(models.copy, "deepcopy", lambda each, memo: kept.extend(memo))
    models.check_copied("compress", model)
    assert set(kept) == {id(each) for each in [*model.parameters(), *model.buffers()]}
