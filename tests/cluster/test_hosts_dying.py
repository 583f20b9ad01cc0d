"""Hosts that die, are cut off, or are slow, while one run trains on the devices of all.

CLUSTER_KILLS is the number of kills of each test that kills; CLUSTER_SEED chooses their moments.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import networks
import numpy as np
import pytest
from toy_hosts import DRIVER, TRAIN, flags_of, free_port, start

from jedi_jax.runs import checkpoint, workdir
from jedi_jax.runs.program import DISCONNECTED_STATUS

HOSTS = 4
KILLS = int(os.environ.get("CLUSTER_KILLS", "2"))
LIMIT = 60.0
"""Seconds in which the others end."""
VICTIM = str(pathlib.Path(__file__).parents[1] / "faults" / "victim.py")
EPOCHS = {
  "collect.total_steps": 100 + 30 * KILLS,
  "evaluation.interval_epochs": 2,
  "evaluation.episodes": 1,
  "evaluation.interval_episodes": 1,
  "checkpoint.interval_epochs": 1,
}
"""Three epochs for each kill and a few more, with a checkpoint each, and an evaluation every second one."""
MOMENTS = [("<saving>", 0.05), ("<evaluating>", 0.1), ("<epoch>", 0.3)]

# Connects processes, and broadcasts until one of them is gone.
PROGRAM = """
import sys, time
import numpy as np
from jedi_jax.runs import program
from jedi_jax.training import hosts, parallel
from jedi_jax.training.parallel import Devices

coordinator, count, index = sys.argv[1:]
del sys.argv[1:]

@hosts.naming_losses()
def main():
  program.Processes(False, coordinator, int(count), int(index)).connect()
  hosts.warm_up_collectives(Devices())
  print("<connected>", flush=True)
  while parallel.broadcast(np.zeros(1)).sum() == 0:
    time.sleep(0.05)

program.run(main, "")
"""


class Process:
  """A process whose lines are read as they come."""

  def __init__(self, running):
    self.running, self.lines = running, []
    self._thread = threading.Thread(target=self._read, daemon=True)
    self._thread.start()

  def _read(self):
    for line in self.running.stdout:
      self.lines.append(line.rstrip("\n"))

  def until(self, marker, count=1, seconds=600.0):
    """Waits until a marker has appeared so often; returns whether it has."""
    stop = time.monotonic() + seconds
    while self.lines.count(marker) < count:
      if time.monotonic() > stop or self.running.poll() is not None:
        return False
      time.sleep(0.005)
    return True

  def end(self, seconds):
    """Waits for the end and returns the status; None if it does not come."""
    try:
      status = self.running.wait(max(seconds, 0.1))
    except subprocess.TimeoutExpired:
      return None
    self._thread.join(5)
    return status


class Job:
  """A run on several hosts, or `PROGRAM` without flags; a context that kills what is left of it."""

  def __init__(self, network, flags=(), count=HOSTS):
    self.processes = []
    for index in range(count):
      place = [f"--coordinator={network.coordinator}", f"--num_processes={count}", f"--process_id={index}"]
      argv = ["toy", VICTIM, TRAIN, *flags, *place] if flags else [network.coordinator, str(count), str(index)]
      self.processes.append(
        Process(
          start(*argv, code=DRIVER if flags else PROGRAM, devices=1, before=network.before(index),
                stderr=subprocess.STDOUT, bufsize=1)
        )
      )  # fmt: skip

  def __enter__(self):
    return self.processes

  def __exit__(self, *_):
    for process in self.processes:
      process.running.kill()
      process.end(10)


def assert_others_end(processes, gone=None, limit=LIMIT):
  """All but one end within the limit, with the status for it and a last line that says why; returns the seconds."""
  begin = time.monotonic()
  for index, process in enumerate(processes):
    if index != gone:
      status = process.end(begin + limit - time.monotonic())
      assert status == DISCONNECTED_STATUS, (index, status, process.lines[-30:])
      assert "another process of the run is gone" in process.lines[-1], process.lines[-5:]
  return time.monotonic() - begin


def final(directory):
  """The bytes of a run's last checkpoint, its records and its result, without times."""
  latest = directory / "checkpoints" / "latest"
  arrays = checkpoint.read(latest, checkpoint.newest(latest))
  records = workdir.read_metrics(directory / "metrics.jsonl")
  times = re.compile(r"^time/|per_second|^seconds$")
  return (
    {name: x.tobytes() for name, x in arrays.items() if name != "state/progress/seconds"},
    [{name: value for name, value in record.items() if not times.search(name)} for record in records],
    {name: v for name, v in workdir.read_json(directory / "result.json").items() if not times.search(name)},
  )


def to_the_end(network, flags, directory):
  with Job(network, [*flags, f"--workdir={directory}"]) as processes:
    statuses = [process.end(900) for process in processes]
  assert statuses == [0] * HOSTS, [process.lines[-10:] for process in processes]
  return processes[0].lines


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_at_once_when_one_is_killed(victim):
  with Job(networks.Loopback(free_port()), count=3) as processes:
    assert all(process.until("<connected>") for process in processes), [process.lines for process in processes]
    processes[victim].running.kill()
    assert_others_end(processes, gone=victim, limit=30)


