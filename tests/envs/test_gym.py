"""Environments of Gymnasium: frames, ends, truncations and seeds of hand-written ones, images, and mistakes."""

import gymnasium
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from refusals import refused

from jedi_jax import config as config_lib
from jedi_jax import envs
from jedi_jax.training.collector import Collector
from jedi_jax.types import EnvSpec, LstmState

SHAPE = (4, 6, 3)


class Counter(gymnasium.Env):
  """Pictures (game, step, action): the game ends at step `end` and truncates itself at step `stop`.

  Step t gives reward t. One array holds every picture, as in environments that save memory.
  """

  def __init__(self, end=5, stop=None, space=None, first_action=0, repeats=True):
    self.observation_space = space or spaces.Box(0, 255, SHAPE, np.uint8)
    self.action_space = spaces.Discrete(3, start=first_action)
    self.end, self.stop, self.repeats = end, stop, repeats
    self.image = np.zeros(self.observation_space.shape, self.observation_space.dtype)
    self.closed = False

  def reset(self, *, seed=None, options=None):
    super().reset(seed=seed)
    self.game = int(self.np_random.integers(256)) if self.repeats else int(np.random.default_rng().integers(256))
    self.t = 0
    return self.draw(0), {}

  def step(self, action):
    assert self.action_space.contains(action)
    self.t += 1
    return self.draw(action), float(self.t), self.t == self.end, self.t == self.stop, {"t": self.t}

  def draw(self, action):
    self.image[:] = [self.game, self.t, action]
    return self.image

  def close(self):
    self.closed = True


@pytest.fixture
def register(monkeypatch):
  """Registers an environment with Gymnasium for one test; returns its name."""
  monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
  monkeypatch.setattr(gymnasium, "registry", gymnasium.envs.registration.registry)
  envs.gym.game_spec.cache_clear()

  def add(make=Counter, name="test/Counter-v0", **options):
    gymnasium.register(name, make, **options)
    return f"gym/{name}"

  yield add
  envs.gym.game_spec.cache_clear()


def first_games(seed, count):
  """The numbers of the first games of an environment that is seeded once."""
  random = gymnasium.utils.seeding.np_random(seed)[0]
  return [int(random.integers(256)) for _ in range(count)]


@pytest.mark.parametrize(
  ("end", "stop", "registered", "limit", "length", "truncates"),
  [
    (5, None, None, None, 5, False),
    (5, 3, None, None, 3, True),
    (9, None, 4, None, 4, True),
    (9, None, 7, 4, 4, True),  # Our limit lowers the registered one, and
    (9, None, 4, 7, 4, True),  # never raises it.
    (9, None, None, 4, 4, True),
    (4, None, 4, None, 4, False),  # Terminated on the last allowed step is an end.
    (4, 4, None, None, 4, False),
    (1, None, None, None, 1, False),
  ],
)
def test_frames_ends_and_truncations_are_exact(register, end, stop, registered, limit, length, truncates):
  name = register(kwargs={"end": end, "stop": stop}, max_episode_steps=registered)
  env = envs.make(name, num_envs=2, seed=7, max_episode_steps=limit)
  games = [first_games(7 + i, 20) for i in range(2)]
  before = env.reset()
  assert before.dtype == np.uint8
  assert before[:, 0, 0].tolist() == [[games[i][0], 0, 0] for i in range(2)]
  for step_number in range(3 * length):
    game, t = divmod(step_number, length)
    kept = before.copy()
    step = env.step(np.array([1, 2]))
    np.testing.assert_array_equal(before, kept)  # Returned arrays are not written to.
    over = t + 1 == length
    assert step.next_observation.shape == (2, *SHAPE)
    assert step.next_observation[:, 3, 5].tolist() == [[games[i][game], t + 1, i + 1] for i in range(2)]
    after = [[games[i][game + 1], 0, 0] for i in range(2)] if over else step.next_observation[:, 3, 5].tolist()
    assert step.observation[:, 3, 5].tolist() == after
    assert step.reward.dtype == np.float32
    assert step.reward.tolist() == [t + 1] * 2
    assert step.end.tolist() == [over and not truncates] * 2
    assert step.truncated.tolist() == [over and truncates] * 2
    assert step.game_over.tolist() == [over] * 2
    before = step.observation
  assert env.frames == 2 * 3 * length
  env.close()


def test_a_game_ends_alone(register):
  name = register(lambda: Counter(end=made.pop()))
  made = [3, 5, 5]  # The last one gives the spec.
  assert envs.spec(name) == EnvSpec(3, SHAPE)
  env = envs.make(name, num_envs=2, seed=0)
  env.reset()
  steps = [env.step(np.zeros(2, np.int32)) for _ in range(15)]
  assert [step.game_over.tolist() for step in steps] == [[t % 5 == 0, t % 3 == 0] for t in range(1, 16)]
  assert [step.observation[:, 0, 0, 1].tolist() for step in steps] == [[t % 5, t % 3] for t in range(1, 16)]


