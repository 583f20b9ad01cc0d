"""Results of MinAtar games beside the published scores."""

import csv
import io

import numpy as np
import pytest
from test_report import write

from jedi_jax.envs.gymnax import MINATAR
from jedi_jax.errors import UserError
from jedi_jax.evaluation import human_normalized_score, minatar, report


def results(folder, scores, *, env="minatar/Breakout", **changes):
  return [
    write(folder / f"{env}_{seed}".replace("/", "_"), env=env, seed=seed, score=score, **changes)
    for seed, score in enumerate(scores)
  ]


def test_our_runs_are_averaged_beside_all_published_scores(tmp_path):
  runs = [
    *results(tmp_path / "a", [8.0, 10.0, 12.0], seconds=300.0),
    *results(tmp_path / "b", [3.0], variant="diamond", env="minatar/Breakout?sticky=0.1", seconds=900.0),
    *results(tmp_path / "c", [4.0], env_steps=50_000),
    *results(tmp_path / "d", [1.0], env="minatar/Seaquest?sticky=0.25"),
  ]
  assert report.collect(runs) == ({}, [])  # Although "a" and "c" are of one seed.
  rows = minatar.compare(runs)
  ours = [(row.game, row.method, row.protocol, row.steps, row.mean, row.runs, row.seconds) for row in rows if row.runs]
  assert ours == [
    ("Breakout", "jedi", "gymnax", 50_000, 4.0, 1, None),
    ("Breakout", "jedi", "gymnax", 100_000, 10.0, 3, 300.0),
    ("Breakout", "diamond", "sticky", 100_000, 3.0, 1, 900.0),
    ("Seaquest", "jedi", "sticky 0.25", 100_000, 1.0, 1, None),
  ]
  published = [row for row in rows if not row.runs]
  assert all(row.protocol in ("gymnax", "sticky") and row.source for row in published)
  assert ("DQN", 1_000_000, 9) in {(row.method, row.steps, row.mean) for row in published if row.game == "Breakout"}
  assert {row.game for row in published} == {"Breakout", "Seaquest"}

  tables = minatar.tables(rows)
  assert list(tables) == ["Breakout", "Seaquest"]
  assert tables["Breakout"][2][:3] == ["jedi", "gymnax", "100,000"]
  assert tables["Breakout"][2][5:] == ["3", "300", "these runs"]
  for table in tables.values():
    assert len({len(row) for row in table}) == 1
    assert all(row[1] in ("gymnax", "sticky", "sticky 0.25") for row in table[1:])
  lines = list(csv.DictReader(io.StringIO(minatar.to_csv(rows))))
  assert len(lines) == len(rows)
  assert (lines[1]["mean"], lines[1]["steps"], lines[0]["low"]) == ("10.0", "100000", "")


def test_intervals_are_of_the_mean_over_runs(tmp_path):
  scores = np.random.default_rng(0).normal(10.0, 2.0, 30).tolist()
  runs = results(tmp_path, scores)
  row = minatar.compare(runs, reps=4_000)[0]
  error = np.std(scores) / np.sqrt(30)
  np.testing.assert_allclose([row.low, row.high], np.mean(scores) + 1.96 * error * np.array([-1, 1]), atol=0.2 * error)
  assert row == minatar.compare(runs, reps=4_000)[0]
  assert minatar.compare(runs, reps=0)[0].low is None
  assert minatar.compare(runs[:1])[0].low is None


def test_minatar_is_no_part_of_atari_100k(tmp_path):
  runs = results(tmp_path, [1.0, 2.0], max_episode_steps=40)
  assert report.collect(runs) == ({}, [])
  assert minatar.compare([write(tmp_path / "pong"), write(tmp_path / "catch", env="catch")]) == []
  assert human_normalized_score("minatar/Breakout", 10.0) is None
  [note] = minatar.notes(runs)
  assert "Breakout (gymnax)" in note
  assert "40 steps instead of 1000" in note
  assert minatar.notes(results(tmp_path / "whole", [1.0])) == []
  with pytest.raises(UserError, match="seed 0: drop one"):
    report.collect([runs[0], runs[0]])


def test_the_published_scores_are_of_the_games():
  table = minatar._published()
  assert set(table["episode_steps"]) == set(MINATAR)
  known = {"agent", "steps", "protocol", "source"}
  for row in table["scores"]:
    assert known < set(row)
    assert set(row) - known <= set(MINATAR)
    assert row["protocol"] in ("gymnax", "sticky")


@pytest.mark.parametrize("seconds", ["long", None, float("inf"), -1.0, 10**400])
def test_a_senseless_duration_is_refused(tmp_path, seconds):
  with pytest.raises(UserError, match=r"result\.json"):
    write(tmp_path, seconds=seconds)
