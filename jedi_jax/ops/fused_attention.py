"""A GPU kernel in Pallas: the layer of queries, keys and values, and self-attention.

It has no gradient. Its reference is `ops.kernels.attention_reference`; see `ops.kernels` for the other kernels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jedi_jax.ops import kernels

Array = jax.Array

CHANNELS = 32
"""Input channels that a program takes in one round."""


def attention(x: Array, kernel: Array, bias: Array, heads: int, mode: str) -> Array:
  """Computes multi-head self-attention over all positions, of which a program computes one head of one image.

  Args:
    x: [B, H, W, C].
    kernel: [C, 3 C], of queries, keys and values, each of `heads` heads of C / heads channels.
    bias: [3 C].
    heads: divides C.
    mode: 'pallas' or 'interpret'.

  Returns:
    [B, H W, C] of x's dtype, before the layer that joins the heads.

  Raises:
    ValueError: if the shapes do not fit together.
  """
  batch, channels = x.shape[0], x.shape[-1]
  if kernel.shape != (channels, 3 * channels) or bias.shape != (3 * channels,) or channels % heads:
    raise ValueError(f"kernel {kernel.shape}, bias {bias.shape} and {heads} heads do not fit {x.shape}")
  positions, width = x.shape[1] * x.shape[2], channels // heads

  def program(x_ref: Any, kernel_ref: Any, bias_ref: Any, out_ref: Any) -> None:
    rows, columns = jnp.arange(kernels.side(positions)), jnp.arange(kernels.side(width))
    real, of_head = rows < positions, columns < width
    first = pl.program_id(1) * width + columns
    depth = min(kernels.side(channels), CHANNELS)

    def add(i: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
      own = i * depth + jnp.arange(depth)
      inside = own < channels
      a = kernels.load(x_ref.at[rows[:, None], own[None]], real[:, None] & inside[None])
      mask = inside[:, None] & of_head[None]
      parts = (kernels.load(kernel_ref.at[own[:, None], (j * channels + first)[None]], mask) for j in range(3))
      return tuple(total + kernels.product(a, part) for total, part in zip(totals, parts, strict=True))

    zeros = jnp.zeros((len(rows), len(columns)), jnp.float32)
    totals = jax.lax.fori_loop(0, -(-channels // depth), add, (zeros,) * 3)
    biases = (kernels.load(bias_ref.at[0, j * channels + first], of_head).astype(jnp.float32) for j in range(3))
    query, key, value = ((total + bias[None]).astype(x_ref.dtype) for total, bias in zip(totals, biases, strict=True))
    weights = kernels.attention_weights(query, key, real, width**-0.5)
    mask = real[:, None] & of_head[None]
    kernels.store(out_ref.at[rows[:, None], first[None]], kernels.product(weights.astype(value.dtype), value), mask)

  image = pl.BlockSpec((None, positions, channels), lambda b, h: (b, 0, 0))
  operands = (kernels.flat(x), kernel.astype(x.dtype), bias[None])
  call = kernels.call(
    program,
    mode,
    elements=kernels.side(positions) ** 2,
    grid=(batch, heads),
    in_specs=[image, *(pl.BlockSpec(value.shape, lambda b, h: (0, 0)) for value in operands[1:])],
    out_specs=image,
    out_shape=jax.ShapeDtypeStruct((batch, positions, channels), x.dtype),
  )
  return call(*operands)