def test_environment_i_is_seeded_by_seed_plus_i(register):
  name = register()
  together = envs.make(name, num_envs=3, seed=10).reset()
  alone = [envs.make(name, num_envs=1, seed=10 + i).reset() for i in range(3)]
  np.testing.assert_array_equal(together, np.concatenate(alone))


def test_a_second_reset_begins_other_games(register):
  env = envs.make(register(), num_envs=1, seed=4)
  assert [int(env.reset()[0, 0, 0, 0]) for _ in range(3)] == first_games(4, 3)


def test_actions_count_from_zero(register):
  env = envs.make(register(kwargs={"first_action": -1}), num_envs=3, seed=0)
  env.reset()
  step = env.step(np.array([0, 1, 2]))
  assert step.observation[:, 0, 0, 2].tolist() == [255, 0, 1]  # -1 in uint8, 0 and 1.
  refused(lambda: env.step(np.array([0, 1, 3])), "action 3 of environment 2 must lie in 0..2")


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 2)])
@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_grey_and_bool_observations(register, shape, dtype):
  class Board(Counter):
    def draw(self, action):
      self.image[:] = 0
      self.image[1, 2] = 1
      return self.image

  high = 1 if dtype is bool else 255
  name = register(Board, kwargs={"space": spaces.Box(0, high, shape, dtype)})
  channels = shape[2] if len(shape) == 3 else 1
  assert envs.spec(name).observation_shape == (4, 6, channels)
  image = envs.make(name, num_envs=1, seed=0).reset()
  assert image.dtype == np.uint8
  expected = np.zeros((1, 4, 6, channels), np.uint8)
  expected[0, 1, 2] = 255 if dtype is bool else 1
  np.testing.assert_array_equal(image, expected)


class Picture(Counter):
  """A fixed picture of 8 x 12 pixels."""

  pixels = np.random.default_rng(0).integers(256, size=(8, 12, 3), dtype=np.uint8)

  def draw(self, action):
    return self.pixels


@pytest.mark.parametrize(
  ("query", "expected"),
  [
    ("?size=8x12", Picture.pixels),
    ("?crop=2-6x0-4", Picture.pixels[2:6, :4]),
    ("?crop=0-8x0-12", Picture.pixels),
    ("?size=4x6", Picture.pixels.reshape(4, 2, 6, 2, 3).mean(axis=(1, 3))),
    ("?crop=0-8x4-12&size=4", Picture.pixels[:, 4:].reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))),
    ("?size=2&crop=2-6x0-4", Picture.pixels[2:6, :4].reshape(2, 2, 2, 2, 3).mean(axis=(1, 3))),
    ("?size=16x24", Picture.pixels.repeat(2, 0).repeat(2, 1)),
  ],
)
def test_images_are_cropped_and_resized_by_area(register, query, expected):
  name = register(Picture, kwargs={"space": spaces.Box(0, 255, (8, 12, 3), np.uint8)}) + query
  assert envs.spec(name).observation_shape == expected.shape
  env = envs.make(name, num_envs=2, seed=0)
  for images in (env.reset(), env.step(np.zeros(2, np.int32)).next_observation):
    assert np.abs(images - expected[None].astype(float)).max() <= 1  # Pillow rounds after rows and after columns.


@pytest.mark.parametrize(
  ("query", "part"),
  [
    ("", "'' is no crop"),
    ("size=0", "'size=0' is no crop"),
    ("size=64x", "write it like"),
    ("size=64&size=32", "'size=32' is no crop"),
    ("size=64,crop=1", "is no crop"),
    ("crop=0-4", "'crop=0-4' is no crop (rows x columns) or size"),
    ("scale=2", "'gym/test/Counter-v0?crop=34-194x0-160&size=64'"),
    ("crop=0-5x0-6", "crop=0-5x0-6 is empty or not within 4 rows x 6 columns"),
    ("crop=2-2x0-6", "is empty"),
  ],
)
def test_wrong_options_are_refused(register, query, part):
  name = f"{register()}?{query}"
  refused(lambda: envs.spec(name), "gym/test/Counter-v0", part)
  refused(lambda: envs.make(name, num_envs=1, seed=0), part)


def test_unknown_ids_suggest_the_nearest(register):
  name = register()
  for wrong in ("gym/test/Conter-v0", "gym/test/Counter", "gym/test/counter-v0", "gym/test/Counter-v1"):
    refused(lambda wrong=wrong: envs.validate(wrong), repr(wrong), f"nearest: {name}", "--import=my_package")
  refused(lambda: envs.validate("gym/"), "unknown environment 'gym/'")
  refused(lambda: config_lib.make_config(env="gym/test/Conter-v0", preset="debug"), "nearest: gym/test/Counter-v0")
  refused(lambda: envs.register("gym/mine", EnvSpec(2, (8, 8, 3)), print), "Gymnasium's; choose another")


