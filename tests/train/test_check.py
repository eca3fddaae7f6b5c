"""Mistakes are found before anything is trained."""

from __future__ import annotations

import pytest

from torchrec_compress.compression import parse
from torchrec_compress.train import stages
from torchrec_compress.train.byte_budget import Budget
from torchrec_compress.train.check import check_config, check_run, check_tables, check_variants, compression_of
from torchrec_compress.train.compare import runs as comparing
from torchrec_compress.train.config import RunConfig, override

INT8 = {"method": "int8"}
HASH = {"method": "hash", "num_buckets": 20}


PARQUET = {"data.kind": "parquet", "data.path": "x"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"compression": {"user": {"method": "mec", "num_codewords": 32}}},
            "unknown key 'compression.user.num_codewords'",
        ),
        ({"compression": {"user": {"method": "mec"}}}, r"compression.user: must set \['num_codes'\]"),
        (
            {"compression": {"user": {"method": "pq", "num_codes": 2, "structure": "x"}}},
            "compression.user.structure: must be",
        ),
        ({"compression": {"method": {"num_codes": 2}}}, "compression.method: must be a mapping with the key 'method'"),
        ({"compression": {"method": ["pq"]}}, "compression.method: must be one of"),
        (
            {"compression": {"u": {"method": "mec", "num_codes": 2, "fit_options": {"batch_size": 0}}}},
            "compression.u: .*batch_",
        ),
        (
            {"compression": {"budget_ratio": 9, "num_code": [1]}},
            "unknown key 'compression.num_code'; did you mean 'compression.num_codes'",
        ),
        (
            {"compression": {"budget_ratio": 9, "codes": {"method": "pq", "num_cods": 1}}},
            "unknown key 'compression.codes.num_c",
        ),
        ({"compression": {"budget_ratio": 9, "codes": INT8}}, "compression.codes: must be one method of codes"),
        ({"compression": {"budget_ratio": 9}, "start": "scratch"}, "start: must be 'pretrained' with a budget"),
        ({"pretrain.epochs": 0}, "pretrain.epochs: must be over 0 where the full model is trained first"),
        ({"pretrain.epochs": 0, "compression": INT8}, "pretrain.epochs: must be over 0 where"),
        ({"retrain.epochs": 0, "start": "scratch", "compression": HASH}, "retrain.epochs: must be over 0 with start"),
        ({"pretrain.distill_weight": 0.5}, "pretrain.distill_weight: must be 0"),
        (
            {"retrain": {"epochs": 1, "distill_weight": 0.5}, "start": "scratch", "compression": HASH},
            "retrain.distill_weight: must be 0 with start = 'scratch'",
        ),
        (
            {"pretrain": {"patience": 2, "optim": {"decay": "plateau", "decay_patience": 2}}},
            r"pretrain\.patience: must be at least 4 with pretrain\.optim\.decay = 'plateau' and decay_patience = 2",
        ),
        (
            {"pretrain": {"patience": 1, "optim": {"decay": "plateau"}}},
            r"pretrain\.patience: must be at least 2 with pretrain\.optim\.decay = 'plateau' and decay_patience = 0",
        ),
        (
            {"pretrain.optim.table_l2": 0.1},
            "pretrain.optim.table_l2: must be 0 with pretrain.optim.tables = 'rowwise_adagrad'",
        ),
        (
            {"retrain": {"epochs": 1, "optim": {"tables": "sgd", "table_l2": 1}}, "compression": INT8},
            "retrain.optim.table_l2: must be 0",
        ),
        (
            {"pretrain": {"train_dense": False, "train_tables": False, "train_codebooks": False}},
            "pretrain: must train something",
        ),
        (
            {"pretrain": {"train_dense": False, "train_tables": False}},
            "pretrain: must train something, .* the full model has no codebooks",
        ),
        (
            {"compression": {"budget_ratio": 2, "codes": {"method": "quantile", "num_codes": 1}}},
            "compression.codes: must be a method that is fitted to rows alone, got 'quantile', which needs contexts",
        ),
        ({"compression": {"budget_ratio": 2, "num_codes": []}}, "compression.num_codes: must hold a code length"),
        ({"parallel.sharding_types": {"user": ["rowwise"]}}, "parallel.sharding_types.user: .*did you mean 'row_wise'"),
        ({"data.kind": "parquet"}, "data.path: must be set"),
        ({"data.kind": "parquet", "data.path": ""}, "data.path: must be set"),
        ({"model.cross_rank": 4}, "model.cross_rank: has no meaning with model.name = 'deepfm', got 4"),
        ({"model": {"name": "dlrm", "num_cross_layers": 2}}, "model.num_cross_layers: has no meaning with model.name"),
        ({"data.streaming": True}, "data.streaming: must be false with data.kind = 'generator'"),
        ({"data.path": "x"}, "data.path: has no meaning with data.kind = 'generator'"),
        ({"data.label": "y"}, "data.label: has no meaning with data.kind = 'generator'"),
        ({"data.split_seed": 5}, "data.split_seed: has no meaning with data.kind = 'generator'"),
        ({"data.fractions": [0.7, 0.2]}, "data.fractions: has no meaning with data.kind = 'generator'"),
        ({"data.subsample": 0.1}, "data.subsample: has no meaning with data.kind = 'generator'"),
        (
            {"data.kind": "parquet", "data.path": "x", "data.split": None, "data.fractions": [0.9, 0.2]},
            "data.fractions: must be the shares",
        ),
        ({"data.generator.multi_hot": True}, "data.generator.multi_hot: must be false"),
        ({"data.features": ["user"]}, "data.features: has no meaning with data.kind = 'generator'"),
        ({"data": {"kind": "parquet", "path": "x", "hash_size": 9}}, "data.hash_size: has no meaning"),
        ({"data": {"kind": "criteo", "path": "x", "drop": ["cat_1"]}}, "data.drop: has no meaning"),
        (
            {"data": {"kind": "parquet", "path": "x", "features": ["a", "b", "a"]}},
            "data.features: names must differ, got 'a'",
        ),
        ({"data": {"kind": "parquet", "path": "x", "row_filter": "a ~ 3"}}, "data.row_filter: must be like"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    config = override(RunConfig(), changes)
    with pytest.raises(ValueError, match=message):
        check_config(config)
    variant = {**{"compare.variants": {"ok": {}, "bad": changes}}}
    with pytest.raises(ValueError, match=r"^compare\.variants\.bad: " + message):
        check_variants(override(RunConfig(), variant))


STREAMED = {**PARQUET, "data.streaming": True}
WITHOUT = {**PARQUET, "data.split": None}


@pytest.mark.parametrize(
    ("start", "key", "value", "reason"),
    [
        *(({}, key, 3, "without data.streaming") for key in ("lanes", "chunk_rows", "window", "num_workers")),
        (PARQUET, "lanes", 4, "without data.streaming"),
        (STREAMED, "chunk_rows", 512, "with streamed Parquet files"),
        (PARQUET, "generator.num_rows", 500, "with data.kind = 'parquet'"),
        (PARQUET, "generator.seed", 8, "with data.kind = 'parquet'"),
        ({"data.kind": "criteo", "data.path": "x"}, "generator.zipf", 2.0, "with data.kind = 'criteo'"),
        ({"data.kind": "criteo", "data.path": "x"}, "split", "day", "with data.kind = 'criteo'"),
        ({"data.generator.criteo_rows": 50}, "generator.num_users", 60, "with data.generator.criteo_rows"),
        (PARQUET, "split_by", "order", "beside the column data.split = 'split'; set that to null"),
        (PARQUET, "fractions", [0.7, 0.2], "beside the column data.split = 'split'"),
        (PARQUET, "split_seed", 5, "beside the column data.split = 'split'"),
        ({**WITHOUT, "data.split_by": "order"}, "split_seed", 5, "with data.split_by = 'order'"),
        ({**WITHOUT, "data.split_by": "last_file"}, "fractions", [0.7, 0.2], "with data.split_by = 'last_file'"),
        (PARQUET, "subsample_by", "user", "with data.subsample = 1"),
        ({"data.tail_count": 0}, "tail_tables", ["user"], "with data.tail_count = 0"),
    ],
)
def test_a_key_of_the_data_that_does_nothing_is_refused(start, key, value, reason):
    check_config(override(RunConfig(), start))
    with pytest.raises(ValueError, match=rf"data.{key}: has no meaning {reason}.*, got"):
        check_config(override(RunConfig(), {**start, f"data.{key}": value}))


@pytest.mark.parametrize(
    "changes",
    [
        {**STREAMED, "data.lanes": 4, "data.window": 2, "data.num_workers": 0},
        {**WITHOUT, "data.fractions": [0.7, 0.2], "data.split_seed": 5},
        {**WITHOUT, "data.split_by": "order", "data.fractions": [0.7, 0.2]},
        {**PARQUET, "data.subsample": 0.5, "data.split_seed": 5, "data.subsample_by": "user"},
        {
            "data.kind": "criteo",
            "data.path": "x",
            "data.streaming": True,
            "data.chunk_rows": 64,
            "data.split_by": "order",
        },
    ],
)
def test_a_key_of_the_data_that_acts_is_taken(changes):
    check_config(override(RunConfig(), changes))


@pytest.mark.parametrize(
    ("size", "world", "message"),
    [
        (3199, 1, "of which a batch has 1;"),
        (1, 1, "of which a batch has 1;"),
        (3198, 2, "of which a batch has 2;"),
        (2, 2, "of which a batch has 2;"),
        (3198, 1, ""),
        (64, 2, ""),
        (9999, 1, ""),
    ],
)
def test_no_batch_of_one_row_is_normalised(config, data, size, world, message):
    plain = override(config, {"pretrain.batch_size": size})
    check_run(plain, None, data, world)
    changed = override(plain, {"model.batch_norm": True})
    if not message:
        check_run(changed, None, data, world)
        return
    with pytest.raises(ValueError, match=rf"pretrain.batch_size: must leave each of {world} ranks two .*{message}"):
        check_run(changed, None, data, world)


def test_tables_that_are_not_compressed_have_a_sharding_type_of_the_device(config, data):
    wide, rows = ["row_wise", "table_wise"], {"parallel.device": "cpu", "parallel.sharding_types": {"*": ["row_wise"]}}
    few = {"method": "hash", "num_buckets": 3}
    scratch = {"start": "scratch", "compression": {"*": few}, "retrain.epochs": 1}
    mixed = {**scratch, "compression": {"item": {"method": "dense"}, "*": few}}
    for stage, table, changes in (("pretrain", "user", {}), ("retrain", "item", mixed)):
        found = override(config, {**rows, **changes})
        message = (
            rf"^parallel.sharding_types: table '{table}' of {stage}, .* \['table_wise', .* 'cpu', got \['row_wise'\];"
        )
        with pytest.raises(ValueError, match=message):
            check_run(found, compression_of(found.compression), data)
        for fine in (
            {"parallel.sharding_types": {"*": wide}},
            {"parallel.device": "cuda"},
            {f"{stage}.optim.tables": "adam"},
            {**scratch, "compression.item": few},
        ):
            changed = override(found, fine)
            check_run(changed, compression_of(changed.compression), data)


def test_trained_rows_have_an_optimizer_that_trains_them(config, data):
    few = {"method": "narrow", "width": 4, "bits": 8}
    found = override(config, {"start": "scratch", "compression": {"*": few}, "retrain.epochs": 1})
    check_run(found, compression_of(found.compression), data)
    for changes, message in (
        ({"retrain.optim.tables": "adam"}, "must train in the backward, got 'adam'"),
        ({"retrain.optim.tables": "sgd", "compression": {"*": {**few, "optimizer": "adagrad"}}}, "got adagrad for sgd"),
    ):
        wrong = override(found, changes)
        with pytest.raises(ValueError, match=rf"^retrain\.optim\.tables: table 'user': .*{message}"):
            check_run(wrong, compression_of(wrong.compression), data)


def test_a_table_that_a_budget_may_leave_whole_has_a_sharding_type_of_the_device(config, data):
    rows = {
        "parallel.device": "cpu",
        "parallel.sharding_types": {"user": ["row_wise"]},
        "pretrain.optim.tables": "adam",
    }
    found = override(config, {**rows, "compression": {"budget_ratio": 1.1}, "retrain.epochs": 1})
    message = "^parallel.sharding_types: table 'user' of retrain, which the budget may leave whole, must .*'table_wise'"
    with pytest.raises(ValueError, match=message):
        check_run(found, compression_of(found.compression), data)
    for fine in (
        {"compression": {"budget_ratio": 3}},  # too little for the whole of it
        {"retrain.optim.tables": "adam"},
        {"parallel.sharding_types.user": ["row_wise", "table_wise"]},
    ):
        changed = override(found, fine)
        check_run(changed, compression_of(changed.compression), data)


def test_a_key_of_the_model_or_the_profile_that_acts_is_taken(config, data):
    for name in ("dcnv2", "dlrm_dcnv2"):
        check_config(override(RunConfig(), {"model": {"name": name, "num_cross_layers": 2, "cross_rank": 4}}))
    steps = len(data.batches("train", config.pretrain.batch_size, 0))
    check_run(override(config, {"parallel.profile_steps": steps - 10}), None, data)
    with pytest.raises(ValueError, match=rf"^parallel\.profile_steps: must be at most {steps - 10}, "):
        check_run(override(config, {"parallel.profile_steps": steps - 9}), None, data)


def test_settings_of_a_stage_that_is_not_used_may_be_anything():
    check_config(
        override(RunConfig(), {"pretrain.epochs": 0, "start": "scratch", "compression": HASH, "retrain.epochs": 1})
    )
    check_config(override(RunConfig(), {"retrain.optim.table_l2": 0.5, "retrain.distill_weight": 0.5}))


def test_a_compression_is_methods_or_a_budget_or_nothing():
    assert check_config(RunConfig()) is compression_of({}) is None
    for plain in (INT8, {"user": INT8, "*": HASH}, {"budget_ratio": INT8}):  # a table may be called so
        assert check_config(override(RunConfig(), {"compression": plain})) == compression_of(plain) == parse(plain)
    plain = {"budget_bytes": 100, "num_codes": [2]}
    wanted = check_config(override(RunConfig(), {"compression": plain}))
    assert wanted == compression_of(plain) == Budget(budget_bytes=100, num_codes=[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compression": {"usr": INT8, "*": INT8}}, r"^compression: every key must fit a table, got \['usr'\]"),
        ({"compression": {"user": INT8}}, "^compression: table 'item' must fit a key"),
        (
            {"compression": {"method": "pq", "num_codes": 3, "codebook_size": 9}},
            "^compression: table 'user': embedding_dim must",
        ),
        (
            {"compression": INT8, "start": "scratch", "retrain.epochs": 1},
            "^start: must be 'pretrained' for tables that are fit",
        ),
        ({"compression": {"method": "narrow", "width": 4, "shared": "p"}}, "^start: must be 'scratch' for tables that"),
        (
            {"compression": {"method": "quantile", "num_codes": 2, "codebook_size": 9}, "start": "scratch"}
            | {"retrain.epochs": 1, "parallel.init": "shards"},
            "^parallel.init: must be 'host' for tables that are fitted, got 'shards'",
        ),
        (
            {"compression": {"budget_bytes": 10}},
            "^compression: the budget must be at least [0-9,]+ bytes for these tables, got 10",
        ),
        ({"compression": {"budget_ratio": 1e6}}, "^compression: the budget must be at least"),
        ({"model.embedding_dim": 6}, "^model.embedding_dim: must be a multiple of 4"),
        ({"model.widths": {"usr": 8}}, "^model.widths: must name tables"),
        ({"model.widths": {"user": 16}}, "^model.widths: must all be equal"),
        ({"data.tail_tables": ["usr"]}, "^data.tail_tables: must name tables .*did you mean 'user'"),
        ({"context": {"usr": "item"}}, "^context: must name tables .*did you mean 'user'"),
        ({"context": {"user": "itm"}}, "^context.user: must be another table"),
        ({"context": {"user": "user"}}, "^context.user: must be another table"),
        ({"parallel.sharding_types": {"usr*": ["row_wise"]}}, "^parallel.sharding_types: 'usr\\*' must fit a table"),
    ],
)
def test_settings_that_fit_no_table(config, changes, message):
    config = override(config, changes)
    with pytest.raises(ValueError, match=message):
        check_tables(config, compression_of(config.compression), {"user": 400, "item": 300})


def test_names_that_are_no_tables():
    for name, said in (
        ("type", "attribute"),
        ("a.b", "must not hold '.'"),
        ("a@b", "must not hold '@'"),
        ("", "printable"),
    ):
        with pytest.raises(ValueError, match=said):
            check_tables(RunConfig(), None, {"user": 400, name: 300})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "dlrm", "bottom": [8]}}, r"model\.bottom: must be empty without dense columns"),
        ({"model.hidden": []}, r"model\.hidden: must hold at least one"),
        (
            {"parallel.profile_steps": 1, "pretrain.epochs": 0.1},
            r"parallel\.profile_steps: must be at most 0, the steps of pretrain after a warm-up of 10, got 1",
        ),
        ({"parallel.profile_steps": 100}, r"parallel\.profile_steps: must be at most \d+, the steps of pretrain"),
        ({"pretrain.epochs": 1e-6}, r"pretrain\.epochs: must make a step, got 1e-06 of the \d+ steps"),
    ],
)
def test_settings_that_do_not_fit_the_data(config, data, changes, message):
    with pytest.raises(ValueError, match=message):
        check_run(override(config, changes), None, data)


