import pytest

from jedi_jax.evaluation.scores import human_normalized_score


def test_random_and_human_play_are_zero_and_one():
  # Breakout: random 1.7, human 30.5.
  assert human_normalized_score("atari/Breakout", 1.7) == 0.0
  assert human_normalized_score("atari/Breakout", 30.5) == 1.0
  assert human_normalized_score("atari/Breakout", 1.7 + 0.25 * (30.5 - 1.7)) == pytest.approx(0.25)


def test_negative_scores():
  # Pong: random -20.7, human 14.6; a draw is 20.7 / 35.3 of the way, a shut-out is below random.
  assert human_normalized_score("atari/Pong", 0.0) == pytest.approx(20.7 / 35.3)
  assert human_normalized_score("atari/Pong", -21.0) == pytest.approx(-0.3 / 35.3)


@pytest.mark.parametrize("name", ["catch", "atari/Tetris", "Breakout", "atari/breakout", ""])
def test_not_defined(name):
  assert human_normalized_score(name, 1.0) is None
