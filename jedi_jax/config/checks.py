"""Checks of a configuration: each setting, and what settings demand of one another."""

from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from jedi_jax import envs
from jedi_jax.config import fields
from jedi_jax.config.presets import PRESETS, VARIANTS
from jedi_jax.errors import UserError, nearest

if TYPE_CHECKING:
  from jedi_jax.config.records import Config

_SAME_LENGTH = (
  ("encoder.channels", "encoder.downsample"),
  ("denoiser.channels", "denoiser.depths"),
  ("denoiser.channels", "denoiser.attention"),
  ("reward_end.channels", "reward_end.depths"),
  ("reward_end.channels", "reward_end.attention"),
  ("actor_critic.channels", "actor_critic.downsample"),
)
_NOT_EMPTY = ("encoder.channels", "denoiser.channels", "reward_end.channels", "replay.age_weights")
_IN_GROUPS = ("encoder.channels", "denoiser.channels", "reward_end.channels", "actor_critic.channels")
_IN_HEADS = ("denoiser.channels", "reward_end.channels")
_AT_MOST = (
  ("denoiser.sigma_min", "denoiser.sigma_max"),
  ("sampler.sigma_min", "sampler.sigma_max"),
  ("sampler.churn_min", "sampler.churn_max"),
  ("collect.first_epoch_min_steps", "collect.first_epoch_max_steps"),
  ("collect.first_epoch_max_steps", "collect.total_steps"),
)
_OVER_ENVS = (
  "collect.steps_per_epoch",
  "collect.total_steps",
  "collect.first_epoch_min_steps",
  "collect.first_epoch_max_steps",
)


def validate(config: "Config") -> None:
  """Checks the type and bounds of every setting, and what settings demand of one another.

  Raises:
    UserError: one line that names the setting and the fix.
  """
  values: dict[str, Any] = {}
  for path, field in fields.settings(type(config)).items():
    values[path] = attrgetter(path)(config)
    fields.check(path, values[path], field)
  envs.validate(config.env.name)
  check_name("variant", config.variant, VARIANTS)
  check_name("preset", config.preset, PRESETS)
  _check_routes(config)
  _check_lengths(values)
  _check_channels(values)
  _check_conditioning(config)
  _check_order(values)
  _check_shared_updates(config)
  _check_replay(config)


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
  """Raises `UserError` with the nearest names if a name is unknown."""
  if name not in known:
    raise UserError(f"unknown {kind} {name!r}{nearest(name, known)}")


def _check_routes(config: "Config") -> None:
  kind, routes = config.encoder.kind, config.encoder.learns_from
  known = fields.settings(type(config))["encoder.learns_from"].metadata["choices"]
  ordered = tuple(name for name in known if name in routes)
  if routes != ordered:
    raise UserError(f"encoder.learns_from={','.join(routes)} is out of order or repeats: write {','.join(ordered)}")
  if kind == "learned" and not routes:
    raise UserError(
      f"encoder.learns_from is empty, but encoder.kind=learned: name at least one of {', '.join(known)}, "
      "or set encoder.kind=identity"
    )
  if kind == "identity" and routes:
    raise UserError(
      f"encoder.learns_from={','.join(routes)}, but encoder.kind=identity has nothing to learn: "
      "set encoder.learns_from=()"
    )


def _check_lengths(values: Mapping[str, Any]) -> None:
  for first, second in _SAME_LENGTH:
    a, b = len(values[first]), len(values[second])
    if a != b:
      raise UserError(f"{first} has {a} entries and {second} has {b}: give both the same length")
  for path in _NOT_EMPTY:
    if not values[path]:
      raise UserError(f"{path} is empty: give at least one entry")


def _check_channels(values: Mapping[str, Any]) -> None:
  for path in _IN_GROUPS:
    for count in values[path]:
      if count > 32 and count % (count // 32):
        raise UserError(
          f"{path}: {count} channels cannot be split into {count // 32} norm groups: take a multiple of 32"
        )
  for path in _IN_HEADS:
    for count in values[path]:
      if count > 8 and count % 8:
        raise UserError(f"{path}: {count} channels cannot be split into attention heads of 8: take a multiple of 8")
  # On the way up, the U-Net concatenates a level's channels with those from the way down of this level and the next.
  levels = values["denoiser.channels"]
  for first, second in ((levels[max(0, i + below)], count) for i, count in enumerate(levels) for below in (0, -1)):
    total = first + second
    if total > 32 and total % (total // 32):
      raise UserError(
        f"denoiser.channels: {first} and {second} channels are concatenated to {total}, which cannot be split into "
        f"{total // 32} norm groups: take multiples of 32"
      )


def _check_conditioning(config: "Config") -> None:
  width, frames = config.denoiser.conditioning_width, config.denoiser.conditioning_frames
  if width % frames:
    raise UserError(
      f"denoiser.conditioning_width={width} is not a multiple of denoiser.conditioning_frames={frames}: "
      "each past action takes an equal share"
    )
  if width % 2:
    raise UserError(f"denoiser.conditioning_width={width} is odd: make it even")


def _check_order(values: Mapping[str, Any]) -> None:
  for low, high in _AT_MOST:
    if values[low] > values[high]:
      raise UserError(f"{low}={values[low]} exceeds {high}={values[high]}: lower the first or raise the second")
  for path in _OVER_ENVS:
    if values[path] % values["env.num_envs"]:
      raise UserError(
        f"{path}={values[path]} is not a multiple of env.num_envs={values['env.num_envs']}: change one of them"
      )


def _check_shared_updates(config: "Config") -> None:
  for name in ("updates", "first_updates"):
    updates = getattr(config.training, name)
    counts = {f"training.{name}.{phase}": getattr(updates, phase) for phase in ("denoiser", "reward_end")}
    if misfit := misfit_together(config.training.order, counts):
      given = " and ".join(f"{path}={count}" for path, count in counts.items())
      raise UserError(f"{given}: {misfit}, or set training.order=sequential")


def misfit_together(order: str, counts: Mapping[str, int]) -> str | None:
  """Says why phases cannot run together with these numbers of updates, with the cure; None if they can.

  Args:
    order: see `TrainingConfig.order`.
    counts: of the phases of a group.
  """
  least = min(counts.values())
  if order == "sequential" or len(set(counts.values())) == 1:
    return None
  if order == "joint":
    return "training.order=joint trains both in one update; make them equal"
  if least and not any(count % least for count in counts.values()):
    return None
  return f"training.order={order} trains them in turns; make one a multiple of the other"


def _check_replay(config: "Config") -> None:
  total = sum(config.replay.age_weights)
  if abs(total - 1) > 1e-6:
    raise UserError(f"replay.age_weights sum to {total}: make them sum to 1")
  frames = config.denoiser.conditioning_frames + config.actor_critic.horizon
  room = (config.replay.capacity + config.replay.final_frames) // config.env.num_envs
  if room < frames:
    raise UserError(
      f"replay.capacity={config.replay.capacity} leaves {room} frames per stream (env.num_envs={config.env.num_envs}), "
      f"less than one segment of {frames} (denoiser.conditioning_frames={config.denoiser.conditioning_frames} and "
      f"actor_critic.horizon={config.actor_critic.horizon}): raise it"
    )
