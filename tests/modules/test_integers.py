"""Codes and low-bit rows are never averaged, blended or cast without a word."""

import copy
import logging

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from tests.cases import CONFIGS, IDS, NUM_ROWS, batch, fitted, fresh, table
from torchrec_compress import CompressedEmbeddingBagCollection, decompress
from torchrec_compress.methods import HashConfig, Int8Config, PQConfig

CODED = [config for config in CONFIGS if config.parts(table(), 0).codes is not None]
coded = pytest.mark.parametrize("config", CODED, ids=[IDS[CONFIGS.index(config)] for config in CODED])
TIERS = PQConfig(num_codes=2, codebook_size=32, num_hot_rows=70, popularity="count")  # of tests.cases
EVERY_ROW = batch([[number] for number in range(NUM_ROWS)])
CODES, FLAG, HOT = "code_tables.banks.item.codes", "code_tables.banks.item.is_set", "decoder.banks.item.hot_rows"
CHANGED = r"table 'item': codes and low-bit rows must be those that a fit or a checkpoint gave it, .*use_buffers=False"


def served(collection) -> torch.Tensor:
    return collection(EVERY_ROW).values().detach()


def averaged(config, **options) -> AveragedModel:
    """Return the average of one model over twenty steps in which nothing was trained."""
    model = fitted(config)
    ema = AveragedModel(model, **options)
    for _ in range(20):
        ema.update_parameters(model)
    return ema


def rounded(average, value, _):
    return average if value.is_floating_point() else torch.lerp(average.float(), value.float(), 0.1).round()


def truncated(average, value, _):
    return average * 0.9999 + value * 0.0001


@coded
def test_an_average_that_cuts_codes_off_is_refused(config):
    damaged = averaged(config, avg_fn=truncated, use_buffers=True)
    assert not torch.equal(
        damaged.module.code_tables.banks["item"].codes, fitted(config).code_tables.banks["item"].codes
    )
    for use in (served, lambda model: model.state_dict()):
        with pytest.raises(ValueError, match=CHANGED):
            use(damaged)
    with pytest.raises(ValueError, match=CHANGED):
        damaged.module.table_rows("item", torch.arange(3))


@pytest.mark.parametrize("functions", [{"multi_avg_fn": get_ema_multi_avg_fn(0.9999)}, {"avg_fn": get_ema_avg_fn(0.9)}])
def test_torchs_own_averages_serve_the_same_or_raise(functions):
    try:
        torch.testing.assert_close(served(averaged(TIERS, use_buffers=True, **functions)), served(fitted(TIERS)))
    except ValueError as error:
        assert "codes and low-bit rows" in str(error)


@coded
def test_an_average_that_leaves_codes_alone_passes(config):
    for options in ({"avg_fn": get_ema_avg_fn(0.9)}, {"avg_fn": rounded, "use_buffers": True}):
        torch.testing.assert_close(served(averaged(config, **options)), served(fitted(config)))


def test_averages_of_tables_without_integers_pass():
    ema = averaged(HashConfig(num_buckets=40), avg_fn=truncated, use_buffers=True)
    torch.testing.assert_close(served(ema), served(fitted(HashConfig(num_buckets=40))), rtol=1e-4, atol=1e-4)
    assert int(ema.state_dict()["module.decoder.format_version"]) == 1


def write(collection, name: str, how) -> None:
    tensor = dict(collection.named_buffers())[name]
    how(tensor, (tensor * 0.9).to(tensor.dtype))


WAYS = {
    "in place": lambda tensor, value: tensor.copy_(value),
    "detached": lambda tensor, value: tensor.detach().copy_(value),
    "data": lambda tensor, value: tensor.data.copy_(value),
    "other memory": lambda tensor, value: setattr(tensor, "data", value),
}


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", [CODES, HOT])
def test_any_way_to_write_shows_at_the_next_look_up(name, how):
    for is_warm in (False, True):
        collection = copy.deepcopy(fitted(TIERS))
        if is_warm:
            served(collection)
        write(collection, name, how)
        with pytest.raises(ValueError, match=CHANGED):
            served(collection)


def test_an_assigned_tensor_shows():
    collection = copy.deepcopy(fitted(TIERS))
    served(collection)
    bank = collection.code_tables.banks["item"]
    bank.codes = (bank.codes * 0.9).to(torch.uint8)
    with pytest.raises(ValueError, match=CHANGED):
        served(collection)


