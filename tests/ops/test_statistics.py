import jax.numpy as jnp
import numpy as np
import pytest

from jedi_jax.ops.statistics import confusion, latent_statistics


def test_latent_statistics_are_sums_over_real_positions():
  # The third frame is padding.
  latents = jnp.asarray([[1.0, 2.0], [3.0, 2.95], [9.0, 9.0]]).reshape(1, 3, 1, 1, 2)
  mask = jnp.asarray([[True, True, False]])
  statistics = latent_statistics(latents, mask, 3.0)
  # Rows (1, 1, 2) and (1, 3, 2.95): their outer products add up.
  rows = np.array([[1, 1, 2], [1, 3, 2.95]])
  np.testing.assert_allclose(statistics["latent_gram"], rows.T @ rows, rtol=1e-5)
  np.testing.assert_allclose(statistics["latent_moments"][:, 0, 0], [rows[:, 1:].sum(0), (rows[:, 1:] ** 2).sum(0)])
  change, weights = statistics["latent_change_square"]
  np.testing.assert_array_equal(weights, [[1, 0]])
  assert float(change[0, 0]) == pytest.approx((2**2 + 0.95**2) / 2)
  # Of four numbers 3 and 2.95 exceed 0.9 * 3.
  values, weights = statistics["latent_clamped"]
  assert float(jnp.sum(values * weights) / jnp.sum(weights)) == pytest.approx(0.5)
  assert set(statistics) - set(latent_statistics(latents, mask, None)) == {"latent_clamped"}


def test_confusion_by_hand():
  labels = jnp.asarray([0, 0, 1, 1])
  logits = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
  # Of class 0 one is right, one wrong; of class 1 both are right, and one counts half.
  counts = confusion(labels, logits, jnp.asarray([1.0, 1.0, 1.0, 0.5]))
  np.testing.assert_array_equal(counts, [[1, 1], [0, 1.5]])
