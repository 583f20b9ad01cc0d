"""Codecs: map frames to latents."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp

from jedi_jax.nn import blocks
from jedi_jax.nn.decoder import DecoderNetwork
from jedi_jax.nn.encoder import EncoderNetwork
from jedi_jax.ops.images import soft_clamp
from jedi_jax.types import Array, Compute, Params


class Codec(NamedTuple):
  """A codec as data and pure functions.

  Attributes:
    latent_shape: (h, w, c) of one latent.
    init: key -> parameters; an empty dictionary if nothing is learned. The key is consumed.
    encode: (parameters, images [N, H, W, C] float32 in [-1, 1]) -> latents [N, h, w, c] float32. A codec with running
      statistics takes a mask [N] bool as well, false for padding, which is then left out of its gradient's statistics.
    clamp: smooth map applied to every estimate of a latent, in the loss too.
    quantise: map applied after `clamp` to an estimate that is used as a latent; no gradient passes through it.
    limit: largest absolute value of a latent; None without a bound.
    decode: latents [N, h, w, c] -> images in [-1, 1], for a codec that decodes without learning; else None.
    moments: (latents [B, T, h, w, c], mask [B, T] bool) -> [3, h, w, c], sums over real frames of 1, x and x^2, with x
      the latents before the clamp; None for a codec without running statistics.
    track: (parameters, these sums over the whole batch) -> parameters with updated running statistics; None likewise.
  """

  latent_shape: tuple[int, int, int]
  init: Callable[[Array], Params]
  encode: Callable[..., Array]
  clamp: Callable[[Array], Array]
  quantise: Callable[[Array], Array]
  limit: float | None = None
  decode: Callable[[Array], Array] | None = None
  moments: Callable[[Array, Array], Array] | None = None
  track: Callable[[Params, Array], Params] | None = None


def scale_pixels(observations: Array) -> Array:
  """Maps uint8 in [0, 255] to float32 in [-1, 1]."""
  return observations.astype(jnp.float32) / 127.5 - 1.0


def to_pixels(images: Array) -> Array:
  """Inverts `scale_pixels`: clips float32 to [-1, 1] and maps it to uint8 in [0, 255]."""
  return jnp.round((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def encode_frames(codec: Codec, params: Params, observations: Array, mask: Array) -> Array:
  """Encodes sequences of frames; padding becomes the zero latent.

  Args:
    codec: the codec.
    params: its parameters.
    observations: [B, T, H, W, C] uint8.
    mask: [B, T] bool; false where the frame is padding.

  Returns:
    [B, T, h, w, c] float32.
  """
  chex.assert_rank(observations, 5)
  chex.assert_type(observations, jnp.uint8)
  batch, time = observations.shape[:2]
  chex.assert_shape(mask, (batch, time))
  images = scale_pixels(observations).reshape(batch * time, *observations.shape[2:])
  real = () if codec.track is None else (mask.reshape(-1),)
  latents = codec.encode(params, images, *real).reshape(batch, time, *codec.latent_shape)
  return jnp.where(mask[:, :, None, None, None], latents, 0.0)


def learned(
  observation_shape: tuple[int, int, int],
  *,
  channels: Sequence[int] = (32, 32, 32, 16),
  downsample: Sequence[bool] = (True, True, True, False),
  patch: int = 1,
  norm: str = "none",
  clamp: float = 3.0,
  clamp_estimate: bool = True,
  chunk: int = 0,
  compute: Compute = Compute(),
) -> Codec:
  """Builds JEDI's encoder: convolution stages, an optional normalisation without parameters, and a soft clamp.

  Encodes in chunks under `jax.checkpoint`; peak activation memory is one chunk's.

  The normalisation is part of what is differentiated, so that no gradient shrinks the latents. With 'running', values
  are normalised by running statistics and gradients are those of a normalisation by the statistics of the given frames
  (batch renormalization, Ioffe 2017, arXiv:1702.03275); each of several devices uses its own frames.

  Args:
    observation_shape: (H, W, C).
    channels: channels of the stages; the last are the latent's.
    downsample: whether a stage ends in 2 x 2 max pooling.
    patch: side of the squares of pixels that are stacked on the channels first; it divides H and W.
    norm: 'none'; 'frame' for mean 0 and variance 1 over each frame; 'running' for mean 0 over time at each position and
      channel, and one scale that gives them a mean variance of 1.
    clamp: scale of the soft clamp; 0 for none.
    clamp_estimate: whether estimates are clamped as well.
    chunk: frames encoded at a time; 0 for all.
    compute: how the network computes.
  """
  network = EncoderNetwork(tuple(channels), tuple(downsample), patch, compute=compute)

  def init(key: Array) -> Params:
    params = blocks.init_params(network, key, jnp.zeros((1, *observation_shape)))
    if norm != "running":
      return params
    shape = jax.eval_shape(lambda: blocks.apply(network, params, jnp.zeros((1, *observation_shape)))).shape[1:]
    return {**params, "running": {"mean": jnp.zeros(shape), "std": jnp.ones(())}}

  def extract(params: Params, images: Array) -> Array:
    return blocks.apply(network, params, images).astype(jnp.float32)

  def extract_in_chunks(params: Params, images: Array) -> Array:
    if not 0 < chunk < len(images):
      return extract(params, images)
    # As one vector the gradients of a chunk are added to those of the others at once.
    vector, unravel = jax.flatten_util.ravel_pytree(params)
    checkpointed = jax.checkpoint(lambda vector, some: extract(unravel(vector), some))
    rest = len(images) % chunk
    chunks = images[: len(images) - rest].reshape(-1, chunk, *observation_shape)
    features = jax.lax.map(lambda some: checkpointed(vector, some), chunks)
    features = features.reshape(-1, *features.shape[2:])
    return jnp.concatenate([features, checkpointed(vector, images[-rest:])]) if rest else features

  def encode(params: Params, images: Array, mask: Array | None = None) -> Array:
    features = extract_in_chunks({name: value for name, value in params.items() if name != "running"}, images)
    if norm == "frame":
      features = jax.nn.standardize(features, axis=(1, 2, 3))
    elif norm == "running":
      features = _renormalise(features, mask, **jax.lax.stop_gradient(params["running"]))
    return soft_clamp(features, clamp)

  shape = jax.eval_shape(lambda key: encode(init(key), jnp.zeros((1, *observation_shape))), jax.random.key(0)).shape
  return Codec(
    latent_shape=(shape[1], shape[2], shape[3]),
    init=init,
    encode=encode,
    clamp=(lambda z: soft_clamp(z, clamp)) if clamp_estimate else _identity,
    quantise=_identity,
    limit=clamp or None,
    moments=functools.partial(_moments, clamp) if norm == "running" else None,
    track=_track if norm == "running" else None,
  )


_TRACKING_RATE = 0.01
"""Rate an update at which running statistics follow the latents."""
_LEAST_FEATURE_STD = 1e-2
"""Lower bound of a running standard deviation, so that what never changes is not scaled up without bound."""


def _renormalise(features: Array, mask: Array | None, mean: Array, std: Array) -> Array:
  """Returns (features - mean) / std, differentiated as a normalisation by the statistics of the real frames.

  Args:
    features: [N, h, w, c].
    mask: [N] bool, false for padding; None if all frames are real.
    mean: [h, w, c], running.
    std: [], running.
  """
  weights = jnp.ones(len(features)) if mask is None else mask.astype(jnp.float32)
  weights /= jnp.maximum(jnp.sum(weights), 1.0)
  batch_mean = jnp.einsum("n,nhwc->hwc", weights, features)
  variance = jnp.mean(jnp.einsum("n,nhwc->hwc", weights, jnp.square(features - batch_mean)))
  batch_std = jnp.sqrt(variance + _LEAST_FEATURE_STD**2)
  normalised = (features - batch_mean) / batch_std
  batch_mean, batch_std = jax.lax.stop_gradient((batch_mean, batch_std))
  return (normalised * batch_std + batch_mean - mean) / std


def _moments(clamp: float, latents: Array, mask: Array) -> Array:
  """See `Codec.moments`; recovers up to about 4 times the clamp from clamped latents."""
  latents = jax.lax.stop_gradient(latents)
  if clamp:
    latents = clamp * jnp.arctanh(jnp.clip(latents / clamp, -0.999, 0.999))
  weights = mask.astype(jnp.float32)
  powers = (jnp.ones_like(latents), latents, jnp.square(latents))
  return jnp.stack([jnp.einsum("bt,bthwc->hwc", weights, x) for x in powers])


def _track(params: Params, moments: Array) -> Params:
  """Moves the running statistics so that the means over time tend to 0 and their mean variance to 1."""
  old, (count, total, square) = params["running"], moments
  count = jnp.maximum(count, 1.0)
  mean = total / count
  ratio = jnp.clip(jnp.mean(square / count - jnp.square(mean)), 1e-2, 1e2) ** (_TRACKING_RATE / 2)
  running = {
    "mean": old["mean"] + _TRACKING_RATE * old["std"] * mean,
    "std": jnp.maximum(old["std"] * ratio, _LEAST_FEATURE_STD),
  }
  return {**params, "running": running}


def identity(observation_shape: tuple[int, int, int]) -> Codec:
  """DIAMOND's codec: the latent is the image in [-1, 1]; estimates are truncated to 256 levels before use."""

  def quantise(x: Array) -> Array:
    levels = jnp.floor((jnp.clip(x, -1.0, 1.0) + 1.0) / 2.0 * 255.0)
    return levels / 255.0 * 2.0 - 1.0

  return Codec(
    latent_shape=observation_shape,
    init=lambda key: {},
    encode=lambda params, images: images,
    clamp=_identity,
    quantise=quantise,
    decode=_identity,
  )


class Decoder(NamedTuple):
  """A decoder as data and pure functions.

  Attributes:
    init: key -> parameters. The key is consumed.
    decode: (parameters, latents [N, h, w, c]) -> images [N, H, W, C] float32, about [-1, 1].
  """

  init: Callable[[Array], Params]
  decode: Callable[[Params, Array], Array]


def decoder(
  latent_shape: tuple[int, int, int],
  observation_shape: tuple[int, int, int],
  *,
  channels: Sequence[int] = (32, 32, 32, 16),
  downsample: Sequence[bool] = (True, True, True, False),
  patch: int = 1,
  compute: Compute = Compute(),
) -> Decoder:
  """Builds a decoder that mirrors the learned encoder; arguments as in `learned`."""
  network = DecoderNetwork(observation_shape, tuple(channels), tuple(downsample), patch, compute=compute)
  return Decoder(
    init=lambda key: blocks.init_params(network, key, jnp.zeros((1, *latent_shape))),
    decode=lambda params, latents: blocks.apply(network, params, latents),
  )


def _identity(x: Array) -> Array:
  return x
