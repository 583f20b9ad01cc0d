import io
import os
import time

import pytest

from jedi_jax.runs.console import Console


@pytest.mark.parametrize("live", [False, True])
def test_write_errors_are_ignored(live, monkeypatch):
  stream = open("/dev/full", "w")  # noqa: SIM115 - closing fails too.
  console = Console(stream, interval=0.0)
  console._live = live
  monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((80, 24)))
  for _ in range(2):
    console.show("task", 1, 2)
    console.log("text")
  with pytest.raises(OSError, match="No space left"):
    stream.close()


def test_progress_prints_plain_lines_at_intervals(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  stream = io.StringIO()
  console = Console(stream, interval=30.0)
  for i in range(70):
    console.show("collecting", i, 70)
    now[0] += 1.0
  console.log("done")
  assert stream.getvalue().splitlines() == ["collecting 0/70", "collecting 30/70", "collecting 60/70", "done"]
  assert "\r" not in stream.getvalue()


class Terminal(io.StringIO):
  """A terminal with lines of `columns` characters; `screen` returns its contents."""

  columns = 80

  def isatty(self):
    return True

  def fileno(self):
    return 99

  def screen(self):
    lines, row, column = [[" "] * self.columns], 0, 0
    for character in self.getvalue():
      if character == "\r":
        column = 0
        continue
      if character == "\n" or column == self.columns:
        row, column = row + 1, 0
        lines += [[" "] * self.columns] if row == len(lines) else []
      if character != "\n":
        lines[row][column] = character
        column += 1
    return ["".join(line).rstrip() for line in lines]


def terminal(monkeypatch, columns):
  stream = Terminal()
  stream.columns = columns
  monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((columns, 24)))
  return stream


def test_progress_rewrites_one_line_on_a_terminal(monkeypatch):
  stream = terminal(monkeypatch, 120)
  console = Console(stream)
  for i in range(1001):
    console.show("updates", i, 1000, "(denoiser)")
  assert stream.screen() == ["[####################] updates 1,000/1,000 (denoiser)"]
  console.show("empty", 0, 0)
  assert stream.screen() == ["[....................] empty 0/0"]
  console.log("epoch 1")
  assert stream.screen() == ["epoch 1", ""]


@pytest.mark.parametrize("columns", [80, 200])
def test_progress_clears_exactly_its_line(monkeypatch, columns):
  stream = terminal(monkeypatch, columns)
  console = Console(stream)
  console.show("updates", 1, 2, "x" * 150)
  console.log("epoch 1")
  assert stream.screen() == ["epoch 1", ""]
