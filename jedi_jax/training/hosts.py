"""Hosts: one run on the devices of several processes that `jax.distributed` connects.

The first process leads. It alone has environments, files, evaluation and the console. The others hold the distributed
state, the replay and the compiled programs. The leader announces each program before all processes launch it. Its data
goes to all of them (see `Devices.to_devices`), so they need no common file system, and a checkpoint is written once.
"""

import contextlib
import dataclasses
import enum
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from jedi_jax.config import Updates
from jedi_jax.training import parallel
from jedi_jax.training.parallel import Devices

_PHASES = tuple(field.name for field in dataclasses.fields(Updates))


class Operation(enum.IntEnum):
  """What all processes do together: leave, or call the method of `Learner` with this name."""

  STOP = 0
  START = 1
  ADD = 2
  UPDATE = 3
  WATCH = 4


def warm_up_collectives(devices: Devices) -> None:
  """Connects the devices of all processes at a point where all are idle.

  Collectives connect at their first use and give up after 30 seconds. Once connected, a process may keep the others
  waiting.
  """
  if devices.processes > 1:
    jax.block_until_ready(devices.map(parallel.total)(devices.to_devices([np.zeros((), np.float32)])))


class Leader:
  """Broadcasts which operation all processes launch next; a no-op with one process.

  As a context it stops the others at the end, after an exception too. An exception within an operation leaves them in
  the middle of it, where no broadcast reaches them. Then the leader's process must end, and the heartbeat of
  `jax.distributed` ends the others within some minutes, as after a kill.

  Args:
    devices: of the run.
  """

  def __init__(self, devices: Devices):
    self._silent = devices.processes == 1 or jax.process_index() > 0
    self._between_operations = True

  def __enter__(self) -> "Leader":
    return self

  def __exit__(self, *_: object) -> None:
    if self._between_operations:
      self._send(Operation.STOP, {})

  @contextlib.contextmanager
  def announce(self, operation: Operation, counts: Mapping[str, int] | None = None) -> Iterator[None]:
    """A context in which all processes launch an operation, of an update with these counts by phase."""
    self._between_operations = False
    self._send(operation, counts or {})
    yield
    self._between_operations = True

  def _send(self, operation: Operation, counts: Mapping[str, int]) -> None:
    if not self._silent:
      parallel.broadcast(np.asarray([operation, *(counts.get(name, 0) for name in _PHASES)], np.int32))


def receive() -> tuple[Operation, dict[str, int]]:
  """Waits, in a process that does not lead, for the next operation of the leader, and its counts by phase."""
  operation, *numbers = parallel.broadcast(np.zeros(1 + len(_PHASES), np.int32)).tolist()
  return Operation(operation), dict(zip(_PHASES, numbers, strict=True))
