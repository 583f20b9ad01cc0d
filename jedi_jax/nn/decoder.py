"""The decoder network, from latents to images."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from jedi_jax.nn import blocks
from jedi_jax.ops import images
from jedi_jax.types import Compute

Array = jax.Array


class DecoderNetwork(nn.Module):
  """The encoder's stages in reverse, with nearest-neighbour up-sampling where it pools: [B, h, w, c] -> [B, H, W, C].

  Attributes:
    image_shape: (H, W, C); the result is cropped, or padded at the edges, to this size.
    channels: channels of the encoder's stages, first to last.
    downsample: whether each stage of the encoder pools.
    patch: side of the encoder's patches.
    compute: how it computes.
  """

  image_shape: tuple[int, int, int]
  channels: Sequence[int]
  downsample: Sequence[bool]
  patch: int = 1
  compute: Compute = Compute()

  @nn.compact
  def __call__(self, latents: Array) -> Array:
    x = blocks.Conv3x3(self.channels[-1], compute=self.compute, name="conv_in")(latents)
    for stage in reversed(range(len(self.channels))):
      x = images.upsample_nearest(x) if self.downsample[stage] else x
      features = self.channels[max(0, stage - 1)]
      x = blocks.SmallResidualBlock(features, compute=self.compute, name=f"stage_{stage}")(x)
    height, width, channels = self.image_shape
    rows, columns = height // self.patch, width // self.patch
    # The encoder's pooling drops an odd last row or column.
    x = jnp.pad(x, ((0, 0), (0, max(0, rows - x.shape[1])), (0, max(0, columns - x.shape[2])), (0, 0)), mode="edge")
    x = blocks.group_norm(x, silu=True, compute=self.compute, name="norm_out")
    x = blocks.Conv3x3(channels * self.patch**2, compute=self.compute, name="conv_out")(x)
    return images.spread_patches(x[:, :rows, :columns], self.patch).astype(jnp.float32)
