import dataclasses
import json
import math
import warnings

import hypothesis
import pytest
from hypothesis import strategies as st

from jedi_jax import config as config_lib
from jedi_jax.config import PRESETS, TAGS, VARIANTS, Config, make_config, override
from jedi_jax.errors import UserError

SETTINGS = dict(config_lib.settings(Config))
ENVS = ("catch", "atari/Breakout", "atari/MsPacman")


def get(config, path):
  for name in path.split("."):
    config = getattr(config, name)
  return config


def refused(values, *parts):
  """Asserts that the settings are refused by one line that holds the parts; returns the line."""
  with pytest.raises(UserError) as caught:
    override(Config(), values)
  message = str(caught.value)
  assert "\n" not in message
  for part in parts:
    assert part in message
  return message


def test_every_setting_has_a_known_tag_and_a_sentence():
  assert len(SETTINGS) > 80
  descriptions = config_lib.descriptions(Config)
  assert list(descriptions) == list(SETTINGS)
  for path, field in SETTINGS.items():
    assert field.metadata["tag"] in TAGS, path
    assert descriptions[path].endswith((".", ")")), path
    assert descriptions[path][0].isalnum() or descriptions[path][0] == "'", path


def test_descriptions_are_the_strings_below_the_fields():
  descriptions = config_lib.descriptions(Config)
  assert descriptions["actor_critic.horizon"] == "Imagined steps H."
  assert descriptions["denoiser.optimizer.epsilon"] == descriptions["probe.optimizer.epsilon"]
  assert descriptions["encoder.chunk"].startswith("Frames encoded at a time; their activations are recomputed")
  assert "  " not in descriptions["encoder.chunk"]


def test_presets_only_name_settings():
  for values in (*PRESETS.values(), *VARIANTS.values(), *config_lib.VARIANT_PRESETS.values()):
    assert set(values) <= set(SETTINGS)


def test_variants_are_settings():
  routes = {name: make_config(variant=name).encoder.learns_from for name in VARIANTS}
  assert routes == {
    "jedi": ("prediction", "reward_end"),
    "diamond": (),
    "autoencoder": ("reconstruction",),
    "mse": ("prediction", "reward_end"),
    "no_diffusion_gradient": ("reward_end",),
    "decoder_gradient": ("prediction", "reward_end", "reconstruction"),
  }
  assert {name for name in VARIANTS if make_config(variant=name).encoder.kind == "identity"} == {"diamond"}
  assert {name for name in VARIANTS if make_config(variant=name).denoiser.kind == "regression"} == {"mse"}
  assert config_lib.VARIANT_SUMMARIES.keys() == VARIANTS.keys()
  # Composed from settings, a variant has the same model under another name.
  composed = make_config(overrides=["denoiser.kind=regression"])
  assert override(composed, {"variant": "mse"}) == make_config(variant="mse")


@pytest.mark.parametrize("name", ["variant", "preset"])
def test_names_that_determine_other_settings_are_no_overrides(name):
  for overrides in ([f"{name}=debug"], {name: "jedi"}):
    with pytest.raises(UserError, match=f"{name} determines other settings"):
      make_config(overrides=overrides)


def test_a_preset_may_choose_the_environment():
  assert make_config(preset="catch").env.name == "catch"
  assert make_config(preset="small").env.name == make_config().env.name == "atari/Breakout"


@pytest.mark.parametrize("env", ENVS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_presets_are_valid_and_take_effect(env, preset, variant):
  config = make_config(env=env, preset=preset, variant=variant, seed=5)
  assert (config.env.name, config.preset, config.variant, config.seed) == (env, preset, variant, 5)
  changed = {**PRESETS[preset], **VARIANTS[variant], **config_lib.VARIANT_PRESETS.get((variant, preset), {})}
  changed.pop("env.name", None)  # The one that is given counts.
  for path, value in changed.items():
    assert get(config, path) == value
  named = {"env.name", "preset", "variant", "seed"}
  for path in SETTINGS.keys() - changed.keys() - named:
    assert get(config, path) == get(Config(), path)


@pytest.mark.parametrize("preset", PRESETS)
def test_json_round_trip(preset):
  config = make_config(env="catch", preset=preset)
  assert config.sampler.churn_max == math.inf
  text = json.dumps(config_lib.to_dict(config), allow_nan=False)
  assert config_lib.from_dict(json.loads(text)) == config


def test_defaults_are_the_paper():
  assert make_config() == Config()


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("actor_critic.horizon=10", 10),
    ("actor_critic.horizon= 1_0 ", 10),
    ("denoiser.sigma_log_mean=-1", -1.0),
    ("denoiser.optimizer.learning_rate=1e-3", 1e-3),
    ("sampler.churn_max=inf", math.inf),
    ("env.life_loss_ends=false", False),
    ("env.life_loss_ends=True", True),
    ("encoder.downsample=true,true,false,false", (True, True, False, False)),
    ("encoder.channels=(8,8,8,8)", (8, 8, 8, 8)),
    ("encoder.channels=8,8,8,8", (8, 8, 8, 8)),
    ("encoder.channels=[8, 8, 8, 8]", (8, 8, 8, 8)),
    ("denoiser.channels=(8,)", (8,)),
    ("denoiser.channels=8", (8,)),
    ("actor_critic.channels=()", ()),
    ("replay.age_weights=0.5,0.5", (0.5, 0.5)),
    ("encoder.learns_from=prediction, reconstruction", ("prediction", "reconstruction")),
    ("encoder.learns_from=reward_end", ("reward_end",)),
    ("denoiser.switching=alternate", "alternate"),
    ("env.name=catch", "catch"),
  ],
)
def test_texts_are_parsed_as_the_field(text, value):
  config = make_config(overrides=[text])
  found = get(config, text.partition("=")[0])
  assert found == value
  assert type(found) is type(value)
  if isinstance(value, tuple):
    assert [type(x) for x in found] == [type(x) for x in value]


