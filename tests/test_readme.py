"""What the README says is what the code does."""

import pathlib
import re
import subprocess
import sys

import jedi_jax
from jedi_jax import config as config_lib
from jedi_jax.models.build import variants_table

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def section(name: str) -> str:
  match = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
  assert match, f"README has no section {name}"
  return match.group(1)


def test_the_example_runs(tmp_path):
  code = re.fullmatch(r"```python\n(.*)```", section("example"), re.DOTALL).group(1)
  done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert re.search(r"^mean return -?[\d.]+$", done.stdout, re.MULTILINE)
  assert (tmp_path / "runs" / "example" / "result.json").exists()


def test_the_table_of_variants_is_what_the_program_prints():
  spec = jedi_jax.envs.spec("atari/Breakout")
  assert section("variants") == variants_table(spec, env="atari/Breakout", preset="paper")


def test_the_table_of_settings_is_what_the_program_prints():
  assert (ROOT / "docs" / "settings.md").read_text().strip() == config_lib.describe(config_lib.make_config())


def test_presets_are_as_described():
  rows = re.findall(r"^\| `(\w+)` \|.*?\| ([\d,]+) \| (?:[\d,]+|-) \|$", README, re.MULTILINE)
  for name, steps in rows:
    assert config_lib.make_config(preset=name).collect.total_steps == int(steps.replace(",", ""))
  assert {name for name, _ in rows} == set(config_lib.PRESETS)


def test_settings_that_are_named_exist():
  paths = dict(config_lib.settings(config_lib.Config))
  named = re.findall(r"--set=([\w.]+)=", README)
  assert named
  assert set(named) <= set(paths)
