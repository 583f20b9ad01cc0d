"""Runs a program as its user would, and says on standard output when it is where it can be hurt.

python victim.py PROGRAM [--flags]
"""

import pathlib
import runpy
import sys

from jedi_jax.runs import checkpoint
from jedi_jax.training import loop


def told(name, function):
  """The function, which says its name before it begins."""

  def telling(*args, **settings):
    print(f"<{name}>", flush=True)
    return function(*args, **settings)

  return telling


loop.evaluate = told("evaluating", loop.evaluate)
loop.Trainer.run_epoch = told("epoch", loop.Trainer.run_epoch)
checkpoint.Checkpoints.save = told("saving", checkpoint.Checkpoints.save)

sys.argv = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
