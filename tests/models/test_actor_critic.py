import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedi_jax.models import actor_critic as actor_critic_lib
from jedi_jax.types import LstmState, Trajectory

B, T = 2, 3
# As in conftest.py.
GAMMA, LAMBDA, ENTROPY, VALUE = 0.9, 0.8, 0.01, 0.5
REWARDS = np.array([[1.0, 0.0, -2.5], [0.0, 3.0, 1.0]])  # Raw: the signs count.
ENDS = np.array([[False, False, False], [False, True, False]])
ALIVE = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
ACTIONS = np.array([[0, 2, 1], [1, 1, 0]])


def weighted(values, weights) -> float:
  """The mean that a metric's `Term` stands for."""
  return float(np.average(values, weights=weights))


@pytest.fixture(scope="module")
def trajectory(world):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
  return Trajectory(
    latents=draw(B, T + 1, *world.codec.latent_shape),
    actions=jnp.asarray(ACTIONS, jnp.int32),
    rewards=jnp.asarray(REWARDS, jnp.float32),
    ends=jnp.asarray(ENDS),
    alive=jnp.asarray(ALIVE, jnp.float32),
    restarts=jnp.zeros((B, T)),
    reward_logits=draw(B, T, 3),
    end_logits=draw(B, T, 2),
    values=draw(B, T),
    policy_state=LstmState(draw(B, 5), draw(B, 5)),
  )


@pytest.fixture(scope="module")
def evaluate(world, jit):
  """(Parameters, trajectory) -> (losses, gradient of the sum of the weighted terms named, by name)."""

  def run(params, trajectory):
    def total(params, name):
      term = world.actor_critic.losses(params, trajectory).terms[name]
      return jnp.sum(term.values * term.weights)

    gradients = {name: jax.grad(total)(params, name) for name in ("policy", "value", "entropy")}
    return world.actor_critic.losses(params, trajectory), gradients

  return jit(run)


@pytest.fixture(scope="module")
def outputs(world, trajectory, jit):
  logits, values, _ = jit(world.actor_critic.apply)(
    world.params["actor_critic"], trajectory.latents, trajectory.policy_state
  )
  return np.asarray(logits, np.float64), np.asarray(values, np.float64)


def expected_returns(values):
  """G_2 = r_2 + gamma v_3, then the recursion of lambda-returns; step 1 of the second trajectory ends it."""
  signs = np.sign(REWARDS)
  last = signs[:, 2] + GAMMA * values[:, 3]
  middle = signs[:, 1] + GAMMA * ~ENDS[:, 1] * ((1 - LAMBDA) * values[:, 2] + LAMBDA * last)
  first = signs[:, 0] + GAMMA * ((1 - LAMBDA) * values[:, 1] + LAMBDA * middle)
  return np.stack([first, middle, last], axis=1)


def test_the_terms_by_hand(world, trajectory, evaluate, outputs):
  losses, _ = evaluate(world.params["actor_critic"], trajectory)
  logits, values = outputs
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  entropy = -(np.exp(log_probs) * log_probs).sum(-1)[:, :T]
  returns = expected_returns(values)
  taken = np.take_along_axis(log_probs[:, :T], ACTIONS[..., None], -1)[..., 0]
  assert set(losses.terms) == {"policy", "value", "entropy"}
  for name, expected in {
    "policy": -taken * (returns - values[:, :T]),
    "value": VALUE * (returns - values[:, :T]) ** 2,
    "entropy": -ENTROPY * entropy,
  }.items():
    np.testing.assert_allclose(losses.terms[name].values, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(losses.terms[name].weights, ALIVE)
  for name, per_step in {"policy_entropy": entropy, "value_mean": values[:, :T], "lambda_return": returns}.items():
    np.testing.assert_allclose(weighted(*losses.metrics[name]), (per_step * ALIVE).sum() / 5, rtol=1e-3, atol=1e-5)
  # Signs 1 + 0 - 1 of the first, 0 + 1 of the second; one end in five steps.
  assert weighted(*losses.metrics["imagined_return"]) == pytest.approx((0 + 1) / 2)
  assert weighted(*losses.metrics["imagined_end_rate"]) == pytest.approx(1 / 5)


def test_what_follows_an_end_does_not_matter(world, trajectory, evaluate):
  params = world.params["actor_critic"]
  _, before = evaluate(params, trajectory)
  changed = trajectory.replace(
    latents=trajectory.latents.at[1, 2:].set(5.0), rewards=trajectory.rewards.at[1, 2].set(-1.0)
  )
  _, after = evaluate(params, changed)
  for actual, expected in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5)


