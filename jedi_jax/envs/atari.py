"""Atari games with DIAMOND's preprocessing: 64x64 RGB, four frames per step, up to 30 no-ops at the start of a game.

Optionally a step takes a random number of frames ("stochastic Atari").
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jedi_jax.envs import skipping
from jedi_jax.envs.pooled import Outcome, Pool, PooledEnv, import_envpool, open_pool, tasks
from jedi_jax.types import EnvSpec

FRAMES_PER_STEP = 4
MAX_EPISODE_STEPS = 27_000
"""Default time limit of a game in steps: 108,000 frames, 30 minutes of play."""

# Equal to DIAMOND's preprocessing byte for byte. Each entry differs from EnvPool's default or pins it. `episodic_life`
# is off because it spends a step and up to 30 no-ops at every lost life.
_CONFIG: Mapping[str, Any] = {
  "img_height": 64,
  "img_width": 64,
  "stack_num": 1,
  "gray_scale": False,
  "use_inter_area_resize": True,
  "frame_skip": FRAMES_PER_STEP,
  "noop_max": 30,
  "use_fire_reset": False,
  "episodic_life": False,
  "reward_clip": False,
  "repeat_action_probability": 0.0,
  "full_action_space": False,
}

# Single full-size frames, from which `SkippingPool` composes steps.
_FRAME_BY_FRAME = {
  **_CONFIG,
  "img_height": skipping.SCREEN[0],
  "img_width": skipping.SCREEN[1],
  "frame_skip": 1,
}


def games() -> tuple[str, ...] | None:
  """Returns EnvPool's Atari games, sorted, in its spelling (`Breakout`, `MsPacman`); None without EnvPool."""
  return tasks("envpool.atari", "-v5")


@functools.cache
def game_spec(game: str) -> EnvSpec:
  """Returns the minimal action set and observation shape (64, 64, 3) of a game; starts no emulator threads."""
  pool_spec = import_envpool().make_spec(f"{game}-v5", **_CONFIG)
  channels, height, width = pool_spec.observation_space.shape
  return EnvSpec(num_actions=int(pool_spec.action_space.n), observation_shape=(height, width, channels))


class AtariEnv(PooledEnv):
  """N copies of an Atari game; see `jedi_jax.types.VectorEnv` and `PooledEnv`.

  Observations are [N, 64, 64, 3] uint8 RGB. A step repeats the action for four frames; its observation is the maximum
  of the last two. Rewards are raw. The same seed and actions give the same games, random skips included.

  Args:
    game: one of `games()`; `jedi_jax.envs.make` checks it.
    num_envs: N >= 1.
    seed: environment i is seeded with `seed + i`; keep the ranges of training and evaluation disjoint.
    life_loss_ends: whether a lost life ends the training episode (`EnvStep.end`); the game continues. For training
      only: evaluation plays whole games.
    max_episode_steps: steps after which a game is truncated; None means 27,000 (108,000 frames).
    num_threads: emulator threads; 0 lets EnvPool choose.
    skip: (low, high): the frames of each step of each environment are drawn uniformly from low to high; see
      `SkippingPool`. None means four frames and gives the same games as (4, 4).

  Raises:
    UserError: a number is out of its range, or EnvPool is not installed.
  """

  frames_per_step = FRAMES_PER_STEP

  def __init__(
    self,
    game: str,
    *,
    num_envs: int,
    seed: int,
    life_loss_ends: bool,
    max_episode_steps: int | None = None,
    num_threads: int = 0,
    skip: tuple[int, int] | None = None,
  ) -> None:
    limit = MAX_EPISODE_STEPS if max_episode_steps is None else max_episode_steps
    common: dict[str, Any] = {"num_envs": num_envs, "seed": seed, "num_threads": num_threads}
    pool: Pool
    if skip is None:
      pool = open_pool(f"{game}-v5", max_episode_steps=limit, **common, **_CONFIG)
    else:
      frames = open_pool(f"{game}-v5", max_episode_steps=skipping.NO_LIMIT, **common, **_FRAME_BY_FRAME)
      pool = skipping.SkippingPool(frames, num_envs=num_envs, seed=seed, skip=skip, max_episode_steps=limit)
      self.frames_per_step = skip[1]
    super().__init__(pool, num_envs=num_envs, spec=game_spec(game))
    self._life_loss_ends = life_loss_ends
    self._fewest_lives = np.zeros(num_envs, np.int32)

  def _begin(self, env_ids: np.ndarray, info: Mapping[str, np.ndarray]) -> None:
    self._fewest_lives[env_ids] = info["lives"]

  def _outcome(
    self, reward: np.ndarray, done: np.ndarray, truncated: np.ndarray, info: Mapping[str, np.ndarray]
  ) -> Outcome:
    del reward  # `info["reward"]` is never clipped.
    # EnvPool flags a game that ends on the step of the time limit as truncated; `info["terminated"]` is exact.
    end = info["terminated"] != 0
    truncated = done & ~end
    # Compared with the fewest lives of this game, not with the previous step: losing a life that the game had granted
    # is no end.
    if self._life_loss_ends:
      end |= info["lives"] < self._fewest_lives
    self._fewest_lives = np.minimum(self._fewest_lives, info["lives"])
    return Outcome(reward=info["reward"], end=end, truncated=truncated, game_over=done)
