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
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jedi_jax import sweep
from jedi_jax.errors import UserError
from jedi_jax.runs import workdir
from jedi_jax.runs.console import Console  # Which a full disk does not end.
from jedi_jax.runs.interruption import INTERRUPTED_STATUS
from jedi_jax.runs.program import USAGE_STATUS

_JOBS = "_runs.json"
"""End of the name of a file with the directories of the runs of each job of an array; its start is the array's name."""
_POLL = 10.0  # Seconds between two looks at a directory that is taken.
_ANSWER_SECONDS = 60.0  # For a program of SLURM.
_RETRIES, _RETRY_SECONDS = 5, 2.0  # Of a scheduler that refuses to answer a job.
_NOT_INHERITED = ("SBATCH_JOB_NAME", "SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
"""Variables that would change the names of the jobs, or that are those of a job in which the sweep was started."""
_SIGNAL_DELAY = 90  # Seconds from submitit's signal to the end of a job.
_SAVING = 30.0  # Seconds of these that are left for the last save, and
_QUEUING = 10.0  # of those, for the queue.


@dataclasses.dataclass
class ArrayJob:
  """What a job of the array does: it trains a pack of runs in a process of its own.

  SLURM signals all processes of a job: SIGTERM stops the run, which is saved, and so does the signal that submitit asks
  for before a time limit. The job then waits in the queue again, unless it was cancelled.

  Attributes:
    command: that trains the pack.
    places: directories of the runs.
    patience: seconds after submitit's signal until the process is killed.
  """

  command: list[str]
  places: list[pathlib.Path]
  patience: float = _SIGNAL_DELAY - _QUEUING
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
        Console().log(f"{taken[0]} is still being trained by another process: waiting for it")
        time.sleep(_POLL)
      self._process = subprocess.Popen(self.command, preexec_fn=_ignore_user_signals)  # noqa: PLW1509 - one thread.
      # Without a lock of the process, which `checkpoint` would need in the same thread.
      os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
      status = self._process.wait()
      if not any(_is_taken(place) for place in self.places):
        break
    # -SIGTERM: the program had not yet begun to listen.
    if status in (INTERRUPTED_STATUS, -signal.SIGTERM) and _queue_again():
      sys.exit(INTERRUPTED_STATUS)
    if status:
      raise RuntimeError(f"{shlex.join(self.command)} ended with status {status}")

  def checkpoint(self) -> Any:
    """Stops the run; submitit calls it on its signal, and puts what it returns into the queue."""
    import submitit

    if self._process is not None:
      with contextlib.suppress(ProcessLookupError, ChildProcessError):
        self._process.send_signal(signal.SIGTERM)
        end = time.monotonic() + self.patience
        while os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
          if time.monotonic() > end:  # Else SLURM ends the job, which then is not queued. The last checkpoint is whole.
            self._process.kill()
            break
          time.sleep(0.1)
    return submitit.helpers.DelayedSubmission(dataclasses.replace(self))


def _is_taken(place: pathlib.Path) -> bool:
  """Whether another process trains in a directory."""
  try:
    with workdir.locked(place):
      return False
  except workdir.TakenError:
    return True
  except UserError:
    return False


def _ignore_user_signals() -> None:
  """Leaves submitit's signals to its own process; they would kill a training program."""
  for number in (signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN)


def _queue_again() -> bool:
  """Puts this job of SLURM into the queue again if this start of it still runs there.

  A cancelled job does not run, and of a job that was started again after its node was lost this may be the first start.
  """
  job = os.environ.get("SLURM_JOB_ID")
  if array := os.environ.get("SLURM_ARRAY_JOB_ID"):  # The last one's number is that of the whole array.
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
  if job is None:
    return False
  this_start = ["RUNNING", os.environ.get("SLURM_RESTART_COUNT", "0")]
  for _ in range(_RETRIES):
    try:
      if _slurm("squeue", "--noheader", f"--jobs={job}", "--Format=State,RestartCnt").split() != this_start:
        return False
      _slurm("scontrol", "requeue", job)
      return True
    except UserError as error:
      Console().log(f"the job cannot be queued again: {error}")
      time.sleep(_RETRY_SECONDS)
  return False


def _slurm(*argv: str) -> str:
  """Calls a program of SLURM and returns its output.

  Raises:
    UserError: if it fails.
  """
  own = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}  # The user's filters.
  try:
    done = subprocess.run(argv, env=own, capture_output=True, text=True, check=False, timeout=_ANSWER_SECONDS)
  except OSError as error:
    raise UserError(f"{argv[0]} cannot be called ({error.strerror}): submit where SLURM is") from None
  except subprocess.TimeoutExpired:
    raise UserError(f"{argv[0]} does not answer: repeat the command when SLURM does") from None
  if done.returncode:
    raise UserError(f"{argv[0]} failed ({' '.join(done.stderr.split())}): repeat the command when SLURM answers")
  return done.stdout


