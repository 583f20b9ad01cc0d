"""Parameter-free functions of images and latents: convolution, pooling, patches, up-sampling, soft clamp, colours."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

MAX_CHANNELS = 16
"""Largest number of channels of an observation: each has a colour of its own in pictures."""
_COLORS = np.array(
  [
    (90, 220, 90), (235, 70, 60), (70, 120, 240), (245, 215, 60), (200, 80, 220), (70, 215, 225), (245, 145, 45),
    (240, 240, 240), (150, 100, 60), (250, 150, 190), (30, 140, 120), (170, 160, 250), (140, 30, 50), (190, 230, 150),
    (120, 120, 40), (130, 135, 145),
  ],
  np.uint16,
)  # fmt: skip


def resolve_convolution(lowering: str, *, packed: bool = False) -> str:
  """Returns the lowering of 3 x 3 convolutions that suits the default backend.

  XLA's CPU backend computes the gradients of a convolution inside a loop 19 to 75 times slower than 'matmul_gradient'
  (see docs/performance_cpu.md).

  Args:
    lowering: a lowering of `conv3x3`, which is returned unchanged; 'auto'; or 'pallas', which is 'auto' on a GPU.
    packed: whether the convolution is mapped over the kernels of several runs.
  """
  if lowering not in ("auto", "pallas"):
    return lowering
  alone = "matmul_gradient" if lowering == "auto" and jax.default_backend() == "cpu" else "lax"
  return f"{alone}_per_run" if packed else alone


_PER_RUN = {f"{alone}_per_run": alone for alone in ("lax", "matmul_gradient")}
_MANY_POSITIONS = 2**16
"""Positions of a batch from which one convolution is work enough for a device."""


def conv3x3(x: Array, kernel: Array, *, stride: int = 1, lowering: str = "lax") -> Array:
  """Convolves with a 3 x 3 kernel and one pixel of zero padding.

  The lowerings compute the same function:

    'lax': XLA's convolution and its gradients.
    'matmul_gradient': XLA's convolution; the kernel's gradient is a sum of matrix products, and at stride 2 the input's
      gradient is a convolution without dilation.
    'matmul': one matrix product over the nine shifted inputs. Under `vmap` over kernels it stays a batched matrix
      product, where 'lax' and 'matmul_gradient' become grouped convolutions.
    'lax_per_run', 'matmul_gradient_per_run': 'matmul' for fewer than 65,536 positions. For more, whose nine shifted
      inputs would take much memory, 'lax' or 'matmul_gradient', under `vmap` one convolution for each element. They
      have no second derivative.

  Args:
    x: [B, H, W, I].
    kernel: [3, 3, I, O] of the same dtype.
    stride: 1 or 2.
    lowering: one of them.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), O].

  Raises:
    ValueError: if the lowering is unknown.
  """
  if lowering in _PER_RUN:
    if math.prod(x.shape[:3]) >= _MANY_POSITIONS:
      return _conv_per_run(x, kernel, stride, _PER_RUN[lowering])
    lowering = "matmul"
  if lowering == "lax":
    return _conv(x, kernel, stride)
  if lowering == "matmul_gradient":
    return _conv_matmul_gradient(x, kernel, stride)
  if lowering == "matmul":
    return jnp.concatenate(_shifted(x, stride), axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
  raise ValueError(f"unknown lowering {lowering!r}")


def _conv(x: Array, kernel: Array, stride: int) -> Array:
  return lax.conv_general_dilated(
    x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def _shifted(x: Array, stride: int) -> list[Array]:
  """Returns for each of the nine kernel entries the inputs it multiplies, [B, H / stride, W / stride, I]."""
  height, width = (-(-size // stride) for size in x.shape[1:3])
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return [
    padded[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
    for i in range(3)
    for j in range(3)
  ]


@jax.custom_vjp
def _conv_stride_1(x: Array, kernel: Array) -> Array:
  return _conv(x, kernel, 1)


@jax.custom_vjp
def _conv_stride_2(x: Array, kernel: Array) -> Array:
  return _conv(x, kernel, 2)


def _conv_matmul_gradient(x: Array, kernel: Array, stride: int) -> Array:
  return {1: _conv_stride_1, 2: _conv_stride_2}[stride](x, kernel)


def _stride_1_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
  x, kernel = residuals
  gradient = _conv(cotangent, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), 1)

  def taps(x: Array, cotangent: Array) -> Array:
    # The kernel's rows shift the input, its columns the cotangent: one product of 3 I x 3 O instead of 9 I x O.
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    rows = jnp.concatenate([padded[:, i : i + height] for i in range(3)], axis=-1)
    padded = jnp.pad(cotangent, ((0, 0), (0, 0), (1, 1), (0, 0)))
    columns = jnp.concatenate([padded[:, :, 2 - j : 2 - j + width] for j in range(3)], axis=-1)
    return jnp.einsum("bhwi,bhwo->io", rows, columns, preferred_element_type=jnp.float32)

  shares = _sum_over_images(taps, x, cotangent)
  return gradient, shares.reshape(3, x.shape[-1], 3, cotangent.shape[-1]).swapaxes(1, 2)


def _stride_2_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
  x, kernel = residuals
  height, width, channels = x.shape[1:]
  # A block of 2 x 2 inputs affects 2 x 2 outputs, so its gradient is a 2 x 2 convolution to four times the channels.
  # XLA dilates the cotangent with zeros instead, and its CPU backend convolves that in a plain loop.
  phases = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0))).reshape(2, 2, 2, 2, channels, -1)[::-1, :, ::-1]
  phases = phases.transpose(0, 2, 5, 1, 3, 4).reshape(2, 2, -1, 4 * channels)
  squares = lax.conv_general_dilated(
    cotangent, phases, (1, 1), ((0, 1), (0, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  gradient = spread_patches(squares, 2)[:, :height, :width]

  def taps(x: Array, cotangent: Array) -> Array:
    shifted = jnp.concatenate(_shifted(x, 2), axis=-1)
    return jnp.einsum("bhwi,bhwo->io", shifted, cotangent, preferred_element_type=jnp.float32)

  return gradient, _sum_over_images(taps, x, cotangent).reshape(kernel.shape)


_CACHED_POSITIONS = 8192
"""Positions of a cotangent whose share of a kernel's gradient is computed at a time."""


