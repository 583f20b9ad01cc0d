"""Many runs: what is planned, how each stands, and processes that train them."""

import dataclasses
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any, NamedTuple

from jedi_jax import config as config_lib
from jedi_jax import envs
from jedi_jax.config import Config
from jedi_jax.errors import UserError
from jedi_jax.evaluation import scores
from jedi_jax.runs import workdir


@dataclasses.dataclass(frozen=True)
class PlannedRun:
  """One run of a sweep.

  Attributes:
    workdir: its directory.
    config: its configuration.
    overrides: 'path=value' texts that the configuration was made with.
    log: where its output goes.
  """

  workdir: pathlib.Path
  config: Config
  overrides: tuple[str, ...]
  log: pathlib.Path


def command(runs: Sequence[PlannedRun], train: pathlib.Path) -> list[str]:
  """The command line that trains a pack of runs, with this interpreter."""
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
  ]


def packs(runs: Sequence[PlannedRun], size: int) -> list[list[PlannedRun]]:
  """Groups runs that can share a program, `size` at most: games of one variant, seed and shape of observations."""
  groups: dict[Any, list[PlannedRun]] = {}
  for run in runs:
    shape = envs.spec(run.config.env.name).observation_shape
    groups.setdefault((run.config.variant, run.config.seed, shape), []).append(run)
  return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


class RunState(NamedTuple):
  """How a run stands.

  Attributes:
    run: the run.
    name: 'waiting', 'begun' or 'finished'.
    progress: share of its environment steps that are done.
    return_: mean return of the final games, else of the last evaluation, else of the last games played; None before.
    seconds: spent so far.
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
) -> list[PlannedRun]:
  """Lists the runs of a sweep, seeds outermost, so that a sweep cut short has every game.

  Args:
    out: directory of all runs.
    games: names such as 'Pong' or 'catch', or 'atari100k' for its 26.
    seeds: seeds 0 to n - 1.
    variants: names of variants.
    preset: of all runs.
    overrides: 'path=value' texts for all runs.
    packed: whether all games shall have room for the same number of actions, so that they can share a program.

  Raises:
    UserError: for what no run can be made of.
  """
  names: list[str] = []
  for game in games:
    names += [f"atari/{name}" for name in scores.games()] if game == "atari100k" else [_env_name(game)]
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
        place = pathlib.Path(variant) / workdir.place(config)
        log = out / "logs" / f"{'-'.join(place.parts)}.log"
        runs.append(PlannedRun(out.absolute() / place, config, tuple(overrides), log))
  return runs


def _env_name(game: str) -> str:
  return game if "/" in game or game == "catch" else f"atari/{game}"


def look(run: PlannedRun) -> RunState:
  """Reads how a run stands from its files.

  Raises:
    UserError: if they cannot be read, or are those of another configuration.
  """
  if not os.path.exists(run.workdir / "config.json"):  # Unlike pathlib's, false for names that no file can have.
    return RunState(run, "waiting", 0.0, None, 0.0)
  found = workdir.read(run.workdir)
  different = config_lib.differences(found.config, run.config)
  if different:
    raise UserError(f"{run.workdir} holds a run of another configuration ({'; '.join(different)}): take another --out")
  file = found.result if found.result.exists() else found.metrics
  try:
    if file == found.result:
      result = workdir.read_json(file)
      return RunState(run, "finished", 1.0, float(result["mean_return"]), float(result["seconds"]))
    records = workdir.read_metrics(file) if file.exists() else []
    if not records:
      return RunState(run, "begun", 0.0, None, 0.0)
    names = ("collect/return", "evaluation/return")
    returns = [float(record[name]) for name in names for record in records if name in record]
    progress = min(float(records[-1]["env_steps"]) / run.config.collect.total_steps, 1.0)
    seconds = float(records[-1]["time/total_seconds"])
  except UserError:
    raise
  except (KeyError, TypeError, ValueError, OverflowError) as error:
    raise UserError(f"{file} is not of a run ({type(error).__name__}): restore it, or remove the run") from None
  return RunState(run, "begun", progress, returns[-1] if returns else None, seconds)


def table(states: Sequence[RunState]) -> str:
  """Lists variants and games as a Markdown table, the seeds of each in one row."""
  seeds = sorted({state.run.config.seed for state in states})
  rows: dict[tuple[str, str], dict[int, RunState]] = {}
  for state in states:
    config = state.run.config
    rows.setdefault((config.variant, config.env.name), {})[config.seed] = state
  lines = ["| variant | game | " + " | ".join(f"seed {seed}" for seed in seeds) + " | left |"]
  lines.append("|" + "---|" * (len(seeds) + 3))
  for (variant, name), by_seed in rows.items():
    cells = [_cell(by_seed[seed]) if seed in by_seed else "-" for seed in seeds]
    left = [seconds for state in by_seed.values() if (seconds := _left(state)) is not None]
    lines.append(f"| {variant} | {name} | " + " | ".join(cells) + f" | {_hours(sum(left)) if left else '-'} |")
  return "\n".join(lines)


def _cell(state: RunState) -> str:
  return_ = "" if state.return_ is None else f" {state.return_:.4g}"
  if state.name == "finished":
    return f"done{return_}"
  return state.name if state.name == "waiting" else f"{100 * state.progress:.0f} %{return_}"


def _left(state: RunState) -> float | None:
  """Seconds that a begun run still needs, by what it has needed so far."""
  if state.name != "begun" or state.progress <= 0:
    return None
  return state.seconds * (1 - state.progress) / state.progress


def _hours(seconds: float) -> str:
  return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def projection(states: Sequence[RunState], *, workers: int, hours_per_run: float = 0.0) -> str:
  """Says how long what is left will take.

  Args:
    states: of all runs.
    workers: runs side by side.
    hours_per_run: of a run; 0 to take the mean of the finished runs here.
  """
  finished = [state for state in states if state.name == "finished"]
  count = len(states) - len(finished)
  text = f"{len(states)} runs, {len(finished)} finished, {count} left"
  seconds = 3600 * hours_per_run
  if not seconds and finished:
    seconds = sum(state.seconds for state in finished) / len(finished)
  if not count:
    return text
  if not seconds:
    return f"{text}; how long is known when the first has finished, or by --hours_per_run"
  work = sum(seconds * (1 - state.progress) for state in states if state.name != "finished")
  source = "as given" if hours_per_run else f"as {len(finished)} finished here took"
  rounds = max(work / workers, *(seconds * (1 - s.progress) for s in states if s.name != "finished"))
  return f"{text}: about {_hours(rounds)} with {workers} at a time ({_hours(seconds)} a run, {source})"


class Pool:
  """Trains packs of runs in processes of this machine, some at a time.

  Args:
    packs: what is left, in order.
    train: the training program.
    workers: processes at a time.
  """

  def __init__(self, packs: Sequence[Sequence[PlannedRun]], train: pathlib.Path, *, workers: int):
    self._waiting = list(packs)
    self._train, self._workers = train, workers
    self._running: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
    self._shown = -math.inf

  def step(self) -> bool:
    """Starts what there is room for; returns whether anything is still to do.

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
      # A group of its own: Ctrl-C in the terminal reaches the run through `close` alone, and once.
      process = subprocess.Popen(command(pack, self._train), stdout=log, stderr=subprocess.STDOUT, process_group=0)
      self._running.append((process, log))
    return bool(self._running)

  def due(self, interval: float) -> bool:
    """Whether it is time to tell again."""
    now = time.monotonic()
    if now - self._shown < interval:
      return False
    self._shown = now
    return True

  def close(self) -> None:
    """Ends what is running; the runs go on from their checkpoints another time."""
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
  """Asks the training program, in a process of its own, how many runs like this one a device can hold.

  Raises:
    UserError: if it does not answer.
  """
  told = subprocess.run([*command([run], train), "--fit"], capture_output=True, text=True, check=False)
  for line in told.stdout.splitlines():
    label, _, number = line.partition(": ")
    if label == "runs that fit":
      return int(number)
  reason = (told.stderr.strip().splitlines() or ["nothing was printed"])[-1]
  raise UserError(f"how many runs fit is not known ({reason}): give --pack")


