"""Acting with a trained model, and loading it from a run's directory."""

import operator
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jedi_jax.config import Config
from jedi_jax.errors import UserError
from jedi_jax.models.base import Build, Model
from jedi_jax.models.build import build as build_model
from jedi_jax.runs import checkpoint, workdir
from jedi_jax.types import Array, LstmState, Policy

Act = Callable[..., tuple[Array, LstmState]]


def make_act(model: Model) -> Act:
  """Builds the pure function that samples actions.

  Args:
    model: the composed model.

  Returns:
    (parameters, observations [N, H, W, C] uint8, state, restart [N] bool, key, count [] uint32, epsilon []) -> (actions
    [N] int32, state). The state is cleared first where `restart` is true. An action is uniform with probability
    epsilon, otherwise it is sampled from the policy. `count` is folded into the key, so that a loop can pass the same
    key with the number of the step.
  """

  def act(
    params: dict[str, Any],
    observations: Array,
    state: LstmState,
    restart: Array,
    key: Array,
    count: Array,
    epsilon: Array,
  ) -> tuple[Array, LstmState]:
    state = jax.tree.map(lambda x: jnp.where(restart[:, None], 0.0, x), state)
    logits, _, state = model.policy(params, observations, state)
    policy_key, explore_key, uniform_key = jax.random.split(jax.random.fold_in(key, count), 3)
    action = jax.random.categorical(policy_key, logits)
    explore = jax.random.bernoulli(explore_key, epsilon, action.shape)
    uniform = jax.random.randint(uniform_key, action.shape, 0, model.num_actions(params))
    return jnp.where(explore, uniform, action).astype(jnp.int32), state

  return act


class Agent:
  """A model and its parameters, ready to act.

  Args:
    model: the composed model.
    params: parameters by component; host arrays are moved to the default device. Acting uses 'encoder' and
      'actor_critic'.
    config: the configuration of the run; acting does not use it.
  """

  def __init__(self, model: Model, params: dict[str, Any], config: Config | None = None):
    self.model = model
    self.params = jax.device_put(params)  # Once, not at every call.
    self.config = config
    self._act = jax.jit(make_act(model))

  def initial_state(self, batch: int) -> LstmState:
    """Returns the recurrent state at the start of an episode, for `batch` environments."""
    return self.model.initial_state(batch)

  def act(
    self,
    observations: Any,
    state: LstmState,
    key: Array,
    *,
    count: int = 0,
    restart: Any = None,
    epsilon: float = 0.0,
  ) -> tuple[Array, LstmState]:
    """Samples one action for each environment.

    Args:
      observations: [N, H, W, C] uint8.
      state: from `initial_state` or the previous call.
      key: random key. Use each pair of key and `count` once.
      count: integer in [0, 2**32), such as the number of the step.
      restart: [N] bool; true where an episode begins, which clears the state. None for all false.
      epsilon: probability of a uniform action, in [0, 1].

    Returns:
      Actions [N] int32 and the new state.

    Raises:
      UserError: if observations have the wrong shape or dtype, or the state is of another number of environments.
      OverflowError: if `count` is out of range.
      TypeError: if `count` is not an integer.
    """
    if not hasattr(observations, "dtype"):
      observations = np.asarray(observations)
    shape = self.model.spec.observation_shape
    if np.ndim(observations) != 4 or np.shape(observations)[1:] != shape:
      raise UserError(
        f"observations have shape {np.shape(observations)}; the agent expects (N, {', '.join(map(str, shape))})"
      )
    if observations.dtype != np.uint8:
      raise UserError(f"observations have dtype {observations.dtype}; the agent expects uint8 in [0, 255]")
    if np.shape(state.hidden)[0] != len(observations):
      raise UserError(
        f"the state has {np.shape(state.hidden)[0]} environments, but observations have {len(observations)}: "
        "make it with initial_state(batch)"
      )
    restart = np.zeros(len(observations), bool) if restart is None else restart
    return self._act(
      self.params, observations, state, restart, key, np.uint32(operator.index(count)), np.float32(epsilon)
    )

  def player(self, num_envs: int, seed: int) -> Policy:
    """Returns a stateful `Policy` for `num_envs` environments, which samples actions with epsilon 0."""
    state = self.initial_state(num_envs)
    key = jax.random.key(seed)
    calls = 0

    def play(observations: np.ndarray, restart: np.ndarray) -> np.ndarray:
      nonlocal state, calls
      actions, state = self.act(observations, state, key, count=calls, restart=restart)
      calls += 1
      return np.asarray(actions)

    return play


def load_agent(directory: str | os.PathLike[str], which: str = "latest", *, build: Build = build_model) -> Agent:
  """Loads the agent of a run. Reads the parameters of a checkpoint but not its training state.

  Args:
    directory: the run's working directory.
    which: 'latest' for the newest checkpoint, or 'best' for the one with the highest mean return in evaluations during
      training.
    build: builds the model, as in `train`.

  Returns:
    The agent, with the run's configuration.

  Raises:
    UserError: if there is no such run or checkpoint, or the checkpoint does not match the run's configuration.
  """
  run = workdir.read(directory)
  model = build(run.config, run.spec)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return Agent(model, checkpoint.load_params(run.checkpoints / which, shapes), run.config)
