"""Which parameters each variant's losses reach, through the very functions that the updates differentiate."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unoptimised import jit

from jedi_jax import config as config_lib
from jedi_jax import envs
from jedi_jax.errors import UserError
from jedi_jax.models.base import Phase
from jedi_jax.models.build import build, count_parameters
from jedi_jax.ops.images import soft_clamp
from jedi_jax.ops.statistics import latent_statistics
from jedi_jax.types import Segment

TINY = {
  "encoder.channels": (4, 4),
  "encoder.downsample": (True, True),
  "denoiser.conditioning_width": 8,
  "denoiser.conditioning_frames": 2,
  "actor_critic.horizon": 2,
  "encoder.norm": "frame",
}

# Components that have a gradient from the dynamics' phase, and from the reward / end phase.
ROUTES = {
  "jedi": ({"encoder", "denoiser"}, {"encoder", "reward_end"}),
  "diamond": ({"denoiser"}, {"reward_end"}),
  "autoencoder": ({"encoder", "decoder", "denoiser"}, {"reward_end"}),
  "mse": ({"encoder", "denoiser"}, {"encoder", "reward_end"}),
  "no_diffusion_gradient": ({"denoiser"}, {"encoder", "reward_end"}),
  "decoder_gradient": ({"encoder", "decoder", "denoiser"}, {"encoder", "reward_end"}),
}


def make_model(variant: str, **overrides):
  config = config_lib.make_config(env="catch", variant=variant, preset="debug", overrides={**TINY, **overrides})
  return build(config, envs.spec("catch"))


def make(variant: str, **overrides):
  model, rng = make_model(variant, **overrides), np.random.default_rng(1)

  def noisy(leaf):  # Zero-initialised layers would hide a route.
    return jnp.asarray(leaf + 0.1 * rng.standard_normal(leaf.shape), jnp.float32)

  return model, jax.tree.map(noisy, jax.device_get(model.init(jax.random.key(0))))


def segment(length: int) -> Segment:
  rng = np.random.default_rng(0)
  return Segment(
    observations=jnp.asarray(rng.integers(0, 256, (3, length, 24, 24, 3)), jnp.uint8),
    actions=jnp.asarray(rng.integers(0, 3, (3, length)), jnp.int32),
    rewards=jnp.asarray(rng.integers(-1, 2, (3, length)), jnp.float32),
    ends=jnp.asarray(rng.random((3, length)) < 0.2),
    mask=jnp.ones((3, length), bool),
  )


def summed_loss(phase: Phase, params, only: str | None = None):
  keys = jax.random.split(jax.random.key(2), 3)
  terms = phase.losses(params, segment(phase.length), keys, jax.random.key(3), jnp.int32(0)).terms
  return sum(jnp.sum(t.values * t.weights) for name, t in terms.items() if only is None or name.startswith(only))


def gradients(phase: Phase, params, only: str | None = None):
  """Gradients of a phase's loss (of one kind of its terms) with respect to everything, components or not."""
  return jit(jax.grad(lambda params: summed_loss(phase, params, only)))(params)


def is_reached(tree) -> bool:
  return any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("variant", ROUTES)
def test_routes(variant):
  assert ROUTES.keys() == config_lib.VARIANTS.keys()
  model, params = make(variant)
  for phase, expected in zip(model.phases[:2], ROUTES[variant], strict=True):
    assert set(phase.components) == expected
    reached = gradients(phase, params)
    for component in expected:
      assert is_reached(reached[component]), (phase.name, component)
    assert not is_reached(reached["actor_critic"])
  assert model.phases[2].components == ("actor_critic",)


def test_autoencoder_keeps_the_denoising_loss_out_of_the_encoder():
  model, params = make("autoencoder")
  denoising = gradients(model.phases[0], params, only="denoising")
  assert is_reached(denoising["denoiser"])
  assert not is_reached(denoising["encoder"])
  reconstruction = gradients(model.phases[0], params, only="reconstruction")
  assert is_reached(reconstruction["encoder"])
  assert is_reached(reconstruction["decoder"])
  assert not is_reached(reconstruction["denoiser"])


def test_decoder_gradient_sends_both_losses_into_the_encoder():
  model, params = make("decoder_gradient")
  for term in ("denoising", "reconstruction"):
    assert is_reached(gradients(model.phases[0], params, only=term)["encoder"])


