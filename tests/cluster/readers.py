"""Readers of files from elsewhere, valid files of each, and mutations that keep most of a file valid.

`python readers.py READER SECONDS SEED FOLDER [--random]` feeds a reader with mutations, guided by coverage where
atheris is installed, writes each input that breaks it to the folder, and prints the number of executions as JSON.
"""

import contextlib
import hashlib
import io
import json
import pathlib
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings

from checkpoint_readers import (
  MEMORY,
  SECONDS,
  Checkpoint,
  Diamond,
  Hang,
  Packed,
  Reader,
  Replay,
  Shapes,
  save,
  tiny_run,
)
from mutations import ODD, mutate_bytes, mutate_json, mutate_lines, mutate_zip


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


class Recorded(Diamond):
  """Episodes of DIAMOND, as make_dataset.py reads and writes them."""

  def valid(self):
    import pytest
    import torch_writer

    from jedi_jax.interop import torch_file

    self.patches = pytest.MonkeyPatch()
    self.patches.setattr(torch_file, "_torch_is_safe", lambda: False)  # Not torch is tested.
    with pytest.MonkeyPatch.context() as patch:
      writer = torch_writer.Writer(self.folder, patch)
      files = [torch_writer.diamond_episode(writer, **how) for how in ({}, {"ends": False}, {"final": False})]
      return [file.rename(self.folder / "episode").read_bytes() for file in files]

  def read(self, data):
    from jedi_jax import datasets
    from jedi_jax.interop.episodes import read_diamond

    self.put("recorded/0.pt", data)
    shutil.rmtree(self.folder / "data", ignore_errors=True)
    datasets.write(self.folder / "data", read_diamond(self.folder / "recorded"), num_actions=5, source="DIAMOND")


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
  "metrics": Metrics, "config": Configuration, "dataset": Dataset, "recorded": Recorded, "agent": Agent,
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
