"""Runs that are killed or stopped repeatedly end bit-equal to an undisturbed run."""

import json
import os
import signal
import time

import numpy as np
import pytest
from running import arrays, assert_equal_bit_for_bit, command, newest, process, to_the_end, until

from jedi_jax.runs.interruption import INTERRUPTED_STATUS

KILLS = 30
MANY_EPOCHS = {
  "collect.total_steps": 820,
  "collect.first_epoch_min_steps": 20,
  "collect.first_epoch_max_steps": 20,
  "collect.steps_per_epoch": 10,
  "evaluation.interval_epochs": 2,
  "checkpoint.interval_epochs": 1,
}
"""82 epochs with a checkpoint each, and an evaluation every second epoch."""


def kill(running, moment, count, seconds):
  """Kills a process some seconds after a marker's nth appearance; returns its lines, and whether it was killed."""
  lines, met = until(running, moment, count) if moment else ([], True)
  time.sleep(seconds)
  running.send_signal(signal.SIGKILL)
  running.stdout.read()
  return lines, met and running.wait() == -signal.SIGKILL


def half_saved(directory):
  return list((directory / "checkpoints").glob("*/*.orbax-checkpoint-tmp"))


def stop(running, number, moment, count):
  """Sends a signal at a marker's nth appearance; returns the seconds until the end, the status and the last line."""
  _, met = until(running, moment, count)
  assert met
  start = time.monotonic()
  running.send_signal(number)
  lines, _ = until(running, None)
  return time.monotonic() - start, running.wait(), lines[-1]


def test_a_killed_and_a_stopped_run_end_as_an_undisturbed_one(tmp_path, tiny, finished_run, timeless):
  directory = tmp_path / "run"
  argv = command(tiny.flags(), directory)
  with process(argv) as running:
    _, killed = kill(running, "<saving>", 2, 0.01)
    assert killed
  with process(argv) as running:
    seconds, status, last = stop(running, signal.SIGTERM, "<epoch>", 2)
  assert status == INTERRUPTED_STATUS
  assert "stopped by SIGTERM after epoch" in last
  assert seconds < 10.0
  status, lines = to_the_end(argv)
  assert status == 0, lines
  assert any(line.startswith("resuming after epoch") for line in lines)
  assert timeless(directory / "metrics.jsonl") == timeless(finished_run / "metrics.jsonl")
  assert_equal_bit_for_bit(arrays(newest(directory)), arrays(newest(finished_run)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny):
  directory = tmp_path_factory.mktemp("runs") / "undisturbed"
  status, lines = to_the_end(command(tiny.flags(**MANY_EPOCHS), directory))
  assert status == 0, lines
  return directory


@pytest.mark.faults
def test_thirty_kills_change_nothing(tmp_path, tiny, undisturbed, timeless):
  directory = tmp_path / "run"
  argv = command(tiny.flags(**MANY_EPOCHS), directory)
  generator = np.random.default_rng(int(os.environ.get("FAULTS_SEED", "0")))
  kills, cut_saves, met = 0, 0, {}
  moments = [("<saving>", 0.05), ("<evaluating>", 0.1), ("<epoch>", 0.3), (None, 15.0)]
  while kills < KILLS:
    moment, longest = moments[kills % len(moments)]
    with process(argv) as running:
      lines, killed = kill(running, moment, int(generator.integers(1, 5)), generator.uniform(0.0, longest))
    assert killed, lines  # 82 epochs suffice for 30 kills after at most four markers each.
    assert not any("Traceback" in line for line in lines), lines
    kills += 1
    met[moment] = met.get(moment, 0) + 1
    cut_saves += bool(half_saved(directory))
  assert cut_saves > 0
  status, lines = to_the_end(argv)
  assert status == 0, lines
  print(f"{kills} kills: {met}; {cut_saves} of them cut a save")
  assert not half_saved(directory)
  assert timeless(directory / "metrics.jsonl") == timeless(undisturbed / "metrics.jsonl")
  ours, theirs = (json.loads((d / "result.json").read_text()) | {"seconds": 0} for d in (directory, undisturbed))
  assert ours == theirs
  assert_equal_bit_for_bit(arrays(newest(directory)), arrays(newest(undisturbed)))


@pytest.mark.faults
@pytest.mark.parametrize(
  ("number", "moment", "grace", "where"),
  [
    (signal.SIGINT, "<epoch>", 60, "after epoch"),
    (signal.SIGTERM, "<epoch>", 0, "before the end of its epoch"),
    (signal.SIGINT, "<evaluating>", 0, "before the end of its epoch"),
    (signal.SIGTERM, "<saving>", 60, "after epoch"),
  ],
)
def test_signals_stop_a_run_within_the_grace(tmp_path, tiny, undisturbed, number, moment, grace, where):
  directory = tmp_path / "run"
  argv = command([*tiny.flags(**MANY_EPOCHS), f"--grace={grace}"], directory)
  with process(argv) as running:
    seconds, status, last = stop(running, number, moment, 3)
  assert status == INTERRUPTED_STATUS
  assert f"stopped by {number.name} {where}" in last
  assert seconds < 10.0
  assert not half_saved(directory)
  status, lines = to_the_end(argv)
  assert status == 0, lines
  assert_equal_bit_for_bit(arrays(newest(directory)), arrays(newest(undisturbed)))
