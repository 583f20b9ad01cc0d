"""Imagination: rolling the world model forward under the policy, from frames of replay."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jedi_jax.models.behavior import Behavior
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


class _Carry(NamedTuple):
  past: Array  # [B, L, h, w, c]
  past_actions: Array  # [B, L - 1]; the actions between the past frames.
  reward_end_state: LstmState
  policy_state: LstmState
  alive: Array  # [B]


def imagine(
  dynamics: Dynamics,
  reward_end: RewardEnd,
  behavior: Behavior,
  params: Params,
  past: Array,
  past_actions: Array,
  mask: Array,
  noise: ImaginationNoise,
  *,
  actions: Array | None = None,
  forget_padding: bool = True,
) -> Trajectory:
  """Imagines T steps, under the policy or with given actions. No gradient flows back.

  Both LSTMs are burned in on the past frames. The reward / end model runs over padding too, as it does in training.

  Args:
    dynamics: the dynamics.
    reward_end: the reward / end model.
    behavior: the actor-critic.
    params: parameters by component: 'denoiser', 'reward_end', 'actor_critic'.
    past: [B, L, h, w, c] latents of L successive frames, the last of which the first action is chosen on.
    past_actions: [B, L - 1] int32; the actions between them.
    mask: [B, L] bool; false where a frame is padding; the last one must be real.
    noise: the random numbers.
    actions: [B, T] int32 to take instead of the policy's.
    forget_padding: whether the policy's burn-in forgets padding, because a real episode begins with an empty state.

  Returns:
    `Trajectory`; after the first imagined end the remaining steps have `alive` 0.
  """
  batch, length = past.shape[:2]
  if actions is not None:
    chex.assert_shape(actions, (batch, noise.actions.shape[0]))
  chex.assert_shape(past_actions, (batch, length - 1))
  chex.assert_shape(mask, (batch, length))
  params, past = jax.lax.stop_gradient((params, past))
  reward_end_state = reward_end.initial_state(batch)
  policy_state = behavior.initial_state(batch)
  if length > 1:
    _, _, reward_end_state = reward_end.predict(
      params["reward_end"], past[:, :-1], past_actions, past[:, 1:], reward_end_state
    )
    keep = mask[:, :-1].astype(jnp.float32) if forget_padding else None
    _, _, policy_state = behavior.apply(params["actor_critic"], past[:, :-1], policy_state, keep)

  def step(carry: _Carry, inputs: tuple[ImaginationNoise, Array | None]) -> tuple[_Carry, tuple[Array, ...]]:
    draws, given = inputs
    current = carry.past[:, -1:]
    logits, values, policy_state = behavior.apply(params["actor_critic"], current, carry.policy_state)
    action = jnp.argmax(logits[:, 0] + draws.actions, axis=-1).astype(jnp.int32) if given is None else given
    actions = jnp.concatenate([carry.past_actions, action[:, None]], axis=1)
    following = dynamics.sample(params["denoiser"], carry.past, actions, draws.frames)
    reward_logits, end_logits, reward_end_state = reward_end.predict(
      params["reward_end"], current, action[:, None], following[:, None], carry.reward_end_state
    )
    reward = jnp.argmax(reward_logits[:, 0] + draws.rewards, axis=-1).astype(jnp.float32) - 1.0
    end = jnp.argmax(end_logits[:, 0] + draws.ends, axis=-1) == 1
    after = _Carry(
      past=jnp.concatenate([carry.past[:, 1:], following[:, None]], axis=1),
      past_actions=actions[:, 1:],
      reward_end_state=reward_end_state,
      policy_state=policy_state,
      alive=carry.alive * (1.0 - end),
    )
    outputs = (following, action, reward, end, carry.alive, reward_logits[:, 0], end_logits[:, 0], values[:, 0])
    return after, outputs

  start = _Carry(past, past_actions, reward_end_state, policy_state, jnp.ones((batch,)))
  given = None if actions is None else jnp.moveaxis(actions, 1, 0)
  _, outputs = jax.lax.scan(step, start, (noise, given))
  latents, taken, rewards, ends, alive, reward_logits, end_logits, values = (jnp.moveaxis(x, 0, 1) for x in outputs)
  return Trajectory(
    latents=jnp.concatenate([past[:, -1:], latents], axis=1),
    actions=taken,
    rewards=rewards,
    ends=ends,
    alive=alive,
    reward_logits=reward_logits,
    end_logits=end_logits,
    values=values,
    policy_state=policy_state,
  )
