"""Real steps taken side by side, and beside training."""

import json
import math
import shutil
import threading
import time

import chex
import jax
import numpy as np
import pytest

import jedi_jax
from jedi_jax import envs
from jedi_jax.config import override
from jedi_jax.envs.catch import SPEC
from jedi_jax.errors import Interrupted, UserError
from jedi_jax.models.build import build
from jedi_jax.runs import checkpoint, workdir
from jedi_jax.runs.interruption import Interruption
from jedi_jax.training import acting
from jedi_jax.training import train as train_lib
from jedi_jax.training.acting import Actor, run_in_threads
from jedi_jax.training.collector import Collector
from jedi_jax.training.loop import Trainer
from jedi_jax.training.parallel import Devices

SOON = 60.0
"""Seconds after which what should have happened has not."""


def test_tasks_run_together_and_their_results_are_in_order():
  meeting = threading.Barrier(2)

  def task(number, check):
    check()
    meeting.wait(SOON)
    return number

  with run_in_threads([lambda check, i=i: task(i, check) for i in range(2)]) as futures:
    pass
  assert [future.result() for future in futures] == [0, 1]


def test_nothing_to_do_is_nothing():
  with run_in_threads([]) as futures:
    assert futures == []


def test_an_exception_in_the_context_ends_the_tasks():
  ended = threading.Event()

  def endless(check):
    try:
      while True:
        check()
    finally:
      ended.set()

  with pytest.raises(KeyError), run_in_threads([endless] * 10) as futures:
    raise KeyError
  assert ended.is_set()
  assert all(future.exception() for future in futures)


def test_an_exception_of_a_task_is_raised_with_its_result():
  def failing(check):
    raise KeyError("its own")

  with run_in_threads([failing, lambda check: 1]) as futures:
    pass
  assert futures[1].result() == 1
  with pytest.raises(KeyError, match="its own"):
    futures[0].result()


@pytest.fixture(scope="module")
def overlapping(tiny):
  return override(tiny.config, {"collect.overlap": True})


def test_the_host_evaluates_the_policy_in_float32(tiny, overlapping):
  for given, half in ((tiny.config, True), (overlapping, False)):
    # The kernels of a GPU do not compile for the host.
    config = override(given, {"precision.compute_dtype": "bfloat16", "precision.kernels": "pallas"})
    actor = Actor(config, SPEC, build(config, SPEC))
    params = actor.to_device(actor.params(tiny.learner(), 0))
    assert set(params) == {"encoder", "actor_critic"}
    with actor.device_context():
      state, key = actor.model.initial_state(2), jax.random.key(0)
    observations = np.zeros((2, *SPEC.observation_shape), np.uint8)
    traced = actor.act.trace(params, observations, state, np.ones(2, bool), key, np.uint32(0), np.float32(0))
    assert ("bf16" in str(traced.jaxpr)) == half
    assert ("pallas_call" in str(traced.jaxpr)) == half


def test_arrays_are_where_the_policy_is_evaluated(overlapping, tiny, monkeypatch):
  """Another device stands for a host beside an accelerator."""
  host = jax.local_devices()[3]
  monkeypatch.setattr(acting, "_cpu", lambda: host)
  actor = Actor(overlapping, SPEC, tiny.model)
  params = actor.to_device(actor.params(tiny.learner(), 0))
  with actor.device_context():
    state, key = actor.model.initial_state(2), jax.random.key(0)
  observations = np.zeros((2, *SPEC.observation_shape), np.uint8)
  result = actor.act(params, observations, state, np.ones(2, bool), key, np.uint32(0), np.float32(0))
  for x in jax.tree.leaves((params, state, key, result)):
    assert x.devices() == {host}


