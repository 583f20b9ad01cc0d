"""Environments of gymnax beside the MinAtar games, which test_minatar.py has."""

import functools
import urllib.error

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

from jedi_jax import envs
from jedi_jax.play import controls

gymnax = pytest.importorskip("gymnax")

SPECS = {
  "Catch-bsuite": (3, (60, 30, 1)),
  "DeepSea-bsuite": (2, (24, 24, 1)),
  "Pong-misc": (3, (30, 40, 3)),
  "Breakout-MinAtar": (3, (30, 30, 4)),
}


@pytest.fixture
def registered(monkeypatch):
  """Returns gymnax.register, for one test."""
  monkeypatch.setattr(gymnax.registration, "_registry", dict(gymnax.registration._registry))
  monkeypatch.setattr(gymnax, "registered_envs", gymnax.registered_envs.copy())
  monkeypatch.setattr(gymnax.registration, "registered_envs", gymnax.registered_envs)
  return gymnax.registration.register


def play(name, actions, **options):
  env = envs.make(name, num_envs=actions.shape[1], **({"seed": 0} | options))
  return env.reset(), [env.step(row) for row in actions]


@pytest.mark.parametrize(("env_id", "spec"), SPECS.items())
def test_specs(env_id, spec):
  assert envs.spec(f"gymnax/{env_id}") == spec
  height, width, channels = spec[1]
  scale = height // gymnax.make(env_id)[0].reset(jax.random.key(0))[0].shape[0]
  assert envs.spec(f"gymnax/{env_id}?scale={2 * scale}") == (spec[0], (2 * height, 2 * width, channels))
  envs.check_installed(f"gymnax/{env_id}")


# Pong's space reaches to 2 although its values do not.
@pytest.mark.parametrize(
  ("env_id", "limit", "one"), [("Catch-bsuite", 4, 255), ("DeepSea-bsuite", None, 255), ("Pong-misc", 30, 128)]
)
def test_games_are_those_of_gymnaxs_own_step(env_id, limit, one):
  env, params = gymnax.make(env_id)
  actions = np.random.default_rng(0).integers(env.num_actions, size=(70, 2))
  first, steps = play(f"gymnax/{env_id}?scale=1", actions, seed=7, max_episode_steps=limit)
  if limit is not None:
    params = params.replace(max_steps_in_episode=limit)

  def image(observation):
    return (one * np.asarray(observation)).astype(np.uint8).reshape(first.shape[1:])

  key, key_reset = jax.random.split(jax.random.key(8))
  observation, state = env.reset(key_reset, params)
  np.testing.assert_array_equal(first[1], image(observation))
  over = 0
  for step, row in zip(steps, actions, strict=True):
    key, key_game, _ = jax.random.split(key, 3)
    observation, state, reward, end, stopped, info = env.step(key_game, state, row[1], params)
    np.testing.assert_array_equal(step.observation[1], image(observation))
    np.testing.assert_array_equal(step.next_observation[1], image(info["final_observation"]))
    assert (step.reward[1], step.end[1], step.truncated[1]) == (reward, end, stopped and not end)
    assert step.reward.dtype == np.float32
    assert step.game_over[1] == (stopped or end)
    over += int(step.game_over[1])
  assert over >= 2


def test_images_are_scaled_by_whole_pixels():
  actions = np.random.default_rng(0).integers(3, size=(12, 2))
  (plain, steps), (large, scaled) = (play(f"gymnax/Catch-bsuite?scale={n}", actions) for n in (1, 6))
  assert plain.shape == (2, 10, 5, 1)
  assert set(np.unique(plain)) == {0, 255}
  for a, b in [(plain, large), *((s.next_observation, t.next_observation) for s, t in zip(steps, scaled, strict=True))]:
    np.testing.assert_array_equal(np.kron(a, np.ones((1, 6, 6, 1), np.uint8)), b)


def test_minatar_is_also_here_with_larger_images():
  actions = np.random.default_rng(0).integers(3, size=(12, 2))
  names = "minatar/Breakout?sticky=0.3", "gymnax/Breakout-MinAtar?sticky=0.3&scale=1"
  for a, b in zip(*(play(name, actions)[1] for name in names), strict=True):
    for x, y in zip(a, b, strict=True):
      np.testing.assert_array_equal(x, y)


def test_an_action_is_sticky_with_its_probability():
  _, steps = play("gymnax/Catch-bsuite?scale=1&sticky=0.4", np.full((1, 2_000), 2))
  columns = steps[0].next_observation[:, 9, :, 0].argmax(axis=1)
  assert set(columns) == {1, 3}  # Action 0 in place of action 2.
  assert abs(np.mean(columns == 1) - 0.4) < 0.04


