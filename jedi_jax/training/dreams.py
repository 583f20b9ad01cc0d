"""Dreams: imagined frames, compared with real ones."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jedi_jax import replay as replay_lib
from jedi_jax.models import phases
from jedi_jax.models.base import Model
from jedi_jax.ops import images
from jedi_jax.ops.statistics import confusion
from jedi_jax.types import Array, Metrics, Params, Segment, Trajectory


def open_loop(model: Model, params: dict[str, Params], segment: Segment, keys: Array) -> Trajectory:
  """Imagines the frames that the real actions of a segment lead to.

  Args:
    model: the composed model.
    params: its parameters.
    segment: [B, L + T, ...]; imagination starts from its frame L - 1, which must be real.
    keys: [B] random keys, consumed.

  Returns:
    `Trajectory` over T steps; its latent t corresponds to frame L - 1 + t of the segment.
  """
  start, actions = _split(model, segment)
  return model.imagine(params, start, keys, actions.shape[1], actions)


def closed_loop(model: Model, params: dict[str, Params], segment: Segment, keys: Array) -> Trajectory:
  """Imagines from the same start and for as many steps as `open_loop`, with the policy's actions."""
  start, actions = _split(model, segment)
  return model.imagine(params, start, keys, actions.shape[1])


def _split(model: Model, segment: Segment) -> tuple[Segment, Array]:
  length = model.conditioning_frames
  start = jax.tree.map(lambda x: x[:, :length], segment)
  return start, segment.actions[:, length - 1 : -1]


def compare(model: Model, params: dict[str, Params], segment: Segment, key: Array) -> tuple[Trajectory, Metrics]:
  """Imagines a segment open-loop and compares the latents, rewards and ends with the real ones.

  Only real frames count, of segments whose frame L - 1 is real.

  Args:
    model: the composed model.
    params: its parameters.
    segment: [B, L + T, ...].
    key: a random key, consumed.

  Returns:
    The trajectory of `open_loop`, and float32 figures:
      'error', 'copying': [T], root mean square error of the imagined latents and of the last real latent as a constant
        prediction, in standard deviations over time of the real latents.
      'reward_real', 'reward_imagined': [3, 3], confusion counts of the rewards' signs on real and imagined latents.
      'end_real', 'end_imagined': [2, 2], of the ends.
  """
  count, length = len(segment.mask), model.conditioning_frames
  trajectory = open_loop(model, params, segment, jax.random.split(key, count))
  latents = model.encode(params, segment.observations, segment.mask)
  weights = (segment.mask & segment.mask[:, length - 1 : length]).astype(jnp.float32)
  # Sum over the latent's elements of their variances.
  mean = jnp.einsum("bt,bthwc->hwc", weights, latents) / jnp.maximum(jnp.sum(weights), 1.0)
  total = jnp.einsum("bt,bthwc->", weights, jnp.square(latents - mean))
  variance = jnp.maximum(total / jnp.maximum(jnp.sum(weights), 1.0), 1e-12)

  def error(estimated: Array) -> Array:
    squares = jnp.sum(jnp.square(estimated - latents[:, length:]), axis=(2, 3, 4))
    after = weights[:, length:]
    return jnp.sqrt(jnp.sum(squares * after, axis=0) / jnp.maximum(jnp.sum(after, axis=0), 1e-8) / variance)

  steps = slice(length - 1, -1)
  real = weights[:, steps] * weights[:, length:]
  rewards = jnp.sign(segment.rewards[:, steps]).astype(jnp.int32) + 1
  ends = segment.ends[:, steps].astype(jnp.int32)
  reward_logits, end_logits, _ = model.reward_end.predict(
    params["reward_end"],
    latents[:, :-1],
    segment.actions[:, :-1],
    latents[:, 1:],
    model.reward_end.initial_state(count),
  )
  return trajectory, {
    "error": error(trajectory.latents[:, 1:]),
    "copying": error(latents[:, length - 1 : length]),
    "reward_real": confusion(rewards, reward_logits[:, length - 1 :], real),
    "end_real": confusion(ends, end_logits[:, length - 1 :], real),
    "reward_imagined": confusion(rewards, trajectory.reward_logits, real),
    "end_imagined": confusion(ends, trajectory.end_logits, real),
  }


_SAMPLES = 4
"""Samples K of one step."""


