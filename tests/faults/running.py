"""Runs the training program in subprocesses that tests can kill, and compares checkpoints."""

import contextlib
import pathlib
import subprocess
import sys
from collections.abc import Iterator

from jedi_jax.runs import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
VICTIM, TRAIN = str(pathlib.Path(__file__).with_name("victim.py")), str(ROOT / "experiments" / "train.py")


def command(flags, directory):
  """Returns the command line of the training program in `victim.py`."""
  return [sys.executable, VICTIM, TRAIN, *flags, f"--workdir={directory}"]


@contextlib.contextmanager
def process(argv) -> Iterator[subprocess.Popen]:
  """Starts a process with stdout and stderr in one stream, and kills it at the end of the context."""
  with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1) as running:
    try:
      yield running
    finally:
      running.kill()


def until(running, marker, count=1):
  """Reads lines until a marker has appeared `count` times; returns the lines, and whether it has."""
  lines = []
  for line in running.stdout:
    lines.append(line.rstrip("\n"))
    count -= lines[-1] == marker
    if not count:
      return lines, True
  return lines, False


def to_the_end(argv):
  """Runs a process to its end and returns its status and lines."""
  with process(argv) as running:
    lines, _ = until(running, None)
    return running.wait(), lines


def newest(directory):
  """Returns the path of the newest checkpoint of a run."""
  return max((directory / "checkpoints" / "latest").iterdir(), key=lambda path: int(path.name))


def arrays(path):
  """Returns all arrays of a checkpoint by name, except the wall time."""
  found = checkpoint.read(path.parent, int(path.name))
  return {name: x for name, x in found.items() if name != "state/progress/seconds"}


def assert_equal_bit_for_bit(ours, theirs):
  """Compares two dictionaries of arrays."""
  assert ours.keys() == theirs.keys()
  for name, x in ours.items():
    assert (x.dtype, x.shape) == (theirs[name].dtype, theirs[name].shape), name
    assert x.tobytes() == theirs[name].tobytes(), name