@pytest.mark.parametrize(
    "changes",
    [
        {"compression": {"user": {"method": "mec", "num_codewords": 32}}},
        {"compression": {"usr": INT8}},
        {"compression": {"method": "pq", "num_codes": 3, "codebook_size": 16}},
        {"pretrain.epochs": 0},
        {"data.tail_tables": ["usr"]},
        {"parallel.sharding_types": {"user": ["rowwise"]}},
        {"pretrain.optim.table_l2": 0.5},
    ],
)
def test_nothing_is_trained_and_no_variant_begins_before_all_are_checked(config, ranks, tmp_path, monkeypatch, changes):
    def trained(*_, **__):
        raise AssertionError("training began")

    for module, name in ((stages, "train"), (stages, "pretrain"), (comparing, "_run_all")):
        monkeypatch.setattr(module, name, trained)
    with pytest.raises(
        ValueError, match=r"compression|pretrain\.epochs|data\.tail_tables|sharding_types|^pretrain\.optim\.table_l2"
    ):
        stages.run(override(config, changes), tmp_path / "a", tmp_path / "full", ranks)
    chosen = {"compare.variants": {"ok": {}, "bad": changes}}
    with pytest.raises(ValueError, match=r"^compare\.variants\.bad: "):
        comparing.compare(override(config, chosen))


