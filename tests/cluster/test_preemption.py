"""A sweep that is killed, stopped and starved many times ends as an undisturbed one; see soak.py.

SOAK_HARMS (200) and SOAK_SEED (0) choose the long form.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

HARMS, SEED = os.environ.get("SOAK_HARMS", "200"), os.environ.get("SOAK_SEED", "0")
SOAK = str(pathlib.Path(__file__).with_name("soak.py"))


def soak(folder, environment, harms, seed, games, seeds):
  argv = [sys.executable, "-W", "ignore", SOAK, str(folder), str(harms), str(seed), games, str(seeds)]
  done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
  assert done.stdout, done.stderr[-3000:]
  print(done.stdout.splitlines()[-1])
  about = json.loads(done.stdout.splitlines()[-1])
  assert done.returncode == 0, about.get("broken", done.stderr[-3000:])
  return about


def test_a_sweep_survives_some_harms(tmp_path, one_device):
  about = soak(tmp_path, one_device, 3, 2, "catch", 1)
  assert about["harms"] >= 3


@pytest.mark.cluster
def test_a_sweep_of_three_games_survives_many_harms(tmp_path, one_device):
  pytest.importorskip("gymnax")
  about = soak(tmp_path, one_device, HARMS, SEED, "catch,atari/Breakout,minatar/Breakout", 2)
  assert about["harms"] >= int(HARMS)
  assert about["runs of a sweep"] == 6
