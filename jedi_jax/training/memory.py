"""Memory: what a run takes of a device, by the compiler's account, and how many runs fit."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jedi_jax import replay as replay_lib
from jedi_jax.config import Config
from jedi_jax.errors import UserError
from jedi_jax.models.base import Model
from jedi_jax.training.collector import CHUNK_SLOTS
from jedi_jax.training.parallel import Devices
from jedi_jax.training.programs import make_programs
from jedi_jax.training.state import TrainState, make_init
from jedi_jax.types import EnvSpec

_SHARE = 0.9
"""Of a device's memory, what runs may take: policies that play and evaluate need some as well."""


class Memory(NamedTuple):
  """Bytes of a device that a run takes.

  Attributes:
    replay: its ring of frames.
    state: parameters and optimisers.
    working: the most that an epoch needs besides, by XLA's account of the compiled epoch.
    device: what the device has.
  """

  replay: int
  state: int
  working: int
  device: int

  @property
  def run(self) -> int:
    """All that one run takes."""
    return self.replay + self.state + self.working

  @property
  def fit(self) -> int:
    """How many runs a device can hold, at least 1."""
    return max(int(_SHARE * self.device / self.run), 1)


def of_run(config: Config, spec: EnvSpec) -> Memory:
  """Compiles the epoch of a run for the first device, without running it, and takes its measure.

  Args:
    config: the run's configuration.
    spec: of its environment.
  """
  device = jax.local_devices()[0]
  devices = Devices([device])
  programs = make_programs(config, spec, devices)
  state, replay = shapes(config, spec, programs.model, programs.optimizers)
  counts = {phase.name: jax.ShapeDtypeStruct((), np.int32) for phase in programs.model.phases}
  lowered = programs.epoch.lower(distributed(state, 1), distributed(replay, 1), counts)
  compiled = lowered.compile()
  analysis = compiled.memory_analysis()
  return Memory(
    replay=size(replay), state=size(state), working=int(analysis.temp_size_in_bytes), device=_device_bytes(device)
  )


def empty_replay(config: Config, spec: EnvSpec) -> replay_lib.ReplayState:
  """The replay of a run before its first step."""
  slots = -(-(config.replay.capacity + config.replay.final_frames) // config.env.num_envs)
  return replay_lib.init(
    num_streams=config.env.num_envs,
    slots_per_stream=max(slots, CHUNK_SLOTS),
    observation_shape=spec.observation_shape,
  )


def check_replay(config: Config, spec: EnvSpec) -> None:
  """Refuses a replay that the first device cannot hold, before anything is allocated.

  Raises:
    UserError: naming the settings.
  """
  needed = size(jax.eval_shape(lambda: empty_replay(config, spec)))
  stats = jax.local_devices()[0].memory_stats() or {}
  # Of the CPU all memory of the machine: what is free now may be more in a moment.
  there = int(stats.get("bytes_limit", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
  if needed > there:
    raise UserError(
      f"replay.capacity={config.replay.capacity} and replay.final_frames={config.replay.final_frames} take "
      f"{needed / 2**30:,.0f} GiB, and the device has {there / 2**30:,.0f} GiB: lower them"
    )


def shapes(
  config: Config, spec: EnvSpec, model: Model, optimizers: Mapping[str, optax.GradientTransformation]
) -> tuple[TrainState, replay_lib.ReplayState]:
  """State and replay of a run without their arrays, as `jax.ShapeDtypeStruct`."""
  state = jax.eval_shape(make_init(model, optimizers), jax.random.key(0))
  return state, jax.eval_shape(lambda: empty_replay(config, spec))


def distributed(tree: Any, count: int) -> Any:
  """The shapes of a tree of arrays or shapes when it is distributed over `count` devices of one run."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), tree)


def size(tree: Any) -> int:
  """Bytes of a tree of arrays or shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _device_bytes(device: jax.Device) -> int:
  """Memory of a device; of the CPU what is free in the machine."""
  stats = device.memory_stats()
  if stats and "bytes_limit" in stats:
    return int(stats["bytes_limit"])
  return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
