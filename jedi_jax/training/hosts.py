"""Hosts: one run on the devices of several processes, which `jax.distributed` has connected.

The first process leads. It alone has environments, files, evaluation and progress; the others hold no more than the
distributed state, the replay and the compiled programs. Before every program that all devices run together the leader
says which one, and each process launches it. Data goes from the leader to all (see `Devices.distribute`), so no file
system need be shared and a checkpoint is written once.
"""

import contextlib
import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jedi_jax.config import Config, Updates
from jedi_jax.replay import Chunk, ChunkWriter
from jedi_jax.training import parallel
from jedi_jax.training.collector import CHUNK_SLOTS
from jedi_jax.training.memory import empty_replay
from jedi_jax.training.parallel import Devices
from jedi_jax.training.programs import make_programs, traced
from jedi_jax.training.state import make_init
from jedi_jax.types import EnvSpec

_PHASES = tuple(field.name for field in dataclasses.fields(Updates))


class Operation(enum.IntEnum):
  """What all processes do together."""

  STOP = 0
  BEGIN = 1
  ADD = 2
  EPOCH = 3
  STRIPS = 4


def meet(devices: Devices) -> None:
  """Connects the devices of all processes while these are at the same point and idle.

  Their collectives connect at first use and give up after half a minute; once connected, a process may keep the others
  waiting.
  """
  if devices.processes > 1:
    jax.block_until_ready(devices.map(parallel.total)(devices.distribute([np.zeros((), np.float32)])))


class Leader:
  """What the first process says to the others; it says nothing where there are none.

  Used as a context it dismisses the others at the end, after an exception too. An exception within an operation leaves
  them in the middle of it, where they cannot be told anything: then the leader's process must end, and the heartbeat of
  `jax.distributed` ends the others within some minutes, as it does when a process is killed.

  Args:
    devices: of the run.
  """

  def __init__(self, devices: Devices):
    self._alone = devices.processes == 1
    self._heard = True

  def __enter__(self) -> "Leader":
    return self

  def __exit__(self, *_: object) -> None:
    if self._heard:
      self._send(Operation.STOP, {})

  @contextlib.contextmanager
  def doing(self, operation: Operation, counts: Mapping[str, int] | None = None) -> Iterator[None]:
    """A context in which all processes launch an operation, of an epoch with these updates by phase."""
    self._heard = False
    self._send(operation, counts or {})
    yield
    self._heard = True

  def _send(self, operation: Operation, counts: Mapping[str, int]) -> None:
    if not self._alone:
      parallel.broadcast(np.asarray([operation, *(counts.get(name, 0) for name in _PHASES)], np.int32))


def follow(config: Config, spec: EnvSpec, devices: Devices) -> None:
  """Does in a process that does not lead what the leader says, until it says to stop.

  Args:
    config: of the run, as the leader has it.
    spec: of its environment.
    devices: of all processes.
  """
  programs = make_programs(config, spec, devices)
  init = make_init(programs.model, programs.optimizers)
  phases = [phase.name for phase in programs.model.phases]
  epoch: Any = None
  state: Any = None
  replay: Any = None

  def receive(function: Any, *args: Any) -> Any:
    """The leader's data of the shapes that a function returns."""
    blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(function, *args))
    return devices.distribute([blank])

  while True:
    operation, *numbers = parallel.broadcast(np.zeros(1 + len(_PHASES), np.int32)).tolist()
    counts = {name: count for name, count in zip(_PHASES, numbers, strict=True) if name in phases}
    if operation == Operation.STOP:
      return
    if operation == Operation.BEGIN:
      state = receive(init, jax.random.key(0))
      replay = receive(lambda: empty_replay(config, spec))
      epoch = programs.epoch.lower(state, replay, traced(counts)).compile()
    elif operation == Operation.ADD:
      replay = programs.add(replay, devices.distribute([_blank_chunk(config, spec)]))
    elif operation == Operation.EPOCH:
      state, _ = epoch(state, replay, traced(counts))
    else:
      programs.strips(state.params, replay, receive(jax.random.key_data, jax.random.key(0)))
    jax.block_until_ready((state, replay))  # In order: collectives of two programs must not meet.


def _blank_chunk(config: Config, spec: EnvSpec) -> Chunk:
  writer = ChunkWriter(num_streams=config.env.num_envs, size=CHUNK_SLOTS, observation_shape=spec.observation_shape)
  return writer.flush()
