"""Initialisers of parameters."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Initializer = Callable[..., Array]


def _draw(sampler: Callable[..., Array], key: Array, shape: Sequence[int], dtype: Any, scale: float = 1.0) -> Array:
  """Draws scaled random numbers by programs whose size is a power of four, so that shapes share a few compilations.

  The first n numbers of a key do not depend on how many are drawn (`jax_threefry_partitionable`, JAX's default).
  """
  size = math.prod(shape)
  padded = 4 ** max(7, ((size - 1).bit_length() + 1) // 2)
  return _cut(sampler(key, (padded,), dtype), scale, tuple(shape))


@functools.partial(jax.jit, static_argnums=2)
def _cut(numbers: Array, scale: float | Array, shape: tuple[int, ...]) -> Array:
  return (numbers[: math.prod(shape)] * scale).reshape(shape)


def normal(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
  """Initialises an embedding: standard normal."""
  return _draw(jax.random.normal, key, shape, dtype)


def scaled_uniform(scale: float, fan: float) -> Initializer:
  """Returns a uniform initialiser of mean 0 and variance scale / fan."""
  bound = np.sqrt(np.float32(3) * np.float32(scale / fan))
  sampler = functools.partial(jax.random.uniform, minval=-1.0, maxval=1.0)
  return lambda key, shape, dtype=jnp.float32: _draw(sampler, key, shape, dtype, bound)


def fan_in_uniform(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
  """Initialises a kernel: uniform in +-1 / sqrt(fan_in)."""
  return scaled_uniform(1 / 3, math.prod(shape[:-1]))(key, shape, dtype)


def bias_uniform(fan_in: int) -> Initializer:
  """Returns the initialiser of a bias: uniform in +-1 / sqrt(fan_in), where `fan_in` is that of its kernel."""
  sampler = functools.partial(jax.random.uniform, minval=-(fan_in**-0.5), maxval=fan_in**-0.5)
  return lambda key, shape, dtype=jnp.float32: _draw(sampler, key, shape, dtype)
