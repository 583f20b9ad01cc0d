"""Stopping a run by SIGTERM (a scheduler's warning) or SIGINT (Ctrl-C)."""

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
"""Exit status of a run that was stopped: EX_TEMPFAIL of sysexits.h, a temporary failure to be retried."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_DEBOUNCE = 3.0  # Seconds in which further signals count as the first one.


class Interruption:
  """A request to stop, which a run polls.

  A run that is requested to stop finishes its epoch if that takes at most `grace` seconds, saves and exits. A second
  request ends the grace.

  Attributes:
    grace: seconds from the request until the run stops wherever it is.
    margin: seconds after the grace until `on_signals` ends the process.
  """

  def __init__(self, grace: float = 0.0, margin: float = 2.0):
    self.grace, self.margin = grace, margin
    self._reason = ""
    self._since = self._deadline = float("inf")
    self._exiting = threading.Event()

  @property
  def stop_requested(self) -> bool:
    """Whether the run shall stop."""
    return bool(self._reason)

  @property
  def seconds_left(self) -> float:
    """Seconds until the run stops wherever it is; infinite without a request."""
    return self._deadline - time.monotonic()

  @property
  def exiting(self) -> bool:
    """Whether the run takes no more steps and only finishes its writes."""
    return self._exiting.is_set()

  @property
  def debouncing(self) -> bool:
    """Whether a signal now is a copy of the first: schedulers signal a program and its parent, which forwards it."""
    return 0.0 <= time.monotonic() - self._since < _DEBOUNCE

  def request_stop(self, reason: str) -> None:
    """Requests the run to stop; a second request, unless `debouncing`, ends the grace.

    Args:
      reason: for the message, such as 'SIGTERM'.
    """
    if self.debouncing:
      return
    now = time.monotonic()
    self._since = min(self._since, now)
    self._deadline = now + (0.0 if self._reason else self.grace)
    self._reason = reason

  def check(self) -> None:
    """Stops the run if the grace is over; called between steps, where the run can stop.

    Raises:
      Interrupted: if the grace is over.
    """
    if self.seconds_left <= 0:
      raise self._interrupted("before the end of its epoch")

  def begin_exit(self, where: str) -> Interrupted:
    """Marks the run as exiting, with unlimited time for its writes.

    Args:
      where: for the message, such as 'after epoch 3'.

    Returns:
      The exception to raise when everything is written.
    """
    self._exiting.set()
    return self._interrupted(where)

  def exit_if_overdue(self) -> None:
    """Marks the run as exiting if the grace is over; called when all of its threads have stopped."""
    if self.seconds_left <= 0:
      self._exiting.set()

  def _interrupted(self, where: str) -> Interrupted:
    return Interrupted(f"stopped by {self._reason} {where}; the same command continues from the last checkpoint")


@contextlib.contextmanager
def on_signals(grace: float, margin: float = 2.0) -> Iterator[Interruption]:
  """Requests a run to stop when SIGTERM or SIGINT arrives; to be entered in the main thread.

  Python calls signal handlers between bytecodes, so not during a call of the device: a thread receives the signals
  instead. The process ends with `INTERRUPTED_STATUS` if the run does not stop within grace and margin (during a long
  call or a compilation), or on a second signal, at least three seconds after the first, while the run is exiting. This
  is safe, since the last checkpoint is always complete.

  Args:
    grace: seconds for the run to finish its epoch.
    margin: seconds after the grace until the process ends.

  Yields:
    The `Interruption` that the run polls.
  """
  interruption = Interruption(grace, margin)
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  done = threading.Event()

  def listen() -> None:
    while not done.is_set():
      waits = interruption.stop_requested and not interruption.exiting
      timeout = max(interruption.seconds_left + interruption.margin, 0.0) if waits else None
      ready, _, _ = select.select([reader], [], [], timeout)
      number = os.read(reader, 1)[0] if ready else 0
      if number in SIGNALS and (interruption.debouncing or not interruption.exiting):
        interruption.request_stop(signal.Signals(number).name)
      elif (number in SIGNALS or (not ready and not interruption.exiting)) and not done.is_set():
        with contextlib.suppress(OSError):  # A full disk.
          print("stopped at once; the same command continues the run from its last checkpoint", file=sys.stderr)
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
