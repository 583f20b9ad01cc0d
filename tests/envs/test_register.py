"""Environments of users: `register`, `BatchEnv`, and what works without EnvPool."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedi_jax import config, envs
from jedi_jax.envs import registry
from jedi_jax.errors import UserError
from jedi_jax.evaluation import random_policy, run_episodes
from jedi_jax.training.collector import Collector
from jedi_jax.types import EnvSpec, LstmState


class Corridor:
  """A game in 20 lines: walk right to win, left to lose."""

  def reset(self, *, seed=None):
    if seed is not None:
      self.random = np.random.default_rng(seed)
    self.position = int(self.random.integers(1, 7))
    return self.draw(), {}

  def step(self, action):
    self.position += 2 * action - 1
    return self.draw(), float(self.position == 7), self.position in (0, 7), False, {}

  def draw(self):
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, self.position] = 255
    return image


SPEC = EnvSpec(num_actions=2, observation_shape=(8, 8, 3))
OPTIONS = {"num_envs": 2, "seed": 3, "life_loss_ends": True}
make_corridor = functools.partial(envs.BatchEnv, Corridor, SPEC)


@pytest.fixture(autouse=True)
def _restored_registry(monkeypatch):
  monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.fixture
def corridor():
  envs.register("my/corridor", SPEC, make_corridor)
  return "my/corridor"


def positions(observations):
  return observations[:, 0, :, 0].argmax(axis=1).tolist()


def assert_one_line(error, *parts):
  message = str(error.value)
  assert "\n" not in message
  for part in parts:
    assert part in message


def test_a_registered_environment_is_used_like_any_other(corridor):
  assert envs.names()[:2] == ("catch", corridor)
  envs.validate(corridor)
  assert envs.spec(corridor) == SPEC
  assert not envs.is_stochastic(corridor)
  assert config.make_config(env=corridor, preset="debug").env.name == corridor
  with pytest.raises(UserError, match="nearest: my/corridor"):
    envs.validate("my/coridor")
  with pytest.raises(UserError, match="takes no options"):
    envs.validate("my/corridor?skip=2-6")

  env = envs.make(corridor, **OPTIONS, max_episode_steps=50)
  results = run_episodes(env, random_policy(2, seed=0), episodes=40)
  assert len(results) == 40
  assert {result.return_ for result in results} == {0.0, 1.0}
  env.close()


def collector(env_name):
  """A collector whose policy picks actions by the pictures and the call's number."""

  def act(params, observations, state, restart, key, count, epsilon):
    del params, restart, key, epsilon
    return jnp.asarray((observations[:, 0, :, 0].argmax(axis=1) + count) % 3 > 0, jnp.int32), state

  state = LstmState(jnp.zeros((2, 1)), jnp.zeros((2, 1)))
  env = envs.make(env_name, **OPTIONS)
  return Collector(env, act, initial_state=state, seed=0, epsilon=lambda steps: 0.0, max_calls=200)


def test_collection_and_its_repetition(corridor):
  def collect(collector):
    chunks, met = collector.collect(None, [], lambda chunks, chunk: [*chunks, chunk], 100)
    return jax.tree.leaves(chunks), met

  first = collector(corridor)
  _, met = collect(first)
  assert met.steps == 100
  assert met.lengths
  resumed = collector(corridor)
  resumed.restore(first.save())
  expected, expected_met = collect(first)
  got, got_met = collect(resumed)
  jax.tree.map(np.testing.assert_array_equal, got, expected)
  assert got_met == expected_met


