"""`torchrec-compress plan`, run in this process."""

import json
import logging
from pathlib import Path

import pytest

from torchrec_compress.cli import main, parse_plan
from torchrec_compress.dry_run.config import PlanConfig, TableSpec, rank_batch_size
from torchrec_compress.dry_run.plan import make_tables, plan

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = """
tables:
  user: {num_embeddings: 500000000, feature_names: [u, u2], pooling_factor: 3}
  item: {num_embeddings: 20000000, embedding_dim: 32, sharding_types: [column_wise], pooling: mean}
  hour: {num_embeddings: 24}
compression: {"*": {method: mec, num_codes: 8}, item: {method: int8}}
hbm: 8GB
"""


@pytest.fixture
def small(tmp_path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return str(path)


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert "torchrec-compress: error: " in text
    return text


def test_the_command_of_the_readme(tmp_path, capsys):
    config = str(CONFIGS / "plan_criteo_1tb.yaml")
    main(["plan", config, "--world-size", "64", "--local-world-size", "8", "--hbm", "80GB", "--output", str(tmp_path)])
    text = capsys.readouterr().out
    assert "cat_20 " in text and "most of 64" in text and "204,184,588" in text
    found = json.loads((tmp_path / "plan.json").read_text())
    assert len(found["ranks"]) == 64 and len(found["tables"]) == 26
    assert found["dense_bytes"] == 204_184_588 * 128 * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.md", "plan.png"]


def test_keys_of_file_and_command_line(small):
    config = parse_plan([small, "--world-size=16", "--local_world_size", "4", "--device", "cpu"])
    assert (config.world_size, config.local_world_size, config.device, config.hbm) == (16, 4, "cpu", "8GB")
    assert config.tables["user"] == TableSpec(500_000_000, feature_names=["u", "u2"], pooling_factor=3)
    user, item, hour = make_tables(config)
    assert (user.embedding_dim, item.embedding_dim, item.pooling.name, hour.feature_names) == (
        128,
        32,
        "MEAN",
        ["hour"],
    )


def test_constraints_and_pooling_reach_the_parts(small, caplog):
    with caplog.at_level(logging.WARNING):
        report = plan(parse_plan([small]))
    assert report.tables["item"].parts[0].sharding_type == "row_wise"
    assert "table 'item', code table 'embeddings.code_tables' cannot be sharded column_wise" in caplog.text
    codebooks, codes = (
        next(part for part in report.tables["user"].parts if part.kind == kind) for kind in ("decoder", "codes")
    )
    ids = 4096 * 3 * 2  # of both features
    assert codes.activation_bytes == 8 * ids * (8 + 8)
    assert codebooks.activation_bytes == 8 * 2 * 4096 * 128 * 4


@pytest.mark.parametrize("unpooled", [False, True])
def test_without_compression_the_tables_are_planned_as_they_are(unpooled):
    config = PlanConfig(tables={"user": TableSpec(10**6)}, unpooled=unpooled, optimizer="adam", world_size=2)
    table = plan(config).tables["user"]
    assert (table.method, table.ratio) == ("dense", 1.0)
    assert table.optimizer_bytes == 2 * 10**6 * 128 * 4


def test_a_training_config_that_states_its_sizes():
    demo = parse_plan([str(CONFIGS / "demo.yaml"), "--world-size", "2"])
    assert demo.tables["user"].num_embeddings == 120_000 and list(demo.tables)[2:] == ["hour", "device", "region"]
    criteo = parse_plan([str(CONFIGS / "criteo_kaggle_dlrm.yaml"), "--world-size", "2", "--hbm", "1GB"])
    assert len(criteo.tables) == 26 and criteo.tables["cat_25"].num_embeddings == 142_574
    assert (criteo.embedding_dim, rank_batch_size(criteo), criteo.optimizer, criteo.dense_optimizer, criteo.hbm) == (
        16,
        4096,
        "adagrad",
        "adam",
        "1GB",
    )
    kinds = {part.sharding_type for table in plan(criteo).tables.values() for part in table.parts}
    assert kinds and "data_parallel" not in kinds  # as in training


@pytest.mark.parametrize("name", ["criteo_1tb_dcnv2", "criteo_1tb_dcnv2_mec", "criteo_1tb_dcnv2_memcom"])
def test_the_large_training_configs_state_pooling_and_global_batches(name):
    config = parse_plan([str(CONFIGS / f"{name}.yaml"), "--world-size", "64", "--local-world-size", "8"])
    assert sum(table.pooling_factor for table in config.tables.values()) == 214
    assert config.tables["cat_20"].num_embeddings == 40_000_000 and rank_batch_size(config) == 1024
    assert (config.optimizer, config.dense_optimizer) == ("adagrad", "adagrad")
    report = plan(config)
    assert report.dense_bytes == 204_184_588 * 128 * 4
    assert (report.ratio > 30) == bool(config.compression) and len(report.ranks) == 64
    like = parse_plan([str(CONFIGS / "criteo_like.yaml")])
    assert like.tables["cat_20"].num_embeddings == 5000 and like.tables["cat_20"].pooling_factor == 1


def test_batch_sizes():
    assert rank_batch_size(PlanConfig()) == 4096 == rank_batch_size(PlanConfig(batch_size=4096, global_batch_size=8))
    assert rank_batch_size(PlanConfig(global_batch_size=10, world_size=4)) == 3
    with pytest.raises(ValueError, match="batch_size: must be positive"):
        rank_batch_size(PlanConfig(batch_size=0))


def test_what_cannot_be_planned_is_one_clear_error(small, capsys, tmp_path):
    assert "data.vocab: must give the rows of every table" in refused(capsys, str(CONFIGS / "frappe_x1.yaml"))
    assert "tables: must name at least one table" in refused(capsys)
    assert "no such config file" in refused(capsys, "none.yaml")
    assert "did you mean 'world_size'?" in refused(capsys, small, "--wrld-size", "3")
    assert "hbm: must be a size such as '80GB'" in refused(capsys, small, "--hbm", "much")
    for key, amount in (("hbm", "infGB"), ("dense-net", "infGB"), ("ddr", "4_0GB"), ("hbm", "٤GB"), ("hbm", "40")):
        where = key.replace("-", "_")
        assert f"{where}: must be a size such as '80GB'" in refused(capsys, small, f"--{key}", amount)
    assert "hbm: must be below 2**63 bytes" in refused(capsys, small, "--hbm", "9" * 400 + "GB")
    assert "world_size: must be a multiple of local_world_size" in refused(
        capsys, small, "--world-size", "12", "--local-world-size", "8"
    )
    assert "reserved: must be in [0, 1)" in refused(capsys, small, "--reserved", "1")
    assert "dense_net: must leave memory" in refused(capsys, small, "--dense-net", "9GB")
    (tmp_path / "bad.yaml").write_text("tables: {user: {num_embeddings: 7, embedding_dim: 6}}")
    assert "tables.user: num_embeddings must be positive" in refused(capsys, str(tmp_path / "bad.yaml"))
    (tmp_path / "bad.yaml").write_text("tables: {user: {num_embeddings: 7, pooling_factor: -1}}")
    assert "bad.yaml: tables.user.pooling_factor: must be at least 0, got -1" in refused(
        capsys, str(tmp_path / "bad.yaml")
    )
    (tmp_path / "bad.yaml").write_text("tables: {user: {num_embeddings: 7, sharding_types: [rowwise]}}")
    assert "did you mean 'row_wise'?" in refused(capsys, str(tmp_path / "bad.yaml"))
    (tmp_path / "budget.yaml").write_text("model: {name: dlrm}\ncompression: {budget_ratio: 10}")
    assert "must name the methods to be planned, got a budget" in refused(capsys, str(tmp_path / "budget.yaml"))


def test_tables_that_do_not_fit_come_with_a_line_to_paste(small, capsys):
    text = refused(capsys, small, "--hbm", "512MB")
    assert "bytes) a rank are missing. Too large: 'user'" in text and "TorchRec says" not in text
    line = text.partition("YAML, under compression:  ")[2].partition("\n")[0]
    merged = {**json.loads(line), "*": {"method": "mec", "num_codes": 8}, "item": {"method": "int8"}}
    main(["plan", small, "--hbm", "512MB", "--compression", json.dumps(merged)])
    assert "this plan:" in capsys.readouterr().out


def test_memory_of_the_host_counts_on_a_cpu(small):
    report = plan(parse_plan([small, "--device", "cpu", "--ddr", "64GB", "--dense-net", "1GB", "--reserved", "0.5"]))
    decoded = report.tables["item"].decoded_bytes // 8
    assert {rank.capacity_bytes for rank in report.ranks} == {31 * 2**30 - decoded}


def test_logging_is_left_as_it_was(small):
    before = [logging.getLogger(name).level for name in ("", "torchrec", "torchrec_compress")]
    main(["plan", small])
    assert before == [logging.getLogger(name).level for name in ("", "torchrec", "torchrec_compress")]
