"""What all tests share: four host devices, one compilation cache, and one tiny configuration compiled once."""

# ruff: noqa: E402 - the environment must be set before JAX is first imported; subprocesses inherit it.
import contextlib
import gc
import json
import os
import pathlib
import re
import shutil
import tempfile

_CACHE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jedi_jax_tests_xla_")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _set_xla_flag(name, value):
  flags = os.environ.get("XLA_FLAGS", "")
  if name not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {name}={value}".strip()


_set_xla_flag("--xla_force_host_platform_device_count", 4)

import jax
import numpy as np
import pytest
import toy_model
from torch_writer import Writer

import jedi_jax
from jedi_jax import config as config_lib
from jedi_jax import replay as replay_lib
from jedi_jax.envs.catch import SPEC
from jedi_jax.interop import torch_file
from jedi_jax.runs.console import Console
from jedi_jax.training.collector import CHUNK_SLOTS
from jedi_jax.training.learner import Learner, empty_replay
from jedi_jax.training.loop import Trainer
from jedi_jax.training.parallel import Devices
from jedi_jax.training.state import make_init

_TINY_NETWORKS = {
  "encoder.channels": (4, 4),
  "encoder.downsample": (True, True),
  "denoiser.channels": (4,),
  "denoiser.conditioning_width": 8,
  "denoiser.conditioning_frames": 2,
  "sampler.num_steps": 2,
  "reward_end.channels": (4,),
  "reward_end.lstm_width": 8,
  "actor_critic.lstm_width": 8,
  "actor_critic.horizon": 2,
}
"""The smallest sizes that still have every part."""

_TINY = {
  **_TINY_NETWORKS,
  # Steps large enough to tell parameters apart; an epsilon that keeps rounding errors from becoming whole steps.
  **{f"{part}.optimizer.learning_rate": 1e-2 for part in ("denoiser", "reward_end", "actor_critic", "probe")},
  **{f"{part}.optimizer.epsilon": 1e-3 for part in ("denoiser", "reward_end", "actor_critic", "probe")},
  **{f"{part}.optimizer.warmup_updates": 2 for part in ("denoiser", "reward_end", "actor_critic", "probe")},
  "encoder.norm": "frame",  # With running statistics gradients depend on the number of devices.
  "training.first_updates.probe": 4,
  "training.updates.probe": 2,
  "probe.strips": 2,
  "env.num_envs": 2,
  "collect.total_steps": 70,
  # Catch rewards the 9th and the 18th step of each game: 2 rewards in 20 or 30 steps of two games, 4 in 40.
  "collect.first_epoch_min_steps": 20,
  "collect.first_epoch_max_steps": 50,
  "collect.first_epoch_rewards": 3,
  "collect.steps_per_epoch": 10,
  "evaluation.episodes": 3,
  "evaluation.interval_epochs": 1,
  "checkpoint.interval_epochs": 2,
}
"""Five epochs: 40, 50, 60 and 70 environment steps, and one more without any."""

_UNOPTIMISED = ("not slow and not faults and not cluster", "not slow", "faults", "cluster")
"""The selections of tests, as given to -m, without one that learns."""


def pytest_configure(config):
  gc.set_threshold(100_000, 10, 10)  # With Python's 700 it collects all the time while tracing.
  # Compiling is nearly all that these tests cost. A learning test, run by hand, gets the optimised programs.
  if config.option.markexpr in _UNOPTIMISED:
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # For subprocesses.
  if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1":
    jax.config.update("jax_disable_most_optimizations", True)
    # Read when the backend starts. Of 35 s of a core for the tiny epoch 11 s are left; JAX 0.11 lacks the second flag.
    _set_xla_flag("--xla_cpu_parallel_codegen_split_count", 1)
    if jax.__version_info__ < (0, 11):
      _set_xla_flag("--xla_cpu_use_fusion_emitters", "false")


SLOW = (
  "test_preemption",
  "test_programs",
  "test_packing",
  "test_hosts",
  "test_variants_train",
  "test_extending",
  "test_kills",
  "test_loop",
)
"""Files that take longest. They come first, so that no worker is left with one of them at the end."""


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


