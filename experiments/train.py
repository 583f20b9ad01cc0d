"""Trains a world model and its policy in imagination on one environment.

  python experiments/train.py --env=atari/Breakout --preset=cpu --workdir=runs/breakout

Running it again on the same workdir continues the run. The workdir holds config.json, metrics.jsonl (one record an
epoch), tensorboard/, checkpoints/ and, at the end, result.json. A run that is told to stop (SIGTERM, Ctrl-C) saves
the epoch if it ends within --grace seconds, and exits with status 75.

  python experiments/train.py --env=atari/Pong,atari/Boxing --runs=4 --workdir=runs/packed

trains four seeds of two games in one program, which an accelerator does in far less than eight times one run's time:
each in <workdir>/<game>/seed_<n>, as if it had been trained alone, and to be continued alone or together.

  srun python experiments/train.py --distributed --env=atari/Breakout --workdir=runs/breakout

trains one run on the devices of all tasks; the first has the workdir. Of several runs every task takes its share.
"""

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
  "Environment: atari/<Game>, or catch; if left out the preset's, for most atari/Breakout. Several are packed.",
)
_VARIANT = flags.DEFINE_string("variant", "jedi", f"World model: {', '.join(config_lib.VARIANTS)}.")
_PRESET = flags.DEFINE_string(
  "preset",
  "paper",
  "Settings to start from: paper (all constants of the paper; for an accelerator), small (learns a game on a CPU in "
  "two hours), cpu (ends within ten minutes on two cores), catch (learns Catch in twenty minutes), debug (seconds).",
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of everything random; of several runs the first.")
_RUNS = flags.DEFINE_integer(
  "runs", 1, "Seeds of each environment, trained in one program.", lower_bound=1, upper_bound=1_000
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; made if needed, continued if it holds a run.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Starts anew in a workdir that holds a run; its files are removed.")
_SET = flags.DEFINE_multi_string(
  "set", [], "Overrides a setting, as in --set=actor_critic.horizon=10; may be repeated. --settings lists them all."
)
_SETTINGS = flags.DEFINE_bool("settings", False, "Prints every setting with its value and origin, and exits.")
_FIT = flags.DEFINE_bool("fit", False, "Prints what one run takes of a device and how many runs fit, and exits.")
_DEVICES = flags.DEFINE_integer("devices", 0, "Train on so many devices of each process; 0 for all.", lower_bound=0)
_GRACE = flags.DEFINE_float(
  "grace",
  8.0,
  "Seconds to finish the epoch after SIGTERM or Ctrl-C; then the run stops where it is.",
  lower_bound=0.0,
  upper_bound=86_400.0,
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "This is one of several processes, and the cluster (SLURM, a TPU pod) tells which one."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first of several processes.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)


def main() -> None:
  """Reads the flags and trains."""
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
    found = memory.measure(configs[0], envs.spec(configs[0].env.name))
    parts = ", ".join(f"{name} {getattr(found, name) / 2**20:,.0f} MiB" for name in ("replay", "state", "working"))
    print(f"one run: {parts}; the device has {found.device / 2**20:,.0f} MiB")
    print(f"runs that fit: {found.fit}")
    return
  if not _WORKDIR.value:
    raise jedi_jax.UserError("--workdir is missing: name a directory for the run")
  out = pathlib.Path(_WORKDIR.value)
  places = [out] if len(configs) == 1 else [out / workdir.place(config) for config in configs]
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
    )


if __name__ == "__main__":
  program.run(main, __doc__ or "")
