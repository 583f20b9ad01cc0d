"""Checks for leaks: samples the process's memory, files and threads while it trains, evaluates and saves.

  python benchmarks/soak.py --minutes=30 --figure=benchmarks/results/soak_cpu.png
  python benchmarks/soak.py --minutes=0 --resets=0 --saves=300 --name=soak_saves_cpu

The benchmark has up to three parts:
  A run of preset debug, whose tiny networks allow many epochs, is interrupted after --minutes. Every evaluation makes
    and closes environments. Sampled after every epoch.
  Environments are made, reset, stepped and closed --resets times. Sampled at every tenth.
  A checkpoint of 150 small arrays and a large one is written --saves times. Sampled at every tenth, and again after
    `malloc_trim`, which returns the C library's free memory, so that the rest is in use.
A sample holds resident memory, open files, threads, and the bytes of live arrays on the device.

Growth is the slope of a line through the samples without the first fifth, in which caches fill, per hour. The medians
of the second and of the last fifth are reported too. The result is written to benchmarks/results/soak_<platform>.json.
"""

import ctypes
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import record
from absl import flags

import jedi_jax
from jedi_jax import config as config_lib
from jedi_jax import envs
from jedi_jax.runs import figures, program, workdir
from jedi_jax.runs.checkpoint import Checkpoints
from jedi_jax.runs.console import Console
from jedi_jax.runs.interruption import Interruption
from jedi_jax.training.parallel import Devices

_ENV = flags.DEFINE_string("env", "atari/Breakout", "Environment.")
_MINUTES = flags.DEFINE_float("minutes", 30.0, "Minutes of training.", lower_bound=0.0)
_RESETS = flags.DEFINE_integer("resets", 1_000, "Environments to make, reset and close.", lower_bound=0)
_SAVES = flags.DEFINE_integer("saves", 0, "Checkpoints to write.", lower_bound=0)
_NAME = flags.DEFINE_string("name", None, "Name of the record; soak_<platform> if left out.")
_SET = flags.DEFINE_multi_string("set", [], "Overrides a setting of preset debug; may be repeated.")
_FIGURE = flags.DEFINE_string("figure", None, "PNG file for a figure of the samples.")

_MAX_SAMPLES = 600  # About the maximum number of samples in the record.


class _Watch(Console):
  """Samples the process whenever the run logs an epoch, and interrupts the run when the time is over."""

  def __init__(self, interruption: Interruption, seconds: float):
    super().__init__()
    self.samples: list[dict[str, float]] = []
    self._interruption, self._seconds = interruption, seconds
    self.start = time.monotonic()

  def log(self, text: str) -> None:
    if not text.startswith("epoch "):
      super().log(text)
      return
    if not self.samples:
      self.start = time.monotonic()  # Excludes compilation.
    self.sample()
    if len(self.samples) % 100 == 1:
      super().log(text)
    if self.samples[-1]["seconds"] > self._seconds and not self._interruption.stop_requested:
      self._interruption.request_stop("the clock")

  def sample(self) -> None:
    """Takes a sample."""
    self.samples.append(
      {
        "seconds": time.monotonic() - self.start,
        "resident MiB": _resident() / 2**20,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "device MiB": sum(x.nbytes for x in jax.live_arrays()) / 2**20,
      }
    )


def main() -> None:
  """Runs the benchmark."""
  started = record.machine()
  rows = [
    *(_train() if _MINUTES.value else ()),
    *(_reset() if _RESETS.value else ()),
    *(_save() if _SAVES.value else ()),
  ]
  columns = dict.fromkeys(name for row in rows for name in row if name != "samples")
  print(record.table(rows, list(columns)))
  name = _NAME.value or f"soak_{jax.default_backend()}"
  print(f"written to {record.write(name, rows, started=started)}")
  if _FIGURE.value:
    _draw(rows, pathlib.Path(_FIGURE.value))


