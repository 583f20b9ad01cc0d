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

JOINED = "chain"
"""Name of the joined parameters among those that `join` adds to."""


class Block(NamedTuple):
  """A residual block of a network: its name, output channels, and whether it has self-attention."""

  name: str
  features: int
  attention: bool


def join(params: Params, chain: Sequence[Block], compute: Compute) -> Params:
  """Returns what the parameters of a network need in addition for `apply`; nothing if it does not take the blocks.

  Args:
    params: those of the network, as `blocks.prepare` returns them.
    chain: its successive residual blocks, all at one resolution.
    compute: how it computes.
  """
  own = [params[block.name] for block in chain]
  width = chain[0].features
  same = all(block.features == width for block in chain) and not any("skip" in block for block in own)
  if compute.kernels == "xla" or not compute.fused_convolution or not same or blocks.group_size(width) != width:
    return {}

  def rows(layers: Sequence[Params], name: str) -> Array:
    return jnp.concatenate([layer[name].reshape(-1, layer[name].shape[-1]) for layer in layers])

  def layer(layers: Sequence[Params]) -> tuple[Array, Array]:
    return rows(layers, "kernel"), rows(layers, "bias")

  attention = [block["attention"] for block in own if "attention" in block]
  joined = fused_blocks.Blocks(
    *layer([block[name] for block in own for name in ("conv_1", "conv_2")]),
    fused_blocks.Attention(
      rows([part["norm"] for part in attention], "affine"),
      layer([part["qkv"] for part in attention]),
      layer([part["out"] for part in attention]),
    )
    if attention
    else None,
  )
  return {JOINED: joined}


def apply(network: nn.Module, chain: Sequence[Block], x: Array, condition: blocks.Condition) -> Array | None:
  """Applies the blocks of `network`, which this is called by, to `x`; None if they are not joined or do not fit."""
  joined: Any = network.get_variable("params", JOINED)
  if joined is None or condition.joint is None or not fused_blocks.fits(x):
    return None
  width, starts = x.shape[-1], dict(condition.starts)
  first, *others = (starts[*network.path, block.name, norm] for block in chain for norm in ("norm_1", "norm_2"))
  if others != [first + 2 * width * i for i in range(1, 2 * len(chain))]:
    return None
  return fused_blocks.residual_blocks(
    x,
    joined,
    condition.joint,
    [block.attention for block in chain],
    start=first,
    heads=blocks.heads(width),
    epsilon=blocks.GROUP_NORM_EPSILON,
    mode=network.compute.kernels,
  )