def test_batch_keeps_final_frames_and_restarts_at_once():
  env = make_corridor(num_envs=3, seed=3)
  observations = env.reset()
  assert observations.dtype == np.uint8
  singles = [Corridor() for _ in range(3)]
  assert positions(observations) == [positions(game.reset(seed=3 + i)[0][None])[0] for i, game in enumerate(singles)]
  over = 0
  for t, actions in enumerate(np.random.default_rng(0).integers(2, size=(200, 3)), start=1):
    before = observations.copy()
    step = env.step(actions)
    np.testing.assert_array_equal(before, observations)  # Returned arrays are not written to.
    assert positions(step.next_observation) == [p + 2 * a - 1 for p, a in zip(positions(before), actions, strict=True)]
    assert step.end.tolist() == [p in (0, 7) for p in positions(step.next_observation)]
    assert step.reward.dtype == np.float32
    assert step.reward.tolist() == [p == 7 for p in positions(step.next_observation)]
    assert not step.truncated.any()
    np.testing.assert_array_equal(step.game_over, step.end)
    for i, game in enumerate(singles):
      shown = game.step(int(actions[i]))[0]
      if step.end[i]:
        shown, _ = game.reset()
        over += 1
      np.testing.assert_array_equal(step.observation[i], shown)
    observations = step.observation
    assert env.frames == 3 * t
  assert over > 5


class Endless:
  """Counts its steps; terminated at 6, truncated at 4 on request, and closed once."""

  closed = 0

  def __init__(self, stops_at=None):
    self.stops_at = stops_at
    self.image = np.zeros((1, 1, 1), np.uint8)  # The same array in every step.

  def reset(self, *, seed=None):
    self.image[:] = 0
    return self.image, {}

  def step(self, action):
    self.image += 1
    t = int(self.image[0, 0, 0])
    return self.image, 0.0, t == 6, t == self.stops_at, {}

  def close(self):
    Endless.closed += 1


@pytest.mark.parametrize(
  ("limit", "stops_at", "length", "truncates"),
  [(None, None, 6, False), (5, None, 5, True), (6, None, 6, False), (9, 4, 4, True), (3, 4, 3, True)],
)
def test_batch_counts_time_limits(limit, stops_at, length, truncates):
  spec = EnvSpec(1, (1, 1, 1))
  env = envs.BatchEnv(lambda: Endless(stops_at), spec, num_envs=2, seed=0, max_episode_steps=limit)
  env.reset()
  for t in range(1, 3 * length + 1):
    step = env.step(np.zeros(2, np.int32))
    over = t % length == 0
    assert step.game_over.tolist() == [over] * 2
    assert step.truncated.tolist() == [over and truncates] * 2
    assert step.end.tolist() == [over and not truncates] * 2  # Terminated on the last allowed step is an end.
    assert step.next_observation.ravel().tolist() == [length if over else t % length] * 2
    assert step.observation.ravel().tolist() == [t % length] * 2
  closed = Endless.closed
  env.close()
  assert Endless.closed == closed + 2


@pytest.mark.parametrize(("field", "value"), [("num_envs", 0), ("seed", -1), ("max_episode_steps", 0)])
def test_batch_refuses_numbers_out_of_range(corridor, field, value):
  with pytest.raises(UserError, match=rf"{field} is {value};"):
    envs.make(corridor, **(OPTIONS | {field: value}))


@pytest.mark.parametrize(
  "name",
  ["", " ", "my env", "my/env?skip=2-6", "my//env", "/env", "env/", "..", "a,b", "a=b", "a\nb", "a\n", "é", None],
)
def test_malformed_names_are_refused(name):
  with pytest.raises(UserError) as error:
    envs.register(name, SPEC, make_corridor)
  assert_one_line(error, repr(name), "letters")


def test_names_that_are_taken_are_refused(corridor):
  for name in (corridor, "catch"):
    with pytest.raises(UserError) as error:
      envs.register(name, SPEC, make_corridor)
    assert_one_line(error, repr(name), "registered already", "replace=True")
  for replace in (False, True):
    with pytest.raises(UserError) as error:
      envs.register("atari/Corridor", SPEC, make_corridor, replace=replace)
    assert_one_line(error, "'atari/'", "choose another")
  other = EnvSpec(3, (8, 8, 1))
  envs.register(corridor, other, make_corridor, replace=True)
  assert envs.spec(corridor) == other