def test_each_term_trains_its_head(world, trajectory, evaluate):
  _, gradients = evaluate(world.params["actor_critic"], trajectory)
  size = {
    (name, head): float(np.abs(gradients[name][head]["kernel"]).max())
    for name in gradients
    for head in ("actor", "critic", "lstm")
    if head != "lstm"
  }
  # The advantage and the returns are constants: the policy's term leaves the critic alone.
  assert size["policy", "critic"] == size["entropy", "critic"] == size["value", "actor"] == 0
  assert min(size["policy", "actor"], size["entropy", "actor"], size["value", "critic"]) > 1e-6


def test_the_value_regresses_on_constant_returns(world, trajectory, evaluate, outputs):
  # d/db of sum w VALUE (v - G)^2 with G constant is sum w 2 VALUE (v - G), b being the critic's bias.
  _, gradients = evaluate(world.params["actor_critic"], trajectory)
  _, values = outputs
  expected = (ALIVE * 2 * VALUE * (values[:, :T] - expected_returns(values))).sum()
  np.testing.assert_allclose(gradients["value"]["critic"]["bias"][0], expected, rtol=1e-3)


def test_reinforce_raises_the_logits_of_good_actions(world, trajectory, evaluate, outputs):
  # d/db_a of -log pi(a') A is -(1[a = a'] - pi(a)) A, b being the actor's bias.
  _, gradients = evaluate(world.params["actor_critic"], trajectory)
  logits, values = outputs
  probs = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))[:, :T]
  advantage = (ALIVE * (expected_returns(values) - values[:, :T]))[..., None]
  expected = (-(np.eye(3)[ACTIONS] - probs) * advantage).sum((0, 1))
  np.testing.assert_allclose(gradients["policy"]["actor"]["bias"], expected, rtol=1e-3, atol=1e-5)


def test_a_restart_is_two_trajectories(world, trajectory, evaluate, jit):
  # The second trajectory ends with step 1 and goes on from another state: its last step is that of a trajectory of one.
  params = world.params["actor_critic"]
  rng = np.random.default_rng(3)
  other = LstmState(*(jnp.asarray(rng.standard_normal((B, 5)), jnp.float32) for _ in range(2)))
  both = trajectory.replace(
    alive=jnp.ones((B, T)),
    restarts=jnp.asarray([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
    restart_state=other,
  )
  losses, _ = evaluate(params, both)
  before, _ = evaluate(params, trajectory)
  logits, values, _ = jit(world.actor_critic.apply)(params, trajectory.latents[:, 2:], other)
  for name in losses.terms:
    np.testing.assert_allclose(losses.terms[name].values[0], before.terms[name].values[0], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(losses.terms[name].values[1, :2], before.terms[name].values[1, :2], rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(losses.terms[name].weights, 1.0)
  expected = np.sign(REWARDS[1, 2]) + GAMMA * values[1, 1]
  np.testing.assert_allclose(losses.terms["value"].values[1, 2], VALUE * (values[1, 0] - expected) ** 2, rtol=1e-3)
  log_prob = jax.nn.log_softmax(logits[1, 0])[ACTIONS[1, 2]]
  np.testing.assert_allclose(
    losses.terms["policy"].values[1, 2], -log_prob * (expected - values[1, 0]), rtol=1e-3, atol=1e-5
  )


def test_a_normalised_input_makes_the_policy_blind_to_the_scale_of_latents(trajectory, jit):
  shape = trajectory.latents.shape[2:]
  outputs = {}
  for norm in ("none", "frame"):
    behaviour = actor_critic_lib.actor_critic(shape, num_actions=3, lstm_width=5, input_norm=norm)
    params = jax.tree.map(lambda x: x + 0.1, behaviour.init(jax.random.key(0)))
    outputs[norm] = [
      np.asarray(jit(behaviour.apply)(params, scale * trajectory.latents + 0.2, trajectory.policy_state)[0])
      for scale in (1.0, 4.0)
    ]
  np.testing.assert_allclose(*outputs["frame"], rtol=1e-3, atol=1e-4)
  assert np.abs(outputs["none"][0] - outputs["none"][1]).max() > 1e-2