def test_texts_as_json_and_as_python_agree():
  assert override(Config(), {"encoder.channels": [8, 8, 8, 8]}) == override(Config(), {"encoder.channels": "8,8,8,8"})
  assert override(Config(), {"denoiser.sigma_log_mean": 1}).denoiser.sigma_log_mean == 1.0
  assert type(override(Config(), {"denoiser.sigma_log_mean": 1}).denoiser.sigma_log_mean) is float


@pytest.mark.parametrize(
  ("path", "value"),
  [
    ("actor_critic.horizon", "1.5"),
    ("actor_critic.horizon", 1.0),
    ("actor_critic.horizon", True),
    ("actor_critic.horizon", ""),
    ("actor_critic.horizon", "1;2"),
    ("actor_critic.horizon", "__import__('os')"),
    ("actor_critic.horizon", "9" * 5000),
    ("actor_critic.horizon", "\x00"),
    ("actor_critic.horizon", "1\n2"),
    ("actor_critic.horizon", None),
    ("env.life_loss_ends", "yes"),
    ("env.life_loss_ends", "1"),
    ("env.life_loss_ends", 3),
    ("env.life_loss_ends", 1),
    ("actor_critic.gamma", "abc"),
    ("actor_critic.gamma", "0.9 0.8"),
    ("actor_critic.gamma", True),
    ("actor_critic.gamma", "nan"),
    ("actor_critic.gamma", math.nan),
    ("encoder.clamp", "inf"),
    ("encoder.clamp", math.inf),
    ("denoiser.sigma_log_mean", "-inf"),
    ("encoder.channels", "8,8.5,8,8"),
    ("encoder.channels", (8, 8, 8, True)),
    ("encoder.channels", 8),
    ("encoder.downsample", "true,maybe,true,true"),
    ("replay.age_weights", "0.5,nan"),
    ("env.name", 3),
    ("denoiser.switching", "sometimes"),
    ("encoder.learns_from", "prediction,value"),
    ("encoder.learns_from", ("prediction", 3)),
    ("encoder.learns_from", 3),
  ],
)
def test_wrong_values_are_refused(path, value):
  refused({path: value}, path)


@pytest.mark.parametrize("path", SETTINGS)
def test_bounds_are_enforced(path):
  metadata, default = SETTINGS[path].metadata, get(Config(), path)
  whole = isinstance(default[0] if isinstance(default, tuple) and default else default, int) or default == ()
  outside = []
  if metadata["low"] is not None:
    outside.append(metadata["low"] - (1 if whole else 1e-6))
  if metadata["above"] is not None:
    outside += [metadata["above"], metadata["above"] - (1 if whole else 1e-6)]
  if metadata["high"] is not None:
    outside.append(metadata["high"] + (1 if whole else 1e-6))
  for value in outside:
    kind = type(default)
    refused({path: (value,) if kind is tuple else kind(value)}, path)
  if metadata["choices"] is not None:
    refused({path: "nonsense"}, path, *metadata["choices"])
    for choice in metadata["choices"]:
      value = (choice,) if isinstance(default, tuple) else choice
      others = {"encoder.learns_from": ()} if choice == "identity" else {}
      assert get(override(Config(), {path: value, **others}), path) == value


