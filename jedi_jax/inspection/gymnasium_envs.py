"""Dreams behind Gymnasium's interfaces. No other module of the dream imports Gymnasium."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from jedi_jax.errors import UserError
from jedi_jax.inspection.dream_env import Dream
from jedi_jax.ops.images import to_rgb

_METADATA: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 15}
_VECTOR_METADATA = {**_METADATA, "autoreset_mode": AutoresetMode.SAME_STEP}


class _Episodes:
  """The random numbers and the number of steps of each of N episodes.

  Args:
    dream: N dreams.
    limit: steps after which an episode is truncated; None for no limit.
  """

  def __init__(self, dream: Dream, limit: int | None):
    self._dream, self._limit = dream, limit
    count = dream.num_envs
    self._seeds: np.ndarray = np.zeros(count, np.uint32)
    self._counts: np.ndarray = np.zeros(count, np.uint32)
    self._steps: np.ndarray = np.zeros(count, np.int64)
    self.started = False

  def restart(self, seeds: Sequence[int | None], random: np.random.Generator) -> np.ndarray:
    """Starts all episodes and returns observations; an environment without a seed goes on with its random numbers."""
    for i, seed in enumerate(seeds):
      if seed is None and self.started:
        continue
      source = int(random.integers(2**32)) if seed is None else int(seed)
      self._seeds[i] = np.random.SeedSequence(source).generate_state(1)[0]
      self._counts[i] = 0
    self.started = True
    return self.restart_some(np.ones(len(seeds), bool))

  def restart_some(self, chosen: np.ndarray) -> np.ndarray:
    """Starts the chosen episodes; the observations of the others are arbitrary."""
    observations = self._dream.restart(self._seeds, self._counts, chosen)
    self._counts += chosen
    self._steps[chosen] = 0
    return observations

  def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns observations, rewards, terminated and truncated."""
    observations, rewards, terminated = self._dream.step(self._seeds, self._counts, actions)
    self._counts += np.uint32(1)
    self._steps += 1
    over = np.zeros_like(terminated) if self._limit is None else self._steps >= self._limit
    return observations, rewards, terminated, over & ~terminated


def _space(dream: Dream) -> gymnasium.spaces.Box:
  if dream.images:
    return gymnasium.spaces.Box(0, 255, dream.model.spec.observation_shape, np.uint8)
  return gymnasium.spaces.Box(-np.inf, np.inf, dream.model.latent_shape, np.float32)


def _check_actions(actions: Any, shape: tuple[int, ...], num_actions: int) -> np.ndarray:
  """Returns actions as an array."""
  try:
    array = np.asarray(actions)
  except ValueError:  # Lists of unequal lengths.
    array = np.asarray(None)
  if array.shape != shape or array.dtype.kind not in "iu":
    wanted = f"integers of shape {shape}" if shape else "an integer"
    raise UserError(f"actions of {array.dtype} {array.shape}: give {wanted} in 0..{num_actions - 1}")
  if np.any((array < 0) | (array >= num_actions)):
    raise UserError(f"actions from {array.min()} to {array.max()}: give integers in 0..{num_actions - 1}")
  return array


def _check_seed(seed: Any) -> None:
  if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0):
    raise UserError(f"seed={seed!r}: give an integer of at least 0, or None")


