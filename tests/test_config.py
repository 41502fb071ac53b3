import dataclasses
import json

import pytest
from ml_collections import ConfigDict

from moon_jax import config as config_lib
from moon_jax.errors import UserError, printable
from tests.conftest import ROOT, overrides, tiny


def test_there_are_fewer_than_120_options_each_with_one_line_of_doc():
    assert len(config_lib.leaves(config_lib.Config())) < 120

    def check(part):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if dataclasses.is_dataclass(value):
                check(value)
            else:
                assert 5 < len(field.metadata["doc"]) < 100, field.name

    check(config_lib.Config())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_shipped_configs_hold_only_differences(path):
    # `load` rejects unknown keys and values that equal the default.
    assert config_lib.load(path.stem) != config_lib.Config()


def test_a_value_that_equals_the_default_is_refused():
    with pytest.raises(UserError, match=r"config.experts.count: 8 is the default already"):
        config_lib.resolve(ConfigDict({"experts": {"count": 8}}))


def test_the_error_for_an_unknown_key_names_the_closest():
    with pytest.raises(UserError, match=r"config.experts.cuont: no such option; the closest is config.experts.count"):
        config_lib.override(config_lib.Config(), ["--config.experts.cuont=4"])


@pytest.mark.parametrize(("old", "new"), config_lib.RENAMED.items())
def test_a_renamed_option_names_the_new_one(old, new):
    leaves = config_lib.leaves(config_lib.Config())
    assert new in leaves and old not in leaves
    with pytest.raises(UserError, match=f"config.{old}: this option is now called config.{new}"):
        config_lib.override(config_lib.Config(), [f"--config.{old}=1"])


def test_a_saved_config_with_former_names_is_read(tmp_path):
    """Workdirs and exported folders of earlier versions stay readable."""
    config = config_lib.replace(config_lib.Config(), {"data.flip": 0.25, "training.learning_rate_factors": ("a=0",)})
    nested = json.loads(config_lib.to_json(config))
    for old, new in config_lib.RENAMED.items():
        (group, name), (old_group, old_name) = new.split("."), old.split(".")
        nested[old_group][old_name] = nested[group].pop(name)
    nested["objective"]["weighting"] = "balanced"  # this mode is gone
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert config_lib.read_json(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.experts.count='many'", "config.experts.count: 'many' is not a whole number"),
        ("--config.data.crop=3", "config.data.crop: 3 is not a tuple of such values"),
        ("--verbose", "--verbose: not understood"),
        ("--config.experts.per_token=9", "experts.per_token must lie between"),
        ("--config.experts.dispatch=alltoall", "experts.dispatch must be grouped, expert_parallel or dense"),
        ("--config.experts.router_term=soft", "experts.router_term must be none, learned, hard, token or token_hard"),
        ("--config.training.remat=some", "training.remat must be full, selective or none"),
        ("--config.objective.similar_margin=5", "objective.similar_margin must lie below 2"),
        ("--config.experts.capacity=-1.0", "config.experts.capacity: -1.0 is below 0"),
        ("--config.language.kv_heads=3", "language.heads must be a multiple"),
        ("--config.data.crop=(0.7,)", "config.data.crop: (0.7,) is not a tuple"),
        ("--config.data.crop=(0.7,2.0)", "data.crop must be two shares"),
        ("--config.training.log_every=0", "config.training.log_every: 0 is below 1"),
        ("--config.experts.every=0", "config.experts.every: 0 is below 1"),
        ("--config.objective.temperature=(0.0,0.1)", "objective.temperature must be positive"),
        ("--config.training.dtype='float17'", "must be float32 or bfloat16"),
        ("--config.vision.deepstack=(5,99,100)", "vision.deepstack must rise"),
    ],
)
def test_a_wrong_value_is_reported_in_one_line(argument, message):
    with pytest.raises(UserError) as error:
        config_lib.override(config_lib.Config(), [argument])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hard_router_term_needs_enough_experts_per_view():
    def hard(**values):
        values = {"router_term": "hard"} | values
        return config_lib.replace(config_lib.Config(), {f"experts.{name}": value for name, value in values.items()})

    assert hard(count=9, per_token=3).experts.per_token == 3
    for values in (dict(count=8, per_token=3), dict(count=2, per_token=1)):
        with pytest.raises(UserError, match=r"router_term: hard divides \d experts among three views"):
            hard(**values)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("syntax.py", b"def get_config(:"),
        ("nothing.py", b""),
        ("none.py", b"def get_config():\n    return None"),
        ("bytes.json", b"\xff\xfe"),
        ("list.json", b"[1]"),
    ],
)
def test_an_unreadable_config_is_reported_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as error:
        config_lib.load(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[31mb\rc 红 é") == "a�[31mb�c 红 é"


def test_command_line_and_json_give_the_same_config(tmp_path):
    config, path = tiny(), tmp_path / "config.json"
    path.write_text(config_lib.to_json(config))
    assert config_lib.override(config_lib.Config(), overrides(config)) == config
    assert config_lib.read_json(path) == config


def test_warmup():
    steps = lambda **options: config_lib.warmup_steps(config_lib.Training(**options))  # noqa: E731
    assert steps(steps=22500) == 675  # 3%
    assert steps(steps=1000) == 100  # min_warmup
    assert steps(steps=20) == 10  # never more than half
