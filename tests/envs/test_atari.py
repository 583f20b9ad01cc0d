import envpool
import numpy as np
import pytest

from jedi_jax.envs import atari
from jedi_jax.envs.atari import AtariEnv
from jedi_jax.errors import UserError

# Repeated on purpose, so that the test detects a change of the configuration.
RAW_CONFIG = {
  "img_height": 64,
  "img_width": 64,
  "stack_num": 1,
  "gray_scale": False,
  "use_fire_reset": False,
  "frame_skip": 4,
  "noop_max": 30,
  "episodic_life": False,
  "reward_clip": False,
  "repeat_action_probability": 0.0,
  "full_action_space": False,
  "use_inter_area_resize": True,
}


def raw_pool(game, seed, num_envs=1, max_episode_steps=27_000):
  return envpool.make_gymnasium(
    f"{game}-v5", num_envs=num_envs, seed=seed, max_episode_steps=max_episode_steps, **RAW_CONFIG
  )


def play(env, actions):
  """First observations and the steps that `actions` [T, N] lead to."""
  return env.reset(), [env.step(a) for a in actions]


def random_actions(seed, steps, num_envs, num_actions):
  return np.random.default_rng(seed).integers(num_actions, size=(steps, num_envs))


class ScriptedPool:
  """Stands in for EnvPool: `script[env]` lists the steps of its games as (lives, terminated, truncated).

  Every game begins with 3 lives. The observation of environment e at the pool's c-th call is filled with 10 c + e.
  Rows come in descending order of the environments, which `info["env_id"]` permits.
  """

  def __init__(self, script):
    self.script = [iter(steps) for steps in script]
    self.calls = 0
    self.resets = []

  def _answer(self, env_ids, **info):
    """Observations and info, both upside down."""
    self.calls += 1
    rows = [np.full((3, 64, 64), 10 * self.calls + e, np.uint8) for e in env_ids]
    info = {key: value[::-1] for key, value in info.items()}
    return np.stack(rows[::-1]), info | {"env_id": env_ids[::-1], "players": {}}

  def reset(self, env_id):
    self.resets.append(env_id.tolist())
    return self._answer(env_id, lives=np.full(len(env_id), 3, np.int32))

  def step(self, action):
    lives, terminated, truncated = (np.array(x) for x in zip(*(next(s) for s in self.script), strict=True))
    observations, info = self._answer(
      np.arange(len(action)),
      lives=lives,
      terminated=terminated.astype(np.int32),
      reward=action.astype(np.float32),
    )
    # The clipped reward of EnvPool's own return value must not be used.
    clipped = np.full(len(action), 9.0)
    return observations, clipped, (terminated & ~truncated)[::-1], truncated[::-1], info

  def close(self):
    pass


@pytest.fixture
def scripted(monkeypatch):
  """Makes an AtariEnv over a ScriptedPool; returns both."""

  def build(script, life_loss_ends=True):
    pool = ScriptedPool(script)
    monkeypatch.setattr(atari, "open_pool", lambda *args, **kwargs: pool)
    return AtariEnv("Breakout", num_envs=len(script), seed=0, life_loss_ends=life_loss_ends), pool

  return build


def pixels(observations):
  """The value that fills the image of each environment."""
  values = observations[:, 0, 0, 0]
  assert (observations == values[:, None, None, None]).all()
  return values.tolist()


def ends_of(env, num_steps, num_envs=1):
  env.reset()
  return np.stack([env.step(np.zeros(num_envs, np.int32)).end for _ in range(num_steps)])


