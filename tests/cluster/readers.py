"""Readers of files from elsewhere, valid files of each, and mutations that keep most of a file valid.

`python readers.py READER SECONDS SEED FOLDER [--random]` feeds a reader with mutations, guided by coverage where
atheris is installed, writes each input that breaks it to the folder, and prints the number of executions as JSON.
"""

import contextlib
import hashlib
import io
import json
import math
import pathlib
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile

SECONDS = 10
"""After which a reader counts as hanging."""
MEMORY = 2 << 30
"""Bytes of address space that a reader may take beyond what its libraries have."""
TESTS = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

ODD = (
  None, True, False, -1, 0, 1, 2, 3, 7, 64, 255, 2**31, 2**32, 2**53, 2**63, 2**64, 10**400, 0.5, -0.0, 1e-300, 1e308,
  math.nan, math.inf, -math.inf, "", "x", "0", "nan", "a\nb", "\x00", "\ud800", "\x1b[2J", "../..", "x" * 5000,
  "9" * 5000, [], {}, [[]], [None], [0], [1, 2, 3], [-1, 1, 1], {"x": None}, [10**400], [math.nan], "catch", "jedi",
  "float32", "F32",
)  # fmt: skip
"""Values that readers of JSON meet where they expect others."""
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**64 - 1)


class Hang(BaseException):
  """No `Exception`, so that nothing on the way takes it for damage."""


# ---- Mutations; `pick` is a `random.Random` ----


def mutate_bytes(pick, data):
  """Flips, replaces, inserts, repeats and removes bytes."""
  data = bytearray(data)
  for _ in range(pick.choice((1, 1, 2, 4))):
    at = pick.randrange(len(data) + 1)
    size = min(pick.choice((1, 2, 4, 8, 64)), len(data) - at)
    kind = pick.randrange(8)
    if kind == 0 and at < len(data):
      data[at] ^= 1 << pick.randrange(8)
    elif kind == 1:
      data[at : at + size] = pick.randbytes(size)
    elif kind == 2:
      data[at : at + 8] = struct.pack("<Q", pick.choice(INTERESTING))[: pick.choice((1, 2, 4, 8))]
    elif kind == 3:
      del data[at : at + size]
    elif kind == 4:
      data[at:at] = pick.randbytes(pick.choice((1, 4, 64)))
    elif kind == 5:
      other = pick.randrange(len(data) + 1)
      data[at:at] = data[other : other + 64]
    elif kind == 6 and pick.random() < 0.3:
      del data[at:]
    else:
      data[at : at + 1] = pick.choice((b"0", b"-", b'"', b"[", b"{", b"}", b",", b"\n", b"\xff", b"e999", b"\x00"))
  return bytes(data)


def mutate_tree(pick, tree):
  """Replaces, removes, renames or repeats a value somewhere in a tree of JSON; returns the tree."""
  places = []

  def walk(node):
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
      places.append((node, key))
      if isinstance(value, dict | list):
        walk(value)

  walk([tree] if not isinstance(tree, dict | list) else tree)
  if not places or pick.random() < 0.02:
    return pick.choice(ODD)
  for _ in range(pick.choice((1, 1, 1, 2, 3))):
    node, key = pick.choice(places)
    if (isinstance(node, list) and key >= len(node)) or (isinstance(node, dict) and key not in node):
      continue
    kind, value = pick.randrange(10), node[key]
    if kind == 0:
      del node[key]
    elif kind == 1 and isinstance(node, dict):
      node[pick.choice(("x", "", key + " ", key.upper(), "x" * 300))] = node.pop(key)
    elif kind == 2 and isinstance(value, list):
      node[key] = value * pick.choice((2, 40))
    elif kind == 3:
      node[key] = [value]
    elif kind == 4:
      other, there = pick.choice(places)
      with contextlib.suppress(KeyError, IndexError):
        node[key] = json.loads(json.dumps(other[there]))
    elif kind == 5 and type(value) in (int, float) and abs(value) < 1e300:
      node[key] = pick.choice((-value, value + 1, value * 2, value * 10**6, str(value), float(value), value - 1))
    else:
      node[key] = pick.choice(ODD)
  return tree


