import csv
import io
import json

import pytest
from refusals import refused

from jedi_jax.errors import UserError
from jedi_jax.evaluation import report
from jedi_jax.evaluation import scores as scores_lib
from jedi_jax.tables import markdown_table


def write(directory, *, env="atari/Pong", variant="jedi", preset="paper", seed=0, score=1.0, **changes):
  directory.mkdir(parents=True, exist_ok=True)
  result = {
    "env": env, "variant": variant, "preset": preset, "seed": seed, "env_steps": 100_000, "frames": 400_000,
    "episode_returns": [score] * 100, "mean_return": score, "max_episode_steps": 27_000, **changes,
  }  # fmt: skip
  (directory / "result.json").write_text(json.dumps(result))
  [run], _ = report.read_runs([directory / "result.json"])
  return run


def test_runs_are_grouped_by_variant_and_preset(tmp_path):
  runs = [
    write(tmp_path / "a", seed=1, score=2.0),
    write(tmp_path / "b", seed=0, score=1.0),
    write(tmp_path / "c", env="atari/Boxing", score=3.0),
    write(tmp_path / "d", variant="diamond", score=4.0),
    write(tmp_path / "e", preset="small", score=5.0),
  ]
  methods, notes = report.collect(runs)
  assert {name: dict(method.by_game) for name, method in methods.items()} == {
    "jedi": {"Pong": (1.0, 2.0), "Boxing": (3.0,)},
    "diamond": {"Pong": (4.0,)},
    "jedi (small)": {"Pong": (5.0,)},
  }
  assert notes == []
  assert all(method.per_run for method in methods.values())
  gaps = report.describe_gaps("jedi", scores_lib.aggregate(methods["jedi"], reps=0))
  assert len(gaps) == 2
  assert "2 of 26 games" in gaps[0]
  assert "Alien" in gaps[0]
  assert "Pong 1" in gaps[1]


def test_results_without_games_are_skipped_and_named(tmp_path):
  run = write(tmp_path / "a")
  paths = [tmp_path / name / "result.json" for name in "abc"]
  offline = json.loads(paths[0].read_text()) | {"env": "data", "data": {"directory": "data/pong", "fingerprint": "1"}}
  for path in paths[1:]:
    path.parent.mkdir()
    path.write_text(json.dumps({key: offline[key] for key in offline if "return" not in key}))
  runs, [note] = report.read_runs(paths)
  assert runs == [run]
  assert note.startswith("Skipped, since training on recorded episodes plays no games")
  assert str(paths[0]) not in note
  assert all(str(path) in note for path in paths[1:])
  paths[1].write_text(json.dumps(offline | {"data": None, "mean_return": None}))
  refused(lambda: report.read_runs(paths), str(paths[1]), "is not the result of a run")


def test_what_a_reader_must_know_is_noted(tmp_path):
  runs = [
    write(tmp_path / "a", env_steps=5_000),
    write(tmp_path / "b", env="catch"),
    write(tmp_path / "c", seed=1, episode_returns=[1.0] * 8),
    write(tmp_path / "d", env="atari/Tetris"),
  ]
  _, notes = report.collect(runs)
  text = "\n".join(notes)
  assert "env_steps is 5000 instead of 100000" in text
  assert "games is 8 instead of 100" in text
  assert "catch, seed 0, is not a game" in text
  assert "Tetris, seed 0, is not a game" in text


def test_two_results_of_one_run_are_refused(tmp_path):
  runs = [write(tmp_path / "a"), write(tmp_path / "b")]
  with pytest.raises(UserError, match="seed 0: drop one"):
    report.collect(runs)


@pytest.mark.parametrize("content", [
  "", "{", "[]", "3", "null", "{}", '{"env": 1}', '{"mean_return": "much"}', "\x00\xff", '"text"',
])  # fmt: skip
def test_files_that_are_no_results_are_refused(tmp_path, content):
  (tmp_path / "result.json").write_text(content)
  with pytest.raises(UserError, match=r"result\.json"):
    report.read_runs([tmp_path / "result.json"])


def test_results_without_a_finite_score_are_refused(tmp_path):
  with pytest.raises(UserError, match="mean return"):
    write(tmp_path, score=float("nan"))


def test_curves_are_the_evaluations_during_training(tmp_path):
  lines = [
    {"epoch": 1, "env_steps": 10, "frames": 40},
    {"epoch": 2, "env_steps": 20, "frames": 80, "evaluation/return": 1.5},
    {"epoch": 3, "env_steps": 30, "frames": 120, "evaluation/return": 2.5},
  ]
  text = "\n".join(map(json.dumps, lines)) + '\n{"epoch": 4, "env'  # A last line that was cut short.
  (tmp_path / "metrics.jsonl").write_text(text)
  assert write(tmp_path).curve == ((20, 80, 1.5), (30, 120, 2.5))


