"""Acting: a policy with its recurrent state, from a model and parameters or from a run's directory."""

import operator
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jedi_jax.config import Config
from jedi_jax.errors import UserError
from jedi_jax.models.base import Model
from jedi_jax.models.build import build
from jedi_jax.runs import checkpoint, workdir
from jedi_jax.types import Array, LstmState, Policy

Act = Callable[..., tuple[Array, LstmState]]


def make_act(model: Model) -> Act:
  """Builds the pure function that chooses actions.

  Args:
    model: the composed model.

  Returns:
    (parameters, observations [N, H, W, C] uint8, state, restart [N] bool, key, count [] uint32, epsilon []) -> (actions
    [N] int32, state). Where `restart` is true the state is cleared first. With probability epsilon an action is
    uniform, otherwise it is drawn from the policy. The key is folded with `count`, so that a loop needs one key and
    derives no others outside of the program.
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
  """A policy ready to act.

  Args:
    model: the composed model.
    params: parameters; 'encoder' and 'actor_critic' are used.
    config: the configuration of the run, for reference.
  """

  def __init__(self, model: Model, params: dict[str, Any], config: Config | None = None):
    self.model = model
    self.params = jax.device_put(params)  # Once, not with every call.
    self.config = config
    self._act = jax.jit(make_act(model))

  def initial_state(self, batch: int) -> LstmState:
    """The recurrent state at the start of an episode, for `batch` environments."""
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
    """Chooses one action for each environment.

    Args:
      observations: [N, H, W, C] uint8.
      state: from `initial_state` or the previous call.
      key: random key; the pair of it and `count` is consumed.
      count: in [0, 2**32); a loop passes one key and the number of the step.
      restart: [N] bool; clears the state of environments where an episode begins; none if None.
      epsilon: probability of a uniform action.

    Returns:
      Actions [N] int32 and the new state.

    Raises:
      UserError: for observations of another shape or dtype.
      OverflowError: for a count out of its range.
      TypeError: for one that is no integer.
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
        f"the state is of {np.shape(state.hidden)[0]} environments and the observations of {len(observations)}: "
        "make it with initial_state(batch)"
      )
    restart = np.zeros(len(observations), bool) if restart is None else restart
    return self._act(
      self.params, observations, state, restart, key, np.uint32(operator.index(count)), np.float32(epsilon)
    )

  def player(self, num_envs: int, seed: int) -> Policy:
    """Returns a policy that keeps its state, as `evaluation.run_episodes` takes it; epsilon is 0."""
    state = self.initial_state(num_envs)
    key = jax.random.key(seed)
    calls = 0

    def play(observations: np.ndarray, restart: np.ndarray) -> np.ndarray:
      nonlocal state, calls
      actions, state = self.act(observations, state, key, count=calls, restart=restart)
      calls += 1
      return np.asarray(actions)

    return play


def load_agent(directory: str | os.PathLike[str], which: str = "latest") -> Agent:
  """Loads the agent of a run for inference; nothing but parameters is read.

  Args:
    directory: the run's working directory.
    which: 'latest' checkpoint, or the 'best' one by evaluation during training.

  Raises:
    UserError: if there is no such run or checkpoint, or it does not fit its configuration.
  """
  run = workdir.read(directory)
  model = build(run.config, run.spec)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return Agent(model, checkpoint.load_params(run.checkpoints / which, shapes), run.config)