def mutate_json(pick, data):
  """Mutates JSON as a tree, or as bytes where it is none."""
  if pick.random() < 0.15:
    return mutate_bytes(pick, data)
  try:
    tree = json.loads(data)
  except (ValueError, RecursionError):
    return mutate_bytes(pick, data)
  if pick.random() < 0.005:
    return b"[" * 100_000
  return json.dumps(mutate_tree(pick, tree)).encode()


def mutate_lines(pick, data):
  """Mutates one line of JSON lines."""
  lines = data.split(b"\n")
  at = pick.randrange(len(lines))
  lines[at] = mutate_json(pick, lines[at])
  if pick.random() < 0.2:
    lines.insert(at, pick.choice(lines))
  return b"\n".join(lines)


def mutate_zip(pick, data, inner):
  """Mutates a member of a zip with `inner(pick, name, content)` and keeps the archive whole."""
  if pick.random() < 0.2:
    return mutate_bytes(pick, data)
  try:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      members = [(name, archive.read(name)) for name in archive.namelist()]
  except Exception:
    return mutate_bytes(pick, data)
  if not members:
    return mutate_bytes(pick, data)
  at = pick.randrange(len(members))
  name, content = members[at]
  kind = pick.randrange(12)
  if kind == 0:
    del members[at]
  elif kind == 1:
    members.append((name, mutate_bytes(pick, content)))
  elif kind == 2:
    members[at] = (mutate_bytes(pick, name.encode()).decode("latin1"), content)
  elif kind == 3:
    members[at] = (name, pick.choice(members)[1])
  else:
    members[at] = (name, inner(pick, name, content))
  file = io.BytesIO()
  with warnings.catch_warnings(), zipfile.ZipFile(file, "w", pick.choice((0, 0, 8))) as archive:
    warnings.simplefilter("ignore")  # Names that appear twice.
    for name, content in members:
      archive.writestr(name or "x", content)
  return file.getvalue()


# ---- Readers: a valid input each, a mutation, and what reads the input and raises `UserError` at most ----


class Reader:
  """One reader; its inputs are bytes, of which the first may choose a file.

  Args:
    folder: for the files that it reads.
  """

  def __init__(self, folder):
    self.folder = folder
    self.seeds = self.valid()

  def close(self):
    """Undoes changes of modules."""

  def put(self, name, data):
    path = self.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def tiny_run(folder):
  """Writes the config.json of a run; returns the run."""
  from jedi_jax import config as config_lib
  from jedi_jax import envs
  from jedi_jax.runs import workdir

  config = config_lib.make_config(env="catch", preset="debug")
  return workdir.prepare(folder, config, envs.spec("catch"))


def save(folder, config, result):
  """Saves an agent with a result that was read, as `load_agent` and `Agent.save` do."""
  import numpy as np

  from jedi_jax import envs
  from jedi_jax.runs import sharing

  params, spec = {"bias": np.zeros(3, np.float32)}, envs.spec("catch")
  sharing.write(folder, params=params, config=config, spec=spec, sizes={"bias": 3}, result=result, overwrite=True)


