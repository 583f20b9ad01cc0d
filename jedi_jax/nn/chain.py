"""Successive residual blocks of one width in one GPU kernel, where no gradient is needed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jedi_jax.nn import blocks
from jedi_jax.ops import fused_blocks
from jedi_jax.types import Compute, Params

Array = jax.Array

PARAMS = "residual_chain"
"""Name of the joined parameters of the blocks among those that networks are given."""


class Block(NamedTuple):
  """A residual block of a network: its name, output channels, and whether it has self-attention."""

  name: str
  features: int
  attention: bool


def join(params: Params, plan: Sequence[Block], compute: Compute) -> Params:
  """Returns what `apply` takes beside the parameters of a network; empty if one kernel cannot have all of its blocks.

  Args:
    params: those of the network, as `blocks.prepare` returns them.
    plan: its successive residual blocks, all at one resolution.
    compute: how it computes.
  """
  layers = [params[block.name] for block in plan]
  width = plan[0].features
  same = all(block.features == width for block in plan) and "skip" not in layers[0]
  if compute.kernels == "xla" or not compute.fused_convolution or not same or blocks.group_size(width) != width:
    return {}

  def rows(parts: Sequence[Params], name: str) -> Array:
    return jnp.concatenate([part[name].reshape(-1, part[name].shape[-1]) for part in parts])

  def layer(parts: Sequence[Params]) -> tuple[Array, Array]:
    return rows(parts, "kernel"), rows(parts, "bias")

  attention = [own["attention"] for own, block in zip(layers, plan, strict=True) if block.attention]
  joined = fused_blocks.Blocks(
    *layer([own[name] for own in layers for name in ("conv_1", "conv_2")]),
    fused_blocks.Attention(
      rows([part["norm"] for part in attention], "affine"),
      layer([part["qkv"] for part in attention]),
      layer([part["out"] for part in attention]),
    )
    if attention
    else None,
  )
  return {PARAMS: joined}


def apply(network: nn.Module, plan: Sequence[Block], x: Array, condition: blocks.Condition) -> Array | None:
  """Applies the blocks of `network`, which this is called by, to `x`; None if they are not joined or do not fit."""
  joined: Any = network.get_variable("params", PARAMS)
  if joined is None or condition.joint is None or not fused_blocks.fits(x):
    return None
  width, starts = x.shape[-1], dict(condition.starts)
  first, *others = (starts[*network.path, block.name, norm] for block in plan for norm in ("norm_1", "norm_2"))
  if others != [first + 2 * width * i for i in range(1, 2 * len(plan))]:
    raise ValueError(f"the norms of {[block.name for block in plan]} are not joined in this order")
  return fused_blocks.residual_blocks(
    x,
    joined,
    condition.joint,
    [block.attention for block in plan],
    start=first,
    heads=blocks.heads(width),
    epsilon=blocks.GROUP_NORM_EPSILON,
    mode=network.compute.kernels,
  )
