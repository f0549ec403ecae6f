from pathlib import Path

import pytest

from bert4rec.config import Config, load_config
from bert4rec.errors import InputError

pytestmark = pytest.mark.unit

CONFIGS = Path(__file__).parents[2] / "configs"


def test_defaults_are_those_of_the_documentation():
    config = load_config()
    assert (config.model.hidden_units, config.model.num_heads, config.model.num_layers, config.model.max_len) == (
        256,
        4,
        2,
        200,
    )
    assert (config.data.batch_size, config.data.min_interactions, config.data.holdout) == (512, 3, 1)
    assert (config.training.num_epochs, config.training.lr, config.monitor) == (500, 0.001, "val_ndcg@10")
    assert config.inference.formats == ("parquet", "csv")


@pytest.mark.parametrize(
    "text", ["20241126", "2024", "007", "1_000", "yes", "12:30", "1e3", "2024-11-26", "null1", "0x10"]
)
def test_text_stays_as_it_is_typed(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(
        f"run:\n  name: {text.replace(':', '-')}\ndata:\n  data_dir: {text}\n"
        f"  columns: {{user: {text}, item: {text}, time: null}}\ninference:\n  users: [{text}, 1]\n"
    )
    typed = [f"data.data_dir={text}", f"inference.users=[{text}, 1]", f"run.name={text.replace(':', '-')}"]
    for config in (
        load_config(str(file)),
        load_config(None, [*typed, f"data.columns={{user: {text}, item:{text}, time: null}}"]),
    ):
        assert config.data.data_dir == text
        assert config.run.name == text.replace(":", "-")
        assert config.inference.users == (text, "1")
        assert config.data.columns == {"user": text, "item": text, "time": None}


def test_one_value_is_a_list_of_one():
    overrides = ["inference.formats=parquet", "evaluation.protocols=all", "evaluation.baselines=ease"]
    overrides += ["inference.similar_to=007", "inference.users=12:30", "export.formats=onnx"]
    config = load_config(None, overrides)
    assert (config.inference.formats, config.export.formats) == (("parquet",), ("onnx",))
    assert (config.evaluation.protocols, config.evaluation.baselines) == (("all",), ("ease",))
    assert (config.inference.similar_to, config.inference.users) == (("007",), ("12:30",))


def test_nothing_and_other_types_are_what_yaml_says(tmp_path):
    overrides = ["run.name=null", "inference.output_path=", "model.share_embeddings=no", "training.lr=1e-3"]
    overrides += ["tune.space={training.lr: {choice: [0.1, 0.01]}}", "inference.users=null"]
    config = load_config(None, overrides)
    assert (config.run.name, config.inference.output_path, config.inference.users) == (None, None, None)
    assert (config.model.share_embeddings, config.training.lr) == (False, 0.001)
    assert config.tune.space == {"training.lr": {"choice": [0.1, 0.01]}}
    file = tmp_path / "c.yaml"
    file.write_text("tune:\n  space: {data.batch_size: {choice: [16, 32]}}\nrun: {name: ~}\n")
    assert load_config(str(file)).tune.space == {"data.batch_size": {"choice": [16, 32]}}
    assert load_config(str(file)).run.name is None


@pytest.mark.parametrize(
    ("typed", "delimiter"), [("tab", "\t"), (r"\t", "\t"), ("|", "|"), ("::", "::"), (r"\x01", "\x01"), (" ", " ")]
)
def test_delimiters(typed, delimiter):
    assert load_config(None, [f"data.delimiter={typed}"]).data.delimiter == delimiter


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model:\n  hidden_units: 64\n  num_heads: 2\ntraining: {lr: 0.01}\n")
    config = load_config(str(file), ["training.lr=1e-4", "inference.formats=[csv]", "run.name=2026-11-24"])
    assert config.model.hidden_units == 64
    assert config.training.lr == 1e-4
    assert config.inference.formats == ("csv",)
    assert config.run.name == "2026-11-24"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hiden_units=3", ["model.hiden_units", "does not exist", "model.hidden_units"]),
        ("modle.num_heads=3", ["modle", "does not exist", "model"]),
        ("model.num_heads=3", ["num_heads=3", "does not divide", "hidden_units=256"]),
        ("data.batch_size=0", ["data.batch_size=0", "greater than or equal to 1"]),
        ("training.lr=fast", ["training.lr='fast'", "number"]),
        ("training.monitor_metric=val_ndcg10", ["val_ndcg10", "did you mean val_ndcg@10"]),
        ("training.min_workers=2", ["min_workers=2 needs training.num_workers"]),
        ("data.min_interactions=1", ["min_interactions=1", "larger than data.holdout=1"]),
        ("hidden_units=64", ["'hidden_units=64'", "group.key=value"]),
        ("evaluation.protocols=[all, top-100]", ["evaluation.protocols.1='top-100'", "uniform-100"]),
        ("data.columns=user:userId", ["data.columns='user:userId'", "{user: NAME, item: NAME, time: NAME}"]),
        ("data.columns={usr: x}", ["data.columns.usr", "'user', 'item' or 'time'"]),
        ("data.header=false", ["data.header=false needs the numbers", "{user: 1, item: 2, time: 4}"]),
        ("data.delimiter=and", ["data.delimiter='and'", "such as , ; | :: or tab"]),
        ("data.delimiter=", ["data.delimiter=''", "at least 1 character"]),
        ("data.time_unit=hours", ["data.time_unit", "'ms'"]),
        ("data.split_time=1", ["data.split_time=1", "share below 1", "Unix time"]),
        ("max_len=50", ["group.key=value", "did you mean model.max_len?"]),
        ("run.name=a/b", ["run.name='a/b'", "pattern"]),
        ("run.name=..", ["run.name=.. is no name for a run"]),
        ("run.name=prepared", ["run.name=prepared is no name for a run"]),
    ],
)
def test_a_wrong_setting_is_one_clear_message(override, words):
    with pytest.raises(InputError) as error:
        load_config(None, [override])
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_no_more_workers_at_least_than_at_most():
    with pytest.raises(InputError, match=r"training\.min_workers=3 is larger than training\.num_workers=2"):
        load_config(None, ["training.min_workers=3", "training.num_workers=2"])


