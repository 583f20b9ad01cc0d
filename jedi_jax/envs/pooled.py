"""What all EnvPool environments share: opening a pool, checking actions, restarting finished games at once."""

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, cast

import envpool
import numpy as np

from jedi_jax.errors import UserError
from jedi_jax.types import EnvSpec, EnvStep

_MAX_SEED = 2**31  # EnvPool holds seeds in an int32.


class Pool(Protocol):
  """The part of EnvPool's gymnasium interface that is used here, in synchronous mode.

  `info` holds one array an attribute, its rows in the order of the observations; `info["env_id"]` tells whose they are.
  A pool whose steps differ in length says in `info["frames"]` of a step how many frames each took.
  """

  def reset(self, env_id: np.ndarray) -> tuple[np.ndarray, Mapping[str, Any]]:
    """Starts a new game in the environments `env_id` [K] int32: observations and info of those K."""

  def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Mapping[str, Any]]:
    """Steps all N: observations, rewards float32, terminated bool, truncated bool, info."""

  def close(self) -> None:
    """Frees what the pool holds beyond its memory."""


class PartialPool(Pool, Protocol):
  """A `Pool` that can step some of its environments, as EnvPool's own do."""

  def step(
    self, action: np.ndarray, env_id: np.ndarray | None = None
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Mapping[str, Any]]:
    """Steps the environments `env_id` [K] int32, all N if None; the arrays returned have as many rows."""


def open_pool(
  task: str, *, num_envs: int, seed: int, num_threads: int, max_episode_steps: int | None, **options: Any
) -> PartialPool:
  """Makes an EnvPool.

  Args:
    task: EnvPool's name, such as `Breakout-v5`.
    num_envs: N >= 1.
    seed: environment i is seeded with `seed + i` for good: EnvPool ignores the seed of a reset. Two pools share no
      game where their ranges [seed, seed + N) do not overlap, so keep those of training and evaluation apart.
    num_threads: emulator threads; 0 leaves the choice to EnvPool.
    max_episode_steps: steps after which a game is truncated; None keeps the task's own limit.
    **options: EnvPool's other settings.

  Returns:
    The pool, in synchronous mode; no game has begun.

  Raises:
    UserError: a number is out of its range.
  """
  if num_envs < 1:
    raise UserError(f"num_envs is {num_envs}; it must be at least 1")
  if not 0 <= seed <= _MAX_SEED - num_envs:
    raise UserError(f"seed is {seed}; with num_envs {num_envs} it must lie in 0..{_MAX_SEED - num_envs}")
  if num_threads < 0:
    raise UserError(f"num_threads is {num_threads}; it must be 0 (chosen by EnvPool) or more")
  if max_episode_steps is not None:
    check_max_episode_steps(max_episode_steps)
    options["max_episode_steps"] = max_episode_steps
  pool = envpool.make_gymnasium(task, num_envs=num_envs, seed=seed, num_threads=num_threads, **options)
  return cast(PartialPool, pool)


def check_max_episode_steps(max_episode_steps: int) -> None:
  """Checks a time limit.

  Raises:
    UserError: it is not positive.
  """
  if max_episode_steps < 1:
    raise UserError(f"max_episode_steps is {max_episode_steps}; it must be at least 1")


class Outcome(NamedTuple):
  """What a step led to, but for its images: the fields of `EnvStep` of the same names, over N environments.

  Attributes:
    reward: [N] float32; raw.
    end: [N] bool.
    truncated: [N] bool.
    game_over: [N] bool; these games are restarted.
  """

  reward: np.ndarray
  end: np.ndarray
  truncated: np.ndarray
  game_over: np.ndarray


