"""The recipes of docs/extending.md run as they stand, each in a process of its own."""

import pathlib
import re
import subprocess
import sys

import pytest

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "extending.md").read_text()
RECIPES = dict(re.findall(r"^## ([^\n]+)\n.*?^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def run(one_device):
  """From a recipe and a directory to what the recipe prints there."""

  def recipe(name, directory):
    argv = [sys.executable, "-c", RECIPES[name]]
    done = subprocess.run(argv, cwd=directory, env=one_device, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout

  return recipe


def test_there_are_six_recipes_and_no_other_code():
  assert len(RECIPES) == 6
  assert PAGE.count("```python") == 6


LONG = ("An encoder of your own", "Dynamics of your own")


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name in LONG))
    for name, code in RECIPES.items()
    if "jedi_jax.train(" in code
  ],
)
def test_a_recipe_trains(name, run, tmp_path):
  output = run(name, tmp_path)
  assert re.search(r"^mean return -?[\d.]+$", output, re.MULTILINE)
  assert len(list(tmp_path.glob("runs/*/result.json"))) == 1


def test_an_environment_of_gymnasium_is_made(run, tmp_path):
  first, following = run("An environment of Gymnasium", tmp_path).splitlines()
  assert first == "first (2, 8, 12, 1) EnvSpec(num_actions=4, observation_shape=(8, 12, 1))"
  assert following == "next (2, 8, 12, 1)"


def test_the_denoiser_learns_and_samples_alone(run, tmp_path):
  loss, error = (float(line.split()[1]) for line in run("The denoiser and the sampler alone", tmp_path).splitlines())
  assert loss < 0.6
  assert error < 0.3  # Copying the last latent has about 1.


def test_a_world_model_trains_on_recorded_episodes(run, tmp_path):
  output = run("Recorded episodes", tmp_path)
  loss = float(re.search(r"^loss (.*)$", output, re.MULTILINE)[1])
  assert 0 < loss < 10
  actions = re.search(r"^actions \[(.*)\]$", output, re.MULTILINE)[1].split()
  assert len(actions) == 20
  assert set(actions) <= {"0", "1", "2"}


def test_an_environment_takes_some_twenty_lines():
  code = re.search(r"^class Corridor:\n.*?(?=^\S)", RECIPES["An environment of your own"], re.DOTALL | re.MULTILINE)
  assert len([line for line in code[0].splitlines() if line.strip()]) <= 20
