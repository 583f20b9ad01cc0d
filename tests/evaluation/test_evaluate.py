import inspect
import io

import numpy as np
import pytest

from jedi_jax.errors import UserError
from jedi_jax.evaluation import random_policy
from jedi_jax.evaluation.evaluate import describe_results, evaluate
from jedi_jax.runs.console import Console
from jedi_jax.training.seeds import Purpose, env_seed


def test_defaults_are_a_hundred_games_of_random_play():
  results = evaluate(None, "catch")
  assert [result.env for result in results] == [i // 10 for i in range(100)]
  assert {result.return_ for result in results} == {-1.0, 1.0}
  assert evaluate(None, "catch") == results


def test_default_games_are_not_those_of_training():
  default = inspect.signature(evaluate).parameters["seed"].default
  highest = max(env_seed(seed, Purpose.COLLECTION) for seed in range(1000))
  assert highest < 2**29 < 2**30 <= default


def test_a_callable_is_a_policy():
  calls, steps = [], []

  def still(observations, restart):
    calls.append((observations.shape, restart.copy()))
    return np.ones(len(observations), np.int32)

  results = evaluate(still, "catch", episodes=6, num_envs=3, seed=4, on_step=lambda: steps.append(1))
  assert len(results) == 6
  assert len(calls) == len(steps) == 18  # Two games of nine steps in each environment.
  assert {shape for shape, _ in calls} == {(3, 24, 24, 3)}
  assert all(np.all(restart) == (i % 9 == 0) for i, (_, restart) in enumerate(calls))


def test_none_is_the_random_policy_of_the_same_seed():
  expected = evaluate(random_policy(3, 7), "catch", episodes=20, num_envs=5, seed=7)
  assert evaluate(None, "catch", episodes=20, num_envs=5, seed=7) == expected


def test_there_are_no_more_environments_than_games():
  assert [result.env for result in evaluate(None, "catch", episodes=2, num_envs=8)] == [0, 1]


@pytest.mark.parametrize(("name", "value"), [("episodes", 0), ("episodes", -1), ("num_envs", 0), ("seed", -1)])
def test_numbers_out_of_range_are_refused(name, value):
  with pytest.raises(UserError, match=str(value)):
    evaluate(None, "catch", **{name: value})


def test_progress_is_shown_and_results_are_summarised():
  stream = io.StringIO()
  results = evaluate(None, "catch", episodes=3, num_envs=1, console=Console(stream, interval=0.0))
  lines = stream.getvalue().splitlines()
  assert [line.split(" return")[0] for line in lines] == [f"evaluating, games {i}/3" for i in (1, 2, 3)]
  summary = describe_results("catch", results)
  returns = [result.return_ for result in results]
  assert summary == {
    "episode_returns": returns,
    "episode_lengths": [9, 9, 9],
    "episodes_truncated": 0,
    "mean_return": np.mean(returns),
    "human_normalized_score": None,
  }
