"""Makes a workdir of a DIAMOND checkpoint, to be evaluated and looked at with the other programs.

  python experiments/import_diamond.py --checkpoint=agent_epoch_01000.pt --env=atari/Breakout --workdir=runs/imported
  python experiments/evaluate.py --workdir=runs/imported --episodes=100

The configuration is inferred from the shapes of the arrays; nothing in the file is executed.
"""

from absl import flags

import jedi_jax
from jedi_jax.interop import diamond
from jedi_jax.runs import program

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "DIAMOND's .pt file.")
_ENV = flags.DEFINE_string("env", None, "The environment that it was trained on, as in atari/Breakout.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory to make; must not hold another run.")


def main() -> None:
  """Reads the flags and converts."""
  for name, value in (("checkpoint", _CHECKPOINT.value), ("env", _ENV.value), ("workdir", _WORKDIR.value)):
    if not value:
      raise jedi_jax.UserError(f"--{name} is missing")
  agent = diamond.import_checkpoint(_CHECKPOINT.value, env=_ENV.value, directory=_WORKDIR.value)
  counts = jedi_jax.count_parameters(agent.params)
  print(", ".join(f"{name} {count:,}" for name, count in counts.items() if count) + f"; written to {_WORKDIR.value}")


if __name__ == "__main__":
  program.run(main, __doc__ or "")
