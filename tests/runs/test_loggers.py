"""The loggers of a run. W&B is a stand-in with the calls of `wandb` that are used, and the package itself offline."""

import json
import sys

import numpy as np
import pytest
from refusals import refused

from jedi_jax.config import make_config
from jedi_jax.envs.catch import SPEC
from jedi_jax.runs import loggers, workdir
from jedi_jax.runs.telemetry import MetricsWriter

CONFIG = make_config(env="catch", preset="debug", seed=3)
IMAGE = np.full((2, 3, 3), 255, np.uint8)


class StandIn:
  """W&B as seen by a program: runs by identifier, of which the server knows the steps."""

  class Settings:
    def __init__(self, **values):
      self.values = values

  class Image:
    def __init__(self, image):
      self.image = image

  class Run:
    def __init__(self, options):
      self.options, self.rows, self.step, self.finished = options, {}, 0, 0

    def log(self, values, *, step, commit):
      assert step >= self.step, "W&B warns of repeated steps and drops them"
      self.rows.setdefault(step, {}).update(values)
      self.step = step + commit

    def finish(self):
      self.finished += 1

  def __init__(self):
    self.runs = {}

  def init(self, **options):
    assert (options["resume"], options["reinit"]) == ("allow", "create_new")
    return self.runs.setdefault(options["id"], self.Run(options))


@pytest.fixture
def wandb(monkeypatch):
  monkeypatch.delenv("WANDB_PROJECT", raising=False)
  monkeypatch.setitem(sys.modules, "wandb", StandIn())
  return sys.modules["wandb"]


def prepare(tmp_path, **options):
  return workdir.prepare(tmp_path, CONFIG, SPEC, **options)


def test_wandb_has_numbers_and_images(tmp_path, wandb):
  run = prepare(tmp_path)
  writer = MetricsWriter(run.metrics, loggers.make(["wandb"], run, last_epoch=0), last_epoch=0)
  writer.write_image(1, "dreams", IMAGE)
  writer.write(1, {"loss": 1.5, "name": "text"})
  writer.write(2, {"loss": float("nan")})
  writer.close()
  [(name, own)] = wandb.runs.items()
  assert own.rows[1]["loss"] == 1.5
  assert own.rows[1]["dreams"].image is IMAGE
  assert set(own.rows[1]) == {"loss", "dreams"}
  assert np.isnan(own.rows[2]["loss"])
  assert own.finished == 1
  assert own.options["project"] == "jedi_jax"
  assert own.options["name"] == "catch, jedi, seed 3"
  assert own.options["config"]["seed"] == 3
  assert own.options["dir"] == str(run.path)
  assert json.loads((tmp_path / "wandb.json").read_text()) == {"id": name}
  assert not run.tensorboard.exists()


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, wandb):
  run = prepare(tmp_path)
  for last, epochs in ((0, (1, 2, 3)), (2, (3, 4))):
    writer = MetricsWriter(run.metrics, loggers.make(["wandb"], run, last_epoch=last), last_epoch=last)
    for epoch in epochs:
      writer.write_image(epoch, "dreams", IMAGE)
      writer.write(epoch, {"loss": float(epoch), "start": last})
    writer.close()
  [own] = wandb.runs.values()
  assert {epoch: row["start"] for epoch, row in own.rows.items()} == {1: 0, 2: 0, 3: 0, 4: 2}
  run = prepare(tmp_path, overwrite=True)  # Starts another run.
  loggers.make(["wandb"], run, last_epoch=0)
  assert len(wandb.runs) == 2


def test_packed_runs_have_wandb_runs_of_their_own(tmp_path, wandb, monkeypatch):
  monkeypatch.setenv("WANDB_PROJECT", "mine")
  for name in ("a", "b"):
    loggers.make(["wandb"], prepare(tmp_path / name), last_epoch=0)
  assert len(wandb.runs) == 2
  assert {own.options["project"] for own in wandb.runs.values()} == {"mine"}


def test_wandb_that_cannot_start_is_one_line(tmp_path, wandb, monkeypatch):
  def init(**_):
    raise RuntimeError("api_key not configured (no-tty).\nCall wandb.login")

  monkeypatch.setattr(wandb, "init", init, raising=False)
  refused(
    lambda: loggers.make(["wandb"], prepare(tmp_path), last_epoch=0), "api_key not configured", "WANDB_MODE=offline"
  )


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"id": 3}', '{"id": "a/b"}'])
def test_a_broken_identifier_is_one_line(tmp_path, wandb, text):
  run = prepare(tmp_path)
  (tmp_path / "wandb.json").write_text(text)
  refused(lambda: loggers.make(["wandb"], run, last_epoch=0), "wandb.json", "remove it")


def test_an_unknown_logger_and_a_missing_package(monkeypatch):
  refused(lambda: loggers.check(["tensorboard", "wandbb"]), "unknown logger 'wandbb'", "nearest: wandb")
  monkeypatch.setitem(sys.modules, "wandb", None)
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  refused(lambda: loggers.check(["wandb"]), "pip install wandb")
  refused(lambda: loggers.check(["tensorboard"]), "pip install tensorboardX")
  loggers.check([])  # None needs a package.


def test_the_package_wandb_offline(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  run = prepare(tmp_path)
  for last in (0, 1):
    own = loggers.make(["wandb", "tensorboard"], run, last_epoch=last)
    writer = MetricsWriter(run.metrics, own, last_epoch=last)
    writer.write_image(last + 1, "dreams/strip", IMAGE)
    writer.write(last + 1, {"denoiser/loss": 1.5 + last})
    writer.close()
  identifier = json.loads((tmp_path / "wandb.json").read_text())["id"]
  files = list(tmp_path.glob(f"wandb/offline-run-*/run-{identifier}.wandb"))
  assert files
  assert b"denoiser/loss" in b"".join(path.read_bytes() for path in files)
  assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/dreams/*.png"))
  assert list(run.tensorboard.glob("events.*"))
