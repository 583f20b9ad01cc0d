"""U-Net of residual blocks."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from jedi_jax.nn import blocks
from jedi_jax.ops import images
from jedi_jax.types import Compute

Array = jax.Array


class UNet(nn.Module, kw_only=True):
  """U-Net of residual blocks: ([B, H, W, C_0], condition) -> [B, H, W, C_0], C_0 = channels[0].

  Level i has depths[i] blocks down and depths[i] + 1 blocks up; the resolution halves between levels. Two blocks with
  self-attention follow the last level down. Inputs are padded with zeros at the bottom and right to a multiple of the
  total down-sampling, and outputs are cropped.
  """

  channels: Sequence[int]
  depths: Sequence[int]
  attention: Sequence[bool]
  compute: Compute = Compute()

  @nn.compact
  def __call__(self, x: Array, condition: blocks.Condition) -> Array:
    block = functools.partial(blocks.ResidualBlock, compute=self.compute)
    height, width = x.shape[1:3]
    multiple = 2 ** (len(self.channels) - 1)
    x = jnp.pad(x, ((0, 0), (0, -height % multiple), (0, -width % multiple), (0, 0)))
    skips: list[list[Array]] = []
    for level, (features, depth, attention) in enumerate(zip(self.channels, self.depths, self.attention, strict=True)):
      if level > 0:
        x = blocks.Downsample(compute=self.compute, name=f"downsample_{level}")(x)
      outputs = [x]
      for i in range(depth):
        x = block(features=features, attention=attention, name=f"down_{level}_{i}")(x, condition)
        outputs.append(x)
      skips.append(outputs)
    for i in range(2):
      x = block(features=self.channels[-1], attention=True, name=f"middle_{i}")(x, condition)
    for level in reversed(range(len(self.channels))):
      features, depth, attention = self.channels[level], self.depths[level], self.attention[level]
      for i, skip in enumerate(reversed(skips[level])):
        out = features if i < depth else self.channels[max(0, level - 1)]
        x = jnp.concatenate([x, skip], axis=-1)
        x = block(features=out, attention=attention, name=f"up_{level}_{i}")(x, condition)
      if level > 0:
        x = images.upsample_nearest(x)
        x = blocks.Conv3x3(x.shape[-1], compute=self.compute, name=f"upsample_{level}")(x)
    return x[:, :height, :width]
