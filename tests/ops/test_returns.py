import pathlib

import hypothesis
import hypothesis.extra.numpy as st_numpy
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from jedi_jax.ops.returns import lambda_returns

# The arrays `lam_*` of a file of reference numbers, computed with the public PyTorch implementation of DIAMOND
# (github.com/eloialonso/diamond, default configuration): rewards (raw, their sign is used), ends, truncations and
# bootstrap values [4, 15], and its lambda-returns for gamma 0.985 and lambda 0.95.
DIAMOND = pathlib.Path(__file__).parents[1] / "data" / "diamond_lambda_returns.npz"

jitted = jax.jit(lambda_returns, static_argnames=("gamma", "lambda_"))


def returns(rewards, ends=None, truncated=None, *, bootstrap, gamma, lambda_):
  """Returns of one sequence; nothing ends and nothing is truncated unless said."""
  rewards, bootstrap = np.asarray(rewards, np.float32), np.asarray(bootstrap, np.float32)
  ends = np.zeros_like(rewards) if ends is None else np.asarray(ends)
  truncated = np.zeros_like(rewards) if truncated is None else np.asarray(truncated)
  batch = [x[None] for x in (rewards, ends, truncated, bootstrap)]
  return with_truncations(*batch, gamma=gamma, lambda_=lambda_)[0]


def with_truncations(rewards, ends, truncated, bootstrap, *, gamma, lambda_):
  """Returns [B, T] of sequences that are cut after truncated steps, each part by itself."""
  expected = []
  for row in zip(rewards, ends, bootstrap, truncated, strict=True):
    cuts = np.flatnonzero(row[-1][:-1]) + 1
    parts = zip(*(np.split(x, cuts) for x in row[:-1]), strict=True)
    parts = [jitted(*(x[None] for x in part), gamma=gamma, lambda_=lambda_)[0] for part in parts]
    expected.append(np.concatenate(parts))
  return np.stack(expected)


def loop(rewards, ends, truncated, bootstrap, gamma, lambda_):
  """The definition, in plain Python."""
  expected = np.zeros(rewards.shape, np.float64)
  for b in range(rewards.shape[0]):
    following = bootstrap[b, -1]
    for t in reversed(range(rewards.shape[1])):
      following = bootstrap[b, t] if truncated[b, t] else (1 - lambda_) * bootstrap[b, t] + lambda_ * following
      following = rewards[b, t] + (0 if ends[b, t] else gamma * following)
      expected[b, t] = following
  return expected


def test_by_hand():
  # G_2 = 3 + 0.5 * 30 = 18; G_1 = 2 + 0.5 (0.75 * 20 + 0.25 * 18) = 11.75; G_0 = 1 + 0.5 (7.5 + 2.9375) = 6.21875.
  expected = [6.21875, 11.75, 18]
  np.testing.assert_allclose(returns([1, 2, 3], bootstrap=[10, 20, 30], gamma=0.5, lambda_=0.25), expected)


def test_with_lambda_one_it_is_monte_carlo_with_the_last_bootstrap():
  # G_0 = 1 + 0.5 * 2 + 0.25 * 4 + 0.125 * 8 = 4.
  np.testing.assert_allclose(returns([1, 2, 4], bootstrap=[99, 99, 8], gamma=0.5, lambda_=1.0), [4, 6, 8])


def test_with_lambda_zero_it_is_the_one_step_target():
  expected = [1 + 0.9 * 10, 2 + 0.9 * 20, 3 + 0.9 * 30]
  np.testing.assert_allclose(returns([1, 2, 3], bootstrap=[10, 20, 30], gamma=0.9, lambda_=0.0), expected, rtol=1e-6)


def test_nothing_is_bootstrapped_across_an_end():
  # Step 1 ends: G_1 = 2 whatever follows, and G_0 = 1 + 0.5 (0.5 * 10 + 0.5 * 2) = 4.
  for later in (0.0, 1e6):
    actual = returns([1, 2, later], [0, 1, 0], bootstrap=[10, later, later], gamma=0.5, lambda_=0.5)
    np.testing.assert_allclose(actual[:2], [4, 2])


def test_a_truncation_bootstraps_and_cuts_what_follows():
  # Step 1 is cut: G_1 = 2 + 0.5 * 20 = 12 whatever follows, and G_0 = 1 + 0.5 (0.5 * 10 + 0.5 * 12) = 6.5.
  for later in (0.0, 1e6):
    actual = returns([1, 2, later], None, [0, 1, 0], bootstrap=[10, 20, later], gamma=0.5, lambda_=0.5)
    np.testing.assert_allclose(actual[:2], [6.5, 12])


def test_an_end_outweighs_a_truncation():
  np.testing.assert_allclose(returns([2, 0], [1, 0], [1, 0], bootstrap=[9, 9], gamma=0.5, lambda_=0.5)[0], 2)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
  rewards=st_numpy.arrays(np.float32, (2, 5), elements=st.floats(-10, 10, width=32)),
  bootstrap=st_numpy.arrays(np.float32, (2, 5), elements=st.floats(-10, 10, width=32)),
  ends=st_numpy.arrays(np.bool_, (2, 5)),
  truncated=st_numpy.arrays(np.bool_, (2, 5)),
  factors=st.sampled_from([(0.985, 0.95), (1.0, 1.0), (0.5, 0.0)]),
)
def test_it_equals_a_plain_loop(rewards, bootstrap, ends, truncated, factors):
  gamma, lambda_ = factors
  actual = with_truncations(rewards, ends, truncated, bootstrap, gamma=gamma, lambda_=lambda_)
  np.testing.assert_allclose(actual, loop(rewards, ends, truncated, bootstrap, gamma, lambda_), rtol=1e-4, atol=1e-4)


def test_it_equals_diamond():
  with np.load(DIAMOND) as data:
    rewards, bootstrap = np.sign(data["lam_rew"]).astype(np.float32), data["lam_val_bootstrap"]
    ends, truncated, expected = data["lam_end"], data["lam_trunc"], data["lam_returns"]
  assert ends.any()
  assert truncated.any()
  actual = with_truncations(rewards, ends, truncated, bootstrap, gamma=0.985, lambda_=0.95)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_arrays_of_different_shapes_are_refused():
  with pytest.raises(AssertionError):
    lambda_returns(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((2, 4)), gamma=0.9, lambda_=0.9)
