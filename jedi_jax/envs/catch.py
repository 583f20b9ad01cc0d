"""Catch as images: a game of nine steps, small enough for learning tests of a few minutes.

A ball falls straight down a board of 10 rows and 5 columns; the paddle at the bottom moves left, stays, or moves right
(actions 0, 1, 2). The ninth step ends the game with reward +1 if the paddle is under the ball, else -1.
"""

from collections.abc import Mapping

import numpy as np

from jedi_jax.envs.pooled import Outcome, PooledEnv, open_pool
from jedi_jax.types import EnvSpec

ROWS, COLUMNS = 10, 5
CELL_HEIGHT, CELL_WIDTH = 2, 4
WALL = 2
"""Thickness of the wall on each side of the board, in pixels."""
WALL_COLOR = (96, 96, 96)
PADDLE_COLOR = (0, 255, 0)
BALL_COLOR = (255, 255, 255)
GAME_STEPS = ROWS - 1

SPEC = EnvSpec(num_actions=3, observation_shape=(2 * WALL + ROWS * CELL_HEIGHT, 2 * WALL + COLUMNS * CELL_WIDTH, 3))

_BALL_WIDTH = 2  # Half a cell, so that the paddle is visible on both sides of a caught ball.


class CatchEnv(PooledEnv):
  """N games of Catch; see `jedi_jax.types.VectorEnv` and `PooledEnv`.

  Observations are [N, 24, 24, 3] uint8 RGB: cells of 2x4 pixels inside a grey wall of 2 pixels. The green paddle fills
  its cell. The white ball fills the middle 2x2 pixels of its cell and is drawn over the paddle.

  Args:
    num_envs: N >= 1.
    seed: environment i is seeded with `seed + i`; keep the ranges of training and evaluation disjoint.
    max_episode_steps: steps after which a game is truncated; no effect from 9 on, since games take 9 steps.
    num_threads: threads; 0 lets EnvPool choose.

  Raises:
    UserError: a number is out of its range, or EnvPool is not installed.
  """

  def __init__(self, *, num_envs: int, seed: int, max_episode_steps: int | None = None, num_threads: int = 0) -> None:
    pool = open_pool(
      "Catch-v0", num_envs=num_envs, seed=seed, num_threads=num_threads, max_episode_steps=max_episode_steps
    )
    super().__init__(pool, num_envs=num_envs, spec=SPEC)
    self._limit = GAME_STEPS if max_episode_steps is None else max_episode_steps
    self._ball_column = np.zeros(num_envs, np.int64)

  def _images(self, raw: np.ndarray, env_ids: np.ndarray) -> np.ndarray:
    boards = raw.reshape(-1, ROWS, COLUMNS) > 0
    above = boards[:, :-1].reshape(len(boards), -1)
    falling = above.any(axis=1)
    row, column = np.divmod(above.argmax(axis=1), COLUMNS)
    self._ball_column[env_ids[falling]] = column[falling]

    # EnvPool marks ball and paddle with the same value. In the last row the ball is in the column where it fell; the
    # other mark, if any, is the paddle.
    column = self._ball_column[env_ids]
    row = np.where(falling, row, ROWS - 1)
    bottom = boards[:, -1].copy()
    missed = np.flatnonzero(bottom.sum(axis=1) == 2)
    bottom[missed, column[missed]] = False
    return draw(row, column, bottom.argmax(axis=1))

  def _outcome(
    self, reward: np.ndarray, done: np.ndarray, truncated: np.ndarray, info: Mapping[str, np.ndarray]
  ) -> Outcome:
    # EnvPool's Catch plays on past the step limit, so `done` is always the ninth step.
    truncated = (info["elapsed_step"] >= self._limit) & ~done
    return Outcome(reward=reward, end=done, truncated=truncated, game_over=done | truncated)


def draw(ball_row: np.ndarray, ball_column: np.ndarray, paddle_column: np.ndarray) -> np.ndarray:
  """Draws K boards.

  Args:
    ball_row: [K] integers in [0, 10), 0 at the top.
    ball_column: [K] integers in [0, 5).
    paddle_column: [K] integers in [0, 5).

  Returns:
    [K, 24, 24, 3] uint8 RGB, C-contiguous.
  """
  images = np.zeros((len(ball_row), *SPEC.observation_shape), np.uint8)
  images[:] = WALL_COLOR
  images[:, WALL:-WALL, WALL:-WALL] = 0
  bottom = np.full_like(ball_row, ROWS - 1)
  _fill_cells(images, bottom, paddle_column, 0, CELL_WIDTH, PADDLE_COLOR)
  _fill_cells(images, ball_row, ball_column, (CELL_WIDTH - _BALL_WIDTH) // 2, _BALL_WIDTH, BALL_COLOR)
  return images


def _fill_cells(
  images: np.ndarray, row: np.ndarray, column: np.ndarray, left: int, width: int, color: tuple[int, int, int]
) -> None:
  """Paints `width` pixels of the cell (row[k], column[k]) of every image k in place, starting at pixel `left`."""
  k = np.arange(len(images))[:, None, None]
  y = (WALL + CELL_HEIGHT * row)[:, None, None] + np.arange(CELL_HEIGHT)[None, :, None]
  x = (WALL + CELL_WIDTH * column + left)[:, None, None] + np.arange(width)[None, None, :]
  images[k, y, x] = color
