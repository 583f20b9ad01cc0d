import numpy as np
import pytest

from jedi_jax.envs import make
from jedi_jax.errors import UserError
from jedi_jax.evaluation.episodes import EpisodeResult, random_policy, run_episodes
from jedi_jax.types import EnvSpec, EnvStep


class Clockwork:
  """Games of fixed lengths: those of environment i take lengths[i] steps, each rewarded with i + 1.

  An observation is (environment, steps so far in this game, index of the game). Environment `truncates` is stopped by
  the time limit. Every other step is called an end, as a lost life would be.
  """

  frames_per_step = 1

  def __init__(self, lengths, truncates=None):
    self.lengths = np.array(lengths)
    self.num_envs = len(lengths)
    self.spec = EnvSpec(2, (1, 1, 3))
    self.truncates = np.arange(self.num_envs) == truncates
    self.clock = 0

  def _observe(self, steps, game):
    return np.stack([np.arange(self.num_envs), steps, game], axis=-1).astype(np.uint8)[:, None, None]

  def reset(self):
    self.clock = 0
    return self._observe(np.zeros(self.num_envs), np.zeros(self.num_envs))

  def step(self, actions):
    assert actions.shape == (self.num_envs,)
    self.clock += 1
    over = self.clock % self.lengths == 0
    observation = self._observe(self.clock % self.lengths, self.clock // self.lengths)
    return EnvStep(
      next_observation=np.full_like(observation, 255),  # Never to be acted on.
      observation=observation,
      reward=np.arange(1, self.num_envs + 1, dtype=np.float32),
      end=np.full(self.num_envs, self.clock % 2 == 1),
      truncated=over & self.truncates,
      game_over=over,
    )

  def close(self):
    pass


class Recorder:
  """A policy that notes what it was called with."""

  def __init__(self):
    self.observations, self.restarts = [], []

  def __call__(self, observations, restart):
    self.observations.append(observations)
    self.restarts.append(restart)
    return np.zeros(len(observations), np.int32)


def expected(env, length, *, truncated=False):
  return EpisodeResult(env, float((env + 1) * length), length, truncated)


def test_quotas_are_even_whatever_the_lengths():
  env = Clockwork([2, 7, 3], truncates=2)
  policy = Recorder()
  results = run_episodes(env, policy, episodes=8)
  # 8 = 3 + 3 + 2. Environment 0 is done after 6 steps and plays on uncounted until the 21st step, when 1 is.
  assert results == [expected(0, 2)] * 3 + [expected(1, 7)] * 3 + [expected(2, 3, truncated=True)] * 2
  assert len(policy.restarts) == max(3 * 2, 3 * 7, 2 * 3)


def test_fewer_episodes_than_environments():
  policy = Recorder()
  results = run_episodes(Clockwork([5, 4, 1]), policy, episodes=2)
  assert results == [expected(0, 5), expected(1, 4)]  # Not the quick third one.
  assert len(policy.restarts) == 5


def test_policy_sees_first_frames_with_restart():
  policy = Recorder()
  run_episodes(Clockwork([2, 3]), policy, episodes=4)
  observations, restarts = np.stack(policy.observations)[:, :, 0, 0], np.stack(policy.restarts)
  assert restarts[0].all()
  assert (observations != 255).all()
  np.testing.assert_array_equal(restarts, observations[..., 1] == 0)  # Step 0 of a game, in every environment.
  np.testing.assert_array_equal(restarts[:, 0], [True, False] * 3)
  np.testing.assert_array_equal(restarts[:, 1], [True, False, False] * 2)


def test_on_episode_is_called_in_time_for_counted_games():
  seen = []
  results = run_episodes(Clockwork([2, 5]), Recorder(), episodes=4, on_episode=seen.append)
  # Games end at steps 2 and 4 (environment 0), 5 and 10 (environment 1).
  assert seen == [expected(0, 2), expected(0, 2), expected(1, 5), expected(1, 5)]
  assert sorted(seen) == sorted(results)


@pytest.mark.parametrize("episodes", [0, -1])
def test_no_episodes_is_an_error(episodes):
  with pytest.raises(UserError, match=f"episodes is {episodes};"):
    run_episodes(Clockwork([1]), Recorder(), episodes=episodes)


def test_random_policy():
  observations, restart = np.zeros((50, 1, 1, 3), np.uint8), np.zeros(50, bool)
  policy, again, other = random_policy(3, 0), random_policy(3, 0), random_policy(3, 1)
  actions = np.stack([policy(observations, restart) for _ in range(20)])
  assert set(actions.ravel().tolist()) == {0, 1, 2}
  # 1,000 draws: the share of each action has a standard deviation of sqrt(1/3 * 2/3 / 1000) = 0.015.
  np.testing.assert_allclose(np.bincount(actions.ravel()) / actions.size, 1 / 3, atol=4 * 0.015)
  np.testing.assert_array_equal(actions, [again(observations, restart) for _ in range(20)])
  assert (actions[0] != other(observations, restart)).any()


def test_random_play_of_catch():
  results = run_episodes(make("catch", num_envs=10, seed=0, life_loss_ends=False), random_policy(3, 0), episodes=1000)
  assert all(r.length == 9 and r.return_ in (-1.0, 1.0) and not r.truncated for r in results)
  # The ball falls in each column with chance 1/5 and independently of the paddle, so a game is won with chance 1/5
  # wherever the paddle ends: mean 2/5 - 1 = -0.6, standard deviation of the mean sqrt(1 - 0.36) / sqrt(1000) = 0.025.
  assert np.mean([r.return_ for r in results]) == pytest.approx(-0.6, abs=4 * 0.025)


def test_whole_atari_games_despite_life_losses():
  env = make("atari/Breakout", num_envs=2, seed=0, life_loss_ends=True)
  results = run_episodes(env, random_policy(4, 0), episodes=2)
  assert [r.env for r in results] == [0, 1]
  # Five lives, each lost no sooner than the ball needs to fall: far longer than one life.
  assert all(r.length > 60 and not r.truncated for r in results)
  assert all(r.return_ == int(r.return_) >= 0 for r in results)
