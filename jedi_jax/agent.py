"""Acting with a trained model, saving it and loading it."""

import contextlib
import operator
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jedi_jax.config import Config
from jedi_jax.errors import UserError
from jedi_jax.models import phases
from jedi_jax.models.base import Build, Model
from jedi_jax.models.build import build as build_model
from jedi_jax.models.build import count_parameters
from jedi_jax.runs import checkpoint, sharing, workdir
from jedi_jax.types import Array, LstmState, Policy

_AVERAGE = "average_denoiser"

Act = Callable[..., tuple[Array, LstmState]]


def make_act(model: Model, *, max_hold: int = 1) -> Act:
  """Builds the pure function that samples actions.

  Args:
    model: the composed model.
    max_hold: longest hold of a random action, in steps; see `collect.epsilon_hold`.

  Returns:
    (parameters, observations [N, H, W, C] uint8, state, restart [N] bool, key, count [] uint32, epsilon []) -> (actions
    [N] int32, state). The state is cleared first where `restart` is true. With probability epsilon a uniform action is
    drawn, which is taken for one step or held for more; any other action is sampled from the policy. `count` is folded
    into the key, so that a loop can pass the same key with the number of the step.
  """
  weights = 1.0 / np.arange(1, max_hold + 1) ** 2
  held = (weights[::-1].cumsum()[::-1] / weights.sum()).astype(np.float32)  # Probability of a hold longer than an age.

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
    policy_key, *_ = jax.random.split(jax.random.fold_in(key, count), 3)
    sampled = jax.random.categorical(policy_key, logits)

    def draw(age: Array, held: Array) -> tuple[Array, Array]:
      """Returns whether a random action drawn `age` steps ago is taken now, and which: [N] each."""
      _, explore_key, uniform_key = jax.random.split(jax.random.fold_in(key, count - age), 3)
      explore = jax.random.bernoulli(explore_key, jnp.where(age <= count, epsilon * held, 0.0), sampled.shape)
      return explore, jax.random.randint(uniform_key, sampled.shape, 0, model.num_actions(params))

    explore, uniform = jax.vmap(draw)(jnp.arange(max_hold, dtype=jnp.uint32), held)
    latest = jnp.take_along_axis(uniform, explore.argmax(0)[None], 0)[0]
    return jnp.where(explore.any(0), latest, sampled).astype(jnp.int32), state

  return act


