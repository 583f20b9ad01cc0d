"""Times sampling and the updates of each phase, by variant and number of packed runs.

  python benchmarks/throughput.py --variants=jedi,diamond --preset=paper --batch_size=32 --runs=1,2

Variants are timed in turn, so that other load on the machine affects all of them alike. The replay contains noise,
since no time depends on its contents. `triple` is one update of the denoiser, of the reward / end model and of the
actor-critic in one call, or with --nofused the sum of their times; its FLOP are counted in the trace (see flops.py). On
a GPU or TPU the peak memory of a single case is reported. With --launches each program runs once more under JAX's
profiler, which on a GPU gives the kernels that an update launches and the time for which they keep the device busy, of
all runs together. The projected hours are those of all updates of a run of the preset, without collection and
evaluation. The result is written to benchmarks/results/throughput_<platform>.json.
"""

import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import flops
import jax
import jax.numpy as jnp
import numpy as np
import record
from absl import flags

from jedi_jax import config as config_lib
from jedi_jax import envs, replay
from jedi_jax.config import Config
from jedi_jax.models.base import Model
from jedi_jax.runs import program
from jedi_jax.training.learner import Learner, empty_replay
from jedi_jax.training.parallel import Devices
from jedi_jax.training.updates import make_update
from jedi_jax.types import EnvSpec

