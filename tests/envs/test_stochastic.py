import itertools
import math
from fractions import Fraction

import envpool
import numpy as np
import pytest

from jedi_jax import envs
from jedi_jax.config import make_config
from jedi_jax.envs import atari, skipping
from jedi_jax.envs.atari import AtariEnv
from jedi_jax.errors import UserError
from jedi_jax.evaluation import human_normalized_score


def random_actions(env, seed, steps):
  return np.random.default_rng(seed).integers(env.spec.num_actions, size=(steps, env.num_envs))


def assert_same_games(plain, skipping_env, seed, steps):
  """Plays both alike; returns the plain one's steps."""
  np.testing.assert_array_equal(plain.reset(), skipping_env.reset())
  played = []
  for t, actions in enumerate(random_actions(plain, seed, steps)):
    expected, step = plain.step(actions), skipping_env.step(actions)
    for field in expected._fields:
      a, b = getattr(expected, field), getattr(step, field)
      np.testing.assert_array_equal(a, b, err_msg=f"{field} of step {t}", strict=True)
    played.append(expected)
  return played


@pytest.mark.parametrize(
  ("game", "num_envs", "steps"),
  [
    ("Breakout", 4, 450),
    ("Boxing", 2, 300),
    *(pytest.param(game, 2, 300, marks=pytest.mark.slow) for game in ("Pong", "MsPacman")),
  ],
)
def test_fixed_range_equals_the_plain_game(game, num_envs, steps):
  made = [
    envs.make(f"atari/{game}{query}", num_envs=num_envs, seed=3, life_loss_ends=True) for query in ("", "?skip=4-4")
  ]
  assert made[0].spec == made[1].spec == envs.spec(f"atari/{game}?skip=4-4")
  played = assert_same_games(*made, seed=3, steps=steps)
  assert made[0].frames == made[1].frames == 4 * num_envs * steps
  assert any(s.reward.any() for s in played)
  if game == "Breakout":
    # Lives and games were lost, and of the games some so early in a step that its last two frames were never played.
    over = sum(s.game_over.sum() for s in played)
    assert over >= 4
    assert sum(s.end.sum() for s in played) >= 5 * over
    stale = [
      (b.next_observation == a.observation).all(axis=(1, 2, 3)) & b.game_over for a, b in itertools.pairwise(played)
    ]
    assert np.any(stale)


@pytest.mark.parametrize(
  "skip", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow), 5]
)
def test_fixed_range_equals_envpool_with_that_frame_skip(monkeypatch, skip):
  env = AtariEnv("Breakout", num_envs=2, seed=skip, life_loss_ends=True, skip=(skip, skip))
  monkeypatch.setattr(atari, "_CONFIG", {**atari._CONFIG, "frame_skip": skip})
  plain = AtariEnv("Breakout", num_envs=2, seed=skip, life_loss_ends=True)
  played = assert_same_games(plain, env, seed=skip, steps=350)
  assert skip < 3 or any(s.game_over.any() for s in played)


def test_truncation_counts_steps():
  limit, n = 23, 2
  made = [
    AtariEnv("Breakout", num_envs=n, seed=1, life_loss_ends=False, max_episode_steps=limit, skip=skip)
    for skip in (None, (4, 4))
  ]
  played = assert_same_games(*made, seed=1, steps=3 * limit)
  assert sum(s.truncated.sum() for s in played) == 3 * n

  env = AtariEnv("Pong", num_envs=n, seed=1, life_loss_ends=True, max_episode_steps=limit, skip=(2, 6))
  env.reset()
  for t, actions in enumerate(random_actions(env, 1, 3 * limit), start=1):
    step = env.step(actions)
    over = t % limit == 0
    assert (step.truncated == over).all()
    assert (step.game_over == over).all()
    assert not step.end.any()
    assert (step.observation != step.next_observation).any(axis=(1, 2, 3)).all() == over


