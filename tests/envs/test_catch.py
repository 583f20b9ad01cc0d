import numpy as np
import pytest

from jedi_jax.envs.catch import CatchEnv, draw

WHITE, GREEN, GREY, BLACK = (255, 255, 255), (0, 255, 0), (96, 96, 96), (0, 0, 0)


def cells(image, color):
  """Pixels of a color as sorted (row, column) in cells: the wall is 2 thick, a cell 2 high and 4 wide."""
  y, x = np.nonzero((image == np.array(color, np.uint8)).all(axis=-1))
  return sorted(set(zip(((y - 2) // 2).tolist(), ((x - 2) // 4).tolist(), strict=True)))


def decode(image):
  """Ball row, ball column, paddle column of an image."""
  [(ball_row, ball_column)] = cells(image, WHITE)
  [(paddle_row, paddle_column)] = cells(image, GREEN)
  assert paddle_row == 9
  return ball_row, ball_column, paddle_column


def test_every_board_is_drawn_to_the_pixel():
  rows, balls, paddles = (a.ravel() for a in np.meshgrid(np.arange(10), np.arange(5), np.arange(5)))
  images = draw(rows, balls, paddles)
  assert images.shape == (250, 24, 24, 3)
  assert images.dtype == np.uint8
  for image, row, ball, paddle in zip(images, rows, balls, paddles, strict=True):
    expected = np.full((24, 24, 3), GREY, np.uint8)
    expected[2:22, 2:22] = BLACK
    expected[20:22, 2 + 4 * paddle : 6 + 4 * paddle] = GREEN
    expected[2 + 2 * row : 4 + 2 * row, 3 + 4 * ball : 5 + 4 * ball] = WHITE
    np.testing.assert_array_equal(image, expected)
    assert decode(image) == (row, ball, paddle)  # Both stay visible where they overlap.


def test_games_can_be_read_off_the_pictures():
  n, games = 6, 15
  env = CatchEnv(num_envs=n, seed=3)
  rng = np.random.default_rng(0)
  boards = np.array([decode(image) for image in env.reset()])
  fell_in, caught = set(), {False: 0, True: 0}
  for t in range(9 * games):
    actions = rng.integers(3, size=n)
    step = env.step(actions)
    after = np.array([decode(image) for image in step.next_observation])
    # The ball falls straight by one row; the paddle follows the action between the walls.
    np.testing.assert_array_equal(after[:, 0], boards[:, 0] + 1)
    np.testing.assert_array_equal(after[:, 1], boards[:, 1])
    np.testing.assert_array_equal(after[:, 2], np.clip(boards[:, 2] + actions - 1, 0, 4))
    over = t % 9 == 8  # Nine steps a game and none between games.
    assert (step.game_over == over).all()
    assert (step.end == over).all()
    assert not step.truncated.any()
    match = after[:, 1] == after[:, 2]
    np.testing.assert_array_equal(step.reward, np.where(match, 1.0, -1.0) * over)
    boards = np.array([decode(image) for image in step.observation])
    if over:
      assert (boards[:, 0] == 0).all()
      fell_in |= set(after[:, 1].tolist())
      for hit in match.tolist():
        caught[hit] += 1
    else:
      assert step.observation is step.next_observation
  assert fell_in == set(range(5))
  assert caught[True] > 0
  assert caught[False] > 0


@pytest.mark.parametrize("limit", [4, 9, 20])
def test_step_limit_matters_only_below_nine(limit):
  env = CatchEnv(num_envs=3, seed=0, max_episode_steps=limit)
  env.reset()
  length = min(limit, 9)
  for t in range(1, 2 * length + 1):
    step = env.step(np.ones(3, np.int32))
    over = t % length == 0
    assert (step.game_over == over).all()
    assert (step.truncated == (over and limit < 9)).all()
    assert (step.end == (over and limit >= 9)).all()
    assert [decode(image)[0] for image in step.observation] == [0 if over else t % length] * 3


def test_following_the_ball_always_wins():
  env = CatchEnv(num_envs=4, seed=1)
  observations = env.reset()
  total = np.zeros(4)
  for _ in range(9 * 5):
    boards = np.array([decode(image) for image in observations])
    step = env.step(np.sign(boards[:, 1] - boards[:, 2]) + 1)
    observations = step.observation
    total += step.reward
  np.testing.assert_array_equal(total, 5.0)


def test_deterministic_for_a_seed():
  actions = np.random.default_rng(4).integers(3, size=(30, 2))

  def run(seed):
    env = CatchEnv(num_envs=2, seed=seed)
    return np.stack([env.reset(), *(env.step(a).observation for a in actions)])

  np.testing.assert_array_equal(run(8), run(8))
  assert (run(8) != run(10)).any()


def test_spec_and_frames():
  env = CatchEnv(num_envs=2, seed=0)
  assert env.spec == (3, (24, 24, 3))
  assert env.num_envs == 2
  assert env.frames_per_step == 1
