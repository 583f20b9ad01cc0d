"""Collects environment steps with the current policy and adds them to replay."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jedi_jax import replay as replay_lib
from jedi_jax.errors import UserError
from jedi_jax.types import EnvStep, LstmState, VectorEnv

CHUNK_SLOTS = 128
"""Slots per stream of one transfer to the device."""


class Collected(NamedTuple):
  """Statistics of one collection.

  Attributes:
    steps: environment steps taken, over all environments.
    returns: raw returns of the games that ended, each over all of its lives.
    lengths: their lengths in steps.
    reward_counts: numbers of steps with negative, zero and positive reward.
  """

  steps: int
  returns: list[float]
  lengths: list[int]
  reward_counts: tuple[int, int, int]


class Collector:
  """Steps the environments and logs the actions, so that a resumed run continues exactly.

  Emulators cannot be saved, but they are deterministic: a resumed run repeats the logged actions. Where an environment
  does not promise to repeat itself (`repeatable` of `VectorEnv`), the run goes on with new games if it does not.

  Args:
    env: N environments; they are reset here.
    act: (parameters, observations, state, restart, key, count, epsilon) -> (actions, state), compiled.
    initial_state: policy state of all environments before the first step.
    seed: seed of exploration and sampled actions.
    epsilon: environment steps so far -> probability of a uniform action.
    max_calls: largest number of calls of `env.step`, each of which steps all environments.

  Raises:
    UserError: the observations of `env` do not match its spec. The first step checks the other arrays.
  """

  def __init__(
    self,
    env: VectorEnv,
    act: Callable[..., tuple[Any, LstmState]],
    *,
    initial_state: LstmState,
    seed: int,
    epsilon: Callable[[int], float],
    max_calls: int,
  ):
    self._env = env
    self._act = act
    self._key = jax.random.key(seed)
    self._epsilon = epsilon
    self._state = initial_state
    self._calls = 0
    self._not_repeated = 0  # Environment steps before the games of `env`.
    self._log = np.zeros((max_calls, env.num_envs), np.min_scalar_type(env.spec.num_actions - 1))
    self._returns = np.zeros(env.num_envs)
    self._lengths = np.zeros(env.num_envs, np.int64)
    self._restart = np.ones(env.num_envs, bool)
    self._observations = env.reset()
    self._check("reset", "observations", self._observations)

  @property
  def env_steps(self) -> int:
    """Environment steps taken, over all environments."""
    return self._calls * self._env.num_envs

  @property
  def frames(self) -> int:
    """Game frames of these steps; steps that the environments did not repeat count as one frame each."""
    return self._env.frames + self._not_repeated

  @property
  def repeats(self) -> bool:
    """Whether `restore` repeats steps; it begins new games at once where the environments never repeat themselves."""
    return getattr(self._env, "repeatable", True) is not False

  def collect(
    self,
    params: Any,
    replay: Any,
    add: Callable[[Any, replay_lib.Chunk], Any],
    steps: int,
    check: Callable[[], None] = lambda: None,
  ) -> tuple[Any, Collected]:
    """Takes environment steps.

    Args:
      params: passed to `act`.
      replay: passed to `add`.
      add: (replay, `Chunk`) -> replay.
      steps: environment steps, a multiple of the number of environments.
      check: called after each step of all environments; may raise to stop the collection.

    Returns:
      The replay after the last `add`, and the statistics.

    Raises:
      UserError: an array of the environments' first step has a wrong shape or dtype.
    """
    num_envs = self._env.num_envs
    writer = replay_lib.ChunkWriter(
      num_streams=num_envs,
      size=CHUNK_SLOTS,
      observation_shape=self._env.spec.observation_shape,
      starts=self._restart,
    )
    returns: list[float] = []
    lengths: list[int] = []
    signs = np.zeros(3, np.int64)
    for _ in range(0, steps, num_envs):
      epsilon = np.float32(self._epsilon(self.env_steps))
      chosen, self._state = self._act(
        params, self._observations, self._state, self._restart, self._key, np.uint32(self._calls), epsilon
      )
      actions = np.asarray(chosen)
      observations = self._observations
      step = self._step(actions, returns, lengths)
      if not np.isfinite(step.reward).all():
        raise UserError("the environment's step returned a reward that is not finite: return finite numbers")
      signs += np.bincount(np.sign(step.reward).astype(np.int64) + 1, minlength=3)
      writer.add(observations, actions, step.reward, step.end, step.truncated, step.next_observation)
      if writer.is_full:
        replay = add(replay, writer.flush())
      check()
    replay = add(replay, writer.flush())
    return replay, Collected(steps, returns, lengths, (int(signs[0]), int(signs[1]), int(signs[2])))

  def _step(self, actions: np.ndarray, returns: list[float], lengths: list[int]) -> EnvStep:
    """Steps the environments, logs the actions, and appends the returns and lengths of games that ended."""
    self._log[self._calls] = actions
    step = self._env.step(actions)
    if not self._calls:
      for name, array in step._asdict().items():
        self._check("step", name, array)
      if np.may_share_memory(step.next_observation, self._observations):
        raise UserError("the environment's step returned an array that it had returned before; return a new one")
    self._calls += 1
    self._returns += step.reward
    self._lengths += 1
    for i in np.flatnonzero(step.game_over):
      returns.append(float(self._returns[i]))
      lengths.append(int(self._lengths[i]))
    self._returns[step.game_over] = 0.0
    self._lengths[step.game_over] = 0
    self._observations = step.observation
    self._restart = step.end | step.truncated
    return step

  def _check(self, method: str, name: str, array: np.ndarray) -> None:
    """Raises a `UserError` if an array that the environment returned has a wrong shape or dtype."""
    shape: tuple[int, ...] = (self._env.num_envs,)
    dtype: type = np.float32 if name == "reward" else np.bool_
    if "observation" in name:
      shape, dtype = (*shape, *self._env.spec.observation_shape), np.uint8
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
      found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
      raise UserError(f"the environment's {method} returned {name} as {found}; expected {np.dtype(dtype)} {shape}")

  def save(self) -> dict[str, Any]:
    """Returns the state for `restore`: NumPy arrays of fixed shapes and dtypes."""
    return {
      "calls": np.asarray(self._calls, np.int32),
      "actions": self._log.copy(),
      "state": jax.tree.map(np.array, self._state),
      # Detects environments that are not deterministic.
      "observations": self._observations.copy(),
    }

  def restore(self, saved: Mapping[str, Any], check: Callable[[], None] = lambda: None) -> bool:
    """Continues from a saved state, in environments of the same seed that have taken no step.

    Args:
      saved: the result of `save`.
      check: called after each step of all environments; may raise to stop.

    Returns:
      Whether the games go on; if not, new ones have begun, and the unfinished ones stay in replay as they are.

    Raises:
      UserError: the environments promise to repeat themselves, and do not arrive at the same observations.
    """
    calls = int(saved["calls"])
    if self.repeats:
      for call in range(calls):
        self._step(saved["actions"][call].astype(np.int32), [], [])
        check()
      if np.array_equal(self._observations, saved["observations"]):
        self._state = LstmState(*saved["state"])
        return True
      if getattr(self._env, "repeatable", True):
        raise UserError(
          "the environment did not repeat its steps, so this run cannot be continued here: "
          "use the version of the environment that it was started with, and draw all of its randomness from its seed"
        )
    else:
      self._calls, self._not_repeated = calls, calls * self._env.num_envs
      self._log[:calls] = saved["actions"][:calls]
    if not calls:
      return True
    self._observations = self._env.reset()
    self._restart[:] = True
    self._returns[:], self._lengths[:] = 0.0, 0
    return False