def submit(
  packs: Sequence[Sequence[PlannedRun]],
  train: pathlib.Path,
  folder: pathlib.Path,
  *,
  workers: int,
  parameters: Mapping[str, str],
  cluster: str = "slurm",
) -> str:
  """Submits packs of runs as one array job.

  Args:
    packs: what is left.
    train: the training program.
    folder: where the scheduler's logs go.
    workers: jobs of the array at a time.
    parameters: of the executor, such as 'slurm_partition'.
    cluster: as submitit names it; 'local' and 'debug' need no scheduler.

  Returns:
    The identifiers of the jobs.

  Raises:
    UserError: if submitit is not installed, or the scheduler refuses.
  """
  try:
    import submitit
  except ImportError:
    raise UserError("--launcher=slurm needs submitit: pip install submitit") from None
  try:
    executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster)
    limits = {"slurm_array_parallelism": workers} if cluster == "slurm" else {}
    executor.update_parameters(name="jedi_jax", **limits, **parameters)
    environment = dict(os.environ)
    with executor.batch():
      jobs = [
        executor.submit(submitit.helpers.CommandFunction(command(pack, train), env=environment, verbose=False))
        for pack in packs
      ]
  except (OSError, RuntimeError, NameError, ValueError, TypeError) as error:
    raise UserError(f"the array job could not be submitted ({error})") from None
  return ", ".join(job.job_id for job in jobs)
