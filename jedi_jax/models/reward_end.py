"""The reward / end model: classifies the sign of the reward and the end of the episode."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax.numpy as jnp
import optax

from jedi_jax.nn import blocks
from jedi_jax.nn.lstm import zero_lstm_state
from jedi_jax.nn.reward_end import RewardEndNetwork
from jedi_jax.ops.statistics import confusion
from jedi_jax.types import Array, Compute, Losses, LstmState, Params, Term


class RewardEnd(NamedTuple):
  """The model as data and pure functions.

  Attributes:
    init: key -> parameters. The key is consumed.
    initial_state: batch size -> LSTM state.
    predict: (parameters, frames [B, T, h, w, c], actions [B, T], next frames [B, T, h, w, c], state) ->
      (reward logits [B, T, 3], end logits [B, T, 2], state).
    losses: (parameters, frames, actions, next frames, raw rewards [B, T], ends [B, T], weights [B, T]) -> `Losses`.
    prepare: parameters -> those that a loop of `predict` takes; see `RewardEndNetwork.prepare`.
  """

  init: Callable[[Array], Params]
  initial_state: Callable[[int], LstmState]
  predict: Callable[[Params, Array, Array, Array, LstmState], tuple[Array, Array, LstmState]]
  losses: Callable[[Params, Array, Array, Array, Array, Array, Array], Losses]
  prepare: Callable[[Params], Params] = lambda params: params


def reward_end_model(
  latent_shape: tuple[int, int, int],
  *,
  num_actions: int,
  channels: Sequence[int] = (32, 32, 32, 32),
  depths: Sequence[int] = (2, 2, 2, 2),
  attention: Sequence[bool] = (False, False, False, False),
  downsample: bool = False,
  conditioning_width: int = 128,
  lstm_width: int = 512,
  compute: Compute = Compute(),
) -> RewardEnd:
  """Builds the model on latents of the given shape; `RewardEndNetwork` explains the other arguments."""
  network = RewardEndNetwork(
    num_actions=num_actions,
    channels=tuple(channels),
    depths=tuple(depths),
    attention=tuple(attention),
    downsample=downsample,
    conditioning_width=conditioning_width,
    lstm_width=lstm_width,
    compute=compute,
  )

  def initial_state(batch: int) -> LstmState:
    return zero_lstm_state(batch, lstm_width)

  def init(key: Array) -> Params:
    frames = jnp.zeros((1, 1, *latent_shape))
    return blocks.init_params(network, key, frames, jnp.zeros((1, 1), jnp.int32), frames, initial_state(1))

  def predict(
    params: Params, frames: Array, actions: Array, next_frames: Array, state: LstmState
  ) -> tuple[Array, Array, LstmState]:
    return blocks.apply(network, params, frames, actions, next_frames, state)

  def losses(
    params: Params, frames: Array, actions: Array, next_frames: Array, rewards: Array, ends: Array, weights: Array
  ) -> Losses:
    chex.assert_equal_shape([actions, rewards, ends, weights])
    reward_logits, end_logits, _ = predict(params, frames, actions, next_frames, initial_state(frames.shape[0]))
    reward_labels = jnp.sign(rewards).astype(jnp.int32) + 1
    end_labels = ends.astype(jnp.int32)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    weights = weights.astype(jnp.float32)
    return Losses(
      {
        "reward": Term(cross_entropy(reward_logits, reward_labels), weights),
        "end": Term(cross_entropy(end_logits, end_labels), weights),
      },
      {
        "reward_confusion": confusion(reward_labels, reward_logits, weights),
        "end_confusion": confusion(end_labels, end_logits, weights),
      },
    )

  return RewardEnd(init, initial_state, predict, losses, network.prepare)
