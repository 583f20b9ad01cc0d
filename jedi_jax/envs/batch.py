"""N copies of a game written in Python, as a `jedi_jax.types.VectorEnv`."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from jedi_jax.envs.pooled import check_actions, check_numbers
from jedi_jax.errors import UserError
from jedi_jax.types import EnvSpec, EnvStep


class Game(Protocol):
  """One game; the part of Gymnasium's `Env` that is used here. A method `close()` is optional."""

  def reset(self, *, seed: int | None = None) -> tuple[np.ndarray, Any]:
    """Begins a new game, seeded if `seed` is an integer; returns the observation [H, W, C] uint8 and info (unused)."""

  def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, Any]:
    """Returns the observation [H, W, C] uint8, reward, terminated, truncated and info (unused)."""


class BatchEnv:
  """N copies of a Python game, stepped one after another; see `jedi_jax.types.VectorEnv`.

  The keyword arguments are those of `jedi_jax.envs.make`, so that
  `register(name, spec, functools.partial(BatchEnv, make_game, spec))` registers a game.

  Args:
    make_game: called N times; returns a `Game`, such as a class with `reset` and `step` or a Gymnasium environment.
    spec: number of actions and observation shape of the game.
    num_envs: N >= 1.
    seed: the first reset of game i gets `seed=seed + i`, later ones no seed. Games draw all of their randomness from
      that seed.
    max_episode_steps: steps after which a game is truncated; None leaves that to the game.
    life_loss_ends: no effect; games have one life.
    num_threads: no effect.
    repeatable: whether the same seed and actions give the same games; see `jedi_jax.types.VectorEnv`.

  Raises:
    UserError: a number is out of its range.
  """

  def __init__(
    self,
    make_game: Callable[[], Game],
    spec: EnvSpec,
    *,
    num_envs: int,
    seed: int,
    max_episode_steps: int | None = None,
    life_loss_ends: bool = False,
    num_threads: int = 0,
    repeatable: bool | None = True,
  ) -> None:
    del life_loss_ends, num_threads
    check_numbers(num_envs, seed, max_episode_steps)
    self.num_envs = num_envs
    self.spec = spec
    self.frames = 0
    self._games = [make_game() for _ in range(num_envs)]
    self._seeds: list[int | None] = list(range(seed, seed + num_envs))
    self.repeatable = repeatable
    self._limit = math.inf if max_episode_steps is None else max_episode_steps
    self._lengths = np.zeros(num_envs, np.int64)

  def reset(self) -> np.ndarray:
    """Begins a new game in every environment; the first call seeds them. Returns observations [N, H, W, C] uint8."""
    observations = np.stack([game.reset(seed=seed)[0] for seed, game in zip(self._seeds, self._games, strict=True)])
    self._seeds = [None] * self.num_envs
    self._lengths[:] = 0
    return observations

  def step(self, actions: np.ndarray) -> EnvStep:
    """Takes one step in every environment and restarts finished games; actions [N] integers."""
    actions = check_actions(actions, self.num_envs, self.spec.num_actions)
    results = [game.step(int(action)) for game, action in zip(self._games, actions, strict=True)]
    if any(len(result) != 5 for result in results):
      raise UserError(
        f"{type(self._games[0]).__name__}.step returned {len(results[0])} values: "
        "return observation, reward, terminated, truncated, info"
      )
    observations, rewards, terminated, truncated, _ = zip(*results, strict=True)
    self.frames += self.num_envs
    self._lengths += 1
    end = np.array(terminated, bool)
    stopped = (np.array(truncated, bool) | (self._lengths >= self._limit)) & ~end
    next_observation = np.stack(observations)
    observation = next_observation.copy()
    for i in np.flatnonzero(end | stopped):
      observation[i], _ = self._games[i].reset()
      self._lengths[i] = 0
    return EnvStep(next_observation, observation, np.array(rewards, np.float32), end, stopped, end | stopped)

  def close(self) -> None:
    """Closes the games that have a method `close`."""
    for game in self._games:
      getattr(game, "close", lambda: None)()
