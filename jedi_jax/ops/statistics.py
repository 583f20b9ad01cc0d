"""Sums over a batch from which metrics are computed."""

import jax
import jax.numpy as jnp

from jedi_jax.types import Array, Term


def latent_statistics(latents: Array, mask: Array, limit: float | None) -> dict[str, Array | Term]:
  """Sums moments of the latents of real frames; `telemetry.summarise` turns them into metrics.

  Args:
    latents: [B, T, h, w, c] float32; no gradient flows through them.
    mask: [B, T] bool; false where a frame is padding.
    limit: largest absolute value of the codec's latents, None if they are unbounded.

  Returns:
    'latent_gram': [c + 1, c + 1] float32, sum over real positions of x x^T with x = (1, channels).
    'latent_moments': [2, h, w, c] float32, sums over real frames of the latent and of its square. The number of real
      frames is latent_gram[0, 0] / (h w).
    'latent_change_square': mean square of the change in one step, over pairs of successive real frames.
    'latent_clamped': fraction of values beyond 0.9 of the limit; absent without a limit.
  """
  latents = jax.lax.stop_gradient(latents)
  weights = jnp.broadcast_to(mask[:, :, None, None], latents.shape[:-1]).astype(jnp.float32)
  augmented = jnp.concatenate([jnp.ones_like(latents[..., :1]), latents], axis=-1)
  gram = jnp.einsum("bthwi,bthwj->ij", augmented * weights[..., None], augmented)
  frames = mask.astype(jnp.float32)
  moments = jnp.stack([jnp.einsum("bt,bthwc->hwc", frames, x) for x in (latents, jnp.square(latents))])
  change = jnp.mean(jnp.square(latents[:, 1:] - latents[:, :-1]), axis=(2, 3, 4))
  statistics: dict[str, Array | Term] = {
    "latent_gram": gram,
    "latent_moments": moments,
    "latent_change_square": Term(change, frames[:, 1:] * frames[:, :-1]),
  }
  if limit is not None:
    statistics["latent_clamped"] = Term(jnp.mean(jnp.abs(latents) > 0.9 * limit, axis=-1), weights)
  return statistics


def confusion(labels: Array, logits: Array, weights: Array) -> Array:
  """Counts weighted pairs of label and most likely class.

  Args:
    labels: [...] int32 in [0, K).
    logits: [..., K].
    weights: [...] float32.

  Returns:
    [K, K] float32; rows are labels, columns are predicted classes.
  """
  classes = logits.shape[-1]
  actual = jax.nn.one_hot(labels, classes) * weights[..., None]
  predicted = jax.nn.one_hot(jnp.argmax(logits, axis=-1), classes)
  return jnp.einsum("...i,...j->ij", actual, predicted)