class DreamEnv(gymnasium.Env[np.ndarray, Any]):
  """One dream; see `jedi_jax.dream_env`.

  Args:
    dream: a dream with N = 1.
    max_episode_steps: steps after which an episode is truncated; None for no limit.
  """

  metadata = _METADATA

  def __init__(self, dream: Dream, max_episode_steps: int | None):
    self._dream, self._episodes = dream, _Episodes(dream, max_episode_steps)
    self._running = False
    self.render_mode = None if dream.model.decode is None else "rgb_array"
    self.observation_space = _space(dream)
    self.action_space = gymnasium.spaces.Discrete(dream.num_actions)

  def reset(
    self, *, seed: int | None = None, options: dict[str, Any] | None = None
  ) -> tuple[np.ndarray, dict[str, Any]]:
    """Starts an episode from real frames; `options` are not used.

    Raises:
      UserError: if the seed is not an integer of at least 0.
    """
    _check_seed(seed)
    seed = None if seed is None else int(seed)  # Gymnasium takes no integer of NumPy.
    super().reset(seed=seed)
    self._running = True
    return self._episodes.restart([seed], self.np_random)[0], {}

  def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
    """Imagines one step.

    Raises:
      UserError: if the action is not an integer in [0, A), or no episode is running.
    """
    if not self._running:
      raise UserError("no episode is running: call reset first")
    given = _check_actions(action, (), self._dream.num_actions)
    observations, rewards, terminated, truncated = self._episodes.step(given[None])
    self._running = not (terminated[0] or truncated[0])
    return observations[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), {}

  def render(self) -> np.ndarray | None:
    """Returns the current frame [H, W, 3] uint8; None if the agent has no decoder or before `reset`."""
    return None if self.render_mode is None or not self._episodes.started else to_rgb(self._dream.decode())[0]


class DreamVectorEnv(gymnasium.vector.VectorEnv[np.ndarray, Any, np.ndarray]):
  """N dreams that are imagined as one batch; see `jedi_jax.dream_env`.

  An episode that ends starts again in the same step (`AutoresetMode.SAME_STEP`).

  Args:
    dream: N dreams.
    max_episode_steps: steps after which an episode is truncated; None for no limit.
  """

  metadata = _VECTOR_METADATA

  def __init__(self, dream: Dream, max_episode_steps: int | None):
    self._dream, self._episodes = dream, _Episodes(dream, max_episode_steps)
    self.num_envs = dream.num_envs
    self.render_mode = None if dream.model.decode is None else "rgb_array"
    self.single_observation_space = _space(dream)
    self.single_action_space = gymnasium.spaces.Discrete(dream.num_actions)
    self.observation_space = batch_space(self.single_observation_space, self.num_envs)
    self.action_space = batch_space(self.single_action_space, self.num_envs)

  def reset(
    self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
  ) -> tuple[np.ndarray, dict[str, Any]]:
    """Starts all episodes from real frames; `options` are not used.

    Args:
      seed: environment i has the seed `seed + i`; or a sequence of N seeds.
      options: not used.

    Raises:
      UserError: if a seed is not an integer of at least 0, or there are not N of them.
    """
    if isinstance(seed, Sequence | np.ndarray):
      seeds = list(seed)
      if len(seeds) != self.num_envs:
        raise UserError(f"{len(seeds)} seeds for {self.num_envs} environments: give one for each, or an integer")
    else:
      _check_seed(seed)
      seeds = [None if seed is None else seed + i for i in range(self.num_envs)]
    for one in seeds:
      _check_seed(one)
    super().reset(seed=None if seeds[0] is None else int(seeds[0]))
    return self._episodes.restart(seeds, self.np_random), {}

  def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """Imagines one step in every episode, and starts those again that it ends.

    Args:
      actions: [N] integers in [0, A).

    Returns:
      Observations [N, ...], rewards [N] float32, terminated [N] bool, truncated [N] bool, and infos. Where an episode
      is over, the observation is the first of the next one, and `infos["final_obs"]` has the last one.

    Raises:
      UserError: if the actions have another shape or dtype or are out of range, or before `reset`.
    """
    if not self._episodes.started:
      raise UserError("no episode is running: call reset first")
    given = _check_actions(actions, (self.num_envs,), self._dream.num_actions)
    observations, rewards, terminated, truncated = self._episodes.step(given)
    infos: dict[str, Any] = {}
    over = terminated | truncated
    if np.any(over):
      for i in np.flatnonzero(over):
        infos = self._add_info(infos, {"final_obs": observations[i], "final_info": {}}, int(i))
      fresh = self._episodes.restart_some(over)
      observations = np.where(over.reshape(-1, *(1,) * (fresh.ndim - 1)), fresh, observations)
    return observations, rewards, terminated, truncated, infos

  def render(self) -> tuple[np.ndarray, ...] | None:
    """Returns the current frame [H, W, 3] uint8 of each episode; None without a decoder or before `reset`."""
    return None if self.render_mode is None or not self._episodes.started else tuple(to_rgb(self._dream.decode()))
