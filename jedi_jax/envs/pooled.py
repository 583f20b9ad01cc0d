"""The common part of EnvPool environments: opens a pool, checks actions, restarts finished games at once."""

import abc
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from jedi_jax.errors import UserError
from jedi_jax.types import EnvSpec, EnvStep

_MAX_SEED = 2**31  # EnvPool holds seeds in an int32.


class Pool(Protocol):
  """The part of EnvPool's gymnasium interface that is used here, in synchronous mode.

  `info` maps names to arrays with one row for each observation, in the same order; `info["env_id"]` holds the index of
  the environment of each row. A pool with steps of different lengths also gives `info["frames"]`, the frames of each
  step.
  """

  def reset(self, env_id: np.ndarray) -> tuple[np.ndarray, Mapping[str, Any]]:
    """Starts a new game in the environments `env_id` [K] int32; returns K observations and their info."""

  def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Mapping[str, Any]]:
    """Steps all N environments; returns observations, rewards float32, terminated bool, truncated bool, and info."""

  def close(self) -> None:
    """Frees the resources of the pool."""


class PartialPool(Pool, Protocol):
  """A `Pool` that can step a subset of its environments, such as EnvPool's own."""

  def step(
    self, action: np.ndarray, env_id: np.ndarray | None = None
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Mapping[str, Any]]:
    """Steps the environments `env_id` [K] int32, all N if None; returns arrays with one row for each."""


def open_pool(
  task: str, *, num_envs: int, seed: int, num_threads: int, max_episode_steps: int | None, **options: Any
) -> PartialPool:
  """Opens an EnvPool in synchronous mode.

  Args:
    task: EnvPool's name, such as `Breakout-v5`.
    num_envs: N >= 1.
    seed: environment i is seeded with `seed + i`, once: EnvPool ignores the seed of a reset. Pools with disjoint
      ranges [seed, seed + N) share no game; keep the ranges of training and evaluation disjoint.
    num_threads: emulator threads; 0 lets EnvPool choose.
    max_episode_steps: steps after which a game is truncated; None keeps the task's own limit.
    **options: EnvPool's other settings.

  Returns:
    The pool, before its first reset.

  Raises:
    UserError: a number is out of its range, or EnvPool is not installed.
  """
  check_numbers(num_envs, seed, max_episode_steps)
  if num_threads < 0:
    raise UserError(f"num_threads is {num_threads}; it must be 0 (chosen by EnvPool) or more")
  if max_episode_steps is not None:
    options["max_episode_steps"] = max_episode_steps
  make = import_envpool().make_gymnasium
  return cast(PartialPool, make(task, num_envs=num_envs, seed=seed, num_threads=num_threads, **options))


def import_envpool() -> Any:
  """Imports EnvPool; this module alone does so, and not before an EnvPool environment is used.

  Raises:
    UserError: it cannot be imported.
  """
  try:
    import envpool
  except ImportError as error:
    raise UserError(
      f"Catch, Atari, Procgen, ViZDoom and MiniGrid need EnvPool ({error}): pip install envpool"
    ) from None
  return envpool


@functools.cache
def tasks(package: str, suffix: str) -> tuple[str, ...] | None:
  """Returns the names of the tasks of one of EnvPool's packages, such as `envpool.atari`; None without EnvPool.

  Args:
    package: EnvPool's package.
    suffix: only names with this end are returned, without it; sorted.
  """
  try:
    specs = import_envpool().registration.registry.specs
  except UserError:
    return None
  names = (name for name, entry in specs.items() if entry[0] == package and name.endswith(suffix))
  return tuple(sorted(name.removesuffix(suffix) for name in names))


def check_numbers(num_envs: int, seed: int, max_episode_steps: int | None) -> None:
  """Checks the arguments that all environments share; see `jedi_jax.envs.make`.

  Raises:
    UserError: a number is out of its range.
  """
  if num_envs < 1:
    raise UserError(f"num_envs is {num_envs}; it must be at least 1")
  if not 0 <= seed <= _MAX_SEED - num_envs:
    raise UserError(f"seed is {seed}; with num_envs {num_envs} it must lie in 0..{_MAX_SEED - num_envs}")
  if max_episode_steps is not None and max_episode_steps < 1:
    raise UserError(f"max_episode_steps is {max_episode_steps}; it must be at least 1")


class Outcome(NamedTuple):
  """The fields of `jedi_jax.types.EnvStep` that are not images, for N environments.

  Attributes:
    reward: [N] float32; raw.
    end: [N] bool.
    truncated: [N] bool.
    game_over: [N] bool; the games to restart.
  """

  reward: np.ndarray
  end: np.ndarray
  truncated: np.ndarray
  game_over: np.ndarray