def test_a_process_without_a_cpu_is_refused_before_anything(overlapping, tmp_path, quiet, monkeypatch):
  devices = jax.local_devices()

  def local_devices(backend=None):
    if backend is None:
      return devices
    raise RuntimeError(f"no {backend}")

  asked = jax.config.values | {"jax_platforms": "cuda"}
  with monkeypatch.context() as patch:
    patch.setattr(acting.jax, "local_devices", local_devices)
    patch.setattr(type(jax.config), "values", asked)
    with pytest.raises(UserError, match=r"collect\.overlap needs the CPU .* JAX_PLATFORMS=cuda,cpu") as caught:
      jedi_jax.train(overlapping, tmp_path / "run", devices=Devices(jax.devices()[:1]), console=quiet)
  assert "\n" not in str(caught.value)
  assert not (tmp_path / "run").exists()


class Watched:
  """What a training acted with and trained on, epoch by epoch.

  Attributes:
    slots: most slots written of a stream of replay, at the updates.
    trained: parameters of the actor-critic before the updates.
    acted: those of which the real steps were.
  """

  def __init__(self):
    self.slots, self.trained, self.acted = [], [], []

  def __call__(self, train):
    update, collect = Trainer.update, Collector.collect

    def updated(trainer, *args, **kwargs):
      state, replay = trainer.learner.snapshot()
      self.slots.append(int(replay.written.max()))
      self.trained.append(state.params["actor_critic"])
      return update(trainer, *args, **kwargs)

    def collected(collector, params, *args):
      self.acted.append(jax.device_get(params["actor_critic"]))
      return collect(collector, params, *args)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(Trainer, "update", updated)
      patch.setattr(Collector, "collect", collected)
      train()
    return self


@pytest.fixture(scope="module")
def overlapped(overlapping, train_tiny, tmp_path_factory):
  """The directory of a run whose steps were taken while it trained, and what was watched."""
  directory = tmp_path_factory.mktemp("runs") / "overlapped"
  return directory, Watched()(lambda: train_tiny(directory, config=overlapping))


def records(directory):
  return workdir.read_metrics(directory / "metrics.jsonl")


def test_steps_come_into_replay_an_epoch_later_from_a_policy_that_is_no_older(
  overlapped, tiny, train_tiny, finished_run, tmp_path
):
  directory, watched = overlapped
  straight = Watched()(lambda: train_tiny(tmp_path / "run"))
  assert straight.slots == [*sorted(set(straight.slots[:4])), straight.slots[3]]  # The last epoch takes no steps.
  assert watched.slots == [straight.slots[0], *straight.slots[:4]]
  for run in (straight, watched):
    first = len(run.acted) - 3  # The first epoch has several collections.
    assert first > 1
    chex.assert_trees_all_equal(run.acted[first:], run.trained[1:4])
  assert len(records(directory)) == len(records(finished_run)) == tiny.epochs
  for name in ("env_steps", "collect/steps"):
    assert [r.get(name) for r in records(directory)] == [r.get(name) for r in records(finished_run)]


def test_the_first_epoch_is_as_without_overlap(overlapped, finished_run):
  ours, theirs = (records(directory) for directory in (overlapped[0], finished_run))
  names = [name for name in theirs[0] if name.startswith(("denoiser/", "reward_end/", "actor_critic/"))]
  assert {name: ours[0][name] for name in names} == {name: theirs[0][name] for name in names}
  assert ours[1]["denoiser/loss"] != theirs[1]["denoiser/loss"]


def test_an_overlapped_run_resumes_bit_for_bit(overlapped, overlapping, train_tiny, stopped, timeless, tmp_path):
  with stopped(epoch=4):
    train_tiny(tmp_path / "run", config=overlapping)
  train_tiny(tmp_path / "run", config=overlapping)
  assert timeless(tmp_path / "run" / "metrics.jsonl") == timeless(overlapped[0] / "metrics.jsonl")
  results = [json.loads((d / "result.json").read_text()) | {"seconds": 0} for d in (tmp_path / "run", overlapped[0])]
  assert results[0] == results[1]


