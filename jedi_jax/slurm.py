"""Array jobs of SLURM that train the runs of a sweep."""

import contextlib
import dataclasses
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jedi_jax import sweep
from jedi_jax.errors import UserError
from jedi_jax.runs import workdir
from jedi_jax.runs.interruption import INTERRUPTED_STATUS
from jedi_jax.runs.program import USAGE_STATUS

_JOBS = "_runs.json"
"""End of the name of a file with the directories of the runs of each job."""
_POLL = 10.0  # Seconds between two looks at a directory that is taken.
_SIGNAL_DELAY = 90  # Seconds from submitit's signal to the end of a job.
_SAVING = 30.0  # Seconds of these that are left for the last save.


@dataclasses.dataclass
class ArrayJob:
  """What a job of the array does: it trains a pack of runs in a process of its own.

  SLURM signals all processes of a job: SIGTERM stops the run, which is saved, and so does the signal that submitit asks
  for before a time limit. The job then waits in the queue again, unless it was cancelled.

  Attributes:
    command: that trains the pack.
    places: directories of the runs.
  """

  command: list[str]
  places: list[pathlib.Path]
  _process: subprocess.Popen[bytes] | None = dataclasses.field(default=None, init=False)

  def __call__(self) -> None:
    """Trains the runs.

    Raises:
      RuntimeError: if they end with another status than 0.
    """
    status = USAGE_STATUS  # As of a run whose directory is taken.
    while status == USAGE_STATUS:
      # After a node was lost to the scheduler, its processes may go on.
      while taken := [place for place in self.places if _is_taken(place)]:
        print(f"{taken[0]} is still being trained by another process: waiting for it", flush=True)
        time.sleep(_POLL)
      self._process = subprocess.Popen(self.command, preexec_fn=_ignore_user_signals)  # noqa: PLW1509 - one thread.
      # Without a lock of the process, which `checkpoint` would need in the same thread.
      os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
      status = self._process.wait()
      if not any(_is_taken(place) for place in self.places):
        break
    if status == INTERRUPTED_STATUS and _queue_again():
      sys.exit(status)
    if status:
      raise RuntimeError(f"{shlex.join(self.command)} ended with status {status}")

  def checkpoint(self) -> Any:
    """Stops the run; submitit calls it on its signal, and puts what it returns into the queue."""
    import submitit

    if self._process is not None:
      with contextlib.suppress(ProcessLookupError, ChildProcessError):
        self._process.send_signal(signal.SIGTERM)
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
    return submitit.helpers.DelayedSubmission(dataclasses.replace(self))


def _is_taken(place: pathlib.Path) -> bool:
  """Whether another process trains in a directory."""
  try:
    with workdir.locked(place):
      return False
  except UserError as error:
    return isinstance(error.__context__, BlockingIOError)


def _ignore_user_signals() -> None:
  """Leaves submitit's signals to its own process; they would kill a training program."""
  for number in (signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN)


def _queue_again() -> bool:
  """Puts this job of SLURM into the queue again if it still runs there; a cancelled one does not."""
  job = os.environ.get("SLURM_JOB_ID")
  if array := os.environ.get("SLURM_ARRAY_JOB_ID"):  # The last one's number is that of the whole array.
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
  try:
    if job is None or _slurm("squeue", "--noheader", f"--jobs={job}", "--format=%T").strip() != "RUNNING":
      return False
    _slurm("scontrol", "requeue", job)
  except UserError as error:
    print(f"the job is not queued again: {error}", file=sys.stderr)
    return False
  return True


def _slurm(*argv: str) -> str:
  """Calls a program of SLURM and returns its output.

  Raises:
    UserError: if it fails.
  """
  try:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
  except OSError as error:
    raise UserError(f"{argv[0]} cannot be called ({error.strerror}): submit where SLURM is") from None
  if done.returncode:
    raise UserError(f"{argv[0]} failed ({' '.join(done.stderr.split())}): repeat the command when SLURM answers")
  return done.stdout


def queued(folder: pathlib.Path) -> set[pathlib.Path]:
  """Returns the directories of the runs whose jobs, submitted with this folder, wait or run in SLURM.

  Raises:
    UserError: if SLURM does not answer, or the files of the folder are damaged.
  """
  files = list(folder.glob(f"*{_JOBS}"))
  if not files:
    return set()
  there = set(_slurm("squeue", "--me", "--noheader", "--array", "--format=%i").split())
  return {
    pathlib.Path(place) for file in files for job, places in _jobs(file).items() if job in there for place in places
  }


def _jobs(file: pathlib.Path) -> dict[str, list[str]]:
  jobs = workdir.read_json(file)
  if not isinstance(jobs, dict) or not all(isinstance(places, list) for places in jobs.values()):
    raise UserError(f"{file} is damaged: it does not map jobs to directories")
  return jobs


def submit(
  packs: Sequence[Sequence[sweep.PlannedRun]],
  train: pathlib.Path,
  folder: pathlib.Path,
  *,
  workers: int,
  parameters: Mapping[str, str],
  cluster: str = "slurm",
) -> str:
  """Submits packs of runs as one array job.

  Args:
    packs: packs of runs to train.
    train: the training program.
    folder: directory of the scheduler's logs.
    workers: number of the array's jobs that run at a time.
    parameters: submitit's parameters, such as 'slurm_partition'; SLURM needs 'timeout_min' or 'slurm_time'.
    cluster: submitit's name of the cluster; 'local' and 'debug' need no scheduler.

  Returns:
    The identifiers of the jobs, separated by commas; `queued` finds their runs.

  Raises:
    UserError: if submitit is not installed, a parameter is missing or wrong, or the scheduler refuses.
  """
  try:
    import submitit
  except ImportError:
    raise UserError("--launcher=slurm needs submitit: pip install submitit") from None
  if cluster == "slurm" and not {"timeout_min", "slurm_time"} & set(parameters):
    raise UserError("a job of submitit ends after 5 minutes: give its limit, as in --slurm=timeout_min=1440")
  try:
    given = {"slurm_signal_delay_s": _SIGNAL_DELAY, **{name: _number(text) for name, text in parameters.items()}}
    own = {name: given.pop(name) for name in ("slurm_max_num_timeout",) if name in given}
    executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster, **own)
    limits = {"slurm_array_parallelism": workers, "slurm_additional_parameters": {"requeue": True}}
    executor.update_parameters(name="jedi_jax", **(limits if cluster == "slurm" else {}), **given)
    grace = f"--grace={max(float(given['slurm_signal_delay_s']) - _SAVING, 0)}"
    functions = [ArrayJob([*sweep.command(pack, train), grace], [run.workdir for run in pack]) for pack in packs]
    with executor.batch():
      jobs = [executor.submit(function) for function in functions]
  except (OSError, RuntimeError, NameError, ValueError, TypeError, AssertionError) as error:
    raise UserError(f"the array job could not be submitted ({' '.join(str(error).split())})") from None
  places = {job.job_id: list(map(str, function.places)) for job, function in zip(jobs, functions, strict=True)}
  workdir.write_json(folder / f"{jobs[0].job_id}{_JOBS}", places)
  return ", ".join(job.job_id for job in jobs)


def _number(text: str) -> float | str:
  """Returns a number as such: submitit checks types."""
  if text.isdecimal():
    return int(text)
  try:
    return float(text)
  except ValueError:
    return text
