"""Sampling of the reverse process (arXiv:2206.00364, alg. 2): Karras schedule, Euler's and Heun's methods, churn."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def karras_sigmas(num_steps: int, *, sigma_min: float, sigma_max: float, rho: float) -> tuple[float, ...]:
  """Returns `num_steps` decreasing noise levels from sigma_max to sigma_min, and a final 0 (eq. 5).

  With one step the schedule is (sigma_max, 0).
  """
  ramp = np.linspace(0.0, 1.0, num_steps)
  top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
  return (*((top + ramp * (bottom - top)) ** rho).tolist(), 0.0)


def churn_gammas(sigmas: Sequence[float], *, churn: float, churn_min: float, churn_max: float) -> tuple[float, ...]:
  """Returns by which share each of the positive levels is raised before its step."""
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
  """Integrates the reverse process from `noise` down to the last level.

  The few steps are unrolled: on an accelerator a loop around them would wait for launches.

  Args:
    denoise: maps ([B, ...] noisy, [B] sigma) to the estimate [B, ...] of the clean data.
    noise: [B, ...] the starting point, of unit variance; as in DIAMOND it is not multiplied by the first level.
    sigmas: decreasing levels with a final 0, as `karras_sigmas` makes them.
    order: 1 for Euler's method, 2 for Heun's (whose last step, to 0, is Euler's).
    gammas: by which share each level is raised, as `churn_gammas` makes them; None for no churn.
    churn_noise: [len(sigmas) - 1, B, ...] noise that churn adds, of its own standard deviation; needed only where a
      gamma is positive.

  Returns:
    [B, ...] the sample.
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
    # DIAMOND tells the denoiser the level before churn; its public samples depend on it.
    estimate = denoise(x, jnp.full((batch,), sigma, x.dtype))
    if next_sigma == 0:
      x = estimate  # What a step of Euler to level 0 comes to, without its rounding.
      continue
    slope = (x - estimate) / raised
    change = next_sigma - raised
    if order == 2:
      ahead = x + slope * change
      slope_ahead = (ahead - denoise(ahead, jnp.full((batch,), next_sigma, x.dtype))) / next_sigma
      slope = (slope + slope_ahead) / 2
    x = x + slope * change
  return x
