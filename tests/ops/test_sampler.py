import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jedi_jax.ops import sampler

START = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 3, 1)), jnp.float32)


def schedule(num_steps, **changes):
  return sampler.karras_sigmas(num_steps, **{"sigma_min": 0.002, "sigma_max": 5.0, "rho": 7.0, **changes})


def constant(value):
  """The best denoiser where all data are one point."""
  return lambda x, sigma: jnp.full_like(x, value)


def gaussian(mean, std):
  """The best denoiser of data N(mean, std^2): (std^2 x + sigma^2 mean) / (std^2 + sigma^2)."""

  def denoise(x, sigma):
    variance = jnp.square(sigma)[:, None, None, None]
    return (std**2 * x + variance * mean) / (std**2 + variance)

  return denoise


def flow_to_zero(start, mean, std, sigma):
  """Solves dx/dsigma = (x - D) / sigma = sigma (x - mean) / (std^2 + sigma^2) down to 0 for `gaussian`.

  x(sigma) - mean is proportional to sqrt(std^2 + sigma^2).
  """
  return mean + (np.asarray(start, np.float64) - mean) * std / np.sqrt(std**2 + sigma**2)


class Recorder:
  """A denoiser that records the levels it receives."""

  def __init__(self, denoise):
    self.denoise, self.levels = denoise, []

  def __call__(self, x, sigma):
    assert sigma.shape == x.shape[:1]
    assert len(set(np.asarray(sigma).tolist())) == 1
    self.levels.append(float(sigma[0]))
    return self.denoise(x, sigma)


def test_the_schedule_runs_from_the_largest_level_to_the_least_and_to_zero():
  sigmas = schedule(10)
  assert len(sigmas) == 11
  assert sigmas[0] == pytest.approx(5.0)
  assert sigmas[-2] == pytest.approx(0.002)
  assert sigmas[-1] == 0.0
  assert all(a > b for a, b in itertools.pairwise(sigmas))


def test_the_schedule_of_three_steps_is_known():
  # The middle level is the mean of the ends after taking the seventh root.
  middle = ((5 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
  assert schedule(3) == pytest.approx((5.0, middle, 0.002, 0.0))


def test_the_schedule_is_linear_for_rho_one():
  assert schedule(5, sigma_min=1.0, sigma_max=5.0, rho=1.0) == pytest.approx((5, 4, 3, 2, 1, 0))


def test_one_step_starts_at_the_largest_level():
  assert schedule(1) == pytest.approx((5.0, 0.0))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
def test_a_point_mass_is_reached_exactly(order, num_steps):
  sample = sampler.sample(constant(0.625), START, schedule(num_steps), order=order)
  assert sample.shape == START.shape
  np.testing.assert_allclose(sample, 0.625, atol=1e-6)


@pytest.mark.parametrize(("order", "levels"), [(1, (4.0, 2.0, 1.0)), (2, (4.0, 2.0, 2.0, 1.0, 1.0))])
def test_the_denoiser_is_asked_once_a_step_by_euler_and_twice_but_the_last_by_heun(order, levels):
  denoise = Recorder(constant(0.0))
  sampler.sample(denoise, START, (4.0, 2.0, 1.0, 0.0), order=order)
  assert tuple(denoise.levels) == levels


def test_euler_and_heun_by_hand():
  # D = x / 2 at every level, from x = 8 over levels 4, 2, 0. Euler: slope (8 - 4) / 4 = 1, x = 8 - 2 = 6; slope
  # 3 / 2, x = 6 - 3 = 3. Heun: slope 1 at x = 8 and (6 - 3) / 2 = 1.5 at x = 6, mean 1.25, x = 8 - 2.5 = 5.5; then
  # Euler: slope 2.75 / 2, x = 5.5 - 2.75 = 2.75.
  start = jnp.full((1, 1, 1, 1), 8.0)
  for order, expected in ((1, 3.0), (2, 2.75)):
    sample = sampler.sample(lambda x, sigma: x / 2, start, (4.0, 2.0, 0.0), order=order)
    assert float(sample[0, 0, 0, 0]) == pytest.approx(expected)


def test_heun_follows_the_flow_of_a_gaussian_closer_than_euler():
  mean, std = 0.3, 0.5
  exact = flow_to_zero(START, mean, std, 5.0)

  def error(num_steps, order):
    sample = sampler.sample(gaussian(mean, std), START, schedule(num_steps), order=order)
    return np.max(np.abs(sample - exact))

  euler, heun = ([error(num_steps, order) for num_steps in (16, 32)] for order in (1, 2))
  assert heun[1] < euler[1] / 8
  # First order: twice the steps, half the error. Second order: a quarter of it.
  assert euler[1] / euler[0] == pytest.approx(1 / 2, abs=0.05)
  assert heun[1] / heun[0] == pytest.approx(1 / 4, abs=0.05)


def test_churn_shares_the_amount_among_the_steps_and_is_bounded():
  sigmas = (4.0, 2.0, 1.0, 0.0)
  unbounded = {"churn_min": 0.0, "churn_max": float("inf")}
  assert sampler.churn_gammas(sigmas, churn=0.0, **unbounded) == (0.0, 0.0, 0.0)
  assert sampler.churn_gammas(sigmas, churn=0.9, **unbounded) == pytest.approx((0.3,) * 3)
  assert sampler.churn_gammas(sigmas, churn=10.0, **unbounded) == pytest.approx((2**0.5 - 1,) * 3)


def test_churn_acts_within_its_window_bounds_included():
  gammas = sampler.churn_gammas((4.0, 3.0, 2.0, 1.0, 0.0), churn=0.4, churn_min=2.0, churn_max=3.0)
  assert gammas == pytest.approx((0.0, 0.1, 0.1, 0.0))


@pytest.mark.parametrize("order", [1, 2])
def test_churn_by_hand(order):
  # One raised step 4 -> 4 (1 + 1/4) = 5 -> 3: sqrt(25 - 16) = 3 times the noise 2 is added to x = 1, giving 7. The
  # denoiser receives 4, as in DIAMOND, and returns 2. Slope (7 - 2) / 5 = 1, x = 7 + (3 - 5) = 5.
  # The last step, 3 -> 0, lands on 2.
  start, churn = jnp.ones((1, 1, 1, 1)), jnp.full((2, 1, 1, 1, 1), 2.0)
  denoise = Recorder(constant(2.0))
  seen = []

  def watch(x, sigma):
    seen.append(float(x[0, 0, 0, 0]))
    return denoise(x, sigma)

  sample = sampler.sample(watch, start, (4.0, 3.0, 0.0), order=order, gammas=(0.25, 0.0), churn_noise=churn)
  assert float(sample[0, 0, 0, 0]) == pytest.approx(2.0)
  if order == 1:
    assert seen == pytest.approx([7.0, 5.0])
    assert denoise.levels == [4.0, 3.0]
  else:
    # At x = 5 and level 3 the slope is (5 - 2) / 3 = 1 again, so Heun takes the same step.
    assert seen == pytest.approx([7.0, 5.0, 5.0])
    assert denoise.levels == [4.0, 3.0, 3.0]


def test_churn_needs_its_noise():
  with pytest.raises(ValueError, match="churn_noise"):
    sampler.sample(constant(0.0), START, (2.0, 1.0, 0.0), gammas=(0.0, 0.1))
  sampler.sample(constant(0.0), START, (2.0, 1.0, 0.0), gammas=(0.0, 0.0))


def test_a_gamma_is_needed_for_every_step():
  with pytest.raises(ValueError, match="zip"):
    sampler.sample(constant(0.0), START, (2.0, 1.0, 0.0), gammas=(0.0,))
