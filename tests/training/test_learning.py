"""Learning itself; minutes to hours, so run by hand: pytest -m slow tests/training/test_learning.py."""

import json

import numpy as np
import pytest

from jedi_jax.config import make_config
from jedi_jax.inspection import diagnosis
from jedi_jax.training import loop


@pytest.mark.slow
def test_catch_is_learned(tmp_path):
  config = make_config(preset="catch", seed=11)  # None of the recorded seeds.
  result = loop.train(config, tmp_path / "run")
  assert len(result["episode_returns"]) == 100
  assert result["mean_return"] >= 0.9
  records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  evaluated = [record["evaluation/return"] for record in records if "evaluation/return" in record]
  assert evaluated[0] < 0.3 < np.mean(evaluated[-3:])  # It was learned, not there from the start.

  figures = diagnosis.diagnose_run(tmp_path / "run", steps=800, num_envs=8)
  loop_ = figures["open_loop"]
  assert max(error / copying for error, copying in zip(loop_["error"], loop_["copying"], strict=True)) < 0.2
  assert figures["rewards_ends"]["in_imagination"]["f1"] > 0.95
