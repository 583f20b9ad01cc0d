"""Measures on a GPU what waits for one, in order of worth, within the minutes that it is at hand.

  python benchmarks/on_gpu.py --minutes=9 --out=gpu --work=/tmp/gpu

Each item is a program of its own. Its outcome is written as soon as it ends, and a later call goes on with the items
that have not succeeded. All start together, since most of a benchmark's time is compilation. The benchmarks are timed
in turn, once all have compiled or --wait seconds have passed, and the learning runs stand still meanwhile:

  smoke: tests of networks, operations and updates.
  kernel: convolution.py --kernel.
  jedi, diamond: throughput.py, one run, bfloat16, with peak memory, launches and the busy time of each update.
  lax: jedi with XLA's convolutions in imagination.
  chunk: jedi with encoder.chunk=208.
  packed: jedi with 8 packed runs.
  float32: jedi in float32.
  torch: against_torch.py, where --diamond_repo names a clone.
  learn: train.py on --games, --seeds of each; `learn_2` and so on are programs of games whose observations have another
    shape. The runs stay in --work and go on.

Flags of throughput.py and against_torch.py that are given apply to these. --out has a log and, where there is one, a
record of each item; summary.json, and of the runs metrics and results. With --preset=debug all but `kernel` runs on a
CPU.
"""

import concurrent.futures
import dataclasses
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import against_torch  # noqa: F401
import record
from absl import flags

from jedi_jax import envs
from jedi_jax.errors import UserError, nearest
from jedi_jax.runs import program

_MINUTES = flags.DEFINE_float("minutes", 9.0, "Minutes of this call.", lower_bound=0.1)
_OUT = flags.DEFINE_string("out", "gpu", "Directory of logs and records.")
_WORK = flags.DEFINE_string("work", None, "Directory of the learning runs; <out>/work by default.")
_WAIT = flags.DEFINE_float("wait", 200.0, "Seconds after which benchmarks that are ready are timed.", lower_bound=0.0)
_ITEMS = flags.DEFINE_list("items", [], "Items to run; all by default.")
_GAMES = flags.DEFINE_list("games", ["atari/Krull", "atari/Boxing", "atari/Pong", "atari/Breakout"], "Games to learn.")
_SEEDS = flags.DEFINE_integer("seeds", 1, "Seeds of each game.", lower_bound=1, upper_bound=1_000)
_LEARN_PRESET = flags.DEFINE_string("learn_preset", None, "Preset of the learning runs; --preset by default.")
_LEARN_SET = flags.DEFINE_multi_string(
  "learn_set",
  ["precision.compute_dtype=bfloat16"],
  "Overrides a setting of the learning runs, in the place of the default; may be repeated.",
)
_FLAGS = flags.FLAGS

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_RESERVE = 25.0
"""Seconds of a call that are kept for writing."""
_GRACE = 15.0
"""Seconds that an item has to end after SIGTERM."""


@dataclasses.dataclass(frozen=True)
class Item:
  """One program.

  Attributes:
    name: of its log and record.
    command: its arguments.
    resumes: whether it goes on where it was interrupted, so that it never counts as done, and stands still while
      another one is timed.
  """

  name: str
  command: Sequence[str]
  resumes: bool = False


def items(out: pathlib.Path, work: pathlib.Path) -> list[Item]:
  """Returns all items that the flags allow, in order of worth."""

  def benchmark(name: str, script: str, *arguments: str) -> Item:
    place = f"--name={(out / name).resolve()}"
    return Item(name, (f"benchmarks/{script}.py", *_given(script), place, *arguments))

  jedi, narrow = ("throughput", "--variants=jedi", "--updates=10"), "--dtype=bfloat16"
  tests = ("-m", "pytest", "-x", "-o", "addopts=", "tests/nn", "tests/ops", "tests/training/test_updates.py")
  found = [
    Item("smoke", tests),
    Item("kernel", ("benchmarks/convolution.py", "--kernel", "--loop=200", f"--name={(out / 'kernel').resolve()}")),
    benchmark("jedi", *jedi, narrow, "--launches"),
    benchmark("diamond", "throughput", "--variants=diamond", "--updates=10", narrow, "--launches"),
    benchmark("lax", *jedi, narrow, "--set=precision.convolution=lax", "--launches"),
    benchmark("chunk", *jedi, narrow, "--set=encoder.chunk=208", "--launches"),
    benchmark("packed", *jedi, narrow, "--runs=8"),
    benchmark("float32", *jedi),
  ]
  if _FLAGS.diamond_repo:
    found.append(benchmark("torch", "against_torch", "--variants=jedi"))
  return [*found, *_learning(work)]