class Diamond(Reader):
  """Checkpoints of DIAMOND, as import_diamond.py reads them."""

  def valid(self):
    import pytest
    import small_diamond
    import torch_writer

    from jedi_jax.interop import diamond, torch_file

    counterpart, seen = diamond._counterpart, {}

    def cached(config, spec):  # Tracing the networks is all that takes time.
      if len(seen) > 1000:
        seen.clear()
      if (config, spec) not in seen:
        seen[config, spec] = counterpart(config, spec)
      return seen[config, spec]

    self.patches = pytest.MonkeyPatch()
    self.patches.setattr(diamond, "_counterpart", cached)
    self.patches.setattr(torch_file, "_torch_is_safe", lambda: False)  # Not torch is tested.
    arrays = diamond.export_state_dict(small_diamond.random_params(), small_diamond.make_config(), small_diamond.SPEC)
    with pytest.MonkeyPatch.context() as patch:
      writer = torch_writer.Writer(self.folder, patch)
      files = [writer.save(arrays), writer.save(dict(list(arrays.items())[:3]))]
      seeds = [file.read_bytes() for file in files]
    for file in files:
      file.unlink()
    return seeds

  def mutate(self, pick, data):
    return mutate_zip(pick, data, lambda pick, name, content: mutate_bytes(pick, content))

  def close(self):
    self.patches.undo()

  def read(self, data):
    from jedi_jax.interop import diamond

    arrays = diamond.load(self.put("agent.pt", data))
    config, spec = diamond.infer(arrays, env="catch")
    diamond.import_params(arrays, config, spec)


class Shapes(Diamond):
  """State dictionaries of DIAMOND with other names, shapes and types: what comes after the file."""

  def valid(self):
    self.whole = super().valid()[0]
    from jedi_jax.interop import diamond

    arrays = diamond.load(self.put("agent.pt", self.whole))
    tree = [[name, value.dtype.name, list(value.shape)] for name, value in arrays.items()]
    return [json.dumps(tree).encode()]

  mutate = staticmethod(mutate_json)

  def read(self, data):
    import numpy as np

    from jedi_jax.interop import diamond

    arrays = {}
    try:
      for name, dtype, shape in json.loads(data):
        if math.prod(max(int(size), 1) for size in shape) < 1e7 and len(shape) < 9:
          arrays[str(name)] = np.zeros(shape, dtype)
    except Exception:
      return
    if all(value.dtype.kind in "biuf" for value in arrays.values()):  # What `load` can return.
      config, spec = diamond.infer(arrays, env="catch")
      diamond.import_params(arrays, config, spec)


class Checkpoint(Reader):
  """Files of checkpoints, as Orbax and then this library read them. An input is a file's number and its content."""

  def valid(self):
    import numpy as np

    from jedi_jax.runs import checkpoint

    self.like = {
      "params": {"layer": {"kernel": np.zeros((8, 9), np.float32)}, "bias": np.zeros(3, np.float32)},
      "state": {"frames": np.zeros(500, np.uint8), "count": np.zeros((), np.int32)},
    }
    self.whole = self.folder / "whole"
    checkpoints = checkpoint.Checkpoints(self.whole, keep=1)
    checkpoints.save(1, **self.like)
    checkpoints.close()
    self.files = sorted(p.relative_to(self.whole) for p in self.whole.rglob("*") if p.is_file())
    return [bytes([i]) + (self.whole / name).read_bytes() for i, name in enumerate(self.files)]

  def mutate(self, pick, data):
    return data[:1] + (mutate_bytes if pick.random() < 0.3 else mutate_json)(pick, data[1:])

  def read(self, data):
    from jedi_jax.runs import checkpoint

    copy = self.folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(self.whole, copy)
    (copy / self.files[data[0] % len(self.files) if data else 0]).write_bytes(data[1:])
    checkpoint.load_params(copy, self.like["params"])
    checkpoint.load_state(copy, "frames")


class Packed(Reader):
  """The packed arrays of a checkpoint, with checksums that fit; the index is JSON in them."""

  def valid(self):
    import numpy as np

    from jedi_jax.runs import checkpoint

    self.like = {"kernel": np.zeros((8, 9), np.float32), "bias": np.zeros(3, np.float32)}
    return [checkpoint._pack(checkpoint.flatten(self.like))["packed"].tobytes()]

  def mutate(self, pick, data):
    size = int.from_bytes(data[:8], "little")
    if pick.random() < 0.2 or size > len(data) - 8:
      return mutate_bytes(pick, data)
    index = mutate_json(pick, data[8 : 8 + size])
    return len(index).to_bytes(8, "little") + index + data[8 + size :]

  def read(self, data):
    import numpy as np

    from jedi_jax.runs import checkpoint

    packed = {"packed": np.frombuffer(data, np.uint8)}
    # As `_read` once Orbax has returned its arrays.
    arrays = checkpoint._verified(packed | {"crc32": checkpoint._checksums(packed)}, "params", "checkpoint 1 in x")
    checkpoint.unflatten(arrays, self.like, where="checkpoint 1 in x")


