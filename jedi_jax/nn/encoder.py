"""The encoder network, from images to latents."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from jedi_jax.nn import blocks
from jedi_jax.ops import images
from jedi_jax.types import Compute

Array = jax.Array


class EncoderNetwork(nn.Module):
  """Convolution, then stages of one small residual block and optional 2 x 2 max pooling.

  [B, H, W, C] -> [B, H / (p 2^n), W / (p 2^n), channels[-1]] with patches of side p and n stages that pool.

  Attributes:
    channels: channels of the stages.
    downsample: whether each stage pools.
    patch: side of the square patches that are stacked on the channels first.
    compute: how it computes.
  """

  channels: Sequence[int]
  downsample: Sequence[bool]
  patch: int = 1
  compute: Compute = Compute()

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = images.stack_patches(x, self.patch) if self.patch > 1 else x
    x = blocks.Conv3x3(self.channels[0], compute=self.compute, name="conv_in")(x)
    for stage, (features, pool) in enumerate(zip(self.channels, self.downsample, strict=True)):
      x = blocks.SmallResidualBlock(features, compute=self.compute, name=f"stage_{stage}")(x)
      x = images.max_pool_2x2(x) if pool else x
    return x
