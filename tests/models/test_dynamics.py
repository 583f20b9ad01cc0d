import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedi_jax.models import codecs
from jedi_jax.models.dynamics import DenoisingNoise, NoiseLevels, SampleNoise, Schedule, switch
from jedi_jax.nn.denoiser import InnerNetwork
from jedi_jax.ops import sampler

B, L, N = 2, 2, 2
SHAPE = (4, 4, 2)
SCALE, SIGMA_DATA, OFFSET_NOISE = 3.0, 0.5, 0.3


def clamp(z):
  return SCALE * jnp.tanh(z / SCALE)


def quantise(z):
  return 0.8 * z  # Unlike rounding it would let a gradient through.


def make_codec(**changes):
  codec = codecs.Codec(SHAPE, init=lambda key: {}, encode=lambda params, x: x, clamp=clamp, quantise=quantise)
  return codec._replace(**changes)


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


class Batch(NamedTuple):
  """The arguments of the loss, without the parameters."""

  inputs: jax.Array
  clean: jax.Array
  actions: jax.Array
  mask: jax.Array
  noise: DenoisingNoise


def make_batch(use_estimate, mask=((True, True), (True, True))):
  noise = DenoisingNoise(
    sigma=jnp.asarray([[0.1, 2.0], [0.7, 0.3]]),
    noise=normal(B, N, *SHAPE, seed=1),
    offset=normal(B, N, 1, 1, SHAPE[2], seed=2),
    use_estimate=jnp.asarray(use_estimate),
  )
  actions = jnp.asarray([[0, 1, 2], [2, 1, 0]])
  return Batch(normal(B, L + N - 1, *SHAPE), normal(B, N, *SHAPE, seed=3), actions, jnp.asarray(mask), noise)


class Case(NamedTuple):
  """Dynamics compiled once.

  Attributes:
    params: parameters of which none is zero.
    evaluate: (parameters, `Batch`, coefficients of the terms [n]) -> (`Losses`, gradient of the weighted sum with
      respect to (parameters, inputs, clean)).
    denoise: the denoiser written out: (noisy, sigma [B], past, actions) -> (clamped estimate, c_out).
  """

  params: dict
  evaluate: object
  denoise: object


@pytest.fixture(scope="module")
def case(jit, make_dynamics, random_params):
  dynamics = make_dynamics(make_codec())
  params = random_params(dynamics.init)
  network = InnerNetwork(3, (8,), (0,), (False,), conditioning_width=8)

  def evaluate(params, batch, coefficients):
    def total(params, inputs, clean):
      losses = dynamics.losses(params, *batch._replace(inputs=inputs, clean=clean))
      terms = [losses.terms[f"denoising_{i}"] for i in range(N)]
      return sum(c * jnp.sum(term.values * term.weights) for c, term in zip(coefficients, terms, strict=True)), losses

    (_, losses), gradient = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(params, batch.inputs, batch.clean)
    return losses, gradient

  def denoise(noisy, sigma, past, actions):
    deviation = jnp.sqrt(sigma**2 + OFFSET_NOISE**2)
    total = deviation**2 + SIGMA_DATA**2
    c_noise = jnp.log(deviation) / 4
    deviation, total = deviation[:, None, None, None], total[:, None, None, None]
    c_out = deviation * SIGMA_DATA / jnp.sqrt(total)
    output = network.apply({"params": params}, noisy / jnp.sqrt(total), c_noise, past / SIGMA_DATA, actions)
    return clamp(SIGMA_DATA**2 / total * noisy + c_out * output), c_out

  return Case(params, jit(evaluate), jit(denoise))


def by_hand(case, batch, target, past):
  """Loss [B] of one target conditioned on `past`, and the estimate."""
  noise, clean = batch.noise, batch.clean[:, target]
  sigma = noise.sigma[:, target]
  noisy = clean + sigma[:, None, None, None] * noise.noise[:, target] + OFFSET_NOISE * noise.offset[:, target]
  estimate, c_out = case.denoise(noisy, sigma, past, batch.actions[:, target : target + L])
  return jnp.mean(jnp.square((estimate - clean) / c_out), axis=(1, 2, 3)), estimate


