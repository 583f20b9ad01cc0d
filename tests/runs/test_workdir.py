import contextlib
import errno
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from refusals import refused

from jedi_jax.config import make_config, to_dict
from jedi_jax.envs.catch import SPEC
from jedi_jax.errors import UserError
from jedi_jax.runs import checkpoint, workdir
from jedi_jax.version import __version__

CONFIG = make_config(env="catch", preset="debug")
OTHER = make_config(env="catch", preset="debug", seed=3, overrides={"actor_critic.horizon": 5})


def test_a_new_directory_holds_the_configuration(tmp_path):
  run = workdir.prepare(tmp_path / "deep" / "run", CONFIG, SPEC)
  assert run.path == tmp_path / "deep" / "run"
  assert [p.name for p in run.path.iterdir()] == ["config.json"]
  data = json.loads((run.path / "config.json").read_text())
  assert data["version"] == __version__
  assert data["config"] == to_dict(CONFIG)
  again = workdir.read(run.path)
  assert (again.config, again.spec, again.path) == (CONFIG, SPEC, run.path)


def test_paths_may_be_relative_or_begin_with_the_home(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  assert workdir.prepare("run", CONFIG, SPEC).path == tmp_path / "run"
  assert workdir.read("~/run").path == tmp_path / "run"


@pytest.mark.parametrize("name", ["lr=[0.1]", "[", "a\\b", "a*b?c%20 d#"])
def test_a_directory_whose_checkpoints_orbax_cannot_read_is_refused(tmp_path, name):
  directory, unreadable = tmp_path / name, name in ("lr=[0.1]", "a\\b")
  if unreadable:
    refused(lambda: workdir.prepare(directory, CONFIG, SPEC), str(directory), "--workdir")
    assert not directory.exists()
  else:
    workdir.prepare(directory, CONFIG, SPEC)
  with contextlib.closing(checkpoint.Checkpoints(directory / "latest", keep=1)) as checkpoints:
    checkpoints.save(1, params={"x": np.ones(3)})
    checkpoints.wait()
  # If it can be read one day, nothing has to be refused any more.
  with pytest.raises(UserError) if unreadable else contextlib.nullcontext():
    params, _ = checkpoint.load_params(directory / "latest", {"x": np.zeros(3)})
    np.testing.assert_array_equal(params["x"], 1.0)


def test_the_same_configuration_is_resumed_without_writing(tmp_path, snapshot):
  workdir.prepare(tmp_path, CONFIG, SPEC)
  before = snapshot(tmp_path)
  workdir.prepare(tmp_path, CONFIG, SPEC)
  assert snapshot(tmp_path) == before


def test_another_configuration_is_refused_and_nothing_changes(tmp_path, snapshot):
  run = workdir.prepare(tmp_path, CONFIG, SPEC)
  run.metrics.write_text("precious\n")
  before = snapshot(tmp_path)
  refused(
    lambda: workdir.prepare(tmp_path, OTHER, SPEC),
    "another configuration",
    "seed: 0 -> 3",
    "actor_critic.horizon: 4 -> 5",
    "--overwrite",
  )
  assert snapshot(tmp_path) == before


def test_overwriting_removes_only_the_files_of_a_run(tmp_path, snapshot):
  run = workdir.prepare(tmp_path / "run", CONFIG, SPEC)
  for file in (run.metrics, run.result, run.evaluation, run.checkpoints / "latest" / "1" / "x", run.tensorboard / "e"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("old")
  foreign = run.path / "notes" / "thoughts.txt"
  foreign.parent.mkdir()
  foreign.write_text("mine")
  elsewhere = tmp_path / "elsewhere"
  elsewhere.mkdir()
  (elsewhere / "kept").write_text("mine too")
  workdir.prepare(run.path, OTHER, SPEC, overwrite=True)
  assert set(snapshot(run.path)) == {"config.json", "notes/thoughts.txt"}
  assert workdir.read(run.path).config == OTHER

  run.checkpoints.symlink_to(elsewhere)
  workdir.prepare(run.path, CONFIG, SPEC, overwrite=True)
  assert not run.checkpoints.exists()
  assert (elsewhere / "kept").read_text() == "mine too"


def test_other_files_in_a_directory_are_kept(tmp_path, snapshot):
  (tmp_path / "thesis.tex").write_text("mine")
  workdir.prepare(tmp_path, CONFIG, SPEC)
  assert set(snapshot(tmp_path)) == {"config.json", "thesis.tex"}


def test_a_path_that_cannot_be_a_directory(tmp_path):
  file = tmp_path / "file"
  file.write_text("mine")
  refused(lambda: workdir.prepare(file, CONFIG, SPEC), str(file))
  refused(lambda: workdir.prepare(file / "below", CONFIG, SPEC), str(file / "below"))
  refused(lambda: workdir.prepare(file, CONFIG, SPEC, overwrite=True), str(file))
  refused(lambda: workdir.read(file), str(file))
  assert file.read_text() == "mine"


def test_an_unwritable_directory(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir.os, "access", lambda path, mode: False)  # Root can write to any directory.
  refused(lambda: workdir.prepare(tmp_path, CONFIG, SPEC), "not writable", str(tmp_path))
  assert not list(tmp_path.iterdir())


def test_no_run(tmp_path):
  refused(lambda: workdir.read(tmp_path), "holds no run", "config.json")
  refused(lambda: workdir.read(tmp_path / "missing"), "holds no run")
  assert not (tmp_path / "missing").exists()


def damaged(tmp_path, snapshot, text):
  file = tmp_path / "config.json"
  file.write_bytes(text if isinstance(text, bytes) else text.encode())
  before = snapshot(tmp_path)
  refused(lambda: workdir.read(tmp_path), "config.json")
  refused(lambda: workdir.prepare(tmp_path, CONFIG, SPEC), "config.json")
  assert snapshot(tmp_path) == before


GOOD = {"version": "0", "spec": {"num_actions": 3, "observation_shape": [24, 24, 3]}, "config": to_dict(CONFIG)}


@pytest.mark.parametrize(
  "text",
  [
    "",
    "{",
    "[]",
    "3",
    "null",
    b"\xff\xfe\x00",
    "{}",
    json.dumps(GOOD)[:-20],
    json.dumps(GOOD | {"spec": {"num_actions": 3, "observation_shape": [24]}}),
    json.dumps(GOOD | {"spec": {"num_actions": "many", "observation_shape": [24, 24, 3]}}),
    json.dumps(GOOD | {"config": {"actor_critic": {"horizn": 3}}}),
    json.dumps(GOOD | {"config": {"actor_critic": {"horizon": "often"}}}),
    json.dumps(GOOD | {"config": {"actor_critic": {"horizon": 0}}}),
    json.dumps(GOOD | {"config": {"actor_critic": 3}}),
  ],
)
def test_a_damaged_configuration_is_refused_and_kept(tmp_path, snapshot, text):
  damaged(tmp_path, snapshot, text)


@pytest.mark.parametrize("config", [None, [], 3, "x"])
def test_a_configuration_must_be_an_object(tmp_path, snapshot, config):
  damaged(tmp_path, snapshot, json.dumps(GOOD | {"config": config}))


def test_a_damaged_configuration_can_be_overwritten(tmp_path):
  (tmp_path / "config.json").write_text("{")
  workdir.prepare(tmp_path, CONFIG, SPEC, overwrite=True)
  assert workdir.read(tmp_path).config == CONFIG


def test_an_unknown_setting_names_both_versions(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(GOOD | {"version": "9.9", "config": {"future": 1}}))
  refused(lambda: workdir.read(tmp_path), "9.9", __version__, "future")


def test_json_files_are_written_atomically(tmp_path):
  path = tmp_path / "x.json"
  workdir.write_json(path, {"a": [1, 2.5, None]})
  assert workdir.read_json(path) == {"a": [1, 2.5, None]}
  before = path.read_bytes()
  with pytest.raises(TypeError):
    workdir.write_json(path, {"a": object()})
  assert path.read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
  path.write_text("{")
  refused(lambda: workdir.read_json(path), str(path))
  refused(lambda: workdir.read_json(pathlib.Path(tmp_path / "none.json")), "none.json")


def test_checkpoints_without_a_configuration_are_refused_and_kept(tmp_path, snapshot):
  (tmp_path / "checkpoints" / "latest").mkdir(parents=True)
  (tmp_path / "checkpoints" / "latest" / "7").write_text("precious")
  before = snapshot(tmp_path)
  refused(lambda: workdir.prepare(tmp_path, CONFIG, SPEC), "checkpoints", "--overwrite")
  assert snapshot(tmp_path) == before


def test_a_second_training_in_a_directory_is_refused(tmp_path):
  with workdir.locked(tmp_path / "run"):
    refused(lambda: workdir.locked(tmp_path / "run").__enter__(), "is being trained by process", "--workdir")
    with workdir.locked(tmp_path / "other"):
      pass
  with workdir.locked(tmp_path / "run"):
    pass
  assert (tmp_path / "run" / ".lock").read_text() == ""


def test_the_lock_of_a_killed_process_is_free(tmp_path):
  code = f"from jedi_jax.runs import workdir; lock = workdir.locked({str(tmp_path)!r}); lock.__enter__()"
  code += "; print('locked', flush=True)"
  code += "; import time; time.sleep(60)"
  with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "locked\n"
    refused(lambda: workdir.locked(tmp_path).__enter__(), f"process {process.pid} on ")
    process.kill()
  assert (tmp_path / ".lock").read_text()
  with workdir.locked(tmp_path):
    pass


def test_a_file_system_without_locks_causes_a_warning(tmp_path, monkeypatch, caplog):
  def unable(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(workdir.fcntl, "flock", unable)
  with workdir.locked(tmp_path):
    pass
  assert "cannot be locked (No locks available)" in caplog.text


def test_a_lock_that_fails_is_refused(tmp_path, monkeypatch):
  def forbidden(*_):
    raise OSError(errno.EACCES, "Permission denied")

  monkeypatch.setattr(workdir.fcntl, "flock", forbidden)
  refused(lambda: workdir.locked(tmp_path).__enter__(), ".lock cannot be locked (Permission denied)")


def test_a_full_disk_does_not_mask_the_error_of_a_run(tmp_path):
  """A file size limit of 0 bytes simulates the full disk."""
  code = f"""
import resource, signal
from jedi_jax import errors
from jedi_jax.runs import workdir
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
  with workdir.locked({str(tmp_path)!r}):
    raise errors.UserError("the error")
except errors.UserError as error:
  print(error)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert done.stdout == "the error\n", done.stderr


def test_a_failed_write_of_json_leaves_no_file(tmp_path, monkeypatch):
  def full(self, text):
    self.touch()
    raise OSError(errno.ENOSPC, "No space left on device")

  (tmp_path / "result.json").write_text("old")
  monkeypatch.setattr(pathlib.Path, "write_text", full)
  refused(lambda: workdir.write_json(tmp_path / "result.json", {}), "No space left on device")
  monkeypatch.undo()
  assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
  assert (tmp_path / "result.json").read_text() == "old"
