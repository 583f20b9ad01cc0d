"""Files are data: nothing in them runs. They belong to the user, and nothing listens on the network."""

import ast
import contextlib
import os
import pathlib
import pickle
import pickletools
import socket
import stat
import threading
import time

import numpy as np
import pytest

import jedi_jax
from jedi_jax.config import make_config
from jedi_jax.envs.catch import SPEC
from jedi_jax.errors import UserError
from jedi_jax.interop.torch_file import load_arrays
from jedi_jax.runs import checkpoint, loggers, telemetry, workdir
from jedi_jax.training.parallel import Devices

PACKAGE = pathlib.Path(jedi_jax.__file__).parent
ROOT = pathlib.Path(__file__).parents[2]
UNPICKLERS = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "copyreg", "yaml"}
RUNNERS = {"eval", "exec", "compile", "__import__", "execfile"}
SHELLS = {"system", "popen", "read_pickle", "to_pickle"}
PARAMS = {"encoder": {"kernel": np.ones((3, 4), np.float32)}, "actor_critic": {"bias": np.zeros(2, np.float32)}}

SMALLEST = {
  "encoder.channels": (4,),
  "encoder.downsample": (True,),
  "denoiser.channels": (4,),
  "denoiser.conditioning_width": 4,
  "denoiser.conditioning_frames": 1,
  "denoiser.targets": 1,
  "sampler.num_steps": 1,
  "reward_end.channels": (4,),
  "actor_critic.horizon": 1,
  "training.final_epochs": 0,
}
"""A run as small as it can be: compiling it is all that it costs."""


def sources():
  """Yields (path within the repository, syntax tree) of the package and the programs."""
  for folder in (PACKAGE, ROOT / "experiments"):
    for path in sorted(folder.rglob("*.py")):
      yield f"{folder.name}/{path.relative_to(folder).as_posix()}", ast.parse(path.read_text())