def pytest_unconfigure():
  if _CACHE:
    shutil.rmtree(_CACHE, ignore_errors=True)


class Tiny:
  """The tiny configuration on Catch, built once; its epoch is traced and compiled once for each number of devices.

  Args:
    build: builds the model.
    **changes: further settings.
  """

  networks = _TINY_NETWORKS
  overrides = _TINY
  epochs = 5
  first_steps = 40

  def __init__(self, *, build=jedi_jax.build, **changes):
    self.build = build
    self.config = config_lib.make_config(env="catch", preset="debug", overrides={**_TINY, **changes})
    learner = Learner(self.config, SPEC, self.devices(), build=build)
    self.model, self.optimizers = learner.model, learner.optimizers
    self.init = make_init(self.model, self.optimizers)
    self._epochs, self._watches = {}, {}

  def learner(self, devices=1):
    """A learner with the state and the replay of `state` and `replay`."""
    learner = Learner(self.config, SPEC, self.devices(devices), build=self.build)
    learner.start([self.init(jax.random.key(0))], [noise_replay(self.config)])
    return learner

  def flags(self, **changes):
    """The flags for this configuration and further settings, without the workdir."""
    written = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in {**_TINY, **changes}.items()}
    return ["--env=catch", "--preset=debug", "--devices=1", *(f"--set={k}={v}" for k, v in written.items())]

  def devices(self, count=1):
    assert len(jax.local_devices()) >= count, "the tests force four host devices before JAX starts"
    return Devices.take(count)

  def lowered_epoch(self, devices):
    """The epoch for one run or, packed, several; traced and lowered, but not compiled."""
    return Learner(self.config, SPEC, devices, build=self.build).lower()

  def epoch(self, count=1):
    """(distributed state, distributed replay, counts) -> the same and sums; compiled: nothing traces it again."""
    if count not in self._epochs:
      self._epochs[count] = self.lowered_epoch(self.devices(count)).compile()
    return self._epochs[count]

  def packed_devices(self):
    """Two devices with two runs each."""
    return Devices.take(2).with_runs(4)

  def packed_epoch(self):
    """The epoch of four packed runs."""
    if "packed" not in self._epochs:
      self._epochs["packed"] = self.lowered_epoch(self.packed_devices()).compile()
    return self._epochs["packed"]

  @contextlib.contextmanager
  def shared(self):
    """A context in which only the first learner on such devices traces and compiles its programs."""

    def use(learner):
      devices = learner.devices
      learner.epoch = self.packed_epoch() if devices.packed else self.epoch(devices.count)
      learner._watch = self._watches.setdefault((devices.count, devices.runs), learner._watch)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(Learner, "compile", use)
      yield

  def state(self, seed=0, devices=1):
    return self.devices(devices).to_devices([self.init(jax.random.key(seed))])

  def replay(self, devices=1):
    """A replay of the shapes of a run, filled with episodes of noise."""
    return self.devices(devices).to_devices([noise_replay(self.config)])


def noise_replay(config):
  """Two streams of episodes of 5 to 9 steps whose frames, actions and rewards are noise."""
  generator = np.random.default_rng(0)
  state = empty_replay(config, SPEC)
  streams = config.env.num_envs
  writer = replay_lib.ChunkWriter(num_streams=streams, size=CHUNK_SLOTS, observation_shape=SPEC.observation_shape)
  left = np.asarray([5, 7])
  frames = generator.integers(256, size=(streams, *SPEC.observation_shape), dtype=np.uint8)
  while not writer.is_full:
    left -= 1
    following = generator.integers(256, size=frames.shape, dtype=np.uint8)
    rewards = generator.integers(-1, 2, size=streams).astype(np.float32)
    ends = left == 0
    writer.add(frames, generator.integers(3, size=streams), rewards, ends, np.zeros(streams, bool), following)
    frames = following
    left = np.where(ends, generator.integers(5, 10, size=streams), left)
  return jax.jit(replay_lib.add)(state, writer.flush())


