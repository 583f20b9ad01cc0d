"""Hosts: one run on the devices of several processes that `jax.distributed` connects.

The first process leads. It alone has environments, files, evaluation and the console. The others hold the distributed
state, the replay and the compiled programs. The leader announces each program before all processes launch it. Its data
goes to all of them (see `Devices.to_devices`), so they need no common file system, and a checkpoint is written once.
"""

import contextlib
import dataclasses
import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

import jax
import numpy as np

from jedi_jax.config import Updates
from jedi_jax.errors import DisconnectedError, Interrupted, TrainingError, UserError
from jedi_jax.training import parallel
from jedi_jax.training.parallel import Devices

_PHASES = tuple(field.name for field in dataclasses.fields(Updates))
_ENDS: tuple[type[Exception], ...] = (UserError, TrainingError, Interrupted, DisconnectedError)
"""How the leader may end otherwise than well; the last stands for all other exceptions."""
_BROKEN = re.compile(r"gloo|nccl|coordination service|connection (reset|closed|refused)", re.IGNORECASE)


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


@contextlib.contextmanager
def naming_losses() -> Iterator[None]:
  """A context in which an operation that fails because another process is gone becomes a `DisconnectedError`."""
  try:
    yield
  except (RuntimeError, ValueError) as error:
    if jax.process_count() == 1 or not _is_broken(error):
      raise
    raise DisconnectedError(f"another process of the run is gone ({' '.join(str(error).split())[:200]})") from error


def _is_broken(error: BaseException | None) -> bool:
  """Whether an operation failed because a connection to another process broke."""
  failed = isinstance(error, RuntimeError | ValueError) and not isinstance(error, UserError)
  return failed and bool(_BROKEN.search(str(error)))


class Leader:
  """Broadcasts which operation all processes launch next; a no-op with one process.

  As a context it stops the others at the end, after an exception too, and tells them how it ends. An exception within
  an operation leaves them in the middle of it, where no broadcast reaches them. Then the leader's process must end,
  which `jax.distributed` tells the others at once, as after a kill.

  Args:
    devices: of the run.
  """

  def __init__(self, devices: Devices):
    self._silent = devices.processes == 1 or jax.process_index() > 0
    self._between_operations = True

  def __enter__(self) -> "Leader":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
  ) -> None:
    if self._between_operations and not _is_broken(error):
      known = [number for number, own in enumerate(_ENDS) if isinstance(error, own)]
      self._send(Operation.STOP, [0 if error is None else 1 + (known or [len(_ENDS) - 1])[0]])

  @contextlib.contextmanager
  def announce(self, operation: Operation, counts: Mapping[str, int] | None = None) -> Iterator[None]:
    """A context in which all processes launch an operation, of an update with these counts by phase."""
    self._between_operations = False
    counts = counts or {}
    self._send(operation, [counts.get(name, 0) for name in _PHASES])
    yield
    self._between_operations = True

  def _send(self, operation: Operation, numbers: Sequence[int]) -> None:
    if not self._silent:
      message = np.zeros(1 + len(_PHASES), np.int32)
      message[: 1 + len(numbers)] = [operation, *numbers]
      parallel.broadcast(message)


def receive() -> tuple[Operation, dict[str, int]]:
  """Waits, in a process that does not lead, for the next operation of the leader, and its counts by phase.

  Raises:
    UserError, TrainingError, Interrupted or DisconnectedError: if the leader ends otherwise than well.
  """
  operation, *numbers = parallel.broadcast(np.zeros(1 + len(_PHASES), np.int32)).tolist()
  if operation == Operation.STOP and numbers[0]:
    raise _ENDS[numbers[0] - 1]("the first process of the run ended; its output says why")
  return Operation(operation), dict(zip(_PHASES, numbers, strict=True))
