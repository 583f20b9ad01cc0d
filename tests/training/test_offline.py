"""Training on recorded episodes: the examples of docs/data.md run as they stand, on recordings of Catch."""

import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from refusals import refused

import jedi_jax
from jedi_jax import datasets
from jedi_jax.inspection import diagnosis, film, probe, recording
from jedi_jax.runs import checkpoint, workdir
from jedi_jax.training.learner import Learner

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text()
EXAMPLES = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
COMMAND = re.search(r"^python (experiments/train_offline.py .*)$", PAGE, re.MULTILINE)[1].split()
EPOCHS = 4


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """The folder in which the examples ran; the epoch is compiled once."""
  home = tmp_path_factory.mktemp("offline")
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(home)
    patch.setattr(Learner, "compile", shared_compile())
    patch.setattr(jedi_jax.training.parallel.Devices, "__init__", _one_device(jedi_jax.training.parallel.Devices))
    for name in ("Format", "Record", "Train"):
      exec(compile(EXAMPLES[name], name, "exec"), {})
    yield home


def shared_compile():
  """`Learner.compile` whose learners share their programs."""
  original, programs = Learner.compile, []

  def compile_once(learner):
    if not programs:
      original(learner)
      programs.extend((learner.epoch, learner._watch))
    learner.epoch, learner._watch = programs

  return compile_once


def _one_device(devices):
  original = devices.__init__

  def init(self, chosen=None, *args, **options):
    import jax

    original(self, jax.local_devices()[:1] if chosen is None else chosen, *args, **options)

  return init


def arrays(directory):
  latest = directory / "checkpoints" / "latest"
  found = checkpoint.read(latest, checkpoint.newest(latest))
  return {name: x.tobytes() for name, x in found.items() if name != "state/progress/seconds"}


@pytest.fixture
def data(home):
  return datasets.read(home / "data" / "catch")


def config(data, **options):
  return datasets.make_config(data, preset="debug", policy=True, epochs=EPOCHS, **options)


def test_files_written_with_numpy_alone_are_a_data_set(home):
  data = datasets.read(home / "data" / "noise")
  assert (len(data.episodes), data.steps) == (20, 18 * 30)


def test_a_run_trains_on_data_without_an_environment(home, data):
  run = home / "runs" / "offline"
  result = json.loads((run / "result.json").read_text())
  assert result["updates"] == {"denoiser": 10, "reward_end": 10, "actor_critic": 10}
  assert result["data"]["source"] == "catch"
  assert "mean_return" not in result
  records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  assert len(records) == EPOCHS
  # Every game of Catch has 9 steps, and a reward of 1 or -1 with the last one.
  assert [record["env_steps"] for record in records] == [45 * 9] * EPOCHS
  first = records[0]
  assert (first["collect/episodes"], first["collect/length"]) == (45, 9)
  assert first["collect/rewards_negative"] + first["collect/rewards_positive"] == 45
  assert first["collect/return"] == pytest.approx(np.mean([e.rewards.sum() for e in data.training]))
  assert not any("collect/steps" in record for record in records[1:])
  assert not any("evaluation/return" in record for record in records)
  assert any(name.startswith("world_model/") for name in records[1])
  assert any((run / "tensorboard").iterdir())


def test_the_replay_holds_the_training_episodes(home, data):
  _, stored = datasets.from_run(home / "runs" / "offline")
  assert len(stored) == len(data.training)
  for ours, theirs in zip(stored, data.training, strict=True):
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_stopped_run_ends_bit_equal(home, data, stopped, quiet, timeless, tmp_path):
  run = tmp_path / "run"
  with stopped(epoch=3):
    jedi_jax.train(config(data), run, data=data, console=quiet)
  jedi_jax.train(config(data), run, data=data, console=quiet)
  assert "resuming after epoch 2" in quiet.lines
  assert not any("new games" in line for line in quiet.lines)
  assert arrays(run) == arrays(home / "runs" / "offline")
  assert timeless(run / "metrics.jsonl") == timeless(home / "runs" / "offline" / "metrics.jsonl")


