import json
import math

import numpy as np
import pytest

from jedi_jax.errors import UserError
from jedi_jax.evaluation import scores as scores_lib
from jedi_jax.evaluation.scores import Scores, human_normalized_score


def test_random_and_human_play_are_zero_and_one():
  # Breakout: random 1.7, human 30.5.
  assert human_normalized_score("atari/Breakout", 1.7) == 0.0
  assert human_normalized_score("atari/Breakout", 30.5) == 1.0
  assert human_normalized_score("atari/Breakout", 1.7 + 0.25 * (30.5 - 1.7)) == pytest.approx(0.25)


def test_negative_scores():
  # Pong: random -20.7, human 14.6; a draw is 20.7 / 35.3 of the way, a shut-out is below random.
  assert human_normalized_score("atari/Pong", 0.0) == pytest.approx(20.7 / 35.3)
  assert human_normalized_score("atari/Pong", -21.0) == pytest.approx(-0.3 / 35.3)


@pytest.mark.parametrize("name", ["catch", "atari/Tetris", "Breakout", "atari/breakout", ""])
def test_not_defined(name):
  assert human_normalized_score(name, 1.0) is None


# ---- Aggregates ----


@pytest.fixture(scope="module")
def published():
  return scores_lib.published()


@pytest.mark.parametrize(
  ("method", "metric", "value"),
  [
    ("DIAMOND", "mean", 1.459),
    ("DIAMOND", "iqm", 0.641),
    ("DIAMOND", "optimality_gap", 0.480),
    ("DIAMOND", "har_hns", 0.319),
    ("DIAMOND", "superhuman", 11),
    ("DIAMOND", "agent_optimal", 2.791),
    ("DIAMOND", "human_optimal", 0.127),
    ("SimPLe", "mean", 0.332),
    ("SimPLe", "iqm", 0.130),
    ("TWM", "mean", 0.956),
    ("TWM", "iqm", 0.459),
    ("IRIS", "mean", 1.046),
    ("IRIS", "iqm", 0.501),
    ("IRIS", "superhuman", 10),  # With Pong at exactly 1.
    ("DreamerV3_v1_runs", "median", 0.49),
    ("STORM_repo_runs", "iqm", 0.561),
    ("EfficientZero", "iqm", 1.047),  # Of game means.
    ("BBF", "iqm", 1.139),
  ],
)
def test_published_aggregates_come_out(published, method, metric, value):
  decimals = len(str(value).partition(".")[2])
  got = scores_lib.aggregate(published[method], reps=0).metrics[metric].value
  assert round(got, decimals) == value


def test_what_is_published_agrees_with_what_its_scores_give(published):
  # Where it does not, the note says why.
  for method in published.values():
    if not method.by_game or method.note.startswith("MISMATCH"):
      continue
    metrics = scores_lib.aggregate(method, reps=0).metrics
    for key, printed in method.published.items():
      name = {"og": "optimality_gap"}.get(key, key)
      if name == "iqm" and not method.per_run and method.name in ("CURL", "SPR"):
        continue  # Printed over runs that are not published.
      assert metrics[name].value == pytest.approx(printed, abs=6e-4), (method.name, name)


def test_intervals_hold_the_value_and_repeat(published):
  first = scores_lib.aggregate(published["DIAMOND"], reps=100, seed=3)
  assert first.complete
  assert (first.runs, len(first.games)) == (5, 26)
  for name in ("mean", "median", "iqm", "optimality_gap", "har_hns", "asymmetry"):
    estimate = first.metrics[name]
    assert estimate.low < estimate.value < estimate.high
  assert scores_lib.aggregate(published["DIAMOND"], reps=100, seed=3) == first
  other = scores_lib.aggregate(published["DIAMOND"], reps=100, seed=4)
  assert other.metrics["iqm"].low != first.metrics["iqm"].low
  means = scores_lib.aggregate(published["BBF"], reps=100)
  assert means.metrics["iqm"].low is None


