"""Exports the agent of a run to a folder that others can load, and that fits the Hugging Face Hub.

  python experiments/export.py --workdir=runs/catch --out=agents/catch

The folder has model.safetensors, config.json and README.md, the model card. `jedi_jax.load_agent` loads it, and so do
evaluate.py, dream.py and diagnose.py with --workdir. The card has the score of the run's result.json; --episodes plays
games for a new score, which --checkpoint=best, a run without a result and, with --env, one on recorded episodes need.
"""

from absl import flags

import jedi_jax
from jedi_jax.evaluation.evaluate import describe_results
from jedi_jax.runs import program
from jedi_jax.runs.console import Console
from jedi_jax.training import seeds

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_OUT = flags.DEFINE_string("out", None, "Folder of the agent; created if missing.")
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "latest", ["latest", "best"], "Which checkpoint of the run.")
_EPISODES = flags.DEFINE_integer(
  "episodes", 0, "Games to play for the score; 0 for the score of the run's result.", lower_bound=0, upper_bound=10**6
)
_ENV = flags.DEFINE_string("env", None, "Environment of the games, for a run on recorded episodes.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the games; independent of training seeds.", lower_bound=0)
_HALF = flags.DEFINE_bool(
  "half", False, "Rounds the parameters to float16, which halves the file; the score is that before."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replaces an agent in the folder.")


def main() -> None:
  """Loads the agent, scores it if asked, and writes the folder."""
  for flag, value in (("--workdir", _WORKDIR.value), ("--out", _OUT.value)):
    if not value:
      raise jedi_jax.UserError(f"{flag} is missing: name a directory")
  program.enable_compilation_cache()
  agent = jedi_jax.load_agent(_WORKDIR.value, _CHECKPOINT.value)
  assert agent.config is not None
  if _ENV.value and (agent.data is None or not _EPISODES.value):
    raise jedi_jax.UserError("--env is for the games (--episodes) of a run on recorded episodes: leave it out")
  if _EPISODES.value:
    name = _ENV.value or agent.config.env.name
    seed, limit = seeds.evaluation_seed(_SEED.value), {"max_episode_steps": 27_000}
    results = jedi_jax.evaluate(agent, name, episodes=_EPISODES.value, seed=seed, console=Console(), **limit)
    agent.result = {**(agent.result or {}), "env": name, **limit, **describe_results(name, results)}
  folder = agent.save(_OUT.value, half=_HALF.value, overwrite=_OVERWRITE.value)
  size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
  print(f"{agent.config.variant} on {agent.config.env.name}, {size / 2**20:.2f} MiB: {folder}")


if __name__ == "__main__":
  program.run(main, __doc__ or "")
