"""Two worlds with one interface, `reset` and `step`: the dream of an agent, and the real game."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jedi_jax import config as config_lib
from jedi_jax import envs
from jedi_jax.agent import Agent
from jedi_jax.errors import UserError
from jedi_jax.models import imagination, phases
from jedi_jax.models.base import Model
from jedi_jax.models.build import build
from jedi_jax.models.dynamics import Dynamics
from jedi_jax.types import Array, LstmState, Params, Segment, VectorEnv


class Moment(NamedTuple):
  """A frame, what led to it, and what the policy makes of it.

  Attributes:
    frame: [H, W, C] uint8.
    reward: sign of the reward of the step that led here, 0 after a reset; in a dream the expected sign, in [-1, 1].
    end: probability that this step ended the episode, 0 or 1 in the real game; 0 after a reset.
    over: whether the episode is over; in a dream it is drawn from `end`.
    value: the critic's value of the frame.
    probabilities: [A] float32; the policy's, of the next action.
  """

  frame: np.ndarray
  reward: float
  end: float
  over: bool
  value: float
  probabilities: np.ndarray


class _State(NamedTuple):
  """What the next imagined step depends on; a batch of one."""

  world: imagination.WorldState
  policy_state: LstmState  # After the last frame.


class Dream:
  """The dream of an agent, one step at a time.

  Both LSTMs are burned in on the frames of a start, as in training.

  Args:
    agent: an agent with its configuration, a decoder and all parameters.
    seed: of the imagination.

  Raises:
    UserError: if the agent has no decoder or no configuration.
  """

  def __init__(self, agent: Agent, *, seed: int = 0):
    if agent.config is None:
      raise UserError("the agent has no configuration: load it from a run's directory")
    if agent.model.decode is None:
      raise UserError("the agent has no decoder: fit one with inspection.probe.fit")
    self._model, self._config = agent.model, agent.config
    self._params = jax.jit(functools.partial(phases.prepared, agent.model.parts))(agent.params)
    self._dynamics: dict[int, Dynamics] = {}
    self._key, self._count = jax.random.key(seed), 0
    self._state: _State | None = None
    self._sampler_steps = agent.config.sampler.num_steps if agent.config.denoiser.kind == "diffusion" else 0
    self._dynamics[self._sampler_steps] = agent.model.dynamics

  @property
  def sampler_steps(self) -> int:
    """Steps of the sampler for one frame, 0 without diffusion; another number is compiled at its first step."""
    return self._sampler_steps

  @sampler_steps.setter
  def sampler_steps(self, number: int) -> None:
    if number not in self._dynamics:
      changed = config_lib.override(self._config, {"sampler.num_steps": number})
      self._dynamics[number] = build(changed, self._model.spec).dynamics
    self._sampler_steps = number

  def reset(self, start: Segment) -> Moment:
    """Starts at the last of L real frames.

    Args:
      start: [1, L, ...]; the last frame must be real.
    """
    self._state, outputs = _start(self._model, self._params, start)
    return _moment(outputs)

  def step(self, action: int) -> Moment:
    """Imagines the frame that an action in [0, A) leads to; call `reset` first."""
    key = jax.random.fold_in(self._key, self._count)
    self._count += 1
    self._state, outputs = self._imagine(action, key)
    return _moment(outputs)

  def compile(self) -> None:
    """Compiles the next step, without taking it."""
    jax.block_until_ready(self._imagine(0, self._key))

  def _imagine(self, action: int, key: Array) -> tuple[_State, tuple[Array, ...]]:
    dynamics, actions = self._dynamics[self._sampler_steps], jnp.full((1,), action, jnp.int32)
    assert self._state is not None
    return _step(self._model, dynamics, self._params, self._state, actions, key)


def _moment(outputs: tuple[Array, ...]) -> Moment:
  frame, reward, end, over, value, probabilities = jax.device_get(outputs)
  return Moment(frame, float(reward), float(end), bool(over), float(value), probabilities)


@functools.partial(jax.jit, static_argnums=0)
def _start(model: Model, params: dict[str, Params], start: Segment) -> tuple[_State, tuple[Array, ...]]:
  past = model.encode(params, start.observations, start.mask)
  world = imagination.start_world(model.reward_end, params["reward_end"], past, start.actions[:, :-1])
  keep = start.mask.astype(jnp.float32) if model.parts.forget_padding else None
  logits, values, policy_state = model.actor_critic.apply(params["actor_critic"], past, model.initial_state(1), keep)
  zero = jnp.zeros(())
  return _State(world, policy_state), (
    start.observations[0, -1],
    zero,
    zero,
    zero,
    values[0, -1],
    jax.nn.softmax(logits[0, -1]),
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(
  model: Model, dynamics: Dynamics, params: dict[str, Params], state: _State, action: Array, key: Array
) -> tuple[_State, tuple[Array, ...]]:
  noise = imagination.draw_noise(dynamics, key[None], horizon=1, num_actions=model.spec.num_actions)
  noise = jax.tree.map(lambda x: x[0], noise)
  world, outcome = imagination.step_world(dynamics, model.reward_end, params, state.world, action, noise)
  following = world.past[:, -1:]
  logits, values, policy_state = model.actor_critic.apply(params["actor_critic"], following, state.policy_state)
  assert model.decode is not None
  outputs = (
    model.decode(params, following)[0, 0],
    jax.nn.softmax(outcome.reward_logits[0]) @ jnp.asarray([-1.0, 0.0, 1.0]),
    jax.nn.softmax(outcome.end_logits[0])[1],
    outcome.end[0],
    values[0, 0],
    jax.nn.softmax(logits[0, 0]),
  )
  return _State(world, policy_state), outputs


class Game:
  """The agent's environment with the settings of its training, one game at a time.

  Args:
    agent: an agent with its configuration.
    seed: seed of the first game; game n has the seed `seed + n`.

  Raises:
    UserError: if the agent has no configuration, or the environment cannot be made.
  """

  def __init__(self, agent: Agent, *, seed: int):
    if agent.config is None:
      raise UserError("the agent has no configuration: load it from a run's directory")
    self._agent, self._config = agent, agent.config.env
    self._model, self._seed = agent.model, seed
    self._random = np.random.default_rng(seed)
    self._env: VectorEnv | None = None
    self._frames: list[np.ndarray] = []  # At most L of this episode, the last one is on the screen.
    self._actions: list[int] = []  # Between them.
    self._state = agent.initial_state(1)
    self._begun = False  # Whether the game is past its first frame.
    self._open()

  def reset(self, lead: int = 0) -> Moment:
    """Starts a new game.

    Args:
      lead: steps that the policy plays first; a game that ends in them is followed by another.
    """
    if self._begun:
      self._open()
    else:
      self._begin(self._frames[-1])
    moment = self._look()
    for _ in range(lead):
      moment = self.step(draw(self._random, moment.probabilities))
      if moment.over:
        moment = self.resume()
    return moment

  def resume(self) -> Moment:
    """Begins the episode after one that is over: a new game, or the same one after the loss of a life."""
    return self._look()

  def step(self, action: int) -> Moment:
    """Takes an action in [0, A)."""
    assert self._env is not None
    result = self._env.step(np.asarray([action], np.int32))
    self._begun = not result.game_over[0]
    over = bool(result.end[0] or result.truncated[0] or result.game_over[0])
    self._remember(result.next_observation[0], action)
    moment = self._look(float(np.sign(result.reward[0])), float(result.end[0]), over=over)
    if over:
      self._begin(result.observation[0])
    return moment

  def start(self) -> Segment:
    """Returns the last L frames as a start for `Dream.reset`; frames before the episode are padding."""
    length = self._model.conditioning_frames
    missing = length - len(self._frames)
    frames = [np.zeros_like(self._frames[0])] * missing + self._frames
    actions = [0] * missing + [*self._actions, 0]
    none = np.zeros(length, np.float32)
    fields = (np.stack(frames), np.asarray(actions, np.int32), none, none > 0, np.arange(length) >= missing)
    return Segment(*(jnp.asarray(field)[None] for field in fields))

  def close(self) -> None:
    """Closes the environment."""
    if self._env is not None:
      self._env.close()
      self._env = None

  def _open(self) -> None:
    self.close()
    c = self._config
    self._env = envs.make(
      c.name, num_envs=1, seed=self._seed, life_loss_ends=c.life_loss_ends, max_episode_steps=c.max_episode_steps
    )
    self._seed += 1
    self._begun = False
    self._begin(self._env.reset()[0])

  def _begin(self, frame: np.ndarray) -> None:
    self._frames, self._actions = [np.array(frame)], []
    self._state = self._agent.initial_state(1)

  def _remember(self, frame: np.ndarray, action: int) -> None:
    self._frames = [*self._frames, np.array(frame)][-self._model.conditioning_frames :]
    actions = [*self._actions, action]
    self._actions = actions[len(actions) - len(self._frames) + 1 :]

  def _look(self, reward: float = 0.0, end: float = 0.0, *, over: bool = False) -> Moment:
    """Advances the policy by the frame on the screen."""
    frame = self._frames[-1]
    probabilities, value, self._state = _policy(self._model, self._agent.params, frame[None], self._state)
    return Moment(frame, reward, end, over, float(value), np.asarray(probabilities))


@functools.partial(jax.jit, static_argnums=0)
def _policy(
  model: Model, params: dict[str, Params], observations: Array, state: LstmState
) -> tuple[Array, Array, LstmState]:
  logits, values, state = model.policy(params, observations, state)
  return jax.nn.softmax(logits[0]), values[0], state


def draw(random: np.random.Generator, probabilities: np.ndarray) -> int:
  """Draws an action from probabilities [A]; uniformly if they are not finite."""
  weights = np.asarray(probabilities, np.float64)
  if not np.all(np.isfinite(weights)) or not weights.sum():
    weights = np.ones(len(weights))
  return int(random.choice(len(weights), p=weights / weights.sum()))
