"""Trains many games, seeds and variants; skips finished runs and resumes interrupted ones.

  python experiments/sweep.py --games=atari100k --seeds=5 --variants=jedi --out=runs/sweep --dry_run
  python experiments/sweep.py --games=Pong,Boxing --seeds=2 --preset=cpu --out=runs/sweep
  python experiments/sweep.py --games=minatar --seeds=5 --preset=minatar --out=runs/minatar

Each run is a process of experiments/train.py with the workdir <out>/<variant>/<game>/seed_<n>. The same command
resumes a sweep that was stopped. With --launcher=slurm the runs become one array job (needs submitit). A table shows
the progress of each run, its last return and the time left.
"""

import contextlib
import pathlib
import sys
import time

from absl import flags

import jedi_jax
from jedi_jax import config as config_lib
from jedi_jax import slurm, sweep
from jedi_jax.runs import program, workdir
from jedi_jax.runs.console import Console
from jedi_jax.runs.interruption import on_signals

_GAMES = flags.DEFINE_list(
  "games",
  ["atari100k"],
  "Games such as Pong, environments such as catch, or a group: atari100k (26 games), minatar (5), minatar_sticky (5).",
)
_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds 0 to n - 1 of each game.", lower_bound=1, upper_bound=1_000)
_VARIANTS = flags.DEFINE_list("variants", ["jedi"], f"World models: {', '.join(config_lib.VARIANTS)}.")
_PRESET = flags.DEFINE_string("preset", "paper", "Preset of all runs.")
_SET = flags.DEFINE_multi_string("set", [], "Overrides a setting in all runs; may be repeated.")
_OUT = flags.DEFINE_string("out", None, "Directory of the runs.")
_WORKERS = flags.DEFINE_integer(
  "workers", 1, "Processes at a time on this machine, or jobs at a time of the array.", lower_bound=1
)
_PACK = flags.DEFINE_integer(
  "pack",
  1,
  "Games of one variant and seed that are trained in one process; 0 for as many as fit on a device.",
  lower_bound=0,
)
_HOURS = flags.DEFINE_float(
  "hours_per_run", 0.0, "Hours of one run, for the projection; 0 for the mean of the finished runs.", lower_bound=0.0
)
_DRY = flags.DEFINE_bool("dry_run", False, "Prints the plan and its projected hours, and exits.")
_LAUNCHER = flags.DEFINE_enum("launcher", "local", ["local", "slurm"], "Where the runs go.")
_SLURM = flags.DEFINE_multi_string(
  "slurm",
  [],
  "Parameter of the array job, as in --slurm=slurm_partition=gpu; timeout_min, minutes of a job, is required.",
)
_INTERVAL = flags.DEFINE_float("interval", 30.0, "Seconds between tables.", lower_bound=0.1)


def main() -> None:
  """Plans the sweep and trains the unfinished runs."""
  if not _OUT.value:
    raise jedi_jax.UserError("--out is missing: name a directory")
  if _LAUNCHER.value == "slurm" and not _PACK.value:
    raise jedi_jax.UserError("--pack=0 measures on this machine, not on the nodes of SLURM: give a number")
  out = workdir.locate(_OUT.value)
  plan = sweep.plan(
    out,
    games=_GAMES.value,
    seeds=_SEEDS.value,
    variants=_VARIANTS.value,
    preset=_PRESET.value,
    overrides=_SET.value,
    packed=_PACK.value != 1,
    imports=flags.FLAGS["import"].value,
  )
  statuses = [sweep.run_status(run) for run in plan]
  console = Console()  # Which a full disk does not end.
  console.log(sweep.table(statuses))
  train = pathlib.Path(__file__).with_name("train.py")
  jobs = out / "slurm"
  queued = slurm.queued(jobs) if _LAUNCHER.value == "slurm" else set()
  if queued:
    statuses = [sweep.run_status(run) for run in plan]  # Of the runs that are in it no more, some have just ended.
  left = [run for run, status in zip(plan, statuses, strict=True) if status.name != "finished"]
  if queued:
    console.log(f"{sum(run.workdir in queued for run in left)} runs are in the queue already")
    left = [run for run in left if run.workdir not in queued]
  packs = sweep.packs(left, _PACK.value or (lambda run: sweep.runs_that_fit(run, train)))
  size = max(map(len, packs), default=1)
  console.log(sweep.projection(statuses, workers=_WORKERS.value * size, hours_per_run=_HOURS.value))
  if _DRY.value or not left:
    return
  if _LAUNCHER.value == "slurm":
    parameters = dict(config_lib.split_override(text) for text in _SLURM.value)
    job = slurm.submit(packs, train, jobs, workers=_WORKERS.value, parameters=parameters)
    console.log(f"submitted {len(left)} runs as array job {job} of {len(packs)}; --dry_run shows their status")
    return
  pool = sweep.Pool(packs, train, workers=_WORKERS.value)
  with on_signals(grace=0.0, margin=60.0) as interruption, contextlib.closing(pool):
    while pool.step():
      if interruption.stop_requested:
        raise interruption.begin_exit("with its runs")
      time.sleep(min(_INTERVAL.value, 1.0))
      if pool.due(_INTERVAL.value):
        try:
          console.log(sweep.table([sweep.run_status(run) for run in plan]))
        except jedi_jax.UserError as error:  # Not the end of the other runs.
          console.log(f"no table: {error}")
  statuses = [sweep.run_status(run) for run in plan]
  console.log(sweep.table(statuses))
  failed = [run for run, status in zip(plan, statuses, strict=True) if status.name != "finished"]
  logs = {run.workdir: pack[0].log for pack in packs for run in pack}
  for run in failed:
    Console(sys.stderr).log(f"not finished: {run.workdir}; see {logs.get(run.workdir, run.log)}")
  if failed:
    raise jedi_jax.UserError(f"{len(failed)} of {len(plan)} runs did not finish; the same command continues them")


if __name__ == "__main__":
  program.run(main, __doc__ or "")
