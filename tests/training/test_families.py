"""A run of every family of environments goes from collection to result.json; one that cannot repeat itself resumes.

Each family of the first test compiles programs of its own, so that the test is slow. Run it by hand:
`pytest -m slow tests/training/test_families.py`.
"""

import json

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import jedi_jax
from jedi_jax import envs
from jedi_jax.config import make_config
from jedi_jax.errors import UserError

# Small networks, a short horizon and one sampling step: the compilation is what takes the time.
SMALL = {
  "encoder.channels": (4, 4, 4),
  "encoder.downsample": (True, True, True),
  "denoiser.channels": (4,),
  "denoiser.conditioning_frames": 2,
  "denoiser.conditioning_width": 8,
  "reward_end.channels": (4,),
  "reward_end.lstm_width": 4,
  "reward_end.conditioning_width": 4,
  "actor_critic.horizon": 2,
  "actor_critic.lstm_width": 4,
  "sampler.num_steps": 1,
  "collect.total_steps": 40,
  "collect.first_epoch_min_steps": 20,
  "collect.first_epoch_max_steps": 20,
  "collect.steps_per_epoch": 10,
  "training.final_epochs": 0,
  "evaluation.interval_epochs": 0,
  "evaluation.episodes": 2,
  "evaluation.max_episode_steps": 10,
}


class Walk(gymnasium.Env):
  """The edge of a block moves left and right on 32 x 32 pixels, from a random column."""

  observation_space = spaces.Box(0, 255, (32, 32, 3), np.uint8)
  action_space = spaces.Discrete(3)

  def __init__(self, repeats=True):
    self.random = None if repeats else np.random.default_rng()

  def reset(self, *, seed=None, options=None):
    super().reset(seed=seed)
    self.column = int((self.random or self.np_random).integers(8, 24))
    return self.draw(), {}

  def step(self, action):
    self.column += action - 1
    return self.draw(), float(self.column == 31), self.column in (0, 31), False, {}

  def draw(self):
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, self.column :] = 255
    return image


@pytest.fixture
def walk(monkeypatch):
  monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
  monkeypatch.setattr(gymnasium, "registry", gymnasium.envs.registration.registry)
  gymnasium.register("test/Walk-v0", Walk, max_episode_steps=30)
  gymnasium.register("test/Random-v0", Walk, max_episode_steps=30, kwargs={"repeats": False})


@pytest.mark.slow
@pytest.mark.parametrize(
  "env",
  [
    "catch",
    "atari/Pong",
    "minatar/Breakout",
    "procgen/CoinrunEasy",
    "vizdoom/Basic",
    "minigrid/MiniGrid-Empty-5x5-v0",
    "gym/test/Walk-v0?crop=0-32x4-28&size=16",
  ],
)
def test_a_family_trains(walk, tmp_path, monkeypatch, tiny, quiet, env):
  monkeypatch.chdir(tmp_path)  # ViZDoom writes its settings to the current folder.
  try:
    envs.check_installed(env)
  except UserError as error:
    pytest.skip(str(error))
  smaller = {"encoder.downsample": (True, False, False)} if env.startswith("minatar/") else {}
  config = make_config(env=env, preset="debug", overrides=SMALL | smaller)
  result = jedi_jax.train(config, tmp_path / "run", devices=tiny.devices(), console=quiet)
  assert result["env"] == env
  assert result["env_steps"] == 40
  assert result["frames"] == 40 * (4 if env.startswith(("atari/", "vizdoom/")) else 1)
  records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert len(records) == 3
  assert all(np.isfinite(record["denoiser/loss"]) for record in records)


def test_a_run_whose_games_do_not_repeat_resumes_with_new_ones(walk, tmp_path, tiny, train_tiny, quiet):
  class StopError(Exception):
    pass

  def stop(directory, record):
    if record["epoch"] == 3:
      raise StopError

  # The shapes are those of Catch, so that the tiny configuration's programs fit.
  config = make_config(env="gym/test/Random-v0?size=24", preset="debug", overrides=tiny.overrides)
  with pytest.raises(StopError):
    train_tiny(tmp_path / "run", config=config, on_epoch=stop)
  result = train_tiny(tmp_path / "run", config=config, console=quiet)
  [repeating] = [line for line in quiet.lines if line.startswith("resuming after epoch 2: repeating ")]
  assert repeating.endswith(" environment steps")
  [line] = [line for line in quiet.lines if "does not repeat its steps: new games begin" in line]
  assert line.startswith("WARNING: gym/test/Random-v0?size=24 ")
  assert result["env_steps"] == result["frames"] == tiny.config.collect.total_steps
