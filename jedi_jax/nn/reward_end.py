"""The network of the reward / end model."""

from collections.abc import Sequence

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jedi_jax.nn import blocks, chain, initializers
from jedi_jax.nn.lstm import Lstm
from jedi_jax.types import Compute, LstmState, Params

Array = jax.Array


class RewardEndNetwork(nn.Module, kw_only=True):
  """Residual blocks on pairs of successive frames, an LSTM over time, a two-layer head.

  Attributes:
    num_actions: A.
    channels: channels of the levels; two more blocks with self-attention follow the last level.
    depths: residual blocks of each level.
    attention: whether each level has self-attention.
    downsample: whether the resolution halves between levels.
    conditioning_width: width of the action embedding.
    lstm_width: width of LSTM and head.
    compute: how it computes.
  """

  num_actions: int
  channels: Sequence[int]
  depths: Sequence[int]
  attention: Sequence[bool]
  downsample: bool
  conditioning_width: int
  lstm_width: int
  compute: Compute = Compute()

  @nn.compact
  def __call__(
    self, frames: Array, actions: Array, next_frames: Array, state: LstmState
  ) -> tuple[Array, Array, LstmState]:
    """Predicts rewards and ends of T transitions.

    Args:
      frames: [B, T, H, W, C].
      actions: [B, T] int32.
      next_frames: [B, T, H, W, C]; the frames that the actions led to.
      state: LSTM state before the first transition.

    Returns:
      Logits [B, T, 3] of reward signs -1, 0, 1 and [B, T, 2] of continuing and ending, float32; the state after the
      last transition.
    """
    chex.assert_rank(frames, 5)
    chex.assert_equal_shape([frames, next_frames])
    batch, time = frames.shape[:2]
    chex.assert_shape(actions, (batch, time))

    x = jnp.concatenate([frames, next_frames], axis=-1).reshape(batch * time, *frames.shape[2:4], -1)
    embed = nn.Embed(
      self.num_actions, self.conditioning_width, embedding_init=initializers.normal, name="action_embedding"
    )
    condition = blocks.Condition.of(self, embed(actions.reshape(batch * time)))
    x = blocks.Conv3x3(self.channels[0], compute=self.compute, name="conv_in")(x)
    chained = chain.apply(self, self._plan(), x, condition)
    for level, own in enumerate(self._levels() if chained is None else ()):
      if self.downsample and level > 0:
        x = blocks.Downsample(compute=self.compute, name=f"downsample_{level}")(x)
      for name, features, attention in own:
        x = blocks.ResidualBlock(features=features, attention=attention, compute=self.compute, name=name)(x, condition)
    x = x if chained is None else chained
    x = x.reshape(batch, time, -1)
    hidden, state = Lstm(self.lstm_width, self.compute, name="lstm")(x, state)
    h = nn.silu(blocks.dense(self.lstm_width, self.lstm_width, name="head_0", dtype=self.compute.dtype)(hidden))
    logits = blocks.dense(5, self.lstm_width, name="head_1", dtype=self.compute.dtype, use_bias=False)(h).astype(
      jnp.float32
    )
    return logits[..., :3], logits[..., 3:], state

  def prepare(self, params: Params) -> Params:
    """Prepares parameters as `blocks.prepare` does; blocks of one resolution are also joined, see `chain.join`."""
    prepared = blocks.prepare(params, self.compute)
    one_resolution = not self.downsample or len(self.channels) == 1
    return {**prepared, **chain.join(prepared, self._plan(), self.compute)} if one_resolution else prepared

  def _plan(self) -> list[chain.Block]:
    return [block for level in self._levels() for block in level]

  def _levels(self) -> list[list[chain.Block]]:
    """Returns the residual blocks of each level."""
    levels = [
      [chain.Block(f"block_{level}_{i}", features, attention) for i in range(depth)]
      for level, (features, depth, attention) in enumerate(zip(self.channels, self.depths, self.attention, strict=True))
    ]
    levels[-1] += [chain.Block(f"last_{i}", self.channels[-1], attention=True) for i in range(2)]
    return levels