def test_nothing_is_printed_after_the_last_line():
  code = """
    import os, threading, time
    import jax
    from jedi_jax.errors import DisconnectedError
    from jedi_jax.runs import program

    def report():
      while True:
        os.write(2, b"a report of JAX's threads\\n")
        time.sleep(1e-4)

    def main():
      jax.distributed.is_initialized = lambda: True
      threading.Thread(target=report, daemon=True).start()
      raise DisconnectedError("another process of the run is gone")

    program.run(main, "")
  """
  done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
  assert done.returncode == DISCONNECTED_STATUS
  *before, last = done.stderr.splitlines()
  assert "another process of the run is gone" in last
  assert "a report of JAX's threads" in before


@pytest.fixture(scope="module")
def network(tmp_path_factory):
  with networks.network(HOSTS, tmp_path_factory.mktemp("network"), free_port()) as made:
    yield made


@pytest.mark.cluster
@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("how", ["cut off", "stopped"])
def test_a_silent_host_ends_all(network, how, index):
  if how == "cut off" and not network.parted:
    pytest.skip(networks.allowed())
  with Job(network) as processes:
    assert all(process.until("<connected>") for process in processes), [process.lines for process in processes]
    if how == "cut off":
      network.part(index)
      seconds = assert_others_end(processes)
      network.join(index)
    else:
      processes[index].running.send_signal(signal.SIGSTOP)
      seconds = assert_others_end(processes, gone=index)
      processes[index].running.send_signal(signal.SIGCONT)
      assert processes[index].end(LIMIT) == DISCONNECTED_STATUS
  print(f"host {index} of {HOSTS} {how}: status {DISCONNECTED_STATUS} after {seconds:.1f} s ({type(network).__name__})")


@pytest.fixture(scope="module")
def flags(tiny):
  none = {"training.first_updates.probe": 0, "training.updates.probe": 0}
  return flags_of({**tiny.overrides, **none, **EPOCHS})


@pytest.fixture(scope="module")
def undisturbed(network, flags, tmp_path_factory):
  directory = tmp_path_factory.mktemp("runs") / "undisturbed"
  to_the_end(network, flags, directory)
  return final(directory)


@pytest.mark.cluster
@pytest.mark.parametrize("who", ["leader", "follower"])
def test_kills_at_random_moments(network, flags, undisturbed, tmp_path, who):
  directory = tmp_path / "run"
  generator = np.random.default_rng([int(os.environ.get("CLUSTER_SEED", "0")), who == "leader"])
  longest, met = 0.0, {}
  for kill in range(KILLS):
    moment, delay = MOMENTS[kill % len(MOMENTS)]
    victim = 0 if who == "leader" else int(generator.integers(1, HOSTS))
    with Job(network, [*flags, f"--workdir={directory}"]) as processes:
      assert processes[0].until(moment, int(generator.integers(1, 3))), processes[0].lines[-20:]
      time.sleep(generator.uniform(0.0, delay))
      processes[victim].running.kill()
      assert processes[victim].end(10) == -signal.SIGKILL, processes[victim].lines[-20:]
      longest = max(longest, assert_others_end(processes, gone=victim))
    met[moment] = met.get(moment, 0) + 1
  lines = to_the_end(network, flags, directory)
  assert any(line.startswith("resuming after epoch") for line in lines)
  assert final(directory) == undisturbed
  print(f"{KILLS} kills of a {who}: {met}; the others ended within {longest:.1f} s ({type(network).__name__})")


@pytest.mark.cluster
def test_a_short_partition_is_waited_for_and_one_of_a_minute_ends_every_process(network, flags, undisturbed, tmp_path):
  if not network.parted:
    pytest.skip(networks.allowed())
  directory = tmp_path / "run"
  with Job(network, [*flags, f"--workdir={directory}"]) as processes:
    for count, cut in ((3, 8.0), (5, 60.0)):
      assert processes[0].until("<epoch>", count), processes[0].lines[-20:]
      network.part(2)
      rejoined = time.monotonic() + cut
      try:
        seconds = assert_others_end(processes) if cut == 60.0 else 0.0
        time.sleep(max(rejoined - time.monotonic(), 0.0))
      finally:
        network.join(2)
  to_the_end(network, flags, directory)
  assert final(directory) == undisturbed
  print(f"a partition of 8 s was waited for; one of 60 s: all {HOSTS} processes ended within {seconds:.1f} s")


@pytest.mark.cluster
@pytest.mark.parametrize("index", [0, 2])
def test_a_slow_host_is_waited_for_and_a_frozen_one_is_not(network, flags, undisturbed, tmp_path, index):
  directory = tmp_path / "run"
  with Job(network, [*flags, f"--workdir={directory}"]) as processes:
    slow = processes[index].running
    for count in (2, 4):
      assert processes[0].until("<epoch>", count), processes[0].lines[-20:]
      slow.send_signal(signal.SIGSTOP)
      time.sleep(10)
      slow.send_signal(signal.SIGCONT)
    assert processes[0].until("<epoch>", 6), processes[0].lines[-20:]
    slow.send_signal(signal.SIGSTOP)
    seconds = assert_others_end(processes, gone=index)
    slow.send_signal(signal.SIGCONT)
    assert processes[index].end(LIMIT) == DISCONNECTED_STATUS
  to_the_end(network, flags, directory)
  assert final(directory) == undisturbed
  print(f"host {index} stopped for 10 s twice: waited for; for good: the others ended within {seconds:.1f} s")
