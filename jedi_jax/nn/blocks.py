"""Parameters of networks, and the layers and blocks that they share.

Layout and initialisation follow DIAMOND (arXiv:2405.12399, appendix; PyTorch's defaults), so that its checkpoints can
be loaded. Activations have the module's `dtype`; parameters and the statistics of group norm are float32.
"""

import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import partial_eval

from jedi_jax.nn import initializers
from jedi_jax.ops import fused_attention, fused_convolution, images, kernels
from jedi_jax.types import Compute, Params

Array = jax.Array

GROUP_SIZE = 32
"""Channels per group of group norm; narrower inputs have one group."""
GROUP_NORM_EPSILON = 1e-5
HEAD_WIDTH = 8
"""Channels per attention head; narrower inputs have one head."""


def apply(network: nn.Module, params: Params, *args: Any) -> Any:
  """Evaluates a network with the parameters of `init_params`."""
  return network.apply({"params": params}, *args)


def init_params(network: nn.Module, key: Array, *args: Any) -> Params:
  """Initialises a network without evaluating it.

  Called outside of `jit` it runs small programs that many parameters share, which compile several times faster than one
  program of all. Flax's `lazy_init` also compiles an empty program for each call in the network.

  Args:
    network: the network.
    key: random key, consumed.
    *args: example arguments; only shapes and dtypes matter.
  """
  init, shapes = jax.make_jaxpr(lambda *args: network.init(*args)["params"], return_shape=True)(key, *args)
  leaves, tree = jax.tree.flatten(shapes)
  needed, used = partial_eval.dce_jaxpr(init.jaxpr, [True] * len(leaves))
  evaluate = core.jaxpr_as_fun(core.ClosedJaxpr(needed, init.consts))
  return jax.tree.unflatten(tree, evaluate(*itertools.compress(jax.tree.leaves((key, *args)), used)))


def prepare(params: Params, compute: Compute) -> Params:
  """Prepares the parameters of a network for a loop that evaluates it many times; they cannot be differentiated.

  Kernels, and the biases beside them, are cast to the dtype in which layers use them. For `compute.kernels` other than
  'xla' what several layers can share is joined: see `Condition`, `FusedGroupNorm` and `Lstm`. With
  `compute.fused_convolution` the kernels of 3 x 3 convolutions are also given as `fused_convolution.convolution` takes
  them.
  """

  def cast(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
      return tree
    used = {name for name in tree if name.startswith("kernel")} | ({"bias"} if "kernel" in tree else set())
    return {name: value.astype(compute.dtype) if name in used else cast(value) for name, value in tree.items()}

  def join(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
      return tree
    joined = {"affine": jnp.concatenate([tree["scale"], tree["bias"]])} if "scale" in tree else {}
    if compute.fused_convolution and getattr(tree.get("kernel"), "ndim", 0) == 4:
      joined["fused"] = tree["kernel"].reshape(-1, tree["kernel"].shape[-1])
    if {"kernel_ih", "kernel_hh", "bias_ih", "bias_hh"} <= tree.keys():  # Those of `Lstm`.
      joined["joint_kernel"] = jnp.concatenate([tree["kernel_ih"], tree["kernel_hh"]])
      joined["joint_bias"] = tree["bias_ih"] + tree["bias_hh"]
    return {**{name: join(value) for name, value in tree.items()}, **joined}

  params = cast(params)
  if compute.kernels == "xla":
    return params
  layers = _adaptive_norms(params)
  return join({**params, _JOINT: _joined(layers)} if layers else params)


_JOINT = "adaptive_norms"
"""Name of the joint linear layer of all adaptive group norms among the parameters that `prepare` returns."""


def _adaptive_norms(params: Params) -> list[tuple[tuple[str, ...], Params]]:
  """Returns path and linear layer of each adaptive group norm, by name and number, as they are joined."""
  found: list[tuple[tuple[str, ...], Params]] = []
  for name, tree in sorted(params.items(), key=lambda item: re.sub(r"\d+", lambda number: number[0].zfill(9), item[0])):
    if isinstance(tree, Mapping):
      found += [((), tree)] if name == "linear" else [((name, *path), own) for path, own in _adaptive_norms(tree)]
  return found


def _joined(layers: Sequence[tuple[tuple[str, ...], Params]]) -> Params:
  """Joins the linear layers that `_adaptive_norms` returns."""
  return {name: jnp.concatenate([own[name] for _, own in layers], axis=-1) for name in ("kernel", "bias")}


@flax.struct.dataclass
class Condition:
  """What adaptive group norms are conditioned on.

  Attributes:
    value: [B, D].
    joint: [B, N], the gains and shifts of all norms of the network, computed in one product; None if there is none.
    starts: pairs of a norm's path and the column of `joint` at which its gains and shifts start.
  """

  value: Array
  joint: Array | None = None
  starts: tuple[tuple[tuple[str, ...], int], ...] = flax.struct.field(pytree_node=False, default=())

  @classmethod
  def of(cls, network: nn.Module, value: Array) -> "Condition":
    """Returns the condition `value` of a network, which this is called by."""
    params, compute = network.variables.get("params", {}), network.compute
    layers = _adaptive_norms(params)
    if compute.kernels == "xla" or not layers:  # There are none at initialisation.
      return cls(value)
    joint = params[_JOINT] if _JOINT in params else _joined(layers)
    kernel, bias = (joint[name].astype(compute.dtype) for name in ("kernel", "bias"))
    sizes = [layer["bias"].size for _, layer in layers]
    starts = zip(
      ((*network.path, *path) for path, _ in layers), itertools.accumulate(sizes[:-1], initial=0), strict=True
    )
    return cls(value, value.astype(compute.dtype) @ kernel + bias, tuple(starts))


def dense(features: int, fan_in: int, *, name: str, dtype: Any, use_bias: bool = True) -> nn.Dense:
  """Returns a linear layer; on [B, H, W, C] it is a 1 x 1 convolution."""
  return nn.Dense(
    features,
    use_bias=use_bias,
    kernel_init=initializers.fan_in_uniform,
    bias_init=initializers.bias_uniform(fan_in),
    name=name,
    dtype=dtype,
  )


class Conv3x3(nn.Module):
  """3 x 3 convolution with bias and one pixel of zero padding: [B, H, W, I] -> [B, H / stride, W / stride, O]."""

  features: int
  stride: int = 1
  kernel_init: initializers.Initializer = initializers.fan_in_uniform
  compute: Compute = Compute()

  @nn.compact
  def __call__(self, x: Array) -> Array:
    fan_in = 9 * x.shape[-1]
    kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features))
    bias = self.param("bias", initializers.bias_uniform(fan_in), (self.features,))
    x, kernel, bias = (value.astype(self.compute.dtype) for value in (x, kernel, bias))
    fused = _fused_layer(self.variables["params"], x) if self.stride == 1 else None
    if fused is not None:
      return fused_convolution.convolution(x, fused, group_size(self.features), self.compute.kernels)
    return images.conv3x3(x, kernel, stride=self.stride, lowering=self.compute.lowering) + bias


