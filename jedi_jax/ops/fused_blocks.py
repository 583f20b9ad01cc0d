"""A GPU kernel in Pallas: a chain of residual blocks on small images, of which a program computes one image.

It has no gradient. Its reference is a sequence of `nn.blocks.ResidualBlock`; see `ops.kernels` for the other kernels.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jedi_jax.ops import kernels

Array = jax.Array

MAX_BYTES = 32 * 2**10
"""Bytes of the largest array of a program, of which some are in shared memory; a multiprocessor has 100 KiB or more."""


class Attention(NamedTuple):
  """Parameters of the self-attention of M blocks of width C.

  Attributes:
    affine: [M, 2 C], gain and shift of the norm before it.
    qkv: [M C, 3 C] and [M, 3 C], kernels and biases of queries, keys and values.
    out: [M C, C] and [M, C], kernels and biases of the layer after it.
  """

  affine: Array
  qkv: tuple[Array, Array]
  out: tuple[Array, Array]


class Blocks(NamedTuple):
  """Parameters of N residual blocks of width C, whose group norms have one group.

  Attributes:
    kernel: [18 N C, C]: for each block those of its two convolutions, each [9 C, C] as in `fused_convolution`.
    bias: [2 N, C].
    attention: of the blocks that have it, in their order; None if none has.
  """

  kernel: Array
  bias: Array
  attention: Attention | None


def fits(x: Array) -> bool:
  """Whether `residual_blocks` can hold an image [H, W, C] of `x` [B, H, W, C], and the matrix that shifts it."""
  positions = kernels.side(x.shape[1] * x.shape[2])
  return positions * max(positions, kernels.side(x.shape[3])) * x.dtype.itemsize <= MAX_BYTES


def residual_blocks(
  x: Array,
  params: Blocks,
  affine: Array,
  attention: Sequence[bool],
  *,
  start: int,
  heads: int,
  epsilon: float,
  mode: str,
) -> Array:
  """Applies N residual blocks with adaptive group norm and SiLU, and self-attention after some, in one kernel.

  Args:
    x: [B, H, W, C].
    params: their parameters.
    affine: [B, D >= start + 4 N C]: from column `start` on, for each block, gain and shift of its first norm and then
      of its second, C columns each.
    attention: whether each of the N blocks has self-attention.
    start: see `affine`.
    heads: attention heads; divides C.
    epsilon: added to variances.
    mode: 'pallas' or 'interpret'.

  Returns:
    [B, H, W, C] of x's dtype.

  Raises:
    ValueError: if the shapes do not fit together.
  """
  batch, height, width, channels = x.shape
  positions, count = height * width, len(attention)
  if params.kernel.shape != (18 * count * channels, channels) or params.bias.shape != (2 * count, channels):
    raise ValueError(f"parameters {params.kernel.shape} are not those of {count} blocks on {x.shape}")
  if affine.shape[0] != batch or start < 0 or affine.shape[1] < start + 4 * count * channels:
    raise ValueError(f"affine {affine.shape} has no {count} x 4 x {channels} columns from {start} on for {x.shape}")
  given = params.attention
  rows = 0 if given is None else given.affine.shape[0]
  if rows != sum(attention) or channels % heads:
    raise ValueError(f"parameters of {rows} layers do not fit attention {tuple(attention)} with {heads} heads")

  image = pl.BlockSpec((None, positions, channels), lambda b: (b, 0, 0))
  operands = {"x": kernels.flat(x), "affine": affine, "kernel": params.kernel.astype(x.dtype), "bias": params.bias}
  specs = [image, pl.BlockSpec((1, affine.shape[1]), lambda b: (b, 0))]
  if given is not None:
    operands |= {"norm": given.affine, "qkv": given.qkv[0].astype(x.dtype), "qkv_bias": given.qkv[1]}
    operands |= {"out": given.out[0].astype(x.dtype), "out_bias": given.out[1]}
  whole = [pl.BlockSpec(value.shape, lambda b: (0, 0)) for value in list(operands.values())[2:]]

  def kernel(*all_refs: Any) -> None:
    *in_refs, out_ref = all_refs
    program = _Program(dict(zip(operands, in_refs, strict=True)), (height, width, channels), heads, epsilon)
    x, done, attended = program.image(), 0, 0
    for attends, group in itertools.groupby(attention):
      size = len(list(group))

      def block(i: Array, x: Array, *, attends: bool = attends, done: int = done, attended: int = attended) -> Array:
        x = program.block(x, i + done, start)
        return program.attend(x, i + attended) if attends else x.astype(program.dtype)

      x = jax.lax.fori_loop(0, size, block, x)
      done, attended = done + size, attended + size * attends
    program.store(out_ref, x)

  call = kernels.call(
    kernel,
    mode,
    elements=kernels.side(positions) * kernels.side(max(positions, channels)),
    grid=(batch,),
    in_specs=[*specs, *whole],
    out_specs=image,
    out_shape=jax.ShapeDtypeStruct((batch, positions, channels), x.dtype),
  )
  return call(*operands.values()).reshape(x.shape)


class _Program:
  """What one program computes of its image [P, C], padded with zeros to sides that the matrix units take."""

  def __init__(self, refs: dict[str, Any], shape: tuple[int, int, int], heads: int, epsilon: float):
    self._refs, self._heads, self._epsilon = refs, heads, epsilon
    self._height, self._width, self._channels = shape
    self._positions = self._height * self._width
    self.dtype = refs["x"].dtype
    self._rows, self._columns = jnp.arange(kernels.side(self._positions)), jnp.arange(kernels.side(self._channels))
    self._place = kernels.divide(self._rows, self._width)
    self._real, self._of_image = self._rows < self._positions, self._columns < self._channels
    self._mask = self._real[:, None] & self._of_image[None]

  def image(self) -> Array:
    return kernels.load(self._refs["x"].at[self._rows[:, None], self._columns[None]], self._mask)

  def store(self, ref: Any, value: Array) -> None:
    kernels.store(ref.at[self._rows[:, None], self._columns[None]], value, self._mask)

  def block(self, x: Array, i: Array, start: int) -> Array:
    """Applies block `i` but for its attention; the result is float32."""
    first = start + 4 * self._channels * i
    h = self._norm(x.astype(jnp.float32), self._refs["affine"], 0, first, offset=1.0, silu=True)
    h = self._convolve(h, 2 * i)
    h = self._norm(h, self._refs["affine"], 0, first + 2 * self._channels, offset=1.0, silu=True)
    return x.astype(jnp.float32) + self._convolve(h, 2 * i + 1)

  def attend(self, x: Array, i: Array) -> Array:
    """Applies the attention `i`, and the norm before it, to float32 `x`."""
    x = self._norm(x, self._refs["norm"], i, 0, offset=0.0, silu=False)
    width = self._channels // self._heads
    of_head = jnp.arange(kernels.side(width))
    rows = (i * self._channels + self._columns)[:, None]

    def head(j: Array, total: Array) -> Array:
      real = of_head < width

      def project(part: int) -> Array:
        columns = part * self._channels + j * width + of_head
        weights = kernels.load(self._refs["qkv"].at[rows, columns[None]], self._of_image[:, None] & real[None])
        bias = kernels.load(self._refs["qkv_bias"].at[i, columns], real).astype(jnp.float32)
        return (kernels.product(x, weights) + bias[None]).astype(self.dtype)

      query, key, value = (project(part) for part in range(3))
      weights = kernels.attention_weights(query, key, self._real, width**-0.5)
      h = kernels.product(weights.astype(self.dtype), value).astype(self.dtype)
      own = (i * self._channels + j * width + of_head)[:, None]
      out = kernels.load(self._refs["out"].at[own, self._columns[None]], real[:, None] & self._of_image[None])
      return total + kernels.product(h, out)

    start = x.astype(jnp.float32) + self._row(self._refs["out_bias"], i)
    return jax.lax.fori_loop(0, self._heads, head, start).astype(self.dtype)

  def _norm(self, x: Array, ref: Any, row: Array | int, column: Array | int, *, offset: float, silu: bool) -> Array:
    """Normalises float32 `x`, with C gains from a column of `ref` on and then C shifts."""
    count = self._positions * self._channels
    x, _ = kernels.normalise(jnp.where(self._mask, x, 0.0), self._mask, count, self._epsilon)
    gain, shift = (self._row(ref, row, column + at) for at in (0, self._channels))
    y = x * (offset + gain) + shift
    y = y * jax.nn.sigmoid(y) if silu else y
    return jnp.where(self._mask, y, 0.0).astype(self.dtype)

  def _convolve(self, h: Array, layer: Array) -> Array:
    """Convolves with kernel and bias number `layer`; the result is float32.

    A product with a matrix of ones and zeros shifts the image, since a program cannot index an array that it holds.
    """

    def add(tap: Array, total: Array) -> Array:
      down, right = kernels.divide(tap, 3)
      source, inside = kernels.neighbour(self._place, (down - 1, right - 1), (self._height, self._width))
      source = jnp.where(inside & self._real, source, -1)
      shift = (source[:, None] == self._rows[None]).astype(self.dtype)
      inputs = ((layer * 9 + tap) * self._channels + self._columns)[:, None]
      at = self._refs["kernel"].at[inputs, self._columns[None]]
      weights = kernels.load(at, self._of_image[:, None] & self._of_image[None])
      return total + kernels.product(kernels.product(shift, h).astype(self.dtype), weights)

    start = jnp.zeros((len(self._rows), len(self._columns)), jnp.float32)
    return jax.lax.fori_loop(0, 9, add, start) + self._row(self._refs["bias"], layer)

  def _row(self, ref: Any, row: Array | int, column: Array | int = 0) -> Array:
    """Loads C columns of a row as float32, [1, C]."""
    return kernels.load(ref.at[row, column + self._columns], self._of_image).astype(jnp.float32)[None]
