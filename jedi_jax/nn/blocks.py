"""Building blocks shared by all networks.

Layout and initialisation follow DIAMOND (arXiv:2405.12399, appendix; PyTorch's defaults), so that its checkpoints fit.
Activations have the module's `dtype`; parameters are float32, and group norm takes its statistics in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jedi_jax.types import LstmState, Params

Array = jax.Array
Initializer = Callable[..., Array]

GROUP_SIZE = 32
"""Channels of one group of group norm; narrower inputs have one group."""
GROUP_NORM_EPSILON = 1e-5
HEAD_WIDTH = 8
"""Channels of one attention head; narrower inputs have one head."""


def apply(network: nn.Module, params: Params, *args: Any) -> Any:
  """Evaluates a network with the parameters that `init_params` gave."""
  return network.apply({"params": params}, *args)


def init_params(network: nn.Module, key: Array, *args: Any) -> Params:
  """Initialises a network on example arguments; the key is consumed."""
  return network.init(key, *args)["params"]


# Uniform in +-1 / sqrt(fan_in).
fan_in_uniform: Initializer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_uniform(fan_in: int) -> Initializer:
  """Initialiser of a bias: uniform in +-1 / sqrt(fan_in), `fan_in` being that of its kernel."""
  bound = fan_in**-0.5

  def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def dense(features: int, fan_in: int, *, name: str, dtype: Any, use_bias: bool = True) -> nn.Dense:
  """A linear layer; applied to NHWC it is a 1 x 1 convolution."""
  return nn.Dense(
    features, use_bias=use_bias, kernel_init=fan_in_uniform, bias_init=bias_uniform(fan_in), name=name, dtype=dtype
  )


def resolve_convolution(lowering: str, *, packed: bool = False) -> str:
  """Replaces 'auto' by the lowering of 3 x 3 convolutions that suits the default backend.

  Under `vmap` over kernels (`packed`) it is 'matmul', a batched matrix product; the others become grouped
  convolutions.

  XLA's CPU backend computes the gradients of a convolution inside a loop 19 to 75 times slower than with the kernel's
  as matrix products (see docs/performance.md); its GPU and TPU backends are expected not to.
  """
  if lowering != "auto":
    return lowering
  if packed:
    return "matmul"
  return "matmul_gradient" if jax.default_backend() == "cpu" else "lax"


def conv3x3(x: Array, kernel: Array, *, stride: int = 1, lowering: str = "lax") -> Array:
  """Convolves with a 3 x 3 kernel and one pixel of zero padding.

  Args:
    x: [B, H, W, I].
    kernel: [3, 3, I, O] of the same dtype.
    stride: 1 or 2.
    lowering: 'lax' for XLA's convolution; 'matmul_gradient' for XLA's convolution with the kernel's gradient as
      matrix products, and the input's at stride 2 without dilation; 'matmul' for one matrix product over the nine
      shifted inputs, which stays a (batched) matrix product under `vmap` over kernels, where the others become grouped
      convolutions.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), O].
  """
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
  """Returns the nine inputs that meet the kernel's entries, each of the output's height and width."""
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
    return jnp.einsum("bhwi,bhwo->io", rows, columns)

  shares = _sum_over_images(taps, x, cotangent)
  return gradient, shares.reshape(3, x.shape[-1], 3, cotangent.shape[-1]).swapaxes(1, 2)


def _stride_2_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
  x, kernel = residuals
  height, width, channels = x.shape[1:]
  # A block of 2 x 2 inputs meets 2 x 2 outputs, so its gradient is a 2 x 2 convolution to four times the channels.
  # XLA would convolve a cotangent spread with zeros, which its CPU backend does in a plain loop.
  phases = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0))).reshape(2, 2, 2, 2, channels, -1)[::-1, :, ::-1]
  phases = phases.transpose(0, 2, 5, 1, 3, 4).reshape(2, 2, -1, 4 * channels)
  squares = lax.conv_general_dilated(
    cotangent, phases, (1, 1), ((0, 1), (0, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  gradient = spread_patches(squares, 2)[:, :height, :width]

  def taps(x: Array, cotangent: Array) -> Array:
    return jnp.einsum("bhwi,bhwo->io", jnp.concatenate(_shifted(x, 2), axis=-1), cotangent)

  return gradient, _sum_over_images(taps, x, cotangent).reshape(kernel.shape)


_CACHED_POSITIONS = 8192
"""Positions of a cotangent whose share of a kernel's gradient is computed at a time."""


