"""Collection: real steps under the current policy, into replay."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jedi_jax import replay as replay_lib
from jedi_jax.errors import UserError
from jedi_jax.types import LstmState, VectorEnv

CHUNK_SLOTS = 128
"""Slots of one transfer to the device."""


class Collected(NamedTuple):
  """What a collection met.

  Attributes:
    steps: environment steps taken, over all environments.
    returns: raw returns of the games that ended, each over all of its lives.
    lengths: their lengths in steps.
    reward_counts: steps with negative, zero and positive reward.
  """

  steps: int
  returns: list[float]
  lengths: list[int]
  reward_counts: tuple[int, int, int]


class Collector:
  """Steps the environments and remembers what is needed to continue exactly where it stopped.

  EnvPool cannot save its emulators, but they are deterministic: the actions taken so far are logged, and a resumed
  run takes them again.

  Args:
    env: the environments; they are reset here.
    act: (parameters, observations, state, restart, key, count, epsilon) -> (actions, state), compiled.
    initial_state: policy state of all environments before anything.
    seed: of exploration and sampled actions.
    epsilon: probability of a uniform action.
    max_calls: steps of all environments together that will ever be taken.
  """

  def __init__(
    self,
    env: VectorEnv,
    act: Callable[..., tuple[Any, LstmState]],
    *,
    initial_state: LstmState,
    seed: int,
    epsilon: float,
    max_calls: int,
  ):
    self._env = env
    self._act = act
    self._key = jax.random.key(seed)
    self._epsilon = np.float32(epsilon)
    self._state = initial_state
    self._calls = 0
    self._log = np.zeros((max_calls, env.num_envs), np.uint8)
    self._returns = np.zeros(env.num_envs)
    self._lengths = np.zeros(env.num_envs, np.int64)
    self._restart = np.ones(env.num_envs, bool)
    self._observations = env.reset()

  @property
  def env_steps(self) -> int:
    """Environment steps taken, over all environments."""
    return self._calls * self._env.num_envs

  def collect(
    self,
    params: Any,
    replay: Any,
    add: Callable[[Any, replay_lib.Chunk], Any],
    steps: int,
    check: Callable[[], None] = lambda: None,
  ) -> tuple[Any, Collected]:
    """Takes real steps.

    Args:
      params: passed to `act`.
      replay: passed to `add`.
      add: (replay, `Chunk`) -> replay.
      steps: environment steps, a multiple of the number of environments.
      check: called after each step of all environments; what it raises ends the collection there.

    Returns:
      The replay with everything added, and what happened.
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
      chosen, self._state = self._act(
        params, self._observations, self._state, self._restart, self._key, np.uint32(self._calls), self._epsilon
      )
      actions = np.asarray(chosen)
      observations = self._observations
      step = self._step(actions, returns, lengths)
      signs += np.bincount(np.sign(step.reward).astype(np.int64) + 1, minlength=3)
      writer.add(observations, actions, step.reward, step.end, step.truncated, step.next_observation)
      if writer.is_full:
        replay = add(replay, writer.flush())
      check()
    replay = add(replay, writer.flush())
    return replay, Collected(steps, returns, lengths, (int(signs[0]), int(signs[1]), int(signs[2])))

  def _step(self, actions: np.ndarray, returns: list[float], lengths: list[int]) -> Any:
    """Steps the environments, logs the actions, and appends the games that ended."""
    self._log[self._calls] = actions
    self._calls += 1
    step = self._env.step(actions)
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

  def save(self) -> dict[str, Any]:
    """Returns what `restore` needs, NumPy arrays of fixed shapes."""
    return {
      "calls": np.asarray(self._calls, np.int32),
      "actions": self._log.copy(),
      "state": jax.tree.map(np.array, self._state),
      # To notice an emulator that does not repeat itself.
      "observations": self._observations.copy(),
    }

  def restore(self, saved: Mapping[str, Any], check: Callable[[], None] = lambda: None) -> None:
    """Continues from `save`, on freshly reset environments of the same seed.

    Args:
      saved: what `save` returned.
      check: called after each step of all environments.

    Raises:
      UserError: if the environments do not lead to the same observations again.
    """
    for calls in range(int(saved["calls"])):
      self._step(saved["actions"][calls], [], [])
      check()
    if not np.array_equal(self._observations, saved["observations"]):
      raise UserError(
        "the environment did not repeat its steps, so this run cannot be continued here: "
        "use the EnvPool version that it was started with"
      )
    self._state = LstmState(*saved["state"])
