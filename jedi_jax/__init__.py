"""jedi_jax: latent diffusion world models for reinforcement learning, in JAX.

Names and submodules are imported at their first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jedi_jax.version import __version__ as __version__

if TYPE_CHECKING:
  from jedi_jax import (
    agent,
    config,
    datasets,
    envs,
    episodes,
    errors,
    evaluation,
    inspection,
    interop,
    models,
    nn,
    ops,
    replay,
    runs,
    runtime,
    sweep,
    tables,
    training,
    types,
  )
  from jedi_jax.agent import Agent, load_agent
  from jedi_jax.config import Config, make_config
  from jedi_jax.errors import Interrupted, TrainingError, UserError
  from jedi_jax.evaluation.evaluate import evaluate
  from jedi_jax.inspection.dream_env import dream_env
  from jedi_jax.models.base import Model, Parts
  from jedi_jax.models.build import build, count_parameters
  from jedi_jax.models.compose import compose
  from jedi_jax.runs.interruption import Interruption
  from jedi_jax.training.learner import Learner
  from jedi_jax.training.train import train, train_packed
  from jedi_jax.types import EnvSpec, Segment, Trajectory

_MODULES = {
  "Agent": "agent",
  "Config": "config",
  "EnvSpec": "types",
  "Interrupted": "errors",
  "Interruption": "runs.interruption",
  "Learner": "training.learner",
  "Model": "models.base",
  "Parts": "models.base",
  "Segment": "types",
  "TrainingError": "errors",
  "Trajectory": "types",
  "UserError": "errors",
  "build": "models.build",
  "compose": "models.compose",
  "count_parameters": "models.build",
  "dream_env": "inspection.dream_env",
  "evaluate": "evaluation.evaluate",
  "load_agent": "agent",
  "make_config": "config",
  "train": "training.train",
  "train_packed": "training.train",
}
"""Module of each public name."""

_SUBMODULES = (
  "agent",
  "config",
  "datasets",
  "envs",
  "episodes",
  "errors",
  "evaluation",
  "inspection",
  "interop",
  "models",
  "nn",
  "ops",
  "replay",
  "runs",
  "runtime",
  "sweep",
  "tables",
  "training",
  "types",
)

__all__ = [*_MODULES, *_SUBMODULES, "__version__"]


def __getattr__(name: str) -> Any:
  if name in _MODULES:
    return getattr(importlib.import_module(f"jedi_jax.{_MODULES[name]}"), name)
  if name in _SUBMODULES:
    return importlib.import_module(f"jedi_jax.{name}")
  raise AttributeError(f"module 'jedi_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted(__all__)