def test_random_steps_equal_frames_played_by_hand():
  """One emulator stepped frame by frame for each environment, without the wrapper's bookkeeping."""
  n, steps, seed, low, high = 2, 350, 7, 2, 6
  options = atari._CONFIG | {"img_height": 210, "img_width": 160, "frame_skip": 1, "max_episode_steps": 10**6}
  batch = AtariEnv("Breakout", num_envs=n, seed=seed, life_loss_ends=False, skip=(low, high))
  actions = random_actions(batch, 0, steps)
  first = batch.reset()
  played = [batch.step(a) for a in actions]

  frames, over = 0, 0
  for i in range(n):
    # Environment i alone has the same seed; its counter gives the frames of each of its steps.
    single = AtariEnv("Breakout", num_envs=1, seed=seed + i, life_loss_ends=False, skip=(low, high))
    pool = envpool.make_gymnasium("Breakout-v5", num_envs=1, seed=seed + i, **options)
    raw, _ = pool.reset()
    np.testing.assert_array_equal(single.reset()[0], first[i])
    shown = skipping.shrink(raw)[0].transpose(1, 2, 0)
    np.testing.assert_array_equal(shown, first[i])
    for t in range(steps):
      before = single.frames
      single.step(actions[t, i : i + 1])
      skip = single.frames - before
      frames += skip
      assert low <= skip <= high
      reward, pictures, ended = 0.0, {}, False
      for frame in range(1, skip + 1):
        raw, r, terminated, _, _ = pool.step(actions[t, i : i + 1])
        reward += r[0]
        pictures[frame] = raw
        ended = bool(terminated[0])
        if ended:
          break
      late = [pictures[f] for f in (skip - 1, skip) if f in pictures]
      if late:
        shown = skipping.shrink(np.max(late, axis=0))[0].transpose(1, 2, 0)
      np.testing.assert_array_equal(played[t].next_observation[i], shown)
      assert played[t].reward[i] == reward
      assert played[t].game_over[i] == played[t].end[i] == ended
      if ended:
        over += 1
        raw, _ = pool.reset()
        shown = skipping.shrink(raw)[0].transpose(1, 2, 0)
      np.testing.assert_array_equal(played[t].observation[i], shown)
  assert batch.frames == frames
  assert over >= 2
  assert sum(s.reward.sum() for s in played) > 0


class CountingPool:
  """Stands in for EnvPool, rows in descending order: a frame is worth 1 and its picture shows its number in the game.

  The game of environment e ends with frame `length[e]`.
  """

  def __init__(self, length):
    self.length = np.array(length)
    self.frame = np.zeros(len(length), np.int64)
    self.calls = []

  def _answer(self, env_id):
    rows = env_id[::-1]
    pictures = np.broadcast_to(self.frame[rows, None, None, None].astype(np.uint8), (len(rows), 3, 210, 160))
    over = self.frame[rows] >= self.length[rows]
    info = {"env_id": rows, "lives": 9 - self.frame[rows].astype(np.int32), "terminated": over.astype(np.int32)}
    return pictures, info | {"reward": np.ones(len(rows), np.float32), "players": {}}

  def reset(self, env_id):
    self.frame[env_id] = 0
    return self._answer(env_id)

  def step(self, action, env_id):
    assert (self.frame[env_id] < self.length[env_id]).all()  # EnvPool would restart the game.
    self.calls.append((action.tolist(), env_id.tolist()))
    self.frame[env_id] += 1
    pictures, info = self._answer(env_id)
    return pictures, None, None, None, info

  def close(self):
    pass


def counting(length, skip, seed=0, limit=10**6):
  inner = CountingPool(length)
  pool = skipping.SkippingPool(inner, num_envs=len(length), seed=seed, skip=skip, max_episode_steps=limit)
  pool.reset(np.arange(len(length), dtype=np.int32))
  return pool, inner


def test_skips_are_uniform_and_independent(monkeypatch):
  monkeypatch.setattr(skipping, "shrink", lambda frames: np.zeros((len(frames), 3, 64, 64), np.uint8))  # Slow.
  n, steps = 2, 3000
  pool, _ = counting([10**9] * n, (2, 6))
  counts, pairs = np.zeros((n, 7), int), np.zeros((7, 7), int)
  for _ in range(steps):
    _, reward, _, _, info = pool.step(np.zeros(n, np.int32))
    np.testing.assert_array_equal(reward, info["frames"])
    counts[np.arange(n), info["frames"]] += 1
    pairs[tuple(info["frames"])] += 1
  assert not counts[:, :2].any()
  # Five values: chi-square with 4 degrees of freedom exceeds 18.5 once in a thousand.
  expected = steps / 5
  assert (((counts[:, 2:] - expected) ** 2 / expected).sum(axis=1) < 18.5).all()
  # Two environments: 24 degrees of freedom, 51.2.
  expected = steps / 25
  assert ((pairs[2:, 2:] - expected) ** 2 / expected).sum() < 51.2


