"""Films: a real game beside two dreams from the same start, one with the same actions, one with the policy's own."""

import pathlib
import shutil
import subprocess
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jedi_jax.agent import Agent
from jedi_jax.errors import UserError
from jedi_jax.training import dreams
from jedi_jax.types import Array, Params, Segment

PANES = ("real game", "dream, same actions", "dream, own policy")
_CAPTION = 59
_GAP = 6


class Film(NamedTuple):
  """B takes of T + 1 frames in the three panes of `PANES`.

  Attributes:
    frames: [3, B, T + 1, H, W, C] uint8.
    rewards: [3, B, T + 1] float32; of the step that led to the frame, 0 for the first: the real sign, else expected.
    ends: [3, B, T + 1] float32; probability that this step ended the episode.
    values: [3, B, T + 1] float32; the critic's. The last of a dream repeats the one before.
    shown: [3, B, T + 1] bool; false after the episode.
  """

  frames: np.ndarray
  rewards: np.ndarray
  ends: np.ndarray
  values: np.ndarray
  shown: np.ndarray


def shoot(agent: Agent, segment: Segment, *, seed: int = 0) -> Film:
  """Dreams along segments of real games.

  Args:
    agent: one that can decode, with all parameters.
    segment: [B, L + T, ...], the last of its first L frames the start, as `recording.windows` cuts them.
    seed: of the dreams.

  Raises:
    UserError: if the agent cannot decode.
  """
  model = agent.model
  if model.decode is None:
    raise UserError("this run has no decoder: fit a probe first")
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


def draw(film: Film, *, size: int = 192) -> list[Image.Image]:
  """Draws a film: a green rim for a positive reward, a red one for a negative, a bar for the value, dim after the end.

  Args:
    film: what was shot.
    size: least height of a pane in pixels; frames are enlarged by a whole factor.

  Returns:
    One image a frame, take after take; a take lasts as long as any of its panes.
  """
  height, width = film.frames.shape[3:5]
  factor = -(-size // height)
  height, width = factor * height, factor * width
  font = ImageFont.load_default()
  top = max(float(np.abs(film.values[film.shown]).max(initial=0.0)), 1e-3)
  images = []
  for take in range(film.frames.shape[1]):
    for t in range(int(film.shown[:, take].sum(axis=1).max())):
      canvas = Image.new("RGB", (3 * width + 4 * _GAP, height + 2 * _GAP + _CAPTION), (24, 24, 28))
      brush = ImageDraw.Draw(canvas)
      for pane, name in enumerate(PANES):
        left = _GAP + pane * (width + _GAP)
        # Behind its end a pane keeps its last frame.
        last = min(t, int(film.shown[pane, take].sum()) - 1)
        dim = last < t
        picture = film.frames[pane, take, last].repeat(factor, axis=0).repeat(factor, axis=1)
        canvas.paste(Image.fromarray(picture // 3 if dim else picture), (left, _GAP))
        reward, end, value = (float(x[pane, take, last]) for x in (film.rewards, film.ends, film.values))
        rim = (60, 200, 90) if reward > 0.5 else (220, 60, 60) if reward < -0.5 else (70, 70, 76)
        brush.rectangle((left - 2, _GAP - 2, left + width + 1, _GAP + height + 1), outline=rim, width=2)
        under = height + _GAP + 4
        brush.text((left, under), name, fill=(230, 230, 230), font=font)
        reward, value = round(reward, 2) + 0.0, round(value, 2) + 0.0  # No "-0.00".
        brush.text((left, under + 13), f"reward {reward:+.2f}  end {end:.2f}", fill=(170, 170, 176), font=font)
        if dim:
          continue  # Nothing follows an end, so there is no value.
        brush.text((left, under + 26), f"value {value:+.2f}", fill=(170, 170, 176), font=font)
        middle = left + width // 2
        tip = middle + round(value / top * width / 2)
        color = (60, 200, 90) if value >= 0 else (220, 60, 60)
        brush.rectangle((min(middle, tip), under + 43, max(middle, tip), under + 48), fill=color)
      images.append(canvas)
  return images


def write(images: list[Image.Image], path: pathlib.Path, *, frames_per_second: float) -> None:
  """Writes a film as .gif, or as .mp4 where the program ffmpeg is installed.

  Raises:
    UserError: for another ending, without ffmpeg, or where the file cannot be written.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
      # One palette of few colours for all frames keeps the file small and the colours still.
      palette = images[len(images) // 2].quantize(64, dither=Image.Dither.NONE)
      small = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
      small[0].save(
        path, save_all=True, append_images=small[1:], duration=round(1000 / frames_per_second), loop=0, optimize=True
      )
    elif path.suffix == ".mp4":
      _write_mp4(images, path, frames_per_second)
    else:
      raise UserError(f"{path} is neither .gif nor .mp4")
  except OSError as error:
    raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def _write_mp4(images: list[Image.Image], path: pathlib.Path, frames_per_second: float) -> None:
  program = shutil.which("ffmpeg")
  if program is None:
    raise UserError(f"{path.name} needs the program ffmpeg, which is not installed: take .gif")
  width, height = (size // 2 * 2 for size in images[0].size)  # The codec wants even sizes.
  command = [program, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
  command += ["-r", str(frames_per_second), "-i", "-", "-pix_fmt", "yuv420p", str(path)]
  data = b"".join(image.crop((0, 0, width, height)).tobytes() for image in images)
  done = subprocess.run(command, input=data, capture_output=True, check=False)
  if done.returncode:
    raise UserError(f"ffmpeg could not write {path}: {done.stderr.decode(errors='replace').strip()[-200:]}")
