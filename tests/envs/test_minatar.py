"""The MinAtar games of gymnax."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from refusals import refused

from jedi_jax import config as config_lib
from jedi_jax import envs
from jedi_jax.envs import gymnax as gymnax_lib
from jedi_jax.envs.gymnax import MINATAR
from jedi_jax.models.build import build
from jedi_jax.types import EnvSpec

GAMES = list(MINATAR)


@pytest.fixture
def gymnax():
  return pytest.importorskip("gymnax")


def play(name, actions, *, seed=0, **options):
  """Plays actions [T, N]; returns the first observations and the steps."""
  env = envs.make(name, num_envs=actions.shape[1], seed=seed, **options)
  return env.reset(), [env.step(row) for row in actions]


def draw(game, steps, num_envs, seed=0):
  return np.random.default_rng(seed).integers(MINATAR[game].num_actions, size=(steps, num_envs))


def column(steps, env):
  """All fields of the steps of one environment, each stacked over time."""
  return [np.stack([getattr(step, field)[env] for step in steps]) for field in steps[0]._fields]


@pytest.mark.parametrize("game", GAMES)
def test_a_spec_is_gymnaxs(gymnax, game):
  env = getattr(gymnax.environments, f"Min{game}")()
  assert envs.spec(f"minatar/{game}") == (env.num_actions, env.obs_shape)


@pytest.mark.parametrize("game", GAMES)
def test_games_are_those_of_gymnaxs_own_step(gymnax, game):
  env = getattr(gymnax.environments, f"Min{game}")()
  limit = 40
  params = env.default_params.replace(max_steps_in_episode=limit)
  actions = draw(game, 100, 2)
  first, steps = play(f"minatar/{game}", actions, seed=7, max_episode_steps=limit)

  key, key_reset = jax.random.split(jax.random.key(8))
  observation, state = env.reset(key_reset, params)
  np.testing.assert_array_equal(first[1], 255 * np.asarray(observation, np.uint8))
  ended = 0
  for step, row in zip(steps, actions, strict=True):
    key, key_game, _ = jax.random.split(key, 3)
    observation, state, reward, end, stopped, info = env.step(key_game, state, row[1], params)
    np.testing.assert_array_equal(step.observation[1], 255 * np.asarray(observation, np.uint8))
    np.testing.assert_array_equal(step.next_observation[1], 255 * np.asarray(info["final_observation"], np.uint8))
    assert step.reward[1] == reward
    assert step.end[1] == end
    assert step.truncated[1] == (stopped and not end)
    assert step.game_over[1] == (stopped or end)
    ended += int(step.game_over[1])
  assert ended >= 2


def test_a_game_depends_on_its_seed_and_actions_only(gymnax):
  actions = draw("SpaceInvaders", 150, 3)
  first, steps = play("minatar/SpaceInvaders?sticky=0.1", actions, seed=5)
  for env in range(3):
    alone, same = play("minatar/SpaceInvaders?sticky=0.1", actions[:, env : env + 1], seed=5 + env)
    np.testing.assert_array_equal(alone[0], first[env])
    for found, expected in zip(column(same, 0), column(steps, env), strict=True):
      np.testing.assert_array_equal(found, expected)
  assert any(step.game_over.any() for step in steps)


def test_observations_are_binary_bytes(gymnax):
  first, steps = play("minatar/Seaquest", draw("Seaquest", 30, 2))
  for images in (first, *(step.next_observation for step in steps), *(step.observation for step in steps)):
    assert images.dtype == np.uint8
    assert images.shape == (2, 10, 10, 10)
    assert set(np.unique(images)) == {0, 255}
  assert steps[0].reward.dtype == np.float32


def test_a_finished_game_restarts_within_the_step(gymnax):
  env = envs.make("minatar/Breakout", num_envs=4, seed=0)
  env.reset()
  # Without a move the ball is lost. A new game begins with the ball at one side of the fourth row.
  step = next(step for _ in range(100) if (step := env.step(np.zeros(4, np.int64))).end.any())
  assert not step.truncated.any()
  np.testing.assert_array_equal(step.game_over, step.end)
  for env_id in range(4):
    ball = np.argwhere(step.observation[env_id, :, :, 1])
    if step.end[env_id]:
      assert ball.tolist() in ([[3, 0]], [[3, 9]])
      assert np.argwhere(step.next_observation[env_id, :, :, 1])[0, 0] == 9
    else:
      np.testing.assert_array_equal(step.observation[env_id], step.next_observation[env_id])


def test_the_time_limit_truncates(gymnax):
  env = envs.make("minatar/Freeway", num_envs=2, seed=0, max_episode_steps=3)
  env.reset()
  steps = [env.step(np.zeros(2, np.int64)) for _ in range(7)]
  assert [step.truncated.all() for step in steps] == [False, False, True, False, False, True, False]
  assert not any(step.end.any() for step in steps)
  assert env.frames == 14


@pytest.mark.parametrize("limit", [None, 27_000])  # The default of evaluations does not prolong a game.
def test_freeway_ends_by_gymnaxs_limit(gymnax, limit):
  env = envs.make("minatar/Freeway", num_envs=1, seed=0, max_episode_steps=limit)
  env.reset()
  assert next(t for t in range(1, 3000) if env.step(np.ones(1, np.int64)).truncated[0]) == 2500


@pytest.mark.parametrize("probability", [0.1, 0.4])
def test_an_action_is_sticky_with_its_probability(gymnax, probability):
  _, steps = play(f"minatar/Breakout?sticky={probability}", np.repeat([[1], [2]], 2_000, axis=1))
  first, second = (step.next_observation[:, 9, :, 0].argmax(axis=1) for step in steps)
  # Before the first action of a game there was the no-op: the paddle stays at 4 instead of moving to the left.
  assert set(first) == {3, 4}
  assert abs(np.mean(first == 4) - probability) < 0.03
  # The second action, to the right, is replaced by what the first step did, whatever was given there.
  assert set((first - 4) * 10 + second - first) == {1, -10 + 1, 0, -10 - 1}
  assert abs(np.mean(second - first != 1) - probability) < 0.03


def test_sticky_0_is_plain(gymnax):
  actions = draw("Asterix", 60, 2)
  for found, expected in zip(
    play("minatar/Asterix?sticky=0", actions)[1], play("minatar/Asterix", actions)[1], strict=True
  ):
    for a, b in zip(found, expected, strict=True):
      np.testing.assert_array_equal(a, b)


def test_no_game_repeats_the_last_action_of_the_game_before(gymnax):
  env = envs.make("minatar/Breakout?sticky=0.999999", num_envs=1, seed=0, max_episode_steps=2)
  env.reset()
  for _ in range(20):  # Every action is replaced by the no-op at the start of its game.
    assert env.step(np.full(1, 2)).next_observation[0, 9, :, 0].argmax() == 4


def test_games_stay_on_the_first_cpu_device(gymnax):
  with jax.default_device(jax.devices("cpu")[1]):
    env = envs.make("minatar/Breakout", num_envs=2, seed=0)
    env.reset()
    env.step(np.zeros(2, np.int64))
  assert {leaf.device for leaf in jax.tree.leaves(env._running)} == {jax.devices("cpu")[0]}


def test_environments_share_one_program(gymnax):
  first, second = (
    envs.make(f"minatar/Breakout?sticky=0.{n}", num_envs=5, seed=n, max_episode_steps=10 + n) for n in (1, 2)
  )
  first.reset()
  first.step(np.zeros(5, np.int64))
  compiled = first._programs.step._cache_size()
  for env in (first, second, second):
    env.reset()
    env.step(np.zeros(5, np.int64))
  assert second._programs is first._programs
  assert second._programs.step._cache_size() == compiled


@pytest.mark.parametrize(
  ("name", "parts"),
  [
    ("minatar/breakout", ["unknown environment", "nearest: ", "minatar/Breakout"]),
    ("minatar/SpaceInvader", ["unknown environment", "nearest: ", "minatar/SpaceInvaders"]),
    ("minatar/", ["unknown environment"]),
    ("minatar/Pong", ["unknown environment"]),
    ("minatar/Breakout?skip=2-6", ["'skip=2-6'", "'minatar/Breakout?sticky=0.1'"]),
    ("minatar/Breakout?sticky=1", ["'sticky=1'", "[0, 1)", "'minatar/Breakout?sticky=0.1'"]),
    ("minatar/Breakout?sticky=-0.1", ["[0, 1)"]),
    ("minatar/Breakout?sticky=nan", ["[0, 1)"]),
    ("minatar/Breakout?sticky=0.1\n", ["[0, 1)"]),
    ("minatar/Breakout?", ["''", "'minatar/Breakout?sticky=0.1'"]),
    ("atari/Breakout?sticky=0.1", ["'atari/Breakout?skip=2-6'"]),
  ],
)
def test_malformed_names_name_the_fix(name, parts):
  for function in (envs.validate, envs.spec, envs.check_installed):
    refused(lambda function=function: function(name), repr(name), *parts)


@pytest.mark.parametrize(("field", "value"), [("num_envs", 0), ("seed", -1), ("max_episode_steps", 0)])
def test_numbers_out_of_range_name_the_field(field, value):
  arguments = {"num_envs": 2, "seed": 0} | {field: value}
  refused(lambda: envs.make("minatar/Breakout", **arguments), f"{field} is {value};")


def test_names_of_minatar_are_gymnaxs():
  refused(lambda: envs.register("minatar/Mine", MINATAR["Breakout"], lambda **options: None), "gymnax's")


@pytest.mark.parametrize("action", [3, -1])
def test_actions_out_of_range(gymnax, action):
  env = envs.make("minatar/Breakout", num_envs=1, seed=0)
  env.reset()
  refused(lambda: env.step(np.array([action])), f"action {action} of environment 0")


def test_a_frame_skip_is_random_and_a_sticky_action_is_not():
  assert not envs.is_stochastic("minatar/Breakout?sticky=0.1")
  plain, sticky = (config_lib.make_config(env=f"minatar/Breakout{o}", preset="debug") for o in ("", "?sticky=0.1"))
  assert plain.sampler == sticky.sampler


PROGRAM = """
import sys
sys.modules["gymnax"] = None  # Importing it fails.
from jedi_jax import config, envs
from jedi_jax.errors import UserError

