"""Sweeps: the plan of many runs, their status, and the processes that train them."""

import dataclasses
import errno
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

from jedi_jax import config as config_lib
from jedi_jax import envs
from jedi_jax.config import Config
from jedi_jax.errors import UserError
from jedi_jax.evaluation import scores
from jedi_jax.runs import workdir
from jedi_jax.tables import markdown_table


@dataclasses.dataclass(frozen=True)
class PlannedRun:
  """One run of a sweep.

  Attributes:
    workdir: directory of the run.
    config: configuration of the run.
    overrides: 'path=value' strings that the configuration was made with.
    log: file of the run's output.
    imports: modules that the training program imports first.
  """

  workdir: pathlib.Path
  config: Config
  overrides: tuple[str, ...]
  log: pathlib.Path
  imports: tuple[str, ...] = ()


def command(runs: Sequence[PlannedRun], train: pathlib.Path) -> list[str]:
  """Returns the command line that trains a pack of runs with this interpreter."""
  first = runs[0]
  names = ",".join(run.config.env.name for run in runs)
  place = first.workdir if len(runs) == 1 else first.workdir.parents[1]
  c = first.config
  flags = {"env": names, "variant": c.variant, "preset": c.preset, "seed": c.seed, "workdir": place}
  return [
    sys.executable,
    str(train),
    *(f"--{name}={value}" for name, value in flags.items()),
    *(f"--set={text}" for text in first.overrides),
    *(f"--import={name}" for name in first.imports),
  ]


def packs(runs: Sequence[PlannedRun], size: int | Callable[[PlannedRun], int]) -> list[list[PlannedRun]]:
  """Groups runs of one variant, seed and observation shape, which can share a program, into packs.

  Args:
    runs: the runs.
    size: number of runs of a pack at most; a function, called once for each variant and observation shape, gives it for
      a run.
  """
  groups: dict[Any, list[PlannedRun]] = {}
  sizes: dict[Any, int] = {}
  for run in runs:
    kind = (run.config.variant, envs.spec(run.config.env.name).observation_shape)
    groups.setdefault((*kind, run.config.seed), []).append(run)
    if kind not in sizes:
      sizes[kind] = size(run) if callable(size) else size
  return [
    group[i : i + sizes[kind[:2]]] for kind, group in groups.items() for i in range(0, len(group), sizes[kind[:2]])
  ]


class RunStatus(NamedTuple):
  """Status of a run.

  Attributes:
    run: the run.
    name: 'waiting', 'begun' or 'finished'.
    progress: fraction of its environment steps taken, in [0, 1].
    return_: mean return of the final evaluation; before it of the last evaluation, or of the last games of training
      without any; None at first.
    seconds: wall time so far.
  """

  run: PlannedRun
  name: str
  progress: float
  return_: float | None
  seconds: float


def plan(
  out: pathlib.Path,
  *,
  games: Sequence[str],
  seeds: int,
  variants: Sequence[str],
  preset: str,
  overrides: Sequence[str],
  packed: bool = False,
  imports: Sequence[str] = (),
) -> list[PlannedRun]:
  """Lists the runs of a sweep, seeds outermost, so that an incomplete sweep covers every game.

  Args:
    out: directory of all runs.
    games: names such as 'Pong' or 'catch', or a group: 'atari100k' for its 26 games, 'minatar' for the five MinAtar
      games, 'minatar_sticky' for these with sticky actions of probability 0.1.
    seeds: number n of seeds; the seeds are 0 to n - 1.
    variants: names of variants.
    preset: preset of all runs.
    overrides: 'path=value' strings for all runs.
    packed: whether all games get the same number of action slots, so that they can share a program.
    imports: modules that the training program imports first, to register environments.

  Raises:
    UserError: for unknown names, invalid settings, or no runs at all.
  """
  names: list[str] = []
  groups = {
    "atari100k": [f"atari/{name}" for name in scores.games()],
    "minatar": [f"minatar/{name}" for name in envs.gymnax.MINATAR],
    "minatar_sticky": [f"minatar/{name}?sticky=0.1" for name in envs.gymnax.MINATAR],
  }
  for game in games:
    names += groups.get(game) or [_env_name(game)]
  names = list(dict.fromkeys(names))
  if not names or not variants:
    raise UserError("a sweep needs at least one game and one variant")
  if packed and (slots := config_lib.room_for(names)):
    overrides = [f"env.action_slots={slots}", *overrides]
  runs = []
  for seed in range(seeds):
    for variant in dict.fromkeys(variants):
      for name in names:
        config = config_lib.make_config(env=name, variant=variant, preset=preset, seed=seed, overrides=overrides)
        place = pathlib.Path(variant) / workdir.relative_path(config)
        log = out / "logs" / f"{'-'.join(place.parts)}.log"
        runs.append(PlannedRun(out.absolute() / place, config, tuple(overrides), log, tuple(imports)))
  return runs


def _env_name(game: str) -> str:
  return game if "/" in game or game in envs.names() else f"atari/{game}"