def _train() -> Iterator[dict[str, Any]]:
  """Trains until the time is over."""
  config = config_lib.make_config(
    env=_ENV.value,
    preset="debug",
    overrides={"collect.total_steps": 10**7, "checkpoint.interval_epochs": 10},
  )
  config = config_lib.override(config, dict(config_lib.split_override(text) for text in _SET.value))
  interruption = Interruption(grace=600.0)
  watch = _Watch(interruption, 60.0 * _MINUTES.value)
  with tempfile.TemporaryDirectory() as directory:
    program.enable_compilation_cache()
    try:
      jedi_jax.train(config, directory, devices=Devices.take(1), console=watch, interruption=interruption)
    except jedi_jax.Interrupted as stopped:
      print(stopped)
    records = workdir.read_metrics(pathlib.Path(directory, "metrics.jsonl"))
  evaluations = sum("evaluation/return" in values for values in records)
  yield summary("training and evaluation", watch.samples, epochs=len(watch.samples), evaluations=evaluations)


def _reset() -> Iterator[dict[str, Any]]:
  """Makes, resets, steps and closes environments."""
  watch = _Watch(Interruption(), 0.0)
  for done in range(1, _RESETS.value + 1):
    env = envs.make(_ENV.value, num_envs=2, seed=done, life_loss_ends=True, max_episode_steps=100)
    env.reset()
    env.step(np.zeros(2, np.int32))
    env.close()
    if done % 10 == 0:
      watch.sample()
  yield summary("resets of environments", watch.samples, resets=_RESETS.value)


def _save() -> Iterator[dict[str, Any]]:
  """Writes checkpoints; samples before and after `malloc_trim`."""
  watch, trimmed = _Watch(Interruption(), 0.0), _Watch(Interruption(), 0.0)
  state: dict[str, np.ndarray] = {str(i): np.full((100, 10), 0.1 * i) for i in range(150)}
  state["large"] = np.zeros(2**24, np.uint8)
  with tempfile.TemporaryDirectory() as directory:
    checkpoints = Checkpoints(directory, keep=2)
    for done in range(1, _SAVES.value + 1):
      checkpoints.save(done, params={"x": np.zeros(100)}, state=state)
      checkpoints.wait()
      if done % 10 == 0:
        watch.sample()
        ctypes.CDLL(None).malloc_trim(0)
        trimmed.sample()
    checkpoints.close()
  yield summary("saves", watch.samples, saves=_SAVES.value)
  yield summary("saves, after malloc_trim", trimmed.samples, saves=_SAVES.value)


def summary(what: str, samples: list[dict[str, float]], **counts: int) -> dict[str, Any]:
  """Summarises samples, without trends of fewer than five, and thins them out to about `_MAX_SAMPLES`."""
  fifths = [samples[len(samples) * i // 5 : len(samples) * (i + 1) // 5] for i in range(5)]
  row: dict[str, Any] = {"what": what, **counts, "samples": samples[:: max(len(samples) // _MAX_SAMPLES, 1)]}
  if len(samples) < 5:
    return row
  row["minutes"] = samples[-1]["seconds"] / 60
  settled = [sample for fifth in fifths[1:] for sample in fifth]
  hours = np.asarray([sample["seconds"] for sample in settled]) / 3600
  for name in ("resident MiB", "device MiB", "files", "threads"):
    values = [sample[name] for sample in settled]
    row[f"{name}, second fifth"] = statistics.median(sample[name] for sample in fifths[1])
    row[f"{name}, last fifth"] = statistics.median(sample[name] for sample in fifths[4])
    row[f"{name}, growth an hour"] = float(np.polyfit(hours, values, 1)[0])
  return row


def _draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  plt = figures.pyplot(path)
  if plt is None:
    return
  names = ("resident MiB", "device MiB", "files", "threads")
  figure, grid = plt.subplots(len(names), len(rows), sharex="col", figsize=(6 * len(rows), 8), squeeze=False)
  for column, row in enumerate(rows):
    minutes = [sample["seconds"] / 60 for sample in row["samples"]]
    grid[0, column].set_title(row["what"])
    grid[-1, column].set_xlabel("minutes")
    for axes, name in zip(grid[:, column], names, strict=True):
      values = [sample[name] for sample in row["samples"]]
      axes.plot(minutes, values, linewidth=1)
      axes.set_ylim(0, 1.1 * max(values))
      axes.set_ylabel(name)
  figure.tight_layout()
  figures.save(figure, path)


def _resident() -> int:
  """Returns the resident memory of the process in bytes."""
  return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
  program.run(main, __doc__ or "")
