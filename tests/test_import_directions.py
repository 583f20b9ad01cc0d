"""The directions of imports, read from the source: types, config <- ops <- nn <- models <- training."""

import ast
import pathlib

import jedi_jax

PACKAGE = pathlib.Path(jedi_jax.__file__).parent
ANYTHING = None

# What a module may import of the package; a folder stands for all of its files, the longest path counts.
ALLOWED = {
  "__init__.py": ANYTHING,
  "version.py": set(),
  "errors.py": set(),
  "types.py": set(),
  "config": {"errors", "envs"},  # The names of environments.
  "ops": {"types", "ops"},
  "nn": {"types", "ops", "nn"},
  # Configuration stops at the builder: the other models take plain arguments.
  "models": {"types", "ops", "nn", "models"},
  "models/variants.py": {"types", "errors", "config", "ops", "nn", "models"},
  "replay.py": {"types", "errors"},
  "envs": {"types", "errors", "envs"},
  "evaluation": {"types", "errors", "evaluation"},
  "evaluation/report.py": {"errors", "evaluation", "runs"},
  "runs": {"types", "errors", "version", "config", "runs"},
  "runs/sweep.py": {"errors", "config", "envs", "evaluation", "runs"},
  "agent.py": {"types", "errors", "config", "models", "evaluation", "runs"},
  # Checkpoints of others: arrays into parameters and a run's directory, no training.
  "interop": {"types", "errors", "config", "envs", "models", "runs", "agent", "interop"},
  "interop/torch_file.py": {"errors"},
  # Looks at agents.
  "inspection": {
    "types",
    "errors",
    "config",
    "envs",
    "ops",
    "models",
    "replay",
    "runs",
    "agent",
    "inspection",
    "training",
  },
  "training": ANYTHING,
  # The parts of training that know neither files nor environments.
  "training/parallel.py": {"types", "errors"},
  "training/state.py": {"types", "models", "training"},
  "training/epoch.py": {"types", "models", "replay", "training"},
  "training/updates.py": {"types", "config", "models", "replay", "training"},
  "training/collector.py": {"types", "errors", "replay"},
  "training/seeds.py": set(),
  "training/dreams.py": {"types", "models", "replay"},
}

# The only importers of some libraries.
IMPORTERS = {
  "envpool": {"envs"},
  "orbax": {"runs/checkpoint.py"},
  "tensorboardX": {"runs/telemetry.py"},
  "matplotlib": {"runs/figures.py", "evaluation/report.py"},
  "PIL": {"inspection/film.py"},
  "experiments": set(),
  "benchmarks": set(),
  "tests": set(),
  "torch": {"interop/torch_file.py"},
}

# The only readers of some names, wherever they come from.
READERS = {
  # Devices are known in one place.
  "pmap": {"training/parallel.py"},
  "pmean": {"training/parallel.py"},
  "psum": {"training/parallel.py"},
  "axis_index": {"training/parallel.py"},
  "shard_map": {"training/parallel.py"},
  # One place composes by variant; configuration checks it; what plans and reports runs names it.
  "variant": {"config", "models/variants.py", "training/loop.py", "inspection/diagnosis.py", "runs/sweep.py"},
}


def modules():
  """Yields (path within the package, syntax tree)."""
  for path in sorted(PACKAGE.rglob("*.py")):
    yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def imports(tree):
  """Yields the full dotted name of everything imported, inside functions too."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "imports are absolute"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names_read(tree):
  """Yields every attribute read, and every name imported from a module."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      yield node.attr
    elif isinstance(node, ast.ImportFrom):
      yield from (alias.name for alias in node.names)


def rule(path):
  """Returns the entry of `ALLOWED` for a module."""
  keys = [key for key in ALLOWED if path == key or path.startswith(f"{key}/")]
  assert keys, f"{path}: say in ALLOWED what it may import"
  return ALLOWED[max(keys, key=len)]


def within(path, places):
  return any(path == place or path.startswith(f"{place}/") for place in places)


def test_modules_import_only_what_lies_below_them():
  for path, tree in modules():
    allowed = rule(path)
    if allowed is ANYTHING:
      continue
    # 'from jedi_jax import x' and 'import jedi_jax.x' both have the part in second place.
    used = {name.split(".")[1] for name in imports(tree) if name.startswith("jedi_jax.")}
    assert used <= allowed, f"{path} imports {sorted(used - allowed)}"


def test_every_rule_is_about_something():
  paths = {path for path, _ in modules()}
  for key in ALLOWED:
    assert any(path == key or path.startswith(f"{key}/") for path in paths), key


def test_libraries_have_their_only_importers():
  for path, tree in modules():
    for name in imports(tree):
      places = IMPORTERS.get(name.split(".")[0])
      assert places is None or within(path, places), f"{path} imports {name}"


def test_names_have_their_only_readers():
  for path, tree in modules():
    for name in names_read(tree):
      assert name not in READERS or within(path, READERS[name]), f"{path} reads {name}"