def test_aggregates_by_hand():
  # HNS 0 and 2 on Breakout (random 1.7, human 30.5), 0.5 and 0.5 on Pong (random -20.7, human 14.6).
  made = Scores("made", {"Breakout": (1.7, 1.7 + 2 * 28.8), "Pong": (-20.7 + 0.5 * 35.3,) * 2}, per_run=True)
  got = scores_lib.aggregate(made, reps=0)
  expected = {
    "mean": 0.75,
    "median": 0.75,
    "iqm": 0.5,  # The middle two of 0, 0.5, 0.5, 2.
    "optimality_gap": 1 - (0 + 1 + 0.5 + 0.5) / 4,
    "har_hns": 1 / ((1 / 1.1 + 1 / 0.6) / 2),
    "superhuman": 1,
  }
  assert {name: estimate.value for name, estimate in got.metrics.items()} == pytest.approx(expected)
  assert got.games == ("Breakout", "Pong")
  assert len(got.missing) == 24
  assert not got.complete


def test_unequal_runs_are_cut_and_told():
  made = Scores("made", {"Breakout": (1.7, 30.5, 59.3), "Pong": (14.6, 14.6), "Tetris": (1.0,)}, per_run=True)
  got = scores_lib.aggregate(made, reps=0)
  assert (got.runs, got.left_out, got.games) == (2, {"Breakout": 1}, ("Breakout", "Pong"))
  assert got.metrics["mean"].value == pytest.approx((0.5 + 1) / 2)


def test_a_harmonic_mean_far_below_random_is_not_defined():
  made = Scores("made", {"Breakout": (1.7 - 28.8,), "Pong": (14.6,)}, per_run=True)
  got = scores_lib.aggregate(made, reps=0).metrics
  assert "har_hns" not in got
  assert math.isfinite(got["mean"].value)


def test_what_cannot_be_aggregated_is_refused(published):
  with pytest.raises(UserError, match="no score"):
    scores_lib.aggregate(Scores("made", {"Tetris": (1.0,)}, per_run=True))
  with pytest.raises(UserError, match="finite"):
    scores_lib.aggregate(Scores("made", {"Pong": (math.nan,)}, per_run=True))
  with pytest.raises(UserError, match="DIAMOND"):
    scores_lib.find_published(["DIAMONT"])
  with pytest.raises(UserError, match="game means"):
    scores_lib.probability_of_improvement(published["DIAMOND"], published["BBF"])


def test_probability_of_improvement(published):
  low = Scores("low", {"Pong": (-20.0, -19.0), "Boxing": (1.0, 2.0)}, per_run=True)
  high = Scores("high", {"Pong": (1.0, 2.0), "Boxing": (1.0, 3.0), "Krull": (1.0,)}, per_run=True)
  # Pong: always; Boxing: 3 beats both, 1 ties once and loses once.
  probability, shared = scores_lib.probability_of_improvement(high, low)
  assert shared == ("Boxing", "Pong")
  assert probability == pytest.approx((1.0 + (2 + 0.5) / 4) / 2)
  both = [
    scores_lib.probability_of_improvement(published[x], published[y])[0] for x, y in (("IRIS", "TWM"), ("TWM", "IRIS"))
  ]
  assert sum(both) == pytest.approx(1.0)


def test_performance_profiles_fall_from_one_to_zero(published):
  profile = scores_lib.performance_profile(published["DIAMOND"], [-10, 0, 1, 100])
  assert profile[0] == 1.0
  assert profile[-1] == 0.0
  assert np.all(np.diff(profile) <= 0)


def test_the_partition_covers_the_games():
  groups = scores_lib.partition()
  assert sorted((*groups["agent_optimal"], *groups["human_optimal"])) == sorted(scores_lib.games())
  assert len(scores_lib.games()) == 26


def test_damaged_published_scores_are_refused_by_name(tmp_path, monkeypatch):
  table = json.loads(scores_lib._FILE.read_text())
  del table["human"]["Pong"]
  (tmp_path / "published.json").write_text(json.dumps(table))
  monkeypatch.setattr(scores_lib, "_FILE", tmp_path / "published.json")
  scores_lib._published.cache_clear()
  try:
    with pytest.raises(UserError, match=r"published\.json is damaged \(KeyError: 'Pong'\): reinstall jedi_jax"):
      scores_lib.games()
  finally:
    scores_lib._published.cache_clear()
