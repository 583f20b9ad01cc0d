"""The console of a run: permanent lines and one progress line."""

import contextlib
import math
import os
import sys
import time
from typing import TextIO


class Console:
  """Prints log lines and progress.

  On a terminal, progress is one line that is rewritten; elsewhere it is a plain line every `interval` seconds. Write
  errors (a full disk, a closed terminal) are ignored, so that they do not end a run.

  Args:
    stream: the stream to print to; standard output if None.
    interval: seconds between plain lines of progress.
  """

  def __init__(self, stream: TextIO | None = None, *, interval: float = 30.0):
    self._stream = sys.stdout if stream is None else stream
    self._live = self._stream.isatty()
    self._interval = interval
    self._last = -math.inf
    self._shown = 0  # Width of the progress line on the terminal.

  def log(self, text: str) -> None:
    """Prints a permanent line."""
    with contextlib.suppress(OSError):
      self._clear()
      print(text, file=self._stream, flush=True)

  def show(self, task: str, done: int, total: int, detail: str = "") -> None:
    """Shows the progress of a task; `done` and `total` have the same unit."""
    with contextlib.suppress(OSError):
      self._show(f"{task} {done:,}/{total:,}" + (f" {detail}" if detail else ""), done / max(total, 1))

  def _show(self, text: str, share: float) -> None:
    if self._live:
      width = min(os.get_terminal_size(self._stream.fileno()).columns or 80, 200)
      filled = round(20 * min(share, 1.0))
      line = f"[{'#' * filled}{'.' * (20 - filled)}] {text}"
      self._stream.write("\r" + line[: width - 1].ljust(width - 1))
      self._stream.flush()
      self._shown = width - 1
    elif time.monotonic() - self._last >= self._interval:
      self._last = time.monotonic()
      print(text, file=self._stream, flush=True)

  def _clear(self) -> None:
    if self._shown:
      self._stream.write("\r" + " " * self._shown + "\r")
      self._shown = 0
