"""The compiled programs of a run: what every process that trains it must have alike."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jedi_jax import replay as replay_lib
from jedi_jax.config import Config
from jedi_jax.models.base import Model
from jedi_jax.models.build import build
from jedi_jax.training import dreams
from jedi_jax.training import epoch as epoch_lib
from jedi_jax.training.parallel import Devices
from jedi_jax.training.updates import make_optimizers
from jedi_jax.types import EnvSpec


class Programs(NamedTuple):
  """A model and what is compiled of it for the devices.

  Attributes:
    model: what the configuration describes.
    optimizers: by phase.
    epoch: (distributed state, distributed replay, counts as of `traced`) -> the state, sums; donates the state.
    add: (distributed replay, distributed chunk) -> the replay, which is donated.
    strips: (distributed parameters, replay, key data) -> strips; None where none are wanted.
  """

  model: Model
  optimizers: dict[str, optax.GradientTransformation]
  epoch: Any
  add: Any
  strips: Any


def make_programs(config: Config, spec: EnvSpec, devices: Devices) -> Programs:
  """Builds the programs; nothing is compiled yet."""
  model = build(config, spec, packed=devices.packed)
  optimizers = make_optimizers(config, model.phases)
  epoch = epoch_lib.make_epoch(
    model, optimizers, batch_size=config.training.batch_size, age_weights=config.replay.age_weights
  )
  return Programs(
    model=model,
    optimizers=optimizers,
    epoch=epoch_lib.distribute(epoch, devices),
    add=devices.map(replay_lib.add, donate=(0,)),
    strips=_make_strips(config, model, devices),
  )


def traced(counts: Mapping[str, int]) -> dict[str, np.ndarray]:
  """Numbers of updates as the epoch takes them: as data, so that one compilation serves all."""
  return {name: np.asarray(count, np.int32) for name, count in counts.items()}


def _make_strips(config: Config, model: Model, devices: Devices) -> Any:
  if model.decode is None or not config.probe.strips:
    return None
  strips = dreams.make_strips(model, count=config.probe.strips, steps=config.actor_critic.horizon)
  return devices.map(lambda params, replay, key: strips(params, replay, jax.random.wrap_key_data(key)))
