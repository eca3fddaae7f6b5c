"""Tables of FP16 and BF16: the result is what `compress` makes of such tables, and the way back gives their type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec import DataType, EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig

from tests.cases import CONFIGS, DIM, IDS, NUM_ROWS, contexts, counts, is_managed, rows
from tests.conversion.made import MEMORY, assert_same, given_files, load_folder, run
from torchrec_compress import CompressedEmbedding, compress, decompress
from torchrec_compress.conversion.run import convert
from torchrec_compress.methods import CafeConfig, HashConfig, Int8Config, PQConfig

PQ, HASH, INT8 = PQConfig(num_codes=4, codebook_size=16), HashConfig(num_buckets=40), Int8Config()
NAMES = ("bags.user", "words.word")


class Half(nn.Module):
    """Tables of FP16, pooled and not, and a net in float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"num_embeddings": NUM_ROWS, "embedding_dim": DIM, "data_type": DataType.FP16}
        self.bags = EmbeddingBagCollection([EmbeddingBagConfig(name="user", feature_names=["user"], **sizes)])
        self.words = EmbeddingCollection([EmbeddingConfig(name="word", feature_names=["word"], **sizes)])
        self.net = nn.Linear(DIM, 1)
        with torch.no_grad():
            self.bags.embedding_bags["user"].weight.copy_(rows())  # type: ignore[operator]
            self.words.embeddings["word"].weight.copy_(rows() + 1)  # type: ignore[operator]


def files(folder: Path) -> dict[str, Any]:
    """Return what a config says of counts and contexts, those of the other tests."""
    found = given_files(folder)
    return {what: dict.fromkeys(NAMES, next(iter(each.values()))) for what, each in found.items()}


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_all_methods_there_and_back(config, tmp_path):
    model = Half()
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    given = {"counts": dict.fromkeys(NAMES, counts()), "contexts": dict.fromkeys(NAMES, contexts())}
    told = {"compression": {"*": config.to_dict()}, "seed": 3, **files(tmp_path)}
    if is_managed(config):
        with pytest.raises(
            ValueError, match=r"dense.pt: .*data_type must be FP32.*data_type in 'tables' may say other"
        ):
            run(tmp_path / "dense.pt", tmp_path / "small.pt", told)
        return
    small = compress(model, config, seed=3, **given)
    report = run(tmp_path / "dense.pt", tmp_path / "small.pt", told)
    assert {about["data_type"] for about in report["tables"].values()} == {"FP16"}
    got = torch.load(tmp_path / "small.pt")
    assert_same(got, small.state_dict())
    assert report["tables"]["bags.embedding_bags.user.weight"]["bytes_before"] == NUM_ROWS * DIM * 2
    small.load_state_dict(got)
    if not any(method.is_compressed for method in small.bags.methods().values()):
        return
    run(tmp_path / "small.pt", tmp_path / "back.pt", report["back"])
    back = torch.load(tmp_path / "back.pt")
    assert back["bags.embedding_bags.user.weight"].dtype == torch.float16
    assert_same(back, decompress(small).state_dict())


def test_a_folder_of_many_pieces_too(tmp_path):
    model = Half()
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dense", no_dist=True)
    small = compress(model, HASH)
    report = run(tmp_path / "dense", tmp_path / "small", {"compression": {"*": HASH.to_dict()}})
    assert_same(load_folder(tmp_path / "small", small.state_dict()), small.state_dict())
    run(tmp_path / "small", tmp_path / "back", report["back"])
    wanted = decompress(small).state_dict()
    assert_same(load_folder(tmp_path / "back", wanted), wanted)


def saved(folder: Path, value: torch.Tensor) -> Path:
    torch.save({"sparse.embedding_bags.user.weight": value}, folder / "dense.pt")
    return folder / "dense.pt"


