"""Configuration: frozen records of typed settings, presets, variants and overrides.

`make_config` builds a configuration from a variant, a preset and overrides. Every `Config` that exists is valid.
Configurations are read by the builders in `models` and `training`; ops, nn and losses take plain arguments.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from jedi_jax import envs
from jedi_jax.config.checks import check_name
from jedi_jax.config.fields import TAGS, convert, descriptions, settings
from jedi_jax.config.presets import PRESETS, VARIANT_PRESETS, VARIANTS
from jedi_jax.config.presets import VARIANT_SUMMARIES as VARIANT_SUMMARIES
from jedi_jax.config.records import CollectConfig as CollectConfig
from jedi_jax.config.records import Config, EncoderConfig, EnvConfig
from jedi_jax.config.records import OptimizerConfig as OptimizerConfig
from jedi_jax.config.records import Updates as Updates
from jedi_jax.errors import UserError, nearest
from jedi_jax.tables import markdown_table


def make_config(
  *,
  env: str | None = None,
  variant: str = "jedi",
  preset: str = "paper",
  seed: int = 0,
  overrides: Sequence[str] | Mapping[str, Any] = (),
) -> Config:
  """Builds a configuration.

  Args:
    env: name of the environment; None for the preset's. A random frame skip sets `sampler.churn` to 1.
    variant: a key of `VARIANTS`.
    preset: a key of `PRESETS`.
    seed: non-negative seed.
    overrides: strings 'path=value', such as 'actor_critic.horizon=10', or a mapping from paths to values. They take
      precedence over everything else.

  Raises:
    UserError: for an unknown name or path (with the nearest ones), a value of the wrong type or an impossible value.
  """
  check_name("variant", variant, VARIANTS)
  check_name("preset", preset, PRESETS)
  if not isinstance(overrides, Mapping):
    overrides = dict(split_override(text) for text in overrides)
  for name in ("variant", "preset"):
    if name in overrides:
      raise UserError(f"{name} determines other settings and cannot be overridden: use the argument or flag {name}")
  values: dict[str, Any] = {**PRESETS[preset], **VARIANTS[variant], **VARIANT_PRESETS.get((variant, preset), {})}
  values |= {"variant": variant, "preset": preset, "seed": seed}
  values["env.name"] = env or values.get("env.name", EnvConfig.name)
  if envs.is_stochastic(overrides.get("env.name", values["env.name"])):
    values["sampler.churn"] = 1.0  # As in the paper's stochastic-Atari experiment.
  return override(Config(), {**values, **overrides})


def override(config: Config, values: Mapping[str, Any]) -> Config:
  """Returns `config` with the settings at the given dotted paths replaced, all at once.

  Args:
    config: the configuration to start from.
    values: values by path. A string is parsed as the setting's type, a list becomes a tuple and an integer a float.

  Raises:
    UserError: as `make_config`.
  """
  known = settings(type(config))
  for path in values:
    if path not in known:
      raise UserError(f"unknown setting {path!r}{nearest(path, known)}")
  changed = {path: convert(path, value, known[path].type) for path, value in values.items()}
  return _build(type(config), {path: attrgetter(path)(config) for path in known} | changed)


def _build(cls: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
  """Builds a record from the values of all settings by dotted path."""

  def value(path: str, kind: Any) -> Any:
    return values[path] if path in values else _build(kind, values, f"{path}.")

  return cls(**{field.name: value(prefix + field.name, field.type) for field in dataclasses.fields(cls)})


def split_override(text: str) -> tuple[str, str]:
  """Splits 'path=value'.

  Raises:
    UserError: if the string is not of that form.
  """
  path, separator, value = text.partition("=")
  if not separator or not path:
    raise UserError(f"override {text!r} is not of the form path=value, such as actor_critic.horizon=10")
  return path.strip(), value.strip()


def to_dict(config: Any) -> dict[str, Any]:
  """Returns a nested dictionary of JSON values (infinity as 'inf'), the inverse of `from_dict`."""

  def plain(value: Any) -> Any:
    if isinstance(value, tuple):
      return list(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

  return dataclasses.asdict(config, dict_factory=lambda items: {name: plain(value) for name, value in items})


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Turns a nested dictionary into one from dotted paths to values."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
  return flat


_ABSENT = {"encoder.norm": "none", "sampler.start": "unit"}
"""What the absence of a setting means in a configuration written before it existed, where that is not the default."""


def from_dict(tree: Mapping[str, Any]) -> Config:
  """Builds a configuration from the form of `to_dict`, also as written before variants were settings.

  Raises:
    UserError: for an unknown path, or a wrong or impossible value.
  """
  values = flatten(tree)
  if (scale := values.pop("denoiser.follow_scale", False)) is not False:
    raise UserError(f"denoiser.follow_scale={scale!r} is no longer supported: train a new run without it")
  variant = VARIANTS.get(str(values.get("variant")), {})
  routes = variant.get("encoder.learns_from", EncoderConfig.learns_from)
  if not convert("encoder.reward_gradient", values.pop("encoder.reward_gradient", True), bool):
    routes = tuple(name for name in routes if name != "reward_end")
  implied = {path: variant[path] for path in ("encoder.kind", "denoiser.kind") if path in variant}
  return override(Config(), {**_ABSENT, **implied, "encoder.learns_from": routes, **values})


def describe(config: Config) -> str:
  """Lists every setting and its choices as a Markdown table; values that differ from preset `paper` are bold."""
  values, paper = flatten(to_dict(config)), flatten(to_dict(Config()))
  texts = descriptions(type(config))
  bold = "; values that differ from preset `paper` are bold" if values != paper else ""
  head = [
    "# Settings",
    "",
    "The tag is the source of the default: " + "; ".join(f"{tag} {meaning}" for tag, meaning in TAGS.items()) + ".",
    f"Variant `{config.variant}`, preset `{config.preset}`{bold}.",
    "",
  ]
  rows = [("setting", "value", "tag", "description")]
  for path, field in settings(type(config)).items():
    value = json.dumps(values[path])
    value = value if values[path] == paper[path] else f"**{value}**"
    text, choices = texts[path], field.metadata["choices"]
    if choices:
      text += f" {'Any' if isinstance(values[path], list) else 'One'} of {', '.join(f'`{name}`' for name in choices)}."
    rows.append((f"`{path}`", value, field.metadata["tag"], text))
  return "\n".join([*head, markdown_table(rows)])


def room_for(names: Sequence[str]) -> int:
  """Returns `env.action_slots` for games that share a program: the largest number of actions, 0 if all have the same.

  Raises:
    UserError: for an unknown name.
  """
  numbers = {envs.spec(name).num_actions for name in names}
  return max(numbers) if len(numbers) > 1 else 0


def differences(old: Config, new: Config) -> list[str]:
  """Returns 'path: old value -> new value' for every setting that differs."""
  before, after = flatten(to_dict(old)), flatten(to_dict(new))
  return [f"{path}: {before[path]} -> {after[path]}" for path in before if before[path] != after[path]]