def test_rotary_positions_turn_pairs():
    settings = ["model.hidden_units=6", "model.num_heads=2"]
    load_config(None, settings)
    with pytest.raises(InputError, match=r"rotary needs an even width of each head, .* gives 3$"):
        load_config(None, [*settings, "model.position_encoding=rotary"])


@pytest.mark.parametrize(
    ("content", "words"),
    [("model: [1", "not valid YAML"), ("model: 3", "expected groups"), ("- 1", "expected groups")],
)
def test_a_wrong_file_is_one_clear_message(tmp_path, content, words):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match=words):
        load_config(str(file))
    with pytest.raises(InputError, match="no such config file"):
        load_config(str(tmp_path / "none.yaml"))


def test_full_data_is_judged_by_its_training_loss():
    assert load_config(None, ["data.use_full_data=true"]).monitor == "train_loss"


def test_prepared_path_depends_on_the_input_alone():
    path = load_config(None, ["data.data_dir=/d/x"]).prepared_path
    assert path == load_config(None, ["data.data_dir=/d/x", "model.max_len=7", "data.seed=3"]).prepared_path
    assert path != load_config(None, ["data.data_dir=/e/x"]).prepared_path
    assert path == load_config(None, ["data.data_dir=/d/x", "data.split_time=0.8"]).prepared_path
    others = ["data.data_file=b.csv", "data.min_item_interactions=5", "data.split=temporal", "data.split_time=0.8"]
    paths = [load_config(None, ["data.data_dir=/d/x", *others[place:]]).prepared_path for place in range(4)]
    assert len(set(paths)) == 4
    assert load_config(None, ["data.data_dir=/d/x", "data.split=temporal"]).prepared_path not in paths
    assert load_config(None, ["data.split=temporal", "data.min_interactions=1"]).data.min_interactions == 1


@pytest.mark.parametrize(
    ("name", "max_len", "dropout", "mask"),
    [("ml-1m", 200, 0.2, 0.4), ("ml-20m", 200, 0.2, 0.2), ("steam", 50, 0.5, 0.4), ("beauty", 50, 0.2, 0.6)],
)
def test_presets_are_the_papers_but_for_the_mask(name, max_len, dropout, mask):
    config = load_config(str(CONFIGS / f"{name}.yaml"))
    model = config.model
    assert (model.hidden_units, model.num_heads, model.num_layers) == (256, 4, 2)
    assert (model.max_len, model.dropout_rate, model.random_mask_prob) == (max_len, dropout, mask)
    assert (config.data.holdout, config.data.min_item_interactions) == (2, 5)
    assert config.data_name == name


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_loads(path):
    """And names the data that it is for."""
    assert path.stem.startswith(load_config(str(path)).data_name)


def test_every_key_is_described():
    for section in Config.model_fields.values():
        for name, field in section.annotation.model_fields.items():
            assert field.description, name
