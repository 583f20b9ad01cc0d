"""jedi_jax: latent diffusion world models for reinforcement learning, in JAX."""

from jedi_jax.agent import Agent, load_agent
from jedi_jax.config import Config, make_config
from jedi_jax.errors import Interrupted, TrainingError, UserError
from jedi_jax.evaluation.evaluate import evaluate
from jedi_jax.models.base import Model
from jedi_jax.models.build import build, count_parameters
from jedi_jax.models.compose import compose
from jedi_jax.runs.interruption import Interruption
from jedi_jax.training.train import train, train_packed
from jedi_jax.types import EnvSpec, Segment, Trajectory
from jedi_jax.version import __version__

__all__ = [
  "Agent",
  "Config",
  "EnvSpec",
  "Interrupted",
  "Interruption",
  "Model",
  "Segment",
  "TrainingError",
  "Trajectory",
  "UserError",
  "__version__",
  "build",
  "compose",
  "count_parameters",
  "evaluate",
  "load_agent",
  "make_config",
  "train",
  "train_packed",
]