class Replay(Reader):
  """The replay in a checkpoint, as episodes are exported from it. An input is a list of names, dtypes and shapes."""

  def valid(self):
    from jedi_jax import replay as replay_lib
    from jedi_jax.runs import checkpoint

    self.run = tiny_run(self.folder / "run")
    shape = self.run.spec.observation_shape
    leaves = checkpoint.flatten(replay_lib.init(num_streams=2, slots_per_stream=8, observation_shape=shape))
    return [json.dumps([[name, value.dtype.name, list(value.shape), 0] for name, value in leaves.items()]).encode()]

  mutate = staticmethod(mutate_json)

  def read(self, data):
    import numpy as np
    import pytest

    from jedi_jax import datasets
    from jedi_jax import replay as replay_lib
    from jedi_jax.runs import checkpoint

    arrays = {}
    try:
      for name, dtype, shape, fill in json.loads(data):
        if math.prod(max(int(size), 1) for size in shape) < 1e6 and len(shape) < 9:
          arrays[str(name)] = np.full(shape, fill, dtype)
    except Exception:
      return
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(checkpoint, "newest", lambda _: 1)
      patch.setattr(checkpoint, "load_state", lambda *_: arrays)
      list(replay_lib.to_episodes(datasets.load_replay(self.run)))


class Result(Reader):
  """result.json, as the report, a sweep and a saved agent read it."""

  def valid(self):
    result = {
      "env": "atari/Pong", "variant": "jedi", "preset": "paper", "seed": 0, "env_steps": 100_000, "frames": 400_000,
      "episode_returns": [1.0, 2.0], "episode_lengths": [3, 4], "episodes_truncated": 0, "mean_return": 1.5,
      "human_normalized_score": 0.1, "max_episode_steps": 27_000, "seconds": 9.0, "updates": {"denoiser": 3},
    }  # fmt: skip
    self.plan()
    return [json.dumps(result | {"env": env}).encode() for env in ("atari/Pong", "minatar/Breakout?sticky=0.1")]

  def plan(self):
    import pytest

    from jedi_jax import sweep
    from jedi_jax.runs import workdir

    arguments = {"games": ["catch"], "seeds": 1, "variants": ["jedi"], "preset": "debug", "overrides": []}
    (self.run,) = sweep.plan(self.folder / "sweep", **arguments)
    from jedi_jax import envs

    own = workdir.prepare(self.run.workdir, self.run.config, envs.spec("catch"))
    self.patches = pytest.MonkeyPatch()
    self.patches.setattr(workdir, "read", lambda _: own)  # Another reader's file, and most of the time.

  def close(self):
    self.patches.undo()

  mutate = staticmethod(mutate_json)

  def read(self, data):
    from jedi_jax import sweep
    from jedi_jax.evaluation import minatar, report
    from jedi_jax.runs import workdir
    from jedi_jax.tables import markdown_table

    path = self.put("result.json", data)
    (self.run.workdir / "result.json").write_bytes(data)
    self.each(
      lambda: sweep.projection([sweep.run_status(self.run)], workers=1),
      lambda: sweep.table([sweep.run_status(self.run)]),
    )
    result = None
    with contextlib.suppress(ValueError):
      result = workdir.read_json(path)
    if isinstance(result, dict):
      save(self.folder / "agent", self.run.config, result)
    runs, _ = report.read_runs([path])
    methods, notes = report.collect(runs)
    report.notes_text([*notes, *minatar.notes(runs)]).encode()
    for table in minatar.tables(minatar.compare(runs, reps=2)).values():
      markdown_table(table).encode()
    for method in methods.values():
      report.scores_csv({method.name: method}).encode()

  @staticmethod
  def each(*uses):
    """Calls all; a refusal of one does not spare the others."""
    from jedi_jax.errors import UserError

    for use in uses:
      try:
        use()
      except UserError as error:
        one_line(error)


