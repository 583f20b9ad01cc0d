"""Atari games, preprocessed as DIAMOND does: 64x64 RGB, four frames a step, up to 30 no-ops at the start of a game.

On request a step takes a random number of frames instead ("stochastic Atari").
"""

from collections.abc import Mapping
from typing import Any

import envpool
import numpy as np
from envpool.registration import registry as _envpool_registry

from jedi_jax.envs import skipping
from jedi_jax.envs.pooled import Outcome, Pool, PooledEnv, open_pool
from jedi_jax.types import EnvSpec

FRAMES_PER_STEP = 4
MAX_EPISODE_STEPS = 27_000
"""Steps after which a game is truncated: 108,000 frames, 30 minutes of play."""

# Equal to DIAMOND's preprocessing byte for byte. All of these differ from EnvPool's defaults or guard against a change
# of them; `episodic_life` stays off because it burns a step and up to 30 no-ops at every lost life.
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

# Whole frames, one by one, for the steps that `SkippingPool` puts together.
_FRAME_BY_FRAME = {
  **_CONFIG,
  "img_height": skipping.SCREEN[0],
  "img_width": skipping.SCREEN[1],
  "frame_skip": 1,
}


def games() -> tuple[str, ...]:
  """All Atari games that EnvPool offers, sorted, in its spelling (`Breakout`, `MsPacman`)."""
  # The version alone does not tell: MuJoCo's tasks end in -v5 as well.
  atari = (name for name, entry in _envpool_registry.specs.items() if entry[0] == "envpool.atari")
  return tuple(sorted(name.removesuffix("-v5") for name in atari if name.endswith("-v5")))


def game_spec(game: str) -> EnvSpec:
  """Minimal action set and observation shape (64, 64, 3) of one of `games()`; starts no emulator threads."""
  pool_spec = envpool.make_spec(f"{game}-v5", **_CONFIG)
  channels, height, width = pool_spec.observation_space.shape
  return EnvSpec(num_actions=int(pool_spec.action_space.n), observation_shape=(height, width, channels))


class AtariEnv(PooledEnv):
  """N copies of an Atari game; see `jedi_jax.types.VectorEnv` and `PooledEnv`.

  Observations are [N, 64, 64, 3] uint8 RGB; a step is four frames with the action held, of which the last two are
  pooled; rewards are raw. The same seed and the same actions give the same games, random skips included.

  Args:
    game: one of `games()`; `jedi_jax.envs.make` checks it.
    num_envs: N >= 1.
    seed: environment i is seeded with `seed + i`; keep the ranges of training and evaluation apart.
    life_loss_ends: whether a lost life ends the training episode (`EnvStep.end`); the game itself goes on. For
      training only: evaluation plays whole games.
    max_episode_steps: steps after which a game is truncated; None means 27,000 (108,000 frames).
    num_threads: emulator threads; 0 leaves the choice to EnvPool.
    skip: (low, high): a step takes a number of frames drawn uniformly from low to high, for every step and environment
      anew; see `SkippingPool`. (4, 4) gives the same games as None, which stands for four.

  Raises:
    UserError: a number is out of its range.
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

  def _images(self, raw: np.ndarray, env_ids: np.ndarray) -> np.ndarray:
    del env_ids
    return np.ascontiguousarray(raw.transpose(0, 2, 3, 1))

  def _begin(self, env_ids: np.ndarray, info: Mapping[str, np.ndarray]) -> None:
    self._fewest_lives[env_ids] = info["lives"]

  def _outcome(self, reward: np.ndarray, done: np.ndarray, info: Mapping[str, np.ndarray]) -> Outcome:
    del reward  # The info has it too, and raw whatever the configuration says of clipping.
    # A game that is won or lost on the very step of the time limit is `truncated` in EnvPool's flags; the info knows.
    end = info["terminated"] != 0
    truncated = done & ~end
    # Against the fewest lives of this game, not those of the step before: where a game grants a life, losing it again
    # ends nothing.
    if self._life_loss_ends:
      end |= info["lives"] < self._fewest_lives
    self._fewest_lives = np.minimum(self._fewest_lives, info["lives"])
    return Outcome(reward=info["reward"], end=end, truncated=truncated, game_over=done)