def test_only_environments_with_frames_left_are_stepped():
  pool, inner = counting([10**9] * 4, (1, 5), seed=2)
  skips = pool.step(np.array([10, 11, 12, 13]))[-1]["frames"]
  assert len(set(skips.tolist())) > 1
  for frame, (actions, env_ids) in enumerate(inner.calls, start=1):
    assert env_ids == np.flatnonzero(skips >= frame).tolist()
    assert actions == [10 + e for e in env_ids]


@pytest.mark.parametrize(("length", "pixel"), [(1, 0), (2, 0), (3, 0), (4, 4), (5, 5), (6, 5)])
def test_game_that_ends_within_a_step(length, pixel):
  # Of five frames, the fourth and fifth are pooled. A game that ends before the fourth leaves the last observation.
  pool, _ = counting([length, 10**9], (5, 5))
  pictures, reward, terminated, truncated, info = pool.step(np.zeros(2, np.int32))
  assert [np.unique(p).tolist() for p in pictures] == [[pixel], [5]]
  np.testing.assert_array_equal(reward, [min(length, 5), 5])
  np.testing.assert_array_equal(terminated, [length <= 5, False])
  np.testing.assert_array_equal(info["terminated"], [length <= 5, False])
  np.testing.assert_array_equal(info["lives"], [9 - min(length, 5), 4])
  np.testing.assert_array_equal(info["frames"], [5, 5])
  assert not truncated.any()


def test_limit_restarts_with_the_game():
  pool, _ = counting([10**9] * 2, (1, 3), limit=3)
  flags = []
  for t in range(6):
    flags.append(pool.step(np.zeros(2, np.int32))[3].tolist())
    if t == 1:
      pool.reset(np.array([1], np.int32))
    if t == 2:
      pool.reset(np.array([0], np.int32))
    if t == 4:
      pool.reset(np.array([1], np.int32))
  assert flags == [[False] * 2, [False] * 2, [True, False], [False] * 2, [False, True], [True, False]]


def test_deterministic_for_a_seed():
  n, steps = 2, 60

  def run(seed):
    env = envs.make("atari/Breakout?skip=2-6", num_envs=n, seed=seed, life_loss_ends=True, num_threads=1)
    assert env.frames_per_step == 6
    assert env.frames == 0
    actions = np.repeat(np.random.default_rng(0).integers(4, size=(steps, 1)), n, axis=1)
    observations = np.stack([env.reset(), *(env.step(a).next_observation for a in actions)])
    assert 2 * n * steps < env.frames < 6 * n * steps
    return observations, env.frames

  observations, frames = run(5)
  again, frames_again = run(5)
  np.testing.assert_array_equal(observations, again)
  assert frames == frames_again
  assert (observations[:, 0] != observations[:, 1]).any()
  np.testing.assert_array_equal(run(6)[0][:, 0], observations[:, 1])  # Environment i is seeded with seed + i.


def exact_shrink(image):
  """Means over areas in exact fractions, of one channel [210, 160]; no mean lies halfway between two bytes."""

  def weights(source):
    scale = Fraction(source, 64)
    return [
      {s: min((t + 1) * scale, s + 1) - max(t * scale, s) for s in range(int(t * scale), math.ceil((t + 1) * scale))}
      for t in range(64)
    ]

  rows, columns = weights(210), weights(160)
  area = Fraction(210 * 160, 64 * 64)
  return [
    [round(sum(a * b * int(image[y, x]) for y, a in r.items() for x, b in c.items()) / area) for c in columns]
    for r in rows
  ]


