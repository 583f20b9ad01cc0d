"""Memory: bytes of a device that a run needs by the compiler's analysis, and how many runs fit."""

import os
from typing import Any, NamedTuple

import jax

from jedi_jax.config import Config
from jedi_jax.errors import UserError
from jedi_jax.training.learner import Learner, empty_replay
from jedi_jax.training.parallel import Devices
from jedi_jax.types import EnvSpec

_SHARE = 0.9
"""Fraction of device memory for training; acting and evaluation need the rest."""


class Memory(NamedTuple):
  """Bytes of a device that a run needs.

  Attributes:
    replay: the ring of frames.
    state: parameters and optimiser states.
    working: a run's share of the peak of temporary buffers, by XLA's analysis of the compiled epoch.
    device: memory of the device.
  """

  replay: int
  state: int
  working: int
  device: int

  @property
  def run(self) -> int:
    """Bytes of one run."""
    return self.replay + self.state + self.working

  @property
  def fit(self) -> int:
    """How many runs fit, at least 1."""
    return max(int(_SHARE * self.device / self.run), 1)


def measure(config: Config, spec: EnvSpec, *, runs: int = 1) -> Memory:
  """Compiles the epoch for the first device, without running it, and measures what a run needs.

  Args:
    config: of the run.
    spec: of its environment.
    runs: number of runs in the program; packed runs need more working memory each than a run alone.
  """
  device = jax.local_devices()[0]
  learner = Learner(config, spec, Devices([device], runs=runs))
  state, replay = learner.shapes
  analysis: Any = learner.lower().compile().memory_analysis()
  return Memory(
    replay=size(replay),
    state=size(state),
    working=int(analysis.temp_size_in_bytes) // runs,
    device=_device_bytes(device),
  )


def check_replay(config: Config, spec: EnvSpec, *, runs: int = 1) -> None:
  """Checks, before anything is allocated, that the first device can hold the replay of its runs.

  Args:
    config: of the runs.
    spec: of their environment.
    runs: number of runs of the device.

  Raises:
    UserError: naming the settings.
  """
  needed = runs * size(jax.eval_shape(lambda: empty_replay(config, spec)))
  stats = jax.local_devices()[0].memory_stats() or {}
  # For a CPU, all memory of the machine, since free memory changes at any moment.
  available = int(stats.get("bytes_limit", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
  if needed > available:
    cure = "lower them or take fewer runs" if runs > 1 else "lower them"
    raise UserError(
      f"replay.capacity={config.replay.capacity} and replay.final_frames={config.replay.final_frames} take "
      f"{needed / 2**30:,.0f} GiB, and the device has {available / 2**30:,.0f} GiB: {cure}"
    )


def size(tree: Any) -> int:
  """Returns the bytes of a tree of arrays or shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _device_bytes(device: jax.Device) -> int:
  """Returns the memory of a device; for a CPU, the free memory of the machine."""
  stats = device.memory_stats()
  if stats and "bytes_limit" in stats:
    return int(stats["bytes_limit"])
  return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
