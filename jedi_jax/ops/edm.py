"""Preconditioning and noise levels of EDM (Karras et al. 2022, arXiv:2206.00364, table 1), with offset noise.

Offset noise is one draw per channel, shared by all positions. It is part of the corruption, so the preconditioning adds
its variance to that of the noise level, as in DIAMOND (arXiv:2405.12399).
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

Array = jax.Array


class Preconditioning(NamedTuple):
  """Coefficients of D(x) = c_skip x + c_out F(c_in x, c_noise), float32, each with the shape of sigma."""

  c_in: Array
  c_out: Array
  c_skip: Array
  c_noise: Array


def precondition(sigma: Array, *, sigma_data: float, offset_noise: float) -> Preconditioning:
  """Computes the preconditioning of noise levels `sigma`.

  Args:
    sigma: [...] float32, positive noise levels.
    sigma_data: standard deviation of the clean data.
    offset_noise: standard deviation of the offset noise, 0 for none.
  """
  variance = jnp.square(sigma) + offset_noise**2
  total = variance + sigma_data**2
  c_skip = sigma_data**2 / total
  return Preconditioning(
    c_in=jax.lax.rsqrt(total),
    c_out=jnp.sqrt(variance * c_skip),
    c_skip=c_skip,
    c_noise=jnp.log(variance) / 8,  # ln(standard deviation) / 4.
  )


def training_sigma(normal: Array, *, log_mean: float, log_std: float, sigma_min: float, sigma_max: float) -> Array:
  """Maps standard normal draws [...] to log-normal noise levels [...], clipped to [sigma_min, sigma_max]."""
  return jnp.clip(jnp.exp(log_mean + log_std * normal), sigma_min, sigma_max)


def corrupt(x: Array, sigma: Array, noise: Array, offset: Array, *, offset_noise: float) -> Array:
  """Adds noise of level `sigma` and offset noise to clean data.

  Args:
    x: [B, H, W, C] float32, clean data.
    sigma: [B] noise levels.
    noise: [B, H, W, C] standard normal draws.
    offset: [B, 1, 1, C] standard normal draws.
    offset_noise: standard deviation of the offset noise.

  Returns:
    [B, H, W, C] float32.
  """
  chex.assert_equal_shape([x, noise])
  chex.assert_shape(offset, (x.shape[0], 1, 1, x.shape[3]))
  return x + offset_noise * offset + sigma[:, None, None, None] * noise