_VARIANTS = flags.DEFINE_list("variants", ["jedi", "diamond"], "World models.")
_ENV = flags.DEFINE_string("env", "atari/Breakout", "Environment, for its number of actions and shape of frames.")
_PRESET = flags.DEFINE_string("preset", "paper", "Preset.")
_BATCH = flags.DEFINE_integer("batch_size", 32, "Batch size of every update.", lower_bound=1)
_RUNS = flags.DEFINE_list("runs", ["1"], "Numbers of packed runs on one device.")
_UPDATES = flags.DEFINE_integer("updates", 1, "Updates of a phase in a timed call.", lower_bound=1)
_FRAMES = flags.DEFINE_integer("frames", 15, "Successive frames of a timed sampling call.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed calls.", lower_bound=1)
_WARMUP = flags.DEFINE_integer("warmup", 1, "Untimed calls before them.", lower_bound=0)
_FUSED = flags.DEFINE_bool("fused", default=True, help="Times the triple as one call instead of three.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "Data type of activations: float32 or bfloat16.")
_PEAK = flags.DEFINE_float("peak_tflops", 0.0, "Peak TFLOP/s of the device, to report the share of it; 0 for none.")
_SET = flags.DEFINE_multi_string("set", [], "Overrides a setting.")
_LAUNCHES = flags.DEFINE_bool("launches", default=False, help="Also counts the launches on a GPU.")
_NAME = flags.DEFINE_string("name", None, "Name of the record; throughput_<platform> if left out.")

PHASES = ("denoiser", "reward_end", "actor_critic")
SLOTS = 2_000
"""Capacity of the replay in frames, where it does not matter."""


def make_config(variant: str) -> Config:
  """Returns a variant's configuration with the settings of the flags and without a probe."""
  overrides = [
    f"training.batch_size={_BATCH.value}",
    f"precision.compute_dtype={_DTYPE.value}",
    "training.order=sequential",
    "training.first_updates.probe=0",
    "training.updates.probe=0",
  ]
  return config_lib.make_config(
    env=_ENV.value, variant=variant, preset=_PRESET.value, overrides=[*overrides, *_SET.value]
  )


class Case:
  """The compiled programs of one configuration and number of packed runs.

  Args:
    config: configuration of all runs.
    runs: number of packed runs.
    spec: the environment's spec.
    slots: capacity of the replay in frames.
  """

  def __init__(self, config: Config, runs: int, spec: EnvSpec, *, slots: int = SLOTS):
    self.runs, self.config = runs, config
    batch, age_weights = config.training.batch_size, config.replay.age_weights
    devices = Devices(jax.local_devices()[:1], runs=runs)
    stored = noise_replay(config, spec, slots)
    config = config_lib.override(config, {"replay.capacity": slots, "replay.final_frames": 0, "env.num_envs": 1})
    self._learner = learner = Learner(config, spec, devices)
    states = [learner.init(seed) for seed in range(runs)]
    learner.start(states, [stored] * runs)
    start = time.perf_counter()
    learner.compile()
    self.compile_seconds = time.perf_counter() - start
    self._keys = devices.to_devices([np.asarray([seed, 0], np.uint32) for seed in range(runs)])
    sampling = devices.map(_sampling(learner.model, batch, _FRAMES.value))
    self._sampler = sampling.lower(learner.state.params, self._keys).compile()
    self.flop = {
      phase.name: flops.count(
        make_update({i: phase}, learner.optimizers, batch_size=batch, age_weights=age_weights),
        states[0],
        stored,
      )
      for i, phase in enumerate(learner.model.phases)
    }

  def run(self, **counts: int) -> Any:
    """Runs the given number of updates of each phase and waits for them."""
    return self._learner.update(counts)

  def sample(self) -> Any:
    """Samples `--frames` successive frames for a batch and waits for them."""
    return jax.block_until_ready(self._sampler(self._learner.state.params, self._keys))

  def text(self, name: str) -> str:
    """Returns the HLO text of the sampling program, or of the epoch for any other name."""
    return (self._sampler if name == "sampling" else self._learner.epoch).as_text()

  def calls(self) -> dict[str, Callable[[], Any]]:
    """Returns the timed calls: sampling, and `--updates` updates of each phase."""
    updates: dict[str, Callable[[], Any]] = {
      name: (lambda name=name: self.run(**{name: _UPDATES.value})) for name in PHASES
    }
    return {"sampling": self.sample, **updates}


def _sampling(model: Model, batch: int, frames: int) -> Callable[[Any, Any], Any]:
  def sample(params: Any, key: Any) -> Any:
    keys = jax.random.split(jax.random.wrap_key_data(key), batch)
    noise = model.dynamics.sample_noise(keys, frames)
    past = jnp.zeros((batch, model.conditioning_frames, *model.latent_shape))
    actions = jnp.zeros((batch, model.conditioning_frames), jnp.int32)
    prepared = model.dynamics.prepare(params["denoiser"])

    def step(past: Any, draws: Any) -> tuple[Any, None]:
      following = model.dynamics.sample(prepared, past, actions, draws)
      return jnp.concatenate([past[:, 1:], following[:, None]], axis=1), None

    return jax.lax.scan(step, past, noise)[0]

  return sample


def noise_replay(config: Config, spec: EnvSpec, slots: int = SLOTS) -> replay.ReplayState:
  """Makes a replay with capacity `slots`, filled with episodes of 100 steps of noise."""
  small = config_lib.override(config, {"replay.capacity": slots, "replay.final_frames": 0, "env.num_envs": 1})
  state, steps = empty_replay(small, spec), slots - 50
  rng = np.random.default_rng(0)
  place = np.arange(steps)[None] % 101
  chunk = replay.Chunk(
    frames=rng.integers(256, size=(1, steps, *spec.observation_shape), dtype=np.uint8),
    actions=rng.integers(spec.num_actions, size=(1, steps)).astype(np.int32),
    rewards=rng.integers(-1, 2, size=(1, steps)).astype(np.float32),
    ends=place == 99,
    first=place == 0,
    final=place == 100,
    count=np.asarray([steps], np.int32),
  )
  return jax.device_get(jax.jit(replay.add)(state, chunk))


def _per_call(name: str) -> int:
  """Returns the updates of a timed call; 1 for sampling."""
  return 1 if name == "sampling" else _UPDATES.value


def device_events(call: Callable[[], Any]) -> tuple[int, float]:
  """Profiles one call; returns the number of kernels and copies on GPUs, and the sum of their seconds."""
  with tempfile.TemporaryDirectory() as directory:
    with jax.profiler.trace(directory):
      call()
    (file,) = pathlib.Path(directory).rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(file))
  events = [
    event.duration_ns
    for plane in profile.planes
    if plane.name.startswith("/device:GPU")
    for line in plane.lines
    if line.name.startswith("Stream")
    for event in line.events
  ]
  return len(events), sum(events) / 1e9