# ---- Switching ----


def test_random_switching_is_a_fair_coin():
  keys = jax.random.split(jax.random.key(0), 2_000)
  coins = jax.vmap(lambda key: switch("random", key, jnp.int32(0)))(keys)
  # The standard error is 0.011.
  assert np.mean(coins) == pytest.approx(0.5, abs=0.045)
  np.testing.assert_array_equal(coins, jax.vmap(lambda key: switch("random", key, jnp.int32(1)))(keys))


def test_the_other_modes_of_switching():
  key = jax.random.key(0)
  modes = {
    mode: [bool(switch(mode, key, jnp.int32(count))) for count in range(4)]
    for mode in ("alternate", "always_encoder", "always_denoiser")
  }
  assert modes == {
    "alternate": [False, True, False, True],
    "always_encoder": [False] * 4,
    "always_denoiser": [True] * 4,
  }
  with pytest.raises(ValueError, match="sometimes"):
    switch("sometimes", key, jnp.int32(0))


@pytest.mark.parametrize("use_estimate", [False, True])
def test_the_second_target_is_conditioned_on_the_estimate_or_on_the_latent(case, use_estimate):
  batch = make_batch(use_estimate)
  losses, _ = case.evaluate(case.params, batch, jnp.ones(N))
  first, estimate = by_hand(case, batch, 0, batch.inputs[:, :L])
  newest = quantise(estimate) if use_estimate else batch.inputs[:, L]
  second, _ = by_hand(case, batch, 1, jnp.stack([batch.inputs[:, 1], newest], axis=1))
  # The loss is the mean over the targets; the terms are added.
  np.testing.assert_allclose(losses.terms["denoising_0"].values, first / 2, rtol=1e-4)
  np.testing.assert_allclose(losses.terms["denoising_1"].values, second / 2, rtol=1e-4)
  assert float(losses.metrics["used_estimates"]) == use_estimate
  assert set(losses.terms) == {"denoising_0", "denoising_1"}


def test_the_two_modes_differ_in_the_second_target_only(case):
  values = [case.evaluate(case.params, make_batch(flag), jnp.ones(N))[0].terms for flag in (False, True)]
  np.testing.assert_array_equal(values[0]["denoising_0"].values, values[1]["denoising_0"].values)
  assert (np.abs(values[0]["denoising_1"].values - values[1]["denoising_1"].values) > 1e-4).all()


# ---- Gradients ----


@pytest.mark.parametrize("use_estimate", [False, True])
def test_no_gradient_reaches_the_targets(case, use_estimate):
  _, (_, inputs, clean) = case.evaluate(case.params, make_batch(use_estimate), jnp.ones(N))
  np.testing.assert_array_equal(clean, 0)
  assert (np.abs(inputs[:, :L]).max(axis=(0, 2, 3, 4)) > 1e-5).all()


def test_the_frame_that_an_estimate_replaces_gets_a_gradient_only_without_it(case):
  _, (_, encoder, _) = case.evaluate(case.params, make_batch(use_estimate=False), jnp.ones(N))
  _, (_, denoiser, _) = case.evaluate(case.params, make_batch(use_estimate=True), jnp.ones(N))
  assert np.abs(encoder[:, L]).max() > 1e-5
  np.testing.assert_array_equal(denoiser[:, L], 0)


