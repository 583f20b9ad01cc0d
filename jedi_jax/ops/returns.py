"""Lambda-returns (Sutton and Barto 2018, section 12.1)."""

import chex
import jax
import jax.numpy as jnp

Array = jax.Array

_UNROLL = 16
"""Steps in one round of the loop. A GPU launches three kernels a round, however small its work."""


def lambda_returns(r_t: Array, end_t: Array, bootstrap_t: Array, *, gamma: float, lambda_: float) -> Array:
  """Computes G_t = r_t + gamma (1 - end_t) ((1 - lambda) v_t + lambda G_{t+1}).

  Beyond the last step G is the bootstrap value.

  Args:
    r_t: [B, T] float32 reward of step t.
    end_t: [B, T]; 1 or true where the episode ends with step t and nothing is bootstrapped.
    bootstrap_t: [B, T] float32 value v_t of the state after step t.
    gamma: discount in [0, 1].
    lambda_: mixing in [0, 1]. 0 gives one-step targets, 1 gives Monte Carlo returns plus the last bootstrap value.

  Returns:
    [B, T] float32.
  """
  chex.assert_rank(r_t, 2)
  chex.assert_equal_shape([r_t, end_t, bootstrap_t])
  discount = gamma * (1.0 - end_t.astype(r_t.dtype))
  mixing = jnp.asarray(lambda_, r_t.dtype)

  def step(following: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
    reward, discounted, value = inputs
    current = reward + discounted * ((1.0 - mixing) * value + mixing * following)
    return current, current

  inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (r_t, discount, bootstrap_t))
  _, returns = jax.lax.scan(step, bootstrap_t[:, -1], inputs, reverse=True, unroll=_UNROLL)
  return jnp.moveaxis(returns, 0, 1)