def test_every_table_is_looked_at_in_turn():
    """A write that torch does not count shows after as many look-ups as there are tables."""
    both = [table(name=name, feature_names=[name]) for name in ("a", "b", "c")]
    collection = CompressedEmbeddingBagCollection(both, compression=TIERS)
    features = batch([[1], [2], [3]], key="a")
    features = type(features)(["a", "b", "c"], features.values(), lengths=features.lengths())
    collection(features)
    codes = collection.code_tables.banks["b"].codes
    codes.data.copy_(codes.data // 2)
    with pytest.raises(ValueError, match="table 'b': codes and low-bit rows must be those"):
        for _ in range(3):
            collection(features)


def test_a_traced_collection_checks_as_well():
    model = torch.fx.symbolic_trace(fitted(TIERS))
    twin = copy.deepcopy(model)
    torch.testing.assert_close(served(twin), served(fitted(TIERS)))
    for average, value in zip(twin.buffers(), model.buffers(), strict=True):
        average.copy_(truncated(average, value, None))
    with pytest.raises(ValueError, match=CHANGED):
        served(twin)


@coded
def test_a_blended_state_dict_is_refused_at_once(config):
    collection, other = fresh(config, seed=3), fitted(config).state_dict()
    floats = {name: 0.9 * value + 0.1 * value for name, value in other.items()}
    with pytest.raises(ValueError, match=r"(is_set|codes): must be integers, got torch.float32, as a blend"):
        collection.load_state_dict(floats)
    for name in (CODES, HOT):
        if name not in other or other[name].is_floating_point():
            continue
        blend = {**other, name: (0.5 * other[name] + 0.5 * other[name].flip(0)).to(other[name].dtype)}
        with pytest.raises(ValueError, match=CHANGED):
            collection.load_state_dict(blend)
    collection.load_state_dict(other)
    torch.testing.assert_close(served(collection), served(fitted(config)))


@coded
@pytest.mark.parametrize(
    "cast",
    [lambda module: module.type(torch.float16), lambda module: module._apply(lambda tensor: tensor.double())],
    ids=["type", "apply"],
)
def test_a_cast_of_integers_is_refused(config, cast):
    collection = copy.deepcopy(fitted(config))
    for part in (collection, collection.code_tables, collection.decoder):
        with pytest.raises(ValueError, match=r"integers must keep their dtype, torch.*; use .half\(\)"):
            cast(part)
    with pytest.raises(ValueError, match="integers must keep their dtype"):
        cast(fresh(HashConfig(num_buckets=40)))  # whose decoder has labels
    assert torch.equal(served(collection.half().float().double().float()).isfinite(), served(fitted(config)).isfinite())


def test_a_load_table_marks_what_it_wrote_and_blesses_no_damage():
    collection, state = copy.deepcopy(fitted(TIERS)), fitted(TIERS)
    from torchrec_compress.methods import TableState

    codes = state.code_tables.banks["item"].codes.flip(0)
    hot = state.decoder.banks["item"].hot_rows.flip(0)
    collection.load_table("item", TableState(codes=codes, decoder={"hot_rows": hot}))
    served(collection)
    collection.load_table("item", TableState(decoder={"hot_rows": hot.flip(0)}))
    assert not torch.equal(served(collection), served(state))
    write(collection, CODES, WAYS["in place"])
    with pytest.raises(ValueError, match=CHANGED):
        collection.load_table("item", TableState(decoder={"hot_rows": hot}))


def as_before(config) -> dict:
    """Return the state dict that an earlier version wrote: a flag of one byte, no checksum."""
    return {**copy.deepcopy(fitted(config).state_dict()), FLAG: torch.ones(1, dtype=torch.uint8)}


@pytest.mark.parametrize("config", [TIERS, Int8Config()])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_an_earlier_version_loads_and_is_marked(config, assign, caplog):
    collection = fresh(config, seed=3)
    collection.load_state_dict(as_before(config), assign=assign)
    assert "tables ['item']: the state dict, of an earlier version, has no checksum of their codes" in caplog.text
    assert torch.equal(collection.state_dict()[FLAG], fitted(config).state_dict()[FLAG])
    assert torch.equal(served(collection), served(fitted(config)))
    write(collection, CODES, WAYS["in place"])
    with pytest.raises(ValueError, match=CHANGED):
        served(collection)


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize("old", [False, True])
def test_a_distributed_checkpoint_is_loaded_in_place(old, tmp_path, caplog):
    dcp.save(as_before(TIERS) if old else fitted(TIERS).state_dict(), checkpoint_id=tmp_path, no_dist=True)
    collection = fresh(TIERS, seed=3)
    dcp.load(collection.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(served(collection), served(fitted(TIERS)))
    assert "never fitted" not in caplog.text
    assert torch.equal(collection.state_dict()[FLAG], fitted(TIERS).state_dict()[FLAG])


def test_rows_of_start_codes_are_said_once_whichever_way_they_are_read(caplog):
    """By `table_rows` first, which `decompress` and a look-up then need not say again."""
    for config in CODED:
        caplog.clear()
        collection = fresh(config)
        collection.table_rows("item", torch.tensor([3]))
        collection.table_rows("item", torch.tensor([4]))
        decompress(collection)
        served(collection)
        found = [record for record in caplog.records if "tables ['item'] were never fitted" in record.message]
        assert len(found) == (config.needs != "nothing"), config
        collection.reset_parameters()
        caplog.clear()
        collection.table_rows("item", torch.tensor([3]))
        assert ("never fitted" in caplog.text) == (config.needs != "nothing")
        caplog.clear()
        fitted(config).table_rows("item", torch.tensor([3]))
        assert not caplog.records


def test_start_codes_are_said_once_for_methods_that_need_a_fit(caplog):
    caplog.set_level(logging.INFO)
    for config in CODED:
        caplog.clear()
        collection = fresh(config)
        assert not caplog.records
        served(collection)
        served(collection)
        found = [record for record in caplog.records if "tables ['item'] were never fitted" in record.message]
        assert len(found) == (config.needs != "nothing"), config
        assert all(record.levelname == "WARNING" for record in found)
        caplog.clear()
        served(copy.deepcopy(fitted(config)))
        loaded = fresh(config)
        loaded.load_state_dict(fresh(config).state_dict())
        served(loaded)
        assert "never fitted" not in caplog.text
        loaded.reset_parameters()
        loaded.to("cpu")
        served(loaded)
        assert ("never fitted" in caplog.text) == (config.needs != "nothing")
