"""GPU kernels of the networks' small operations, in Pallas.

They are group norm with gain, shift and SiLU, and self-attention; `ops.fused_convolution`, `ops.fused_attention` and
`ops.fused_blocks` have three more, without gradients. XLA makes several kernels of each; on latents of 8 x 8 a launch
costs more than the arithmetic. Each function here has a kernel for its value and one for its gradient. Sums are float32
whatever the inputs are. `kernels` is 'pallas', or 'interpret' for the same kernels evaluated by XLA on any device,
slowly. The reference of group norm is Flax's `GroupNorm`, of attention `attention_reference`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

Array = jax.Array

MAX_ELEMENTS = 16_384
"""Elements that one program of a kernel holds in registers."""


def resolve_kernels(kernels: str) -> str:
  """Replaces 'auto' by 'pallas' on GPUs that the kernels run on, and by 'xla' elsewhere."""
  if kernels != "auto":
    return kernels
  return "pallas" if runs_here() else "xla"


def runs_here() -> bool:
  """Whether the default device is a CUDA GPU of compute capability 8.0 (Ampere) or newer, which Triton needs."""
  device = jax.local_devices()[0]
  try:
    return device.platform == "gpu" and float(device.compute_capability) >= 8.0
  except (AttributeError, ValueError):  # Other vendors have names such as 'gfx942'.
    return False


def fits_group_norm(x: Array, group: int) -> bool:
  """Whether `group_norm` can hold a group of an image [H, W, C] of `x` [B, H, W, C]."""
  return _padded(x.shape[1] * x.shape[2]) * _padded(group) <= MAX_ELEMENTS


def fits_attention(x: Array) -> bool:
  """Whether `attention` can hold the weights of all pairs of positions of `x` [B, H, W, C]."""
  return _padded(x.shape[1] * x.shape[2]) ** 2 <= MAX_ELEMENTS


class GroupNormSettings(NamedTuple):
  """Settings of `group_norm`.

  Attributes:
    group: channels of a group; divides C.
    epsilon: added to the variance.
    offset: added to the gain.
    silu: whether SiLU follows.
    kernels: 'pallas' or 'interpret'.
    start: column of `affine` at which the gains start; the shifts follow them.
  """

  group: int
  epsilon: float
  offset: float
  silu: bool
  kernels: str
  start: int = 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def group_norm(x: Array, affine: Array, settings: GroupNormSettings) -> Array:
  """Normalises each group of channels, scales it by `offset + gain`, adds `shift`, and applies SiLU if asked.

  Args:
    x: [B, H, W, C].
    affine: [B, D >= 2 C], of which 2 C columns are gain and shift of each channel; or [1, D] for all of the batch.
    settings: see there.

  Returns:
    [B, H, W, C] of x's dtype.

  Raises:
    ValueError: if groups do not divide the channels, or `affine` has another number of rows or too few columns.
  """
  return _group_norm_forward(x, affine, settings)[0]


def _group_norm_forward(x: Array, affine: Array, settings: GroupNormSettings) -> tuple[Array, tuple[Array, Array]]:
  batch, channels = x.shape[0], x.shape[-1]
  check_affine(affine, batch, channels, settings)

  def kernel(x_ref: Any, affine_ref: Any, out_ref: Any) -> None:
    block = _Block(x_ref, affine_ref, x.shape[-1], settings)
    normalised, _ = block.normalise()
    y = normalised * block.scale + block.shift
    block.store(out_ref, y * jax.nn.sigmoid(y) if settings.silu else y)

  image, _, shared = _specs(x, affine, settings)
  call = _group_call(kernel, x, settings, [image, shared], image, jax.ShapeDtypeStruct(flat(x).shape, x.dtype))
  return call(flat(x), affine).reshape(x.shape), (x, affine)


def check_affine(affine: Array, batch: int, channels: int, settings: GroupNormSettings) -> None:
  """Raises `ValueError` if gains and shifts `affine` do not fit so many images and channels."""
  if channels % settings.group or affine.shape[0] not in (1, batch):
    raise ValueError(
      f"affine {affine.shape} and groups of {settings.group} channels do not fit {channels} channels and {batch} images"
    )
  if affine.shape[1] < settings.start + 2 * channels:
    raise ValueError(f"affine {affine.shape} has no 2 x {channels} columns from {settings.start} on")


def _group_norm_backward(
  given: GroupNormSettings, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
  x, joint = residuals
  width = 2 * x.shape[-1]
  affine, settings = joint[:, given.start : given.start + width], given._replace(start=0)

  def kernel(x_ref: Any, affine_ref: Any, d_ref: Any, dx_ref: Any, d_affine_ref: Any) -> None:
    block = _Block(x_ref, affine_ref, x.shape[-1], settings)
    normalised, factor = block.normalise()
    d = block.load(d_ref)
    if settings.silu:
      y = normalised * block.scale + block.shift
      gate = jax.nn.sigmoid(y)
      d = d * gate * (1.0 + y * (1.0 - gate))
    block.store_affine(d_affine_ref, jnp.sum(d * normalised, axis=0), jnp.sum(d, axis=0))
    d = d * block.scale
    along = jnp.sum(d * normalised) / block.count
    block.store(dx_ref, (d - jnp.sum(d) / block.count - normalised * along) * factor)

  image, row, shared = _specs(x, affine, settings)
  rows = jax.ShapeDtypeStruct((x.shape[0], width), jnp.float32)
  shapes = [jax.ShapeDtypeStruct(flat(x).shape, x.dtype), rows]
  dx, d_affine = _group_call(kernel, x, settings, [image, shared, image], [image, row], shapes)(
    flat(x), affine, flat(cotangent)
  )
  if affine.shape[0] == 1:
    d_affine = jnp.sum(d_affine, axis=0, keepdims=True)
  d_joint = jnp.pad(d_affine, ((0, 0), (given.start, joint.shape[1] - given.start - width)))
  return dx.reshape(x.shape), d_joint.astype(joint.dtype)


group_norm.defvjp(_group_norm_forward, _group_norm_backward)


class _Block:
  """One group of channels of one image, [P, S], padded to powers of two, which Triton's arrays need.

  Args:
    x_ref: the group's part of the image [P, S].
    affine_ref: gain and shift of all channels of the image, [1, D].
    channels: C.
    settings: those of `group_norm`.
  """

  def __init__(self, x_ref: Any, affine_ref: Any, channels: int, settings: GroupNormSettings):
    positions, self._channels = x_ref.shape[0], channels
    self.count = positions * settings.group
    self._rows, self._columns = jnp.arange(_padded(positions)), jnp.arange(_padded(settings.group))
    self._first = settings.start + pl.program_id(1) * settings.group
    self._column_mask = self._columns < settings.group
    self._mask = (self._rows < positions)[:, None] & self._column_mask[None]
    self._epsilon = settings.epsilon
    self._x = self.load(x_ref)
    gain, shift = (load(self._of_group(affine_ref, start), self._column_mask)[None] for start in (0, channels))
    self.scale, self.shift = settings.offset + gain.astype(jnp.float32), shift.astype(jnp.float32)

  def normalise(self) -> tuple[Array, Array]:
    """Returns the block with mean 0 and variance 1, and the factor that it was scaled by."""
    return normalise(self._x, self._mask, self.count, self._epsilon)

  def load(self, ref: Any) -> Array:
    return load(ref.at[self._rows[:, None], self._columns[None]], self._mask).astype(jnp.float32)

  def store(self, ref: Any, value: Array) -> None:
    store(ref.at[self._rows[:, None], self._columns[None]], value, self._mask)

  def store_affine(self, ref: Any, gain: Array, shift: Array) -> None:
    store(self._of_group(ref, 0), gain, self._column_mask)
    store(self._of_group(ref, self._channels), shift, self._column_mask)

  def _of_group(self, ref: Any, start: int) -> Any:
    return ref.at[0, start + self._first + self._columns]


def normalise(x: Array, mask: Array, count: int, epsilon: float) -> tuple[Array, Array]:
  """Gives the `count` elements of `x` under the mask mean 0 and variance 1; `x` is 0 elsewhere.

  Returns:
    The result, and the factor that it was scaled by.
  """
  centred = jnp.where(mask, x - jnp.sum(x) / count, 0.0)
  factor = jax.lax.rsqrt(jnp.sum(centred * centred) / count + epsilon)
  return centred * factor, factor


def flat(x: Array) -> Array:
  """Makes one axis of height and width: [B, H, W, C] -> [B, H W, C]."""
  return x.reshape(x.shape[0], -1, x.shape[-1])


def _specs(x: Array, affine: Array, settings: GroupNormSettings) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
  """Returns what a program sees of an image, of a row [B, 2 C], and of `affine`."""
  width = affine.shape[1]
  image = pl.BlockSpec((None, x.shape[1] * x.shape[2], settings.group), lambda b, g: (b, 0, g))
  row = pl.BlockSpec((1, width), lambda b, g: (b, 0))
  return image, row, row if affine.shape[0] == x.shape[0] else pl.BlockSpec((1, width), lambda b, g: (0, 0))


def _group_call(
  kernel: Callable[..., None], x: Array, settings: GroupNormSettings, in_specs: Any, out_specs: Any, out_shape: Any
) -> Callable[..., Any]:
  """Returns a call with one program for each image and group."""
  return call(
    kernel,
    settings.kernels,
    elements=_padded(x.shape[1] * x.shape[2]) * _padded(settings.group),
    grid=(x.shape[0], x.shape[-1] // settings.group),
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=out_shape,
  )


def attention_reference(qkv: Array, heads: int) -> Array:
  """Computes multi-head self-attention.

  Args:
    qkv: [B, P, 3 C]: queries, keys and values of P positions, each of `heads` heads of C / heads channels.
    heads: divides C.

  Returns:
    [B, P, C] of qkv's dtype; the softmax is float32.
  """
  batch, positions, channels = *qkv.shape[:2], qkv.shape[2] // 3
  # Positions last, so that both products have their batch in front and nothing is transposed between them.
  h = jnp.swapaxes(qkv, 1, 2)
  query, key, value = jnp.unstack(h.reshape(batch, 3, heads, channels // heads, positions), axis=1)
  logits = jnp.einsum("bnhp,bnhq->bnpq", query, key, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(logits * (channels // heads) ** -0.5).astype(qkv.dtype)
  h = jnp.einsum("bnpq,bnhq->bnhp", weights, value).reshape(batch, channels, positions)
  return jnp.swapaxes(h, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def attention(qkv: Array, heads: int, kernels: str) -> Array:
  """Computes `attention_reference` in one kernel; `kernels` is 'pallas' or 'interpret'.

  Raises:
    ValueError: if the heads do not divide the channels.
  """
  return _attention_forward(qkv, heads, kernels)[0]


def _attention_forward(qkv: Array, heads: int, kernels: str) -> tuple[Array, Array]:
  if qkv.shape[2] % (3 * heads):
    raise ValueError(f"{heads} heads do not divide {qkv.shape[2]} / 3 channels")
  channels = qkv.shape[2] // 3

  def kernel(qkv_ref: Any, out_ref: Any) -> None:
    head = _Head(qkv_ref, channels, heads)
    head.store(out_ref, 0, product(head.weights().astype(head.value.dtype), head.value))

  return _attention_call(kernel, qkv, heads, kernels, images=1, width=channels)(qkv), qkv


def _attention_backward(heads: int, kernels: str, qkv: Array, cotangent: Array) -> tuple[Array]:
  channels = qkv.shape[2] // 3

  def kernel(qkv_ref: Any, d_ref: Any, out_ref: Any) -> None:
    head = _Head(qkv_ref, channels, heads)
    weights, d = head.weights(), head.load(d_ref, 0)
    d_weights = product(d, head.value.T)
    d_logits = weights * (d_weights - jnp.sum(d_weights * weights, axis=1)[:, None]) * head.scale
    weights, d_logits = weights.astype(d.dtype), d_logits.astype(d.dtype)
    head.store(out_ref, 0, product(d_logits, head.key))
    head.store(out_ref, channels, product(d_logits.T, head.query))
    head.store(out_ref, 2 * channels, product(weights.T, d))

  return (_attention_call(kernel, qkv, heads, kernels, images=2, width=3 * channels)(qkv, cotangent),)


attention.defvjp(_attention_forward, _attention_backward)


def attention_weights(query: Array, key: Array, real: Array, scale: float) -> Array:
  """Returns the float32 softmax of the scaled products of queries [P, W] with those keys [P, W] that are `real` [P]."""
  logits = jnp.where(real[None], product(query, key.T) * scale, -1e30)
  weights = jnp.exp(logits - jnp.max(logits, axis=1)[:, None])
  return weights / jnp.sum(weights, axis=1)[:, None]


_MIN_PRODUCT = 16
"""Smallest side of a matrix that a GPU's matrix units take."""


