"""A random number of frames per step; EnvPool's own frame skip is fixed.

`SkippingPool` plays an Atari pool frame by frame and composes steps. With low = high it equals EnvPool with that frame
skip bit for bit.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from jedi_jax.envs.pooled import PartialPool, check_numbers
from jedi_jax.errors import UserError

MAX_SKIP = 60
"""Largest number of frames per step: one second of play. A larger one is most likely a typing error."""
SCREEN = (210, 160)
"""Height and width of the frames of every game before EnvPool resizes them."""
SIZE = 64
"""Height and width of the observations."""
NO_LIMIT = 2**31 - 2
"""`max_episode_steps` of the wrapped pool, never reached. EnvPool adds one to it in an int32."""

_POOLED = 2  # Final frames of a step that are combined: the hardware draws some sprites on every second frame only.
_STREAM = 0x5C1B  # Makes the skips independent of other `default_rng` streams of the same seed.


def check_skip(low: int, high: int) -> None:
  """Checks a range of frames per step.

  Raises:
    UserError: not 1 <= low <= high <= 60.
  """
  if not 1 <= low <= high <= MAX_SKIP:
    raise UserError(f"skip is {low}-{high}; write low-high with low <= high, both in 1..{MAX_SKIP}")


class SkippingPool:
  """A `jedi_jax.envs.pooled.Pool` that repeats each action for a random number of frames.

  The number is drawn uniformly from {low, ..., high}, independently for every step and environment. A step stops when
  its game ends. Its reward is the sum over its frames. Its observation is the pixelwise maximum of its last two planned
  frames (of one if there is one), resized by `shrink`. If the game ends early, as in EnvPool, the observation is the
  second to last planned frame if the game reached it, else the observation before the step. The lives are those after
  the last frame.

  `info["frames"]` [N] int64 of a step holds the numbers drawn; a step that stops early counts in full, as with a fixed
  frame skip.

  Args:
    pool: N Atari games with frame skip 1, colour observations of size `SCREEN` and time limit `NO_LIMIT`, before the
      first reset.
    num_envs: N.
    seed: environment i draws its skips from its own generator, seeded once with `seed + i`.
    skip: (low, high).
    max_episode_steps: steps (not frames) after which a game is truncated, at least 1.

  Raises:
    UserError: not 1 <= low <= high <= 60, or another number is out of its range.
  """

  def __init__(
    self, pool: PartialPool, *, num_envs: int, seed: int, skip: tuple[int, int], max_episode_steps: int
  ) -> None:
    check_skip(*skip)
    check_numbers(num_envs, seed, max_episode_steps)
    self._pool = pool
    self._skip = skip
    self._limit = max_episode_steps
    self._rngs = [np.random.default_rng((seed + env, _STREAM)) for env in range(num_envs)]
    self._elapsed = np.zeros(num_envs, np.int64)
    self._observations = np.zeros((num_envs, 3, SIZE, SIZE), np.uint8)

  def reset(self, env_id: np.ndarray) -> tuple[np.ndarray, Mapping[str, Any]]:
    """Starts new games in the environments `env_id` [K] int32; returns observations [K, 3, 64, 64] and info."""
    frames, info = self._pool.reset(env_id)
    rows = info["env_id"]
    self._elapsed[rows] = 0
    self._observations[rows] = shrink(frames)
    return self._observations[rows], info

  def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Mapping[str, Any]]:
    """Steps all N; returns observations [N, 3, 64, 64] uint8, rewards float32, terminated, truncated bool, info."""
    num_envs = len(self._rngs)
    skips = np.array([rng.integers(*self._skip, endpoint=True) for rng in self._rngs])
    reward = np.zeros(num_envs, np.float32)
    lives = np.zeros(num_envs, np.int32)
    terminated = np.zeros(num_envs, np.bool_)
    screens = np.zeros((num_envs, 3, *SCREEN), np.uint8)  # Zeros do not change a maximum.
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
    """Closes the wrapped pool."""
    self._pool.close()


def shrink(frames: np.ndarray) -> np.ndarray:
  """Resizes frames by area averaging; equal to OpenCV's INTER_AREA, which EnvPool uses, bit for bit.

  A pixel of the result covers 105/32 rows and 5/2 columns. In units of 1/32 row times 1/2 column, overlaps are
  integers, so a mean is an integer divided by 105 * 5 = 525. Only the final division rounds. Such a mean differs from a
  half-integer by at least 1/1050, and the rounding errors of OpenCV's float32 sums are below 1/2000 in any order of
  addition, so both round to the same byte.

  Args:
    frames: [K, 3, 210, 160] uint8.

  Returns:
    [K, 3, 64, 64] uint8.
  """
  # At most 105 * 255 after the rows, which fits 16 bits, and 525 * 255 after the columns.
  sums = np.zeros((*frames.shape[:2], SIZE, SCREEN[1]), np.uint16)
  for row, weight in zip(*_ROWS, strict=True):
    sums += frames[:, :, row] * weight[:, None]
  totals = np.full((*frames.shape[:2], SIZE, SIZE), _AREA // 2, np.uint32)  # Half of the divisor, for rounding.
  for column, weight in zip(*_COLUMNS, strict=True):
    totals += sums[..., column] * weight.astype(np.uint32)
  return (totals // np.uint32(_AREA)).astype(np.uint8)


def _overlaps(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the overlaps of `target` equal pixels with the `source` pixels of a line.

  Returns:
    Indices [M, target] of source pixels and weights [M, target] uint16, integers in the largest common unit of all
    overlaps. M is the largest number of source pixels that a target pixel touches; unused entries have weight 0.
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
