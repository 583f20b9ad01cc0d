"""Environments: batches of games whose finished games restart at once.

The rest of the package uses environments through `jedi_jax.types.VectorEnv`. EnvPool, gymnax and
Gymnasium are imported when an environment first needs them.
"""

from jedi_jax.envs.atari import AtariEnv
from jedi_jax.envs.batch import BatchEnv
from jedi_jax.envs.catch import CatchEnv
from jedi_jax.envs.gym import GymEnv
from jedi_jax.envs.gymnax import GymnaxEnv
from jedi_jax.envs.pixels import PixelEnv
from jedi_jax.envs.registry import RECORDED, check_installed, is_stochastic, make, names, register, spec, validate

__all__ = [
  "RECORDED",
  "AtariEnv",
  "BatchEnv",
  "CatchEnv",
  "GymEnv",
  "GymnaxEnv",
  "PixelEnv",
  "check_installed",
  "is_stochastic",
  "make",
  "names",
  "register",
  "spec",
  "validate",
]
