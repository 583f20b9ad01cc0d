"""A GPU kernel in Pallas: a 3 x 3 convolution with its bias, the skip connection, and the norm and SiLU that follow.

It has no gradient. Its reference is `ops.images.conv3x3`; see `ops.kernels` for the other kernels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jedi_jax.ops import kernels

Array = jax.Array


class Convolution(NamedTuple):
  """Parameters of a 3 x 3 convolution for `convolution`.

  Attributes:
    kernel: [9 I, O], rows of the kernel [3, 3, I, O] in its order.
    bias: [O].
  """

  kernel: Array
  bias: Array


class Skip(NamedTuple):
  """A linear layer beside a convolution for `convolution`, or the identity.

  Attributes:
    x: [B, H, W, J].
    kernel: [J, O]; None adds `x` itself, and then J is O.
    bias: [O]; None with the kernel.
  """

  x: Array
  kernel: Array | None = None
  bias: Array | None = None


CHANNELS = 64
"""Input channels that a program takes in one round."""
STAGES = 4
"""Triton's number of stages: the loads of up to three rounds are under way, since a program mostly waits for them."""
SHARED = 54 * 2**10
"""Bytes of shared memory for them. Then the smallest multiprocessors, which have 100 KiB, hold two programs."""


def rounds(positions: int, group: int, itemsize: int) -> tuple[int, int]:
  """Returns how many input channels a program of `convolution` takes in one round, and the number of stages.

  Args:
    positions: H W of an image.
    group: output channels of a program.
    itemsize: bytes of an activation.
  """
  row = (kernels.side(positions) + kernels.side(group)) * itemsize
  channels = CHANNELS if CHANNELS * row <= SHARED // 4 else 32
  return channels, max(2, min(STAGES, SHARED // (channels * row)))


def fits_convolution(x: Array, group: int) -> bool:
  """Whether `convolution` can hold a group of output channels of an image [H, W, I] of `x` [B, H, W, I]."""
  return kernels.side(x.shape[1] * x.shape[2]) * kernels.side(group) <= kernels.MAX_ELEMENTS // 2


def convolution(
  x: Array,
  layer: Convolution,
  group: int,
  mode: str,
  *,
  skip: Skip | None = None,
  norm: kernels.GroupNormSettings | None = None,
  affine: Array | None = None,
) -> Array:
  """Convolves with a 3 x 3 kernel and one pixel of zero padding, adds a skip connection, and normalises, if asked.

  It is one kernel, of which one program computes a group of output channels of one image. It has no gradient.

  Args:
    x: [B, H, W, I].
    layer: kernel and bias.
    group: output channels of a group; divides O.
    mode: 'pallas' or 'interpret'.
    skip: what is added to the convolution.
    norm: group norm, gain, shift and SiLU of the sum, as of `group_norm`; its group is `group`.
    affine: [B or 1, D] of that norm.

  Returns:
    [B, H, W, O] of x's dtype.

  Raises:
    ValueError: if the shapes do not fit together.
  """
  batch, height, width, inputs = x.shape
  outputs, positions = layer.kernel.shape[-1], height * width
  if layer.kernel.shape[0] != 9 * inputs or outputs % group or (norm is not None and norm.group != group):
    raise ValueError(f"kernel {layer.kernel.shape} and groups of {group} channels do not fit {x.shape}")
  if (norm is None) != (affine is None):
    raise ValueError("a norm and its gains and shifts, `affine`, are given together")
  if norm is not None and affine is not None:
    kernels.check_affine(affine, batch, outputs, norm)
  if skip is not None:
    given = None if skip.kernel is None else skip.kernel.shape
    if (skip.kernel is None) != (skip.bias is None) or given not in (None, (skip.x.shape[3], outputs)):
      raise ValueError(f"skip {skip.x.shape} does not fit a layer {given} to {outputs} channels with a bias")
    if skip.x.shape[:3] != x.shape[:3] or (given is None and skip.x.shape[3] != outputs):
      raise ValueError(f"skip {skip.x.shape} does not fit {x.shape} and {outputs} channels")

  def image(channels: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, positions, channels), lambda b, g: (b, 0, 0))

  def columns(rows: int) -> pl.BlockSpec:
    return pl.BlockSpec((rows, group), lambda b, g: (0, g))

  tile = pl.BlockSpec((None, positions, group), lambda b, g: (b, 0, g))
  most, stages = rounds(positions, group, x.dtype.itemsize)
  operands = {
    "x": (kernels.flat(x), image(inputs)),
    "kernel": (layer.kernel.astype(x.dtype), columns(9 * inputs)),
    "bias": (layer.bias[None], columns(1)),
  }
  if skip is not None and skip.kernel is not None and skip.bias is not None:
    operands["skip"] = (kernels.flat(skip.x), image(skip.x.shape[-1]))
    operands["skip_kernel"] = (skip.kernel.astype(x.dtype), columns(skip.x.shape[-1]))
    operands["skip_bias"] = (skip.bias[None], columns(1))
  elif skip is not None:
    operands["skip"] = (kernels.flat(skip.x), tile)
  if norm is not None and affine is not None:
    own = affine.shape[0] == batch
    operands["affine"] = (affine, pl.BlockSpec((1, affine.shape[1]), lambda b, g: (b if own else 0, 0)))

  def kernel(*all_refs: Any) -> None:
    *in_refs, out_ref = all_refs
    refs = dict(zip(operands, in_refs, strict=True))
    rows, channels = jnp.arange(kernels.side(positions)), jnp.arange(kernels.side(group))
    place = kernels.divide(rows, width)
    of_group = channels < group
    mask = (rows < positions)[:, None] & of_group[None]

    def of_channels(ref: Any) -> Array:
      return kernels.load(ref.at[0, channels], of_group).astype(jnp.float32)[None]

    def product(x_ref: Any, kernel_ref: Any, taps: int) -> Array:
      """Sums over taps and input channels, `depth` channels in a round."""
      features = x_ref.shape[1]
      depth = min(kernels.side(features), most)
      parts = -(-features // depth)

      def add(i: Array, total: Array) -> Array:
        tap, part = kernels.divide(i, parts)
        feature = part * depth + jnp.arange(depth)
        down, right = (side - taps // 9 for side in kernels.divide(tap, 3))  # Of a single tap they are 0.
        source, inside = kernels.neighbour(place, (down, right), (height, width))
        inside &= rows < positions
        source, real = jnp.where(inside, source, 0), feature < features
        a = kernels.load(x_ref.at[source[:, None], feature[None]], inside[:, None] & real[None])
        at = jnp.where(real, tap * features + feature, 0)
        b = kernels.load(kernel_ref.at[at[:, None], channels[None]], real[:, None] & of_group[None])
        return total + kernels.product(a, b)

      return jax.lax.fori_loop(0, taps * parts, add, jnp.zeros((len(rows), len(channels)), jnp.float32))

    y = product(refs["x"], refs["kernel"], 9) + of_channels(refs["bias"])
    if "skip_kernel" in refs:
      y += product(refs["skip"], refs["skip_kernel"], 1) + of_channels(refs["skip_bias"])
    elif "skip" in refs:
      y += kernels.load(refs["skip"].at[rows[:, None], channels[None]], mask).astype(jnp.float32)
    if norm is not None:
      y, _ = kernels.normalise(jnp.where(mask, y, 0.0), mask, positions * group, norm.epsilon)
      first = norm.start + pl.program_id(1) * group
      gain, shift = (
        kernels.load(refs["affine"].at[0, first + start + channels], of_group).astype(jnp.float32)[None]
        for start in (0, outputs)
      )
      y = y * (norm.offset + gain) + shift
      y = y * jax.nn.sigmoid(y) if norm.silu else y
    kernels.store(out_ref.at[rows[:, None], channels[None]], y, mask)

  call = kernels.call(
    kernel,
    mode,
    elements=2 * kernels.side(positions) * kernels.side(group),
    stages=stages,
    grid=(batch, outputs // group),
    in_specs=[spec for _, spec in operands.values()],
    out_specs=tile,
    out_shape=jax.ShapeDtypeStruct((batch, positions, outputs), x.dtype),
  )
  return call(*(value for value, _ in operands.values())).reshape(batch, height, width, outputs)
