"""Configurations written before a variant was settings: `data/old_configs.json` holds one of each variant.

They also lack the settings of normalised latents and joint updates, and have DIAMOND's noise levels.
"""

import copy
import json
import pathlib

import pytest

from jedi_jax.config import PRESETS, VARIANTS, flatten, from_dict, make_config, to_dict
from jedi_jax.errors import UserError

OLD = json.loads((pathlib.Path(__file__).parents[1] / "data" / "old_configs.json").read_text())

DIAMONDS = {
  "encoder.norm": "none",
  "denoiser.sigma_data": 0.5,
  "denoiser.offset_noise": 0.3,
  "denoiser.sigma_log_mean": -0.4,
  "denoiser.sigma_min": 2e-3,
  "denoiser.sigma_max": 20.0,
  "sampler.sigma_min": 2e-3,
  "sampler.sigma_max": 5.0,
  "sampler.start": "unit",
  "reward_end.noise": 0.0,
  "actor_critic.input_norm": "none",
  "replay.age_groups": "episodes",
  "training.order": "sequential",
}
BEFORE = {**DIAMONDS, "encoder.chunk": 64}


def changed(variant, path, value):
  tree = copy.deepcopy(OLD[variant])
  record, name = path.split(".")
  assert name in tree[record]
  tree[record][name] = value
  return tree


def test_the_files_are_old_and_cover_every_variant():
  assert OLD.keys() == VARIANTS.keys()
  for tree in OLD.values():
    assert not {"kind", "learns_from"} & tree["encoder"].keys()
    assert "kind" not in tree["denoiser"]


@pytest.mark.parametrize("variant", OLD)
def test_a_file_gives_what_the_variant_was_when_it_was_written(variant):
  config = from_dict(OLD[variant])
  assert config == make_config(env="catch", variant=variant, preset="debug", overrides=BEFORE)
  assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
  ("variant", "learns_from"),
  [
    ("jedi", ("prediction",)),
    ("mse", ("prediction",)),
    ("decoder_gradient", ("prediction", "reconstruction")),
    ("autoencoder", ("reconstruction",)),
    ("diamond", ()),
  ],
)
def test_without_the_reward_gradient_the_encoder_does_not_learn_from_rewards(variant, learns_from):
  config = from_dict(changed(variant, "encoder.reward_gradient", False))
  assert config.encoder.learns_from == learns_from
  overrides = {**BEFORE, "encoder.learns_from": learns_from}
  assert config == make_config(env="catch", variant=variant, preset="debug", overrides=overrides)


@pytest.mark.parametrize(
  ("variant", "path", "value"),
  [
    ("jedi", "denoiser.follow_scale", True),
    ("jedi", "encoder.reward_gradient", 3),
    ("no_diffusion_gradient", "encoder.reward_gradient", False),
  ],
)
def test_what_no_longer_exists_is_refused_in_one_line(variant, path, value):
  with pytest.raises(UserError) as caught:
    from_dict(changed(variant, path, value))
  assert "\n" not in str(caught.value)
  assert path in str(caught.value) or "encoder.learns_from is empty" in str(caught.value)


@pytest.mark.parametrize("variant", [None, 3, ["jedi"], "nonsense"])
def test_a_file_with_a_wrong_variant_is_refused(variant):
  with pytest.raises(UserError, match="variant"):
    from_dict({**OLD["jedi"], "variant": variant})


@pytest.mark.parametrize("preset", PRESETS)
def test_the_pixel_baseline_keeps_diamonds_constants_in_every_preset(preset):
  config = make_config(variant="diamond", preset=preset)
  found = flatten(to_dict(config))
  assert {path: found[path] for path in DIAMONDS} == DIAMONDS
  assert (config.sampler.num_steps, config.sampler.order, config.sampler.churn) == (3, 1, 0.0)
  assert config.denoiser.target == "latent"