@pytest.mark.parametrize(
  ("values", "parts"),
  [
    ({"encoder.channels": (8, 8)}, ["encoder.channels", "encoder.downsample", "2", "4"]),
    ({"denoiser.depths": (1, 1)}, ["denoiser.depths", "denoiser.channels"]),
    ({"denoiser.attention": ()}, ["denoiser.attention", "denoiser.channels"]),
    ({"reward_end.depths": (2,)}, ["reward_end.depths", "reward_end.channels"]),
    ({"reward_end.attention": (True,)}, ["reward_end.attention", "reward_end.channels"]),
    ({"actor_critic.channels": (8,)}, ["actor_critic.channels", "actor_critic.downsample"]),
    ({"encoder.channels": (), "encoder.downsample": ()}, ["encoder.channels", "empty"]),
    ({"replay.age_weights": ()}, ["replay.age_weights"]),
    ({"replay.age_weights": (0.5, 0.4)}, ["replay.age_weights"]),
    ({"encoder.channels": (97, 32, 32, 16)}, ["encoder.channels", "97", "multiple of 32"]),
    ({"denoiser.channels": (12,)}, ["denoiser.channels", "12", "multiple of 8"]),
    ({"denoiser.channels": (56,)}, ["denoiser.channels", "56", "112", "multiples of 32"]),
    (
      {"denoiser.channels": (40, 64), "denoiser.depths": (1, 1), "denoiser.attention": (False, False)},
      ["denoiser.channels", "40", "64", "104", "multiples of 32"],
    ),
    ({"encoder.learns_from": ()}, ["encoder.learns_from", "at least one", "encoder.kind=identity"]),
    ({"encoder.kind": "identity"}, ["encoder.kind=identity", "set encoder.learns_from=()"]),
    (
      {"encoder.learns_from": ("reward_end", "prediction")},
      ["encoder.learns_from=reward_end,prediction", "write prediction,reward_end"],
    ),
    ({"encoder.learns_from": ("prediction", "prediction")}, ["encoder.learns_from", "write prediction"]),
    ({"denoiser.conditioning_width": 255}, ["denoiser.conditioning_width"]),
    ({"denoiser.conditioning_width": 9, "denoiser.conditioning_frames": 3}, ["denoiser.conditioning_width", "even"]),
    ({"collect.first_epoch_max_steps": 200_000}, ["collect.first_epoch_max_steps", "collect.total_steps"]),
    ({"env.num_envs": 3}, ["env.num_envs", "collect."]),
    ({"replay.capacity": 2, "replay.final_frames": 0}, ["replay.capacity", "19"]),
    (
      {"actor_critic.horizon": 10_000, "replay.capacity": 2, "replay.final_frames": 0},
      ["replay.capacity", "actor_critic.horizon", "10004"],
    ),
  ],
)
def test_settings_that_do_not_fit_one_another_are_refused(values, parts):
  refused(values, *parts)


@pytest.mark.parametrize(
  ("values", "paths"),
  [
    ({"denoiser.sigma_min": 50.0}, ["denoiser.sigma_min", "denoiser.sigma_max"]),
    ({"sampler.sigma_min": 50.0}, ["sampler.sigma_min", "sampler.sigma_max"]),
    ({"sampler.churn_min": 2.0, "sampler.churn_max": 1.0}, ["sampler.churn_min", "sampler.churn_max"]),
    ({"collect.first_epoch_min_steps": 20_000}, ["collect.first_epoch_min_steps", "collect.first_epoch_max_steps"]),
  ],
)
def test_a_minimum_above_its_maximum_names_both_settings(values, paths):
  refused(values, *paths)


def test_every_integer_has_an_upper_bound():
  """Sizes beyond any device overflow somewhere, and numbers of steps are stored as 32 bits."""
  for path, field in SETTINGS.items():
    if field.type in (int, tuple[int, ...]):
      assert field.metadata["high"] is not None, path
      assert field.metadata["high"] < 2**31, path


@pytest.mark.parametrize(
  ("path", "value", "part"),
  [
    ("denoiser.sigma_data", 1e300, "infinite in float32"),
    ("denoiser.sigma_log_mean", -1e39, "infinite in float32"),
    ("denoiser.optimizer.epsilon", 1e-300, "must exceed 0"),
    ("sampler.rho", 5e-30, "at least 0.1"),
    ("sampler.sigma_max", 1e30, "at most"),
    ("actor_critic.channels", (8,) * 33, "at most 32"),
  ],
)
def test_what_float32_and_the_tracer_cannot_hold_is_refused(path, value, part):
  refused({path: value}, path, part)


def test_unknown_names_suggest_the_nearest():
  assert "actor_critic.horizon" in refused({"actor_critic.horizn": 3}, "actor_critic.horizn", "nearest")
  refused({"actor_critic": 3}, "'actor_critic'")
  refused({"": 3}, "''")
  with pytest.raises(UserError, match="unknown preset 'papr'; nearest: paper"):
    make_config(preset="papr")
  with pytest.raises(UserError, match="unknown variant 'jedy'; nearest: jedi"):
    make_config(variant="jedy")
  with pytest.raises(UserError, match="unknown environment 'atari/Brekout'; nearest: atari/Breakout"):
    make_config(env="atari/Brekout")