class Agent:
  """A model and its parameters, ready to act.

  Args:
    model: the composed model.
    params: parameters by component; host arrays are moved to the default device. Acting uses 'encoder' and
      'actor_critic'.
    config: the configuration of the run; acting does not use it, and saving needs it.
    result: the result of the run with these parameters, as result.json has it; `save` writes it into the model card.
    data: of a run on recorded episodes, what it records of them, see `datasets.Dataset.record`; `save` writes it into
      config.json and the model card.
  """

  def __init__(
    self,
    model: Model,
    params: dict[str, Any],
    config: Config | None = None,
    result: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
  ):
    self.model = model
    self.params = jax.device_put(params)  # Once, not at every call.
    self.config = config
    self.result = result
    self.data = data
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
      UserError: if observations or `restart` have the wrong shape or dtype, or the state is of another number of
        environments.
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
        "make it with initial_state(batch), or the player with their number"
      )
    if not hasattr(restart, "dtype"):
      restart = np.zeros(len(observations), bool) if restart is None else np.asarray(restart)
    if np.shape(restart) != (len(observations),):
      raise UserError(f"restart has shape {np.shape(restart)}; the agent expects ({len(observations)},), one a game")
    return self._act(
      self.params, observations, state, restart, key, np.uint32(operator.index(count)), np.float32(epsilon)
    )

  def player(self, num_envs: int, seed: int) -> Policy:
    """Returns a `Policy` for `num_envs` environments, which keeps the recurrent state and the random key itself.

    Actions are sampled with epsilon 0. The same seed and the same observations give the same actions.

    Args:
      num_envs: number N of environments.
      seed: seed of the actions.

    Returns:
      (observations [N, H, W, C] uint8, restart [N] bool, true where an episode begins) -> actions [N] int32.

    Raises:
      UserError: if `num_envs` is less than 1; when playing, as `act`.
    """
    if num_envs < 1:
      raise UserError(f"num_envs is {num_envs}; a player needs at least 1 environment")
    state = self.initial_state(num_envs)
    key = jax.random.key(seed)
    calls = 0

    def play(observations: np.ndarray, restart: np.ndarray) -> np.ndarray:
      nonlocal state, calls
      actions, state = self.act(observations, state, key, count=calls, restart=restart)
      calls += 1
      return np.asarray(actions)

    return play

  def save(self, folder: str | os.PathLike[str], *, half: bool = False, overwrite: bool = False) -> pathlib.Path:
    """Writes the agent to a folder that `load_agent` takes and that fits the Hugging Face Hub.

    The folder has `model.safetensors` (all parameters, those that dreaming needs too), `config.json` (configuration,
    environment, versions, result) and `README.md` (the model card). Of a denoiser and its average only the average is
    saved, since it imagines; a loaded agent has it in both places. The function `build` of a model of one's own is not
    saved: pass it to `load_agent`.

    Args:
      folder: created if missing.
      half: whether float32 parameters are rounded to float16, which halves the file; loading makes them float32 again.
      overwrite: replaces these three files of an earlier save. Other files stay as they are.

    Returns:
      The folder.

    Raises:
      UserError: if the agent has no configuration, the folder holds a run, or an agent and `overwrite` is false, or it
        cannot be written.
    """
    if self.config is None:
      raise UserError("the agent has no configuration: give it one, as in Agent(model, params, config)")
    # With `env.action_slots` the model has more actions than the environment.
    spec = self.model.spec._replace(num_actions=int(self.model.num_actions(self.params)))
    return sharing.write(
      folder,
      params=jax.device_get(phases.imagining(self.params) if _AVERAGE in self.params else self.params),
      config=self.config,
      spec=spec,
      sizes=count_parameters(self.params),
      result=self.result,
      data=self.data,
      half=half,
      overwrite=overwrite,
    )


def load_agent(directory: str | os.PathLike[str], which: str = "latest", *, build: Build = build_model) -> Agent:
  """Loads an agent. Executes nothing from its files, and reads no training state.

  Args:
    directory: the working directory of a run; a folder that `Agent.save` wrote; 'hf://user/name' or
      'hf://user/name@revision' for a repository of the Hugging Face Hub with the files of such a folder (needs
      `huggingface_hub`); or 'jedi://catch' or 'jedi://breakout' (MinAtar), agents of the
      package.
    which: of a run, 'latest' for the newest checkpoint, or 'best' for the one with the highest mean return in
      evaluations during training.
    build: builds the model, as in `train`.

  Returns:
    The agent, with the run's configuration, and with its result if these are the parameters at the end of the run.

  Raises:
    UserError: if there is no such run, checkpoint or agent, it is not whole, or it does not match its configuration.
  """
  path = sharing.resolve(directory)
  if sharing.is_saved_agent(path):
    if which != "latest":
      raise UserError(f"{path} holds a saved agent, not a run: it has no checkpoint {which!r}")
    saved = sharing.read(path)
    model = build(saved.config, saved.spec)
    shapes, arrays = _shapes(model), saved.arrays
    if _AVERAGE in shapes and not any(name.startswith(f"{_AVERAGE}/") for name in arrays):
      arrays = arrays | {f"average_{name}": value for name, value in arrays.items() if name.startswith("denoiser/")}
    params = checkpoint.unflatten(arrays, shapes, where=str(path / sharing.MODEL))
    return Agent(model, params, saved.config, saved.result, saved.data)
  run = workdir.read(path)
  model = build(run.config, run.spec)
  checkpoints = run.checkpoints / which
  params, number = checkpoint.load_params(checkpoints, _shapes(model))
  result = None
  if which == "latest" and number == checkpoint.newest(checkpoints) and run.result.exists():
    with contextlib.suppress(UserError):  # The parameters are whole, even if the result is not.
      result = workdir.read_json(run.result)
  return Agent(model, params, run.config, result if isinstance(result, dict) else None, run.data)


def _shapes(model: Model) -> Any:
  """Returns the shapes and dtypes of a model's parameters."""
  return jax.eval_shape(model.init, jax.random.key(0))
