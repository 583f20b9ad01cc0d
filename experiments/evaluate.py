"""Evaluates a run's checkpoint on whole games: no life-loss ends, epsilon 0, sampled actions.

  python experiments/evaluate.py --workdir=runs/breakout --episodes=100

Every environment plays a fixed number of games. The result is printed and written to evaluation.json in the workdir.
"""

from absl import flags

import jedi_jax
from jedi_jax import runtime, telemetry, workdir
from jedi_jax.training import loop

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_EPISODES = flags.DEFINE_integer("episodes", 100, "Games in all.")
_NUM_ENVS = flags.DEFINE_integer("num_envs", 10, "Environments that play side by side.")
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "latest", ["latest", "best"], "Which checkpoint of the run.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of games and actions; apart from those of training.", lower_bound=0)
_MAX_STEPS = flags.DEFINE_integer(
  "max_episode_steps", 27_000, "Time limit of a game in agent steps; the paper's is 27,000.", lower_bound=1
)


def main() -> None:
  """Reads the flags and evaluates."""
  if not _WORKDIR.value:
    raise jedi_jax.UserError("--workdir is missing: name the directory of a run")
  if _EPISODES.value < 1 or _NUM_ENVS.value < 1:
    raise jedi_jax.UserError("--episodes and --num_envs must be at least 1")
  runtime.enable_compilation_cache()
  run = workdir.read(_WORKDIR.value)
  agent = jedi_jax.load_agent(run.path, _CHECKPOINT.value)
  say = telemetry.Progress()
  results = jedi_jax.evaluate(
    agent,
    run.config.env.name,
    episodes=_EPISODES.value,
    num_envs=min(_NUM_ENVS.value, _EPISODES.value),
    seed=loop.evaluation_seed(_SEED.value),
    max_episode_steps=_MAX_STEPS.value,
    say=say,
  )
  summary = {
    "env": run.config.env.name,
    "variant": run.config.variant,
    "checkpoint": _CHECKPOINT.value,
    "seed": _SEED.value,
    "max_episode_steps": _MAX_STEPS.value,
    **loop.describe_results(run.config.env.name, results),
  }
  workdir.write_json(run.evaluation, summary)
  score = summary["human_normalized_score"]
  say.say(
    f"{run.config.env.name}: mean return {summary['mean_return']:.2f} over {len(results)} games"
    + (f", human-normalised score {score:.3f}" if score is not None else "")
    + f"; {run.evaluation}"
  )


if __name__ == "__main__":
  runtime.run(main, __doc__ or "")