def queued(folder: pathlib.Path) -> set[pathlib.Path]:
  """Returns the directories of the runs whose jobs, submitted with this folder, wait or run in SLURM.

  Raises:
    UserError: if SLURM does not answer, or the files of the folder are damaged.
  """
  arrays = {file.name.removesuffix(_JOBS): _packs(file) for file in folder.glob(f"*{_JOBS}")}
  if not arrays:
    return set()
  found: set[pathlib.Path] = set()
  for line in _slurm("squeue", "--me", "--noheader", "--array", "--format=%i %j").splitlines():
    job, _, name = line.strip().partition(" ")
    task = job.partition("_")[2] or "0"  # A single job is no array.
    if name in arrays and task.isdecimal():
      found.update(pathlib.Path(place) for pack in arrays[name][int(task) :][:1] for place in pack)
  return found


def _packs(file: pathlib.Path) -> list[list[str]]:
  packs = workdir.read_json(file)
  if not (isinstance(packs, list) and all(isinstance(x, list) and all(isinstance(y, str) for y in x) for x in packs)):
    raise UserError(f"{file} is damaged: it does not list the directories of each job; remove it when no job is left")
  return packs


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
  given = _checked(parameters)
  delay = float(given["slurm_signal_delay_s"])
  if delay < _SAVING:
    raise UserError(f"--slurm=slurm_signal_delay_s={delay:.0f} is too little for a save: give {_SAVING:.0f} or more")
  grace, patience = f"--grace={delay - _SAVING}", delay - _QUEUING
  places = [[run.workdir for run in pack] for pack in packs]
  with _alone(folder), _without(_NOT_INHERITED):
    if cluster == "slurm" and (taken := queued(folder) & {place for pack in places for place in pack}):
      raise UserError(f"{len(taken)} of the runs were submitted by another process just now: repeat the command")
    name = f"jedi_jax-{uuid.uuid4().hex[:12]}"
    try:
      own = {key: given.pop(key) for key in ("slurm_max_num_timeout",) if key in given}
      executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster, **own)
      limits = {"slurm_array_parallelism": workers, "slurm_additional_parameters": {"requeue": True}}
      executor.update_parameters(name=name, **(limits if cluster == "slurm" else {}), **given)
      commands = [[*sweep.command(pack, train), grace] for pack in packs]
      # Before the jobs are in the queue: this process may be killed when they are.
      workdir.write_json(folder / f"{name}{_JOBS}", [list(map(str, pack)) for pack in places])
      with executor.batch():
        jobs = [executor.submit(ArrayJob(*each, patience)) for each in zip(commands, places, strict=True)]
    except (OSError, RuntimeError, NameError, ValueError, TypeError, AssertionError) as error:
      raise UserError(f"the array job could not be submitted ({' '.join(str(error).split())})") from None
  return ", ".join(job.job_id for job in jobs)


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
  """Keeps two sweeps from submitting at a time."""
  try:
    with workdir.locked(folder):
      yield
  except workdir.TakenError:
    raise UserError(f"another sweep submits jobs in {folder}: repeat the command when it has ended") from None


@contextlib.contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
  """Removes variables of the environment for a while."""
  kept = {name: os.environ.pop(name) for name in names if name in os.environ}
  try:
    yield
  finally:
    os.environ.update(kept)


def _checked(parameters: Mapping[str, str]) -> dict[str, Any]:
  """Returns submitit's parameters, numbers as such, since it checks types; it does not check these."""
  given = {"slurm_signal_delay_s": _SIGNAL_DELAY, **{name: _number(text) for name, text in parameters.items()}}
  for name, unit in (("slurm_time", "minutes"), ("slurm_signal_delay_s", "seconds")):
    if not isinstance(given.get(name, 0), int):  # From the former the job computes whether it has run out of time.
      raise UserError(f"--slurm={name}={given[name]} is not a whole number of {unit}")
  if names := {"name", "slurm_job_name"} & set(given):
    raise UserError(f"--slurm={min(names)} cannot be set: the sweep finds its jobs by their name")
  return given


def _number(text: str) -> float | str:
  if text.isdecimal():
    return int(text)
  try:
    return float(text)
  except ValueError:
    return text
