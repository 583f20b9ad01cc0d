"""Corrupted files: DIAMOND's checkpoints, results and metrics in reports, and the published scores.

Each is read where the damage does no harm, or refused in one line that names the file. No code in it runs, nothing
hangs, memory stays bounded, and no file changes.
"""

import contextlib
import json
import os
import pickle
import resource
import signal
import struct
import zipfile

import numpy as np
import pytest
from small_diamond import SPEC, make_config, random_params

from jedi_jax import sweep
from jedi_jax.errors import UserError
from jedi_jax.evaluation import scores as scores_lib
from jedi_jax.interop import diamond

SECONDS = 20
MEMORY = 1 << 30


class Hang(BaseException):
  """No `Exception`, so that nothing on the way takes it for damage."""


@contextlib.contextmanager
def limited():
  """Fails what takes more than its time or memory."""

  def stop(*_):
    raise Hang

  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  old = signal.signal(signal.SIGALRM, stop)
  signal.alarm(SECONDS)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)
  assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


def one_line(error, path):
  message = str(error)
  assert len(message.splitlines()) == 1, message
  assert len(message) < 1000 + 2 * len(str(path)), message
  assert str(path) in message, message


# ---- DIAMOND ----


@pytest.fixture(scope="module")
def arrays():
  return diamond.export_state_dict(random_params(), make_config(), SPEC)


class Runs:
  """What a pickle turns into a call of a function."""

  def __init__(self, function, *arguments):
    self.call = (function, arguments)

  def __reduce__(self):
    return self.call


def malicious(pt, canary):
  """Files that would make the canary if anything in them ran."""
  touch = f"touch {canary}"
  source = f"open({str(canary)!r}, 'w')"
  tensor = pt.tensor(np.zeros(2, np.float32))
  for function, argument in ((os.system, touch), (eval, source), (exec, source), (os.mkdir, str(canary)),
                             (open, str(canary)), (pickle.loads, pickle.dumps(Runs(os.system, touch)))):  # fmt: skip
    mode = ("w",) if function is open else ()
    yield pt.write({"denoiser.inner_model.conv_in.weight": tensor, "x": Runs(function, argument, *mode)})
    yield pt.archive(pickle.dumps(Runs(function, argument, *mode), protocol=0))
  plain = pt.archive(b"")
  plain.write_bytes(pickle.dumps(Runs(os.system, touch)))  # No zip: the format of old versions of torch.
  yield plain


