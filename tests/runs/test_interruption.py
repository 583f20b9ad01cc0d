"""Signals are sent to processes of their own: the handlers belong to a process."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jedi_jax.errors import Interrupted
from jedi_jax.runs.interruption import INTERRUPTED_STATUS, Interruption, on_signals


def test_nothing_was_asked():
  interruption = Interruption()
  interruption.check()
  assert not interruption.stop_requested
  assert interruption.seconds_left == float("inf")


def test_the_grace_is_kept_and_the_second_time_ends_it(monkeypatch):
  now = 1000.0
  monkeypatch.setattr("time.monotonic", lambda: now)
  interruption = Interruption(grace=60.0)
  interruption.request_stop("SIGTERM")
  assert interruption.stop_requested
  now += 2.0  # A scheduler that tells the run and its parent.
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


def test_a_run_with_time_left_does_not_leave_by_finishing():
  interruption = Interruption(grace=60.0)
  interruption.exit_if_overdue()
  interruption.request_stop("SIGTERM")
  interruption.exit_if_overdue()
  assert not interruption.exiting


def test_signals_ask_and_the_handlers_are_put_back():
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
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # One call of minutes, within which Python runs no handler.
  if sys.argv[2] == "threads":
    from jedi_jax.training.acting import side_by_side
    with side_by_side([lambda check: time.sleep(60)]):
      while True:
        interruption.check()
        time.sleep(0.01)
  while sys.argv[2] == "leaving" and not interruption.stop_requested:
    time.sleep(0.01)
  interruption.begin_exit("here")
  time.sleep(60)
"""


def stopped(grace, how, signals):
  """Seconds from the first signal until the program's end, its status and what it said."""
  command = [sys.executable, "-c", PROGRAM, str(grace), how]
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    start = time.monotonic()
    for number, pause in signals:
      process.send_signal(number)
      time.sleep(pause)
    _, said = process.communicate(timeout=30)
  return time.monotonic() - start, process.returncode, said


@pytest.mark.parametrize("how", ["stuck", "threads"])
def test_a_call_that_does_not_end_is_left_after_the_grace(how):
  seconds, status, said = stopped(0.5, how, [(signal.SIGTERM, 0.0)])
  assert status == INTERRUPTED_STATUS
  assert 2.0 < seconds < 10.0  # Grace and margin.
  assert said.count("\n") == 1
  assert "Traceback" not in said


def test_a_later_signal_to_a_run_that_is_leaving_ends_it_but_not_the_same_one_twice():
  same = [(signal.SIGINT, 0.2), (signal.SIGTERM, 3.5)]
  seconds, status, said = stopped(30.0, "leaving", [*same, (signal.SIGINT, 0.0)])
  assert status == INTERRUPTED_STATUS
  assert 3.7 < seconds < 12.0
  assert said.count("\n") == 1


SAYING = """
from jedi_jax import errors
from jedi_jax.runs.console import Console
from jedi_jax.runs import program
def main():
  Console().log("a line")
  raise errors.Interrupted("stopped")
program.run(main, "")
"""


def test_a_status_is_kept_where_nothing_can_be_said():
  with open("/dev/full", "w") as full:
    done = subprocess.run([sys.executable, "-c", SAYING], stdout=full, stderr=full, check=False)
  assert done.returncode == INTERRUPTED_STATUS