def _sum_over_images(function: Callable[[Array, Array], Array], x: Array, cotangent: Array) -> Array:
  """Sums a function of the images over the batch, some images at a time.

  A product over positions needs its left side transposed, and XLA writes that out; for a whole batch of large images
  this goes to memory and back several times, for a few of them it stays in the cache.
  """
  batch, height, width = cotangent.shape[:3]
  most = max(1, _CACHED_POSITIONS // (height * width))
  images = max(n for n in range(1, most + 1) if batch % n == 0)
  if images == batch:
    return function(x, cotangent)
  x, cotangent = (value.reshape(-1, images, *value.shape[1:]) for value in (x, cotangent))
  start = jnp.zeros_like(jax.eval_shape(function, x[0], cotangent[0]))
  return lax.scan(lambda total, pair: (total + function(*pair), None), start, (x, cotangent))[0]


_conv_stride_1.defvjp(lambda x, kernel: (_conv(x, kernel, 1), (x, kernel)), _stride_1_backward)
_conv_stride_2.defvjp(lambda x, kernel: (_conv(x, kernel, 2), (x, kernel)), _stride_2_backward)


class Conv3x3(nn.Module):
  """3 x 3 convolution with bias and one pixel of zero padding: [B, H, W, I] -> [B, H / stride, W / stride, O]."""

  features: int
  stride: int = 1
  lowering: str = "lax"
  kernel_init: Initializer = fan_in_uniform
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    fan_in = 9 * x.shape[-1]
    kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features))
    bias = self.param("bias", bias_uniform(fan_in), (self.features,))
    x, kernel, bias = (value.astype(self.dtype) for value in (x, kernel, bias))
    return conv3x3(x, kernel, stride=self.stride, lowering=self.lowering) + bias


