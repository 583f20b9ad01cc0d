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


class _State(NamedTuple):
  """What the next step depends on."""

  past: Array  # [B, L, h, w, c]
  past_actions: Array  # [B, L - 1]; the actions between the past frames.
  reward_end_state: LstmState
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
  params = {
    name: part.prepare(params[name])
    for name, part in (("denoiser", dynamics), ("reward_end", reward_end), ("actor_critic", actor_critic))
  }
  reward_end_state = reward_end.initial_state(rows)
  policy_state = actor_critic.initial_state(rows)
  if length > 1:
    _, _, reward_end_state = reward_end.predict(
      params["reward_end"], past[:, :-1], past_actions, past[:, 1:], reward_end_state
    )
    keep = mask[:, :-1].astype(jnp.float32) if forget_padding else None
    _, _, policy_state = actor_critic.apply(params["actor_critic"], past[:, :-1], policy_state, keep)
  states = _State(past, past_actions, reward_end_state, policy_state)
  start = jax.tree.map(lambda x: x[:batch], states)
  restart = jax.tree.map(lambda x: x[batch:], states) if rows > batch else None

  def step(carry: _Carry, inputs: tuple[ImaginationNoise, Array | None]) -> tuple[_Carry, tuple[Array, ...]]:
    draws, given = inputs
    state = carry.state
    current = state.past[:, -1:]
    logits, values, policy_state = actor_critic.apply(params["actor_critic"], current, state.policy_state)
    action = jnp.argmax(logits[:, 0] + draws.actions, axis=-1).astype(jnp.int32) if given is None else given
    actions = jnp.concatenate([state.past_actions, action[:, None]], axis=1)
    next_latents = dynamics.sample(params["denoiser"], state.past, actions, draws.frames)
    reward_logits, end_logits, reward_end_state = reward_end.predict(
      params["reward_end"], current, action[:, None], next_latents[:, None], state.reward_end_state
    )
    reward = jnp.argmax(reward_logits[:, 0] + draws.rewards, axis=-1).astype(jnp.float32) - 1.0
    end = jnp.argmax(end_logits[:, 0] + draws.ends, axis=-1) == 1
    next_state = _State(
      past=jnp.concatenate([state.past[:, 1:], next_latents[:, None]], axis=1),
      past_actions=actions[:, 1:],
      reward_end_state=reward_end_state,
      policy_state=policy_state,
    )
    restarts_now = end & carry.can_restart
    if restart is not None:

      def choose(other: Array, x: Array) -> Array:
        return jnp.where(restarts_now.reshape(-1, *(1,) * (x.ndim - 1)), other, x)

      next_state = jax.tree.map(choose, restart, next_state)
    outputs = (
      next_state.past[:, -1],
      action,
      reward,
      end,
      carry.alive,
      restarts_now.astype(jnp.float32),
      reward_logits[:, 0],
      end_logits[:, 0],
      values[:, 0],
    )
    return _Carry(next_state, carry.alive * (1.0 - (end & ~restarts_now)), carry.can_restart & ~restarts_now), outputs

  given = None if actions is None else jnp.moveaxis(actions, 1, 0)
  carry = _Carry(start, jnp.ones((batch,)), jnp.full((batch,), restart is not None))
  _, outputs = jax.lax.scan(step, carry, (noise, given), unroll=unroll)
  latents, taken, rewards, ends, alive, restarts, reward_logits, end_logits, values = (
    jnp.moveaxis(x, 0, 1) for x in outputs
  )
  return Trajectory(
    latents=jnp.concatenate([start.past[:, -1:], latents], axis=1),
    actions=taken,
    rewards=rewards,
    ends=ends,
    alive=alive,
    restarts=restarts,
    reward_logits=reward_logits,
    end_logits=end_logits,
    values=values,
    policy_state=start.policy_state,
    restart_state=None if restart is None else restart.policy_state,
  )
