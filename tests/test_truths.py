"""Truths that must hold whatever else changes: games differ, training and evaluation share none, a run counts once."""

import json
import shutil

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from jedi_jax import envs, sweep
from jedi_jax.config import make_config
from jedi_jax.config.fields import settings
from jedi_jax.errors import UserError
from jedi_jax.evaluation import minatar, report
from jedi_jax.training import seeds
from jedi_jax.training.seeds import Purpose
from jedi_jax.types import EnvSpec

MOST = {path: settings(type(make_config()))[path].metadata["high"] for path in ("env.num_envs", "evaluation.num_envs")}
"""The largest numbers of environments that a run can have."""


# ---- Two resets differ ----


SPEC = EnvSpec(2, (8, 8, 1))


class Lights(gymnasium.Env):
  """A light at random places."""

  observation_space, action_space = spaces.Box(0, 255, SPEC.observation_shape, np.uint8), spaces.Discrete(2)

  def reset(self, *, seed=None, options=None):
    super().reset(seed=seed)
    return self.see(), {}

  def step(self, action):
    return self.see(), 0.0, bool(self.np_random.random() < 0.1), False, {}

  def see(self):
    picture = np.zeros(SPEC.observation_shape, np.uint8)
    picture[tuple(self.np_random.integers(8, size=2))] = 255
    return picture


class Corridor:
  """The same as a Python object."""

  def __init__(self):
    self.game = Lights()

  def reset(self, *, seed=None):
    return self.game.reset(seed=seed)

  def step(self, action):
    return self.game.step(action)


@pytest.fixture(scope="module", autouse=True)
def _own_games():
  def make(*, num_envs, seed, **options):
    return envs.BatchEnv(Corridor, SPEC, num_envs=num_envs, seed=seed, max_episode_steps=options["max_episode_steps"])

  envs.register("truths/Corridor", SPEC, make, replace=True)
  if "truths/Lights-v0" not in gymnasium.registry:
    gymnasium.register("truths/Lights-v0", Lights)
  yield
  del gymnasium.registry["truths/Lights-v0"]
  del envs.registry._entries["truths/Corridor"]


# Of each family games that draw at random, Space Invaders and Pong only what is sticky. EnvPool's ViZDoom is unstable.
@pytest.fixture(
  params=[
    *("catch", "truths/Corridor", "gym/truths/Lights-v0", "atari/Breakout", "atari/Pong?skip=2-6"),
    *("gymnax/Pong-misc?sticky=0.1", "minatar/Breakout?sticky=0.1"),
    *("procgen/CoinrunEasy", "minigrid/MiniGrid-Dynamic-Obstacles-5x5-v0"),
    pytest.param("minatar/Asterix", marks=pytest.mark.cluster),
    pytest.param("minatar/Freeway", marks=pytest.mark.cluster),
    pytest.param("minatar/Seaquest", marks=pytest.mark.cluster),
    pytest.param("minatar/SpaceInvaders?sticky=0.1", marks=pytest.mark.cluster),
    pytest.param("vizdoom/TakeCover", marks=pytest.mark.slow),
  ]
)
def game(request, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)  # ViZDoom writes its settings to the current folder.
  envs.validate(request.param)
  try:
    envs.check_installed(request.param)
  except UserError as error:
    pytest.skip(str(error))
  return request.param


STEPS, GAMES = 25, 6


def play(env):
  """Frames [steps, games, ...] after a reset, with the same actions each time."""
  random = np.random.default_rng(0)
  frames = [env.reset()]
  for _ in range(STEPS):
    frames.append(env.step(random.integers(env.spec.num_actions, size=GAMES)).observation)
  return np.stack(frames)


def test_resets_seeds_and_neighbours_differ_and_a_seed_repeats(game):
  made = [envs.make(game, num_envs=GAMES, seed=seed) for seed in (5, 5, 5 + GAMES, 2**30)]
  first, same, other, evaluation = map(play, made)
  again = play(made[0])
  for env in made:
    env.close()
  np.testing.assert_array_equal(first, same)
  for name, frames in {"a second reset": again, "another seed": other, "a seed of evaluation": evaluation}.items():
    assert (first != frames).any(), f"{game}: {name} plays the same games"
  assert len({first[:, i].tobytes() for i in range(GAMES)}) > 1, f"{game}: all environments play the same game"


# ---- Training and evaluation share no seed ----

SEEDS = st.integers(0, 2**31 - 1)
EPOCHS = st.integers(0, 10**6)
OTHERS = st.sampled_from([purpose for purpose in Purpose if purpose != Purpose.COLLECTION])


