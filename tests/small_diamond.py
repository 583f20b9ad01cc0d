"""A DIAMOND of the smallest sizes that tell its parts apart, on Catch's frames."""

import jax
import numpy as np

from jedi_jax import config as config_lib
from jedi_jax import envs
from jedi_jax.models.build import build

SPEC = envs.spec("catch")
OVERRIDES = {
  "denoiser.channels": (8,),
  "denoiser.depths": (1,),
  "denoiser.attention": (False,),
  "denoiser.conditioning_width": 12,
  "denoiser.conditioning_frames": 2,
  "reward_end.channels": (4, 8),
  "reward_end.lstm_width": 6,
  "actor_critic.channels": (4, 8),
  "actor_critic.downsample": (True, True),
  "actor_critic.lstm_width": 10,
}


def make_config(**overrides):
  return config_lib.make_config(env="catch", variant="diamond", preset="debug", overrides={**OVERRIDES, **overrides})


def random_params():
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(build(make_config(), SPEC).init, jax.random.key(0))
  return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32), shapes)