def _given(script: str) -> list[str]:
  """Returns the flags of throughput.py, and of the script, that were given to this program."""
  modules = _FLAGS.flags_by_module_dict()
  known = {flag.name: flag for name in ("throughput", script) for flag in modules.get(name, ())}
  return [text for flag in known.values() if flag.present for text in flag.serialize().split("\n")]


def _learning(work: pathlib.Path) -> Iterator[Item]:
  """Yields a program for the games of each shape of observations."""
  shapes: dict[Any, list[str]] = {}
  for game in _GAMES.value:
    shapes.setdefault(envs.spec(game).observation_shape, []).append(game)
  preset = _LEARN_PRESET.value or _FLAGS.preset
  settings = [f"--set={text}" for text in ("collect.overlap=true", *_LEARN_SET.value)]
  for number, games in enumerate(shapes.values(), start=1):
    name = "learn" if number == 1 else f"learn_{number}"
    place = (f"--workdir={work.resolve() / name}", f"--grace={_GRACE - 5}")
    command = ("experiments/train.py", f"--env={','.join(games)}", f"--runs={_SEEDS.value}", f"--preset={preset}")
    yield Item(name, (*command, *settings, *place), resumes=True)


def main() -> None:
  """Runs the items."""
  deadline = time.monotonic() + 60 * _MINUTES.value - _RESERVE
  out = pathlib.Path(_OUT.value)
  work = pathlib.Path(_WORK.value) if _WORK.value else out / "work"
  known = {item.name: item for item in items(out, work)}
  for name in _ITEMS.value:
    if name not in known:
      raise UserError(f"--items: no item {name!r}{nearest(name, known)}")
  out.mkdir(parents=True, exist_ok=True)
  path = out / "summary.json"
  done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
  chosen = [known[name] for name in _ITEMS.value or known]
  # Programs that share a GPU must not take all of its memory at their start.
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  os.environ["BENCHMARK_TURNS"] = f"{(out / 'turns').resolve()}:{time.time() + _WAIT.value}"
  left = [item for item in chosen if item.resumes or done.get(item.name, {}).get("status") != 0]
  with concurrent.futures.ThreadPoolExecutor(max(1, len(left))) as pool:
    futures = {pool.submit(run_item, item, out, deadline - time.monotonic()): item for item in left}
    for future in concurrent.futures.as_completed(futures):
      item, outcome = futures[future], future.result()
      done[item.name] = outcome
      path.write_text(json.dumps(done, indent=1) + "\n")
      print(f"{item.name}: status {outcome['status']}, {outcome['seconds']:.0f} s", flush=True)
  for file in [*work.rglob("metrics.jsonl"), *work.rglob("result.json")]:
    copy = out / "_".join(file.relative_to(work).parts)
    copy.write_bytes(file.read_bytes())
  for name in known:
    log = out / f"{name}.log"
    if log.exists():
      print(f"---- {name}\n" + "\n".join(log.read_text().splitlines()[-12:]))


def run_item(item: Item, out: pathlib.Path, limit: float) -> dict[str, Any]:
  """Runs an item, which gets SIGTERM `_GRACE` seconds before `limit` seconds are over; returns its outcome."""
  begun, seconds = time.monotonic(), max(limit - _GRACE, 1.0)
  with (out / f"{item.name}.log").open("a") as log:
    process = subprocess.Popen([sys.executable, *item.command], cwd=_ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
      if item.resumes:
        _wait_with_pauses(process, seconds, out / "turns.turn")
      else:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGTERM)
      try:
        process.wait(_GRACE)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
  command = " ".join(["python", *item.command])
  return {
    "status": process.returncode,
    "seconds": time.monotonic() - begun,
    "command": command,
    "commit": record.commit(),
  }


def _wait_with_pauses(process: subprocess.Popen[Any], seconds: float, turn: pathlib.Path) -> None:
  """Waits for a process, and stops it while a benchmark holds the lock of `turn` (see record.py).

  Raises:
    subprocess.TimeoutExpired: after `seconds`; the process runs then.
  """
  end, stopped = time.monotonic() + seconds, False
  with turn.open("a") as file:
    while process.poll() is None:
      late = time.monotonic() > end
      timed = not late and not record.is_free(file, fcntl.LOCK_SH)
      if timed != stopped:
        process.send_signal(signal.SIGSTOP if timed else signal.SIGCONT)
        stopped = timed
      if late:
        raise subprocess.TimeoutExpired(process.args, seconds)
      time.sleep(0.2)


if __name__ == "__main__":
  program.run(main, __doc__ or "")