def run_status(run: PlannedRun) -> RunStatus:
  """Reads the status of a run from its files.

  Raises:
    UserError: if the files cannot be read, or belong to another configuration.
  """
  try:
    os.stat(run.workdir / "config.json")
  except (OSError, ValueError) as error:  # ValueError: a name that no file can have.
    if not isinstance(error, OSError) or error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
      return RunStatus(run, "waiting", 0.0, None, 0.0)
    raise UserError(f"{run.workdir} cannot be read ({error.strerror}): repeat the command when it can") from None
  found = workdir.read(run.workdir)
  different = config_lib.differences(found.config, run.config)
  if different:
    raise UserError(f"{run.workdir} holds a run of another configuration ({'; '.join(different)}): take another --out")
  file = found.result if found.result.exists() else found.metrics
  try:
    if file == found.result:
      result = workdir.read_json(file)
      return RunStatus(run, "finished", 1.0, float(result["mean_return"]), float(result["seconds"]))
    records = workdir.read_metrics(file) if file.exists() else []
    if not records:
      return RunStatus(run, "begun", 0.0, None, 0.0)
    names = ("collect/return", "evaluation/return")
    returns = [float(record[name]) for name in names for record in records if name in record]
    progress = min(float(records[-1]["env_steps"]) / run.config.collect.total_steps, 1.0)
    seconds = float(records[-1]["time/total_seconds"])
  except UserError:
    raise
  except (KeyError, TypeError, ValueError, OverflowError) as error:
    raise UserError(f"{file} is not a run's ({type(error).__name__}): restore it, or remove the run") from None
  return RunStatus(run, "begun", progress, returns[-1] if returns else None, seconds)


def table(statuses: Sequence[RunStatus]) -> str:
  """Formats the status of all runs as a Markdown table, one row per variant and game."""
  seeds = sorted({status.run.config.seed for status in statuses})
  rows: dict[tuple[str, str], dict[int, RunStatus]] = {}
  for status in statuses:
    config = status.run.config
    rows.setdefault((config.variant, config.env.name), {})[config.seed] = status
  lines = [["variant", "game", *(f"seed {seed}" for seed in seeds), "left"]]
  for (variant, name), by_seed in rows.items():
    cells = [_cell(by_seed[seed]) if seed in by_seed else "-" for seed in seeds]
    left = [seconds for status in by_seed.values() if (seconds := _seconds_left(status)) is not None]
    lines.append([variant, name, *cells, _hours(sum(left)) if left else "-"])
  return markdown_table(lines)


def _cell(status: RunStatus) -> str:
  return_ = "" if status.return_ is None else f" {status.return_:.4g}"
  if status.name == "finished":
    return f"done{return_}"
  return status.name if status.name == "waiting" else f"{100 * status.progress:.0f} %{return_}"


def _seconds_left(status: RunStatus) -> float | None:
  """Extrapolates the seconds that a begun run still needs; None for other runs."""
  if status.name != "begun" or status.progress <= 0:
    return None
  return status.seconds * (1 - status.progress) / status.progress


def _hours(seconds: float) -> str:
  return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def projection(statuses: Sequence[RunStatus], *, workers: int, hours_per_run: float = 0.0) -> str:
  """Estimates how long the unfinished runs will take, as a line of text.

  Args:
    statuses: status of all runs.
    workers: number of runs at a time.
    hours_per_run: hours of one run; 0 for the mean of the finished runs.
  """
  finished = [status for status in statuses if status.name == "finished"]
  count = len(statuses) - len(finished)
  text = f"{len(statuses)} runs, {len(finished)} finished, {count} left"
  seconds = 3600 * hours_per_run
  if not seconds and finished:
    seconds = sum(status.seconds for status in finished) / len(finished)
  if not count:
    return text
  if not seconds:
    return f"{text}; the time is unknown until a run has finished, or with --hours_per_run"
  work = sum(seconds * (1 - status.progress) for status in statuses if status.name != "finished")
  source = "as given" if hours_per_run else f"as {len(finished)} finished here took"
  rounds = max(work / workers, *(seconds * (1 - s.progress) for s in statuses if s.name != "finished"))
  return f"{text}: about {_hours(rounds)} with {workers} at a time ({_hours(seconds)} a run, {source})"


class Pool:
  """Trains packs of runs in processes on this machine.

  Args:
    packs: packs of runs to train, in order.
    train: the training program.
    workers: number of processes at a time.
  """

  def __init__(self, packs: Sequence[Sequence[PlannedRun]], train: pathlib.Path, *, workers: int):
    self._waiting = list(packs)
    self._train, self._workers = train, workers
    self._running: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
    self._shown = -math.inf

  def step(self) -> bool:
    """Starts processes up to the number of workers, and returns whether any is running.

    Raises:
      UserError: if a log cannot be written.
    """
    for process, log in list(self._running):
      if process.poll() is not None:
        log.close()
        self._running.remove((process, log))
    while self._waiting and len(self._running) < self._workers:
      pack = self._waiting.pop(0)
      path = pack[0].log
      try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("ab")
      except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
      # A process group of its own: Ctrl-C in the terminal reaches the run only through `close`, once.
      process = subprocess.Popen(command(pack, self._train), stdout=log, stderr=subprocess.STDOUT, process_group=0)
      self._running.append((process, log))
    return bool(self._running)

  def due(self, interval: float) -> bool:
    """Returns True if the last True is at least `interval` seconds ago: it is time for another table."""
    now = time.monotonic()
    if now - self._shown < interval:
      return False
    self._shown = now
    return True

  def close(self) -> None:
    """Ends all running processes; another sweep resumes their runs."""
    for process, _ in self._running:
      process.send_signal(signal.SIGTERM)
    for process, log in self._running:
      try:
        process.wait(timeout=30)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
      log.close()
    self._running = []


def runs_that_fit(run: PlannedRun, train: pathlib.Path) -> int:
  """Returns how many runs like this one fit on a device, as a process of the training program measures.

  Raises:
    UserError: if the program fails.
  """
  done = subprocess.run([*command([run], train), "--fit"], capture_output=True, text=True, check=False)
  for line in done.stdout.splitlines():
    label, _, number = line.partition(": ")
    if label == "runs that fit":
      return int(number)
  reason = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
  raise UserError(f"the number of runs that fit is unknown ({reason}): give --pack")
