"""Times collection: the emulators, the policy, and the whole of it with its way into replay.

  python benchmarks/collection.py --num_envs=1,8

The share of an epoch is that of collection in collection and updates, at --triple_ms for one update of the denoiser, of
the reward / end model and of the actor-critic: what an epoch of the preset is meant to take on one accelerator. The
policy runs on the device of this process: on a CPU much of a step is its arithmetic, which an accelerator does in no
time, so the share is told without the policy's calls too. That is a lower bound: an accelerator has to be reached.
Written to benchmarks/results/collection_<platform>.json.
"""

import statistics

import jax
import numpy as np
import record
import throughput
from absl import flags

from jedi_jax import config as config_lib
from jedi_jax import envs, replay, runtime
from jedi_jax.agent import make_act
from jedi_jax.models.variants import build
from jedi_jax.training.collector import Collector
from jedi_jax.training.memory import empty_replay

_NUM_ENVS = flags.DEFINE_list("num_envs", ["1", "8"], "Numbers of environments.")
_TRIPLE = flags.DEFINE_float("triple_ms", 15.0, "Milliseconds of one update of each component.", lower_bound=0.0)
_FLAGS = flags.FLAGS


def main() -> None:
  """Measures and writes."""
  started = record.machine()
  rows = []
  for num_envs in (int(text) for text in _NUM_ENVS.value):
    for variant in _FLAGS.variants:
      config = throughput.make_config(variant)
      steps = -(-config.collect.steps_per_epoch // num_envs) * num_envs
      config = config_lib.override(config, {"env.num_envs": num_envs, "collect.steps_per_epoch": steps})
      times = _measure(config)
      updates = config.training.updates
      triples = max(updates.denoiser, updates.reward_end, updates.actor_critic)
      collecting = [t * steps for t in times["collection"]]
      updating = triples * _TRIPLE.value / 1e3
      epoch = statistics.median(collecting)
      others = max(epoch - steps * statistics.median(times["policy"]), 0.0)
      rows.append(
        {
          "variant": variant,
          "environments": num_envs,
          "steps an epoch": steps,
          **{f"{name}, a step": values for name, values in times.items()},
          "collection, an epoch": collecting,
          "share of an epoch": epoch / (epoch + updating),
          "share without the policy": others / (others + updating),
        }
      )
  print(record.table(rows, list(rows[0])))
  print(f"written to {record.write(f'collection_{jax.default_backend()}', rows, started=started)}")


def _measure(config: config_lib.Config) -> dict[str, list[float]]:
  """Returns the seconds that one environment step takes in each part, of every repetition."""
  num_envs = config.env.num_envs
  env = envs.make(
    config.env.name,
    num_envs=num_envs,
    seed=0,
    life_loss_ends=config.env.life_loss_ends,
    max_episode_steps=config.env.max_episode_steps,
  )
  try:
    model = build(config, env.spec)
    params = jax.jit(model.init)(jax.random.key(0))
    act = jax.jit(make_act(model))
    collector = Collector(
      env, act, initial_state=model.initial_state(num_envs), seed=0, epsilon=config.collect.epsilon, max_calls=10**6
    )
    add = jax.jit(replay.add, donate_argnums=0)
    memory = empty_replay(config_lib.override(config, {"replay.capacity": 5_000, "replay.final_frames": 500}), env.spec)
    steps = config.collect.steps_per_epoch
    actions = np.random.default_rng(0).integers(env.spec.num_actions, size=(steps // num_envs, num_envs))
    observations, state = np.zeros((num_envs, *env.spec.observation_shape), np.uint8), model.initial_state(num_envs)
    restart, epsilon, key, count = np.zeros(num_envs, bool), np.float32(0), jax.random.key(0), np.uint32(0)

    def collect() -> None:
      nonlocal memory
      memory, _ = collector.collect(params, memory, add, steps)
      jax.block_until_ready(memory)

    def emulate() -> None:
      for row in actions:
        env.step(row.astype(np.int32))

    def choose() -> None:
      for _ in actions:
        np.asarray(act(params, observations, state, restart, key, count, epsilon)[0])

    parts = {"emulators": emulate, "policy": choose, "collection": collect}
    return {name: [t / steps for t in record.seconds(part, repeats=_FLAGS.repeats)] for name, part in parts.items()}
  finally:
    env.close()


if __name__ == "__main__":
  runtime.run(main, __doc__ or "")
