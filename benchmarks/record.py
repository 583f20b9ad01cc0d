"""Shared by all benchmarks: timing, description of the machine, and JSON records in benchmarks/results."""

import datetime
import fcntl
import json
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import flax
import jax
import jaxlib
import numpy as np

from jedi_jax.tables import markdown_table

RESULTS = pathlib.Path(__file__).parent / "results"


def seconds(function: Callable[[], Any], *, repeats: int, warmup: int = 1) -> list[float]:
  """Times calls of a function, including the wait for its result; discards the first `warmup` calls."""
  times = []
  for i in range(warmup + repeats):
    start = time.perf_counter()
    jax.block_until_ready(function())
    if i >= warmup:
      times.append(time.perf_counter() - start)
  return times


def in_turn(
  cases: Sequence[Mapping[str, Callable[[], Any]]],
  *,
  repeats: int,
  warmup: int = 1,
  clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, list[float]]]:
  """Times several cases in turn, so that other load on the machine affects all of them alike.

  Args:
    cases: calls by name, which wait for their results; all cases have the same names.
    repeats: number of timed rounds.
    warmup: number of rounds before them that are discarded.
    clock: returns the time in seconds.

  Returns:
    The seconds of each timed round, by case and name.

  Programs that share `BENCHMARK_TURNS` wait here for one another; see `_Turns`.
  """
  _turns.wait()
  times: list[dict[str, list[float]]] = [{name: [] for name in case} for case in cases]
  for i in range(warmup + repeats):
    for name in cases[0]:
      for case, taken in zip(cases, times, strict=True):
        start = clock()
        case[name]()
        if i >= warmup:
          taken[name].append(clock() - start)
  return times


def is_free(file: IO[str], lock: int) -> bool:
  """Whether a lock of a file, `fcntl.LOCK_SH` or `fcntl.LOCK_EX`, can be had at once; it is not kept."""
  try:
    fcntl.flock(file, lock | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  fcntl.flock(file, fcntl.LOCK_UN)
  return True


class _Turns:
  """Lets programs that were started together compile at the same time and be timed one after the other.

  The environment variable `BENCHMARK_TURNS` is '<file>:<seconds>': a file whose locks tell the programs of one another,
  and the time since the epoch after which a program no longer waits for those that are not ready.
  """

  def __init__(self) -> None:
    path, _, deadline = os.environ.get("BENCHMARK_TURNS", "").rpartition(":")
    self._files = [open(f"{path}.{name}", "a") for name in ("ready", "turn")] if path else []  # noqa: SIM115
    self._deadline = float(deadline) if path else 0.0

  def join(self) -> None:
    """Tells the others that this program is not ready yet."""
    if self._files:
      fcntl.flock(self._files[0], fcntl.LOCK_SH)

  def wait(self) -> None:
    """Waits until all others are ready, and then for this program's turn, which lasts until it ends."""
    if not self._files:
      return
    ready, turn = self._files
    fcntl.flock(ready, fcntl.LOCK_UN)
    while time.time() < self._deadline and not is_free(ready, fcntl.LOCK_EX):
      time.sleep(random.uniform(0.2, 0.6))  # Two that try at once hinder each other.
    fcntl.flock(turn, fcntl.LOCK_EX)


_turns = _Turns()


def machine() -> dict[str, Any]:
  """Describes the machine and the versions of libraries."""
  _turns.join()
  device = jax.devices()[0]
  return {
    "device": f"{device.platform} {device.device_kind}",
    "devices": jax.device_count(),
    "cpu": _cpu_name(),
    "cores": os.cpu_count(),
    "load_before": [round(x, 2) for x in os.getloadavg()],
    "python": platform.python_version(),
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "flax": flax.__version__,
    "numpy": np.__version__,
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
  }


def write(name: str, rows: list[dict[str, Any]], *, started: dict[str, Any]) -> pathlib.Path:
  """Writes measurements with command, commit, date and machine to benchmarks/results/<name>.json.

  Args:
    name: name of the record.
    rows: measurements as JSON values.
    started: result of `machine()` before the measurements.

  Returns:
    The path of the file.
  """
  path = RESULTS / f"{name}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  record = {
    "command": " ".join(["python", os.path.relpath(sys.argv[0], RESULTS.parent.parent), *sys.argv[1:]]),
    "commit": commit(),
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "machine": started,
    "rows": rows,
  }
  path.write_text(json.dumps(record, indent=1) + "\n")
  return path


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
  """Formats rows as a Markdown table; a list of seconds becomes its median in milliseconds."""

  def cell(value: Any) -> str:
    if isinstance(value, list):
      return f"{1e3 * statistics.median(value):.2f} ms"
    return f"{value:.3g}" if isinstance(value, float) else str(value)

  return markdown_table([columns, *([cell(row.get(column, "")) for column in columns] for row in rows)])


def _cpu_name() -> str:
  try:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  except OSError:
    pass
  return platform.processor() or platform.machine()


def commit() -> str:
  """Returns the commit of the code, with the suffix `-dirty` if files other than records have changed."""

  def git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=RESULTS.parent, capture_output=True, text=True, check=True).stdout.strip()

  try:
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude){RESULTS.name}")
    return git("describe", "--always") + ("-dirty" if changed else "")
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