def test_moving_average_gives_the_targets_and_follows_the_encoder():
  model, params = make("jedi", **{"encoder.target_decay": 0.75})
  phase = model.phases[0]
  reached = gradients(phase, params)
  assert is_reached(reached["encoder"])
  assert not is_reached(reached["target_encoder"])
  moved = {**params, "target_encoder": jax.tree.map(lambda x: 1.5 * x, params["target_encoder"])}
  loss = jit(lambda params: summed_loss(phase, params))
  assert float(loss(params)) != float(loss(moved))
  after = phase.after(params, {})
  for old, new, online in zip(
    *(jax.tree.leaves(tree) for tree in (params["target_encoder"], after["target_encoder"], params["encoder"])),
    strict=True,
  ):
    np.testing.assert_allclose(new, 0.75 * old + 0.25 * online, rtol=1e-6, atol=1e-6)
  assert after["encoder"] is params["encoder"]


def test_average_denoiser_imagines_and_follows_the_denoiser():
  change = {"denoiser.target": "change", "denoiser.clamp_estimate": False}
  model, params = make("jedi", **{"denoiser.average_decay": 0.75, **change})
  phase, imagination = model.phases[0], model.phases[2]
  assert not is_reached(gradients(phase, params)["average_denoiser"])
  loss = jit(lambda params: summed_loss(imagination, params))
  for name, matters in (("denoiser", False), ("average_denoiser", True)):
    moved = {**params, name: jax.tree.map(lambda x: 1.5 * x, params[name])}
    assert (float(loss(params)) != float(loss(moved))) == matters
  after = phase.after(params, {"change_square": jnp.ones(())})
  expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, params["average_denoiser"], params["denoiser"])
  expected["change_std"] = after["denoiser"]["change_std"]
  chex.assert_trees_all_close(after["average_denoiser"], expected, rtol=1e-6, atol=1e-6)


def test_without_moving_average_there_is_no_copy():
  model, params = make("jedi")
  assert "target_encoder" not in params
  assert "average_denoiser" not in params
  assert model.phases[0].after(params, {}) is params


def test_regression_starts_from_the_last_latent():
  """With a network that gives 0 the estimate is the last latent, so the error is the change of the latent."""
  model = make_model("mse")
  params = model.init(jax.random.key(0))
  bias = params["denoiser"]["conv_out"]["bias"]
  params["denoiser"]["conv_out"]["bias"] = jnp.zeros_like(bias)
  phase = model.phases[0]
  batch = segment(phase.length)
  latents = jit(model.encode)(params, batch.observations, batch.mask)
  keys = jax.random.split(jax.random.key(0), 3)
  terms = jit(phase.losses)(params, batch, keys, jax.random.key(0), jnp.int32(0)).terms
  change = soft_clamp(latents[:, 1], 3.0) - latents[:, 2]
  np.testing.assert_allclose(terms["denoising_0"].values, jnp.mean(jnp.square(change), axis=(1, 2, 3)) / 2, rtol=1e-4)


def test_only_the_autoencoder_is_clipped_apart():
  for variant in ROUTES:
    phases = make_model(variant).phases
    assert phases[0].clipped_apart == (("encoder", "decoder") if variant == "autoencoder" else ())
    assert phases[1].clipped_apart == phases[2].clipped_apart == ()


def test_the_reward_gradient_can_be_kept_out_of_the_encoder():
  model = make_model("jedi", **{"encoder.learns_from": ("prediction",)})
  assert [phase.components for phase in model.phases] == [
    ("encoder", "denoiser"), ("reward_end",), ("actor_critic",)
  ]  # fmt: skip


def test_the_probe_reaches_nothing_but_itself():
  model, params = make("jedi", **{"training.updates.probe": 1})
  (phase,) = (phase for phase in model.phases if phase.name == "probe")
  reached = {name for name, tree in gradients(phase, params).items() if is_reached(tree)}
  assert reached == {"probe"} == set(phase.components)