def test_a_registered_environment_is_scaled_by_its_bounds(registered):
  class Grey(gymnax.environments.environment.Environment):
    """Shows 0, 1, 2, ... to 8 of a space from -2 to 6; has no end but its time limit of three steps."""

    @property
    def default_params(self):
      return gymnax.environments.environment.EnvParams(max_steps_in_episode=3)

    def get(self, state):
      return state.time * jnp.array([[-4, -2, -1], [0, 1, 2]], jnp.int32)

    def step_env(self, key, state, action, params):
      state = state.replace(time=state.time + 1)
      return self.get(state), state, 1, jnp.array(False), {}

    def reset_env(self, key, params):
      state = gymnax.environments.environment.EnvState(time=0)
      return self.get(state), state

    def action_space(self, params):
      return gymnax.environments.spaces.Discrete(2)

    def observation_space(self, params):
      return gymnax.environments.spaces.Box(-2, 2, (2, 3), jnp.int32)

  registered("Grey-mine", Grey)
  assert envs.spec("gymnax/Grey-mine") == (2, (24, 36, 1))
  first, steps = play("gymnax/Grey-mine?scale=1", np.zeros((4, 1), int))
  assert (first == 128).all()
  np.testing.assert_array_equal(steps[0].observation[0, :, :, 0], [[0, 0, 64], [128, 191, 255]])
  assert [(step.truncated[0], step.end[0], step.game_over[0]) for step in steps] == [
    (False, False, False), (False, False, False), (True, False, True), (False, False, False),
  ]  # fmt: skip
  np.testing.assert_array_equal(steps[2].next_observation[0, :, :, 0], [[0, 0, 0], [128, 255, 255]])
  assert (steps[2].observation == 128).all()


def test_four_rooms_is_an_image_where_its_maker_draws_it(registered):
  refused(lambda: envs.spec("gymnax/FourRooms-misc"), "no images but have the shape (4,)")
  registered("FourRooms-drawn", functools.partial(gymnax.registration._registry["FourRooms-misc"], use_visual_obs=True))
  assert envs.spec("gymnax/FourRooms-drawn") == (4, (26, 26, 2))


@pytest.mark.parametrize(
  ("name", "parts"),
  [
    ("gymnax/catch-bsuite", ["unknown environment", "nearest: gymnax/Catch-bsuite", "--import=my_package"]),
    ("gymnax/Pong", ["unknown environment", "nearest: gymnax/Pong-misc"]),
    ("gymnax/", ["unknown environment"]),
    ("gymnax/Pong-misc?scale=0", ["'scale=0'", "'gymnax/Pong-misc?scale=4&sticky=0.1'"]),
    ("gymnax/Pong-misc?scale=100", ["'scale=100'", "1..99"]),
    ("gymnax/Pong-misc?scale=2&scale=3", ["'scale=3'"]),
    ("gymnax/Pong-misc?sticky=1", ["'sticky=1'", "[0, 1)"]),
    ("gymnax/Pong-misc?size=64", ["'size=64'"]),
  ],
)
def test_malformed_names_name_the_fix(name, parts):
  for function in (envs.validate, envs.spec, envs.check_installed):
    refused(lambda function=function: function(name), repr(name), *parts)


@pytest.mark.parametrize(
  ("env_id", "parts"),
  [
    ("CartPole-v1", ["no images", "(4,)", "(height, width)"]),
    ("FrozenLake-misc", ["no images", "()"]),
    ("SimpleBandit-bsuite", ["no images", "(1, 1)"]),
    ("Pendulum-v1", ["actions are not discrete", "Discrete(n)"]),
  ],
)
def test_what_is_no_game_of_images_and_actions_is_refused(env_id, parts):
  for function in (envs.spec, lambda name: envs.make(name, num_envs=1, seed=0)):
    refused(lambda function=function: function(f"gymnax/{env_id}"), f"environment gymnax/{env_id}", *parts)


def test_what_cannot_be_made_is_said_in_a_line(registered):
  def make():
    raise urllib.error.URLError("no\nnetwork")

  registered("Far-mine", make)
  refused(lambda: envs.spec("gymnax/Far-mine"), "environment gymnax/Far-mine cannot be made: ", "no", "network")


def test_keys_of_the_page():
  assert controls.action_names("gymnax/Catch-bsuite?scale=2", 3) == ("left", "noop", "right")
  assert controls.action_names("gymnax/Pong-misc", 3) == ("noop", "up", "down")
  assert controls.action_names("gymnax/Breakout-MinAtar", 3) == ("noop", "left", "right")
