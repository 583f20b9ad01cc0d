"""Dreams: imagined frames, to compare with real ones."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jedi_jax import replay as replay_lib
from jedi_jax.models.base import Model
from jedi_jax.ops import images
from jedi_jax.types import Array, Params, Segment, Trajectory


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


_DRAWS = 8
"""Segments drawn for each one shown."""


def make_strips(model: Model, *, count: int, steps: int) -> Callable[[dict[str, Params], Any, Array], Array]:
  """Builds a pure function that draws rows of real frames, each above the row imagined from its first frame.

  Args:
    model: a model with `decode`.
    count: segments B.
    steps: T.

  Returns:
    (parameters, replay, key) -> [2 B, T + 1, H, W, C] uint8, rows 2 i real and 2 i + 1 imagined. Frames past the end
    of an episode are black in both. The key is consumed.
  """
  assert model.decode is not None
  decode, length = model.decode, model.conditioning_frames

  def strips(params: dict[str, Params], replay: Any, key: Array) -> Array:
    sample_key, dream_key = jax.random.split(key)
    drawn = replay_lib.sample(
      replay,
      jax.random.split(sample_key, _DRAWS * count),
      length=length + steps,
      age_weights=(1.0,),
      beyond_end=True,
      final_frames=False,
    )
    # Segments of short episodes often begin before the episode does. Those whose start is a real frame come first.
    order = jnp.argsort(~drawn.mask[:, length - 1], stable=True)[:count]
    segment = jax.tree.map(lambda x: x[order], drawn)
    trajectory = open_loop(model, params, segment, jax.random.split(dream_key, count))
    real = segment.observations[:, length - 1 :]
    both = jnp.stack([real, decode(params, trajectory.latents)], axis=1)
    mask = segment.mask[:, None, length - 1 :, None, None, None]
    # Rows whose start lies before the episode are black.
    mask = mask & segment.mask[:, None, length - 1 : length, None, None, None]
    return jnp.where(mask, both, 0).astype(jnp.uint8).reshape(2 * count, steps + 1, *real.shape[2:])

  return strips


_MIN_HEIGHT = 24
"""Frames below this height are enlarged by an integer factor F in pictures."""


def tile(strips: Any) -> np.ndarray:
  """Arranges strips [R, T, H, W, C] uint8 in one RGB image [R H F, T W F, 3]; see `images.to_rgb` for the colours."""
  frames = images.to_rgb(np.asarray(strips))
  rows, columns, height, width, _ = frames.shape
  image = frames.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
  factor = -(-_MIN_HEIGHT // height)
  return image.repeat(factor, axis=0).repeat(factor, axis=1)
