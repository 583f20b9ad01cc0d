"""The network of the reward / end model."""

from collections.abc import Sequence
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jedi_jax.nn import blocks
from jedi_jax.types import LstmState

Array = jax.Array


class RewardEndNetwork(nn.Module):
  """Residual blocks on pairs of successive frames, an LSTM over time, a two-layer head.

  Attributes:
    num_actions: A.
    channels: channels of the levels; a last pair of blocks with self-attention follows them.
    depths: residual blocks on each level.
    attention: self-attention on each level.
    downsample: whether the resolution halves between levels.
    conditioning_width: width of the action embedding.
    lstm_width: width of LSTM and head.
    lowering: see `blocks.conv3x3`.
    dtype: of the activations.
  """

  num_actions: int
  channels: Sequence[int]
  depths: Sequence[int]
  attention: Sequence[bool]
  downsample: bool
  conditioning_width: int
  lstm_width: int
  lowering: str = "lax"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, frames: Array, actions: Array, next_frames: Array, state: LstmState
  ) -> tuple[Array, Array, LstmState]:
    """Predicts reward and end of T transitions.

    Args:
      frames: [B, T, H, W, C].
      actions: [B, T] int32.
      next_frames: [B, T, H, W, C]; what the action led to.
      state: LSTM state before the first transition.

    Returns:
      Logits [B, T, 3] of reward signs -1, 0, 1 and [B, T, 2] of going on and ending, float32; the state afterwards.
    """
    chex.assert_rank(frames, 5)
    chex.assert_equal_shape([frames, next_frames])
    batch, time = frames.shape[:2]
    chex.assert_shape(actions, (batch, time))

    def block(features: int, attention: bool, name: str) -> blocks.ResidualBlock:
      return blocks.ResidualBlock(features, attention, lowering=self.lowering, dtype=self.dtype, name=name)

    x = jnp.concatenate([frames, next_frames], axis=-1).reshape(batch * time, *frames.shape[2:4], -1)
    embed = nn.Embed(
      self.num_actions, self.conditioning_width, embedding_init=nn.initializers.normal(1.0), name="action_embedding"
    )
    condition = embed(actions.reshape(batch * time))
    x = blocks.Conv3x3(self.channels[0], lowering=self.lowering, dtype=self.dtype, name="conv_in")(x)
    for level, (features, depth, attention) in enumerate(zip(self.channels, self.depths, self.attention, strict=True)):
      if self.downsample and level > 0:
        x = blocks.Downsample(lowering=self.lowering, dtype=self.dtype, name=f"downsample_{level}")(x)
      for i in range(depth):
        x = block(features, attention, f"block_{level}_{i}")(x, condition)
    for i in range(2):
      x = block(self.channels[-1], True, f"last_{i}")(x, condition)
    x = x.reshape(batch, time, -1)
    hidden, state = blocks.Lstm(self.lstm_width, dtype=self.dtype, name="lstm")(x, state)
    h = nn.silu(blocks.dense(self.lstm_width, self.lstm_width, name="head_0", dtype=self.dtype)(hidden))
    logits = blocks.dense(5, self.lstm_width, name="head_1", dtype=self.dtype, use_bias=False)(h).astype(jnp.float32)
    return logits[..., :3], logits[..., 3:], state
