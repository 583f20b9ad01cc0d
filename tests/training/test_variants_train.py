"""Every variant, and every switch of `jedi`, goes through the same loop from collection to result.json."""

import json

import jax
import numpy as np
import pytest

import jedi_jax
from jedi_jax import config as config_lib
from jedi_jax.agent import load_agent
from jedi_jax.config import make_config

# Small sizes of the networks, a short horizon and one sampling step: the compilation is what takes the time.
SMALL = {
  "denoiser.conditioning_frames": 2,
  "denoiser.conditioning_width": 8,
  "sampler.num_steps": 1,
  "actor_critic.horizon": 2,
  "actor_critic.lstm_width": 4,
  "reward_end.lstm_width": 4,
  "reward_end.conditioning_width": 4,
  "collect.total_steps": 30,
  "collect.first_epoch_min_steps": 20,
  "collect.first_epoch_max_steps": 20,
  "collect.steps_per_epoch": 10,
  "training.final_epochs": 0,
  "evaluation.interval_epochs": 0,
  "evaluation.max_episode_steps": 20,
  "checkpoint.interval_epochs": 10,
}
LATENT = {
  "encoder.channels": (4, 4, 4),
  "encoder.downsample": (True, True, True),
  "denoiser.channels": (4,),
  "reward_end.channels": (4,),
}
PIXELS = {
  "denoiser.channels": (4, 4),
  "reward_end.channels": (4, 4),
  "actor_critic.channels": (4, 4, 4),
}
SWITCHES = {
  "encoder.target_decay": 0.9,
  "denoiser.switching": "alternate",
  "encoder.clamp": 0.0,
  "sampler.order": 2,
  "sampler.num_steps": 2,
  "sampler.churn": 1.0,
  "precision.compute_dtype": "bfloat16",
}


def train(tmp_path, tiny, quiet, env, variant, **overrides):
  sizes = PIXELS if variant == "diamond" else LATENT
  config = make_config(env=env, variant=variant, preset="debug", overrides={**SMALL, **sizes, **overrides})
  result = jedi_jax.train(config, tmp_path / "run", devices=tiny.devices(), console=quiet)
  assert result["variant"] == variant
  assert result["env_steps"] == 30
  assert result["updates"] == {"denoiser": 6, "reward_end": 6, "actor_critic": 6}
  records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert len(records) == 2
  for record in records:
    for phase in ("denoiser", "reward_end", "actor_critic"):
      assert np.isfinite(record[f"{phase}/loss"])
      assert record[f"{phase}/grad_norm"] > 0
  assert ("denoiser/loss_reconstruction" in records[0]) == (variant in ("autoencoder", "decoder_gradient"))
  agent = load_agent(tmp_path / "run")
  fresh = agent.model.init(jax.random.key(0))
  assert jax.tree.structure(fresh) == jax.tree.structure(agent.params)
  return result


@pytest.mark.parametrize(
  "variant",
  [
    "diamond",
    # Their routes of gradients have tests of their own.
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ("autoencoder", "mse", "no_diffusion_gradient", "decoder_gradient")
    ),
  ],
)
def test_on_catch(tmp_path, tiny, quiet, variant):
  train(tmp_path, tiny, quiet, "catch", variant)


@pytest.mark.slow
def test_all_switches_at_once_on_catch(tmp_path, tiny, quiet):
  train(tmp_path, tiny, quiet, "catch", "jedi", **SWITCHES)


@pytest.mark.slow
@pytest.mark.parametrize("variant", sorted(config_lib.VARIANTS))
@pytest.mark.parametrize("env", ["atari/Breakout", "atari/Boxing?skip=2-6"])
def test_on_atari(tmp_path, tiny, quiet, variant, env):
  result = train(tmp_path, tiny, quiet, env, variant)
  if "?" not in env:
    assert result["frames"] == 4 * 30
  else:
    assert 2 * 30 <= result["frames"] <= 6 * 30
    assert config_lib.from_dict(json.loads((tmp_path / "run" / "config.json").read_text())["config"]).sampler.churn == 1