class Metrics(Result):
  """metrics.jsonl, as the report, a sweep and a resumed run read it."""

  def valid(self):
    record = {"epoch": 1, "env_steps": 100, "frames": 400, "evaluation/return": 1.0, "time/total_seconds": 5.0}
    records = [record | {"epoch": i, "env_steps": 100 * i, "collect/return": -1.0} for i in (1, 2, 3)]
    result = json.loads(super().valid()[0])
    (self.folder / "result.json").write_text(json.dumps(result))
    return ["".join(json.dumps(record) + "\n" for record in records).encode()]

  mutate = staticmethod(mutate_lines)

  def read(self, data):
    from jedi_jax import sweep
    from jedi_jax.evaluation import report
    from jedi_jax.runs import telemetry

    path = self.put("metrics.jsonl", data)
    (self.run.workdir / "metrics.jsonl").write_bytes(data)
    self.each(
      lambda: sweep.projection([sweep.run_status(self.run)], workers=1),
      lambda: sweep.table([sweep.run_status(self.run)]),
      lambda: report.read_runs([self.folder / "result.json"]),
    )
    telemetry.MetricsWriter(path, last_epoch=2).close()


class Configuration(Reader):
  """config.json of a run (C) and overrides of settings as text, one a line (S)."""

  def valid(self):
    from jedi_jax import config as config_lib
    from jedi_jax.config.fields import settings

    self.run = tiny_run(self.folder / "run")
    values = config_lib.flatten(config_lib.to_dict(self.run.config))
    known = [path for path in settings(type(self.run.config)) if path not in ("variant", "preset")]
    texts = [f"{path}={json.dumps(values[path])}" for path in known]
    whole = (self.run.path / "config.json").read_bytes()
    return [b"C" + whole, *(b"S" + "\n".join(texts[i : i + 3]).encode() for i in range(0, len(texts), 3))]

  def mutate(self, pick, data):
    if data[:1] == b"C":
      return b"C" + mutate_json(pick, data[1:])
    if pick.random() < 0.5:
      return b"S" + mutate_bytes(pick, data[1:])
    lines = data[1:].split(b"\n")
    at = pick.randrange(len(lines))
    name = lines[at].partition(b"=")[0]
    value = pick.choice(ODD)
    lines[at] = name + b"=" + (value if isinstance(value, str) else json.dumps(value)).encode(errors="replace")
    return b"S" + b"\n".join(lines)

  def read(self, data):
    from jedi_jax import config as config_lib
    from jedi_jax.runs import workdir

    if data[:1] == b"C":
      self.put("run/config.json", data[1:])
      run = workdir.read(self.folder / "run")
      config_lib.differences(run.config, self.run.config)
      config = run.config
    else:
      texts = data[1:].decode(errors="surrogateescape").split("\n")
      config = config_lib.make_config(env="catch", preset="debug", overrides=texts)
    again = config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(config))))
    assert not config_lib.differences(config, again)


