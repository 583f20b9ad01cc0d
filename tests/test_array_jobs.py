"""Jobs of SLURM, without SLURM: what they do when its programs answer, fail or lie."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from jedi_jax import slurm
from jedi_jax.errors import UserError


@pytest.fixture
def scheduler(tmp_path, monkeypatch):
  """Writes programs of SLURM as shell scripts, and returns the calls of them."""
  monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
  monkeypatch.setattr(slurm, "_RETRY_SECONDS", 0.0)
  calls = tmp_path / "calls"
  calls.touch()

  def write(**scripts):
    for name, script in scripts.items():
      path = tmp_path / name
      path.write_text(f'#!/bin/sh\necho {name} "$@" >>{calls}\n{script}\n')
      path.chmod(0o755)
    return lambda: calls.read_text().splitlines()

  return write


@pytest.fixture
def job(monkeypatch):
  """The second job of an array, started for the third time."""
  for name, value in {"JOB_ID": "9", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "1", "RESTART_COUNT": "2"}.items():
    monkeypatch.setenv(f"SLURM_{name}", value)


def test_a_job_that_runs_is_queued_again(scheduler, job):
  calls = scheduler(squeue="echo 'RUNNING             2'", scontrol="")
  assert slurm._queue_again()
  assert calls() == ["squeue --noheader --jobs=7_1 --Format=State,RestartCnt", "scontrol requeue 7_1"]


@pytest.mark.parametrize("answer", ["COMPLETING          2", "RUNNING             3", "PENDING             2", ""])
def test_a_job_that_was_cancelled_or_started_again_elsewhere_is_not(scheduler, job, answer):
  calls = scheduler(squeue=f"echo '{answer}'", scontrol="")
  assert not slurm._queue_again()
  assert not any(call.startswith("scontrol") for call in calls())


def test_a_busy_scheduler_is_asked_again(scheduler, job, tmp_path, capsys):
  busy = f"echo >>{tmp_path}/times; [ $(wc -l <{tmp_path}/times) -gt 2 ] || {{ echo 'no answer' >&2; exit 1; }}"
  calls = scheduler(squeue=f"{busy}\necho 'RUNNING 2'", scontrol="")
  assert slurm._queue_again()
  assert len(calls()) == 4
  assert capsys.readouterr().out.count("no answer") == 2
  scheduler(squeue="exit 1")
  assert not slurm._queue_again()


def test_a_run_that_is_stopped_before_it_listens_is_queued_again(monkeypatch, tmp_path):
  asked = []
  monkeypatch.setattr(slurm, "_queue_again", lambda: not asked.append(0))
  code = "import os, signal; os.kill(os.getpid(), signal.SIG{})"
  with pytest.raises(SystemExit):
    slurm.ArrayJob([sys.executable, "-c", code.format("TERM")], [tmp_path])()
  assert len(asked) == 1
  with pytest.raises(RuntimeError, match="status -9"):
    slurm.ArrayJob([sys.executable, "-c", code.format("KILL")], [tmp_path])()
  assert len(asked) == 1


def test_a_run_that_does_not_stop_in_time_is_killed_and_queued(tmp_path):
  pytest.importorskip("submitit")
  code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
  job = slurm.ArrayJob([], [tmp_path], patience=0.3)
  with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
    process.stdout.readline()
    job._process = process
    assert isinstance(job.checkpoint().function, slurm.ArrayJob)
    assert process.wait(10) == -signal.SIGKILL


def test_the_queue_is_read_by_names_and_without_the_users_filters(scheduler, tmp_path, monkeypatch):
  monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
  folder = tmp_path / "slurm"
  folder.mkdir()
  assert slurm.queued(folder) == set()
  for name, packs in {"first": [["/a"], ["/b", "/c"], ["/d"]], "second": [["/e"]], "ended": [["/f"]]}.items():
    (folder / f"jedi_jax-{name}_runs.json").write_text(json.dumps(packs))
  first = [f"7_{task} jedi_jax-first" for task in ("1", "9", "[3-9%2]")]
  lines = [*first, "8 jedi_jax-second", "9_0 another job"]
  scheduler(squeue='[ -n "$SQUEUE_STATES" ] || printf "%s\\n" ' + " ".join(f"'{line}'" for line in lines))
  assert slurm.queued(folder) == {pathlib.Path("/b"), pathlib.Path("/c"), pathlib.Path("/e")}


@pytest.mark.parametrize("content", ["{}", "[1]", "[[1]]", "[", '{"5": [1]}'])
def test_a_damaged_list_of_runs_is_one_line(tmp_path, content):
  (tmp_path / "jedi_jax-x_runs.json").write_text(content)
  with pytest.raises(UserError, match=r"x_runs\.json") as caught:
    slurm.queued(tmp_path)
  assert len(str(caught.value).splitlines()) == 1