@pytest.mark.parametrize(
  ("lives", "ends"),
  [
    ([3, 2, 2, 1], [0, 1, 0, 1]),
    # A life is granted and lost again: 4 -> 3 and 3 -> 3 are no losses against the 3 of the start; 3 -> 2 is one.
    ([4, 3, 3, 2], [0, 0, 0, 1]),
    # After a real loss (3 -> 2) the granted life (2 -> 3) is lost again (3 -> 2) without an end; 1 ends.
    ([2, 3, 2, 1], [1, 0, 0, 1]),
  ],
)
def test_life_loss_counts_against_fewest_lives(scripted, lives, ends):
  script = [[(n, False, False) for n in lives]]
  env, pool = scripted(script)
  np.testing.assert_array_equal(ends_of(env, 4)[:, 0], np.array(ends, bool))
  assert pool.resets == [[0]]  # The game went on.

  whole_games, _ = scripted(script, life_loss_ends=False)
  assert not ends_of(whole_games, 4).any()


def test_reset_restores_lives_of_finished_games_only(scripted):
  # Environment 0 loses its game on step 1 and has 3 lives again on step 2, of which it loses one on step 3.
  # Environment 1 holds 2 lives over the restart of the other.
  lost, kept = (0, True, False), (2, False, False)
  env, pool = scripted([[lost, (3, False, False), kept], [kept, kept, kept]])
  ends = ends_of(env, 3, num_envs=2)
  np.testing.assert_array_equal(ends, [[True, True], [False, False], [True, False]])
  assert pool.resets == [[0, 1], [0]]


def test_loss_of_the_game_on_the_last_allowed_step_is_an_end(scripted):
  # EnvPool flags both games as truncated; only the second one was still on.
  env, pool = scripted([[(3, True, True)], [(3, False, True)]])
  env.reset()
  step = env.step(np.array([2, 1]))
  np.testing.assert_array_equal(step.end, [True, False])
  np.testing.assert_array_equal(step.truncated, [False, True])
  np.testing.assert_array_equal(step.game_over, [True, True])
  np.testing.assert_array_equal(step.reward, np.array([2, 1], np.float32))  # From the info, raw.
  assert pool.resets[1:] == [[0, 1]]
  assert pixels(step.next_observation) == [20, 21]
  assert pixels(step.observation) == [30, 31]


def test_final_frame_is_kept_beside_the_first_of_the_next_game(scripted):
  env, _ = scripted([[(3, True, False)], [(3, False, False)]])
  assert pixels(env.reset()) == [10, 11]
  step = env.step(np.zeros(2, np.int64))
  assert pixels(step.next_observation) == [20, 21]
  assert pixels(step.observation) == [30, 21]  # The third call restarted environment 0.


def test_life_loss_in_the_emulator():
  steps, n = 250, 2
  actions = random_actions(0, steps, n, 4)
  _, training = play(AtariEnv("Breakout", num_envs=n, seed=5, life_loss_ends=True), actions)
  _, whole = play(AtariEnv("Breakout", num_envs=n, seed=5, life_loss_ends=False), actions)
  # The flag changes `end` and nothing else.
  for a, b in zip(training, whole, strict=True):
    np.testing.assert_array_equal(a.next_observation, b.next_observation)
    np.testing.assert_array_equal(a.game_over, b.game_over)
    np.testing.assert_array_equal(b.end, b.game_over)
  # Breakout has five lives: a game that was played to its end holds five ends, the last of them with the game.
  for env in range(n):
    first_game = np.flatnonzero([s.game_over[env] for s in training])[0]
    assert sum(s.end[env] for s in training[: first_game + 1]) == 5
    assert training[first_game].end[env]


def test_equals_single_games_whose_discarded_steps_are_left_out():
  """Against EnvPool's own restart, environment by environment: no call is wasted and nothing is mixed up."""
  steps, n, seed = 400, 3, 7
  actions = random_actions(1, steps, n, 4)
  first, batch = play(AtariEnv("Breakout", num_envs=n, seed=seed, life_loss_ends=False), actions)
  finishes = []
  for env in range(n):
    pool = raw_pool("Breakout", seed + env)
    raw, _ = pool.reset()
    np.testing.assert_array_equal(first[env], raw[0].transpose(1, 2, 0))
    for t in range(steps):
      raw, _, terminated, truncated, info = pool.step(actions[t, env : env + 1])
      over = bool((terminated | truncated)[0])
      np.testing.assert_array_equal(batch[t].next_observation[env], raw[0].transpose(1, 2, 0))
      assert batch[t].reward[env] == info["reward"][0]
      assert batch[t].game_over[env] == over
      if over:
        raw, *_ = pool.step(np.zeros(1, np.int32))  # Discarded by EnvPool; returns the first frame.
        finishes.append((t, env))
      np.testing.assert_array_equal(batch[t].observation[env], raw[0].transpose(1, 2, 0))
  assert len({t for t, _ in finishes}) >= 3  # The games ended at different times.
  assert {env for _, env in finishes} == set(range(n))


