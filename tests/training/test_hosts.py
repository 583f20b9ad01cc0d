"""Training by two processes on one machine, connected over loopback as several hosts would be."""

import contextlib
import json

import jax
import numpy as np
import pytest
from toy_hosts import DRIVER, TRAIN, environment, flags_of, free_port, start

import jedi_jax
from jedi_jax.config import override
from jedi_jax.errors import DisconnectedError, Interrupted, TrainingError, UserError
from jedi_jax.runs import workdir
from jedi_jax.runs.program import DISCONNECTED_STATUS, Processes
from jedi_jax.training import hosts, parallel
from jedi_jax.training.parallel import Devices


def finish(*processes):
  """Returns each process's status, output and errors."""
  try:
    outputs = [process.communicate(timeout=400) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def both(port):
  """The flags of two processes."""
  return [[f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={index}"] for index in range(2)]


@pytest.fixture(scope="module")
def toy_flags(tiny):
  none = {"training.first_updates.probe": 0, "training.updates.probe": 0}
  return flags_of({**tiny.overrides, **none})


@pytest.fixture(
  scope="module", params=["toy", *(pytest.param(name, marks=pytest.mark.slow) for name in ("toy overlap", "real"))]
)
def runs(request, tiny, toy_flags, tmp_path_factory):
  """A run by one process, and one by two of which the leader was stopped: (directories, outcomes of the two)."""
  how = request.param
  flags = toy_flags if "toy" in how else flags_of(tiny.overrides)
  if "overlap" in how:
    flags = [*flags, "--set=collect.overlap=true"]
  straight, resumed = (tmp_path_factory.mktemp("runs") / name for name in ("straight", "resumed"))
  ((status, _, err),) = finish(start(how, TRAIN, *flags, f"--workdir={straight}", devices=4))
  assert status == 0, err
  outcomes = []
  for what in (f"{how} stop", how):
    port = free_port()
    outcomes.append(
      finish(*(start(what, TRAIN, *flags, f"--workdir={resumed}", *own, devices=2) for own in both(port)))
    )
  return (straight, resumed), outcomes


# Programs of several CPU devices then go to the compilation cache, and are read from it.
UNGUARDED = """
import jax
update, guards = jax.config.update, ("jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")
jax.config.update = lambda name, value: None if name in guards else update(name, value)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (1, 4)])
def test_a_warm_cache_neither_stalls_nor_crashes_the_real_epoch(tiny, tmp_path, processes, devices):
  """As it did with an earlier version of JAX; the library still keeps such programs out of the cache."""
  cache, sizes = tmp_path / "cache", []
  variables = {**environment(devices), "JAX_COMPILATION_CACHE_DIR": str(cache)}
  for trial in ("cold", "warm"):
    flags = [*flags_of(tiny.overrides), f"--workdir={tmp_path / trial}"]
    connected = both(free_port()) if processes > 1 else [[]]
    done = finish(*(
      start("real", TRAIN, *flags, *own, devices=devices, code=UNGUARDED + DRIVER, env=variables) for own in connected
    ))  # fmt: skip
    assert [status for status, *_ in done] == [0] * processes, done
    sizes.append(len(list(cache.iterdir())))
  assert 0 < sizes[0] == sizes[1]


def test_a_stopped_leader_dismisses_the_others(runs):
  (leader, follower), _ = runs[1]
  assert leader[0] == 1
  assert "KeyboardInterrupt" in leader[2]
  assert follower[0] == DISCONNECTED_STATUS, follower[2]
  assert "the first process of the run ended; its output says why" in follower[2].splitlines()[-1]


def test_the_leader_alone_tells_and_writes(runs):
  (_, directory), (_, (leader, follower)) = runs
  assert (leader[0], follower[0]) == (0, 0), leader[2] + follower[2]
  for mark in ("parameters: ", "epoch ", "done: "):
    assert mark not in follower[1]
  lines = leader[1].splitlines()
  assert any("4 cpu device(s)" in line for line in lines)
  assert sum(line.startswith("resuming after epoch 2") for line in lines) == 1
  assert sum(line.startswith("done: mean return") for line in lines) == 1
  assert json.loads((directory / "result.json").read_text())["env_steps"] == 70
  assert [record["epoch"] for record in workdir.read_metrics(directory / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_two_processes_train_what_one_trains(runs, timeless):
  straight, resumed = runs[0]
  for ours, theirs in zip(*(timeless(d / "metrics.jsonl") for d in (resumed, straight)), strict=True):
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
      assert ours[name] == pytest.approx(value, rel=2e-3, abs=1e-4), f"epoch {theirs['epoch']}, {name}"
  ours, theirs = (jedi_jax.load_agent(directory).params for directory in (resumed, straight))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), ours, theirs)


@pytest.mark.slow
def test_several_runs_are_shared_out(toy_flags, tiny, tmp_path):
  """They need not meet: one process ends before the other begins."""
  for index, own in enumerate(both(free_port())):
    ((status, out, err),) = finish(
      start("toy", TRAIN, *toy_flags, *own, "--runs=2", "--devices=1", f"--workdir={tmp_path}", devices=2)
    )
    assert status == 0, err
    directory = tmp_path / workdir.relative_path(override(tiny.config, {"seed": index}))
    assert f"in {directory}" in out
    result = json.loads((directory / "result.json").read_text())
    assert (result["seed"], result["runs_together"], result["env_steps"]) == (index, 1, 70)
    assert len(list(tmp_path.rglob("result.json"))) == index + 1


@pytest.mark.parametrize(
  ("error", "received"),
  [
    (UserError(""), UserError), (TrainingError(""), TrainingError), (Interrupted(""), Interrupted),
    (KeyError(""), DisconnectedError), (ValueError("Gloo all-reduce failed"), None), (None, None),
  ],
)  # fmt: skip
def test_the_others_end_as_the_leader_does(monkeypatch, error, received):
  sent = []
  monkeypatch.setattr(parallel, "broadcast", lambda message: sent.append(message) or sent[0])
  leader = hosts.Leader(Devices.take(1))
  leader._silent = False
  with contextlib.suppress(Exception), leader:
    if error:
      raise error
  if isinstance(error, ValueError) and not isinstance(error, UserError):
    assert not sent  # The connections are broken.
  elif received is None:
    assert hosts.receive()[0] == hosts.Operation.STOP
  else:
    with pytest.raises(received, match="the first process of the run ended"):
      hosts.receive()


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"coordinator": "host:1", "count": 2}, "--process_id missing"),
    ({"detect": True, "index": 0}, "--distributed asks the cluster"),
    ({"coordinator": "host", "count": 2, "index": 0}, "not HOST:PORT"),
    ({"coordinator": "host:1", "count": 2, "index": 2}, "not one of 0 to 1"),
  ],
)
def test_flags_that_do_not_fit_are_refused(given, message):
  with pytest.raises(UserError, match=message) as caught:
    Processes(**given)
  assert "\n" not in str(caught.value)


def test_shares_are_contiguous_and_equal(monkeypatch):
  assert Processes().share("abc") == "abc"
  assert [Processes(coordinator="host:1", count=2, index=index).share("abcd") for index in range(2)] == ["ab", "cd"]
  with pytest.raises(UserError, match="3 runs cannot be shared out evenly among 2 processes"):
    Processes(coordinator="host:1", count=2, index=0).share("abc")
  with pytest.raises(UserError, match="among the tasks of SLURM"):
    Processes(detect=True).share("ab")
  monkeypatch.setenv("SLURM_PROCID", "1")
  monkeypatch.setenv("SLURM_NTASKS", "2")
  assert Processes(detect=True).share("ab") == "b"