@pytest.mark.parametrize("text", ["actor_critic.horizon", "=3", ""])
def test_overrides_need_a_path_and_a_value(text):
  with pytest.raises(UserError, match="path=value"):
    make_config(overrides=[text])


def test_the_last_override_wins_over_the_preset():
  config = make_config(preset="debug", overrides=["actor_critic.horizon=7", "actor_critic.horizon=9"])
  assert config.actor_critic.horizon == 9
  assert config.training.batch_size == PRESETS["debug"]["training.batch_size"]


def test_differences_name_old_and_new():
  old = make_config(preset="debug")
  new = override(old, {"actor_critic.horizon": 9, "encoder.clamp": 0.0})
  assert config_lib.differences(old, old) == []
  assert config_lib.differences(old, new) == ["encoder.clamp: 3.0 -> 0.0", "actor_critic.horizon: 4 -> 9"]


def test_describe_lists_every_setting_and_marks_the_changed():
  lines = config_lib.describe(make_config(env="catch", preset="debug")).splitlines()
  rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
  assert all(len(row) == 4 for row in rows)
  listed = {path.strip("`"): (value, tag) for path, value, tag, _ in rows}
  assert list(listed) == list(SETTINGS)
  assert listed["env.name"] == ('**"catch"**', "O")
  assert listed["actor_critic.horizon"] == ("**4**", "R")
  assert listed["actor_critic.gamma"] == ("0.985", "R")
  assert listed["denoiser.optimizer.max_grad_norm"] == ("1.0", "D")


def test_a_configuration_is_frozen_and_validated_however_it_is_made():
  with pytest.raises(dataclasses.FrozenInstanceError):
    Config().seed = 3
  with pytest.raises(UserError, match="seed"):
    Config(seed=-1)
  with pytest.raises(UserError, match=r"encoder\.clamp"):
    Config(encoder=config_lib.EncoderConfig(clamp=math.nan))


@pytest.mark.parametrize(
  "changes",
  [
    {"seed": "5"},
    {"encoder": config_lib.EncoderConfig(clamp="3.0")},
    {"encoder": config_lib.EncoderConfig(channels=[32, 32, 32, 16])},
  ],
)
def test_a_configuration_holds_values_of_the_declared_types(changes):
  with pytest.raises(UserError, match="declared type"):
    Config(**changes)


def test_an_integer_too_large_for_a_float_is_refused():
  refused({"denoiser.sigma_max": 10**400}, "denoiser.sigma_max")


def test_a_wrong_integer_is_one_line_on_standard_error():
  with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    refused({"actor_critic.horizon": "1and"}, "actor_critic.horizon")
  assert not seen


def test_the_name_of_the_preset_cannot_be_made_up():
  refused({"preset": "nonsense"}, "preset")


def attempt(make):
  """The configuration and None, or None and the error's message; any other exception is the test's failure."""
  try:
    return make(), None
  except UserError as error:
    return None, str(error)


scalars = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-(2**70), 2**70),
  st.integers(-2, 100),
  st.floats(),
  st.floats(0, 1),
  st.text(max_size=12),
  st.sampled_from(["true", "1e-3", "(8,8)", "nan", "-inf", "[]", "0x10", "1_0", "catch", "random", "lax", "()", "{}"]),
)
anything = scalars | st.lists(scalars, max_size=5) | st.lists(scalars, max_size=5).map(tuple)


@hypothesis.given(
  st.sampled_from(["paper", "debug"]),
  st.dictionaries(st.sampled_from(sorted(SETTINGS)), anything, min_size=1, max_size=3),
)
@hypothesis.settings(max_examples=250, deadline=None, database=None)
def test_any_value_gives_a_configuration_or_a_user_error(preset, values):
  base = make_config(env="catch", preset=preset)
  config, message = attempt(lambda: override(base, values))
  if config is None:
    assert len(message.splitlines()) == 1
    return
  hash(config)
  for path, field in SETTINGS.items():
    value = get(config, path)
    assert type(value) is (field.type if isinstance(field.type, type) and value != () else type(value))
  for path in SETTINGS.keys() - values.keys():
    assert get(config, path) == get(base, path)
  assert config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(config), allow_nan=False))) == config


@hypothesis.given(st.sampled_from(sorted(SETTINGS)), st.text(max_size=20))
@hypothesis.settings(max_examples=250, deadline=None, database=None)
def test_any_text_gives_a_configuration_or_a_user_error_that_names_the_setting(path, text):
  config, message = attempt(lambda: make_config(env="catch", preset="debug", overrides={path: text}))
  if config is None:
    assert len(message.splitlines()) == 1
    parts = path.split(".")
    assert parts[-1] in message or parts[0] in message or (path == "env.name" and "environment" in message)
    return
  assert SETTINGS[path].type is str or isinstance(get(config, path), int | float | tuple)
