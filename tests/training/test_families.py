"""A run of every family of environments goes from collection to result.json.

Each family compiles programs of its own, so that the test is slow. Run it by hand, for the family alone or all:
`JAX_DISABLE_MOST_OPTIMIZATIONS=1 pytest -m slow tests/training/test_families.py -k procgen`.
"""

import json

import numpy as np
import pytest
import walk

import jedi_jax
from jedi_jax import envs
from jedi_jax.config import make_config
from jedi_jax.errors import UserError

# Small networks, a short horizon and one sampling step: the compilation is what takes the time.
SMALL = {
  "env.action_slots": 18,  # As many as Atari's, so that programs for the same images are compiled once.
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


@pytest.mark.slow
@pytest.mark.parametrize(
  "env",
  [
    "catch",
    "atari/Pong",
    "minatar/Breakout",
    "gymnax/Catch-bsuite",
    "procgen/CoinrunEasy",
    "vizdoom/Basic",
    "minigrid/MiniGrid-Empty-5x5-v0",
    "gym/test/Walk-v0?crop=0-32x4-28&size=16",
  ],
)
def test_a_family_trains(tmp_path, monkeypatch, tiny, quiet, env):
  walk.register(monkeypatch)
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
