import jax.numpy as jnp
import numpy as np
import optax
import pytest

B, T = 2, 3
REWARDS = jnp.asarray([[-2.5, 0.0, 7.0], [0.0, 1.0, -0.1]])
ENDS = jnp.asarray([[False, False, True], [True, False, False]])
WEIGHTS = jnp.asarray([[True, True, False], [True, False, True]])


@pytest.fixture(scope="module")
def inputs(world):
  rng = np.random.default_rng(0)
  frames, following = (jnp.asarray(x, jnp.float32) for x in rng.standard_normal((2, B, T, *world.codec.latent_shape)))
  return frames, jnp.asarray([[0, 1, 2], [2, 1, 0]]), following


@pytest.fixture(scope="module")
def outcome(world, inputs, jit):
  """The losses, and the logits that they are taken of."""
  params = world.params["reward_end"]
  state = world.reward_end.initial_state(B)
  losses = jit(world.reward_end.losses)(params, *inputs, REWARDS, ENDS, WEIGHTS)
  rewards, ends, _ = jit(world.reward_end.predict)(params, *inputs, state)
  return losses, np.asarray(rewards), np.asarray(ends)


def test_the_losses_are_cross_entropies_of_the_sign_and_of_the_end(outcome):
  losses, rewards, ends = outcome
  reward_labels = np.array([[0, 1, 2], [1, 2, 0]])  # Signs -1, 0, 1 are classes 0, 1, 2.
  end_labels = np.array([[0, 0, 1], [1, 0, 0]])
  for name, logits, labels in (("reward", rewards, reward_labels), ("end", ends, end_labels)):
    expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses.terms[name].values, expected, rtol=1e-4)
    by_optax = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(losses.terms[name].values, by_optax, rtol=1e-4)


def test_masked_transitions_have_no_weight(outcome):
  losses, _, _ = outcome
  for term in losses.terms.values():
    np.testing.assert_array_equal(term.weights, np.asarray(WEIGHTS, np.float32))
    assert term.weights.dtype == jnp.float32


def test_confusion_counts_the_real_transitions(outcome):
  losses, rewards, ends = outcome
  for name, logits, labels in (("reward", rewards, np.sign(REWARDS).astype(int) + 1), ("end", ends, ENDS.astype(int))):
    expected = np.zeros((logits.shape[-1],) * 2)
    for b, t in zip(*np.nonzero(WEIGHTS), strict=True):
      expected[labels[b, t], logits[b, t].argmax()] += 1
    np.testing.assert_array_equal(losses.metrics[f"{name}_confusion"], expected)
    assert expected.sum() == 4


def test_labels_of_another_shape_are_refused(world, inputs):
  with pytest.raises(AssertionError):
    world.reward_end.losses(world.params["reward_end"], *inputs, REWARDS[:, 1:], ENDS, WEIGHTS)