def test_steps_are_taken_while_the_device_trains(overlapping, train_tiny, tmp_path):
  """From the second epoch on, neither begins to end before the other has begun."""
  training, collecting = threading.Event(), threading.Event()
  update, collect = Trainer.update, Collector.collect
  met = []

  def meet(own, other):
    own.set()
    met.append(other.wait(SOON))

  def updated(trainer, counts, epoch, *, split):
    if 1 < epoch < 5:
      meet(training, collecting)
      collecting.clear()
    return update(trainer, counts, epoch, split=split)

  def collected(collector, *args):
    if collector.env_steps >= 40:
      meet(collecting, training)
      training.clear()
    return collect(collector, *args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Trainer, "update", updated)
    patch.setattr(Collector, "collect", collected)
    train_tiny(tmp_path / "run", config=overlapping)
  assert met == [True] * 6


class Broken(Exception):
  pass


@pytest.mark.parametrize("overlap", [False, True])
def test_an_environment_that_fails_ends_the_run(tiny, train_tiny, tmp_path, monkeypatch, overlap):
  closed = []
  make = envs.make

  def breaking(*args, **kwargs):
    env = make(*args, **kwargs)
    if kwargs["life_loss_ends"]:  # Those that collect.
      step, close, left = env.step, env.close, iter(range(27))  # 54 of 60 steps: within the third epoch.

      def fail(actions):
        if next(left, None) is None:
          raise Broken("emulator")
        return step(actions)

      env.step = fail
      env.close = lambda: (closed.append(True), close())
    return env

  monkeypatch.setattr(envs, "make", breaking)
  with pytest.raises(Broken, match="emulator"):
    train_tiny(tmp_path / "run", config=override(tiny.config, {"collect.overlap": overlap}))
  assert closed == [True]
  assert checkpoint.newest(tmp_path / "run" / "checkpoints" / "latest") == 2


def test_a_run_without_time_left_stops_between_steps(tiny, train_tiny, quiet, tmp_path, monkeypatch):
  interruption = Interruption(grace=0.0)
  monkeypatch.setattr(train_lib, "Interruption", lambda: interruption)
  step, taken = Collector._step, []

  def slow(collector, *args):
    taken.append(collector)
    if len(taken) == 5:
      interruption.request_stop("a test")
    time.sleep(0.05)
    return step(collector, *args)

  monkeypatch.setattr(Collector, "_step", slow)
  with pytest.raises(Interrupted, match="before the end of its epoch"):
    train_tiny(tmp_path / "run", console=quiet)
  assert 5 <= len(taken) < 15  # Of 20 of the first epoch; the loop looks every tenth of a second.
  assert interruption.exiting


def test_a_refused_resume_keeps_the_best_checkpoint(finished_run, train_tiny, tmp_path, monkeypatch):
  directory = tmp_path / "run"
  shutil.copytree(finished_run, directory)
  (directory / "result.json").unlink()
  best = directory / "checkpoints" / "best"
  [number] = best.iterdir()
  number.rename(best / "9")  # Later than the latest.
  monkeypatch.setattr(Collector, "restore", lambda *_: (_ for _ in ()).throw(UserError("not repeated")))
  with pytest.raises(UserError, match="not repeated"):
    train_tiny(directory)
  assert [p.name for p in best.iterdir()] == ["9"]


@pytest.mark.parametrize("resumed", [True, False])
def test_a_best_checkpoint_that_the_resumed_run_has_not_reached_is_no_bar(
  finished_run, train_tiny, tmp_path, monkeypatch, resumed
):
  directory = tmp_path / "run"
  shutil.copytree(finished_run, directory)
  (directory / "result.json").unlink()
  best = directory / "checkpoints" / "best"
  [number] = best.iterdir()
  number.rename(best / "9")
  if not resumed:  # Killed before the first save.
    shutil.rmtree(directory / "checkpoints" / "latest")
  seen = []

  def stop(trainer):
    seen.extend(run.progress.best for run in trainer.runs)
    raise KeyboardInterrupt

  monkeypatch.setattr(Trainer, "run_to_end", stop)
  with pytest.raises(KeyboardInterrupt):
    train_tiny(directory)
  assert seen == [-math.inf]
  assert not any(best.iterdir())
