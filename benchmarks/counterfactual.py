"""Asks whether a dream knows what actions would do that the policy does not take.

  python benchmarks/counterfactual.py --workdir=runs/minatar --games=20 --back=5 --horizon=8 --name=counterfactual

The agent plays whole games that it loses. Each is played again, with the same seed and actions, up to --back steps
before its end, and from there with one action held for --horizon steps, for every action. The world model imagines the
same from the same frames, and its reward / end model judges the real frames, which tells errors of the dynamics from
its own. A game that an action would have continued, while its dream ends whatever the action, cannot be learned from in
imagination. The environment must repeat exactly (Atari, Catch and MinAtar do). The result is written to
benchmarks/results/learning/<name>.json.
"""

from typing import Any

import jax
import record
from absl import flags

import jedi_jax
from jedi_jax.errors import UserError
from jedi_jax.inspection.counterfactual import dream, judge, play, summary
from jedi_jax.runs import program
from jedi_jax.training.seeds import evaluation_seed

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run.")
_GAMES = flags.DEFINE_integer("games", 20, "Games.", lower_bound=1, upper_bound=10_000)
_BACK = flags.DEFINE_integer("back", 5, "Steps before the end of a game at which the action is held.", lower_bound=1)
_HORIZON = flags.DEFINE_integer("horizon", 8, "Steps for which it is held.", lower_bound=1)
_DREAMS = flags.DEFINE_integer("dreams", 16, "Dreams of each action.", lower_bound=1)
_LIMIT = flags.DEFINE_integer("limit", 3_000, "Steps after which a game is not waited for.", lower_bound=1)
_NAME = flags.DEFINE_string("name", "counterfactual", "Name of the record.")


def main() -> None:
  """Plays, dreams and compares."""
  if not _WORKDIR.value:
    raise UserError("--workdir is missing: name the directory of a run")
  started = record.machine()
  agent = jedi_jax.load_agent(_WORKDIR.value)
  model, first = agent.model, evaluation_seed(agent.config.seed)
  imagine = jax.jit(model.imagine, static_argnums=3)
  rows: list[dict[str, Any]] = []
  for seed in range(first, first + _GAMES.value):
    frames, actions, ended = play(agent, seed, _LIMIT.value)
    start = len(actions) - _BACK.value
    if not ended or start < model.conditioning_frames:
      continue
    for action in range(model.spec.num_actions):
      held = [action] * _HORIZON.value
      real_frames, real_actions, ends = play(agent, seed, start + len(held), forced=[*actions[:start], *held])
      rows.append(
        {
          "game": seed,
          "length": len(actions),
          "action": action,
          "ends": ends,
          "dreamed ends": dream(agent, imagine, frames, actions, start, held, _DREAMS.value),
          "judged ends": judge(agent, real_frames, real_actions, start),
        }
      )
  if not rows:
    raise UserError("the agent lost no game that was long enough: raise --games or --limit")
  about = {"env": agent.config.env.name, **summary(rows)}
  path = record.write(f"learning/{_NAME.value}", [about, *rows], started=started)
  print("\n".join(f"{name}: {value}" for name, value in about.items()))
  print(f"written to {path}")


if __name__ == "__main__":
  program.run(main, __doc__ or "")
