"""Trains world models alone on random play, and measures them on random games that were not used for training.

  python benchmarks/world_model.py --seeds=3 --arm=preset --arm='norm per frame; encoder.norm=frame'

An arm is a name and the settings in which it differs from the preset. It has the updates of a run's first epoch
(training.first_updates), without those of the actor-critic. Prints a table of means over seeds and writes
benchmarks/results/learning/<name>.json. It shows within minutes whether a choice makes a better world model, but not
whether a policy learns more from it.
"""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import record
from absl import flags

from jedi_jax import config as config_lib
from jedi_jax import envs, replay
from jedi_jax.agent import Agent
from jedi_jax.config import Config
from jedi_jax.inspection import recording
from jedi_jax.runs import program, telemetry
from jedi_jax.training.learner import Learner
from jedi_jax.training.seeds import evaluation_seed

_NAME = flags.DEFINE_string("name", "world_model", "Name of the record.")
_ENV = flags.DEFINE_string("env", None, "Environment; the preset's by default.")
_PRESET = flags.DEFINE_string("preset", "minatar", "Preset.")
_ARMS = flags.DEFINE_multi_string("arm", ["preset"], "Name and settings: 'name; path=value; path=value'; repeatable.")
_SEEDS = flags.DEFINE_integer("seeds", 1, "Seeds of each arm.", lower_bound=1, upper_bound=1_000)
_STEPS = flags.DEFINE_integer("steps", 8_000, "Random steps for training.", lower_bound=100, upper_bound=10**6)

_FIGURES = ("f1_real", "f1_imagined", "error_1", "error_last", "calibration")


def main() -> None:
  """Trains and measures every arm, and writes the table."""
  program.enable_compilation_cache()
  started = record.machine()
  rows: list[dict[str, Any]] = []
  for text in _ARMS.value:
    name, *settings = (part.strip() for part in text.split(";"))
    config = config_lib.make_config(env=_ENV.value, preset=_PRESET.value, overrides=settings)
    rows += _measure(name, config)
    jax.clear_caches()
  print(record.table(_means(rows), ["arm", *_FIGURES, "latent_deviation", "encoder_movement", "seconds"]))
  print(f"written to {record.write(f'learning/{_NAME.value}', rows, started=started)}")


def _measure(name: str, config: Config) -> list[dict[str, Any]]:
  """Returns a row for each seed."""
  learner = Learner(config, envs.spec(config.env.name))
  updates = {name: getattr(config.training.first_updates, name) for name in ("denoiser", "reward_end")}
  rows = []
  for seed in range(_SEEDS.value):
    state = learner.init(seed)
    training, held_out = (_play(Agent(learner.model, state.params, config), at) for at in (seed, evaluation_seed(seed)))
    learner.start([state], [training])
    if not rows:
      learner.compile()
    begun = time.monotonic()
    [sums] = learner.update(updates)
    seconds = time.monotonic() - begun
    metrics = telemetry.summarise(sums, {**dict.fromkeys(learner.phases, 0), "denoiser": updates["denoiser"]})
    learner.start([learner.snapshot()[0]], [held_out])
    [figures] = learner.watch([jax.random.key_data(jax.random.key(seed))])
    measured = _named({**telemetry.world_model_summary(figures), **metrics})
    rows.append({"arm": name, "seed": seed, **measured, "seconds": seconds})
    print(rows[-1], flush=True)
  return rows


def _play(agent: Agent, seed: int) -> replay.ReplayState:
  """Records random games; the same number of steps for training and for the measurement."""
  num_envs = 8
  steps = _STEPS.value // num_envs
  episodes = recording.record(agent, steps=steps, num_envs=num_envs, seed=seed, epsilon=1.0)
  return replay.from_episodes(episodes, capacity=2 * _STEPS.value)


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
  wanted = (*_FIGURES, "latent_deviation", "latent_change", "latent_rank", "encoder_movement")
  return {name.split("/")[1]: value for name, value in metrics.items() if name.split("/")[1] in wanted}


def _means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Averages the seeds of each arm."""
  means = []
  for arm in dict.fromkeys(row["arm"] for row in rows):
    own = [row for row in rows if row["arm"] == arm]
    keys = own[0].keys() - {"arm", "seed"}
    means.append({"arm": arm, **{key: statistics.mean(row[key] for row in own if key in row) for key in keys}})
  return means


if __name__ == "__main__":
  program.run(main, __doc__ or "")
