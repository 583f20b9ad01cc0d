"""What is refused before a run writes anything."""

import pytest

import jedi_jax
from jedi_jax.config import make_config, override
from jedi_jax.errors import UserError
from jedi_jax.training.parallel import Devices


def test_sizes_that_do_not_fit_are_refused_before_anything_is_overwritten(tmp_path, snapshot, tiny, quiet):
  directory = tmp_path / "run"
  directory.mkdir()
  (directory / "metrics.jsonl").write_text("precious\n")
  # Catch is 24 x 24: five halvings leave nothing.
  config = make_config(
    env="catch",
    preset="debug",
    overrides={**tiny.networks, "encoder.channels": (4,) * 5, "encoder.downsample": (True,) * 5},
  )
  before = snapshot(directory)
  with pytest.raises(UserError):
    jedi_jax.train(config, directory, overwrite=True, devices=Devices.take(1), console=quiet)
  assert snapshot(directory) == before


def test_kernels_that_do_not_run_are_refused_before_anything_is_overwritten(tmp_path, snapshot, tiny, quiet):
  directory = tmp_path / "run"
  directory.mkdir()
  (directory / "metrics.jsonl").write_text("precious\n")
  before = snapshot(directory)
  config = override(tiny.config, {"precision.kernels": "pallas"})
  with pytest.raises(UserError, match=r"precision\.kernels=pallas needs"):
    jedi_jax.train(config, directory, overwrite=True, devices=Devices.take(1), console=quiet)
  assert snapshot(directory) == before


def test_an_actor_critic_that_pools_its_latent_away_is_refused(tmp_path, quiet):
  changes = {"actor_critic.channels": (8,) * 3, "actor_critic.downsample": (True,) * 3}  # Latents are 3 x 3.
  config = make_config(env="catch", preset="debug", overrides=changes)
  with pytest.raises(UserError, match=r"actor_critic\.downsample"):
    jedi_jax.train(config, tmp_path / "run", devices=Devices.take(1), console=quiet)
