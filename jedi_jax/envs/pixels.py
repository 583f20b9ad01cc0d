"""EnvPool's pixel families beside Atari: Procgen, ViZDoom, and MiniGrid drawn as images."""

import functools
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jedi_jax.envs.pooled import Outcome, PartialPool, PooledEnv, check_numbers, import_envpool, open_pool, tasks
from jedi_jax.errors import UserError
from jedi_jax.types import EnvSpec

SIZE = 64
"""Height and width of the observations."""


class Family(NamedTuple):
  """A family of EnvPool's tasks.

  Attributes:
    package: EnvPool's package of the family.
    prefix: how the names of its tasks begin.
    suffix: how they end; not part of our names.
    options: EnvPool's settings of every task.
    drawn: whether images are drawn, since the observations are none.
    frames_per_step: game frames in one step.
    without: tasks that are left out, in our names.
    folder: a folder that each game makes in the current one, unless it is there; games that start at once and make it
      both crash, or hang, so that it is made before.
  """

  package: str
  options: Mapping[str, Any]
  prefix: str = ""
  suffix: str = ""
  drawn: bool = False
  frames_per_step: int = 1
  without: tuple[str, ...] = ()
  folder: str = ""

  def names(self) -> tuple[str, ...] | None:
    """Returns the names of the tasks, sorted; None without EnvPool."""
    found = tasks(self.package, self.suffix)
    return found and tuple(name for name in found if name.startswith(self.prefix) and name not in self.without)


# EnvPool's rewards, without those of ammunition and of the weapon in hand: they are as frequent as steps, and the world
# model predicts signs of rewards.
_DOOM_REWARDS = {
  "KILLCOUNT": (1.0, 0.0),
  "FRAGCOUNT": (1.0, -1.5),
  "DEATHCOUNT": (-0.75, 0.75),
  "HITCOUNT": (0.01, -0.01),
  "DAMAGECOUNT": (0.003, -0.003),
  "HEALTH": (0.005, -0.003),
  "ARMOR": (0.005, -0.001),
}

FAMILIES: Mapping[str, Family] = {
  "procgen": Family("envpool.procgen", {}, suffix="-v0"),
  "vizdoom": Family(
    "envpool.vizdoom",
    {
      "img_height": SIZE,
      "img_width": SIZE,
      "stack_num": 1,
      "use_combined_action": True,  # Discrete actions: every combination of buttons.
      "use_inter_area_resize": True,
      "frame_skip": 4,
      "reward_config": _DOOM_REWARDS,
      "selected_weapon_reward_config": {},
    },
    suffix="-v1",
    frames_per_step=4,
    folder="_vizdoom",
    without=("VizdoomCustom", "Cig", "MultiDuel"),  # No scenario of its own; games of several players.
  ),
  "minigrid": Family("envpool.minigrid", {}, prefix="MiniGrid-", drawn=True),
}
"""The families by the first part of their environments' names."""


class DrawnPool:
  """A `jedi_jax.envs.pooled.Pool` whose observations [K, 3, 64, 64] uint8 are EnvPool's drawings of the games.

  Args:
    pool: a pool with `render_mode="rgb_array"` and this size, before its first reset.
  """

  def __init__(self, pool: Any) -> None:
    self._pool = pool

  def reset(self, env_id: np.ndarray) -> tuple[np.ndarray, Mapping[str, Any]]:
    """Starts new games in the environments `env_id` [K] int32; returns their drawings and info."""
    _, info = self._pool.reset(env_id)
    return self._draw(info), info

  def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Mapping[str, Any]]:
    """Steps all N; a game that ended is drawn in its final state."""
    _, reward, terminated, truncated, info = self._pool.step(action)
    return self._draw(info), reward, terminated, truncated, info

  def close(self) -> None:
    """Closes the wrapped pool."""
    self._pool.close()

  def _draw(self, info: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(self._pool.render(info["env_id"])).transpose(0, 3, 1, 2)


class PixelEnv(PooledEnv):
  """N copies of a task of one of `FAMILIES`; see `jedi_jax.types.VectorEnv` and `PooledEnv`.

  Observations are [N, 64, 64, C] uint8: RGB, or grey in those ViZDoom scenarios that are configured so. Ends and
  truncations are EnvPool's, with `max_episode_steps` beside its own limits.

  Args:
    family: a key of `FAMILIES`.
    name: one of the family's `names()`; `jedi_jax.envs.make` checks it.
    num_envs: N >= 1.
    seed: environment i is seeded with `seed + i`; keep the ranges of training and evaluation disjoint.
    max_episode_steps: steps after which a game is truncated; None leaves that to EnvPool's limit of the task, which it
      never raises. A game that ends on that step is not truncated.
    num_threads: threads; 0 lets EnvPool choose.
    life_loss_ends: no effect; games have one life.

  Raises:
    UserError: a number is out of its range, EnvPool is not installed, or the system lacks what the family needs.
  """

  def __init__(
    self,
    family: str,
    name: str,
    *,
    num_envs: int,
    seed: int,
    max_episode_steps: int | None = None,
    num_threads: int = 0,
    life_loss_ends: bool = False,
  ) -> None:
    del life_loss_ends
    check_numbers(num_envs, seed, max_episode_steps)
    own = FAMILIES[family]
    spec = task_spec(family, name)  # First, since it reports what is missing.
    if own.folder:
      _make_folder(own.folder, f"{family}/{name}")
    pool: PartialPool | DrawnPool = open_pool(
      name + own.suffix,
      num_envs=num_envs,
      seed=seed,
      num_threads=num_threads,
      max_episode_steps=None,
      **own.options,
      **({"render_mode": "rgb_array", "render_width": SIZE, "render_height": SIZE} if own.drawn else {}),
    )
    super().__init__(DrawnPool(pool) if own.drawn else pool, num_envs=num_envs, spec=spec)
    self.frames_per_step = own.frames_per_step
    self._limit = math.inf if max_episode_steps is None else max_episode_steps

  def _outcome(
    self, reward: np.ndarray, done: np.ndarray, truncated: np.ndarray, info: Mapping[str, np.ndarray]
  ) -> Outcome:
    end = done & ~truncated
    truncated = (truncated | (info["elapsed_step"] >= self._limit)) & ~end  # Procgen ignores a limit of ours.
    return Outcome(reward=reward, end=end, truncated=truncated, game_over=end | truncated)


def _make_folder(folder: str, env: str) -> None:
  try:
    os.makedirs(folder, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"environment {env} cannot be made: it writes to the current folder ({error.strerror}); run it in another"
    ) from None


@functools.cache
def task_spec(family: str, name: str) -> EnvSpec:
  """Returns the number of actions and the shape of the observations of a task; starts no game.

  Raises:
    UserError: EnvPool is not installed, or the system lacks what the family needs.
  """
  own = FAMILIES[family]
  try:
    spec = import_envpool().make_spec(name + own.suffix, **own.options)
  except (ImportError, RuntimeError) as error:
    raise UserError(f"environment {family}/{name} cannot be made: {' '.join(str(error).split())}") from None
  channels = 3 if own.drawn else spec.observation_space.shape[0]
  return EnvSpec(int(spec.action_space.n), (SIZE, SIZE, channels))