@pytest.mark.parametrize(
  "spec",
  [
    None,
    3,
    (2, (8, 8)),
    (0, (8, 8, 3)),
    (2, (8, 0, 3)),
    (2, (8, 8, 3, 1)),
    (2.0, (8, 8, 3)),
    (2, 8),
    (2, "abc"),
    (2, (8, 8, 3), 1),
  ],
)
def test_impossible_specs_are_refused(spec):
  with pytest.raises(UserError) as error:
    envs.register("my/env", spec, make_corridor)
  assert_one_line(error, "'my/env'", repr(spec), "EnvSpec(num_actions, (height, width, channels))")
  envs.register("my/env", lambda: spec, make_corridor)
  with pytest.raises(UserError) as error:
    envs.spec("my/env")
  assert_one_line(error, repr(spec))


def test_a_spec_may_be_a_function_which_is_called_once_and_late():
  calls = []

  def spec():
    calls.append(1)
    return EnvSpec(np.int64(2), (8, np.int32(8), 3))

  envs.register("my/env", spec, make_corridor)
  envs.validate("my/env")
  assert not calls
  assert envs.spec("my/env") == envs.spec("my/env") == SPEC
  assert type(envs.spec("my/env").num_actions) is int  # As JSON takes it.
  assert calls == [1]
  assert envs.make("my/env", **OPTIONS).num_envs == 2


@pytest.mark.parametrize("make", [lambda num_envs, seed: None, lambda: None, 3, lambda a, **options: None])
def test_makers_of_other_arguments_are_refused(make):
  with pytest.raises(UserError) as error:
    envs.register("my/env", SPEC, make)
  assert_one_line(error, "'my/env'", "make(*, num_envs, seed, **options)")


@pytest.mark.parametrize(
  ("make", "part"),
  [
    (lambda **options: None, "NoneType without num_envs, spec, frames, reset, step, close"),
    (lambda **options: make_corridor(**(options | {"num_envs": 5})), "num_envs 5, not 2"),
    (lambda **options: envs.CatchEnv(num_envs=2, seed=0), "not EnvSpec(num_actions=2, observation_shape=(8, 8, 3))"),
  ],
)
def test_made_environments_must_be_as_registered(make, part):
  envs.register("my/env", SPEC, make)
  with pytest.raises(UserError) as error:
    envs.make("my/env", **OPTIONS)
  assert_one_line(error, "'my/env'", part)


PROGRAM = """
import sys
import jedi_jax.envs
assert not {"envpool", "gymnax"} & set(sys.modules)
sys.modules["envpool"] = None  # Importing it fails from here on.
from jedi_jax import config, envs
from jedi_jax.errors import UserError

envs.register("my/env", (2, (8, 8, 3)), lambda **options: None)
assert envs.names()[:2] == ("catch", "my/env")
assert not any(name.startswith("atari/") for name in envs.names())
assert envs.spec("catch").num_actions == 3
for name in ("catch", "atari/Pong"):  # A run of Atari can be read without EnvPool.
  assert config.make_config(env=name, preset="debug").env.name == name
for attempt in (
  lambda: envs.make("catch", num_envs=1, seed=0, life_loss_ends=True),
  lambda: envs.AtariEnv("Pong", num_envs=1, seed=0, life_loss_ends=True),
  lambda: envs.spec("atari/Pong"),
):
  try:
    attempt()
  except UserError as error:
    assert "pip install envpool" in str(error) and "\\n" not in str(error), error
  else:
    raise AssertionError
try:
  envs.validate("my/evn")
except UserError as error:
  assert "nearest: my/env" in str(error), error
"""


def test_without_envpool_all_else_works_and_the_cure_is_named():
  subprocess.run([sys.executable, "-c", PROGRAM], check=True)
