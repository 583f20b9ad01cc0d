"""Prints the variants as a Markdown table: what each is, what its encoder learns from, parameters by component.

python experiments/variants.py --env=atari/Breakout --preset=paper
"""

import jax
from absl import flags

import jedi_jax
from jedi_jax import config as config_lib
from jedi_jax.runs import program
from jedi_jax.tables import markdown_table

_ENV = flags.DEFINE_string("env", "atari/Breakout", "Environment; sets the number of actions.")
_PRESET = flags.DEFINE_string("preset", "paper", "Preset; sets the sizes of the networks.")

_COMPONENTS = ("encoder", "decoder", "denoiser", "reward_end", "actor_critic")


def table(env: str, preset: str) -> str:
  """Returns the table for an environment and a preset."""
  spec = jedi_jax.envs.spec(env)
  rows = [("variant", "model", "encoder learns from", *_COMPONENTS, "all")]
  for name, summary in config_lib.VARIANT_SUMMARIES.items():
    config = jedi_jax.make_config(env=env, variant=name, preset=preset)
    counts = jedi_jax.count_parameters(jax.eval_shape(jedi_jax.build(config, spec).init, jax.random.key(0)))
    numbers = [f"{counts[component]:,}" if counts.get(component) else "-" for component in _COMPONENTS]
    rows.append(
      (f"`{name}`", summary, ", ".join(config.encoder.learns_from) or "-", *numbers, f"{sum(counts.values()):,}")
    )
  return markdown_table(rows)


def main() -> None:
  """Prints the table."""
  print(table(_ENV.value, _PRESET.value))


if __name__ == "__main__":
  program.run(main, __doc__ or "")
