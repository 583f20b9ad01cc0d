"""Trains a world model and its policy in imagination on one environment.

  python experiments/train.py --env=atari/Breakout --preset=cpu --workdir=runs/breakout

Running it again on the same workdir continues the run. The workdir holds config.json, metrics.jsonl (one record an
epoch), tensorboard/, checkpoints/ and, at the end, result.json.
"""

from absl import flags

import jedi_jax
from jedi_jax import config as config_lib
from jedi_jax import runtime
from jedi_jax.training.parallel import Devices

_ENV = flags.DEFINE_string(
  "env", None, "Environment: atari/<Game>, or catch; if left out the preset's, for most atari/Breakout."
)
_VARIANT = flags.DEFINE_string("variant", "jedi", f"World model: {', '.join(config_lib.VARIANTS)}.")
_PRESET = flags.DEFINE_string(
  "preset",
  "paper",
  "Settings to start from: paper (all constants of the paper; for an accelerator), small (learns a game on a CPU in "
  "two hours), cpu (ends within ten minutes on two cores), catch (learns Catch in twenty minutes), debug (seconds).",
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of everything random.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; made if needed, continued if it holds a run.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Starts anew in a workdir that holds a run; its files are removed.")
_SET = flags.DEFINE_multi_string(
  "set", [], "Overrides a setting, as in --set=actor_critic.horizon=10; may be repeated. --settings lists them all."
)
_SETTINGS = flags.DEFINE_bool("settings", False, "Prints every setting with its value and origin, and exits.")
_DEVICES = flags.DEFINE_integer("devices", 0, "Train on so many local devices; 0 for all.", lower_bound=0)


def main() -> None:
  """Reads the flags and trains."""
  config = config_lib.make_config(
    env=_ENV.value, variant=_VARIANT.value, preset=_PRESET.value, seed=_SEED.value, overrides=_SET.value
  )
  if _SETTINGS.value:
    print(config_lib.describe(config))
    return
  if not _WORKDIR.value:
    raise jedi_jax.UserError("--workdir is missing: name a directory for the run")
  runtime.enable_compilation_cache()
  jedi_jax.train(config, _WORKDIR.value, overwrite=_OVERWRITE.value, devices=Devices.take(_DEVICES.value))


if __name__ == "__main__":
  runtime.run(main, __doc__ or "")
