"""Converts a DIAMOND checkpoint into a workdir for the other programs.

  python experiments/import_diamond.py --checkpoint=agent_epoch_01000.pt --env=atari/Breakout --workdir=runs/imported
  python experiments/evaluate.py --workdir=runs/imported --episodes=100

The configuration is inferred from the shapes of the arrays; nothing in the file is executed.
"""

from absl import flags

import jedi_jax
from jedi_jax.interop import diamond
from jedi_jax.runs import program

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "DIAMOND's .pt file.")
_ENV = flags.DEFINE_string("env", None, "Environment that it was trained on, such as atari/Breakout.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory to create; must not hold another run.")


def main() -> None:
  """Converts the checkpoint."""
  for name, value in (("checkpoint", _CHECKPOINT.value), ("env", _ENV.value), ("workdir", _WORKDIR.value)):
    if not value:
      raise jedi_jax.UserError(f"--{name} is missing")
  agent = diamond.import_checkpoint(_CHECKPOINT.value, env=_ENV.value, directory=_WORKDIR.value)
  counts = jedi_jax.count_parameters(agent.params)
  print(", ".join(f"{name} {count:,}" for name, count in counts.items() if count) + f"; written to {_WORKDIR.value}")


if __name__ == "__main__":
  program.run(main, __doc__ or "")
