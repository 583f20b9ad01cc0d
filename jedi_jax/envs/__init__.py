"""Environments: batches of EnvPool games whose finished games restart at once.

The modules of this package are the only ones that import envpool; everything else meets `jedi_jax.types.VectorEnv`.
"""

from jedi_jax.envs.atari import AtariEnv
from jedi_jax.envs.catch import CatchEnv
from jedi_jax.envs.registry import is_stochastic, make, names, spec, validate

__all__ = ["AtariEnv", "CatchEnv", "is_stochastic", "make", "names", "spec", "validate"]
