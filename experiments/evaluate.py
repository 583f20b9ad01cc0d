"""Evaluates a run's checkpoint, or the random policy, on whole games.

  python experiments/evaluate.py --workdir=runs/breakout --episodes=100
  python experiments/evaluate.py --random --env=atari/Breakout --episodes=100 --out=random.json

The protocol is the paper's: games do not end at the loss of a life, epsilon is 0, actions are sampled, and each
environment plays a fixed number of games. A run that was trained on recorded episodes plays in the environment --env.
The result is printed and written to evaluation.json in the workdir, or to --out.
"""

from typing import Any

from absl import flags

import jedi_jax
from jedi_jax import envs
from jedi_jax.evaluation.evaluate import describe_results
from jedi_jax.runs import program, sharing, workdir
from jedi_jax.runs.console import Console
from jedi_jax.training import seeds

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, or a saved agent.")
_RANDOM = flags.DEFINE_bool("random", False, "Evaluates uniformly random actions on --env instead of a run.")
_ENV = flags.DEFINE_string(
  "env",
  None,
  "Environment of the random policy, or of a run if not its own: such as atari/Pong or catch.",
)
_OUT = flags.DEFINE_string("out", None, "File of the result; evaluation.json in the workdir by default.")
_EPISODES = flags.DEFINE_integer("episodes", 100, "Number of games.", upper_bound=10**6)
_NUM_ENVS = flags.DEFINE_integer("num_envs", 10, "Environments in parallel.", upper_bound=1024)
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "latest", ["latest", "best"], "Which checkpoint of the run.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of games and actions; independent of training seeds.", lower_bound=0)
_MAX_STEPS = flags.DEFINE_integer(
  "max_episode_steps",
  27_000,
  "Time limit of a game in agent steps; 27,000 in the paper.",
  lower_bound=1,
  upper_bound=10**9,
)


def main() -> None:
  """Evaluates the policy of the flags and writes the result."""
  if _EPISODES.value < 1 or _NUM_ENVS.value < 1:
    raise jedi_jax.UserError("--episodes and --num_envs must be at least 1")
  program.enable_compilation_cache()
  agent: jedi_jax.Agent | None = None
  about: dict[str, Any]
  if _RANDOM.value:
    if _WORKDIR.value or flags.FLAGS["checkpoint"].present or not _ENV.value or not _OUT.value:
      raise jedi_jax.UserError("--random needs --env and --out, and no --workdir and --checkpoint")
    envs.validate(_ENV.value)
    about, out = {"env": _ENV.value, "policy": "random"}, workdir.locate(_OUT.value)
  else:
    if not _WORKDIR.value:
      raise jedi_jax.UserError("--workdir is missing: name the directory of a run")
    run = workdir.read(sharing.resolve(_WORKDIR.value))
    if "://" in _WORKDIR.value and not _OUT.value:
      raise jedi_jax.UserError(f"--out is missing: {_WORKDIR.value} is no folder of yours")
    agent = jedi_jax.load_agent(run.path, _CHECKPOINT.value)
    name = _ENV.value or run.config.env.name
    if (spec := envs.spec(name)) != run.spec:
      raise jedi_jax.UserError(f"{run.path} was trained with {run.spec}, but {name} has {spec}: name another --env")
    about = {"env": name, "variant": run.config.variant, "checkpoint": _CHECKPOINT.value}
    out = workdir.locate(_OUT.value) if _OUT.value else run.evaluation
  console = Console()
  results = jedi_jax.evaluate(
    agent,
    about["env"],
    episodes=_EPISODES.value,
    num_envs=_NUM_ENVS.value,
    seed=seeds.evaluation_seed(_SEED.value),
    max_episode_steps=_MAX_STEPS.value,
    console=console,
  )
  summary = {
    **about,
    "seed": _SEED.value,
    "max_episode_steps": _MAX_STEPS.value,
    **describe_results(about["env"], results),
  }
  workdir.write_json(out, summary)
  score = summary["human_normalized_score"]
  console.log(
    f"{about['env']}: mean return {summary['mean_return']:.2f} over {len(results)} games"
    + (f", human-normalised score {score:.3f}" if score is not None else "")
    + f"; {out}"
  )


if __name__ == "__main__":
  program.run(main, __doc__ or "")
