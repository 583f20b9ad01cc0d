"""Sweeps and connected processes in a real SLURM, whose jobs are cancelled, preempted and cut off from their node."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections import defaultdict

import pytest
import slurm
from toy_hosts import TRAIN, environment, flags_of

from jedi_jax import slurm as array_jobs
from jedi_jax import sweep
from jedi_jax.runs import checkpoint, workdir

SWEEP = str(pathlib.Path(TRAIN).with_name("sweep.py"))
EPOCHS = 14
RUNS = 2

LACKING = slurm.missing() or ("" if importlib.util.find_spec("submitit") else "submitit is not installed")
pytestmark = pytest.mark.skipif(bool(LACKING), reason=LACKING)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
  with slurm.Slurm(tmp_path_factory.mktemp("slurm")) as running:
    yield running


@pytest.fixture(scope="module")
def settings(tiny):
  none = {"training.first_updates.probe": 0, "training.updates.probe": 0, "evaluation.interval_epochs": 5}
  steps = {"collect.total_steps": 40 + 10 * (EPOCHS - 2), "checkpoint.interval_epochs": 1}
  return {**tiny.overrides, **none, **steps}


class Sweep:
  """A sweep of catch by `sweep.py --launcher=slurm`, whose epochs take a second."""

  def __init__(self, cluster, settings, folder):
    self._cluster, self._log, self.out = cluster, folder / "epochs.log", folder / "out"
    self._flags = [flag for flag in flags_of(settings) if flag.startswith("--set=")]
    self.plan = sweep.plan(
      self.out, games=["catch"], seeds=RUNS, variants=["jedi"], preset="debug",
      overrides=[flag.removeprefix("--set=") for flag in self._flags],
    )  # fmt: skip
    self.environment = environment() | cluster.environment | {"TOY_LOG": str(self._log), "TOY_SECONDS": "1"}

  def submit(self, *more):
    """Submits what is left; returns the program's output and the jobs that it submitted."""
    done = subprocess.run(
      [sys.executable, SWEEP, "--launcher=slurm", "--games=catch", f"--seeds={RUNS}", "--preset=debug", "--workers=8",
       "--import=toy_epoch", "--slurm=slurm_cpus_per_task=2",
       "--slurm=timeout_min=30", f"--out={self.out}", *self._flags, *more],
      env=self.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(r"as array job (.*) of", done.stdout)
    return done.stdout, found[1].split(", ") if found else []

  def statuses(self):
    """The name of the status of each run; their table is checked against the files."""
    before = [(run.workdir / "result.json").exists() for run in self.plan]
    found = [sweep.run_status(run) for run in self.plan]
    cells = sweep.table(found).splitlines()[-1].split("|")[3 : 3 + RUNS]
    for run, done, status, cell in zip(self.plan, before, found, cells, strict=True):
      assert done <= (status.name == "finished") <= (run.workdir / "result.json").exists()
      assert (status.name == "finished") == ("done" in cell)
      steps = max((number for number, _, _ in self.epochs()[str(run.workdir)]), default=0)
      # A record follows its epoch, and one that a kill took back is repeated.
      assert status.name == "waiting" or status.progress <= max(steps * 10 + 40, 40) / (40 + 10 * (EPOCHS - 2))
    return [status.name for status in found]

  def epochs(self):
    """(number, process, time) of each epoch trained, by directory."""
    found = defaultdict(list)
    for line in self._log.read_text().splitlines() if self._log.exists() else ():
      place, number, process, when = line.split()
      found[place].append((int(number), int(process), float(when)))
    return found

  def until_epoch(self, number):
    """Waits until every run has begun this epoch."""
    runs = [str(run.workdir) for run in self.plan]
    self._cluster.until(
      lambda: self.statuses() and all(any(n >= number for n, _, _ in self.epochs()[run]) for run in runs),
      f"no run reached epoch {number}", seconds=240,
    )  # fmt: skip

  def until_done(self):
    """Waits until the queue is empty and all runs are finished."""
    self._cluster.until(lambda: self.statuses() and not self._cluster.jobs(), "jobs are left", seconds=400)
    assert self.statuses() == ["finished"] * RUNS, [path.read_text() for path in (self.out / "slurm").glob("*.err")]

  def assert_trained_once(self, lost=0):
    """No two processes trained a run at a time, and at most `lost` epochs of it were trained twice."""
    for place, records in self.epochs().items():
      processes = [process for _, process, _ in records]
      order = list(dict.fromkeys(processes))
      assert processes == sorted(processes, key=order.index), f"{place} was trained by two processes at a time"
      numbers = [number for number, _, _ in records]
      assert set(numbers) == set(range(1, EPOCHS + 1)), place
      assert len(numbers) <= EPOCHS + lost, f"{place}: {numbers}"


@pytest.fixture
def catch(cluster, settings, tmp_path):
  return Sweep(cluster, settings, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(cluster, settings, tmp_path_factory):
  """The arrays of runs that nothing disturbed, by seed."""
  found = []
  for seed in range(RUNS):
    place = tmp_path_factory.mktemp("runs") / f"seed_{seed}"
    subprocess.run(
      [sys.executable, TRAIN, *flags_of(settings), f"--seed={seed}", f"--workdir={place}", "--import=toy_epoch"],
      env=environment(), check=True, capture_output=True,
    )  # fmt: skip
    found.append(final(place))
  return found


def final(place):
  """The bytes of the arrays of a run's last checkpoint, and its result, without times."""
  latest = place / "checkpoints" / "latest"
  arrays = checkpoint.read(latest, checkpoint.newest(latest))
  result = workdir.read_json(place / "result.json")
  return (
    {name: x.tobytes() for name, x in arrays.items() if name != "state/progress/seconds"},
    {name: value for name, value in result.items() if name != "seconds"},
  )


# Stands for experiments/train.py: writes the number of its process, and ends with status 75 at SIGTERM.
STUB = """
import os, pathlib, signal, sys, time
flags = dict(text[2:].split("=", 1) for text in sys.argv[1:])
place = pathlib.Path(flags["workdir"])
place.mkdir(parents=True, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
with (place / "starts").open("a") as file:
  file.write(f"{os.getpid()}\\n")
time.sleep(60)
"""


def test_a_stopped_job_waits_again_and_a_cancelled_one_does_not(cluster, tmp_path, monkeypatch):
  for name, value in (environment() | cluster.environment).items():
    monkeypatch.setenv(name, value)
  program = tmp_path / "train.py"
  program.write_text(STUB)
  runs = sweep.plan(tmp_path / "out", games=["catch"], seeds=2, variants=["jedi"], preset="debug", overrides=[])
  folder = tmp_path / "slurm"
  assert array_jobs.queued(folder) == set()
  text = array_jobs.submit([[run] for run in runs], program, folder, workers=2, parameters={"timeout_min": "5"})
  first, last = text.split(", ")

  def started(*counts):
    files = [run.workdir / "starts" for run in runs]
    return [len(file.read_text().split()) if file.exists() else 0 for file in files] == list(counts)

  assert array_jobs.queued(folder) == {run.workdir for run in runs}
  cluster.until(lambda: started(1, 1), "the jobs did not start")
  cluster.call("scancel", "--signal=TERM", last)
  cluster.until(lambda: started(1, 2), "the stopped job did not start again")
  cluster.call("scancel", last)
  cluster.until(lambda: list(cluster.jobs()) == [first], "the cancelled job is left")
  assert started(1, 2)
  assert array_jobs.queued(folder) == {runs[0].workdir}
  cluster.call("scancel", first)


@pytest.mark.cluster
def test_an_array_is_submitted_once_and_a_cancelled_run_is_continued(cluster, catch, undisturbed):
  text, [first, second] = catch.submit()
  assert f"submitted {RUNS} runs as array job" in text
  text, jobs = catch.submit()
  assert f"{RUNS} runs are in the queue already" in text
  assert not jobs
  catch.until_epoch(3)
  cluster.call("scancel", second)
  cluster.until(lambda: catch.statuses() and second not in cluster.jobs(), "the cancelled job is left")
  assert first in cluster.jobs()
  text, jobs = catch.submit()
  assert "1 runs are in the queue already" in text
  assert len(jobs) == 1
  catch.until_done()
  catch.assert_trained_once(lost=1)
  assert [final(run.workdir) for run in catch.plan] == undisturbed
  assert "waiting" not in catch.submit()[0]


@pytest.mark.cluster
def test_a_preempted_array_waits_and_goes_on(cluster, catch, undisturbed):
  _, jobs = catch.submit()
  catch.until_epoch(3)
  urgent = cluster.call("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null",
                        "--wrap=sleep 5").strip()  # fmt: skip
  cluster.until(lambda: catch.statuses() and cluster.jobs().get(urgent) == "RUNNING", "the urgent job did not start")
  assert all(cluster.jobs()[job] != "RUNNING" for job in jobs)
  catch.until_done()
  catch.assert_trained_once(lost=1)
  assert [final(run.workdir) for run in catch.plan] == undisturbed


@pytest.mark.cluster
def test_a_node_goes_down(cluster, catch, undisturbed):
  """Its processes go on, unknown to SLURM, which starts the runs on the other node: those starts wait for them."""
  _, jobs = catch.submit("--slurm=slurm_cpus_per_task=1")  # Both runs fit on one node.
  catch.until_epoch(3)
  cluster.kill_node("n1")
  try:
    cluster.call("scontrol", "update", "nodename=n1", "state=down", "reason=test")
    cluster.until(lambda: all(cluster.jobs().get(job) == "RUNNING" for job in jobs), "the jobs did not start again")
    catch.until_done()
  finally:
    cluster.start_node("n1")
    cluster.call("scontrol", "update", "nodename=n1", "state=resume")
  catch.assert_trained_once()
  texts = [path.read_text() for path in (catch.out / "slurm").glob("*.out")]
  assert any("is still being trained by another process" in text for text in texts)
  assert [final(run.workdir) for run in catch.plan] == undisturbed


def connected(cluster, settings, place, **variables):
  flags = flags_of(settings)
  return subprocess.Popen(
    [slurm.shutil.which("srun", path=cluster.environment["PATH"]), "--ntasks=2", "--nodes=2", "--label",
     "--kill-on-bad-exit=0", sys.executable, TRAIN, "--distributed", *flags, f"--workdir={place}",
     "--import=toy_epoch"],
    env=environment() | cluster.environment | variables,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )  # fmt: skip


@pytest.mark.cluster
def test_srun_connects_two_tasks(cluster, settings, tmp_path):
  running = connected(cluster, settings, tmp_path / "straight")
  text, _ = running.communicate(timeout=300)
  assert running.returncode == 0, text
  assert "2 cpu device(s)" in text
  assert sum("done: mean return" in line for line in text.splitlines()) == 1
  log = tmp_path / "epochs.log"
  running = connected(cluster, settings, tmp_path / "killed", TOY_LOG=str(log), TOY_SECONDS="0.5")
  cluster.until(lambda: log.exists() and len(log.read_text().splitlines()) > 3, "no epoch was trained", seconds=240)
  leader = int(log.read_text().split()[2])
  os.kill(leader, 9)
  start = time.monotonic()
  text, _ = running.communicate(timeout=120)
  assert time.monotonic() - start < 60
  assert running.returncode != 0
  assert "another process of the run is gone" in text
  running = connected(cluster, settings, tmp_path / "killed")
  text, _ = running.communicate(timeout=300)
  assert running.returncode == 0, text
  assert final(tmp_path / "killed") == final(tmp_path / "straight")
  assert json.loads((tmp_path / "killed" / "result.json").read_text())["env_steps"] > 0


@pytest.mark.cluster
def test_an_array_outlasts_its_time_limit(cluster, catch, undisturbed):
  """A limit of two minutes and a signal 40 s before, for epochs that take 90 s in all."""
  catch.environment["TOY_SECONDS"] = "6.5"
  catch.submit("--slurm=timeout_min=2", "--slurm=slurm_signal_delay_s=40", "--slurm=slurm_max_num_timeout=9")
  catch.until_done()
  catch.assert_trained_once(lost=10)
  assert any(len({process for _, process, _ in records}) > 1 for records in catch.epochs().values())
  assert [final(run.workdir) for run in catch.plan] == undisturbed
