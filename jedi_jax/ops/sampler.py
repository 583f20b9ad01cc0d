"""Sampling of a diffusion model (arXiv:2206.00364, alg. 2): Karras schedule, Euler's and Heun's methods, churn."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def karras_sigmas(num_steps: int, *, sigma_min: float, sigma_max: float, rho: float) -> tuple[float, ...]:
  """Returns `num_steps` noise levels decreasing from sigma_max to sigma_min, and a final 0 (eq. 5).

  With one step the schedule is (sigma_max, 0).
  """
  ramp = np.linspace(0.0, 1.0, num_steps)
  top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
  return (*((top + ramp * (bottom - top)) ** rho).tolist(), 0.0)


def churn_gammas(sigmas: Sequence[float], *, churn: float, churn_min: float, churn_max: float) -> tuple[float, ...]:
  """Returns for each positive noise level by which fraction churn raises it before its step.

  Args:
    sigmas: decreasing noise levels with a final 0.
    churn: total amount, shared equally by all steps; a step raises its level by at most sqrt(2) - 1.
    churn_min: least noise level that is raised.
    churn_max: largest noise level that is raised.
  """
  most = min(churn / (len(sigmas) - 1), 2**0.5 - 1)
  return tuple(most if churn_min <= sigma <= churn_max else 0.0 for sigma in sigmas[:-1])


def sample(
  denoise: Callable[[Array, Array], Array],
  noise: Array,
  sigmas: Sequence[float],
  *,
  order: int = 1,
  gammas: Sequence[float] | None = None,
  churn_noise: Array | None = None,
) -> Array:
  """Integrates the reverse process from `noise` down to noise level 0.

  The steps are unrolled; on an accelerator a loop would wait for kernel launches.

  Args:
    denoise: maps noisy data [B, ...] and noise levels [B] to an estimate [B, ...] of the clean data.
    noise: [B, ...] start of unit variance. As in DIAMOND it is not multiplied by the first noise level.
    sigmas: decreasing noise levels with a final 0, see `karras_sigmas`.
    order: 1 for Euler's method, 2 for Heun's, which takes an Euler step to level 0.
    gammas: fraction by which each positive noise level is raised, see `churn_gammas`; None for no churn.
    churn_noise: [len(sigmas) - 1, B, ...] noise that churn adds, scaled to its standard
      deviation; required if any gamma is positive.

  Returns:
    [B, ...] sample.

  Raises:
    ValueError: if `churn_noise` is required and None.
  """
  gammas = (0.0,) * (len(sigmas) - 1) if gammas is None else gammas
  batch = noise.shape[0]
  x = noise
  for step, (sigma, next_sigma, gamma) in enumerate(zip(sigmas[:-1], sigmas[1:], gammas, strict=True)):
    raised = sigma * (1 + gamma)
    if gamma > 0:
      if churn_noise is None:
        raise ValueError("churn needs churn_noise")
      x = x + churn_noise[step] * (raised**2 - sigma**2) ** 0.5
    # As in DIAMOND the denoiser gets the noise level before churn; its published samples depend on it.
    estimate = denoise(x, jnp.full((batch,), sigma, x.dtype))
    if next_sigma == 0:
      x = estimate  # An Euler step to level 0 without its rounding errors.
      continue
    slope = (x - estimate) / raised
    change = next_sigma - raised
    if order == 2:
      ahead = x + slope * change
      slope_ahead = (ahead - denoise(ahead, jnp.full((batch,), next_sigma, x.dtype))) / next_sigma
      slope = (slope + slope_ahead) / 2
    x = x + slope * change
  return x
