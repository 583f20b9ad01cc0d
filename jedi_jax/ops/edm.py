"""Preconditioning and noise levels of EDM (Karras et al. 2022, arXiv:2206.00364, table 1), with offset noise.

Offset noise (one draw a channel, shared by all positions) is part of the corruption, so it adds in quadrature to the
noise level that the preconditioning sees, as in DIAMOND (arXiv:2405.12399).
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

Array = jax.Array


class Preconditioning(NamedTuple):
  """Coefficients of D(x) = c_skip x + c_out F(c_in x, c_noise); each of sigma's shape, float32."""

  c_in: Array
  c_out: Array
  c_skip: Array
  c_noise: Array


def precondition(sigma: Array, *, sigma_data: float, offset_noise: float) -> Preconditioning:
  """Computes the coefficients for noise levels `sigma`.

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
    c_noise=jnp.log(variance) / 8,  # A quarter of the logarithm of the standard deviation.
  )


def training_sigma(normal: Array, *, log_mean: float, log_std: float, sigma_min: float, sigma_max: float) -> Array:
  """Turns standard normal draws [...] into log-normal noise levels [...], clipped to [sigma_min, sigma_max]."""
  return jnp.clip(jnp.exp(log_mean + log_std * normal), sigma_min, sigma_max)


def corrupt(x: Array, sigma: Array, noise: Array, offset: Array, *, offset_noise: float) -> Array:
  """Adds noise of level `sigma` and offset noise to clean data.

  Args:
    x: [B, H, W, C] float32, clean.
    sigma: [B] noise levels.
    noise: [B, H, W, C] standard normal.
    offset: [B, 1, 1, C] standard normal.
    offset_noise: standard deviation of the offset noise.
  """
  chex.assert_equal_shape([x, noise])
  chex.assert_shape(offset, (x.shape[0], 1, 1, x.shape[3]))
  return x + offset_noise * offset + sigma[:, None, None, None] * noise
