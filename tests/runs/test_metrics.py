"""docs/metrics.md lists exactly the metrics that runs write."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest

import jedi_jax
from jedi_jax import config as config_lib
from jedi_jax.envs.catch import SPEC
from jedi_jax.models.build import build
from jedi_jax.runs import metrics
from jedi_jax.runs.telemetry import summarise
from jedi_jax.training.epoch import make_epoch
from jedi_jax.training.memory import empty_replay
from jedi_jax.training.state import make_init
from jedi_jax.training.updates import make_optimizers

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "metrics.md"
PLACEHOLDERS = {"phase": "|".join(metrics.PHASES), "sign": r"-1|0|\+1", "end": "no|yes", "i": r"\d+"}
PATTERNS = {
  key: re.compile(re.sub("<(.*?)>", lambda match: f"(?:{PLACEHOLDERS[match[1]]})", key))
  for _, _, _, section in metrics.SECTIONS
  for key in section
}


def described(key):
  """Returns the descriptions that match a key."""
  return [name for name, pattern in PATTERNS.items() if pattern.fullmatch(key)]


def learning_metrics(variant, **overrides):
  """Returns the keys of the metrics of an epoch's updates; the epoch is traced, not compiled."""
  config = config_lib.make_config(env="catch", variant=variant, preset="debug", overrides=overrides)
  model = build(config, SPEC)
  optimizers = make_optimizers(config, model.phases)
  epoch = make_epoch(model, optimizers, batch_size=4, age_weights=config.replay.age_weights)
  state = jax.eval_shape(make_init(model, optimizers), jax.random.key(0))
  replay = jax.eval_shape(lambda: empty_replay(config, SPEC))
  counts = dict.fromkeys(optimizers, 2)
  _, sums = jax.eval_shape(epoch, state, replay, {name: np.int32(2) for name in counts})
  return set(summarise(jax.tree.map(lambda x: np.ones(x.shape), sums), counts))


def test_the_page_is_generated():
  assert PAGE.read_text() == metrics.describe() + "\n"


def test_every_metric_is_described_once_and_every_description_is_of_a_metric(finished_run):
  keys = {key for line in (finished_run / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
  keys |= learning_metrics("decoder_gradient", **{"denoiser.target": "change"})
  assert {key: described(key) for key in keys if len(described(key)) != 1} == {}
  assert {name for key in keys for name in described(key)} == set(PATTERNS)


@pytest.mark.parametrize("variant", ["diamond", "mse"])
def test_metrics_of_other_variants_are_described(variant):
  keys = learning_metrics(variant)
  assert {key: described(key) for key in keys if len(described(key)) != 1} == {}
  # The baseline has no encoder that could move.
  assert ("denoiser/encoder_movement" in keys) == (variant != "diamond")
  assert "denoiser/latent_deviation" in keys


def test_the_modules_that_compute_the_metrics_name_them():
  package = pathlib.Path(jedi_jax.__file__).parent
  for _, module, _, section in metrics.SECTIONS:
    source = (package / module).read_text()
    for key in section:
      for word in re.findall("[a-z]+", re.sub("<.*?>", "", key.split("/")[-1])):
        assert word in source, f"{module} has no {key}"


def test_settings_named_on_the_page_exist():
  named = set(re.findall(r"`(\w+\.\w+)`", PAGE.read_text())) - {"metrics.jsonl"}
  assert named
  assert named <= set(dict(config_lib.settings(config_lib.Config)))
