import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedi_jax.ops import edm

SIGMAS = jnp.asarray([0.002, 0.1, 0.5, 3.0, 20.0], jnp.float32)


@pytest.mark.parametrize("offset_noise", [0.0, 0.3])
@pytest.mark.parametrize("sigma_data", [0.5, 1.7])
def test_the_coefficients_satisfy_the_conditions_that_define_them(sigma_data, offset_noise):
  c = edm.precondition(SIGMAS, sigma_data=sigma_data, offset_noise=offset_noise)
  variance = np.square(np.asarray(SIGMAS, np.float64)) + offset_noise**2
  c_in, c_out, c_skip, c_noise = (np.asarray(x, np.float64) for x in c)
  # The network's input, c_in (x + n), has unit variance.
  np.testing.assert_allclose(c_in**2 * (variance + sigma_data**2), 1, rtol=1e-5)
  # So has its target (x - c_skip (x + n)) / c_out = ((1 - c_skip) x - c_skip n) / c_out.
  np.testing.assert_allclose(((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * variance) / c_out**2, 1, rtol=1e-4)
  # c_skip makes c_out least: the derivative of the numerator above with respect to c_skip vanishes.
  derivative = -2 * (1 - c_skip) * sigma_data**2 + 2 * c_skip * variance
  np.testing.assert_allclose(derivative, 0, atol=1e-6)
  # The network receives a quarter of the logarithm of the standard deviation of all noise.
  np.testing.assert_allclose(c_noise, np.log(np.sqrt(variance)) / 4, rtol=1e-5)


def test_the_coefficients_are_those_of_edm():
  # sigma = 3, sigma_data = 4: total 25.
  c = edm.precondition(jnp.asarray([3.0]), sigma_data=4.0, offset_noise=0.0)
  np.testing.assert_allclose(np.concatenate(c), [1 / 5, 3 * 4 / 5, 16 / 25, np.log(3) / 4], rtol=1e-6)


def test_without_noise_the_denoiser_is_the_identity():
  c = edm.precondition(jnp.asarray([1e-6]), sigma_data=0.5, offset_noise=0.0)
  x, output = 0.7, 100.0
  np.testing.assert_allclose(c.c_skip * x + c.c_out * output, x, atol=2e-4)


def test_offset_noise_adds_in_quadrature():
  # 0.3^2 + 0.4^2 = 0.5^2.
  with_offset = edm.precondition(jnp.asarray([0.4]), sigma_data=0.5, offset_noise=0.3)
  without = edm.precondition(jnp.asarray([0.5]), sigma_data=0.5, offset_noise=0.0)
  np.testing.assert_allclose(np.concatenate(with_offset), np.concatenate(without), rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.05, 1.0, 10.0])
def test_drawn_inputs_and_targets_have_unit_variance(sigma):
  sigma_data, offset_noise, batch = 0.5, 0.3, 2_000
  keys = jax.random.split(jax.random.key(0), 3)
  x = sigma_data * jax.random.normal(keys[0], (batch, 4, 4, 2))
  noise = jax.random.normal(keys[1], x.shape)
  offset = jax.random.normal(keys[2], (batch, 1, 1, 2))
  sigmas = jnp.full((batch,), sigma)
  noisy = edm.corrupt(x, sigmas, noise, offset, offset_noise=offset_noise)
  c = edm.precondition(sigmas[:, None, None, None], sigma_data=sigma_data, offset_noise=offset_noise)
  # 64,000 numbers, of which the offset's 4,000 are independent: a standard error of the variance under 0.025.
  assert np.var(c.c_in * noisy) == pytest.approx(1, abs=0.1)
  assert np.var((x - c.c_skip * noisy) / c.c_out) == pytest.approx(1, abs=0.1)


def test_training_noise_levels_are_clipped_lognormal():
  normal = jnp.asarray([[0.0, 1.0], [-10.0, 10.0]])
  sigma = edm.training_sigma(normal, log_mean=-0.4, log_std=1.2, sigma_min=2e-3, sigma_max=20.0)
  # exp(-0.4), exp(-0.4 + 1.2); exp(-12.4) and exp(11.6) are beyond the bounds.
  np.testing.assert_allclose(sigma, [[np.exp(-0.4), np.exp(0.8)], [2e-3, 20.0]], rtol=1e-6)


def test_corruption_adds_one_offset_to_all_positions_of_a_channel():
  x = jnp.arange(8.0).reshape(2, 1, 2, 2)
  noise = jnp.ones_like(x).at[1].set(-1.0)
  offset = jnp.asarray([[10.0, 20.0], [30.0, 40.0]]).reshape(2, 1, 1, 2)
  noisy = edm.corrupt(x, jnp.asarray([0.5, 2.0]), noise, offset, offset_noise=0.1)
  # Of the first: x + 0.1 (10, 20) + 0.5; of the second: x + 0.1 (30, 40) - 2.
  expected = [[[[0 + 1.5, 1 + 2.5], [2 + 1.5, 3 + 2.5]]], [[[4 + 1.0, 5 + 2.0], [6 + 1.0, 7 + 2.0]]]]
  np.testing.assert_allclose(noisy, expected, rtol=1e-6)


def test_corruption_refuses_noise_of_another_shape():
  x, sigma = jnp.zeros((2, 3, 3, 4)), jnp.ones((2,))
  with pytest.raises(AssertionError):
    edm.corrupt(x, sigma, x[:1], jnp.zeros((2, 1, 1, 4)), offset_noise=0.1)
  with pytest.raises(AssertionError):
    edm.corrupt(x, sigma, x, x, offset_noise=0.1)