@given(SEEDS, SEEDS, OTHERS, EPOCHS)
def test_no_game_of_evaluation_is_a_game_of_any_training(trained, evaluated, purpose, epoch):
  """Of all runs, so that of all packs: not only of the evaluated one."""
  collection = seeds.env_seed(trained, Purpose.COLLECTION)
  evaluation = seeds.env_seed(evaluated, purpose, epoch)
  assert collection >= 0
  assert collection + MOST["env.num_envs"] <= 2**30 <= min(evaluation, seeds.evaluation_seed(evaluated))
  assert max(evaluation, seeds.evaluation_seed(evaluated)) + MOST["evaluation.num_envs"] <= 2**31
  # Nor are the keys that sample actions the same.
  assert seeds.derive(trained, Purpose.COLLECTION) < 2**30 <= evaluation


@given(SEEDS, EPOCHS, EPOCHS)
def test_evaluations_of_a_run_differ_in_their_seeds(seed, one, other):
  drawn = {(purpose, epoch): seeds.env_seed(seed, purpose, epoch) for purpose in OTHERS_LIST for epoch in (one, other)}
  assert len(set(drawn.values())) == len(drawn)


OTHERS_LIST = (Purpose.EVALUATION, Purpose.FINAL, Purpose.SEPARATE)


def test_the_largest_seed_of_a_run_is_within_the_tested_range():
  with pytest.raises(UserError, match="seed"):
    make_config(seed=2**31)


# ---- A report counts a run once ----


def result(env="atari/Pong", seed=0, **changes):
  about = {"env": env, "variant": "jedi", "preset": "paper", "seed": seed, "env_steps": 100_000, "mean_return": 1.0,
           "episode_returns": [1.0] * 100, "max_episode_steps": 27_000, "seconds": 9.0}  # fmt: skip
  return json.dumps(about | changes)


def put(folder, text):
  folder.mkdir(parents=True)
  (folder / "result.json").write_text(text)
  return folder


def counted(*folders):
  """The number of runs that a report counts, by game; what report.py does with these paths."""
  runs, _ = report.read_runs(folder / "result.json" for folder in folders)
  methods, _ = report.collect(runs)
  counts = {game: len(scores) for method in methods.values() for game, scores in method.by_game.items()}
  return counts | {row.game: row.runs for row in minatar.compare(runs, reps=0) if row.runs}


def test_different_runs_count_once_each(tmp_path):
  folders = [put(tmp_path / f"{i}_{seed}", result(env, seed)) for i, env in enumerate(NAMES) for seed in (0, 1)]
  assert counted(*folders) == {"Pong": 2, "Breakout": 2}


NAMES = ("atari/Pong", "minatar/Breakout")


@pytest.mark.parametrize("env", NAMES)
@pytest.mark.parametrize("double", ["copy", "symlink", "file", "hard link", "trained twice", "other return"])
def test_a_double_is_refused_by_both_names(tmp_path, env, double):
  first, second = put(tmp_path / "a", result(env)), tmp_path / "b"
  if double == "copy":
    shutil.copytree(first, second)
  elif double == "symlink":
    second.symlink_to(first)
  elif double == "file":
    second.mkdir()
    (second / "result.json").symlink_to(first / "result.json")
  elif double == "hard link":
    second.mkdir()
    (second / "result.json").hardlink_to(first / "result.json")
  else:
    put(second, result(env, **({"mean_return": 2.0} if double == "other return" else {"seconds": 8.0})))
  with pytest.raises(UserError) as caught:
    counted(first, put(tmp_path / "c", result(env, 1)), second)
  assert str(first) in str(caught.value)
  assert str(second) in str(caught.value)


@pytest.mark.parametrize(("one", "other"), [
  ("minatar/Breakout", "minatar/Breakout?sticky=0"), ("minatar/Breakout?sticky=0.1", "minatar/Breakout?sticky=0.10"),
  ("minatar/Breakout?sticky=0.0", "minatar/Breakout?sticky=0"), ("atari/Pong", "Pong"),
])  # fmt: skip
def test_two_names_of_one_environment_are_one(tmp_path, one, other):
  with pytest.raises(UserError, match="drop one"):
    counted(put(tmp_path / "a", result(one)), put(tmp_path / "b", result(other)))


@pytest.mark.parametrize("games", [["Pong", "atari/Pong"], ["catch", "catch"], ["minatar", "minatar/Breakout"]])
def test_a_sweep_plans_a_run_once_and_in_a_directory_of_its_own(tmp_path, games):
  plan = sweep.plan(tmp_path, games=games, seeds=3, variants=["jedi", "jedi"], preset="debug", overrides=[])
  assert len({(run.config.env.name, run.config.seed) for run in plan}) == len(plan)
  assert len({run.workdir for run in plan}) == len(plan)
  assert sorted(run.workdir for pack in sweep.packs(plan, 2) for run in pack) == sorted(run.workdir for run in plan)