def projected_hours(config: Config, seconds: dict[str, float]) -> float:
  """Returns the hours of all updates of a run with the shortest first collection that its settings allow."""
  c, t = config.collect, config.training
  epochs = math.ceil((c.total_steps - c.first_epoch_min_steps) / c.steps_per_epoch) + t.final_epochs
  total = sum(seconds[name] * (getattr(t.first_updates, name) + epochs * getattr(t.updates, name)) for name in PHASES)
  return total / 3600


def main() -> None:
  """Runs the benchmark."""
  started = record.machine()
  spec = envs.spec(_ENV.value)
  variants = [(variant, int(runs)) for runs in _RUNS.value for variant in _VARIANTS.value]
  cases = [Case(make_config(variant), runs, spec) for variant, runs in variants]
  calls = [case.calls() for case in cases]
  if _FUSED.value:
    together = dict.fromkeys(PHASES, _UPDATES.value)
    calls = [{**own, "triple": lambda case=case: case.run(**together)} for own, case in zip(calls, cases, strict=True)]
  times = record.in_turn(calls, repeats=_REPEATS.value, warmup=_WARMUP.value)
  counted = [{name: device_events(call) for name, call in own.items()} if _LAUNCHES.value else {} for own in calls]
  rows = []
  for case, taken, events in zip(cases, times, counted, strict=True):
    each = {name: [t / _UPDATES.value / case.runs for t in taken[name]] for name in taken if name != "sampling"}
    each.setdefault("triple", [sum(parts) for parts in zip(*each.values(), strict=True)])
    medians = {name: statistics.median(values) for name, values in each.items()}
    frames = [case.runs * _BATCH.value * _FRAMES.value / t for t in taken["sampling"]]
    flop = sum(case.flop[name] for name in PHASES)
    row = {
      "variant": case.config.variant,
      "runs": case.runs,
      "batch": _BATCH.value,
      "frames/s": statistics.median(frames),
      "frames/s, each": frames,
      **{f"{name}, a run": values for name, values in each.items()},
      "TFLOP": flop / 1e12,
      "TFLOP/s": flop / medians["triple"] / 1e12,
      "compile s": case.compile_seconds,
      "projected hours": projected_hours(case.config, medians),
      "flop": case.flop,
      "launches": {name: count / _per_call(name) for name, (count, _) in events.items()},
      "busy ms": {name: 1e3 * busy / _per_call(name) for name, (_, busy) in events.items()},
    }
    stats = jax.local_devices()[0].memory_stats()
    if stats and len(cases) == 1:  # The peak is that of the process.
      row["peak MiB"] = stats["peak_bytes_in_use"] / 2**20
    if _PEAK.value:
      row["share of peak"] = row["TFLOP/s"] / _PEAK.value
    rows.append(row)
  columns = ["variant", "runs", "frames/s", *(f"{name}, a run" for name in (*PHASES, "triple"))]
  columns += ["TFLOP", "TFLOP/s", "compile s", "projected hours"] + (["share of peak"] if _PEAK.value else [])
  print(record.table(rows, columns))
  for line in _ratios(rows):
    print(line)
  path = record.write(_NAME.value or f"throughput_{jax.default_backend()}", rows, started=started)
  print(f"written to {path}")


def _ratios(rows: list[dict[str, Any]]) -> list[str]:
  """Compares the first variant with the others at equal numbers of runs."""
  lines = []
  for ours in rows:
    for other in rows:
      if ours["variant"] == rows[0]["variant"] != other["variant"] and ours["runs"] == other["runs"]:
        sampling = ours["frames/s"] / other["frames/s"]
        triple = statistics.median(other["triple, a run"]) / statistics.median(ours["triple, a run"])
        lines.append(
          f"{ours['variant']} against {other['variant']}, {ours['runs']} run(s): "
          f"sampling {sampling:.1f} times faster, triple {triple:.1f} times faster"
        )
  return lines


if __name__ == "__main__":
  program.run(main, __doc__ or "")