def test_comparisons_have_names_and_seeds(config):
    for changes, message in (
        ({"variants": {"ok": {}, "pq/4": {}}}, "compare.variants 'pq/4': must be a folder's name"),
        ({"variants": {"a": {}, "A": {}}}, "compare.variants 'a': names must differ"),
        ({"variants": {"a": {}}, "only": ["b"]}, "compare.only: no variant 'b'"),
        ({"variants": {"a": {}}, "only": ["a", "a"]}, "compare.only: must differ, got 'a' twice"),
        ({"variants": {"a": {}}, "seeds": [1, 1]}, "compare.seeds: must differ, got 1 twice"),
        ({"variants": {"a": {}}, "seeds": []}, "must have variants and seeds"),
        ({"variants": {"a": {"data.kind": "parqet"}}}, "compare.variants.a.data.kind: .*did you mean 'parquet'"),
        (
            {"variants": {"a": {"pretrain.optim.tables": "none"}}},
            "compare.variants.a.pretrain.optim.tables: must be one of",
        ),
        ({"variants": {"a": {"model.hidden": ["x"]}}}, r"compare.variants.a.model.hidden\[0\]: must be int"),
    ):
        with pytest.raises(ValueError, match=message):
            check_variants(override(config, {"compare": changes}))


@pytest.mark.parametrize(("patience", "decay"), [(0, "plateau"), (4, "plateau"), (1, "linear")])
def test_patience_that_rates_can_fall_within_is_taken(patience, decay):
    optim = {"decay": decay, "decay_patience": 2}
    check_config(override(RunConfig(), {"pretrain": {"patience": patience, "optim": optim}}))


def test_threads_are_bounded():
    """FBGEMM's kernels end the process when they cannot start as many as they are told."""
    with pytest.raises(ValueError, match=r"num_threads: must be in \[1, 1024\], got 100000"):
        override(RunConfig(), {"num_threads": 100000})
