"""Times collection: the emulators, the policy, and the time that collection adds to the epochs of the training loop.

  python benchmarks/collection.py --num_envs=1,8

The training loop runs with a simulated epoch in place of the compiled one. The simulated call takes --triple_ms for
each triple of updates (denoiser, reward / end model, actor-critic) of each packed run, the assumed time on an
accelerator. The remaining time of an epoch is collection, including adding to replay. Its share is reported without
`collect.overlap`, with it, and with it while the simulated call keeps one core of the host busy, as kernel launches can
do; otherwise the call sleeps. Without overlap the policy runs on the device of this process; an accelerator would take
less time than a CPU. The result is written to benchmarks/results/collection_<platform>.json.
"""

import hashlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import record
import throughput
from absl import flags

import jedi_jax
from jedi_jax import config as config_lib
from jedi_jax import envs
from jedi_jax.runs import program, workdir
from jedi_jax.runs.console import Console
from jedi_jax.training.acting import Actor
from jedi_jax.training.learner import Learner
from jedi_jax.training.parallel import Devices

_NUM_ENVS = flags.DEFINE_list("num_envs", ["1", "8"], "Numbers of environments.")
_PACKED = flags.DEFINE_list("packed", ["1"], "Numbers of packed runs.")
_TRIPLE = flags.DEFINE_float("triple_ms", 15.0, "Milliseconds of a triple of updates.", lower_bound=0.0)
_FLAGS = flags.FLAGS


def main() -> None:
  """Runs the benchmark."""
  started = record.machine()
  rows = []
  for runs, num_envs in itertools.product(*(map(int, flag.value) for flag in (_PACKED, _NUM_ENVS))):
    for variant in _FLAGS.variants:
      config = throughput.make_config(variant)
      steps = -(-config.collect.steps_per_epoch // num_envs) * num_envs
      changes = {
        "env.num_envs": num_envs,
        "collect.steps_per_epoch": steps,
        # The first epoch is as short as the others.
        **{f"collect.first_epoch_{name}_steps": steps for name in ("min", "max")},
        "collect.total_steps": steps * (1 + _FLAGS.repeats),
        **{f"training.first_updates.{name}": count for name, count in vars(config.training.updates).items()},
        "training.final_epochs": 0,
        # Each epoch is one call.
        "training.updates_per_call": 10**9,
        "training.time_phases_every": 10**9,
        "replay.capacity": 5_000,
        "replay.final_frames": 500,
        "evaluation.interval_epochs": 0,
        "evaluation.episodes": 1,
        "evaluation.max_episode_steps": 1,
      }
      config = config_lib.override(config, changes)
      rows.append({"variant": variant, "environments": num_envs, "runs": runs, "steps an epoch": steps})
      rows[-1] |= _parts(config)
      for name, overlap, busy in (("", False, False), (", overlapped", True, False), (", a core busy", True, True)):
        seconds, share = _loop(config_lib.override(config, {"collect.overlap": overlap}), runs, busy=busy)
        rows[-1] |= {f"besides updates{name}": seconds, f"share of an epoch{name}": share}
  print(record.table(rows, list(rows[0])))
  print(f"written to {record.write(_FLAGS.name or f'collection_{jax.default_backend()}', rows, started=started)}")


def _parts(config: config_lib.Config) -> dict[str, list[float]]:
  """Returns the seconds that one environment step takes in the emulators and in the policy, for each repetition."""
  c = config.env
  env = envs.make(
    c.name, num_envs=c.num_envs, seed=0, life_loss_ends=c.life_loss_ends, max_episode_steps=c.max_episode_steps
  )
  try:
    steps = config.collect.steps_per_epoch
    actor = Actor(config, env.spec, jedi_jax.build(config, env.spec))
    params = actor.model.init(jax.random.key(0))
    actions = np.random.default_rng(0).integers(env.spec.num_actions, size=(steps // c.num_envs, c.num_envs))
    observations, state = env.reset(), actor.model.initial_state(c.num_envs)
    restart, key = np.zeros(c.num_envs, bool), jax.random.key(0)

    def emulate() -> None:
      for row in actions:
        env.step(row.astype(np.int32))

    def choose() -> None:
      for _ in actions:
        np.asarray(actor.act(params, observations, state, restart, key, np.uint32(0), np.float32(0))[0])

    parts = {"emulators, a step": emulate, "policy, a step": choose}
    return {name: [t / steps for t in record.seconds(part, repeats=_FLAGS.repeats)] for name, part in parts.items()}
  finally:
    env.close()


class _SimulatedEpoch:
  """Replaces the compiled epoch by a call that takes a given time.

  Args:
    seconds: duration of a call.
    sums: sums of metrics that the call returns.
    busy: whether the call keeps a core busy; otherwise it sleeps.
  """

  def __init__(self, seconds: float, sums: Any, *, busy: bool):
    self._seconds, self._sums, self._busy = seconds, sums, busy

  def __call__(self, state: Any, replay: Any, counts: Mapping[str, Any]) -> tuple[Any, Any]:
    del replay, counts
    end = time.monotonic() + self._seconds
    while self._busy and time.monotonic() < end:
      hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000)  # Less than a millisecond; releases the GIL.
    time.sleep(max(end - time.monotonic(), 0.0))
    return state, self._sums


def _loop(config: config_lib.Config, runs: int, *, busy: bool) -> tuple[list[float], float]:
  """Returns the seconds of each epoch without its updates, and the share of their median in an epoch."""
  updates = config.training.updates
  updating = runs * max(updates.denoiser, updates.reward_end, updates.actor_critic) * _TRIPLE.value / 1e3

  def simulate(learner: Learner) -> None:
    learner.epoch = _SimulatedEpoch(updating, {name: {} for name in learner.phases}, busy=busy)

  configs = [config_lib.override(config, {"seed": seed}) for seed in range(runs)]
  with tempfile.TemporaryDirectory() as place:
    directories = [f"{place}/{run.seed}" for run in configs]
    compile_epoch, Learner.compile = Learner.compile, simulate
    try:
      jedi_jax.train_packed(
        configs, directories, devices=Devices(jax.local_devices()[:1]), console=Console(io.StringIO())
      )
    finally:
      Learner.compile = compile_epoch
    epochs = workdir.read_metrics(workdir.read(directories[0]).metrics)[1:]  # The first one compiles.
  seconds = [epoch["time/epoch_seconds"] - updating for epoch in epochs]
  share = statistics.median(seconds) / (statistics.median(seconds) + updating)
  return seconds, share


if __name__ == "__main__":
  program.run(main, __doc__ or "")