class Dataset(Reader):
  """Recorded episodes: an .npz (E), or dataset.json (I)."""

  def valid(self):
    import numpy as np

    from jedi_jax import datasets
    from jedi_jax.episodes import Episode

    episode = Episode(np.zeros((4, 5, 6, 3), np.uint8), np.array([0, 1, 2]), np.array([0.0, 1.0, -1.0]), ends=True)
    path = self.folder / "data"
    datasets.write(path, [episode] * 2, num_actions=3, source="catch")
    file = io.BytesIO()
    with np.load(path / "episode_000000.npz") as archive:
      np.savez(file, **archive)
    return [b"E" + file.getvalue(), b"I" + (path / "dataset.json").read_bytes()]

  def mutate(self, pick, data):
    if data[:1] == b"I":
      return b"I" + mutate_json(pick, data[1:])
    return b"E" + mutate_zip(pick, data[1:], self.mutate_array)

  @staticmethod
  def mutate_array(pick, name, content):
    """Mutates the header of an .npy, a literal of Python, with a length that fits, or the numbers."""
    del name
    if pick.random() < 0.2 or len(content) < 12:
      return mutate_bytes(pick, content)
    size = int.from_bytes(content[8:10], "little")
    head = content[10 : 10 + size]
    if pick.random() < 0.5:
      head = mutate_bytes(pick, head)
    else:
      texts = (b"(0,)", b"()", b"(-1,)", b"(4, 5, 6, 3)", b"(3,)", b"(1099511627776,)", b"(4, 0, 6, 3)", b"True",
               b"'<f4'", b"'|b1'", b"'<U3'", b"'|O'", b"'<i8'", b"'<c8'", b"'<M8[s]'", b"'<f2'", b"'|V0'", b"'|S0'",
               b"'<f8'", b"[('x', '<f4')]", b"(9223372036854775807, 2)", b"'|u1'", b"'>i4'", b"'<f16'")  # fmt: skip
      parts = head.split(b": ")
      at = pick.randrange(len(parts))
      rest = parts[at].partition(b", '")[2]
      parts[at] = pick.choice(texts) + (b", '" + rest if rest else b", }\n")
      head = b": ".join(parts)
    return content[:8] + len(head[:65535]).to_bytes(2, "little") + head[:65535] + content[10 + size :]

  def read(self, data):
    from jedi_jax import datasets

    path = self.folder / "data"
    name = "dataset.json" if data[:1] == b"I" else "episode_000000.npz"
    whole = (path / name).read_bytes()
    try:
      (path / name).write_bytes(data[1:])
      found = datasets.read(path)
      found.record()
      datasets.make_config(found, preset="debug")
    finally:
      (path / name).write_bytes(whole)


class Agent(Reader):
  """A saved agent: model.safetensors with a checksum that fits (M), or config.json (C)."""

  def valid(self):
    import numpy as np

    from jedi_jax.runs import sharing

    run = tiny_run(self.folder / "run")
    self.like = {"encoder": {"kernel": np.zeros((8, 9), np.float32)}, "bias": np.zeros(3, np.float32)}
    result = {"episode_returns": [1.0, 2.0], "human_normalized_score": 0.5}
    self.path = sharing.write(
      self.folder / "agent", params=self.like, config=run.config, spec=run.spec, sizes={"encoder": 3}, result=result
    )
    self.about = (self.path / "config.json").read_bytes()
    return [b"M" + (self.path / "model.safetensors").read_bytes(), b"C" + self.about]

  def mutate(self, pick, data):
    kind, data = data[:1], data[1:]
    size = int.from_bytes(data[:8], "little")
    if kind == b"C":
      return kind + mutate_json(pick, data)
    if pick.random() < 0.2 or size > len(data) - 8:
      return kind + mutate_bytes(pick, data)
    head = mutate_json(pick, data[8 : 8 + size])
    return kind + len(head).to_bytes(8, "little") + head + data[8 + size :]

  def read(self, data):
    from jedi_jax.runs import checkpoint, sharing

    model = self.path / "model.safetensors"
    whole = model.read_bytes()
    try:
      about = data[1:]
      if data[:1] != b"C":
        model.write_bytes(data[1:])
        about = json.dumps(json.loads(self.about) | {"sha256": hashlib.sha256(data[1:]).hexdigest()}).encode()
      (self.path / "config.json").write_bytes(about)
      assert sharing.is_saved_agent(self.path)
      saved = sharing.read(self.path)
      checkpoint.unflatten(saved.arrays, self.like, where=str(model))
      save(self.folder / "again", saved.config, saved.result)
    finally:
      model.write_bytes(whole)


READERS = {
  "diamond": Diamond, "shapes": Shapes, "checkpoint": Checkpoint, "packed": Packed, "replay": Replay, "result": Result,
  "metrics": Metrics, "config": Configuration, "dataset": Dataset, "agent": Agent,
}  # fmt: skip


