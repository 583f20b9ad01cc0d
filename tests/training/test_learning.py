"""Learning itself; minutes to hours, so run by hand: pytest -m slow tests/training/test_learning.py."""

import importlib
import json
import pathlib

import numpy as np
import pytest

import jedi_jax
from jedi_jax.config import make_config
from jedi_jax.inspection import diagnosis


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
  """A run of preset `catch`; returns (directory, result)."""
  directory = tmp_path_factory.mktemp("learned") / "run"
  return directory, jedi_jax.train(make_config(preset="catch", seed=11), directory)  # None of the recorded seeds.


@pytest.mark.slow
def test_catch_is_learned(learned):
  directory, result = learned
  assert len(result["episode_returns"]) == 100
  assert result["mean_return"] >= 0.9
  records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
  evaluated = [record["evaluation/return"] for record in records if "evaluation/return" in record]
  assert evaluated[0] < 0.3 < np.mean(evaluated[-3:])  # It was learned, not there from the start.


@pytest.mark.slow
def test_another_learner_learns_in_the_dream(learned, monkeypatch):
  """PPO of Stable-Baselines3 takes no step of the real game before it is scored there."""
  pytest.importorskip("stable_baselines3")
  monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[2] / "benchmarks"))
  policy = importlib.import_module("dream_ppo").train(learned[0], steps=100_000, num_envs=32, seed=0)
  returns = [result.return_ for result in jedi_jax.evaluate(policy, "catch", episodes=100)]
  assert np.mean(returns) >= 0.2  # A random policy has -0.62, and three seeds of another run 0.24 to 1.00.


@pytest.mark.slow
def test_the_world_model_of_catch_is_right(learned):
  directory, _ = learned
  figures = diagnosis.diagnose_run(directory, steps=800, num_envs=8)
  open_loop = figures["open_loop"]
  assert max(error / copying for error, copying in zip(open_loop["error"], open_loop["copying"], strict=True)) < 0.2
  assert figures["rewards_ends"]["in_imagination"]["f1"] > 0.95
