"""Imagination: rolling the world model forward under the policy, from frames of replay."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jedi_jax.models.actor_critic import ActorCritic
from jedi_jax.models.dynamics import Dynamics
from jedi_jax.models.reward_end import RewardEnd
from jedi_jax.types import Array, LstmState, Params, Trajectory


class ImaginationNoise(NamedTuple):
  """The random numbers of a rollout over T steps, time first so that a scan can take them.

  Attributes:
    frames: the dynamics' noise, leading axis T.
    actions: [T, B, A] standard Gumbel.
    rewards: [T, B, 3] standard Gumbel.
    ends: [T, B, 2] standard Gumbel.
  """

  frames: Any
  actions: Array
  rewards: Array
  ends: Array


def draw_noise(dynamics: Dynamics, keys: Array, *, horizon: int, num_actions: int) -> ImaginationNoise:
  """Draws all random numbers of a rollout, each trajectory's from its own key [B]."""

  def gumbel(keys: Array, classes: int) -> Array:
    draws = jax.vmap(lambda key: jax.random.gumbel(key, (horizon, classes)))(keys)
    return jnp.moveaxis(draws, 0, 1)

  keys = jax.vmap(lambda key: jax.random.split(key, 4))(keys)
  return ImaginationNoise(
    dynamics.sample_noise(keys[:, 0], horizon),
    gumbel(keys[:, 1], num_actions),
    gumbel(keys[:, 2], 3),
    gumbel(keys[:, 3], 2),
  )


class WorldState(NamedTuple):
  """What the next step of the world model depends on.

  Attributes:
    past: [B, L, h, w, c] latents of the last L frames.
    past_actions: [B, L - 1] int32; the actions between them.
    reward_end_state: state of the reward / end model.
  """

  past: Array
  past_actions: Array
  reward_end_state: LstmState


class Outcome(NamedTuple):
  """Reward and end of one imagined step.

  Attributes:
    reward: [B] float32 in {-1, 0, 1}.
    end: [B] bool; whether the step ended the episode.
    reward_logits: [B, 3] float32 of the reward signs -1, 0, 1.
    end_logits: [B, 2] float32 of continuing and ending.
  """

  reward: Array
  end: Array
  reward_logits: Array
  end_logits: Array


def prepare(
  dynamics: Dynamics, reward_end: RewardEnd, actor_critic: ActorCritic, params: dict[str, Params]
) -> dict[str, Params]:
  """Returns the parameters with those of the three parts prepared, once for a loop of steps."""
  parts = (("denoiser", dynamics), ("reward_end", reward_end), ("actor_critic", actor_critic))
  return {**params, **{name: part.prepare(params[name]) for name, part in parts}}


def start_world(reward_end: RewardEnd, params: Params, past: Array, past_actions: Array) -> WorldState:
  """Returns the state of the world model after L frames, on which its reward / end model is burned in.

  Args:
    reward_end: the reward / end model.
    params: its parameters, prepared or not.
    past: [B, L, h, w, c] latents of successive frames.
    past_actions: [B, L - 1] int32; the actions between them.
  """
  state = reward_end.initial_state(past.shape[0])
  if past.shape[1] > 1:
    _, _, state = reward_end.predict(params, past[:, :-1], past_actions, past[:, 1:], state)
  return WorldState(past, past_actions, state)


def step_world(
  dynamics: Dynamics, reward_end: RewardEnd, params: Params, state: WorldState, action: Array, noise: ImaginationNoise
) -> tuple[WorldState, Outcome]:
  """Imagines one step of the world model for given actions.

  Args:
    dynamics: the dynamics.
    reward_end: the reward / end model.
    params: parameters by component, prepared or not: 'denoiser', 'reward_end'.
    state: the state before the step.
    action: [B] int32.
    noise: the random numbers of one step, without the axis T; `actions` is not used.

  Returns:
    The state after the step, whose last latent is the imagined one, and reward and end.
  """
  current = state.past[:, -1:]
  actions = jnp.concatenate([state.past_actions, action[:, None]], axis=1)
  next_latents = dynamics.sample(params["denoiser"], state.past, actions, noise.frames)
  reward_logits, end_logits, reward_end_state = reward_end.predict(
    params["reward_end"], current, action[:, None], next_latents[:, None], state.reward_end_state
  )
  reward = _argmax(reward_logits[:, 0] + noise.rewards).astype(jnp.float32) - 1.0
  end = _argmax(end_logits[:, 0] + noise.ends) == 1
  next_state = WorldState(
    past=jnp.concatenate([state.past[:, 1:], next_latents[:, None]], axis=1),
    past_actions=actions[:, 1:],
    reward_end_state=reward_end_state,
  )
  return next_state, Outcome(reward, end, reward_logits[:, 0], end_logits[:, 0])


def _argmax(x: Array) -> Array:
  """Returns `jnp.argmax(x, axis=-1)` for two or three classes by comparisons, which need no kernel of their own."""
  first, *others = jnp.unstack(x, axis=-1)
  best, index = first, jnp.zeros(first.shape, jnp.int32)
  for i, other in enumerate(others, start=1):
    index, best = jnp.where(other > best, i, index), jnp.maximum(best, other)
  return index