def test_truncation_restarts_several_games_at_once():
  limit, n = 15, 3
  env = AtariEnv("Pong", num_envs=n, seed=0, life_loss_ends=True, max_episode_steps=limit)
  _, steps = play(env, random_actions(2, 3 * limit, n, 6))
  for t, step in enumerate(steps, start=1):
    # No step is spent on a restart, so games end on every multiple of the limit.
    over = t % limit == 0
    assert (step.game_over == over).all()
    assert (step.truncated == over).all()
    assert not step.end.any()  # The time limit is no end.
    same = (step.observation == step.next_observation).all(axis=(1, 2, 3))
    assert (same == (not over)).all()
  assert env.frames_per_step == 4


def test_layout_is_that_of_envpool_channels_last():
  n = 2
  env = AtariEnv("Freeway", num_envs=n, seed=11, life_loss_ends=True)
  pool = raw_pool("Freeway", 11, num_envs=n)
  raw, _ = pool.reset()
  observations = env.reset()
  for t in range(3):
    assert observations.shape == (n, *env.spec.observation_shape) == (n, 64, 64, 3)
    assert observations.dtype == np.uint8
    assert observations.flags.c_contiguous
    for env_id, y, x, c in [(0, 0, 0, 0), (1, 40, 3, 1), (0, 63, 20, 2), (1, 17, 60, 0)]:
      assert observations[env_id, y, x, c] == raw[env_id, c, y, x]
    np.testing.assert_array_equal(np.moveaxis(observations, -1, 1), raw)
    actions = np.full(n, t % 3, np.int32)
    raw, *_ = pool.step(actions)
    observations = env.step(actions).observation


def test_deterministic_for_a_seed_and_different_between_environments():
  n, steps = 2, 60
  actions = np.repeat(random_actions(3, steps, 1, 6), n, axis=1)  # Both environments act alike.

  def run(seed):
    first, rest = play(AtariEnv("Pong", num_envs=n, seed=seed, life_loss_ends=True), actions)
    return np.stack([first, *(s.next_observation for s in rest)])

  frames = run(20)
  np.testing.assert_array_equal(frames, run(20))
  assert (frames[:, 0] != frames[:, 1]).any()
  # Environment i is seeded with seed + i: ranges that overlap repeat games.
  np.testing.assert_array_equal(run(21)[:, 0], frames[:, 1])


def test_invalid_actions_are_refused():
  env = AtariEnv("Breakout", num_envs=2, seed=0, life_loss_ends=True)
  env.reset()
  wrong = {
    "0..3": np.array([0, 4]),
    "environment 1": np.array([0, -1]),
    "(2,)": np.zeros((2, 1), np.int32),
    "integers": np.zeros(2, np.float32),
  }
  for part, actions in wrong.items():
    with pytest.raises(UserError) as error:
      env.step(actions)
    assert part in str(error.value)
    assert "\n" not in str(error.value)
  assert env.step(np.array([3, 0], np.uint8)).reward.dtype == np.float32


def test_closed_environment_says_so():
  env = AtariEnv("Breakout", num_envs=1, seed=0, life_loss_ends=True)
  env.reset()
  env.close()
  env.close()
  with pytest.raises(RuntimeError, match="closed"):
    env.step(np.zeros(1, np.int32))
