"""Prints the variants as a Markdown table: codec, dynamics, what each loss trains, parameters by component.

python experiments/variants.py --env=atari/Breakout --preset=paper
"""

from absl import flags

import jedi_jax
from jedi_jax.models.build import variants_table
from jedi_jax.runs import program

_ENV = flags.DEFINE_string("env", "atari/Breakout", "Environment; sets the number of actions.")
_PRESET = flags.DEFINE_string("preset", "paper", "Preset; sets the sizes of the networks.")


def main() -> None:
  """Prints the table."""
  print(variants_table(jedi_jax.envs.spec(_ENV.value), env=_ENV.value, preset=_PRESET.value))


if __name__ == "__main__":
  program.run(main, __doc__ or "")