@pytest.mark.parametrize(
  ("space", "text"),
  [
    (spaces.Box(-1, 1, (3,), np.float32), "Box(-1.0, 1.0, (3,), float32)"),
    (spaces.Box(0, 1, SHAPE, np.float32), "Box(0.0, 1.0, (4, 6, 3), float32)"),
    (spaces.Box(0, 255, (2, *SHAPE), np.uint8), "Box(0, 255, (2, 4, 6, 3), uint8)"),
    (spaces.Dict(image=spaces.Box(0, 255, SHAPE, np.uint8)), "Dict('image': Box("),
    (spaces.Discrete(4), "Discrete(4)"),
  ],
)
def test_observations_that_are_no_images_are_refused(register, space, text):
  class Other(Counter):
    def __init__(self):
      super().__init__()
      self.observation_space = space

  name = register(Other)
  refused(lambda: envs.spec(name), name, f"its observations are no images but {text}")
  refused(lambda: envs.make(name, num_envs=1, seed=0), name, "its observations are no images")


def test_continuous_actions_are_refused():
  refused(lambda: envs.spec("gym/Pendulum-v1"), "gym/Pendulum-v1", "its actions are not discrete but Box(")


def test_an_environment_that_cannot_be_made_is_refused(register):
  def missing():
    raise gymnasium.error.DependencyNotInstalled("needs box:\n  pip install box")

  name = register(missing)
  refused(lambda: envs.spec(name), f"environment {name} cannot be made: needs box: pip install box")
  absent = register("no_such_module:Env", name="test/Absent-v0")
  refused(lambda: envs.spec(absent), absent, "no_such_module")


@pytest.mark.parametrize(("field", "value"), [("num_envs", 0), ("seed", -1), ("max_episode_steps", 0)])
def test_numbers_out_of_range_name_the_field(register, field, value):
  name = register()
  refused(lambda: envs.make(name, **({"num_envs": 2, "seed": 0} | {field: value})), f"{field} is {value};")


def collector(name):
  def act(params, observations, state, restart, key, count, epsilon):
    del params, key, epsilon
    seen.append((observations.copy(), restart.copy()))
    return np.array([count % 3, 2]), state

  seen = []
  state = LstmState(jnp.zeros((2, 1)), jnp.zeros((2, 1)))
  env = envs.make(name, num_envs=2, seed=0)
  c = Collector(env, act, initial_state=state, seed=0, epsilon=lambda steps: 0.0, max_calls=100)
  return c, seen


def collect(c, steps):
  return c.collect(None, [], lambda chunks, chunk: [*chunks, chunk], steps)


def test_a_resumed_run_repeats_games_that_repeat(register):
  c, _ = collector(register())
  collect(c, 14)
  resumed, _ = collector("gym/test/Counter-v0")
  assert resumed.repeats
  assert resumed.restore(c.save())
  expected, got = collect(c, 20), collect(resumed, 20)
  assert got[1] == expected[1]
  np.testing.assert_array_equal(got[0][0].frames, expected[0][0].frames)


@pytest.mark.parametrize("declared", [False, True])
def test_a_resumed_run_begins_new_games_where_they_do_not_repeat(register, declared):
  name = register(kwargs={"repeats": False}, nondeterministic=declared)
  c, _ = collector(name)
  collect(c, 14)  # Seven steps each: five of a whole game, two of another.
  saved = c.save()
  resumed, seen = collector(name)
  assert resumed.repeats is not declared
  calls = []
  assert not resumed.restore(saved, lambda: calls.append(1))
  assert len(calls) == (0 if declared else 7)
  assert resumed.env_steps == resumed.frames == 14
  chunks, met = collect(resumed, 20)
  observations, restart = seen[0]
  assert restart.all()  # The policy and replay start anew,
  assert observations[:, 0, 0, 1].tolist() == [0, 0]  # with first frames,
  assert met.lengths == [5] * 4  # and whole games are counted.
  assert met.returns == [15.0] * 4
  assert chunks[0].first[:, 0].all()
  assert resumed.env_steps == resumed.frames == 34
  later = resumed.save()
  assert later["calls"] == 17
  np.testing.assert_array_equal(later["actions"][:7], saved["actions"][:7])


def test_games_that_promise_to_repeat_are_held_to_it(register):
  class Game(Counter):
    def __init__(self):
      super().__init__(repeats=False)

  def make(repeatable):
    return lambda **options: envs.BatchEnv(Game, EnvSpec(3, SHAPE), repeatable=repeatable, **options)

  for repeatable in (True, None, False):
    envs.register("test/game", EnvSpec(3, SHAPE), make(repeatable), replace=True)
    c, _ = collector("test/game")
    collect(c, 14)
    resumed, _ = collector("test/game")
    if repeatable:
      refused(lambda resumed=resumed, c=c: resumed.restore(c.save()), "did not repeat its steps")
    else:
      assert not resumed.restore(c.save())
      assert collect(resumed, 10)[1].lengths == [5, 5]
  del envs.registry._entries["test/game"]