class PooledEnv(abc.ABC):
  """A `jedi_jax.types.VectorEnv` over an EnvPool; the games differ in three small methods.

  Left to itself EnvPool restarts a finished game on the next step: it discards that step's action and returns the
  first frame with reward 0. Such a step is no transition, so it is never taken here: the final observation is kept and
  the finished games, only those, are reset before `step` returns.

  Observations are fresh arrays, which EnvPool does not write into later. `EnvStep.observation` and `next_observation`
  are one array where no game ended: do not write into them.

  Args:
    pool: a pool of N games, none of them begun.
    num_envs: N.
    spec: number of actions and shape of an observation.
  """

  frames_per_step: int = 1
  """Frames of the game that a step takes; the most, where steps differ. To count frames, use `frames`."""

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
    """Frames of the game that all steps so far took, summed over the N environments; not what a reset plays.

    A step in which a game ends counts whole, though the emulator stops there; so does everyone who multiplies steps.
    """
    return self._frames

  def reset(self) -> np.ndarray:
    """Begins a new game in every environment; must come before the first `step`.

    Returns:
      [N, H, W, C] uint8, C-contiguous: the first frames.

    Raises:
      RuntimeError: the environment is closed.
    """
    return self._restart(np.arange(self._num_envs, dtype=np.int32))

  def step(self, actions: np.ndarray) -> EnvStep:
    """Takes one step in every environment and restarts the games that it finished.

    Args:
      actions: [N] integers of any width in [0, A).

    Returns:
      See `jedi_jax.types.EnvStep`; the reward is raw (not clipped).

    Raises:
      UserError: the actions have another shape, are not integers, or lie out of range (EnvPool itself would accept
        them in silence).
      RuntimeError: the environment is closed.
    """
    raw, reward, terminated, truncated, info = self._open_pool().step(self._checked(actions))
    order, info = _by_env(info)
    self._frames += int(info["frames"].sum()) if "frames" in info else self._num_envs * self.frames_per_step
    next_observation = self._images(raw[order], np.arange(self._num_envs))
    outcome = self._outcome(reward[order], (terminated | truncated)[order], info)

    observation = next_observation
    finished = np.flatnonzero(outcome.game_over).astype(np.int32)
    if finished.size:
      observation = next_observation.copy()
      observation[finished] = self._restart(finished)
    return EnvStep(next_observation, observation, **outcome._asdict())

  def close(self) -> None:
    """Frees the emulators; may be called twice."""
    if self._pool is not None:
      self._pool.close()
      self._pool = None  # EnvPool's threads and emulators go with the last reference.

  @abc.abstractmethod
  def _images(self, raw: np.ndarray, env_ids: np.ndarray) -> np.ndarray:
    """Turns EnvPool's observations [K, ...] of the environments `env_ids` [K] into images [K, H, W, C] uint8."""

  def _begin(self, env_ids: np.ndarray, info: Mapping[str, np.ndarray]) -> None:
    """Told that new games began in `env_ids` [K], with the K rows of their info; before their images are asked for."""
    del env_ids, info

  @abc.abstractmethod
  def _outcome(self, reward: np.ndarray, done: np.ndarray, info: Mapping[str, np.ndarray]) -> Outcome:
    """What a step led to, from EnvPool's reward [N] float32, its word that games are done [N] bool, and its info."""

  def _open_pool(self) -> Pool:
    if self._pool is None:
      raise RuntimeError("the environment is closed; make a new one")
    return self._pool

  def _restart(self, env_ids: np.ndarray) -> np.ndarray:
    """Begins new games in `env_ids` [K] int32, ascending; images [K, H, W, C] of their first frames."""
    raw, info = self._open_pool().reset(env_ids)
    order, info = _by_env(info)
    self._begin(env_ids, info)
    return self._images(raw[order], env_ids)

  def _checked(self, actions: np.ndarray) -> np.ndarray:
    actions = np.asarray(actions)
    if actions.shape != (self._num_envs,):
      raise UserError(f"actions have shape {actions.shape}; one for each environment makes ({self._num_envs},)")
    if not np.issubdtype(actions.dtype, np.integer):
      raise UserError(f"actions are {actions.dtype}; they must be integers")
    wrong = (actions < 0) | (actions >= self._spec.num_actions)
    if wrong.any():
      env = int(np.argmax(wrong))
      raise UserError(f"action {actions[env]} of environment {env} must lie in 0..{self._spec.num_actions - 1}")
    return actions.astype(np.int32)


def _by_env(info: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """The order that sorts rows by environment, and the arrays of `info` in that order."""
  order = np.argsort(info["env_id"], kind="stable")
  return order, {key: value[order] for key, value in info.items() if isinstance(value, np.ndarray)}
