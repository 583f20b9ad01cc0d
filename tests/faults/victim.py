"""Runs a program and prints a marker when it evaluates, begins an epoch or saves.

python victim.py PROGRAM [--flags]
"""

import contextlib
import pathlib
import runpy
import sys

from jedi_jax.runs import checkpoint
from jedi_jax.training import loop


def marked(name, function):
  """Wraps a function to print a marker before each call."""

  def wrapper(*args, **settings):
    with contextlib.suppress(OSError):  # A full disk.
      print(f"<{name}>", flush=True)
    return function(*args, **settings)

  return wrapper


def mark():
  """Makes the training of this process print markers."""
  loop.evaluate = marked("evaluating", loop.evaluate)
  loop.Trainer.run_epoch = marked("epoch", loop.Trainer.run_epoch)
  checkpoint.Checkpoints.save = marked("saving", checkpoint.Checkpoints.save)


if __name__ == "__main__":
  mark()
  sys.argv = sys.argv[1:]
  sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
  runpy.run_path(sys.argv[0], run_name="__main__")
