"""MinAtar games of gymnax: boards of 10 x 10 cells with one binary channel for each kind of object.

gymnax is an optional dependency, imported when a game is first made. The table of specs needs no import.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jedi_jax.envs.pooled import check_actions, check_numbers
from jedi_jax.errors import UserError
from jedi_jax.types import Array, EnvSpec, EnvStep

SPECS: Mapping[str, EnvSpec] = {
  "Asterix": EnvSpec(5, (10, 10, 4)),
  "Breakout": EnvSpec(3, (10, 10, 4)),
  "Freeway": EnvSpec(3, (10, 10, 7)),
  "Seaquest": EnvSpec(6, (10, 10, 10)),
  "SpaceInvaders": EnvSpec(4, (10, 10, 6)),
}
"""Minimal action set and observation shape of each game."""


def import_gymnax() -> Any:
  """Imports gymnax; this module alone does so, and not before a game is made.

  Raises:
    UserError: it cannot be imported.
  """
  try:
    import gymnax
  except Exception as error:  # A version of JAX that gymnax does not support raises other errors than ImportError.
    raise UserError(f"the MinAtar games need gymnax ({error}): pip install gymnax six") from None
  return gymnax


class _Running(NamedTuple):
  """State of one game.

  Attributes:
    key: random key of the environment's later steps.
    state: gymnax's state.
    action: [] int32; the action that the game took last, 0 at its start.
  """

  key: Array
  state: Any
  action: Array


class _Programs(NamedTuple):
  """Compiled functions of a game, over N environments; JAX compiles them once for each N.

  Attributes:
    reset: maps keys [N] to `_Running` and first observations.
    step: maps `_Running`, actions [N] int32, the probability of a sticky action and the time limit to `_Running` and
      the fields of `EnvStep` in order.
    limit: gymnax's time limit in steps.
    device: the CPU device that holds all arrays.
  """

  reset: Callable[..., tuple[_Running, Array]]
  step: Callable[..., tuple[_Running, tuple[Array, ...]]]
  limit: int
  device: Any


class MinAtarEnv:
  """N copies of a MinAtar game, stepped by one compiled program on the CPU; see `jedi_jax.types.VectorEnv`.

  Observations are [N, 10, 10, C] uint8, 0 or 255. Rewards are raw. Environment i draws all of its randomness from its
  own key, so that its games depend on `seed + i` and its actions only, and not on N.

  Args:
    game: a key of `SPECS`.
    num_envs: N >= 1.
    seed: environment i is seeded with `seed + i`; keep the ranges of training and evaluation disjoint.
    max_episode_steps: steps after which a game is truncated. It only lowers gymnax's limit, 1,000 steps (2,500 in
      Freeway), so that one setting suits the evaluation of all games; None means that limit.
    sticky: probability in [0, 1) that a step repeats the previous action of the game, action 0 (no-op) at its start,
      in place of the given one.
    life_loss_ends: no effect; games have one life.
    num_threads: no effect.

  Raises:
    UserError: a number is out of its range, gymnax is not installed, or JAX has no CPU backend.
  """

  def __init__(
    self,
    game: str,
    *,
    num_envs: int,
    seed: int,
    max_episode_steps: int | None = None,
    sticky: float = 0.0,
    life_loss_ends: bool = False,
    num_threads: int = 0,
  ) -> None:
    del life_loss_ends, num_threads
    check_numbers(num_envs, seed, max_episode_steps)
    if not 0 <= sticky < 1:
      raise UserError(f"sticky is {sticky}; it must be a probability in [0, 1)")
    self.num_envs = num_envs
    self.spec = SPECS[game]
    self.frames = 0
    self._programs = _programs(game)
    seeds = jax.device_put(np.arange(seed, seed + num_envs, dtype=np.int32), self._programs.device)
    self._keys = jax.vmap(functools.partial(jax.random.key, impl="threefry2x32"))(seeds)
    self._running: _Running | None = None
    self._sticky = np.float32(sticky)
    self._limit = np.int32(min(self._programs.limit, max_episode_steps or self._programs.limit))

  def reset(self) -> np.ndarray:
    """Begins a new game in every environment; returns observations [N, 10, 10, C] uint8."""
    keys = self._keys if self._running is None else self._running.key
    self._running, observation = self._programs.reset(keys)
    return np.asarray(observation)

  def step(self, actions: np.ndarray) -> EnvStep:
    """Takes one step in every environment and restarts finished games; actions [N] integers."""
    actions = check_actions(actions, self.num_envs, self.spec.num_actions)
    self._running, result = self._programs.step(self._running, actions, self._sticky, self._limit)
    self.frames += self.num_envs
    return EnvStep(*map(np.asarray, result))

  def close(self) -> None:
    """Does nothing; the arrays go with the environment."""


@functools.cache
def _programs(game: str) -> _Programs:
  """Builds the programs of a game once per process, so that training and evaluation with the same N share them."""
  device = _cpu()
  with jax.default_device(device):
    env = getattr(import_gymnax().environments, f"Min{game}")()
    params = env.default_params

  def reset(key: Array) -> tuple[_Running, Array]:
    key, key_reset = jax.random.split(key)
    observation, state = env.reset_env(key_reset, params)
    # Python numbers become arrays, so that the first step has the types of later ones.
    state = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), state)
    return _Running(key, state, jnp.int32(0)), _image(observation)

  def step(running: _Running, action: Array, sticky: Array, limit: Array) -> tuple[_Running, tuple[Array, ...]]:
    key, key_game, key_sticky = jax.random.split(running.key, 3)
    key_step, key_reset = jax.random.split(key_game)  # As gymnax's `step` does with its key.
    action = jnp.where(jax.random.uniform(key_sticky) < sticky, running.action, action)
    last, state, reward, end, _ = env.step_env(key_step, running.state, action, params)
    truncated = (state.time >= limit) & ~end
    game_over = end | truncated
    first, fresh = env.reset_env(key_reset, params)
    old = running.state
    state = jax.tree.map(lambda a, b, c: jnp.where(game_over, a, b).astype(c.dtype), fresh, state, old)
    action = jnp.where(game_over, 0, action)
    observation = jnp.where(game_over, first, last)
    return _Running(key, state, action), (_image(last), _image(observation), reward, end, truncated, game_over)

  return _Programs(
    jax.jit(jax.vmap(reset)), jax.jit(jax.vmap(step, in_axes=(0, 0, None, None))), params.max_steps_in_episode, device
  )


def _cpu() -> Any:
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    raise UserError("the MinAtar games run on the CPU, which JAX_PLATFORMS excludes: add cpu to it") from None


def _image(observation: Array) -> Array:
  """Maps gymnax's observation of 0 and 1 to uint8 0 and 255."""
  return jnp.where(observation > 0, jnp.uint8(255), jnp.uint8(0))