class PooledEnv(abc.ABC):
  """A `jedi_jax.types.VectorEnv` over an EnvPool; subclasses implement `_outcome`, optionally `_images`, `_begin`.

  By default EnvPool restarts a finished game on the next step: it discards that step's action and returns the first
  frame with reward 0. Such a step is no transition. This class resets finished games before `step` returns and keeps
  the final observation.

  EnvPool does not write into the arrays that it returned. `EnvStep.observation` and `next_observation` are the same
  array if no game ended: do not write into them.

  Args:
    pool: a pool of N games, before its first reset.
    num_envs: N.
    spec: number of actions and observation shape.
  """

  frames_per_step: int = 1
  """Largest number of game frames in one step; `frames` counts the exact number."""

  def __init__(self, pool: Pool, *, num_envs: int, spec: EnvSpec) -> None:
    self._pool: Pool | None = pool
    self._num_envs = num_envs
    self._spec = spec
    self._frames = 0

  @property
  def num_envs(self) -> int:
    """Number of environments N."""
    return self._num_envs

  @property
  def spec(self) -> EnvSpec:
    """Number of actions and observation shape."""
    return self._spec

  @property
  def frames(self) -> int:
    """Game frames of all steps so far, summed over the N environments; frames played by resets do not count.

    A step that ends a game counts as a whole step, although the emulator stops early.
    """
    return self._frames

  def reset(self) -> np.ndarray:
    """Begins a new game in every environment; call it before the first `step`.

    Returns:
      [N, H, W, C] uint8, C-contiguous: the first frames.

    Raises:
      RuntimeError: the environment is closed.
    """
    return self._restart(np.arange(self._num_envs, dtype=np.int32))

  def step(self, actions: np.ndarray) -> EnvStep:
    """Takes one step in every environment and restarts finished games.

    Args:
      actions: [N] integers of any width in [0, A).

    Returns:
      See `jedi_jax.types.EnvStep`; the reward is raw (not clipped).

    Raises:
      UserError: the actions have another shape, are not integers, or are out of range (EnvPool does not check them).
      RuntimeError: the environment is closed.
    """
    raw, reward, terminated, truncated, info = self._open_pool().step(
      check_actions(actions, self._num_envs, self._spec.num_actions)
    )
    order, info = _by_env(info)
    self._frames += int(info["frames"].sum()) if "frames" in info else self._num_envs * self.frames_per_step
    next_observation = self._images(raw[order], np.arange(self._num_envs))
    outcome = self._outcome(reward[order], (terminated | truncated)[order], truncated[order], info)

    observation = next_observation
    finished = np.flatnonzero(outcome.game_over).astype(np.int32)
    if finished.size:
      observation = next_observation.copy()
      observation[finished] = self._restart(finished)
    return EnvStep(next_observation, observation, **outcome._asdict())

  def close(self) -> None:
    """Frees the emulators; a second call does nothing."""
    if self._pool is not None:
      self._pool.close()
      self._pool = None  # EnvPool's threads and emulators go with the last reference.

  def _images(self, raw: np.ndarray, env_ids: np.ndarray) -> np.ndarray:
    """Converts EnvPool's observations of the environments `env_ids` [K] to images [K, H, W, C] uint8.

    EnvPool's images are [K, C, H, W]; subclasses with other observations override this.
    """
    del env_ids
    return np.ascontiguousarray(raw.transpose(0, 2, 3, 1))

  def _begin(self, env_ids: np.ndarray, info: Mapping[str, np.ndarray]) -> None:
    """Called when new games begin in `env_ids` [K], with their K rows of info; `_images` follows."""
    del env_ids, info

  @abc.abstractmethod
  def _outcome(
    self, reward: np.ndarray, done: np.ndarray, truncated: np.ndarray, info: Mapping[str, np.ndarray]
  ) -> Outcome:
    """Returns the outcome of a step.

    Args:
      reward: [N] float32; EnvPool's.
      done: [N] bool; EnvPool terminated or truncated the game.
      truncated: [N] bool; EnvPool truncated it.
      info: EnvPool's, with N rows.
    """

  def _open_pool(self) -> Pool:
    if self._pool is None:
      raise RuntimeError("the environment is closed; make a new one")
    return self._pool

  def _restart(self, env_ids: np.ndarray) -> np.ndarray:
    """Begins new games in `env_ids` [K] int32, ascending; returns their first images [K, H, W, C]."""
    raw, info = self._open_pool().reset(env_ids)
    order, info = _by_env(info)
    self._begin(env_ids, info)
    return self._images(raw[order], env_ids)


def check_actions(actions: Any, num_envs: int, num_actions: int) -> np.ndarray:
  """Returns actions [N] as int32.

  Raises:
    UserError: they have another shape, are no integers or are out of range.
  """
  actions = np.asarray(actions)
  if actions.shape != (num_envs,):
    raise UserError(f"actions have shape {actions.shape}; expected ({num_envs},), one for each environment")
  if not np.issubdtype(actions.dtype, np.integer):
    raise UserError(f"actions have dtype {actions.dtype}; they must be integers")
  wrong = (actions < 0) | (actions >= num_actions)
  if wrong.any():
    env = int(np.argmax(wrong))
    raise UserError(f"action {actions[env]} of environment {env} must lie in 0..{num_actions - 1}")
  return actions.astype(np.int32)


def _by_env(info: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns the order that sorts rows by environment, and the arrays of `info` in that order."""
  order = np.argsort(info["env_id"], kind="stable")
  return order, {key: value[order] for key, value in info.items() if isinstance(value, np.ndarray)}
