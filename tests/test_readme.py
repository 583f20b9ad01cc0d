"""What the README and docs/ say is what the code does."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

from jedi_jax import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "jedi_jax"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
WRITTEN = [name for name in PAGES if name not in ("docs/settings.md", "docs/metrics.md")]
"""Pages that no program generates."""
README, USAGE = PAGES["README.md"], PAGES["docs/usage.md"]
FENCES = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def section(page: str, name: str) -> str:
  match = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
  assert match, f"there is no section {name}"
  return match.group(1)


def test_the_readme_is_short():
  assert len(README.splitlines()) <= 180


def test_the_example_runs(one_device, tmp_path):
  code = re.fullmatch(r"```python\n(.*)```", section(README, "example"), re.DOTALL).group(1)
  argv = [sys.executable, "-c", code]
  done = subprocess.run(argv, cwd=tmp_path, env=one_device, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert re.search(r"^mean return -?[\d.]+$", done.stdout, re.MULTILINE)
  assert (tmp_path / "runs" / "example" / "result.json").exists()


def test_the_table_of_variants_is_what_the_program_prints():
  program = [sys.executable, str(ROOT / "experiments" / "variants.py"), "--env=atari/Breakout", "--preset=paper"]
  done = subprocess.run(program, capture_output=True, text=True, check=True)
  assert section(USAGE, "variants") == done.stdout.strip()


def test_the_table_of_settings_is_what_the_program_prints():
  assert PAGES["docs/settings.md"].strip() == config_lib.describe(config_lib.make_config())


def test_presets_are_as_described():
  rows = re.findall(r"^\| `(\w+)` \|[^|]*\| ([\d,]+) \| (?:[\d,]+|-) \|$", USAGE, re.MULTILINE)
  for name, steps in rows:
    assert config_lib.make_config(preset=name).collect.total_steps == int(steps.replace(",", ""))
  assert {name for name, _ in rows} == set(config_lib.PRESETS)


@pytest.mark.parametrize("name", WRITTEN)
def test_settings_that_are_named_exist(name):
  paths = set(dict(config_lib.settings(config_lib.Config)))
  named = set(re.findall(r"--set=([\w.]+)=", PAGES[name]))
  assert named or name not in ("README.md", "docs/usage.md", "docs/choices.md", "docs/performance.md")
  assert named <= paths


@pytest.mark.parametrize("name", WRITTEN)
def test_programs_and_flags_that_are_named_exist(name):
  text = PAGES[name].replace("\\\n", " ")
  for program, arguments in re.findall(r"python ((?:experiments|benchmarks)/\w+\.py)([^`|]*?)(?=`|\n\S|$)", text):
    assert (ROOT / program).exists(), program
    # Benchmarks share flags; each experiment has its own.
    sources = [ROOT / program] if program.startswith("experiments/") else (ROOT / "benchmarks").glob("*.py")
    flags = {flag for path in sources for flag in re.findall(r'DEFINE_\w+\(\s*"(\w+)"', path.read_text())}
    for flag in re.findall(r"\s--(\w+)", arguments):
      assert flag in flags or flag.removeprefix("no") in flags, f"{program} --{flag}"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
  for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", FENCES.sub("", PAGES[name])):
    link = target[0] or target[1]
    if link.startswith("http"):
      continue
    path, _, anchor = link.partition("#")
    found = (ROOT / name).parent / path if path else ROOT / name
    assert found.exists(), link
    if anchor:
      headings = re.findall(r"^#+ (.*)$", FENCES.sub("", found.read_text()), re.MULTILINE)
      assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "CHANGELOG.md"])
def test_paths_and_names_of_the_code_exist(name):
  settings = dict(config_lib.settings(config_lib.Config))
  trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
  for text in re.findall(r"`([^`\n]+)`", FENCES.sub("", PAGES[name])):
    if re.fullmatch(r"(\w+/)*\w+\.py|(\w+/)+", text) and not text.startswith(IN_A_WORKDIR):
      assert any((folder / text).exists() for folder in (ROOT, PACKAGE, ROOT / "experiments")), text
    elif re.fullmatch(r"\w+(\.\w+)+", text) and text not in settings and not text.endswith(SUFFIXES):
      head, *rest = text.removeprefix("jedi_jax.").split(".")
      modules = [tree for path, tree in trees.items() if path.stem == head]
      # Names of other libraries are neither modules nor definitions of this one.
      owners = [tree for tree in trees.values() if defines(tree, [head])]
      assert not modules + owners or (
        any(defines(tree, rest) for tree in modules) or any(defines(tree, [head, *rest]) for tree in owners)
      ), text


SUFFIXES = (".json", ".jsonl", ".csv", ".md", ".png", ".cff", ".safetensors")
IN_A_WORKDIR = ("tensorboard/", "checkpoints/", "wandb/")


def defines(tree: ast.AST, names: list[str]) -> bool:
  """Whether a syntax tree defines or assigns these names, each in the body of the one before."""
  if not names:
    return True
  for node in getattr(tree, "body", []):
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    found = {getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)}
    if names[0] in found and defines(node, names[1:]):
      return True
  return False
