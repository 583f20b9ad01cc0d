"""Trains a world model on recorded episodes, without an environment; with --policy also the policy, in imagination.

  python experiments/train_offline.py --data=data/breakout --preset=cpu --workdir=runs/offline

docs/data.md describes the format of the data. The last tenth of the episodes is held out, for experiments/diagnose.py
and experiments/dream.py. The same command resumes an interrupted run. The workdir is that of experiments/train.py. A
policy can be evaluated in an environment:

  python experiments/evaluate.py --workdir=runs/offline --env=atari/Breakout
"""

from absl import flags

import jedi_jax
from jedi_jax import config as config_lib
from jedi_jax import datasets
from jedi_jax.runs import program
from jedi_jax.runs.interruption import on_signals
from jedi_jax.training.parallel import Devices

_DATA = flags.DEFINE_string("data", None, "Directory of the data set.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; created if missing, resumed if it holds a run.")
_POLICY = flags.DEFINE_bool("policy", False, "Trains the actor-critic, too, in imagination.")
_VARIANT = flags.DEFINE_string("variant", "jedi", f"World model: {', '.join(config_lib.VARIANTS)}.")
_PRESET = flags.DEFINE_string("preset", "paper", f"Settings to start from: {', '.join(config_lib.PRESETS)}.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of all random numbers.")
_EPOCHS = flags.DEFINE_integer(
  "epochs", None, "Epochs; as many as a run of the preset with an environment by default.", lower_bound=1,
  upper_bound=10**9,
)  # fmt: skip
_SET = flags.DEFINE_multi_string("set", [], "Overrides a setting, as in --set=denoiser.targets=1; may be repeated.")
_LOG = flags.DEFINE_list(
  "log", ["tensorboard"], "Loggers beside metrics.jsonl: tensorboard, wandb (Weights & Biases); empty for none."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Removes the run in the workdir and starts again.")
_DEVICES = flags.DEFINE_integer("devices", 0, "Devices to train on; 0 for all.", lower_bound=0)
_GRACE = flags.DEFINE_float(
  "grace",
  8.0,
  "Seconds to finish the epoch after SIGTERM or Ctrl-C; then the run stops without it.",
  lower_bound=0.0,
  upper_bound=86_400.0,
)


def main() -> None:
  """Trains the run of the flags."""
  for name, value in (("data", _DATA.value), ("workdir", _WORKDIR.value)):
    if not value:
      raise jedi_jax.UserError(f"--{name} is missing: name a directory")
  data = datasets.read(_DATA.value)
  config = datasets.make_config(
    data,
    variant=_VARIANT.value,
    preset=_PRESET.value,
    seed=_SEED.value,
    policy=_POLICY.value,
    epochs=_EPOCHS.value,
    overrides=_SET.value,
  )
  program.enable_compilation_cache()
  with on_signals(_GRACE.value) as interruption:
    jedi_jax.train(
      config,
      _WORKDIR.value,
      overwrite=_OVERWRITE.value,
      devices=Devices.take(_DEVICES.value),
      interruption=interruption,
      log=_LOG.value,
      data=data,
    )


if __name__ == "__main__":
  program.run(main, __doc__ or "")