name = "minatar/Breakout?sticky=0.1"
assert config.make_config(env=name, preset="debug").env.name == name
assert envs.spec(name) == (3, (10, 10, 4))
other = "gymnax/Pong-misc"
envs.validate(other)
attempts = (
  lambda: envs.check_installed(name), lambda: envs.make(name, num_envs=1, seed=0),
  lambda: envs.check_installed(other), lambda: envs.spec(other), lambda: envs.make(other, num_envs=1, seed=0),
)
for attempt in attempts:
  try:
    attempt()
  except UserError as error:
    assert "pip install gymnax six" in str(error) and "\\n" not in str(error), error
  else:
    raise AssertionError
"""


def test_without_gymnax_the_cure_is_named():
  subprocess.run([sys.executable, "-c", PROGRAM], check=True)


@pytest.mark.parametrize(
  ("shape", "overrides", "parts"),
  [
    ((10, 10, 17), (), ["minatar/Breakout have 17 channels", "at most 16"]),
    (
      (10, 10, 4),
      ("encoder.channels=4,4,4,4", "encoder.downsample=true,true,true,true"),
      ["encoder.downsample halves 10 x 10 4 times", "halve less often"],
    ),
  ],
)
def test_observations_that_do_not_fit_the_model(shape, overrides, parts):
  config = config_lib.make_config(env="minatar/Breakout", preset="debug", overrides=overrides)
  refused(lambda: build(config, EnvSpec(3, shape)), *parts)


def test_without_a_cpu_backend_the_cure_is_named(monkeypatch):
  def local_devices(*, backend):
    raise RuntimeError(f"Unknown backend {backend}")

  monkeypatch.setattr(jax, "local_devices", local_devices)
  refused(gymnax_lib._cpu, "JAX_PLATFORMS", "add cpu")
