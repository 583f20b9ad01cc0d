"""A random number of frames a step: what EnvPool, whose frame skip is one fixed number, leaves to its user.

`SkippingPool` plays an Atari pool frame by frame and puts the steps together. With a range of one number it equals
EnvPool with that frame skip bit for bit, so everything around a pool serves both.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from jedi_jax.envs.pooled import PartialPool, check_max_episode_steps
from jedi_jax.errors import UserError

MAX_SKIP = 60
"""Frames that a step may last at most: a second of play; more is taken for a slip of the keyboard."""
SCREEN = (210, 160)
"""Height and width of the frames that EnvPool holds, of every game, before it resizes them."""
SIZE = 64
"""Height and width of the observations."""
NO_LIMIT = 2**31 - 2
"""The `max_episode_steps` of the pool below: never reached. EnvPool adds one to it in an int32."""

_POOLED = 2  # The last frames of a step whose maximum is shown: the hardware draws some sprites on every second frame.
_STREAM = 0x5C1B  # Keeps the skips apart from whatever else is drawn from `default_rng` of the same seed.


def check_skip(low: int, high: int) -> None:
  """Checks a range of frames a step.

  Raises:
    UserError: not 1 <= low <= high <= 60.
  """
  if not 1 <= low <= high <= MAX_SKIP:
    raise UserError(
      f"skip is {low}-{high}; it must run from a smaller number to a larger or equal one in 1..{MAX_SKIP}"
    )


class SkippingPool:
  """A `jedi_jax.envs.pooled.Pool` whose steps hold the action for a random number of frames.

  The number is drawn uniformly from {low, ..., high}, for every step and environment anew. A step ends early where the
  game does. Its reward is the sum over its frames. Its observation is the pixelwise maximum of its last two frames (of
  the one, if the step has one), resized by `shrink`; of a game that ends early, as in EnvPool, the next to last frame
  alone if it ends on that, and the observation before the step if it ends sooner. The lives are those after the last
  frame.

  `info["frames"]` [N] int64 of a step holds the numbers drawn: a step that the end of a game cuts short counts whole,
  as it does where the frame skip is fixed.

  Args:
    pool: N Atari games with frame skip 1, colour observations of the size `SCREEN` and `NO_LIMIT`; none begun.
    num_envs: N.
    seed: environment i draws its skips from a generator of its own, seeded with `seed + i`; it runs on over the games.
    skip: (low, high).
    max_episode_steps: steps (not frames) after which a game is truncated.

  Raises:
    UserError: the range or the limit makes no sense.
  """

  def __init__(
    self, pool: PartialPool, *, num_envs: int, seed: int, skip: tuple[int, int], max_episode_steps: int
  ) -> None:
    check_skip(*skip)
    check_max_episode_steps(max_episode_steps)
    self._pool = pool
    self._skip = skip
    self._limit = max_episode_steps
    self._rngs = [np.random.default_rng((seed + env, _STREAM)) for env in range(num_envs)]
    self._elapsed = np.zeros(num_envs, np.int64)
    self._observations = np.zeros((num_envs, 3, SIZE, SIZE), np.uint8)

  def reset(self, env_id: np.ndarray) -> tuple[np.ndarray, Mapping[str, Any]]:
    """Starts a new game in the environments `env_id` [K] int32: observations [K, 3, 64, 64] and info of those K."""
    frames, info = self._pool.reset(env_id)
    rows = info["env_id"]
    self._elapsed[rows] = 0
    self._observations[rows] = shrink(frames)
    return self._observations[rows], info

  def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Mapping[str, Any]]:
    """Steps all N: observations [N, 3, 64, 64] uint8, rewards float32, terminated bool, truncated bool, info."""
    num_envs = len(self._rngs)
    skips = np.array([rng.integers(*self._skip, endpoint=True) for rng in self._rngs])
    reward = np.zeros(num_envs, np.float32)
    lives = np.zeros(num_envs, np.int32)
    terminated = np.zeros(num_envs, np.bool_)
    screens = np.zeros((num_envs, 3, *SCREEN), np.uint8)  # Zeros vanish in the maximum.
    seen = np.zeros(num_envs, np.bool_)
    for frame in range(1, int(skips.max()) + 1):
      playing = np.flatnonzero((frame <= skips) & ~terminated).astype(np.int32)
      if not playing.size:
        break
      frames, _, _, _, info = self._pool.step(action[playing], playing)
      rows = info["env_id"]
      reward[rows] += info["reward"]
      lives[rows] = info["lives"]
      terminated[rows] = info["terminated"] != 0
      late = frame > skips[rows] - _POOLED
      screens[rows[late]] = np.maximum(screens[rows[late]], frames[late])
      seen[rows[late]] = True

    self._observations[seen] = shrink(screens[seen])
    self._elapsed += 1
    info = {
      "env_id": np.arange(num_envs, dtype=np.int32),
      "lives": lives,
      "reward": reward,
      "terminated": terminated.astype(np.int32),
      "frames": skips,
    }
    return self._observations.copy(), reward, terminated, self._elapsed >= self._limit, info

  def close(self) -> None:
    """Closes the pool below."""
    self._pool.close()


def shrink(frames: np.ndarray) -> np.ndarray:
  """Resizes frames by averaging over areas, bit for bit as OpenCV's INTER_AREA, which EnvPool uses.

  A pixel of the result covers 105/32 rows and 5/2 columns. Overlaps are whole numbers in units of 1/32 row times 1/2
  column, so a mean is a whole number over 105 * 5 = 525: computed here without any rounding but the last. No such mean
  comes closer to a half than 1/1050, and the rounding errors of OpenCV's float32 sums stay below 1/2000, in whatever
  order it adds: both round to the same byte.

  Args:
    frames: [K, 3, 210, 160] uint8.

  Returns:
    [K, 3, 64, 64] uint8.
  """
  # At most 105 * 255 after the rows, which fits 16 bits, and 525 * 255 in the end.
  sums = np.zeros((*frames.shape[:2], SIZE, SCREEN[1]), np.uint16)
  for row, weight in zip(*_ROWS, strict=True):
    sums += frames[:, :, row] * weight[:, None]
  totals = np.full((*frames.shape[:2], SIZE, SIZE), _AREA // 2, np.uint32)  # Half of the divisor: rounds.
  for column, weight in zip(*_COLUMNS, strict=True):
    totals += sums[..., column] * weight.astype(np.uint32)
  return (totals // np.uint32(_AREA)).astype(np.uint8)


def _overlaps(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
  """Which of `source` pixels in a line every one of `target` pixels covers, and by how much.

  Returns:
    [M, target] indices and [M, target] uint16 weights in units of the largest length of which all overlaps are
    multiples, M being the number of pixels that one can touch; weights 0 fill up.
  """
  scale = Fraction(source, target)
  length, unit = scale.numerator, scale.denominator  # A target pixel is `length` long, a source pixel `unit`.
  touched = max((-(-(t + 1) * length // unit)) - t * length // unit for t in range(target))
  first = np.arange(target) * length // unit
  indices = first + np.arange(touched)[:, None]
  start, stop = np.arange(target) * length, (np.arange(target) + 1) * length
  weights = np.minimum((indices + 1) * unit, stop) - np.maximum(indices * unit, start)
  return np.minimum(indices, source - 1), np.maximum(weights, 0).astype(np.uint16)


_ROWS = _overlaps(SCREEN[0], SIZE)
_COLUMNS = _overlaps(SCREEN[1], SIZE)
_AREA = int(_ROWS[1][:, 0].sum()) * int(_COLUMNS[1][:, 0].sum())