def test_bf16_has_codes_and_no_table_of_torchrecs(tmp_path):
    weight = rows().bfloat16()
    path = saved(tmp_path, weight)
    report = run(path, tmp_path / "codes.pt", {"compression": {"*": PQ.to_dict()}})
    tables = [EmbeddingBagConfig(name="user", num_embeddings=NUM_ROWS, embedding_dim=DIM, feature_names=["user"])]
    stock = EmbeddingBagCollection(tables)
    with torch.no_grad():
        stock.embedding_bags["user"].weight.copy_(weight.float())  # type: ignore[operator]
    wide = compress(stock, PQ)
    got = {key.removeprefix("sparse."): value for key, value in torch.load(tmp_path / "codes.pt").items()}
    assert_same(got, wide.state_dict())
    run(tmp_path / "codes.pt", tmp_path / "back.pt", report["back"])
    back = torch.load(tmp_path / "back.pt")["sparse.embedding_bags.user.weight"]
    assert torch.equal(back, decompress(wide).embedding_bags["user"].weight.bfloat16())  # type: ignore[operator]
    hashed = {"compression": {"*": HASH.to_dict()}}
    with pytest.raises(
        ValueError, match=r"got BF16; TorchRec would .*; the tables are .*BF16.*, of which data_type in"
    ):
        run(path, tmp_path / "hash.pt", hashed)
    run(path, tmp_path / "hash.pt", {**hashed, "tables": {"sparse.*": {"data_type": "FP32"}}})
    found = torch.load(tmp_path / "hash.pt")
    assert {value.dtype for value in found.values() if value.is_floating_point()} == {torch.float32}


def test_what_fp16_cannot_hold_is_told(tmp_path):
    large = rows() + 7e4
    path = saved(tmp_path, large)
    half = {"tables": {"sparse.*": {"data_type": "FP16"}}}
    few = HashConfig(num_buckets=400).to_dict()
    with pytest.raises(ValueError, match=r"table 'user': pre-trained values must be in \+-65504 for data_type FP16"):
        run(path, tmp_path / "hash.pt", {"compression": {"*": few}, **half})
    report = run(path, tmp_path / "codes.pt", {"compression": {"*": PQ.to_dict()}})
    way = report["back"]
    way["tables"]["sparse.embedding_bags.user.weight"]["data_type"] = "FP16"
    with pytest.raises(
        ValueError, match=r"table 'user': rows must be in .* torch.float16, got up .*; the first is that of id 0"
    ):
        run(tmp_path / "codes.pt", tmp_path / "back.pt", way)


def test_types_that_are_not_so_are_refused(tmp_path):
    path = saved(tmp_path, rows().half())
    kept = {"sparse.*": {"data_type": "FP32"}}
    torch.save({**torch.load(path), "sparse.embedding_bags.item.weight": rows().half()}, path)
    mixed = {"compression": {"user": HASH.to_dict(), "item": {"method": "dense"}}}
    with pytest.raises(
        ValueError, match=r"item.weight: data_type must be that of a table that stays as it is, torch.fl"
    ):
        run(path, tmp_path / "small.pt", {**mixed, "tables": kept})
    report = run(path, tmp_path / "small.pt", mixed)
    assert torch.load(tmp_path / "small.pt")["sparse.dense.embedding_bags.item.weight"].dtype == torch.float16
    way = report["back"]
    way["tables"]["sparse.embedding_bags.item.weight"]["data_type"] = "FP32"
    with pytest.raises(ValueError, match=r"item.weight: data_type must be that of a table that stays as it is"):
        run(tmp_path / "small.pt", tmp_path / "back.pt", way)