def test_the_estimate_is_a_constant_to_the_second_target(case):
  only_second = jnp.asarray([0.0, 1.0])
  batch = make_batch(use_estimate=True)
  losses, (params, inputs, _) = case.evaluate(case.params, batch, only_second)
  # The estimate depends on the oldest frame; the second target's own past does not contain it.
  np.testing.assert_array_equal(inputs[:, 0], 0)
  # The same with the estimate as a given frame.
  _, estimate = by_hand(case, batch, 0, batch.inputs[:, :L])
  given = make_batch(use_estimate=False)
  given = given._replace(inputs=given.inputs.at[:, L].set(quantise(estimate)))
  expected, (expected_params, _, _) = case.evaluate(case.params, given, only_second)
  np.testing.assert_allclose(losses.terms["denoising_1"].values, expected.terms["denoising_1"].values, rtol=1e-4)
  for actual, value in zip(jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True):
    np.testing.assert_allclose(actual, value, rtol=1e-2, atol=1e-4 * (1 + np.abs(value).max()))


# ---- Mask ----


def test_padded_targets_contribute_nothing(case):
  batch = make_batch(use_estimate=False, mask=((False, True), (True, False)))
  losses, gradient = case.evaluate(case.params, batch, jnp.ones(N))
  np.testing.assert_array_equal(losses.terms["denoising_0"].weights, [0, 1])
  np.testing.assert_array_equal(losses.terms["denoising_1"].weights, [1, 0])
  other = batch._replace(clean=batch.clean.at[0, 0].set(7.0).at[1, 1].set(-7.0))
  changed, changed_gradient = case.evaluate(case.params, other, jnp.ones(N))
  for name, term in losses.terms.items():
    assert (np.asarray(term.values) != np.asarray(changed.terms[name].values)).any()
    np.testing.assert_array_equal(term.values * term.weights, changed.terms[name].values * term.weights)
  for actual, expected in zip(jax.tree.leaves(changed_gradient), jax.tree.leaves(gradient), strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


# ---- Clamp ----


@pytest.mark.parametrize("clamped", [True, False])
def test_a_perfect_estimate_has_no_loss_where_estimates_are_clamped(jit, make_dynamics, clamped):
  codec = make_codec(clamp=clamp if clamped else lambda z: z, quantise=lambda z: z)
  dynamics = make_dynamics(codec, targets=1)
  params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(dynamics.init, jax.random.key(0)))
  # With F = 0 the estimate is clamp(c_skip noisy). The noise is chosen so that c_skip noisy = u, and z' = clamp(u).
  u = 2 * normal(B, *SHAPE)
  clean, sigma = clamp(u), jnp.asarray([0.5, 1.5])
  variance = (sigma**2 + OFFSET_NOISE**2)[:, None, None, None]
  c_skip = SIGMA_DATA**2 / (variance + SIGMA_DATA**2)
  drawn = (u / c_skip - clean) / sigma[:, None, None, None]
  noise = DenoisingNoise(sigma[:, None], drawn[:, None], jnp.zeros((B, 1, 1, 1, SHAPE[2])), jnp.asarray(False))
  losses = jit(dynamics.losses)(
    params, normal(B, L, *SHAPE), clean[:, None], jnp.zeros((B, L), jnp.int32), jnp.ones((B, 1), bool), noise
  )
  # Without the clamp the error is u - z'; c_out^2 = variance c_skip.
  expected = 0 if clamped else jnp.mean(jnp.square(u - clean) / (variance * c_skip), axis=(1, 2, 3))
  np.testing.assert_allclose(losses.terms["denoising_0"].values, expected, rtol=1e-3, atol=1e-9)


# ---- Random numbers ----


def test_every_element_of_a_batch_has_noise_of_its_own_key(jit, make_dynamics):
  dynamics = make_dynamics(make_codec(), switching="always_denoiser", levels=NoiseLevels(sigma_min=0.5, sigma_max=0.8))
  keys = jax.random.split(jax.random.key(0), 5)
  draw = jit(dynamics.training_noise)
  noise = draw(keys, jax.random.key(1), jnp.int32(0))
  assert noise.sigma.shape == (5, N)
  assert noise.noise.shape == (5, N, *SHAPE)
  assert noise.offset.shape == (5, N, 1, 1, SHAPE[2])
  assert bool(noise.use_estimate)
  assert (noise.sigma >= 0.5).all()
  assert (noise.sigma <= 0.8).all()
  assert len(np.unique(noise.noise)) == noise.noise.size
  some = draw(keys[3:4], jax.random.key(2), jnp.int32(9))
  for actual, expected in zip(some[:3], noise[:3], strict=True):
    np.testing.assert_array_equal(actual[0], expected[3])


