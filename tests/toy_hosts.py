"""Starts the training program in processes that `jax.distributed` connects."""

import os
import pathlib
import re
import socket
import subprocess
import sys

TRAIN = str(pathlib.Path(__file__).parents[1] / "experiments" / "train.py")

LAST_BEFORE = 3
"""The leader is stopped within the epoch after this one; the last checkpoint is that of epoch 2."""

# What runs a program in a process.
DRIVER = f"""
import runpy, sys
from jedi_jax.training import loop

_, how, *sys.argv = sys.argv

def stop(trainer, counts, number, *, split, update=loop.Trainer.update):
  if number > {LAST_BEFORE}:
    raise KeyboardInterrupt
  return update(trainer, counts, number, split=split)

if "toy" in how:
  import toy_epoch
if "stop" in how:
  loop.Trainer.update = stop
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def text(value):
  return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def flags_of(overrides):
  return ["--env=catch", "--preset=debug", *(f"--set={name}={text(value)}" for name, value in overrides.items())]


def free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def environment(devices=1):
  """The variables of a process with so many devices that finds `toy_epoch`."""
  flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
  path = f"{pathlib.Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
  return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def start(*argv, devices, code=DRIVER, before=(), **settings):
  """Starts the code with these arguments in a process with so many devices; `before` starts the interpreter."""
  return subprocess.Popen(
    [*before, sys.executable, "-c", code, *argv],
    **{"env": environment(devices), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    | settings,
  )  # fmt: skip
