"""Being told to stop: SIGTERM, as a scheduler sends before it takes the machine, and SIGINT (Ctrl-C)."""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

from jedi_jax.errors import Interrupted

INTERRUPTED_STATUS = 75
"""Exit status of a run that was told to stop: EX_TEMPFAIL of sysexits.h, to be tried again."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME = 3.0  # Seconds after the first signal in which others are taken for the same.


class Interruption:
  """What a run asks now and then: whether it was told to stop, and whether it may still finish its epoch.

  Attributes:
    grace: seconds from being told until the run stops wherever it is.
    margin: seconds beyond the grace that the step at hand may take.
  """

  def __init__(self, grace: float = 0.0, margin: float = 2.0):
    self.grace, self.margin = grace, margin
    self._reason = ""
    self._since = self._deadline = float("inf")
    self._leaving = threading.Event()

  @property
  def asked(self) -> bool:
    """Whether the run was told to stop; it does so after its epoch, if that ends in time."""
    return bool(self._reason)

  @property
  def seconds_left(self) -> float:
    """Seconds until the run stops wherever it is; infinite if it was not told to."""
    return self._deadline - time.monotonic()

  @property
  def leaving(self) -> bool:
    """Whether the run is on its way out: it takes no more steps and finishes what it writes."""
    return self._leaving.is_set()

  @property
  def repeats(self) -> bool:
    """Whether a signal now would be the same one once more, as schedulers tell a program and its parent at once."""
    return 0.0 <= time.monotonic() - self._since < _SAME

  def ask(self, reason: str) -> None:
    """Tells the run to stop; the second time, some seconds later, without finishing its epoch."""
    if self.repeats:
      return
    now = time.monotonic()
    self._since = min(self._since, now)
    self._deadline = now + (0.0 if self._reason else self.grace)
    self._reason = reason

  def check(self) -> None:
    """Stops here if the time is over; called between steps, where nothing is half done.

    Raises:
      Interrupted: if it is.
    """
    if self.seconds_left <= 0:
      raise self._stopped("before the end of its epoch")

  def leave(self, where: str) -> Interrupted:
    """The run stops here, and takes the time to finish what it writes; returns the exception to raise."""
    self._leaving.set()
    return self._stopped(where)

  def finish(self) -> None:
    """A run whose time is over takes no more steps, in none of its threads, and finishes what it writes."""
    if self.seconds_left <= 0:
      self._leaving.set()

  def _stopped(self, where: str) -> Interrupted:
    return Interrupted(f"stopped by {self._reason} {where}; the same command continues from the last checkpoint")


@contextlib.contextmanager
def on_signals(grace: float, margin: float = 2.0) -> Iterator[Interruption]:
  """A context in which SIGTERM and SIGINT ask a run to stop, in the main thread of a program.

  Python runs a signal's handler between its own instructions, and a call of the device is none, so a thread hears of
  the signal. If the run reaches no point where it can stop until some seconds after the grace (a long call, or a
  compilation), the process ends there with `INTERRUPTED_STATUS`: the last checkpoint is whole at any moment. So does
  another signal, three seconds after the first or later, to a run that is already leaving.

  Args:
    grace: seconds that the run may take to finish its epoch.
    margin: seconds beyond.
  """
  interruption = Interruption(grace, margin)
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  done = threading.Event()

  def listen() -> None:
    while not done.is_set():
      waits = interruption.asked and not interruption.leaving
      left = max(interruption.seconds_left + interruption.margin, 0.0) if waits else None
      heard, _, _ = select.select([reader], [], [], left)
      number = os.read(reader, 1)[0] if heard else 0
      if number in SIGNALS and (interruption.repeats or not interruption.leaving):
        interruption.ask(signal.Signals(number).name)
      elif (number in SIGNALS or (not heard and not interruption.leaving)) and not done.is_set():
        print("stopped in a hurry; the same command continues the run from its last checkpoint", file=sys.stderr)
        sys.stderr.flush()
        os._exit(INTERRUPTED_STATUS)

  thread = threading.Thread(target=listen, name="signals", daemon=True)
  handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
  wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  thread.start()
  try:
    yield interruption
  finally:
    done.set()
    signal.set_wakeup_fd(wakeup)
    for number, handler in handlers.items():
      signal.signal(number, handler)
    os.write(writer, b"\0")  # Wakes the thread.
    thread.join()
    os.close(reader)
    os.close(writer)
