"""The actor-critic: acting, and REINFORCE with a learned baseline on imagined trajectories (Williams 1992)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jedi_jax.nn import blocks
from jedi_jax.nn.actor_critic import ActorCriticNetwork
from jedi_jax.nn.lstm import zero_lstm_state
from jedi_jax.ops.returns import lambda_returns
from jedi_jax.types import Array, Compute, Losses, LstmState, Params, Term, Trajectory

_NEVER = -1e9
"""Logit of an action that the environment does not have; finite, so that its share of the entropy is 0."""


class Objective(NamedTuple):
  """Discount and weights of the actor-critic's loss.

  Attributes:
    gamma: discount.
    lambda_: mixing of the lambda-returns.
    entropy_weight: weight of the entropy bonus, in nats.
    value_weight: weight of the squared error of the value.
  """

  gamma: float = 0.985
  lambda_: float = 0.95
  entropy_weight: float = 0.001
  value_weight: float = 1.0


class ActorCritic(NamedTuple):
  """The actor-critic as data and pure functions.

  Attributes:
    init: key -> parameters. The key is consumed.
    initial_state: batch size -> LSTM state at the start of an episode.
    apply: (parameters, latents [B, T, h, w, c], state, keep [B, T] or None, fallback or None) -> (logits [B, T, A],
      values [B, T], state); see `ActorCriticNetwork`.
    losses: (parameters, `Trajectory`) -> `Losses`.
    prepare: parameters -> those that a loop of `apply` takes; see `blocks.prepare`.
  """

  init: Callable[[Array], Params]
  initial_state: Callable[[int], LstmState]
  apply: Callable[..., tuple[Array, Array, LstmState]]
  losses: Callable[[Params, Trajectory], Losses]
  prepare: Callable[[Params], Params] = lambda params: params


def actor_critic(
  latent_shape: tuple[int, int, int],
  *,
  num_actions: int,
  action_slots: int = 0,
  channels: Sequence[int] = (),
  downsample: Sequence[bool] = (),
  lstm_width: int = 512,
  input_norm: str = "none",
  objective: Objective = Objective(),
  compute: Compute = Compute(),
) -> ActorCritic:
  """Builds the actor-critic.

  Args:
    latent_shape: (h, w, c) of what it reads.
    num_actions: of the environment.
    action_slots: if positive, the size A of the network's output. Actions beyond the environment's number, then the
      parameter 'num_actions', are never chosen.
    channels: of the convolution stages; none to read the flattened latent.
    downsample: whether a stage pools.
    lstm_width: width of the LSTM.
    input_norm: 'frame' to normalise each latent to mean 0 and variance 1 over positions and channels, or 'none'.
    objective: discount and weights of the loss.
    compute: how the network computes.
  """
  network = ActorCriticNetwork(
    num_actions=action_slots or num_actions,
    channels=tuple(channels),
    downsample=tuple(downsample),
    lstm_width=lstm_width,
    compute=compute,
  )

  def initial_state(batch: int) -> LstmState:
    return zero_lstm_state(batch, lstm_width)

  def init(key: Array) -> Params:
    params = blocks.init_params(network, key, jnp.zeros((1, 1, *latent_shape)), initial_state(1))
    return {**params, "num_actions": jnp.asarray(num_actions, jnp.float32)} if action_slots else params

  def apply(
    params: Params, latents: Array, state: LstmState, keep: Array | None = None, fallback: LstmState | None = None
  ) -> tuple[Array, Array, LstmState]:
    if input_norm == "frame":
      latents = jax.nn.standardize(latents, axis=(2, 3, 4))
    logits, values, state = blocks.apply(network, params, latents, state, keep, fallback)
    if action_slots:
      chosen_from = jnp.arange(action_slots) < jax.lax.stop_gradient(params["num_actions"])
      logits = jnp.where(chosen_from, logits, _NEVER)
    return logits, values, state

  def losses(params: Params, trajectory: Trajectory) -> Losses:
    trajectory = jax.lax.stop_gradient(trajectory)
    keep = None
    if trajectory.restart_state is not None:
      keep = jnp.pad(1.0 - trajectory.restarts, ((0, 0), (0, 1)), constant_values=1.0)
    logits, values, _ = apply(params, trajectory.latents, trajectory.policy_state, keep, trajectory.restart_state)
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    log_prob = jnp.take_along_axis(log_probs, trajectory.actions[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    rewards = jnp.sign(trajectory.rewards)
    returns = jax.lax.stop_gradient(
      lambda_returns(rewards, trajectory.ends, values[:, 1:], gamma=objective.gamma, lambda_=objective.lambda_)
    )
    values = values[:, :-1]
    advantage = returns - jax.lax.stop_gradient(values)
    alive = trajectory.alive
    terms = {
      "policy": Term(-log_prob * advantage, alive),
      "value": Term(objective.value_weight * jnp.square(values - returns), alive),
      "entropy": Term(-objective.entropy_weight * entropy, alive),
    }
    return Losses(
      terms,
      {
        "policy_entropy": Term(entropy, alive),
        "value_mean": Term(values, alive),
        "lambda_return": Term(returns, alive),
        "imagined_return": Term(jnp.sum(rewards * alive, axis=1), jnp.ones(len(alive))),
        "imagined_end_rate": Term(trajectory.ends.astype(jnp.float32), alive),
      },
    )

  def prepare(params: Params) -> Params:
    heads = {name: params[name] for name in ("actor", "critic")}  # They compute in float32.
    return {**blocks.prepare(params, compute), **heads}

  return ActorCritic(init, initial_state, apply, losses, prepare)
