"""gymnax environments whose observations are images and whose actions are discrete, among them the MinAtar games.

gymnax is an optional dependency, imported when an environment is first looked up. The table of MinAtar's specs needs no
import.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jedi_jax.envs.pooled import check_actions, check_numbers
from jedi_jax.errors import UserError
from jedi_jax.types import Array, EnvSpec, EnvStep

MINATAR: Mapping[str, EnvSpec] = {
  "Asterix": EnvSpec(5, (10, 10, 4)),
  "Breakout": EnvSpec(3, (10, 10, 4)),
  "Freeway": EnvSpec(3, (10, 10, 7)),
  "Seaquest": EnvSpec(6, (10, 10, 10)),
  "SpaceInvaders": EnvSpec(4, (10, 10, 6)),
}
"""Minimal action set and observation shape of each MinAtar game: boards of 10 x 10 cells with one binary channel for
each kind of object. gymnax's id is `<game>-MinAtar`."""

_MIN_SIDE = 24
"""Both sides of an image have at least so many pixels, unless a scale is given."""
_NO_LIMIT = 2**31 - 1


def import_gymnax() -> Any:
  """Imports gymnax; this module alone does so, and not before an environment is looked up.

  Raises:
    UserError: it cannot be imported.
  """
  try:
    import gymnax
  except Exception as error:  # A version of JAX that gymnax does not support raises other errors than ImportError.
    reason = " ".join(str(error).split())
    raise UserError(
      f"environments minatar/<Game> and gymnax/<Id> need gymnax ({reason}): pip install gymnax six"
    ) from None
  return gymnax


def ids() -> tuple[str, ...]:
  """Returns the ids that are registered with gymnax now, in order of registration.

  Raises:
    UserError: gymnax is not installed.
  """
  return tuple(import_gymnax().registered_envs)


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


class _Game(NamedTuple):
  """An environment of gymnax and how its observations become images.

  Attributes:
    env: gymnax's environment.
    params: gymnax's default parameters of it.
    num_actions: A.
    shape: (H, W, C) of the observations.
    low: lowest value of an observation.
    high: highest value of an observation.
    scale: pixels of the image for each pixel of the observation, along both axes, unless another scale is given.
  """

  env: Any
  params: Any
  num_actions: int
  shape: tuple[int, int, int]
  low: float
  high: float
  scale: int


class _Programs(NamedTuple):
  """Compiled functions of an environment, over N copies; JAX compiles them once for each N.

  Attributes:
    reset: maps keys [N] to `_Running` and first observations.
    step: maps `_Running`, actions [N] int32, the probability of a sticky action and the time limit to `_Running` and
      the fields of `EnvStep` in order.
    device: the CPU device that holds all arrays.
  """

  reset: Callable[..., tuple[_Running, Array]]
  step: Callable[..., tuple[_Running, tuple[Array, ...]]]
  device: Any


class GymnaxEnv:
  """N copies of a gymnax environment, stepped by one compiled program on the CPU; see `jedi_jax.types.VectorEnv`.

  Observations are [N, H, W, C] uint8: the bounds of gymnax's observation space become 0 and 255. Rewards are raw.
  Environment i draws all of its randomness from its own key, so that its games depend on `seed + i` and its actions
  only, and not on N.

  Args:
    env_id: an id that is registered with gymnax, such as `Pong-misc`.
    num_envs: N >= 1.
    seed: environment i is seeded with `seed + i`; keep the ranges of training and evaluation disjoint.
    max_episode_steps: steps after which a game is truncated. It only lowers gymnax's limit, such as 1,000 steps in most
      MinAtar games, so that one setting suits the evaluation of all games; None means that limit.
    sticky: probability in [0, 1) that a step repeats the previous action of the game, action 0 at its start, in place
      of the given one. Action 0 is the no-op in MinAtar.
    scale: pixels of the image for each pixel of the observation, along both axes; None means the smallest number that
      makes both sides of the image even and at least 24.
    life_loss_ends: no effect; games have one life.
    num_threads: no effect.

  Raises:
    UserError: a number is out of its range, gymnax is not installed, the environment cannot be made, its observations
      are no images, its actions are not discrete, or JAX has no CPU backend.
  """

  def __init__(
    self,
    env_id: str,
    *,
    num_envs: int,
    seed: int,
    max_episode_steps: int | None = None,
    sticky: float = 0.0,
    scale: int | None = None,
    life_loss_ends: bool = False,
    num_threads: int = 0,
  ) -> None:
    del life_loss_ends, num_threads
    check_numbers(num_envs, seed, max_episode_steps)
    if not 0 <= sticky < 1:
      raise UserError(f"sticky is {sticky}; it must be a probability in [0, 1)")
    self.num_envs = num_envs
    self.spec = game_spec(env_id, scale=scale)
    self.frames = 0
    self._programs = _programs(env_id, scale or _game(env_id).scale)
    seeds = jax.device_put(np.arange(seed, seed + num_envs, dtype=np.int32), self._programs.device)
    self._keys = jax.vmap(functools.partial(jax.random.key, impl="threefry2x32"))(seeds)
    self._running: _Running | None = None
    self._sticky = np.float32(sticky)
    self._limit = np.int32(min(max_episode_steps or _NO_LIMIT, _NO_LIMIT))

  def reset(self) -> np.ndarray:
    """Begins a new game in every environment; returns observations [N, H, W, C] uint8."""
    self._running, observation = self._programs.reset(self._keys if self._running is None else self._running.key)
    return np.asarray(observation)

  def step(self, actions: np.ndarray) -> EnvStep:
    """Takes one step in every environment and restarts finished games; actions [N] integers."""
    actions = check_actions(actions, self.num_envs, self.spec.num_actions)
    self._running, result = self._programs.step(self._running, actions, self._sticky, self._limit)
    self.frames += self.num_envs
    return EnvStep(*map(np.asarray, result))

  def close(self) -> None:
    """Does nothing; the arrays go with the environment."""


