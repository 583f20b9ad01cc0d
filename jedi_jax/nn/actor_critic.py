"""The network of the actor-critic."""

from collections.abc import Sequence

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jedi_jax.nn.encoder import EncoderNetwork
from jedi_jax.nn.lstm import Lstm
from jedi_jax.types import Compute, LstmState

Array = jax.Array


class ActorCriticNetwork(nn.Module):
  """Optional encoder stages, an LSTM over time, linear heads for policy and value (zero at initialisation).

  Attributes:
    num_actions: A.
    channels: channels of the encoder stages; empty to read the flattened frame.
    downsample: whether each stage pools.
    lstm_width: width of the LSTM.
    compute: how it computes.
  """

  num_actions: int
  channels: Sequence[int]
  downsample: Sequence[bool]
  lstm_width: int
  compute: Compute = Compute()

  @nn.compact
  def __call__(
    self, frames: Array, state: LstmState, keep: Array | None = None, fallback: LstmState | None = None
  ) -> tuple[Array, Array, LstmState]:
    """Computes policy and value for T successive frames.

    Args:
      frames: [B, T, H, W, C].
      state: LSTM state before the first frame.
      keep: optional [B, T]; where it is 0 the LSTM's state after frame t is replaced by `fallback`.
      fallback: LSTM state, zeros if None; see `Lstm`.

    Returns:
      Policy logits [B, T, A] and values [B, T], float32; the state after the last frame.
    """
    chex.assert_rank(frames, 5)
    batch, time = frames.shape[:2]
    x = frames
    if self.channels:
      x = x.reshape(batch * time, *x.shape[2:])
      x = EncoderNetwork(self.channels, self.downsample, compute=self.compute, name="encoder")(x)
    x = x.reshape(batch, time, -1)
    hidden, state = Lstm(self.lstm_width, self.compute, name="lstm")(x, state, keep, fallback)
    zeros = nn.initializers.zeros_init()
    logits = nn.Dense(self.num_actions, kernel_init=zeros, name="actor")(hidden)
    values = nn.Dense(1, kernel_init=zeros, name="critic")(hidden)[..., 0]
    return logits.astype(jnp.float32), values.astype(jnp.float32), state
