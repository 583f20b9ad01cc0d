import jax
import numpy as np
import pytest

from jedi_jax import load_agent
from jedi_jax.inspection import counterfactual


def test_games_are_played_again_and_dreamed_with_other_actions(finished_run):
  agent = load_agent(finished_run)
  frames, actions, ended = counterfactual.play(agent, 5, 100)
  assert ended
  assert len(frames) == len(actions) + 1
  again, same, stopped = counterfactual.play(agent, 5, 6, forced=actions[:6])
  assert (same, stopped) == (actions[:6], False)
  np.testing.assert_array_equal(again, frames[:7])
  imagine = jax.jit(agent.model.imagine, static_argnums=3)
  assert 0.0 <= counterfactual.dream(agent, imagine, frames, actions, 5, [1, 1]) <= 1.0
  assert 0.0 <= counterfactual.judge(agent, frames, actions, 5) <= 1.0


def test_dreams_that_end_whatever_is_done_are_counted():
  # The first game is lost anyway; an action continues the second and third; only the third's dreams know it.
  outcomes = {0: [(True, 1.0), (True, 0.5)], 1: [(True, 1.0), (False, 0.95)], 2: [(False, 0.2), (True, 0.9)]}
  rows = [
    {"game": game, "ends": e, "dreamed ends": d, "judged ends": 0.5} for game, own in outcomes.items() for e, d in own
  ]
  values = list(counterfactual.summary(rows).values())
  assert values[:3] == [3, 2, 1]
  assert values[3:] == pytest.approx([(1.0 + 0.5 + 1.0 + 0.9) / 4, 0.5, (0.95 + 0.2) / 2, 0.5])