@pytest.fixture(scope="session")
def one_device():
  """Environment variables of a process with one device, as most users have; it compiles as these tests do."""
  return os.environ | {"XLA_FLAGS": re.sub(r"(device_count)=\d+", r"\1=1", os.environ["XLA_FLAGS"])}


@pytest.fixture(scope="session")
def tiny():
  return Tiny()


_WITHOUT_PROBE = {"training.first_updates.probe": 0, "training.updates.probe": 0}


@pytest.fixture(scope="session")
def tiny_without_probe():
  return Tiny(**_WITHOUT_PROBE)


@pytest.fixture(scope="session")
def toy():
  return Tiny(build=toy_model.build)


@pytest.fixture(scope="session")
def toy_without_probe():
  return Tiny(build=toy_model.build, **_WITHOUT_PROBE)


class Quiet(Console):
  """Progress that is remembered."""

  def __init__(self):
    self.lines = []

  def log(self, text):
    self.lines.append(text)

  def show(self, task, done, total, detail=""):
    pass


@pytest.fixture(scope="session")
def train_tiny(tiny):
  """Trains the tiny configuration: (directory, devices=1, config=None) -> what `train` returns.

  Its programs are shared; a run by the command line (see test_programs) and the one on Atari compile theirs.
  """

  def run(directory, devices=1, config=None, console=None, **options):
    with tiny.shared():
      options |= {"devices": tiny.devices(devices), "console": console or Quiet()}
      return jedi_jax.train(config or tiny.config, directory, **options)

  return run


@pytest.fixture(scope="session")
def poisoned():
  """A context in which the denoiser of a run is not a number from the updates of an epoch on."""

  @contextlib.contextmanager
  def poison(*, run, epoch):
    original = Trainer.update

    def update(trainer, counts, number, *, split):
      if number == epoch:
        learner = trainer.learner
        states, replays = map(list, zip(*(learner.snapshot(i) for i in range(len(trainer.runs))), strict=True))
        nothing = jax.tree.map(lambda x: np.full_like(x, np.nan), states[run].params["denoiser"])
        states[run] = states[run].replace(params={**states[run].params, "denoiser": nothing})
        learner.start(states, replays)
      return original(trainer, counts, number, split=split)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(Trainer, "update", update)
      yield

  return poison


@pytest.fixture(scope="session")
def stopped():
  """A context in which a run is stopped within an epoch, before its updates, and has to be."""

  @contextlib.contextmanager
  def stop(*, epoch):
    original = Trainer.update

    def update(trainer, counts, number, *, split):
      if number == epoch:
        raise KeyboardInterrupt
      return original(trainer, counts, number, split=split)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(Trainer, "update", update)
      with pytest.raises(KeyboardInterrupt):
        yield

  return stop


@pytest.fixture(scope="session")
def finished_run(train_tiny, tmp_path_factory):
  """The directory of a run that went straight to its end; read it, do not change it."""
  directory = tmp_path_factory.mktemp("runs") / "straight"
  train_tiny(directory)
  return directory


@pytest.fixture(scope="session")
def timeless():
  """Reads the records of a metrics.jsonl without what a clock says."""

  def read(path: pathlib.Path):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [
      {name: value for name, value in record.items() if not name.startswith("time/") and "per_second" not in name}
      for record in records
    ]

  return read


@pytest.fixture(scope="session")
def snapshot():
  """Reads every file below a directory: names to bytes."""

  def read(directory: pathlib.Path):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}

  return read


@pytest.fixture
def pt(tmp_path_factory, monkeypatch):
  """Writes `.pt` files; they are read back by the reader that needs no torch."""
  monkeypatch.setattr(torch_file, "_torch_is_safe", lambda: False)
  return Writer(tmp_path_factory.mktemp("pt"), monkeypatch)


@pytest.fixture
def quiet():
  """Progress that is remembered in `lines`."""
  return Quiet()