def one_line(error):
  """Checks the form of a refusal."""
  message = str(error)
  assert message
  assert len(message.splitlines()) == 1, message


def attempt(reader, data):
  """Reads an input; returns None, or what broke the reader: the exception, as text with its place."""
  from jedi_jax.errors import UserError

  def stop(*_):
    raise Hang(f"no answer within {SECONDS} s")

  old = signal.signal(signal.SIGALRM, stop)
  signal.alarm(SECONDS)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      try:
        reader.read(data)
      except UserError as error:
        one_line(error)
  except (Exception, Hang):
    return traceback.format_exc()
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)
  return None


def signature(trace):
  """The place that raised and the type, to tell findings apart."""
  lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
  return hashlib.sha256("".join([*lines[-2:], trace.splitlines()[-1].partition(":")[0]]).encode()).hexdigest()[:10]


@contextlib.contextmanager
def limited_memory():
  """Limits the address space to what the process has and `MEMORY` more."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  old = resource.getrlimit(resource.RLIMIT_AS)
  resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, old[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_AS, old)


def main():
  """Runs one reader for some seconds."""
  import random

  name, seconds, seed, folder = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4])
  atheris = None
  if "--random" not in sys.argv:
    with contextlib.suppress(ImportError):
      import atheris
  guide = contextlib.nullcontext() if atheris is None else atheris.instrument_imports(
    include=["jedi_jax", "json", "zipfile", "pickle", "numpy.lib"], enable_loader_override=False
  )  # fmt: skip
  with guide:
    import jedi_jax.agent
    import jedi_jax.datasets
    import jedi_jax.evaluation.minatar
    import jedi_jax.interop.diamond
    import jedi_jax.sweep  # noqa: F401
  found, count = {}, 0
  with tempfile.TemporaryDirectory() as scratch:
    reader = READERS[name](pathlib.Path(scratch))
    for data in reader.seeds:
      assert attempt(reader, data) is None, attempt(reader, data)
    start = time.monotonic()

    def report():
      findings = {key: trace.splitlines()[-1][:200] for key, trace in found.items()}
      engine = "random" if atheris is None else "atheris"
      text = {"reader": name, "engine": engine, "seed": seed, "seconds": round(time.monotonic() - start),
              "executions": count, "findings": findings}  # fmt: skip
      print(json.dumps(text), flush=True)

    def once(data):
      nonlocal count
      count += 1
      trace = attempt(reader, data)
      if trace is not None and signature(trace) not in found:
        found[signature(trace)] = trace
        (folder / f"{name}-{signature(trace)}.bin").write_bytes(data)
        (folder / f"{name}-{signature(trace)}.txt").write_text(trace, errors="backslashreplace")
      if time.monotonic() - start > seconds:
        report()
        shutil.rmtree(scratch, ignore_errors=True)
        sys.stdout.flush()
        import os

        os._exit(0)  # libFuzzer knows no other end without a finding.

    with limited_memory():
      if atheris is None:
        pick, pool = random.Random(seed), list(reader.seeds)
        while True:
          data = reader.mutate(pick, pick.choice(pool))
          if pick.random() < 0.1 and len(pool) < 500 and len(data) < 1 << 20:
            pool.append(data)  # Mutations of mutations.
          once(data)
      corpus = pathlib.Path(scratch) / "corpus"
      corpus.mkdir()
      for i, data in enumerate(reader.seeds):
        (corpus / str(i)).write_bytes(data)

      def mutator(data, max_size, number):
        pick = random.Random(number)
        mutated = atheris.Mutate(data, len(data) + 64) if pick.random() < 0.2 else reader.mutate(pick, data)
        return mutated[:max_size]

      size = 4 * max(map(len, reader.seeds)) + 4096
      arguments = [f"-seed={seed}", f"-max_len={size}", "-timeout=0", "-rss_limit_mb=0", "-len_control=0"]
      atheris.Setup([sys.argv[0], *arguments, str(corpus)], once, custom_mutator=mutator)
      atheris.Fuzz()


if __name__ == "__main__":
  main()
