"""The directions of imports, read from the source."""

import ast
import pathlib

import jedi_jax

PACKAGE = pathlib.Path(jedi_jax.__file__).parent
ANYTHING = None

# From bottom to top. A module imports from the layers below its own, and from its own entry.
LAYERS = (
  ("version.py", "errors.py", "tables.py", "runtime.py"),
  ("types.py", "episodes.py"),
  ("envs", "ops", "replay.py"),
  ("config", "nn"),
  ("models",),
  ("runs",),
  ("agent.py", "datasets.py"),
  ("evaluation", "interop"),
  ("training", "sweep.py"),
  ("slurm.py",),
  ("inspection",),
  ("play",),
  ("__init__.py",),
)

# What a module may import of the package; a folder stands for all of its files, the longest path counts.
ALLOWED = {
  "__init__.py": ANYTHING,
  "version.py": set(),
  "errors.py": set(),
  "tables.py": set(),
  "runtime.py": set(),
  "types.py": set(),
  "episodes.py": {"errors"},
  "config": {"errors", "tables", "envs", "config"},  # The names of environments.
  "ops": {"types", "ops"},
  "nn": {"types", "ops", "nn"},
  # Configuration stops at the builder: the other models take plain arguments.
  "models": {"types", "ops", "nn", "models"},
  "models/build.py": {"types", "errors", "config", "ops", "nn", "models"},
  "replay.py": {"types", "errors", "episodes"},
  "envs": {"types", "errors", "envs"},
  "evaluation": {"types", "errors", "evaluation"},
  "evaluation/evaluate.py": {"errors", "envs", "evaluation", "runs", "agent"},
  "evaluation/report.py": {"tables", "errors", "evaluation", "runs"},
  "runs": {"tables", "types", "errors", "version", "runtime", "config", "runs"},
  "sweep.py": {"tables", "errors", "config", "envs", "evaluation", "runs"},
  "slurm.py": {"errors", "runs", "sweep"},
  "agent.py": {"types", "errors", "config", "models", "runs"},
  "datasets.py": {"types", "errors", "episodes", "envs", "replay", "config", "runs"},
  # Checkpoints of others: arrays into parameters and a run's directory, no training.
  "interop": {"types", "errors", "config", "envs", "models", "runs", "agent", "interop"},
  "interop/torch_file.py": {"errors"},
  "interop/episodes.py": {"errors", "episodes", "interop"},
  "inspection": ANYTHING,
  "play": {"types", "errors", "config", "envs", "ops", "models", "agent", "inspection", "play"},
  "play/server.py": {"errors", "play"},
  "training": ANYTHING,
  # The parts of training that know neither files nor environments.
  "training/parallel.py": {"types", "errors"},
  "training/state.py": {"types", "models", "training"},
  "training/epoch.py": {"types", "models", "replay", "training"},
  "training/updates.py": {"types", "errors", "config", "models", "replay", "training"},
  "training/collector.py": {"types", "errors", "replay"},
  "training/recorded.py": {"episodes", "replay", "training"},
  "training/seeds.py": set(),
  "training/dreams.py": {"types", "ops", "models", "replay"},
}

# The only importers of some libraries.
IMPORTERS = {
  "envpool": {"envs/pooled.py"},
  "gymnasium": {"envs/gym.py", "inspection/gymnasium_envs.py"},
  "gymnax": {"envs/gymnax.py"},
  "minari": {"interop/episodes.py"},
  "orbax": {"runs/checkpoint.py"},
  "tensorboardX": {"runs/loggers.py"},
  "wandb": {"runs/loggers.py"},
  "huggingface_hub": {"runs/sharing.py"},
  "safetensors": set(),  # The format is read and written by runs/safetensors.py.
  "matplotlib": {"runs/figures.py", "evaluation/report.py"},
  "PIL": {"envs/gym.py", "inspection/film.py"},
  "starlette": {"play/server.py"},
  "uvicorn": {"play/server.py"},
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
  # A variant is a name for settings: it is printed and recorded, and no model reads it.
  "variant": {
    "config",
    "training/loop.py",
    "training/messages.py",
    "inspection/diagnosis.py",
    "runs/card.py",
    "runs/loggers.py",
    "sweep.py",
  },
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


def place(path):
  """Returns (layer, entry) of a module or of a dotted name within the package."""
  found = [(entry, i) for i, layer in enumerate(LAYERS) for entry in layer if within(path, [entry])]
  assert found, f"{path}: add it to LAYERS"
  entry, i = max(found, key=lambda pair: len(pair[0]))
  return i, entry


def imported_modules(tree):
  """Yields the paths of the modules of the package that are imported."""
  for name in imports(tree):
    parts = name.split(".")[1:]
    if name.split(".")[0] != "jedi_jax":
      continue
    for stop in range(len(parts), 0, -1):
      stem = PACKAGE.joinpath(*parts[:stop])
      if stem.with_suffix(".py").exists() or (stem / "__init__.py").exists():
        yield "/".join(parts[:stop]) + ("" if stem.is_dir() else ".py")
        break
    else:
      raise AssertionError(f"{name} is no module of the package")


def test_no_import_runs_upward():
  for path, tree in modules():
    layer, entry = place(path)
    for target in imported_modules(tree):
      other_layer, other_entry = place(target)
      assert other_layer < layer or other_entry == entry, f"{path} imports {target}, which is not below it"


def test_every_rule_is_about_something():
  paths = {path for path, _ in modules()}
  for key in (*ALLOWED, *(entry for layer in LAYERS for entry in layer)):
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
