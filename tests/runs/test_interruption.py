"""Signals are sent to subprocesses, since handlers are global in a process."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jedi_jax.errors import Interrupted
from jedi_jax.runs.interruption import INTERRUPTED_STATUS, Interruption, on_signals


def test_no_stop_is_requested_at_first():
  interruption = Interruption()
  interruption.check()
  assert not interruption.stop_requested
  assert interruption.seconds_left == float("inf")


def test_a_second_request_ends_the_grace(monkeypatch):
  now = 1000.0
  monkeypatch.setattr("time.monotonic", lambda: now)
  interruption = Interruption(grace=60.0)
  interruption.request_stop("SIGTERM")
  assert interruption.stop_requested
  now += 2.0  # A scheduler signals the run and its parent.
  interruption.request_stop("SIGTERM")
  interruption.check()
  assert interruption.seconds_left == 58.0
  now += 2.0
  interruption.request_stop("SIGINT")
  with pytest.raises(Interrupted, match=r"stopped by SIGINT .*; the same command continues"):
    interruption.check()
  assert not interruption.exiting  # Its threads may be in the middle of a step.
  interruption.exit_if_overdue()
  assert interruption.exiting


def test_a_run_with_time_left_is_not_overdue():
  interruption = Interruption(grace=60.0)
  interruption.exit_if_overdue()
  interruption.request_stop("SIGTERM")
  interruption.exit_if_overdue()
  assert not interruption.exiting


def test_signals_request_a_stop_and_handlers_are_restored():
  before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
  with on_signals(grace=60.0) as interruption:
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + 10.0
    while not interruption.stop_requested and time.monotonic() < deadline:
      time.sleep(0.01)
    assert interruption.stop_requested
    interruption.begin_exit("here")
  assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


PROGRAM = """
import hashlib, sys, time
from jedi_jax.runs.interruption import on_signals
with on_signals(float(sys.argv[1])) as interruption:
  print("ready", flush=True)
  if sys.argv[2] == "stuck":
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # A call of minutes, in which Python runs no handler.
  if sys.argv[2] == "threads":
    from jedi_jax.training.acting import run_in_threads
    with run_in_threads([lambda check: time.sleep(60)]):
      while True:
        interruption.check()
        time.sleep(0.01)
  while sys.argv[2] == "exiting" and not interruption.stop_requested:
    time.sleep(0.01)
  interruption.begin_exit("here")
  time.sleep(60)
"""


def stopped(grace, how, signals, stderr=subprocess.PIPE):
  """Returns the seconds from the first signal to the end of the program, its status and its stderr."""
  command = [sys.executable, "-c", PROGRAM, str(grace), how]
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    start = time.monotonic()
    for number, pause in signals:
      process.send_signal(number)
      time.sleep(pause)
    _, stderr = process.communicate(timeout=30)
  return time.monotonic() - start, process.returncode, stderr


@pytest.mark.parametrize("how", ["stuck", "threads"])
def test_a_long_call_is_ended_after_the_grace(how):
  seconds, status, stderr = stopped(0.5, how, [(signal.SIGTERM, 0.0)])
  assert status == INTERRUPTED_STATUS
  assert 2.0 < seconds < 10.0  # Grace and margin.
  assert stderr.count("\n") == 1
  assert "Traceback" not in stderr


def test_a_full_disk_does_not_keep_a_long_call_going():
  with open("/dev/full", "w") as full:
    seconds, status, _ = stopped(0.1, "stuck", [(signal.SIGTERM, 0.0)], stderr=full)
  assert status == INTERRUPTED_STATUS
  assert seconds < 10.0


def test_a_second_signal_ends_an_exiting_run_but_a_copy_of_the_first_does_not():
  same = [(signal.SIGINT, 0.2), (signal.SIGTERM, 3.5)]
  seconds, status, stderr = stopped(30.0, "exiting", [*same, (signal.SIGINT, 0.0)])
  assert status == INTERRUPTED_STATUS
  assert 3.7 < seconds < 12.0
  assert stderr.count("\n") == 1


PRINTING = """
from jedi_jax import errors
from jedi_jax.runs.console import Console
from jedi_jax.runs import program
def main():
  Console().log("a line")
  raise errors.Interrupted("stopped")
program.run(main, "")
"""


def test_the_status_is_kept_without_working_streams():
  with open("/dev/full", "w") as full:
    done = subprocess.run([sys.executable, "-c", PRINTING], stdout=full, stderr=full, check=False)
  assert done.returncode == INTERRUPTED_STATUS
