"""Lambda-returns (Sutton and Barto 2018, section 12.1), with ends and truncations inside the sequence."""

import chex
import jax
import jax.numpy as jnp

Array = jax.Array


def lambda_returns(
  r_t: Array, end_t: Array, truncated_t: Array, bootstrap_t: Array, *, gamma: float, lambda_: float
) -> Array:
  """Computes G_t = r_t + gamma (1 - end_t) ((1 - lambda_t) v_t + lambda_t G_{t+1}).

  lambda_t is `lambda_`, but 0 where the sequence is truncated; beyond the last step G is the bootstrap value.

  Args:
    r_t: [B, T] float32 reward of step t.
    end_t: [B, T] the episode ended with step t: nothing is bootstrapped.
    truncated_t: [B, T] the sequence was cut after step t: the value is bootstrapped, the next return is not.
    bootstrap_t: [B, T] float32 value of the state that step t led to.
    gamma: discount in [0, 1].
    lambda_: mixing in [0, 1]; with 1 and no truncation the returns are Monte Carlo plus the last bootstrap.

  Returns:
    [B, T] float32.
  """
  chex.assert_rank(r_t, 2)
  chex.assert_equal_shape([r_t, end_t, truncated_t, bootstrap_t])
  discount = gamma * (1.0 - end_t.astype(r_t.dtype))
  mixing = lambda_ * (1.0 - truncated_t.astype(r_t.dtype))

  def step(following: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
    reward, discounted, mixed, value = inputs
    current = reward + discounted * ((1.0 - mixed) * value + mixed * following)
    return current, current

  inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (r_t, discount, mixing, bootstrap_t))
  _, returns = jax.lax.scan(step, bootstrap_t[:, -1], inputs, reverse=True)
  return jnp.moveaxis(returns, 0, 1)
