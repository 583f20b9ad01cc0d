"""The Python examples of docs/usage.md run as they stand, each in a process of its own."""

import pathlib
import re
import subprocess
import sys

import pytest

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "usage.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- ([\w-]+) -->\n```python\n(.*?)```\n<!-- end -->", PAGE, re.DOTALL))


@pytest.fixture
def run(one_device, tmp_path):
  """From the name of an example to the lines that it prints."""

  def example(name):
    argv = [sys.executable, "-c", EXAMPLES[name]]
    done = subprocess.run(argv, cwd=tmp_path, env=one_device, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()

  return example


def test_there_is_no_other_python():
  assert list(EXAMPLES) == ["plain-loop", "save-and-load", "on-epoch", "dream-env", "fit-probe"]
  assert PAGE.count("```python") == 6  # Stable-Baselines3 is not installed for tests.


def test_the_plain_loop_needs_no_keys_and_plays_well(run):
  [line] = run("plain-loop")
  assert float(line.removeprefix("mean return ")) > 0.7
  assert "key" not in EXAMPLES["plain-loop"]
  assert "count" not in EXAMPLES["plain-loop"]


def test_an_agent_is_saved_and_loaded(run, tmp_path):
  [line] = run("save-and-load")
  name, score = line.split()
  assert name == "catch"
  assert 0.8 < float(score) <= 1.0
  assert (tmp_path / "agents" / "catch" / "README.md").exists()


def test_the_hook_sees_every_epoch(run, tmp_path):
  lines = [line.split() for line in run("on-epoch") if line.startswith("logged ")]
  epochs = (tmp_path / "runs" / "logged" / "metrics.jsonl").read_text().splitlines()
  assert [int(epoch) for _, epoch, _ in lines] == list(range(1, len(epochs) + 1))
  assert all(float(loss) > 0 for *_, loss in lines)


def test_the_hook_has_five_lines():
  code = EXAMPLES["on-epoch"].split("\n\n", 1)[1]
  assert len([line for line in code.splitlines() if line.strip()]) <= 5