@pytest.mark.slow
def test_a_killed_program_ends_bit_equal(home, data, timeless, tmp_path):
  run = tmp_path / "run"
  words = [word for word in COMMAND[1:] if not word.startswith("--workdir")]
  victim = [sys.executable, str(ROOT / "tests" / "faults" / "victim.py"), str(ROOT / COMMAND[0])]
  with subprocess.Popen(
    [*victim, *words, "--devices=1", f"--workdir={run}"], cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    text=True,
  ) as running:  # fmt: skip
    saves, lines = 0, []
    for line in running.stdout:
      lines.append(line)
      saves += line == "<saving>\n"
      if saves == 3:
        break
    running.send_signal(signal.SIGKILL)
  assert saves == 3, lines
  jedi_jax.train(config(data), run, data=data)
  assert arrays(run) == arrays(home / "runs" / "offline")
  assert timeless(run / "metrics.jsonl") == timeless(home / "runs" / "offline" / "metrics.jsonl")


def test_other_data_are_refused_and_nothing_changes(home, data, snapshot):
  run = home / "runs" / "offline"
  before = snapshot(run)
  first = data.episodes[0]
  other = data._replace(episodes=(first._replace(rewards=first.rewards + 1), *data.episodes[1:]))
  refused(lambda: jedi_jax.train(config(other), run, data=other), "other data", "--overwrite")
  assert snapshot(run) == before


def test_a_replay_that_is_too_small_says_so(home, data, stopped, quiet, tmp_path):
  small = config(data, overrides={"replay.capacity": 200})
  with stopped(epoch=1), pytest.MonkeyPatch.context() as patch:
    patch.setattr(Learner, "compile", lambda learner: None)
    jedi_jax.train(small, tmp_path / "run", data=data, console=quiet)
  [warning] = [line for line in quiet.lines if line.startswith("WARNING")]
  assert "the data have 450 frames and replay holds 200: the first 250" in warning


@pytest.mark.slow
def test_diagnosis_and_films_use_the_held_out_episodes(home, data, tmp_path):
  run = shutil.copytree(home / "runs" / "offline", tmp_path / "run")
  figures = diagnosis.diagnose_run(run)
  assert figures["steps"] == sum(len(episode.actions) for episode in data.held_out) == 45
  assert "value" not in figures
  assert "critic" not in figures["weakest"]
  assert json.loads((run / "diagnosis.json").read_text())["env"] == "data"
  agent = jedi_jax.load_agent(run)
  real = recording.real_episodes(workdir.read(run), agent, steps=10, num_envs=1, seed=0)
  assert [len(episode.actions) for episode in real] == [9, 9]
  assert np.array_equal(real[0].observations, data.held_out[0].observations)
  windows = recording.windows(real, before=agent.model.conditioning_frames, after=4, stride=9)
  shot = film.shoot(probe.fit(agent, real, updates=1), windows)
  assert shot.frames.shape == (3, 2, 5, 24, 24, 3)


def test_data_that_moved_or_changed_are_named(home, data, tmp_path):
  run = shutil.copytree(home / "runs" / "offline", tmp_path / "run")
  agent = jedi_jax.load_agent(run)
  moved = shutil.copytree(home / "data" / "catch", tmp_path / "moved")
  file = run / "config.json"
  file.write_text(file.read_text().replace(str(home / "data" / "catch"), str(tmp_path / "gone")))

  def real(**options):
    return recording.real_episodes(workdir.read(run), agent, steps=10, num_envs=1, seed=0, **options)

  refused(real, "gone", "missing", "--data")
  assert len(real(data=moved)) == 2
  (moved / "episode_000049.npz").unlink()
  refused(lambda: real(data=moved), "moved", "has changed")
  refused(lambda: recording.record(agent, steps=9, num_envs=1, seed=0), "recorded episodes")