def test_tables_and_csv_agree():
  methods = {name: scores_lib.published()[name] for name in ("DIAMOND", "BBF", "HorizonImagination")}
  aggregates = {name: scores_lib.aggregate(method, reps=20) for name, method in methods.items()}
  rows = report.aggregate_table(methods, aggregates)
  assert [row[:3] for row in rows[1:]] == [
    ["DIAMOND", "26", "5"], ["BBF", "26", "means"], ["HorizonImagination", "4", "means"]
  ]  # fmt: skip
  assert rows[1][3].startswith("1.459 [")
  assert rows[2][3] == "2.247"
  assert rows[3][-1] == "-"  # Its groups of games are not whole.
  by_metric = {
    (row["method"], row["metric"]): row for row in csv.DictReader(io.StringIO(report.aggregates_csv(aggregates)))
  }
  assert round(float(by_metric["DIAMOND", "mean"]["value"]), 3) == 1.459
  assert by_metric["BBF", "mean"]["low"] == ""
  scores = list(csv.DictReader(io.StringIO(report.scores_csv(methods))))
  assert len(scores) == 26 * 5 + 26 + 4
  games = report.game_table(methods)
  assert len(games) == 27
  assert games[1][:3] == ["Alien", "227.8", "7127.7"]
  assert games[1][-1] == "-"
  lines = markdown_table(games).splitlines()
  assert {line.count("|") for line in lines} == {len(games[0]) + 1}
  tex = report.latex(rows)
  assert tex.startswith(r"\begin{tabular}{lrr")
  assert tex.count(r" \\") == len(rows)


def test_figures_are_drawn(tmp_path):
  methods = {name: scores_lib.published()[name] for name in ("DIAMOND", "BBF", "HorizonImagination")}
  aggregates = {name: scores_lib.aggregate(method, reps=20) for name, method in methods.items()}
  report.draw_aggregates(aggregates, tmp_path / "aggregates.png")
  report.draw_profiles(methods, tmp_path / "profiles.png")
  report.draw_asymmetry(aggregates, tmp_path / "asymmetry.png")
  (tmp_path / "run").mkdir()
  line = {"epoch": 2, "env_steps": 20, "frames": 80, "evaluation/return": 1.5}
  (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
  report.draw_curves([write(tmp_path / "run")], tmp_path / "curves.png")
  for name in ("aggregates", "profiles", "asymmetry", "curves"):
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / f"{name}.svg").read_text()


def test_the_legend_of_the_curves_has_every_method(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(report.figures, "save", lambda figure, *_: drawn.append(figure))
  runs = []
  for name, changes in (("a", {"env": "atari/Alien"}), ("b", {"env": "atari/Pong", "variant": "diamond"})):
    (tmp_path / name).mkdir()
    line = {"epoch": 2, "env_steps": 20, "frames": 80, "evaluation/return": 1.5}
    (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    runs.append(write(tmp_path / name, **changes))
  report.draw_curves(runs, tmp_path / "curves.png")
  [legend] = [ax.get_legend() for ax in drawn[0].axes if ax.get_legend()]
  assert [text.get_text() for text in legend.get_texts()] == sorted(run.method for run in runs)


@pytest.mark.parametrize("changes", [
  {"seed": float("inf")}, {"mean_return": 10**400}, {"variant": "a\nb"}, {"env": "\ud800"}, {"preset": ""},
  {"mean_return": 1e300}, {"env_steps": float("-inf")},
])  # fmt: skip
def test_results_of_senseless_values_are_refused_in_one_line(tmp_path, changes):
  with pytest.raises(UserError, match=r"result\.json") as caught:
    write(tmp_path, **changes)
  assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("line", [
  '{"evaluation/return": 1.0}', '{"evaluation/return": NaN, "env_steps": 1, "frames": 4}', '{"evaluation/return": []}',
  '{"evaluation/return": 1.0, "env_steps": Infinity, "frames": 4}', "3\n3",
])  # fmt: skip
def test_damaged_metrics_are_named(tmp_path, line):
  (tmp_path / "metrics.jsonl").write_text(line + "\n")
  with pytest.raises(UserError, match=r"metrics\.jsonl") as caught:
    write(tmp_path)
  assert len(str(caught.value).splitlines()) == 1
