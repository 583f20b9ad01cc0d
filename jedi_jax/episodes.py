"""Recorded episodes on the host, and their check."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jedi_jax.errors import UserError


class Episode(NamedTuple):
  """T steps of one episode, on the host.

  Attributes:
    observations: [T + 1, H, W, channels] uint8; observations[t] precedes action t, the last one is the final frame.
    actions: [T] integers.
    rewards: [T], raw.
    ends: whether the last step terminated the episode (otherwise it was truncated), as one bool or as [T] bool.
  """

  observations: np.ndarray
  actions: np.ndarray
  rewards: np.ndarray
  ends: bool | np.ndarray


def check_episode(name: str, episode: Any) -> Episode:
  """Returns an episode as arrays, with `ends` as a bool.

  Args:
    name: of the episode, for messages.
    episode: an `Episode`, or a mapping or another named tuple with its fields.

  Raises:
    UserError: if it has wrong shapes or dtypes.
  """
  if not isinstance(episode, Mapping) and not hasattr(episode, "_asdict"):
    raise UserError(f"{name} is a {type(episode).__name__}: give a list of `Episode`s or mappings")
  fields = episode if isinstance(episode, Mapping) else episode._asdict()
  missing = [field for field in Episode._fields if field not in fields]
  if missing:
    raise UserError(f"{name} lacks {', '.join(missing)}: give {', '.join(Episode._fields)}")
  observations, actions, rewards, ends = (np.asarray(fields[field]) for field in Episode._fields)
  if observations.dtype != np.uint8 or observations.ndim != 4:
    raise UserError(
      f"{name} has observations of {observations.dtype} {observations.shape}: "
      "give uint8 of shape (T + 1, height, width, channels)"
    )
  steps = len(observations) - 1
  if steps < 1 or actions.shape != (steps,) or not np.issubdtype(actions.dtype, np.integer):
    raise UserError(
      f"{name} has {len(observations)} observations and actions of {actions.dtype} {actions.shape}: "
      "give T integer actions and T + 1 observations, the final frame included"
    )
  if rewards.shape != (steps,) or rewards.dtype.kind not in "iuf" or not np.all(np.isfinite(rewards)):
    raise UserError(f"{name} has rewards of {rewards.dtype} {rewards.shape}: give {steps} finite numbers")
  if ends.dtype != bool or ends.shape not in ((), (steps,)) or np.any(ends.reshape(-1)[:-1]):
    raise UserError(f"{name} has ends of {ends.dtype} {ends.shape}: give whether its last step terminated it")
  return Episode(observations, actions, rewards, bool(ends.reshape(-1)[-1]))