def game_spec(env_id: str, *, sticky: float = 0.0, scale: int | None = None) -> EnvSpec:
  """Returns the number of actions and the shape of the images of an environment; no game is started.

  Raises:
    UserError: see `GymnaxEnv`.
  """
  del sticky
  game = _game(env_id)
  height, width, channels = game.shape
  scale = scale or game.scale
  return EnvSpec(game.num_actions, (height * scale, width * scale, channels))


@functools.cache
def _game(env_id: str) -> _Game:
  gymnax, name = import_gymnax(), f"environment gymnax/{env_id}"
  with jax.default_device(_cpu()):
    try:
      env, params = gymnax.make(env_id)
      observations, actions = env.observation_space(params), env.action_space(params)
    except Exception as error:  # The functions that make environments raise errors of many types.
      reason = " ".join(str(error).split())[:200] or type(error).__name__
      raise UserError(f"{name} cannot be made: {reason}") from None
    spaces = gymnax.environments.spaces
    if not isinstance(actions, spaces.Discrete):
      raise UserError(f"{name}: its actions are not discrete; choose one with a space Discrete(n)")
    shape = tuple(getattr(observations, "shape", ()))
    if not isinstance(observations, spaces.Box) or len(shape) not in (2, 3) or min(shape[:2]) < 2:
      raise UserError(
        f"{name}: its observations are no images but have the shape {shape}; choose one with a Box of "
        "(height, width, channels) or (height, width)"
      )
    low, high = float(np.min(observations.low)), float(np.max(observations.high))
  if not 0 < high - low < math.inf:
    raise UserError(f"{name}: its observations are no images, since their values have no finite bounds")
  height, width, channels = (*shape, 1)[:3]
  scale = next(
    n for n in range(1, 2 * _MIN_SIDE) if all(s * n >= _MIN_SIDE and s * n % 2 == 0 for s in (height, width))
  )
  return _Game(env, params, int(actions.n), (height, width, channels), low, high, scale)


@functools.cache
def _programs(env_id: str, scale: int) -> _Programs:
  """Builds the programs of a game once per process, so that training and evaluation with the same N share them."""
  game, device = _game(env_id), _cpu()
  env, params = game.env, game.params

  def image(observation: Array) -> Array:
    unit = (observation.reshape(game.shape).astype(jnp.float32) - game.low) / (game.high - game.low)
    pixels = jnp.round(255 * jnp.clip(unit, 0, 1)).astype(jnp.uint8)
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)

  def reset(key: Array) -> tuple[_Running, Array]:
    key, key_reset = jax.random.split(key)
    observation, state = env.reset_env(key_reset, params)
    # Python numbers become arrays, so that the first step has the types of later ones.
    state = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), state)
    return _Running(key, state, jnp.int32(0)), image(observation)

  def step(running: _Running, action: Array, sticky: Array, limit: Array) -> tuple[_Running, tuple[Array, ...]]:
    key, key_game, key_sticky = jax.random.split(running.key, 3)
    key_step, key_reset = jax.random.split(key_game)  # As gymnax's `step` does with its key.
    action = jnp.where(jax.random.uniform(key_sticky) < sticky, running.action, action)
    last, state, reward, end, _ = env.step_env(key_step, running.state, action, params)
    end = jnp.asarray(end, bool)
    truncated = (env.is_truncated(state, params) | (state.time >= limit)) & ~end
    game_over = end | truncated
    first, fresh = env.reset_env(key_reset, params)
    old = running.state
    state = jax.tree.map(lambda a, b, c: jnp.where(game_over, a, b).astype(c.dtype), fresh, state, old)
    action = jnp.where(game_over, 0, action)
    images = image(last), image(jnp.where(game_over, first, last))
    return _Running(key, state, action), (*images, jnp.float32(reward), end, truncated, game_over)

  return _Programs(jax.jit(jax.vmap(reset)), jax.jit(jax.vmap(step, in_axes=(0, 0, None, None))), device)


def _cpu() -> Any:
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    raise UserError("gymnax's games run on the CPU, which JAX_PLATFORMS excludes: add cpu to it") from None