def bombs(pt):
  """Files that ask for far more memory than they have."""
  zeros = np.zeros(64 << 20, np.uint8)
  yield pt.write({"x": pt.tensor(zeros)}, compression=zipfile.ZIP_DEFLATED)
  yield pt.archive(b" " * (80 << 20), compression=zipfile.ZIP_DEFLATED)
  small = pt.Storage(np.zeros(4, np.float32))
  yield pt.write({"x": pt.Tensor(small, 0, (1 << 20, 1 << 20), (0, 0))})
  yield pt.write({"x": pt.Tensor(pt.Storage(np.zeros(4, np.float32), claimed=1 << 40), 0, (1 << 40,), (1,))})
  yield pt.archive(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.")
  yield pt.archive(b"\x80\x02]" + b"(]" * 200_000 + b".")
  yield pt.archive(b"(" * 1_000_000)


def no_archives(pt, whole):
  for content in (b"", b"PK", b"not a file of DIAMOND's", b"\x00" * 5000, whole[::-1], whole[:100] * 50):
    path = pt.archive(b"")
    path.write_bytes(content)
    yield path
  directory = pt.archive(b"")
  directory.unlink()
  directory.mkdir()
  yield directory
  fifo = pt.archive(b"")
  fifo.unlink()
  os.mkfifo(fifo)  # To open it would wait for ever.
  yield fifo
  loop = pt.archive(b"")
  loop.unlink()
  loop.symlink_to(loop)
  yield loop


def other_contents(pt, arrays, rng):
  """Well-formed files with arrays of other names, types and shapes."""
  names = sorted(arrays)
  some = [names[i] for i in rng.choice(len(names), 12, replace=False)]
  yield pt.save({**arrays, some[0]: arrays[some[0]].astype(np.int64)})
  yield pt.save({**arrays, some[1]: arrays[some[1]] > 0})
  yield pt.save({**arrays, some[2]: arrays[some[2]].astype(np.float16)})
  yield pt.save({**arrays, some[3]: arrays[some[3]][None]})
  yield pt.save({**arrays, some[4]: arrays[some[4]].reshape(-1)[:-1]})
  yield pt.save({**arrays, some[5]: np.zeros((0, 3), np.float32)})
  yield pt.save({**arrays, some[6]: np.full_like(arrays[some[6]], np.nan)})
  yield pt.save({name: value for name, value in arrays.items() if name != some[7]})
  yield pt.save({**arrays, "denoiser.λ\n": arrays[some[8]]})
  yield pt.save({name: np.float32(0) for name in arrays})
  yield pt.save({name: np.zeros((0,) * value.ndim, np.float32) for name, value in arrays.items()})
  yield pt.save({name: np.ones((1,) * value.ndim, np.float32) for name, value in arrays.items()})
  yield pt.save({name: arrays[other] for name, other in zip(names, names[::-1], strict=True)})
  yield pt.save({name.replace("denoiser.", ""): value for name, value in arrays.items()})
  wide = "denoiser.inner_model.cond_proj.0.weight"
  yield pt.save({**arrays, wide: np.zeros((3, 3), np.float32)})
  yield pt.write([pt.tensor(value) for value in arrays.values()])
  yield pt.write(dict.fromkeys(arrays, 3))


def swapped(pt, whole, rng):
  """The archive with the contents of two of its members exchanged."""
  for _ in range(10):
    path = pt.archive(b"")
    source = path.with_suffix(".whole")
    source.write_bytes(whole)
    with zipfile.ZipFile(source) as archive:
      members = {name: archive.read(name) for name in archive.namelist()}
    source.unlink()
    first, second = (sorted(members)[i] for i in rng.choice(len(members), 2, replace=False))
    members[first], members[second] = members[second], members[first]
    with zipfile.ZipFile(path, "w") as archive:
      for name, content in members.items():
        archive.writestr(name, content)
    yield path


def damaged(pt, whole, rng):
  """Truncations, flipped bits and noise."""
  for length in rng.integers(1, len(whole), 18):
    path = pt.archive(b"")
    path.write_bytes(whole[:length])
    yield path
  with_names = [whole.index(b"data.pkl"), whole.rindex(b"PK\x01\x02"), whole.rindex(b"PK\x05\x06")]
  positions = [*rng.integers(0, len(whole), 15), *(start + int(rng.integers(0, 40)) for start in with_names * 3)]
  for position in positions:
    content = bytearray(whole)
    content[min(int(position), len(content) - 1)] ^= 1 << int(rng.integers(0, 8))
    path = pt.archive(b"")
    path.write_bytes(content)
    yield path
  for _ in range(6):
    start = int(rng.integers(0, len(whole) - 64))
    path = pt.archive(b"")
    path.write_bytes(whole[:start] + rng.bytes(64) + whole[start + 64 :])
    yield path


def corrupted(pt, arrays, canary):
  """All of them, by kind."""
  rng = np.random.default_rng(0)
  whole = pt.save(arrays).read_bytes()
  return {
    "malicious": list(malicious(pt, canary)),
    "bombs": list(bombs(pt)),
    "no archives": list(no_archives(pt, whole)),
    "other contents": list(other_contents(pt, arrays, rng)),
    "swapped": list(swapped(pt, whole, rng)),
    "damaged": list(damaged(pt, whole, rng)),
  }


def import_all(paths, tmp_path, tree):
  """Imports each file as the program does, up to what is written; returns those that were read."""
  folder = paths[0].parent
  before = tree(folder)
  read = []
  for path in paths:
    with limited():
      try:
        found = diamond.load(path)
      except UserError as error:
        one_line(error, path)
        continue
      try:
        config, spec = diamond.infer(found, env="catch")
        if spec == SPEC:
          diamond.import_params(found, config, spec)
          read.append(path)
      except UserError as error:
        message = str(error)
        assert "\n" not in message
  assert tree(folder) == before
  return read


@pytest.mark.faults
def test_100_corrupted_files_of_diamond_are_refused_or_harmless(pt, arrays, tmp_path, tree):
  canary = tmp_path / "canary"
  kinds = corrupted(pt, arrays, canary)
  assert sum(map(len, kinds.values())) >= 100
  for kind, paths in kinds.items():
    read = import_all(paths, tmp_path, tree)
    assert not canary.exists(), kind
    if kind in ("malicious", "bombs", "no archives"):
      assert not read, kind
    assert len(read) <= len(paths) / 2, kind


def test_some_corrupted_files_of_diamond_are_refused_or_harmless(pt, arrays, tmp_path, tree):
  canary = tmp_path / "canary"
  kinds = corrupted(pt, arrays, canary)
  some = [paths[i] for paths in kinds.values() for i in (0, len(paths) // 2)]
  assert len(import_all(some, tmp_path, tree)) < len(some) / 2
  assert not canary.exists()


def test_a_refused_file_leaves_no_directory_behind(pt, tmp_path):
  for path in no_archives(pt, b"x" * 200):
    with pytest.raises(UserError):
      diamond.import_checkpoint(path, env="catch", directory=tmp_path / "run")
  assert not list(tmp_path.iterdir())


# ---- Results in reports ----

RESULT = {
  "env": "atari/Pong", "variant": "jedi", "preset": "paper", "seed": 0, "env_steps": 100_000, "frames": 400_000,
  "episode_returns": [1.0] * 100, "mean_return": 1.0, "max_episode_steps": 27_000, "seconds": 9.0,
}  # fmt: skip
RECORD = {"epoch": 1, "env_steps": 100, "frames": 400, "evaluation/return": 1.0, "time/total_seconds": 5.0}
WHOLE = json.dumps(RESULT).encode()
LINE = json.dumps(RECORD).encode()


def changed(**changes):
  return json.dumps({**RESULT, **changes}).encode()


def without(name):
  return json.dumps({key: value for key, value in RESULT.items() if key != name}).encode()


BAD_RESULTS = [
  b"", b"{", WHOLE[:50], WHOLE[:-1], WHOLE + WHOLE, b"null", b"[]", b"3", b'"text"', b"\xff\xfe\x00", b"[" * 100_000,
  WHOLE.replace(b"1.0", b"1.0.0"), WHOLE.replace(b'"mean_return": 1.0', b'"mean_return": ' + b"9" * 6000),
  *(without(name) for name in ("env", "variant", "preset", "seed", "env_steps", "episode_returns", "mean_return")),
  *(changed(mean_return=value) for value in ("much", None, [1], {}, float("nan"), float("inf"), 1e300, 10**400)),
  *(changed(seed=value) for value in ("x", None, [0], float("inf"), float("nan"))),
  *(changed(env_steps=value) for value in (None, "many", float("inf"))),
  *(changed(episode_returns=value) for value in (None, 3)),
  *(changed(variant=value) for value in ("a\nb", "\ud800", "", "x" * 100_000, "\x00")),
  changed(env="\udc00"), changed(env="\u2028\u2029"), changed(preset="\x1b[2J"),
]  # fmt: skip
BAD_METRICS = [
  b"null\n" + LINE, b"[]\nx\n" + LINE, b"3\n3\n", b"\xff\n", b"x\n" + LINE, b"[" * 100_000 + b"\n" + LINE, b'"a"\n3\n',
  json.dumps({**RECORD, "evaluation/return": "much"}).encode(),
  json.dumps({**RECORD, "evaluation/return": float("nan")}).encode(),
  json.dumps({**RECORD, "frames": None}).encode(),
  json.dumps({**RECORD, "env_steps": float("inf")}).encode(),
  json.dumps({"evaluation/return": 1.0}).encode(),
]  # fmt: skip


def lay_out(home, results, metrics):
  """Directories of runs, one damaged file each; returns the damaged files."""
  files = []
  for i, content in enumerate(results):
    folder = home / f"result_{i}"
    folder.mkdir()
    (folder / "result.json").write_bytes(content)
    files.append(folder / "result.json")
  for i, content in enumerate(metrics):
    folder = home / f"metrics_{i}"
    folder.mkdir()
    (folder / "result.json").write_bytes(WHOLE)
    (folder / "metrics.jsonl").write_bytes(content)
    files.append(folder / "metrics.jsonl")
  for name in ("result.json", "metrics.jsonl"):
    folder = home / f"directory_{name}"
    folder.mkdir()
    (folder / "result.json").write_bytes(WHOLE)
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    files.append(folder / name)
  return files


def report_all(files, home, commands, tree):
  """Reports each damaged file beside a good one; every line is refused by naming the file, and nothing is written."""
  (home / "good").mkdir()
  (home / "good" / "result.json").write_bytes(changed(seed=5))
  before = tree(home)
  cases = [
    ("report", ["--results=good/result.json", f"--results={file.parent.name}/result.json", "--out=out", "--reps=0"])
    for file in files
  ]
  for file, (status, out, err) in zip(files, commands(cases, home), strict=True):
    assert (status, out) == (2, ""), (file.read_bytes()[:200] if file.is_file() else file, out, err)
    assert len(err.splitlines()) == 1, err[-2000:]
    assert str(file.relative_to(home)) in err
    assert len(err) < 2000
  assert tree(home) == before


def test_some_damaged_results_are_refused_by_name(tmp_path, commands, tree):
  report_all(lay_out(tmp_path, BAD_RESULTS[::9], BAD_METRICS[::4]), tmp_path, commands, tree)


@pytest.mark.faults
def test_all_damaged_results_are_refused_by_name(tmp_path, commands, tree):
  report_all(lay_out(tmp_path, BAD_RESULTS, BAD_METRICS), tmp_path, commands, tree)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_unreadable_results_are_refused_by_name(tmp_path, commands, tree):
  files = lay_out(tmp_path, [WHOLE], [LINE])
  for file in files:
    file.chmod(0)
  report_all(files, tmp_path, commands, tree)


def test_a_sweep_refuses_damaged_results_and_metrics_by_name(tmp_path):
  (run,) = sweep.plan(tmp_path, games=["catch"], seeds=1, variants=["jedi"], preset="debug", overrides=[])
  from jedi_jax.runs import workdir

  workdir.prepare(run.workdir, run.config, SPEC)
  read = refused = 0
  for name, contents in (("metrics.jsonl", BAD_METRICS), ("result.json", BAD_RESULTS)):
    for content in contents:
      (run.workdir / name).write_bytes(content)
      try:
        sweep.table([sweep.run_status(run)])
        read += 1  # A sweep takes less from the files than a report does.
      except UserError as error:
        one_line(error, run.workdir / name)
        refused += 1
  assert refused > 20
  assert read > 20


# ---- Published scores ----


def published_without(*path):
  def change(table):
    node = table
    for name in path[:-1]:
      node = node[name]
    del node[path[-1]]

  return change


def published_with(value, *path):
  def change(table):
    node = table
    for name in path[:-1]:
      node = node[name]
    node[path[-1]] = value

  return change


BAD_PUBLISHED = [
  *(published_without(name) for name in ("games", "random", "human", "partition", "methods")),
  published_without("random", "Pong"),
  published_without("partition", "human_optimal"),
  published_without("methods", "DIAMOND", "source"),
  published_without("methods", "BBF", "scores"),
  *(published_with(value, "games") for value in (None, [], 3, ["Pong", "Pong"], ["Pong", ["x"]], {})),
  *(published_with(value, "human", "Pong") for value in (None, "14.6", float("nan"), float("inf"), [1], -20.7)),
  *(published_with(value, "methods") for value in (None, [], 3, {"x": None}, {"x": {}})),
  *(published_with(value, "methods", "BBF", "scores", "Pong") for value in ("x", float("nan"), [1.0], True, 10**400)),
  *(published_with(value, "methods", "DIAMOND", "per_run", "Pong") for value in (None, 3, ["x"], [None])),
  published_with(3.0, "methods", "BBF", "scores", "NoSuchGame"),
  published_with(["NoSuchGame"], "partition", "agent_optimal"),
  published_with(3, "methods", "BBF", "note"),
  published_with({"mean": "x"}, "methods", "BBF", "published"),
]


@pytest.fixture
def published(tmp_path, monkeypatch):
  """Puts another file in the place of the published scores."""
  whole = scores_lib._FILE.read_bytes()
  monkeypatch.setattr(scores_lib, "_FILE", tmp_path / "published.json")
  yield tmp_path / "published.json", whole
  scores_lib._published.cache_clear()


def test_damaged_published_scores_are_refused_by_name(published):
  file, whole = published
  contents = [b"", b"null", b"[]", whole[:1000], whole[:-3], whole + b"x", b"\xff" + whole, b"[" * 100_000]
  for change in BAD_PUBLISHED:
    table = json.loads(whole)
    change(table)
    contents.append(json.dumps(table).encode())
  for content in contents:
    file.write_bytes(content)
    scores_lib._published.cache_clear()
    for use in (scores_lib.games, scores_lib.published, scores_lib.reference):
      with pytest.raises(UserError) as caught:
        use()
      one_line(caught.value, file)
  file.unlink()
  with pytest.raises(UserError, match=r"published\.json is damaged"):
    scores_lib.games()
  file.mkdir()
  with pytest.raises(UserError, match=r"published\.json is damaged"):
    scores_lib.games()