def product(a: Array, b: Array) -> Array:
  """Multiplies matrices; float32 ones without rounding them to TF32. The result is float32."""
  return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


class _Head:
  """One head of one image: query, key and value [P, W], padded with zeros.

  Args:
    ref: queries, keys and values of all heads [P, 3 C].
    channels: C.
    heads: number of heads.
  """

  def __init__(self, ref: Any, channels: int, heads: int):
    positions, width = ref.shape[0], channels // heads
    self.scale = width**-0.5
    self._first = pl.program_id(1) * width
    self._rows, self._columns = jnp.arange(side(positions)), jnp.arange(side(width))
    self._real = self._rows < positions
    self._mask = self._real[:, None] & (self._columns < width)[None]
    self.query, self.key, self.value = (self.load(ref, i * channels) for i in range(3))

  def weights(self) -> Array:
    """Returns the float32 attention of each query to each key, [P, P]; rows of padding are not zero."""
    return attention_weights(self.query, self.key, self._real, self.scale)

  def load(self, ref: Any, start: int) -> Array:
    """Loads this head's columns of the array that starts at column `start`."""
    return load(self._at(ref, start), self._mask)

  def store(self, ref: Any, start: int, value: Array) -> None:
    store(self._at(ref, start), value, self._mask)

  def _at(self, ref: Any, start: int) -> Any:
    return ref.at[self._rows[:, None], (start + self._first + self._columns)[None]]


