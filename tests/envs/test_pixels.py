"""Procgen, ViZDoom and MiniGrid of EnvPool. A family is skipped where the system lacks what it needs."""

import types

import numpy as np
import pytest
from refusals import refused

from jedi_jax import envs
from jedi_jax.envs import pixels
from jedi_jax.errors import UserError

# EnvPool's ViZDoom crashed or differed in 2 of 13 runs of its test, before its folder was made for it.
UNSTABLE = pytest.mark.slow
PROCGEN, DOOM, GRID = "procgen/LeaperEasy", "vizdoom/TakeCover", "minigrid/MiniGrid-Dynamic-Obstacles-5x5-v0"


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)  # ViZDoom writes its settings to the current folder.


def installed(name):
  try:
    envs.check_installed(name)
  except UserError as error:
    pytest.skip(str(error))
  return name


def play(name, steps, *, seed=3, actions=None, **options):
  env = envs.make(name, num_envs=2, seed=seed, **options)
  random = np.random.default_rng(0)
  first = env.reset()
  taken = random.integers(env.spec.num_actions, size=(steps, 2)) if actions is None else np.full((steps, 2), actions)
  played = [env.step(row) for row in taken]
  frames = env.frames
  env.close()
  return first, played, frames


@pytest.mark.parametrize(
  ("name", "num_actions", "channels", "frames_per_step"),
  [(PROCGEN, 15, 3, 1), pytest.param(DOOM, 3, 3, 4, marks=UNSTABLE), (GRID, 3, 3, 1)],
)
def test_specs_frames_and_repetition(name, num_actions, channels, frames_per_step):
  spec = envs.spec(installed(name))
  assert spec == (num_actions, (64, 64, channels))
  first, steps, frames = play(name, 30)
  again, same, _ = play(name, 30)
  _, others, _ = play(name, 30, seed=103)
  assert first.shape == (2, 64, 64, channels)
  assert first.std() > 5  # A picture.
  assert frames == 2 * 30 * frames_per_step
  np.testing.assert_array_equal(first, again)
  for a, b in zip(steps, same, strict=True):
    for x, y in zip(a, b, strict=True):
      np.testing.assert_array_equal(x, y)
  assert any((a.observation != b.observation).any() for a, b in zip(steps, others, strict=True))


def test_the_folder_of_doom_is_made_before_its_games(tmp_path):
  """Games that start at once and both make it crash."""
  installed(DOOM)
  opened = []

  def open_pool(task, **options):
    opened.append((tmp_path / "_vizdoom").is_dir())
    raise RuntimeError(task)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pixels, "open_pool", open_pool)
    for _ in range(2):
      with pytest.raises(RuntimeError, match="TakeCover-v1"):
        envs.make(DOOM, num_envs=2, seed=0)
  assert opened == [True, True]
  (tmp_path / "_vizdoom").rmdir()
  (tmp_path / "_vizdoom").write_text("")
  refused(lambda: envs.make(DOOM, num_envs=2, seed=0), f"environment {DOOM} cannot be made", "current folder")


def test_some_scenarios_are_grey():
  assert envs.spec(installed("vizdoom/RocketBasic")) == (6, (64, 64, 1))


@pytest.mark.parametrize("name", [PROCGEN, pytest.param(DOOM, marks=UNSTABLE), GRID])
def test_our_time_limit_truncates(name):
  _, steps, _ = play(installed(name), 13, actions=0, max_episode_steps=3)
  lengths, last, over = np.zeros(2, int), None, 0
  for step in steps:
    if last is not None:
      np.testing.assert_array_equal(step.game_over, step.end | step.truncated)
    lengths += 1
    assert (step.truncated == ((lengths == 3) & ~step.end)).all()
    assert (lengths <= 3).all()
    over += int(step.truncated.sum())
    lengths[step.game_over] = 0
    last = step
  assert over >= 2


def test_envpools_limit_is_not_raised():
  _, steps, _ = play("minigrid/MiniGrid-Empty-5x5-v0", 100, actions=0, max_episode_steps=27_000)
  assert [step.truncated.tolist() for step in steps[-2:]] == [[False] * 2, [True] * 2]
  np.testing.assert_array_equal(steps[-1].end, [False] * 2)


def test_final_drawings_are_of_the_game_that_ended():
  """In an empty room the agent, red, walks to the green goal in the opposite corner and covers it."""
  env = envs.make("minigrid/MiniGrid-Empty-5x5-v0", num_envs=1, seed=0)
  start = env.reset()
  forward, right = 2, 1
  path = [forward, forward, right, forward, forward]
  steps = [env.step(np.array([action])) for action in path]
  assert [step.end[0] for step in steps] == [False] * 4 + [True]
  assert steps[-1].reward[0] > 0

  def red(images):
    return np.argwhere((images[0, :, :, 0] > 200) & (images[0, :, :, 1] < 60)).mean(axis=0)

  assert (red(start) < 25).all()
  assert (red(steps[-1].next_observation) > 38).all()
  np.testing.assert_array_equal(steps[-1].observation, start)
  env.close()


@UNSTABLE
def test_a_game_of_doom_ends_by_death():
  _, steps, _ = play(installed(DOOM), 200, actions=0)
  ends = [step for step in steps if step.end.any()]
  assert ends
  assert not any(step.truncated.any() for step in steps)
  assert all((step.next_observation[step.end] != step.observation[step.end]).any() for step in ends)


def test_names_are_envpools():
  known = envs.names()
  for name in ("procgen/CoinrunHard", "vizdoom/MyWayHome", "minigrid/MiniGrid-DoorKey-8x8-v0", PROCGEN, DOOM, GRID):
    assert name in known
    envs.validate(name)
  for wrong, near in (
    ("procgen/Coinrun", "procgen/CoinrunEasy"),
    ("vizdoom/basic", "vizdoom/Basic"),
    ("minigrid/MiniGrid-DoorKey-8x8", "minigrid/MiniGrid-DoorKey-8x8-v0"),
  ):
    refused(lambda wrong=wrong: envs.spec(wrong), repr(wrong), near)
  for name in ("vizdoom/Cig", "vizdoom/VizdoomCustom", "minigrid/BabyAI-GoTo-v0"):
    refused(lambda name=name: envs.validate(name), "unknown environment")
  refused(lambda: envs.validate("vizdoom/Basic?skip=2-6"), "takes no options")
  refused(lambda: envs.register("procgen/Mine", (2, (8, 8, 3)), print), "EnvPool's; choose another")


def test_what_the_system_lacks_is_said_in_a_line(monkeypatch):
  def make_spec(task, **options):
    raise ImportError("needs Qt 5.\nInstall it")

  monkeypatch.setattr(pixels, "import_envpool", lambda: types.SimpleNamespace(make_spec=make_spec))
  pixels.task_spec.cache_clear()
  for function in (envs.spec, envs.check_installed, lambda name: envs.make(name, num_envs=1, seed=0)):
    refused(
      lambda function=function: function(PROCGEN), f"environment {PROCGEN} cannot be made: needs Qt 5. Install it"
    )


@pytest.mark.parametrize(("field", "value"), [("num_envs", 0), ("max_episode_steps", 0), ("num_threads", -1)])
def test_numbers_out_of_range_name_the_field(field, value):
  refused(lambda: envs.make(GRID, **({"num_envs": 2, "seed": 0} | {field: value})), f"{field} is {value};")