@pytest.mark.parametrize("churn", [False, True])
def test_noise_of_samples_has_time_first_and_churn_where_it_is_needed(jit, make_dynamics, churn):
  dynamics = make_dynamics(make_codec(), schedule=Schedule((5.0, 0.5, 0.0), gammas=(0.0, 0.3 if churn else 0.0)))
  keys = jax.random.split(jax.random.key(0), 5)
  draw = jit(dynamics.sample_noise, static_argnums=1)
  noise = draw(keys, 3)
  assert noise.start.shape == (3, 5, *SHAPE)
  assert noise.churn is None if not churn else noise.churn.shape == (3, 5, 2, *SHAPE)
  np.testing.assert_array_equal(draw(keys[1:2], 3).start[:, 0], noise.start[:, 1])


# ---- Sampling ----


@pytest.mark.parametrize("target", ["latent", "change"])
def test_a_sampler_of_ones_own_gives_the_same_sample(jit, make_dynamics, random_params, target):
  dynamics = make_dynamics(make_codec(), target=target)
  params = random_params(dynamics.init)
  past, actions, start = normal(B, L, *SHAPE), jnp.asarray([[0, 1], [2, 0]]), normal(B, *SHAPE, seed=1)

  def euler(params):
    x, sigmas = start, (5.0, 0.5, 0.0)
    for sigma, following in itertools.pairwise(sigmas):
      estimate = dynamics.denoise(params, x, jnp.full((B,), sigma), past, actions)
      x = x + (x - estimate) / sigma * (following - sigma)
    return dynamics.denormalise(params, x, past[:, -1])

  expected = jit(dynamics.sample)(params, past, actions, SampleNoise(start, None))
  np.testing.assert_allclose(jit(euler)(params), expected, rtol=1e-4, atol=1e-5)


def test_sampling_integrates_quantised_estimates_with_scaled_churn(jit, case, make_dynamics):
  sigmas, gammas = (2.0, 0.5, 0.0), (0.25, 0.0)
  dynamics = make_dynamics(make_codec(), schedule=Schedule(sigmas, 2, gammas, 0.7))
  past, actions = normal(B, L, *SHAPE), jnp.asarray([[0, 1], [2, 0]])
  noise = SampleNoise(normal(B, *SHAPE, seed=1), normal(B, 2, *SHAPE, seed=2))
  actual = jit(dynamics.sample)(case.params, past, actions, noise)
  expected = sampler.sample(
    lambda x, sigma: quantise(case.denoise(x, sigma, past, actions)[0]),
    noise.start,
    sigmas,
    order=2,
    gammas=gammas,
    churn_noise=0.7 * jnp.moveaxis(noise.churn, 1, 0),
  )
  assert actual.shape == (B, *SHAPE)
  np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


def test_sampling_may_start_from_noise_of_the_first_level(jit, case, make_dynamics):
  from_unit, from_first = (
    make_dynamics(make_codec(), schedule=Schedule((4.0, 0.0), start=s)) for s in ("unit", "sigma_max")
  )
  past, actions, start = normal(B, L, *SHAPE), jnp.asarray([[0, 1], [2, 0]]), normal(B, *SHAPE, seed=1)
  expected = jit(from_unit.sample)(case.params, past, actions, SampleNoise(4.0 * start, None))
  actual = jit(from_first.sample)(case.params, past, actions, SampleNoise(start, None))
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_sample_of_one_step_is_the_estimate(jit, case, make_dynamics):
  dynamics = make_dynamics(make_codec(), schedule=Schedule((1.5, 0.0)))
  past, actions, start = normal(B, L, *SHAPE), jnp.asarray([[0, 1], [2, 0]]), normal(B, *SHAPE, seed=1)
  actual = jit(dynamics.sample)(case.params, past, actions, SampleNoise(start, None))
  estimate, _ = case.denoise(start, jnp.full((B,), 1.5), past, actions)
  np.testing.assert_allclose(actual, quantise(estimate), rtol=1e-3, atol=1e-4)
  assert np.max(np.abs(actual)) <= SCALE