def findings(tree):
  """Yields what could run code from a file: (kind, name)."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (("import", alias.name) for alias in node.names if alias.name.split(".")[0] in UNPICKLERS)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
      yield "import", str(node.module)
    elif isinstance(node, ast.Call):
      if isinstance(node.func, ast.Name) and node.func.id in RUNNERS:
        yield "call", node.func.id
      elif isinstance(node.func, ast.Attribute) and node.func.attr in SHELLS:
        yield "call", node.func.attr
      for keyword in node.keywords:
        if keyword.arg in ("allow_pickle", "shell") and not _is(keyword.value, False):
          yield "argument", keyword.arg
        if keyword.arg == "weights_only" and not _is(keyword.value, True):
          yield "argument", keyword.arg


def _is(node, value):
  return isinstance(node, ast.Constant) and node.value is value


def test_only_the_reader_of_torch_files_knows_pickles_and_nothing_evaluates_texts():
  found = {(path, *finding) for path, tree in sources() for finding in findings(tree)}
  assert found == {("jedi_jax/interop/torch_file.py", "import", "pickle")}


def test_the_reader_of_torch_files_takes_only_the_restricted_unpickler_from_pickle():
  tree = ast.parse((PACKAGE / "interop" / "torch_file.py").read_text())
  used = {
    node.attr
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle"
  }
  assert used == {"_Unpickler", "BYTEARRAY8"}
  (loader,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "_Unpickler")
  assert "find_class" in {node.name for node in loader.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("text", [
  "import pickle", "from pickle import loads", "import dill.source", "np.load(f, allow_pickle=True)", "eval('1')",
  "exec(x)", "os.system(x)", "subprocess.run(x, shell=True)", "torch.load(f, weights_only=False)", "__import__(x)",
])  # fmt: skip
def test_the_scan_finds_what_runs_code(text):
  assert list(findings(ast.parse(text)))


class Malice:
  """Makes a file when it is unpickled."""

  def __init__(self, canary):
    self.canary = canary

  def __reduce__(self):
    return os.mkdir, (str(self.canary),)


def test_a_pickled_object_in_place_of_a_torch_file_is_refused(tmp_path, pt):
  canary = tmp_path / "canary"
  file = tmp_path / "agent.pt"
  for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    file.write_bytes(pickle.dumps(Malice(canary), protocol))
    with pytest.raises(UserError, match="not a readable PyTorch file"):
      load_arrays(file)
    with pytest.raises(UserError, match="refused"):
      load_arrays(pt.archive(pickle.dumps(Malice(canary), protocol)))
  assert not canary.exists()


def save(directory, state=True):
  checkpoints = checkpoint.Checkpoints(directory, keep=1)
  checkpoints.save(1, params=PARAMS, state={"updates": np.zeros((), np.int32)} if state else None)
  checkpoints.wait()
  checkpoints.close()


def test_checkpoints_hold_no_pickles(tmp_path):
  save(tmp_path / "checkpoints")
  files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
  assert len(files) > 4
  for path in files:
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r".*"):
      list(pickletools.genops(content))
    assert b"cos\nsystem" not in content


def test_pickles_put_into_a_checkpoint_are_refused_or_not_looked_at(tmp_path):
  canary = tmp_path / "canary"
  save(tmp_path / "checkpoints", state=False)
  files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
  refused = 0
  for path in files:
    whole = path.read_bytes()
    path.write_bytes(pickle.dumps(Malice(canary)))
    try:
      loaded, _ = checkpoint.load_params(tmp_path / "checkpoints", PARAMS)
      np.testing.assert_array_equal(loaded["encoder"]["kernel"], PARAMS["encoder"]["kernel"])
    except UserError as error:
      refused += 1
      message = str(error)
      assert len(message.splitlines()) == 1, message
    path.write_bytes(whole)
  assert refused
  assert not canary.exists()


@contextlib.contextmanager
def masked(mask):
  old = os.umask(mask)
  try:
    yield
  finally:
    os.umask(old)


@pytest.mark.parametrize(("mask", "folder", "file"), [(0o077, 0o700, 0o600), (0o022, 0o755, 0o644)])
def test_files_are_written_with_the_users_permissions(tmp_path, mask, folder, file):
  with masked(mask):
    run = workdir.prepare(tmp_path / "run", make_config(env="catch", preset="debug"), SPEC)
    events = loggers.make(["tensorboard"], run, last_epoch=0)
    metrics = telemetry.MetricsWriter(run.metrics, events, last_epoch=0)
    metrics.write(1, {"loss": 1.0})
    metrics.close()
    save(run.checkpoints / "latest")
    workdir.write_json(run.result, {"mean_return": 1.0})
  paths = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
  assert {"config.json", "metrics.jsonl", "result.json", "checkpoints", "tensorboard"} <= {path.name for path in paths}
  for path in paths:
    assert stat.S_IMODE(path.lstat().st_mode) == (folder if path.is_dir() else file), path


def listening():
  """Sockets of this process that wait for connections: lines of the kernel's tables."""
  own = set()
  for name in os.listdir("/proc/self/fd"):
    with contextlib.suppress(OSError):
      own.add(os.readlink(f"/proc/self/fd/{name}"))
  found = []
  for table in ("tcp", "tcp6"):
    with contextlib.suppress(FileNotFoundError):  # Without IPv6.
      for line in pathlib.Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
          found.append(line)
  return found


@contextlib.contextmanager
def watched():
  """Looks for sockets that listen until the block ends; gives what was seen, and how often was looked."""
  seen, looks, stop = set(), [], threading.Event()

  def watch():
    while not stop.is_set():
      seen.update(listening())
      looks.append(time.monotonic())
      stop.wait(0.05)

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield seen, looks
  finally:
    stop.set()
    thread.join()


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/net/tcp"), reason="the kernel's tables of sockets")


@needs_proc
def test_a_socket_that_listens_is_seen():
  with watched() as (seen, _), socket.create_server(("127.0.0.1", 0)):
    time.sleep(0.2)
  assert len(seen) == 1


@needs_proc
@pytest.mark.faults
def test_training_listens_nowhere(tmp_path, quiet):
  config = make_config(env="catch", preset="debug", overrides=SMALLEST)
  before = set(listening())
  with watched() as (seen, looks):
    jedi_jax.train(config, tmp_path / "run", devices=Devices.take(1), console=quiet)
  assert len(looks) > 20
  assert not seen - before