def group_norm(channels: int, *, dtype: Any, name: str, affine: bool = True) -> nn.GroupNorm:
  """Group norm over groups of `GROUP_SIZE` channels, with float32 statistics."""
  return nn.GroupNorm(
    num_groups=max(1, channels // GROUP_SIZE),
    epsilon=GROUP_NORM_EPSILON,
    use_bias=affine,
    use_scale=affine,
    use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where the mean is large.
    dtype=dtype,
    name=name,
  )


class AdaptiveGroupNorm(nn.Module):
  """Group norm whose gain and shift are linear in a condition: ([B, H, W, C], [B, D]) -> [B, H, W, C]."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, condition: Array) -> Array:
    channels = x.shape[-1]
    x = group_norm(channels, dtype=self.dtype, name="norm", affine=False)(x)
    affine = dense(2 * channels, condition.shape[-1], name="linear", dtype=self.dtype)(condition)
    scale, shift = jnp.split(affine[:, None, None, :], 2, axis=-1)
    return x * (1 + scale) + shift


class SelfAttention(nn.Module):
  """Self-attention over all positions, added to the normalised input: [B, H, W, C] -> [B, H, W, C].

  The residual path starts behind the group norm, as in DIAMOND's code, so at initialisation this is the norm alone.
  """

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    batch, height, width, channels = x.shape
    heads = max(1, channels // HEAD_WIDTH)
    x = group_norm(channels, dtype=self.dtype, name="norm")(x)
    h = dense(3 * channels, channels, name="qkv", dtype=self.dtype)(x)
    query, key, value = (
      part.reshape(batch, height * width, heads, channels // heads) for part in jnp.split(h, 3, axis=-1)
    )
    h = jax.nn.dot_product_attention(query, key, value).reshape(batch, height, width, channels)
    zeros = nn.initializers.zeros_init()
    return x + nn.Dense(channels, kernel_init=zeros, bias_init=zeros, name="out", dtype=self.dtype)(h)


class FourierFeatures(nn.Module):
  """Cosines and sines of a scalar at fixed random frequencies: [B] -> [B, width]."""

  width: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    # Drawn once and never trained; the gradient stops, and no decay reaches it.
    frequencies = lax.stop_gradient(self.param("frequencies", nn.initializers.normal(1.0), (1, self.width // 2)))
    angles = 2 * jnp.pi * x[:, None] * frequencies  # Not a matrix product, which a GPU would round to TF32.
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def max_pool_2x2(x: Array) -> Array:
  """Maximum over blocks of 2 x 2: [B, H, W, C] -> [B, H // 2, W // 2, C]; an odd last row or column is dropped.

  Written with slices: their gradient is a select, where that of a windowed reduction is a slow scatter on CPUs.
  """
  height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
  x = x[:, :height, :width]
  rows = jnp.maximum(x[:, 0::2], x[:, 1::2])
  return jnp.maximum(rows[:, :, 0::2], rows[:, :, 1::2])


def stack_patches(x: Array, side: int) -> Array:
  """Stacks the pixels of squares on the channels: [B, H, W, C] -> [B, H / side, W / side, side^2 C]."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height // side, side, width // side, side, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // side, width // side, side * side * channels)


def spread_patches(x: Array, side: int) -> Array:
  """Undoes `stack_patches`: [B, h, w, side^2 C] -> [B, side h, side w, C]."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height, width, side, side, channels // side**2)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, side * height, side * width, channels // side**2)


def upsample_nearest(x: Array) -> Array:
  """Repeats every position twice in height and width: [B, H, W, C] -> [B, 2 H, 2 W, C]."""
  batch, height, width, channels = x.shape
  x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
  return x.reshape(batch, 2 * height, 2 * width, channels)


class SmallResidualBlock(nn.Module):
  """x + conv(silu(norm(x))), with a linear skip where the channels change: [B, H, W, I] -> [B, H, W, O]."""

  features: int
  lowering: str = "lax"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    channels = x.shape[-1]
    h = nn.silu(group_norm(channels, dtype=self.dtype, name="norm")(x))
    h = Conv3x3(self.features, lowering=self.lowering, dtype=self.dtype, name="conv")(h)
    if channels != self.features:
      x = dense(self.features, channels, name="skip", dtype=self.dtype)(x)
    return x + h


class ConvStack(nn.Module):
  """Convolution, then stages of one small residual block, each optionally followed by 2 x 2 max pooling.

  [B, H, W, I] -> [B, H / (p 2^n), W / (p 2^n), channels[-1]], n the number of stages that pool, p the side of the
  patches that are stacked first.
  """

  channels: Sequence[int]
  downsample: Sequence[bool]
  patch: int = 1
  lowering: str = "lax"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = stack_patches(x, self.patch) if self.patch > 1 else x
    x = Conv3x3(self.channels[0], lowering=self.lowering, dtype=self.dtype, name="conv_in")(x)
    for stage, (features, pool) in enumerate(zip(self.channels, self.downsample, strict=True)):
      x = SmallResidualBlock(features, lowering=self.lowering, dtype=self.dtype, name=f"stage_{stage}")(x)
      x = max_pool_2x2(x) if pool else x
    return x


class ResidualBlock(nn.Module):
  """Two convolutions under adaptive group norm, a skip, optional self-attention.

  ([B, H, W, I], [B, D]) -> [B, H, W, O]. The second kernel is zero at initialisation.
  """

  features: int
  attention: bool = False
  lowering: str = "lax"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, condition: Array) -> Array:
    channels = x.shape[-1]
    h = nn.silu(AdaptiveGroupNorm(dtype=self.dtype, name="norm_1")(x, condition))
    h = Conv3x3(self.features, lowering=self.lowering, dtype=self.dtype, name="conv_1")(h)
    h = nn.silu(AdaptiveGroupNorm(dtype=self.dtype, name="norm_2")(h, condition))
    zeros = nn.initializers.zeros_init()
    h = Conv3x3(self.features, lowering=self.lowering, kernel_init=zeros, dtype=self.dtype, name="conv_2")(h)
    if channels != self.features:
      x = dense(self.features, channels, name="skip", dtype=self.dtype)(x)
    x = x + h
    return SelfAttention(dtype=self.dtype, name="attention")(x) if self.attention else x


class Downsample(nn.Module):
  """3 x 3 convolution of stride 2, orthogonal at initialisation: [B, H, W, C] -> [B, H / 2, W / 2, C]."""

  lowering: str = "lax"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return Conv3x3(
      x.shape[-1],
      stride=2,
      lowering=self.lowering,
      kernel_init=nn.initializers.orthogonal(),
      dtype=self.dtype,
      name="conv",
    )(x)


class UNet(nn.Module):
  """U-Net of residual blocks: ([B, H, W, C_0], [B, D]) -> [B, H, W, C_0], C_0 = channels[0].

  Level i has depths[i] blocks down and depths[i] + 1 blocks up; between levels the resolution halves. Two blocks with
  self-attention stand in the middle, at the last level's resolution. Inputs whose size is no multiple of the total
  down-sampling are padded with zeros at the bottom and right, and cropped in the end.
  """

  channels: Sequence[int]
  depths: Sequence[int]
  attention: Sequence[bool]
  lowering: str = "lax"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, condition: Array) -> Array:
    def block(features: int, attention: bool, name: str) -> ResidualBlock:
      return ResidualBlock(features, attention, lowering=self.lowering, dtype=self.dtype, name=name)

    height, width = x.shape[1:3]
    multiple = 2 ** (len(self.channels) - 1)
    x = jnp.pad(x, ((0, 0), (0, -height % multiple), (0, -width % multiple), (0, 0)))
    skips: list[list[Array]] = []
    for level, (features, depth, attention) in enumerate(zip(self.channels, self.depths, self.attention, strict=True)):
      if level > 0:
        x = Downsample(lowering=self.lowering, dtype=self.dtype, name=f"downsample_{level}")(x)
      outputs = [x]
      for i in range(depth):
        x = block(features, attention, f"down_{level}_{i}")(x, condition)
        outputs.append(x)
      skips.append(outputs)
    for i in range(2):
      x = block(self.channels[-1], True, f"middle_{i}")(x, condition)
    for level in reversed(range(len(self.channels))):
      features, depth, attention = self.channels[level], self.depths[level], self.attention[level]
      for i, skip in enumerate(reversed(skips[level])):
        out = features if i < depth else self.channels[max(0, level - 1)]
        x = block(out, attention, f"up_{level}_{i}")(jnp.concatenate([x, skip], axis=-1), condition)
      if level > 0:
        x = upsample_nearest(x)
        x = Conv3x3(x.shape[-1], lowering=self.lowering, dtype=self.dtype, name=f"upsample_{level}")(x)
    return x[:, :height, :width]


class Lstm(nn.Module):
  """LSTM over time with gates in the order input, forget, cell, output, and two biases as in PyTorch.

  The input's share of the gates is one matrix product over all steps, outside the recurrence. State and recurrence are
  float32.
  """

  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, inputs: Array, state: LstmState, keep: Array | None = None, fallback: LstmState | None = None
  ) -> tuple[Array, LstmState]:
    """Runs over T steps.

    Args:
      inputs: [B, T, I].
      state: state before the first step, [B, width] each.
      keep: optional [B, T]; where keep[:, t] is 0 everything up to step t is forgotten, where it is 1 nothing.
      fallback: the state instead of what is forgotten, [B, width] each; zeros if None.

    Returns:
      Hidden states [B, T, width] float32 (before `keep`), and the state after the last step.
    """
    gates = 4 * self.width
    xavier = nn.initializers.xavier_uniform()
    kernel_ih = self.param("kernel_ih", xavier, (inputs.shape[-1], gates))
    # Orthogonal columns of the transposed, [gates, width], matrix.
    kernel_hh = self.param("kernel_hh", nn.initializers.orthogonal(column_axis=0), (self.width, gates))
    bias_ih = self.param("bias_ih", _forget_gate_one, (gates,))
    bias_hh = self.param("bias_hh", nn.initializers.zeros_init(), (gates,))
    projected = jnp.dot(inputs.astype(self.dtype), kernel_ih.astype(self.dtype), preferred_element_type=jnp.float32) + (
      bias_ih + bias_hh
    )
    recurrent = kernel_hh.astype(self.dtype)

    def step(carry: LstmState, xs: tuple[Array, Array | None]) -> tuple[LstmState, Array]:
      projection, kept = xs
      hidden = carry.hidden.astype(self.dtype)
      total = projection + jnp.dot(hidden, recurrent, preferred_element_type=jnp.float32)
      i, f, g, o = jnp.split(total, 4, axis=-1)
      cell = nn.sigmoid(f) * carry.cell + nn.sigmoid(i) * jnp.tanh(g)
      hidden = nn.sigmoid(o) * jnp.tanh(cell)
      after = LstmState(hidden, cell)
      if kept is not None:
        after = jax.tree.map(lambda x: x * kept[:, None], after)
        if fallback is not None:
          after = jax.tree.map(lambda x, other: x + other * (1.0 - kept[:, None]), after, fallback)
      return after, hidden

    if inputs.shape[1] == 1:
      state, hidden = step(state, (projected[:, 0], None if keep is None else keep[:, 0]))
      return hidden[:, None], state
    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (projected, keep))
    state, hiddens = lax.scan(step, state, by_time)
    return jnp.moveaxis(hiddens, 0, 1), state


def _forget_gate_one(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
  del key
  quarter = shape[0] // 4
  return jnp.zeros(shape, dtype).at[quarter : 2 * quarter].set(1.0)


def zero_lstm_state(batch: int, width: int) -> LstmState:
  """The state of an LSTM that has seen nothing: zeros [batch, width] float32."""
  return LstmState(jnp.zeros((batch, width)), jnp.zeros((batch, width)))