def test_wrong_shapes_are_refused(case):
  batch = make_batch(use_estimate=True)
  for wrong in (
    batch._replace(inputs=batch.inputs[:, 1:]),
    batch._replace(clean=batch.clean[:, 1:]),
    batch._replace(actions=batch.actions[:, 1:]),
    batch._replace(mask=batch.mask[:1]),
  ):
    with pytest.raises(AssertionError):
      case.evaluate(case.params, wrong, jnp.ones(N))


def test_a_change_is_diffused_from_the_last_latent_in_measured_units(jit, make_dynamics, random_params):
  dynamics = make_dynamics(make_codec(), target="change")
  params = {**random_params(dynamics.init), "change_std": jnp.asarray(0.05)}
  batch = make_batch(True)

  def first_term(params, inputs, clean):
    return dynamics.losses(params, *batch._replace(inputs=inputs, clean=clean))

  losses = jit(first_term)(params, batch.inputs, batch.clean)
  unit = 0.05 / SIGMA_DATA
  network = InnerNetwork(3, (8,), (0,), (False,), conditioning_width=8)
  inner = {name: tree for name, tree in params.items() if name != "change_std"}

  def by_hand_change(i, past):
    noise, sigma, last = batch.noise, batch.noise.sigma[:, i], past[:, -1]
    change = (batch.clean[:, i] - last) / unit
    noisy = change + sigma[:, None, None, None] * noise.noise[:, i] + OFFSET_NOISE * noise.offset[:, i]
    deviation = jnp.sqrt(sigma**2 + OFFSET_NOISE**2)
    total = deviation**2 + SIGMA_DATA**2
    c_noise = jnp.log(deviation) / 4
    deviation, total = deviation[:, None, None, None], total[:, None, None, None]
    c_out = deviation * SIGMA_DATA / jnp.sqrt(total)
    output = network.apply(
      {"params": inner}, noisy / jnp.sqrt(total), c_noise, past / SIGMA_DATA, batch.actions[:, i : i + L]
    )
    latent = clamp(last + unit * (SIGMA_DATA**2 / total * noisy + c_out * output))
    return jnp.mean(jnp.square((latent - batch.clean[:, i]) / unit / c_out), axis=(1, 2, 3)), latent

  first, estimate = by_hand_change(0, batch.inputs[:, :L])
  second, _ = by_hand_change(1, jnp.stack([batch.inputs[:, 1], quantise(estimate)], axis=1))
  np.testing.assert_allclose(losses.terms["denoising_0"].values, first / N, rtol=1e-4)
  np.testing.assert_allclose(losses.terms["denoising_1"].values, second / N, rtol=1e-4)
  square = losses.metrics["change_square"]
  np.testing.assert_allclose(
    square.values, np.mean((batch.clean[:, 0] - batch.inputs[:, L - 1]) ** 2, axis=(1, 2, 3)), rtol=1e-5
  )


def test_a_network_that_gives_nothing_copies_where_changes_are_diffused(jit, make_dynamics):
  dynamics = make_dynamics(make_codec(clamp=lambda z: z, quantise=lambda z: z), target="change")
  params = jax.tree.map(jnp.zeros_like, jax.jit(dynamics.init)(jax.random.key(0)))
  params = {**params, "change_std": jnp.asarray(1e-3)}
  past, actions = normal(B, L, *SHAPE), jnp.zeros((B, L), jnp.int32)
  sampled = jit(dynamics.sample)(params, past, actions, SampleNoise(normal(B, *SHAPE, seed=5), None))
  np.testing.assert_allclose(sampled, past[:, -1], atol=0.01)