def calibration(model: Model, params: dict[str, Params], segment: Segment, key: Array) -> Array:
  """Measures whether samples of the next latent vary as much as they err.

  Args:
    model: the composed model.
    params: its parameters.
    segment: [B, L + 1 or more, ...]; pairs of frames L - 1 and L that are both real count.
    key: a random key, consumed.

  Returns:
    [] float32: (1 + 1 / K) times the mean variance of K samples (unbiased), over the mean squared error of their mean.
    It is about 1 if the samples have the distribution of the real latents, and 0 if they are all equal and err.
  """
  length = model.conditioning_frames
  latents = model.encode(params, segment.observations[:, : length + 1], segment.mask[:, : length + 1])
  noise = model.dynamics.sample_noise(jax.random.split(key, len(segment.mask)), _SAMPLES)
  past, actions, denoiser = latents[:, :length], segment.actions[:, :length], phases.imagining(params)["denoiser"]
  samples = jax.lax.map(lambda draws: model.dynamics.sample(denoiser, past, actions, draws), noise)
  real = segment.mask[:, length - 1] & segment.mask[:, length]

  def total(squares: Array) -> Array:
    return jnp.sum(jnp.where(real, jnp.mean(squares, axis=(1, 2, 3)), 0.0))

  error = total(jnp.square(jnp.mean(samples, axis=0) - latents[:, length]))
  return (1 + 1 / _SAMPLES) * total(jnp.var(samples, axis=0, ddof=1)) / jnp.maximum(error, 1e-12)


_SEGMENTS = 64
"""Segments that training watches."""
_DRAWS = 8
"""Segments drawn for each one that is used."""


def make_watch(model: Model, *, steps: int, strips: int) -> Callable[[dict[str, Params], Any, Array], Metrics]:
  """Builds a pure function that imagines segments of replay and compares them with what was real.

  Args:
    model: the composed model.
    steps: T.
    strips: segments R that are shown, at most 64; none if the model has no `decode`.

  Returns:
    (parameters, replay, key) -> the figures of `compare`; 'calibration', see `calibration`; and 'strips' [2 R, T + 1,
    H, W, C] uint8 if there are any, rows 2 i real and 2 i + 1 imagined from the first frame of row 2 i. Frames past the
    end of an episode are black in both. The key is consumed.
  """
  length = model.conditioning_frames

  def draw(replay: Any, keys: Array) -> Segment:
    return replay_lib.sample(
      replay, keys, length=length + steps, age_weights=(1.0,), beyond_end=True, final_frames=False
    )

  def watch(params: dict[str, Params], replay: Any, key: Array) -> Metrics:
    draw_key, dream_key, sample_key = jax.random.split(key, 3)
    keys = jax.random.split(draw_key, _DRAWS * _SEGMENTS)
    # Segments of short episodes often begin before the episode does. Those whose start is a real frame come first.
    # They are drawn again from their keys, so that only their frames are gathered.
    order = jnp.argsort(~draw(replay, keys).mask[:, length - 1], stable=True)[:_SEGMENTS]
    segment = draw(replay, keys[order])
    trajectory, figures = compare(model, params, segment, dream_key)
    figures = {**figures, "calibration": calibration(model, params, segment, sample_key)}
    if model.decode is None or not strips:
      return figures
    shown, latents = jax.tree.map(lambda x: x[:strips], (segment, trajectory.latents))
    real = shown.observations[:, length - 1 :]
    both = jnp.stack([real, model.decode(params, latents)], axis=1)
    mask = shown.mask[:, None, length - 1 :, None, None, None]
    # Rows whose start lies before the episode are black.
    mask = mask & shown.mask[:, None, length - 1 : length, None, None, None]
    rows = jnp.where(mask, both, 0).astype(jnp.uint8)
    return {**figures, "strips": rows.reshape(2 * strips, steps + 1, *real.shape[2:])}

  return watch


_MIN_HEIGHT = 24
"""Frames below this height are enlarged by an integer factor F in pictures."""


def tile(strips: Any) -> np.ndarray:
  """Arranges strips [R, T, H, W, C] uint8 in one RGB image [R H F, T W F, 3]; see `images.to_rgb` for the colours."""
  frames = images.to_rgb(np.asarray(strips))
  rows, columns, height, width, _ = frames.shape
  image = frames.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
  factor = -(-_MIN_HEIGHT // height)
  return image.repeat(factor, axis=0).repeat(factor, axis=1)
