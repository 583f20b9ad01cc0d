import itertools

import numpy as np
import pytest

from jedi_jax.agent import Agent
from jedi_jax.errors import UserError
from jedi_jax.inspection import recording
from jedi_jax.inspection.recording import Episode


def test_episodes_are_games_of_the_policy(episodes):
  # Catch: nine steps a game, so 24 steps of each of two environments are two whole games and six steps.
  lengths = [len(episode.actions) for episode in episodes]
  assert lengths == [9, 9, 9, 9, 5, 5]
  for episode, steps in zip(episodes, lengths, strict=True):
    assert episode.observations.shape == (steps + 1, 24, 24, 3)
    assert episode.observations.dtype == np.uint8
    assert set(np.unique(episode.actions)) <= {0, 1, 2}
    assert not np.any(episode.ends[:-1])
    assert episode.ends[-1] == (steps == 9)
    assert np.all(episode.rewards[:-1] == 0)
    assert abs(episode.rewards[-1]) == (steps == 9)
  assert any(np.any(a.observations[0] != b.observations[0]) for a, b in itertools.pairwise(episodes))


def test_recordings_repeat_themselves_and_follow_their_seed(agent, episodes):
  def equal(a, b):
    return all(np.array_equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True))

  assert equal(recording.record(agent, steps=24, num_envs=2, seed=5), episodes)
  assert not equal(recording.record(agent, steps=24, num_envs=2, seed=6), episodes)


def test_an_agent_without_configuration_is_refused(agent):
  with pytest.raises(UserError, match="configuration"):
    recording.record(Agent(agent.model, agent.params), steps=1, num_envs=1, seed=0)


def numbered(steps, first):
  """An episode whose frames, actions and rewards are all different."""
  return Episode(
    observations=np.arange(first, first + steps + 1, dtype=np.uint8).reshape(-1, 1, 1, 1),
    actions=np.arange(first, first + steps, dtype=np.int32),
    rewards=np.arange(first, first + steps, dtype=np.float32),
    ends=np.arange(steps) == steps - 1,
  )


def test_windows_by_hand():
  with pytest.raises(UserError, match="record more steps"):
    recording.windows([], before=2, after=3, stride=3)
  segment = recording.windows([numbered(5, 10), numbered(1, 50)], before=2, after=3, stride=3)
  frames, mask = np.asarray(segment.observations)[..., 0, 0, 0], np.asarray(segment.mask)
  # Starts 0 and 3 of five steps (six frames), and 0 of one step (two frames); the start is in second place.
  np.testing.assert_array_equal(mask, [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1, 0, 0]])
  np.testing.assert_array_equal(frames * mask, [[0, 10, 11, 12, 13], [12, 13, 14, 15, 0], [0, 50, 51, 0, 0]])
  np.testing.assert_array_equal(segment.actions, [[0, 10, 11, 12, 13], [12, 13, 14, 0, 0], [0, 50, 0, 0, 0]])
  np.testing.assert_array_equal(segment.rewards, segment.actions)
  np.testing.assert_array_equal(segment.ends, [[0] * 5, [0, 0, 1, 0, 0], [0, 1, 0, 0, 0]])
