"""The console of a run: lines that stay, and one line of progress."""

import contextlib
import math
import os
import sys
import time
from typing import TextIO


class Console:
  """One line that is rewritten on a terminal; elsewhere a plain line every so often.

  A stream that takes nothing any more (a log on a full disk, a closed terminal) is no reason to end a run.

  Args:
    stream: where to write.
    interval: seconds between plain lines.
  """

  def __init__(self, stream: TextIO | None = None, *, interval: float = 30.0):
    self._stream = sys.stdout if stream is None else stream
    self._live = self._stream.isatty()
    self._interval = interval
    self._last = -math.inf
    self._shown = 0  # Width of the line that is being rewritten.

  def log(self, text: str) -> None:
    """Writes a line that stays."""
    with contextlib.suppress(OSError):
      self._clear()
      print(text, file=self._stream, flush=True)

  def show(self, task: str, done: int, total: int, detail: str = "") -> None:
    """Shows how far a task is; `done` and `total` count the same thing."""
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