def _sum_over_images(function: Callable[[Array, Array], Array], x: Array, cotangent: Array) -> Array:
  """Sums a function of the images over the batch, a few images at a time, and returns the sum in the dtype of x.

  The function returns float32: in bfloat16 the terms that are added last would be lost.

  A product over positions needs its left side transposed, and XLA writes that transpose out. For a batch of large
  images it goes to memory and back several times; for a few images it stays in the cache.
  """
  batch, height, width = cotangent.shape[:3]
  most = max(1, _CACHED_POSITIONS // (height * width))
  images = max(n for n in range(1, most + 1) if batch % n == 0)
  if images == batch:
    return function(x, cotangent).astype(x.dtype)
  dtype = x.dtype
  x, cotangent = (value.reshape(-1, images, *value.shape[1:]) for value in (x, cotangent))
  start = jnp.zeros_like(jax.eval_shape(function, x[0], cotangent[0]))
  return lax.scan(lambda total, pair: (total + function(*pair), None), start, (x, cotangent))[0].astype(dtype)


_conv_stride_1.defvjp(lambda x, kernel: (_conv(x, kernel, 1), (x, kernel)), _stride_1_backward)
_conv_stride_2.defvjp(lambda x, kernel: (_conv(x, kernel, 2), (x, kernel)), _stride_2_backward)


def _one_after_another(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `function` such that `vmap` calls it once for each element of the mapped axis. It has no gradient."""
  mapped = jax.custom_batching.custom_vmap(function)

  @mapped.def_vmap
  def call_each(size: int, in_batched: Sequence[bool], *args: Array) -> tuple[Any, Any]:
    outputs = [
      mapped(*(x[i] if batched else x for x, batched in zip(args, in_batched, strict=True))) for i in range(size)
    ]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *outputs), jax.tree.map(lambda _: True, outputs[0])

  return mapped


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv_per_run(x: Array, kernel: Array, stride: int, lowering: str) -> Array:
  return _one_after_another(lambda x, kernel: conv3x3(x, kernel, stride=stride, lowering=lowering))(x, kernel)


def _per_run_backward(
  stride: int, lowering: str, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
  def backward(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
    if lowering == "matmul_gradient":
      return (_stride_1_backward if stride == 1 else _stride_2_backward)((x, kernel), cotangent)
    (of_x,) = jax.linear_transpose(lambda x: _conv(x, kernel, stride), x)(cotangent)
    (of_kernel,) = jax.linear_transpose(lambda kernel: _conv(x, kernel, stride), kernel)(cotangent)
    return of_x, of_kernel

  return _one_after_another(backward)(*residuals, cotangent)


_conv_per_run.defvjp(
  lambda x, kernel, stride, lowering: (_conv_per_run(x, kernel, stride, lowering), (x, kernel)), _per_run_backward
)


def max_pool_2x2(x: Array) -> Array:
  """Returns the maximum over 2 x 2 blocks: [B, H, W, C] -> [B, H // 2, W // 2, C].

  An odd last row or column is dropped. The gradient of the slices used here is a select, while that of a windowed
  reduction is a slow scatter on CPUs.
  """
  height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
  x = x[:, :height, :width]
  rows = jnp.maximum(x[:, 0::2], x[:, 1::2])
  return jnp.maximum(rows[:, :, 0::2], rows[:, :, 1::2])


def stack_patches(x: Array, side: int) -> Array:
  """Stacks the pixels of square patches on the channels: [B, H, W, C] -> [B, H / side, W / side, side^2 C]."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height // side, side, width // side, side, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // side, width // side, side * side * channels)


def spread_patches(x: Array, side: int) -> Array:
  """Inverts `stack_patches`: [B, h, w, side^2 C] -> [B, side h, side w, C]."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height, width, side, side, channels // side**2)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, side * height, side * width, channels // side**2)


def upsample_nearest(x: Array) -> Array:
  """Repeats every position twice in height and width: [B, H, W, C] -> [B, 2 H, 2 W, C]."""
  batch, height, width, channels = x.shape
  x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
  return x.reshape(batch, 2 * height, 2 * width, channels)


def soft_clamp(z: Array, scale: float) -> Array:
  """Returns scale tanh(z / scale), in (-scale, scale); the identity for scale 0. Not idempotent."""
  return scale * jnp.tanh(z / scale) if scale else z


def to_rgb(images: np.ndarray) -> np.ndarray:
  """Draws images of any number of channels in colour.

  Three channels are taken as RGB, and one as grey. Otherwise every channel has a colour of its own. A pixel shows the
  channel with the largest value, the last of them if several are equal, with the brightness of that value.

  Args:
    images: [..., H, W, C] uint8, C at most `MAX_CHANNELS`.

  Returns:
    [..., H, W, 3] uint8.
  """
  channels = images.shape[-1]
  if channels in (1, 3):
    return images.repeat(3 // channels, axis=-1)
  shown = channels - 1 - images[..., ::-1].argmax(axis=-1)
  return (_COLORS[shown] * images.max(axis=-1, keepdims=True) // 255).astype(np.uint8)