class _State(NamedTuple):
  """What the next step depends on."""

  world: WorldState
  policy_state: LstmState


class _Carry(NamedTuple):
  state: _State
  alive: Array  # [B] float32
  can_restart: Array  # [B] bool; whether the trajectory has a second start left.


def imagine(
  dynamics: Dynamics,
  reward_end: RewardEnd,
  actor_critic: ActorCritic,
  params: Params,
  past: Array,
  past_actions: Array,
  mask: Array,
  noise: ImaginationNoise,
  *,
  actions: Array | None = None,
  forget_padding: bool = True,
  unroll: int = 1,
) -> Trajectory:
  """Imagines T steps, under the policy or with given actions. No gradient flows back.

  Both LSTMs are burned in on the past frames. The reward / end model runs over padding too, as it does in training.

  Args:
    dynamics: the dynamics.
    reward_end: the reward / end model.
    actor_critic: the actor-critic.
    params: parameters by component: 'denoiser', 'reward_end', 'actor_critic'.
    past: [B, L, h, w, c] latents of L successive frames; the first action is chosen on the last. With [2 B, ...],
      trajectory i continues from row B + i after its first imagined end.
    past_actions: [B or 2 B, L - 1] int32; the actions between them.
    mask: [B or 2 B, L] bool; false where a frame is padding; true for the last frame.
    noise: the random numbers of B trajectories.
    actions: [B, T] int32 to take instead of the policy's.
    forget_padding: whether the policy's burn-in forgets padding, since a real episode starts with an empty state.
    unroll: steps in one iteration of the compiled loop.

  Returns:
    `Trajectory`; steps after its last imagined end have `alive` 0.
  """
  rows, length = past.shape[:2]
  horizon, batch = noise.actions.shape[:2]
  chex.assert_shape(past_actions, (rows, length - 1))
  chex.assert_shape(mask, (rows, length))
  if rows not in (batch, 2 * batch):
    raise ValueError(f"{rows} rows of frames do not fit the noise of {batch} trajectories")
  if actions is not None:
    chex.assert_shape(actions, (batch, horizon))
  params, past = jax.lax.stop_gradient((params, past))
  params = prepare(dynamics, reward_end, actor_critic, params)
  world = start_world(reward_end, params["reward_end"], past, past_actions)
  policy_state = actor_critic.initial_state(rows)
  if length > 1:
    keep = mask[:, :-1].astype(jnp.float32) if forget_padding else None
    _, _, policy_state = actor_critic.apply(params["actor_critic"], past[:, :-1], policy_state, keep)
  states = _State(world, policy_state)
  start = jax.tree.map(lambda x: x[:batch], states)
  restart = jax.tree.map(lambda x: x[batch:], states) if rows > batch else None

  def step(carry: _Carry, inputs: tuple[ImaginationNoise, Array | None]) -> tuple[_Carry, tuple[Array, ...]]:
    draws, given = inputs
    world, policy_state = carry.state
    logits, values, policy_state = actor_critic.apply(params["actor_critic"], world.past[:, -1:], policy_state)
    action = jnp.argmax(logits[:, 0] + draws.actions, axis=-1).astype(jnp.int32) if given is None else given
    world, outcome = step_world(dynamics, reward_end, params, world, action, draws)
    next_state = _State(world, policy_state)
    end = outcome.end
    restarts_now = end & carry.can_restart
    if restart is not None:

      def choose(other: Array, x: Array) -> Array:
        return jnp.where(restarts_now.reshape(-1, *(1,) * (x.ndim - 1)), other, x)

      next_state = jax.tree.map(choose, restart, next_state)
    # What training reads is one array, which is stored at once.
    taken = jnp.stack([x.astype(jnp.float32) for x in (action, outcome.reward, end, carry.alive, restarts_now)], axis=1)
    outputs = next_state.world.past[:, -1], taken, outcome.reward_logits, outcome.end_logits, values[:, 0]
    return _Carry(next_state, carry.alive * (1.0 - (end & ~restarts_now)), carry.can_restart & ~restarts_now), outputs

  given = None if actions is None else jnp.moveaxis(actions, 1, 0)
  carry = _Carry(start, jnp.ones((batch,)), jnp.full((batch,), restart is not None))
  _, outputs = jax.lax.scan(step, carry, (noise, given), unroll=unroll)
  latents, taken, reward_logits, end_logits, values = (jnp.moveaxis(x, 0, 1) for x in outputs)
  chosen, rewards, ends, alive, restarts = jnp.moveaxis(taken, 2, 0)
  return Trajectory(
    latents=jnp.concatenate([start.world.past[:, -1:], latents], axis=1),
    actions=chosen.astype(jnp.int32),
    rewards=rewards,
    ends=ends == 1.0,
    alive=alive,
    restarts=restarts,
    reward_logits=reward_logits,
    end_logits=end_logits,
    values=values,
    policy_state=start.policy_state,
    restart_state=None if restart is None else restart.policy_state,
  )
