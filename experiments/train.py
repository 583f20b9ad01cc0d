"""Trains a world model and its policy in imagination on one environment.

  python experiments/train.py --env=atari/Breakout --preset=cpu --workdir=runs/breakout

The same command resumes an interrupted run. The workdir holds config.json, metrics.jsonl (one record per epoch),
tensorboard/, checkpoints/ and, at the end, result.json. On SIGTERM or Ctrl-C the run finishes and saves its epoch if
that takes at most --grace seconds, and exits with status 75.

  python experiments/train.py --env=atari/Pong,atari/Boxing --runs=4 --workdir=runs/packed

trains four seeds of two games in one program, which takes an H200 five times as long as one run (docs/performance.md).
Each run has the directory <workdir>/<game>/seed_<n>, equals a run trained alone, and can be resumed alone.

  srun python experiments/train.py --distributed --env=atari/Breakout --workdir=runs/breakout

trains one run on the devices of all tasks; the first task writes the workdir. Several runs are shared among the tasks.
"""

import os
import pathlib

from absl import flags

import jedi_jax
from jedi_jax import config as config_lib
from jedi_jax import envs
from jedi_jax.runs import program, workdir
from jedi_jax.runs.interruption import on_signals
from jedi_jax.training import memory
from jedi_jax.training.parallel import Devices

_ENV = flags.DEFINE_list(
  "env",
  [],
  "Environments: atari/<Game>, gym/<id>, another family (docs/usage.md) or catch; the preset's by default, "
  "atari/Breakout for most. Several are packed.",
)
_VARIANT = flags.DEFINE_string("variant", "jedi", f"World model: {', '.join(config_lib.VARIANTS)}.")
_PRESET = flags.DEFINE_string(
  "preset",
  "paper",
  "Settings to start from: paper (all constants of the paper; for an accelerator), small (a small world of an Atari "
  "game; hours on a CPU core), cpu (minutes on two CPU cores; does not learn to play), catch (learns Catch in minutes "
  "on one core), minatar (five seeds of two MinAtar games in ten minutes on an H200), debug (seconds).",
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of all random numbers; the first seed of several runs.")
_RUNS = flags.DEFINE_integer(
  "runs", 1, "Number of seeds of each environment, trained in one program.", lower_bound=1, upper_bound=1_000
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; created if missing, resumed if it holds a run.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Removes the run in the workdir and starts again.")
_SET = flags.DEFINE_multi_string(
  "set", [], "Overrides a setting, as in --set=actor_critic.horizon=10; may be repeated. --settings lists all."
)
_SETTINGS = flags.DEFINE_bool("settings", False, "Prints every setting with its value and origin, and exits.")
_FIT = flags.DEFINE_bool("fit", False, "Prints the device memory of one packed run and how many runs fit, and exits.")
_LOG = flags.DEFINE_list(
  "log", ["tensorboard"], "Loggers beside metrics.jsonl: tensorboard, wandb (Weights & Biases); empty for none."
)
_DEVICES = flags.DEFINE_integer("devices", 0, "Devices of each process to train on; 0 for all.", lower_bound=0)
_GRACE = flags.DEFINE_float(
  "grace",
  8.0,
  "Seconds to finish the epoch after SIGTERM or Ctrl-C; then the run stops without it.",
  lower_bound=0.0,
  upper_bound=86_400.0,
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "One of several processes, whose number and index the cluster (SLURM, a TPU pod) provides."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first process.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.", lower_bound=0)


def main() -> None:
  """Trains the runs of the flags."""
  processes = program.Processes(_DISTRIBUTED.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  names = list(dict.fromkeys(_ENV.value)) or [None]
  slots = config_lib.room_for(_ENV.value)
  overrides = [f"env.action_slots={slots}", *_SET.value] if slots else _SET.value
  configs = [
    config_lib.make_config(
      env=name, variant=_VARIANT.value, preset=_PRESET.value, seed=_SEED.value + seed, overrides=overrides
    )
    for name in names
    for seed in range(_RUNS.value)
  ]
  if _SETTINGS.value:
    print(config_lib.describe(configs[0]))
    return
  if _FIT.value:
    program.enable_compilation_cache()
    found = memory.measure(configs[0], envs.spec(configs[0].env.name), runs=2)
    parts = ", ".join(f"{name} {getattr(found, name) / 2**20:,.0f} MiB" for name in ("replay", "state", "working"))
    print(f"one packed run: {parts}; the device has {found.device / 2**20:,.0f} MiB")
    print(f"runs that fit: {found.fit}")
    return
  if not _WORKDIR.value:
    raise jedi_jax.UserError("--workdir is missing: name a directory for the run")
  out = pathlib.Path(_WORKDIR.value)
  places = [out] if len(configs) == 1 else [out / workdir.relative_path(config) for config in configs]
  configs = [_continued(config, place) for config, place in zip(configs, places, strict=True)]
  program.enable_compilation_cache()
  if len(configs) == 1:
    processes.connect()
  else:
    configs, places = processes.share(configs), processes.share(places)
  with on_signals(_GRACE.value) as interruption:
    jedi_jax.train_packed(
      configs,
      places,
      overwrite=_OVERWRITE.value,
      devices=Devices.take(_DEVICES.value),
      interruption=interruption,
      log=_LOG.value,
    )


def _continued(config: config_lib.Config, place: pathlib.Path) -> config_lib.Config:
  """Returns the configuration with the action slots of the run that it continues, which may have been packed."""
  given = any(text.partition("=")[0].strip() == "env.action_slots" for text in _SET.value)
  if _OVERWRITE.value or given or not os.path.exists(place / "config.json"):
    return config
  slots = workdir.read(place).config.env.action_slots
  return config_lib.override(config, {"env.action_slots": slots}) if slots else config


if __name__ == "__main__":
  program.run(main, __doc__ or "")