@pytest.mark.parametrize("compression", [{"user": PQ.to_dict()}, {"user": PQ.to_dict(), "shop": {"method": "dense"}}])
def test_a_type_that_nothing_is_stored_in_is_refused(compression, tmp_path):
    """Of a table that no key fits, and of a plain module that stays."""
    torch.save({"sparse.embedding_bags.user.weight": rows(), "shop.weight": rows().half()}, tmp_path / "dense.pt")
    told = {"compression": compression, "tables": {"shop.weight": {"data_type": "FP32"}}}
    with pytest.raises(ValueError, match=r"tables.shop.weight: data_type must be that of a table that stays as it is"):
        run(tmp_path / "dense.pt", tmp_path / "small.pt", told)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_table_that_stays_beside_compressed_ones_keeps_its_bits_on_the_way_back(dtype, tmp_path):
    names = {name: f"sparse.embedding_bags.{name}.weight" for name in ("user", "item")}
    torch.save({key: rows().to(dtype) for key in names.values()}, tmp_path / "dense.pt")
    mixed = {"compression": {"user": PQ.to_dict(), "item": {"method": "dense"}}}
    report = run(tmp_path / "dense.pt", tmp_path / "small.pt", mixed)
    report = run(tmp_path / "small.pt", tmp_path / "back.pt", report["back"])
    got = torch.load(tmp_path / "back.pt")
    assert torch.equal(got[names["item"]], rows().to(dtype)) and got[names["item"]].dtype == dtype
    assert got[names["user"]].dtype == dtype
    told = report["tables"][names["item"]]
    assert told["kept_bit_for_bit"] and told["rounding"] is None
    told = report["tables"][names["user"]]
    assert told["types_after"] == [str(dtype)[6:]] and told["rounding"] == f"to nearest {str(dtype)[6:]}"


@pytest.mark.parametrize("before", [torch.float32, torch.float16])
@pytest.mark.parametrize("after", ["FP32", "FP16"])
def test_another_type_is_asked_for_on_the_way_back(before, after, tmp_path):
    """The checkpoint shows what rows in a table of TorchRec's are; nothing else needs to be said of that."""
    key, wanted = "sparse.embedding_bags.user.weight", {"FP32": torch.float32, "FP16": torch.float16}[after]
    report = run(saved(tmp_path, rows().to(before)), tmp_path / "small.pt", {"compression": {"user": HASH.to_dict()}})
    way = report["back"]
    way["tables"][key]["data_type"] = None
    run(tmp_path / "small.pt", tmp_path / "own.pt", way)
    own = torch.load(tmp_path / "own.pt")[key]
    assert own.dtype == before
    way["tables"][key]["data_type"] = after
    told = run(tmp_path / "small.pt", tmp_path / "back.pt", way)["tables"][key]
    assert told["types_before"] == [str(before)[6:]] and told["types_after"] == [str(wanted)[6:]]
    assert told["bytes_after"] == NUM_ROWS * DIM * wanted.itemsize
    assert told["rounding"] == (f"to nearest {str(wanted)[6:]}" if after == "FP16" else None)
    got = torch.load(tmp_path / "back.pt")[key]
    assert got.dtype == wanted and torch.equal(got.float(), own.to(wanted).float())
    again = run(tmp_path / "small.pt", tmp_path / "again.pt", {**way, "compression": {"user": HASH.to_dict()}})
    assert again["tables"][key]["kept_bit_for_bit"] == (before == wanted)
    (bucket,) = [value for name, value in torch.load(tmp_path / "again.pt").items() if name.endswith("buckets.weight")]
    assert bucket.dtype == wanted