@pytest.mark.parametrize(("variant", "probe", "shown_by"), [
  ("jedi", 0, None), ("jedi", 1, "probe"), ("mse", 1, "probe"), ("decoder_gradient", 1, "decoder"),
  ("autoencoder", 0, "decoder"), ("diamond", 1, "nothing"),
])  # fmt: skip
def test_what_makes_latents_visible(variant, probe, shown_by):
  model, params = make(variant, **{"training.first_updates.probe": probe} if variant != "diamond" else {})
  assert ("probe" in params) == (shown_by == "probe")
  assert len(model.phases) == 3 + (shown_by == "probe")
  assert (model.decode is None) == (shown_by is None)
  if shown_by is None:
    return
  latents = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, *model.latent_shape)), jnp.float32)
  images = model.decode(params, latents)
  assert (images.shape, images.dtype) == ((2, 3, 24, 24, 3), jnp.uint8)
  if shown_by == "nothing":
    frames = jnp.asarray(np.random.default_rng(1).integers(0, 256, (2, 3, 24, 24, 3)), jnp.uint8)
    np.testing.assert_array_equal(model.decode(params, model.encode(params, frames, jnp.ones((2, 3), bool))), frames)
  else:
    blank = {**params, shown_by: jax.tree.map(jnp.zeros_like, params[shown_by])}
    assert np.all(np.asarray(model.decode(blank, latents)) == 128)  # The middle of [-1, 1], rounded to even.


def test_patches_must_divide_the_frames():
  with pytest.raises(UserError, match="patch=5 does not divide the 24 x 24"):
    make_model("jedi", **{"encoder.patch": 5})
  model = make_model("jedi", **{"encoder.patch": 2, "training.updates.probe": 1})
  assert model.latent_shape == (3, 3, 4)


def test_the_measured_size_of_changes_follows_them():
  model, params = make("jedi", **{"denoiser.target": "change", "denoiser.clamp_estimate": False})
  phase = model.phases[0]
  params["denoiser"]["change_std"] = jnp.zeros(())  # Not yet measured: the first update takes what it finds.
  statistics = latent_statistics(jnp.ones((1, 2, 3, 3, 4)), jnp.ones((1, 2), bool), None)
  before = params
  for square, expected in ((0.04, 0.2), (0.09, 0.99 * 0.2 + 0.01 * 0.3)):
    params = phase.after(params, {**statistics, "change_square": jnp.asarray(square)})
    np.testing.assert_allclose(params["denoiser"]["change_std"], expected, rtol=1e-5)
  assert {name: tree for name, tree in params.items() if name != "denoiser"} == {
    name: tree for name, tree in before.items() if name != "denoiser"
  }
  # No gradient, so no update either; and it is not a trained number.
  assert np.all(np.asarray(gradients(phase, params)["denoiser"]["change_std"]) == 0)
  plain = make_model("jedi")
  shapes = [jax.eval_shape(m.init, jax.random.key(0)) for m in (model, plain)]
  assert count_parameters(shapes[0]) == count_parameters(shapes[1])
  # Latents that do not change are not blown up without bound.
  still = {**statistics, "change_square": jnp.zeros(())}
  params = jit(lambda params: jax.lax.fori_loop(0, 2000, lambda _, params: phase.after(params, still), params))(params)
  assert float(params["denoiser"]["change_std"]) >= 1e-3


def test_noise_reaches_every_second_segment_of_the_reward_end_model():
  running = {"encoder.norm": "running"}
  noisy, params = make("jedi", **running, **{"reward_end.noise": 0.5})
  plain = make_model("jedi", **running)
  keys = jax.random.split(jax.random.key(2), 32)
  drawn = jax.tree.map(lambda x: jnp.repeat(x[:1], 32, axis=0), segment(plain.phases[1].length))
  without, with_noise = (
    jit(model.phases[1].losses)(params, drawn, keys, keys[0], jnp.int32(0)) for model in (plain, noisy)
  )
  differ = np.abs(np.asarray(without.terms["reward"].values - with_noise.terms["reward"].values)).max(axis=1) > 1e-6
  assert 8 <= differ.sum() <= 24
  # The running statistics are of latents without noise.
  chex.assert_trees_all_close(with_noise.metrics["feature_moments"], without.metrics["feature_moments"], rtol=1e-5)


def test_the_change_of_a_step_does_not_count_padding():
  model, params = make("jedi", **{"denoiser.target": "change", "denoiser.clamp_estimate": False})
  phase = model.phases[0]
  drawn = segment(phase.length)
  padded = drawn.replace(mask=drawn.mask.at[0, : model.conditioning_frames].set(False))
  keys = jax.random.split(jax.random.key(2), 3)
  losses = jit(phase.losses)
  weights = [
    losses(params, some, keys, keys[0], jnp.int32(0)).metrics["change_square"].weights for some in (drawn, padded)
  ]
  np.testing.assert_array_equal(weights, [[1, 1, 1], [0, 1, 1]])
