"""A sweep that is killed, stopped and starved many times ends as an undisturbed one; see soak.py.

SOAK_HARMS (12), SOAK_SEEDS (1, of each game) and SOAK_SEED (0, of the harms) choose the long form.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

HARMS, SEEDS = os.environ.get("SOAK_HARMS", "12"), os.environ.get("SOAK_SEEDS", "1")
SEED = os.environ.get("SOAK_SEED", "0")
MANY_EPOCHS = {
  "training.first_updates.probe": 0,  # Its program takes long to trace, at each start.
  "training.updates.probe": 0,
  "collect.total_steps": 220,
  "collect.first_epoch_min_steps": 20,
  "collect.first_epoch_max_steps": 20,
  "evaluation.interval_epochs": 4,
  "evaluation.interval_episodes": 2,
  "evaluation.max_episode_steps": 30,
  "checkpoint.interval_epochs": 1,
}
"""21 epochs with a checkpoint each."""
SOAK = str(pathlib.Path(__file__).with_name("soak.py"))


def soak(folder, environment, harms, seed, games, seeds, settings):
  argv = [sys.executable, "-W", "ignore", SOAK, str(folder), str(harms), str(seed), games, str(seeds)]
  argv += [f"{name}={value}" for name, value in settings.items()]
  done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
  assert done.stdout, done.stderr[-3000:]
  print(done.stdout.splitlines()[-1])
  about = json.loads(done.stdout.splitlines()[-1])
  assert done.returncode == 0, about.get("broken", done.stderr[-3000:])
  return about


@pytest.mark.cluster
def test_a_sweep_survives_a_kill(tmp_path, one_device):
  """The seed's first harm kills all."""
  about = soak(tmp_path, one_device, 1, 26, "catch", 1, {})
  assert about["done"]["kill all"] == 1


@pytest.mark.cluster
def test_a_sweep_of_three_games_survives_many_harms(tmp_path, one_device):
  pytest.importorskip("gymnax")
  about = soak(tmp_path, one_device, HARMS, SEED, "catch,atari/Breakout,minatar/Breakout", SEEDS, MANY_EPOCHS)
  assert about["harms"] >= int(HARMS)
  assert about["runs of a sweep"] == 3 * int(SEEDS)
