"""Codecs: how frames become latents."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jedi_jax.nn import blocks
from jedi_jax.nn.decoder import DecoderNetwork
from jedi_jax.nn.encoder import EncoderNetwork
from jedi_jax.ops.images import soft_clamp
from jedi_jax.types import Array, Params


class Codec(NamedTuple):
  """A codec as data and pure functions.

  Attributes:
    latent_shape: (h, w, c) of one latent.
    init: key -> parameters; an empty dictionary where there is nothing to learn. The key is consumed.
    encode: (parameters, images [N, H, W, C] float32 in [-1, 1]) -> latents [N, h, w, c] float32.
    clamp: smooth map that every estimate of a latent goes through, in the loss too.
    quantise: map that an estimate goes through after `clamp` wherever it is used as a latent; no gradient passes it.
    limit: largest absolute value of a latent, None where there is no bound.
    decode: latents [N, h, w, c] -> images in [-1, 1], where nothing must be learned for it; None elsewhere.
  """

  latent_shape: tuple[int, int, int]
  init: Callable[[Array], Params]
  encode: Callable[[Params, Array], Array]
  clamp: Callable[[Array], Array]
  quantise: Callable[[Array], Array]
  limit: float | None = None
  decode: Callable[[Array], Array] | None = None


def scale_pixels(observations: Array) -> Array:
  """Maps uint8 in [0, 255] to float32 in [-1, 1]."""
  return observations.astype(jnp.float32) / 127.5 - 1.0


def to_pixels(images: Array) -> Array:
  """Undoes `scale_pixels`: float32, cut to [-1, 1], to uint8 in [0, 255]."""
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
  latents = codec.encode(params, images).reshape(batch, time, *codec.latent_shape)
  return jnp.where(mask[:, :, None, None, None], latents, 0.0)


def learned(
  observation_shape: tuple[int, int, int],
  *,
  channels: Sequence[int],
  downsample: Sequence[bool],
  patch: int,
  clamp: float,
  clamp_estimate: bool,
  chunk: int,
  lowering: str,
  dtype: Any,
) -> Codec:
  """JEDI's encoder: convolution stages and a soft clamp.

  Of more frames than a chunk the activations are not kept for the gradient but computed anew, chunk by chunk, so that
  a run has no more than a chunk's on a device.

  Args:
    observation_shape: (H, W, C).
    channels: channels of the stages, the last being the latent's.
    downsample: whether a stage ends in 2 x 2 max pooling.
    patch: side of the squares of pixels that are stacked on the channels first; it divides H and W.
    clamp: scale of the soft clamp, 0 for none.
    clamp_estimate: whether estimates are clamped as well.
    chunk: frames encoded at a time, 0 for all.
    lowering: see `images.conv3x3`.
    dtype: of the activations.
  """
  network = EncoderNetwork(tuple(channels), tuple(downsample), patch, lowering=lowering, dtype=dtype)

  def init(key: Array) -> Params:
    return blocks.init_params(network, key, jnp.zeros((1, *observation_shape)))

  def encode_chunk(params: Params, images: Array) -> Array:
    return soft_clamp(blocks.apply(network, params, images).astype(jnp.float32), clamp)

  def encode(params: Params, images: Array) -> Array:
    if not 0 < chunk < len(images):
      return encode_chunk(params, images)
    forget = jax.checkpoint(encode_chunk)
    rest = len(images) % chunk
    chunks = images[: len(images) - rest].reshape(-1, chunk, *observation_shape)
    latents = jax.lax.map(lambda some: forget(params, some), chunks)
    latents = latents.reshape(-1, *latents.shape[2:])
    return jnp.concatenate([latents, forget(params, images[-rest:])]) if rest else latents

  shape = jax.eval_shape(lambda key: encode(init(key), jnp.zeros((1, *observation_shape))), jax.random.key(0)).shape
  return Codec(
    latent_shape=(shape[1], shape[2], shape[3]),
    init=init,
    encode=encode,
    clamp=(lambda z: soft_clamp(z, clamp)) if clamp_estimate else _identity,
    quantise=_identity,
    limit=clamp or None,
  )


def identity(observation_shape: tuple[int, int, int]) -> Codec:
  """DIAMOND's codec: the latent is the image in [-1, 1]; estimates are cut to 256 levels wherever they are used."""

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
  codec: Codec,
  observation_shape: tuple[int, int, int],
  *,
  channels: Sequence[int],
  downsample: Sequence[bool],
  patch: int,
  lowering: str,
  dtype: Any,
) -> Decoder:
  """A decoder that mirrors the learned encoder; arguments as in `learned`."""
  network = DecoderNetwork(observation_shape, tuple(channels), tuple(downsample), patch, lowering=lowering, dtype=dtype)
  return Decoder(
    init=lambda key: blocks.init_params(network, key, jnp.zeros((1, *codec.latent_shape))),
    decode=lambda params, latents: blocks.apply(network, params, latents),
  )


def _identity(x: Array) -> Array:
  return x
