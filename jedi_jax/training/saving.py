"""Checkpoints of runs: what they hold, when they are refused, and how a run is restored."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jedi_jax.replay import ReplayState
from jedi_jax.runs import checkpoint
from jedi_jax.runs.console import Console
from jedi_jax.training.learner import Learner
from jedi_jax.training.run import Progress, Run
from jedi_jax.training.state import TrainState


@contextlib.contextmanager
def log_failures(console: Console) -> Iterator[None]:
  """Turns a failed save into a warning."""
  try:
    yield
  except checkpoint.SaveError as error:
    console.log(f"WARNING: {error}")


def wait(run: Run, console: Console) -> None:
  """Waits for pending saves of a run, and sets `Run.saved` to the newest checkpoint on disk."""
  for checkpoints in (run.latest, run.best):
    with log_failures(console):
      checkpoints.wait()
  run.saved = run.latest.latest()


def save(run: Run, index: int, learner: Learner, console: Console) -> None:
  """Saves a run; logs and continues if its newest updates were skipped or it cannot be written."""
  wait(run, console)
  # A phase that only the first epoch has may end with skips.
  later = run.config.training.updates
  names = " and ".join(name for name, count in learner.skipped(index).items() if count and getattr(later, name))
  if names and not run.done:
    console.log(f"epoch {run.progress.epoch} is not saved: the last updates of {names} were not finite")
    return
  with log_failures(console):
    start_save(run, index, learner)


def start_save(run: Run, index: int, learner: Learner) -> None:
  """Starts to write a run's checkpoint."""
  state, replay = learner.snapshot(index)
  run.latest.save(
    run.progress.epoch,
    params=state.params,
    state={
      "train": state.replace(params={}),
      "replay": replay,
      "collector": run.collector.save(),
      "progress": {name: np.asarray(value, np.float64) for name, value in run.progress._asdict().items()},
    },
  )


def save_best(run: Run, params: Any, mean_return: float, console: Console) -> None:
  """Saves parameters, NumPy arrays, as the best of a run."""
  with log_failures(console):
    run.best.save(run.progress.epoch, params=params)
    # It counts as the best once it is written.
    run.best.wait()
    run.progress = run.progress._replace(best=mean_return)


def restore(run: Run, learner: Learner, console: Console) -> tuple[TrainState, ReplayState, Any] | None:
  """Reads the newest valid checkpoint of a run and sets its progress.

  Returns:
    Its state, its replay and the log of its collector; None without a checkpoint.
  """
  if checkpoint.newest(run.workdir.checkpoints / "latest") is None:
    return None
  state, replay = learner.shapes
  target = {
    "train": state.replace(params={}),
    "replay": replay,
    "collector": run.collector.save(),
    "progress": {name: np.zeros((), np.float64) for name in Progress._fields},
  }
  restored = run.latest.restore_newest(params=state.params, state=target, log=console.log)
  if restored is None:
    return None
  run.saved, params, saved = restored
  p = saved["progress"]
  run.progress = Progress(int(p["epoch"]), int(p["total_epochs"]), float(p["seconds"]), float(p["best"]))
  log = saved["collector"]
  steps = int(log["calls"]) * run.env.num_envs
  what = f": repeating {steps:,} environment steps" if run.collector.repeats else ""
  console.log(f"resuming after epoch {run.progress.epoch}{what}")
  return saved["train"].replace(params=params), saved["replay"], log
