"""The encoder's output non-linearity; its network is `blocks.ConvStack`."""

import jax
import jax.numpy as jnp

Array = jax.Array


def soft_clamp(z: Array, scale: float) -> Array:
  """Returns scale tanh(z / scale), in (-scale, scale); the identity for scale 0. Not idempotent."""
  return scale * jnp.tanh(z / scale) if scale else z