def test_a_model_that_was_cast_is_refused(tmp_path):
    run(saved(tmp_path, rows()), tmp_path / "small.pt", {"compression": {"user": PQ.to_dict()}})
    way = json.loads((tmp_path / "small.pt.report.json").read_text())["back"]
    state = torch.load(tmp_path / "small.pt")
    cast = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    torch.save(cast, tmp_path / "small.pt")
    with pytest.raises(
        ValueError, match=r"codebooks' must be torch.float32, .* got torch.float16, of a model that was cast"
    ):
        run(tmp_path / "small.pt", tmp_path / "back.pt", way)


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize(
    ("config", "dtype"), [(PQ, torch.float16), (PQ, torch.bfloat16), (HASH, torch.float16), (INT8, torch.bfloat16)]
)
def test_a_plain_module_in_half_precision(config, dtype, kind, padding, tmp_path):
    """Compressed, and expanded again, as the module itself is."""
    model = nn.ModuleDict({"item": kind(NUM_ROWS, DIM, padding_idx=padding).to(dtype)})
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    told = {"tables": {"item.weight": {"pooled": kind is nn.EmbeddingBag, "padding_idx": padding}}}
    report = run(tmp_path / "dense.pt", tmp_path / "small.pt", {"compression": {"*": config.to_dict()}, **told})
    small = compress(model, config)
    assert_same(torch.load(tmp_path / "small.pt"), small.state_dict())
    assert report["tables"]["item.weight"]["bytes_after"] == small["item"].footprint().total_bytes
    run(tmp_path / "small.pt", tmp_path / "back.pt", report["back"])
    assert_same(torch.load(tmp_path / "back.pt"), decompress(small).state_dict())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (HASH, r"data_type must be FP32 or FP16 where rows lie in a table of TorchRec's, got BF16"),
        (CafeConfig(num_hot_rows=16, num_cold_rows=40, num_blocks=4), "data_type"),
    ],
)
def test_a_plain_module_of_a_type_that_a_method_has_not(config, said, tmp_path):
    """Refused with what the config can say of it, as which it is compressed then."""
    torch.save({"item.weight": nn.Embedding(NUM_ROWS, DIM).weight.detach().bfloat16()}, tmp_path / "dense.pt")
    np.save(tmp_path / "counts.npy", counts().numpy())
    told = {"compression": {"*": config.to_dict()}, "counts": {"item": str(tmp_path / "counts.npy")}}
    with pytest.raises(ValueError, match=rf"{said}.*; the tables are \{{'item.weight': 'BF16'\}}, of which data_type"):
        run(tmp_path / "dense.pt", tmp_path / "small.pt", {**told, "tables": {"item.weight": {}}})
    run(tmp_path / "dense.pt", tmp_path / "small.pt", {**told, "tables": {"item.weight": {"data_type": "FP32"}}})
    module = CompressedEmbedding(NUM_ROWS, DIM, compression=config, name="item", will_fit=True)
    module.load_state_dict({k.removeprefix("item."): v for k, v in torch.load(tmp_path / "small.pt").items()})


def test_a_padding_row_that_float16_cannot_hold_is_named(tmp_path):
    weight = rows()
    weight[3] = 7e4
    torch.save({"item.weight": weight}, tmp_path / "dense.pt")
    told = {"tables": {"item.weight": {"padding_idx": 3, "data_type": "FP16"}}}
    with pytest.raises(
        ValueError, match=r"table 'item': the row of padding_idx 3 must be in \+-65504 .* got up to 70000"
    ):
        run(tmp_path / "dense.pt", tmp_path / "small.pt", {"compression": {"*": PQ.to_dict()}, **told})


def test_the_report_is_the_config_of_the_way_back(tmp_path):
    path = saved(tmp_path, rows())
    run(path, tmp_path / "small.pt", {"compression": {"*": PQ.to_dict()}})
    report = tmp_path / "small.pt.report.json"
    convert(tmp_path / "small.pt", tmp_path / "back.pt", report, MEMORY, progress=False)
    assert list(torch.load(tmp_path / "back.pt")) == ["sparse.embedding_bags.user.weight"]
    with pytest.raises(
        ValueError, match=r"back.pt.report.json: must hold a way back, got the report of a conversion to"
    ):
        convert(tmp_path / "back.pt", tmp_path / "x.pt", tmp_path / "back.pt.report.json", MEMORY, progress=False)
    state = {**torch.load(tmp_path / "small.pt"), "optim.state.item.exp_avg": rows(), "item.weight": rows()}
    torch.save(state, tmp_path / "mixed.pt")
    with pytest.raises(ValueError) as error:
        run(
            tmp_path / "mixed.pt", tmp_path / "x.pt", {"compression": {"*": PQ.to_dict()}, "tables": {"itm.weight": {}}}
        )
    said = str(error.value)
    assert (
        "did you mean 'item.weight'?; they are ['item.weight']; what is compressed, at ['sparse.'], is expanded" in said
    )
