"""Layers in plain NumPy, and random operands for them."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(shape, seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def random_params(module, *arguments):
  """Parameters of which none is zero; gains are near 1."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: (path[-1].key == "scale") + 0.2 * normal(leaf.shape, seed=sum(map(ord, str(path)))), shapes
  )


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def group_norm(x, groups):
  """Group norm without gain and shift over groups of neighbouring channels, in float64."""
  x = np.asarray(x, np.float64)
  parts = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
  mean = parts.mean(axis=(1, 3), keepdims=True)
  variance = parts.var(axis=(1, 3), keepdims=True)
  return ((parts - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)


def convolve(x, kernel, stride):
  """3 x 3 convolution with one pixel of zero padding, position by position."""
  x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  rows, columns = range(0, x.shape[1], stride), range(0, x.shape[2], stride)
  patches = np.stack([np.stack([padded[:, i : i + 3, j : j + 3] for j in columns], 1) for i in rows], 1)
  return np.einsum("bhwijc,ijco->bhwo", patches, kernel)