class OnePassGroupNorm(nn.Module):
  """Group norm with the parameters of `nn.GroupNorm`, and statistics that a GPU computes in one reduction.

  The variance is E[x^2] - E[x]^2, in float32. It cancels where the mean is large, which the rounding of narrower
  activations hides.
  """

  affine: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    channels = x.shape[-1]
    groups = _groups(channels)
    wide = x.astype(jnp.float32)
    count = math.prod(x.shape[1:]) // groups
    mean, square = (_group_sums(part, groups) / count for part in (wide, jnp.square(wide)))
    factor = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + GROUP_NORM_EPSILON)
    mean, factor = (jnp.repeat(part, channels // groups, axis=-1)[:, None, None, :] for part in (mean, factor))
    x = (wide - mean) * factor
    if self.affine:
      x = x * self.param("scale", nn.initializers.ones_init(), (channels,))
      x = x + self.param("bias", nn.initializers.zeros_init(), (channels,))
    return x.astype(self.dtype)


def _group_sums(x: Array, groups: int) -> Array:
  """Adds over positions and over the channels of each group: [B, H, W, C] -> [B, G].

  One group is one reduction. With several, a reduction over positions comes first, whose reads are contiguous, and then
  additions of halves, which XLA puts in one kernel with what is computed of the sums.
  """
  if groups == 1:
    return jnp.sum(x, axis=(1, 2, 3))[:, None]
  sums = jnp.sum(x, axis=(1, 2)).reshape(x.shape[0], groups, -1)
  while sums.shape[-1] % 2 == 0:
    half = sums.shape[-1] // 2
    sums = sums[..., :half] + sums[..., half:]
  return jnp.sum(sums, axis=-1)


class FusedGroupNorm(nn.Module):
  """Group norm with the parameters of `nn.GroupNorm`, and SiLU after it if asked, in one GPU kernel."""

  silu: bool
  compute: Compute

  @nn.compact
  def __call__(self, x: Array) -> Array:
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones_init(), (channels,))
    bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
    prepared: Array | None = self.get_variable("params", "affine")
    affine = jnp.concatenate([scale, bias]) if prepared is None else prepared
    return _fused_norm(x, affine[None], offset=0.0, silu=self.silu, compute=self.compute)


def _fused_layer(params: Params, x: Array) -> fused_convolution.Convolution | None:
  """Returns a convolution of `x` as `ops.fused_convolution` takes it; None if it is not prepared or does not fit."""
  if "fused" not in params:
    return None
  layer, features = fused_convolution.Convolution(params["fused"], params["bias"]), params["bias"].size
  group = group_size(features)
  return layer if features % group == 0 and fused_convolution.fits_convolution(x, group) else None


def _norm_settings(
  channels: int, *, offset: float, silu: bool, compute: Compute, start: int = 0
) -> kernels.GroupNormSettings:
  return kernels.GroupNormSettings(group_size(channels), GROUP_NORM_EPSILON, offset, silu, compute.kernels, start)


def _fused_norm(x: Array, affine: Array, *, offset: float, silu: bool, compute: Compute, start: int = 0) -> Array:
  settings = _norm_settings(x.shape[-1], offset=offset, silu=silu, compute=compute, start=start)
  return kernels.group_norm(x.astype(compute.dtype), affine, settings)


def _groups(channels: int) -> int:
  return max(1, channels // GROUP_SIZE)


def group_size(channels: int) -> int:
  """Returns the channels of a group of group norm."""
  return channels // _groups(channels)


def heads(channels: int) -> int:
  """Returns the number of heads of self-attention."""
  return max(1, channels // HEAD_WIDTH)


def _fuses_norm(x: Array, compute: Compute) -> bool:
  return compute.kernels != "xla" and kernels.fits_group_norm(x, group_size(x.shape[-1]))


def group_norm(x: Array, *, compute: Compute, name: str, silu: bool = False, affine: bool = True) -> Array:
  """Applies group norm over groups of `GROUP_SIZE` channels, with float32 statistics, and SiLU if asked.

  Called in a compact method, whose module gets a submodule `name` with the parameters of `nn.GroupNorm`.
  """
  if affine and _fuses_norm(x, compute):
    return FusedGroupNorm(silu, compute, name=name)(x)
  norm: nn.Module
  if compute.dtype != jnp.float32:
    norm = OnePassGroupNorm(affine=affine, dtype=compute.dtype, name=name)
  else:
    norm = nn.GroupNorm(
      num_groups=_groups(x.shape[-1]),
      epsilon=GROUP_NORM_EPSILON,
      use_bias=affine,
      use_scale=affine,
      use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where the mean is large.
      dtype=compute.dtype,
      name=name,
    )
  x = norm(x)
  return nn.silu(x) if silu else x


class AdaptiveGroupNorm(nn.Module):
  """Group norm with gain and shift linear in a condition, then SiLU: [B, H, W, C] -> [B, H, W, C]."""

  compute: Compute = Compute()

  @nn.compact
  def __call__(self, x: Array, condition: Condition) -> Array:
    channels, compute = x.shape[-1], self.compute
    if condition.joint is None:
      linear = dense(2 * channels, condition.value.shape[-1], name="linear", dtype=compute.dtype)
      affine, start = linear(condition.value), 0
    else:
      affine, start = condition.joint, dict(condition.starts)[self.path]
    if _fuses_norm(x, compute):
      return _fused_norm(x, affine, offset=1.0, silu=True, compute=compute, start=start)
    affine = affine[:, start : start + 2 * channels]
    x = group_norm(x, compute=compute, name="norm", affine=False)
    gain, shift = jnp.split(affine[:, None, None, :], 2, axis=-1)
    return nn.silu(x * (1 + gain) + shift)


class SelfAttention(nn.Module):
  """Self-attention over all positions, added to the normalised input: [B, H, W, C] -> [B, H, W, C].

  The residual path starts after the group norm, as in DIAMOND's code, so at initialisation the block is the group norm.
  """

  compute: Compute = Compute()

  @nn.compact
  def __call__(self, x: Array, *, fused: bool = False) -> Array:
    """Attends; `fused` says that `x` has gone through the group norm, and that no gradient is needed."""
    batch, height, width, channels = x.shape
    dtype = self.compute.dtype
    if not fused:
      x = group_norm(x, compute=self.compute, name="norm")
    mode = self.compute.kernels
    own_kernel = mode != "xla" and kernels.fits_attention(x)
    if own_kernel and fused:
      qkv = self.variables["params"]["qkv"]
      h = fused_attention.attention(x, qkv["kernel"], qkv["bias"], heads(channels), mode)
    else:
      h = dense(3 * channels, channels, name="qkv", dtype=dtype)(x).reshape(batch, height * width, 3 * channels)
      h = kernels.attention(h, heads(channels), mode) if own_kernel else kernels.attention_reference(h, heads(channels))
    zeros = nn.initializers.zeros_init()
    out = nn.Dense(channels, kernel_init=zeros, bias_init=zeros, name="out", dtype=dtype)
    return x + out(h.reshape(batch, height, width, channels))


class FourierFeatures(nn.Module):
  """Cosines and sines of a scalar at fixed random frequencies: [B] -> [B, width]."""

  width: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    # The frequencies are never trained: no gradient reaches them, and no weight decay.
    frequencies = jax.lax.stop_gradient(self.param("frequencies", initializers.normal, (1, self.width // 2)))
    angles = 2 * jnp.pi * x[:, None] * frequencies  # A matrix product would be rounded to TF32 on a GPU.
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class SmallResidualBlock(nn.Module):
  """x + conv(silu(norm(x))), with a linear skip where the channels change: [B, H, W, I] -> [B, H, W, O]."""

  features: int
  compute: Compute = Compute()

  @nn.compact
  def __call__(self, x: Array) -> Array:
    channels = x.shape[-1]
    h = group_norm(x, compute=self.compute, name="norm", silu=True)
    h = Conv3x3(self.features, compute=self.compute, name="conv")(h)
    if channels != self.features:
      x = dense(self.features, channels, name="skip", dtype=self.compute.dtype)(x)
    return x + h


class ResidualBlock(nn.Module, kw_only=True):
  """Two convolutions under adaptive group norm, a skip connection, optional self-attention.

  ([B, H, W, I], condition) -> [B, H, W, O]. The second kernel is zero at initialisation.
  """

  features: int
  attention: bool = False
  compute: Compute = Compute()

  @nn.compact
  def __call__(self, x: Array, condition: Condition) -> Array:
    channels = x.shape[-1]
    h = AdaptiveGroupNorm(self.compute, name="norm_1")(x, condition)
    params = self.variables.get("params", {})
    first, second = (_fused_layer(params.get(name, {}), x) for name in ("conv_1", "conv_2"))
    if first is not None and second is not None and condition.joint is not None:
      return self._fused(x, h, condition, first, second, params)
    h = Conv3x3(self.features, compute=self.compute, name="conv_1")(h)
    h = AdaptiveGroupNorm(self.compute, name="norm_2")(h, condition)
    zeros = nn.initializers.zeros_init()
    h = Conv3x3(self.features, kernel_init=zeros, compute=self.compute, name="conv_2")(h)
    if channels != self.features:
      x = dense(self.features, channels, name="skip", dtype=self.compute.dtype)(x)
    x = x + h
    return SelfAttention(self.compute, name="attention")(x) if self.attention else x

  def _fused(
    self,
    x: Array,
    h: Array,
    condition: Condition,
    first: fused_convolution.Convolution,
    second: fused_convolution.Convolution,
    params: Params,
  ) -> Array:
    """What follows the first norm, `h`, with each convolution and what follows it in one GPU kernel."""
    start = dict(condition.starts)[*self.path, "norm_2"]
    adaptive = _norm_settings(self.features, offset=1.0, silu=True, compute=self.compute, start=start)
    convolve = functools.partial(fused_convolution.convolution, group=adaptive.group, mode=self.compute.kernels)
    h = convolve(h, first, norm=adaptive, affine=condition.joint)
    skip = fused_convolution.Skip(x.astype(h.dtype), **params.get("skip", {}))
    if not self.attention:
      return convolve(h, second, skip=skip)
    plain, affine = adaptive._replace(offset=0.0, silu=False, start=0), params["attention"]["norm"]["affine"]
    x = convolve(h, second, skip=skip, norm=plain, affine=affine[None])
    return SelfAttention(self.compute, name="attention")(x, fused=True)


class Downsample(nn.Module):
  """3 x 3 convolution of stride 2, orthogonal at initialisation: [B, H, W, C] -> [B, H / 2, W / 2, C]."""

  compute: Compute = Compute()

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return Conv3x3(
      x.shape[-1],
      stride=2,
      kernel_init=nn.initializers.orthogonal(),
      compute=self.compute,
      name="conv",
    )(x)