def _attention_call(
  kernel: Callable[..., None], qkv: Array, heads: int, kernels: str, *, images: int, width: int
) -> Callable[..., Any]:
  batch, positions, channels = *qkv.shape[:2], qkv.shape[2] // 3

  def image(channels: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, positions, channels), lambda b, h: (b, 0, 0))

  return call(
    kernel,
    kernels,
    elements=_padded(positions) ** 2,
    grid=(batch, heads),
    in_specs=[image(3 * channels), image(channels)][:images],
    out_specs=image(width),
    out_shape=jax.ShapeDtypeStruct((batch, positions, width), qkv.dtype),
  )


def call(
  kernel: Callable[..., None], kernels: str, *, elements: int, stages: int = 3, **settings: Any
) -> Callable[..., Any]:
  """Returns the call of a kernel with the `settings` of `pallas_call`.

  Args:
    kernel: one program.
    kernels: 'pallas' or 'interpret'.
    elements: that a program holds, for the number of its warps.
    stages: Triton's number of stages; the loads of a loop are ahead by one less.
    **settings: of `pallas_call`.
  """
  if kernels == "interpret":
    return pl.pallas_call(kernel, interpret=True, **settings)
  from jax.experimental.pallas import triton

  warps = min(8, max(1, elements // 1024))
  params = triton.CompilerParams(num_warps=warps, num_stages=stages)
  return pl.pallas_call(kernel, compiler_params=params, **settings)


def load(ref: Any, mask: Array) -> Array:
  """Loads what `ref` points to; 0 outside of the mask."""
  from jax.experimental.pallas import triton

  return triton.load(ref, mask=mask, other=0.0)


def store(ref: Any, value: Array, mask: Array) -> None:
  """Stores `value` where the mask is true, in the dtype of `ref`."""
  from jax.experimental.pallas import triton

  triton.store(ref, value.astype(ref.dtype), mask=mask)


def divide(x: Array, divisor: int) -> tuple[Array, Array]:
  """Returns quotient and remainder of integers that are not negative."""
  by = jnp.asarray(divisor, x.dtype)
  return jax.lax.div(x, jnp.broadcast_to(by, x.shape)), jax.lax.rem(x, jnp.broadcast_to(by, x.shape))


def neighbour(place: tuple[Array, Array], offset: tuple[Array, Array], shape: tuple[int, int]) -> tuple[Array, Array]:
  """Returns the positions that lie at an offset from others, and whether they are inside of an image.

  Args:
    place: rows and columns [P] of the others.
    offset: rows down and columns to the right.
    shape: height and width of the image.
  """
  (height, width), (row, column) = shape, (at + by for at, by in zip(place, offset, strict=True))
  return row * width + column, (row >= 0) & (row < height) & (column >= 0) & (column < width)


def side(size: int) -> int:
  """Returns the side of a matrix that holds `size` rows or columns and that the matrix units take."""
  return max(_padded(size), _MIN_PRODUCT)


def _padded(size: int) -> int:
  """Returns the smallest power of two that is no smaller."""
  return 1 << (size - 1).bit_length()
