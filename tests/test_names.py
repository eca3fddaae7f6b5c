from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

from tests.cases import CASES
from torchrec_compress import CompressedEmbeddingBagCollection
from torchrec_compress.methods import HashConfig, MethodConfig, PQConfig
from torchrec_compress.names import check_feature_names, check_folder_names, check_table_names

# what has a meaning elsewhere: to paths, patterns, Markdown, TorchRec's outputs and our own keys
ODD = ["a b", "a/b", "*", "[x]?", "a|b", "$a$", "-a", "__a", "größe", "表", "a:b", "x" * 300, "A", "1", "self", "a@b"]
TRAINED = ("dense", "hash", "memcom", "random")  # which need no fit


def _tables(names: list[str], rows: int = 300) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=8, feature_names=[name.replace("@", "")])
        for name in names
    ]


def _collection(names: list[str], compression: MethodConfig | dict[str, MethodConfig]):
    return CompressedEmbeddingBagCollection(_tables(names), compression=compression)


def test_odd_names_work_as_plain_ones_do():
    methods = {name: CASES[TRAINED[number % 4]][0] for number, name in enumerate(ODD)}
    collection = _collection(ODD, methods)
    assert {name: found.method for name, found in collection.methods().items()} == {
        name: method.method for name, method in methods.items()
    }, "a table's own name comes before patterns"
    keys = [table.feature_names[0] for table in _tables(ODD)]
    batch = KeyedJaggedTensor.from_lengths_sync(keys, torch.arange(len(ODD)), torch.ones(len(ODD), dtype=torch.int64))
    pooled = collection(batch)
    assert pooled.keys() == keys
    other = _collection(ODD, methods)
    other.load_state_dict(collection.state_dict())
    assert torch.equal(other(batch).values(), pooled.values())
    for name in ODD:
        assert collection.table_rows(name, torch.arange(3)).shape == (3, 8)
    assert set(collection.footprint().to_dict()["tables"]) == set(ODD)


@pytest.mark.parametrize("name", ["type", "keys", "items", "pop", "values", "training", "forward", "a.b", ""])
def test_names_that_pytorch_refuses_are_refused_in_our_words(name):
    with pytest.raises(KeyError):
        nn.ModuleDict({name: nn.Linear(1, 1)})
    with pytest.raises(ValueError, match=f"compressed collection: table {name!r}: must"):
        _collection([name], HashConfig(num_buckets=9))


@pytest.mark.parametrize("name", ["a\0", "a\nb", "\x1b[2J", "\u202e"])
def test_names_that_cannot_be_printed_are_refused(name):
    for check in (check_table_names, check_feature_names, check_folder_names):
        with pytest.raises(ValueError, match="printable"):
            check([name], "name")


def test_names_that_would_become_the_same_are_refused():
    with pytest.raises(ValueError, match=r"'a' is stored as \['a__buckets'\], .*other tables, got \['a__buckets'\]"):
        _collection(["a", "a__buckets"], {"a": HashConfig(num_buckets=9), "*": PQConfig(num_codes=2, codebook_size=9)})
    tables = _tables(["a:b", "a"])
    tables[0].feature_names, tables[1].feature_names = ["c"], ["b:c"]
    with pytest.raises(ValueError, match=r"'table:feature' must be one pair, got \['a:b:c'\] twice"):
        CompressedEmbeddingBagCollection(tables, compression=HashConfig(num_buckets=9))
    tables = _tables(["a"])
    tables[0].feature_names = ["f", "f"]
    with pytest.raises(ValueError, match=r"must look a feature up once, .* got \['a:f'\] twice"):
        CompressedEmbeddingBagCollection(tables, compression=HashConfig(num_buckets=9))


def test_features_that_torchrec_would_cut_are_refused():
    tables = _tables(["a"])
    tables[0].feature_names = ["f@x"]
    with pytest.raises(ValueError, match="table 'a': feature 'f@x': must not hold '@'"):
        CompressedEmbeddingBagCollection(tables, compression=HashConfig(num_buckets=9))


@pytest.mark.parametrize(
    "names",
    [
        *(
            [name]
            for name in ("pq/4", "..", ".", "/etc", "a\\b", "C:", "-a", ".a", "a ", "a.", "*", "a|b", "x" * 129, "")
        ),
        ["表" * 50],
        ["a", "A"],
        ["ß", "SS"],
        ["é", "e\u0301"],
    ],
)
def test_folders_have_names_that_every_file_system_takes(names):
    with pytest.raises(ValueError, match="variants '"):
        check_folder_names(names, "variants")
    check_folder_names(["a", "b c", "mec, trained on", "pq + popularity", "dense d=4", "表", "$x$", "#1"], "variants")
