"""Films: a real game next to two imagined ones from the same start, with the real actions and with the policy's."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jedi_jax.agent import Agent
from jedi_jax.errors import UserError
from jedi_jax.ops.images import to_rgb
from jedi_jax.training import dreams
from jedi_jax.types import Array, Params, Segment

if TYPE_CHECKING:
  from PIL import Image

PANES = ("real game", "dream, same actions", "dream, own policy")
_CAPTION_HEIGHT = 59
_GAP = 6


class Film(NamedTuple):
  """B segments of T + 1 frames in the three panes of `PANES`.

  Attributes:
    frames: [3, B, T + 1, H, W, C] uint8.
    rewards: [3, B, T + 1] float32 in [-1, 1]; sign of the reward of the step that led to the frame, 0 for the first
      frame. In imagined panes it is the expected sign.
    ends: [3, B, T + 1] float32 in [0, 1]; probability that this step ended the episode.
    values: [3, B, T + 1] float32; the critic's value. The last value of an imagined pane repeats the one before.
    shown: [3, B, T + 1] bool; false after the end of the episode.
  """

  frames: np.ndarray
  rewards: np.ndarray
  ends: np.ndarray
  values: np.ndarray
  shown: np.ndarray


def shoot(agent: Agent, segment: Segment, *, seed: int = 0) -> Film:
  """Imagines the continuation of real games and decodes it.

  Args:
    agent: an agent with a decoder and all parameters.
    segment: [B, L + T, ...], as `recording.windows` cuts it. Frame L - 1 is the start.
    seed: seed of the imagination.

  Raises:
    UserError: if the agent has no decoder.
  """
  model = agent.model
  if model.decode is None:
    raise UserError("the agent has no decoder: fit one with inspection.probe.fit")
  decode, length = model.decode, model.conditioning_frames

  @jax.jit
  def panes(params: dict[str, Params], segment: Segment, key: Array) -> Any:
    keys = jax.random.split(key, len(segment.mask))
    latents = model.encode(params, segment.observations, segment.mask)
    state = model.initial_state(len(segment.mask))
    _, values, _ = model.actor_critic.apply(params["actor_critic"], latents, state, segment.mask.astype(jnp.float32))

    def first(x: Array, start: float) -> Array:
      return jnp.concatenate([jnp.full_like(x[:, :1], start), x], axis=1)

    mask = segment.mask[:, length - 1 :]
    real = (
      segment.observations[:, length - 1 :],
      first(jnp.sign(segment.rewards[:, length - 1 : -1]), 0.0),
      first(segment.ends[:, length - 1 : -1].astype(jnp.float32), 0.0),
      values[:, length - 1 :],
      mask,
    )
    films = [real]
    for dream in (dreams.open_loop, dreams.closed_loop):
      trajectory = dream(model, params, segment, keys)
      rewards = jax.nn.softmax(trajectory.reward_logits) @ jnp.asarray([-1.0, 0.0, 1.0])
      ends = jax.nn.softmax(trajectory.end_logits)[..., 1]
      values = jnp.concatenate([trajectory.values, trajectory.values[:, -1:]], axis=1)
      alive = first(trajectory.alive, 1.0) > 0
      images = decode(params, trajectory.latents)
      films.append((images, first(rewards, 0.0), first(ends, 0.0), values, alive))
    return jax.tree.map(lambda *parts: jnp.stack(parts), *films)

  return Film(*jax.device_get(panes(agent.params, segment, jax.random.key(seed))))


def draw(film: Film, *, size: int = 192, names: Sequence[str] = PANES) -> list[Image.Image]:
  """Draws the frames of a film.

  The rim of a pane is green for a positive and red for a negative reward. A bar shows the value. After the end of its
  episode a pane keeps its last frame, dimmed.

  Args:
    film: a film from `shoot`.
    size: minimum height of a pane in pixels; frames are drawn by `to_rgb` and enlarged by an integer factor.
    names: of the panes P, if the arrays of the film have another number of them than three.

  Returns:
    One image per frame, segment after segment; each segment lasts until its longest pane ends.
  """
  from PIL import Image, ImageDraw, ImageFont

  frames = to_rgb(film.frames)
  height, width = frames.shape[3:5]
  factor = -(-size // height)
  height, width = factor * height, factor * width
  font = ImageFont.load_default()
  top = max(float(np.abs(film.values[film.shown]).max(initial=0.0)), 1e-3)
  images = []
  for take in range(film.frames.shape[1]):
    for t in range(int(film.shown[:, take].sum(axis=1).max())):
      canvas = Image.new(
        "RGB", (len(names) * width + (len(names) + 1) * _GAP, height + 2 * _GAP + _CAPTION_HEIGHT), (24, 24, 28)
      )
      brush = ImageDraw.Draw(canvas)
      for pane, name in enumerate(names):
        left = _GAP + pane * (width + _GAP)
        last = min(t, int(film.shown[pane, take].sum()) - 1)
        dim = last < t
        picture = frames[pane, take, last].repeat(factor, axis=0).repeat(factor, axis=1)
        canvas.paste(Image.fromarray(picture // 3 if dim else picture), (left, _GAP))
        reward, end, value = (float(x[pane, take, last]) for x in (film.rewards, film.ends, film.values))
        rim = (60, 200, 90) if reward > 0.5 else (220, 60, 60) if reward < -0.5 else (70, 70, 76)
        brush.rectangle((left - 2, _GAP - 2, left + width + 1, _GAP + height + 1), outline=rim, width=2)
        under = height + _GAP + 4
        brush.text((left, under), name, fill=(230, 230, 230), font=font)
        reward, value = round(reward, 2) + 0.0, round(value, 2) + 0.0  # No "-0.00".
        brush.text((left, under + 13), f"reward {reward:+.2f}  end {end:.2f}", fill=(170, 170, 176), font=font)
        if dim:
          continue  # The value after an end is undefined.
        brush.text((left, under + 26), f"value {value:+.2f}", fill=(170, 170, 176), font=font)
        middle = left + width // 2
        tip = middle + round(value / top * width / 2)
        color = (60, 200, 90) if value >= 0 else (220, 60, 60)
        brush.rectangle((min(middle, tip), under + 43, max(middle, tip), under + 48), fill=color)
      images.append(canvas)
  return images


def write(images: list[Image.Image], path: pathlib.Path, *, frames_per_second: float) -> None:
  """Writes a film as .gif, or as .mp4 with the program ffmpeg.

  Raises:
    UserError: for another suffix, for .mp4 if ffmpeg is not installed, or if the file cannot be written.
  """
  from PIL import Image

  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
      # A single palette of 64 colours keeps the file small and avoids flicker.
      palette = images[len(images) // 2].quantize(64, dither=Image.Dither.NONE)
      duration = max(round(1000 / frames_per_second), 20)  # Browsers show shorter frames for 100 ms.
      small = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
      small[0].save(path, save_all=True, append_images=small[1:], duration=duration, loop=0, optimize=True)
    elif path.suffix == ".mp4":
      _write_mp4(images, path, frames_per_second)
    else:
      raise UserError(f"{path} is neither .gif nor .mp4")
  except OSError as error:
    raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def _write_mp4(images: list[Image.Image], path: pathlib.Path, frames_per_second: float) -> None:
  program = shutil.which("ffmpeg")
  if program is None:
    raise UserError(f"{path.name} needs the program ffmpeg, which is not installed: use .gif")
  width, height = (size // 2 * 2 for size in images[0].size)  # The codec requires even sizes.
  command = [program, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
  command += ["-r", str(frames_per_second), "-i", "-", "-pix_fmt", "yuv420p", str(path)]
  data = b"".join(image.crop((0, 0, width, height)).tobytes() for image in images)
  done = subprocess.run(command, input=data, capture_output=True, check=False)
  if done.returncode:
    raise UserError(f"ffmpeg could not write {path}: {done.stderr.decode(errors='replace').strip()[-200:]}")
