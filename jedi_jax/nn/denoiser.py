"""The inner network F of the denoiser (arXiv:2206.00364, eq. 7)."""

from collections.abc import Sequence

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jedi_jax.nn import blocks, initializers
from jedi_jax.nn.unet import UNet
from jedi_jax.types import Compute

Array = jax.Array


class InnerNetwork(nn.Module):
  """U-Net on the noisy frame and the past frames, conditioned on noise level and past actions.

  Attributes:
    num_actions: A.
    channels: channels of the U-Net's levels.
    depths: residual blocks per side of each level.
    attention: whether each level has self-attention.
    conditioning_width: width of the condition.
    compute: how it computes.
  """

  num_actions: int
  channels: Sequence[int]
  depths: Sequence[int]
  attention: Sequence[bool]
  conditioning_width: int
  compute: Compute = Compute()

  @nn.compact
  def __call__(self, noisy: Array, c_noise: Array, past: Array, actions: Array) -> Array:
    """Evaluates F.

    Args:
      noisy: [B, H, W, C] scaled noisy frame.
      c_noise: [B] embedding of the noise level.
      past: [B, L, H, W, C] scaled past frames, oldest first.
      actions: [B, L] int32; actions[:, i] was taken on past[:, i].

    Returns:
      [B, H, W, C] float32; at initialisation the bias of the last convolution.
    """
    batch, height, width, channels = noisy.shape
    length = past.shape[1]
    chex.assert_shape(past, (batch, length, height, width, channels))
    chex.assert_shape(actions, (batch, length))
    noise = blocks.FourierFeatures(self.conditioning_width, name="noise_embedding")(c_noise)
    embed = nn.Embed(
      self.num_actions,
      self.conditioning_width // length,
      embedding_init=initializers.normal,
      name="action_embedding",
    )
    condition = noise + embed(actions).reshape(batch, self.conditioning_width)
    embedded = self.conditioning_width
    condition = blocks.dense(embedded, embedded, name="condition_0", dtype=self.compute.dtype)(condition)
    condition = blocks.dense(embedded, embedded, name="condition_1", dtype=self.compute.dtype)(nn.silu(condition))
    stacked = jnp.moveaxis(past, 1, 3).reshape(batch, height, width, length * channels)
    x = jnp.concatenate([stacked, noisy], axis=-1)
    x = blocks.Conv3x3(self.channels[0], compute=self.compute, name="conv_in")(x)
    x = UNet(
      channels=self.channels,
      depths=self.depths,
      attention=self.attention,
      compute=self.compute,
      name="unet",
    )(x, blocks.Condition.of(self, condition))
    x = blocks.group_norm(x, silu=True, compute=self.compute, name="norm_out")
    zeros = nn.initializers.zeros_init()
    x = blocks.Conv3x3(channels, kernel_init=zeros, compute=self.compute, name="conv_out")(x)
    return x.astype(jnp.float32)