def test_shrink_is_the_exact_mean_over_areas():
  rng = np.random.default_rng(0)
  frames = np.stack([rng.integers(256, size=(3, 210, 160)), rng.choice([0, 255], size=(3, 210, 160))]).astype(np.uint8)
  small = skipping.shrink(frames)
  assert small.shape == (2, 3, 64, 64)
  assert small.dtype == np.uint8
  np.testing.assert_array_equal(small[0, 1], exact_shrink(frames[0, 1]))
  np.testing.assert_array_equal(small[1, 2], exact_shrink(frames[1, 2]))
  for value in (0, 1, 254, 255):
    assert (skipping.shrink(np.full((1, 3, 210, 160), value, np.uint8)) == value).all()


def test_frames_of_fixed_environments():
  for name, per_step in (("catch", 1), ("atari/Pong", 4)):
    env = envs.make(name, num_envs=3, seed=0, life_loss_ends=True)
    env.reset()
    assert env.frames == 0
    for t in range(1, 12):
      env.step(np.zeros(3, np.int64))
      assert env.frames == 3 * per_step * t  # Catch's restart after nine steps costs nothing.


FUNCTIONS = {
  "validate": envs.validate,
  "spec": envs.spec,
  "make": lambda name: envs.make(name, num_envs=1, seed=0, life_loss_ends=True),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(
  ("name", "parts"),
  [
    ("atari/Breakout?skip=6-2", ["skip is 6-2;", "1..60"]),
    ("atari/Breakout?skip=0-3", ["skip is 0-3;", "1..60"]),
    ("atari/Breakout?skip=2-61", ["skip is 2-61;", "1..60"]),
    ("atari/Breakout?skip=a", ["'skip=a'", "'atari/Breakout?skip=2-6'"]),
    ("atari/Breakout?skip=4", ["'skip=4'", "'atari/Breakout?skip=2-6'"]),
    ("atari/Breakout?skip=2-6&foo=1", ["'atari/Breakout?skip=2-6'"]),
    ("atari/Breakout?skip=2-6\n", ["'atari/Breakout?skip=2-6'"]),
    ("atari/Breakout?skip=-2-6", ["'atari/Breakout?skip=2-6'"]),
    ("atari/Breakout?skip=2-" + "9" * 5000, ["'atari/Breakout?skip=2-6'"]),
    ("atari/Breakout?foo=1", ["'foo=1'", "'atari/Breakout?skip=2-6'"]),
    ("atari/Breakout?", ["''", "'atari/Breakout?skip=2-6'"]),
    ("atari/Braekout?skip=2-6", ["unknown environment", "nearest: atari/Breakout"]),
    ("catch?skip=2-6", ["takes no options", "write 'catch'"]),
  ],
)
def test_malformed_names_name_the_fix(function, name, parts):
  with pytest.raises(UserError) as error:
    function(name)
  message = str(error.value)
  assert repr(name) in message
  for part in parts:
    assert part in message
  assert "\n" not in message


@pytest.mark.parametrize("query", ["skip=2-6", "skip=3-3", "skip=1-60"])
def test_wellformed_names(query):
  name = f"atari/MsPacman?{query}"
  envs.validate(name)
  assert envs.spec(name) == envs.spec("atari/MsPacman")
  assert name not in envs.names()
  assert human_normalized_score(name, 100.0) is None  # The published scores are for four frames a step.


def test_invalid_numbers():
  with pytest.raises(UserError, match="max_episode_steps is 0;"):
    envs.make("atari/Pong?skip=2-6", num_envs=1, seed=0, life_loss_ends=True, max_episode_steps=0)
  with pytest.raises(UserError, match="num_envs is 0;"):
    envs.make("atari/Pong?skip=2-6", num_envs=0, seed=0, life_loss_ends=True)
  with pytest.raises(UserError, match="skip is 5-4;"):
    AtariEnv("Pong", num_envs=1, seed=0, life_loss_ends=True, skip=(5, 4))


def test_a_random_frame_skip_is_known_from_an_override_too():
  for config in (
    make_config(env="atari/Breakout?skip=2-6"),
    make_config(overrides={"env.name": "atari/Breakout?skip=2-6"}),
  ):
    assert config.sampler.churn == 1.0
  assert make_config(env="atari/Breakout?skip=2-6", overrides=["env.name=atari/Pong"]).sampler.churn == 0.0
