import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedi_jax.config import make_config
from jedi_jax.models.build import build, count_parameters
from jedi_jax.models.dynamics import switch
from jedi_jax.types import EnvSpec

B, L, N, H = 2, 2, 2, 3
COIN = {bool(switch("random", jax.random.key(i), jnp.int32(0))): jax.random.key(i) for i in range(20)}
"""Keys for which random switching conditions on latents (False) and on estimates (True)."""
KEYS = jax.random.split(jax.random.key(1), B)


def weighted(values, weights) -> float:
  """The mean that a metric's `Term` stands for."""
  return float(np.average(values, weights=weights))


def loss_of(losses):
  """The sum of the weighted means of the terms."""
  return sum(
    jnp.sum(term.values * term.weights) / jnp.maximum(jnp.sum(term.weights), 1.0) for term in losses.terms.values()
  )


def largest(tree):
  return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def differentiate(world, jit):
  """Name of a phase -> compiled (parameters, segment, keys, shared key) -> (loss, losses, gradient by component)."""

  def make(phase):
    def run(params, segment, keys, shared_key):
      def total(params):
        losses = phase.losses(params, segment, keys, shared_key, jnp.int32(0))
        return loss_of(losses), losses

      (value, losses), gradient = jax.value_and_grad(total, has_aux=True)(params)
      return value, losses, gradient

    return jit(run)

  return {phase.name: make(phase) for phase in world.model.phases}


def test_the_phases_draw_what_their_losses_need(world):
  phases = {phase.name: phase for phase in world.model.phases}
  assert list(phases) == ["denoiser", "reward_end", "actor_critic"]
  facts = {name: (p.length, p.beyond_end, p.final_frames, p.components) for name, p in phases.items()}
  assert facts == {
    "denoiser": (L + N, False, True, ("encoder", "denoiser")),
    "reward_end": (L + H, True, True, ("encoder", "reward_end")),
    "actor_critic": (L, False, False, ("actor_critic",)),
  }


# ---- The denoising loss ----


def test_the_encoder_learns_from_conditioning_latents_only(world, differentiate, make_segment):
  run = differentiate["denoiser"]
  # With all past frames padded, the encoder's only way into the first loss is the target and its noised copy; the
  # first target is in the past of the second, unless an estimate replaces it.
  padded = make_segment(B, L + N, mask=[[False, False, True, True]] * B)
  real = make_segment(B, L + N)
  reached = {}
  for name, segment in (("padded", padded), ("real", real)):
    for coin, key in COIN.items():
      value, losses, gradient = run(world.params, segment, KEYS, key)
      assert float(value) > 0.01
      assert float(losses.metrics["used_estimates"]) == coin
      assert largest(gradient["denoiser"]) > 1e-4
      assert largest(gradient["reward_end"]) == largest(gradient["actor_critic"]) == 0
      reached[name, coin] = largest(gradient["encoder"])
  assert reached["padded", True] == 0
  assert min(reached["padded", False], reached["real", True], reached["real", False]) > 1e-5


def test_the_encoders_gradient_is_that_of_a_loss_with_constant_targets(world, differentiate, make_segment, jit):
  segment = make_segment(B, L + N, mask=[[False, True, True, True], [True] * 4])
  images = segment.observations.reshape(-1, 16, 16, 3).astype(jnp.float32) / 127.5 - 1

  def encode(params):
    latents = world.codec.encode(params, images).reshape(B, L + N, *world.codec.latent_shape)
    return latents * segment.mask[:, :, None, None, None]

  targets = jit(encode)(world.params["encoder"])[:, L:]  # Numbers, no longer a function of the parameters.

  def by_hand(encoder, key):
    noise = world.dynamics.training_noise(KEYS, key, jnp.int32(0))
    inputs = encode(encoder)[:, : L + N - 1]
    actions, mask = segment.actions[:, : L + N - 1], segment.mask[:, L:]
    return loss_of(world.dynamics.losses(world.params["denoiser"], inputs, targets, actions, mask, noise))

  by_hand = jit(jax.value_and_grad(by_hand))
  for key in COIN.values():
    value, _, gradient = differentiate["denoiser"](world.params, segment, KEYS, key)
    expected, expected_gradient = by_hand(world.params["encoder"], key)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for actual, hand in zip(jax.tree.leaves(gradient["encoder"]), jax.tree.leaves(expected_gradient), strict=True):
      np.testing.assert_allclose(actual, hand, rtol=1e-2, atol=1e-4 * (1 + np.abs(hand).max()))


def test_the_content_of_padding_does_not_matter(world, differentiate, make_segment):
  mask = np.array([[False, False, False, True], [False, True, True, True]])
  segment = make_segment(B, L + N, mask=mask)
  other = segment.replace(observations=jnp.where(mask[..., None, None, None], segment.observations, 0))
  value, losses, _ = differentiate["denoiser"](world.params, segment, KEYS, COIN[True])
  changed, _, _ = differentiate["denoiser"](world.params, other, KEYS, COIN[True])
  np.testing.assert_allclose(value, changed, rtol=1e-6)
  np.testing.assert_array_equal(losses.terms["denoising_0"].weights, [0, 1])
  np.testing.assert_array_equal(losses.terms["denoising_1"].weights, [1, 1])


# ---- The other losses ----


def test_the_reward_end_loss_trains_the_encoder_too(world, differentiate, make_segment):
  mask = [[False, True, True, True, True], [True, True, True, False, False]]
  segment = make_segment(B, L + H, mask=mask)
  _, losses, gradient = differentiate["reward_end"](world.params, segment, KEYS, COIN[True])
  assert largest(gradient["denoiser"]) == largest(gradient["actor_critic"]) == 0
  assert min(largest(gradient["encoder"]), largest(gradient["reward_end"])) > 1e-5
  # A transition is real where both of its frames are.
  real = np.array([[0, 1, 1, 1], [1, 1, 0, 0]])
  for term in losses.terms.values():
    np.testing.assert_array_equal(term.weights, real)
  rewards, ends = np.asarray(segment.rewards)[:, :-1], np.asarray(segment.ends)[:, :-1]
  # Returns from the L-th frame on, over the segments whose L-th transition is real: both are.
  assert weighted(*losses.metrics["replay_return"]) == pytest.approx((np.sign(rewards) * real)[:, L - 1 :].sum() / 2)
  assert weighted(*losses.metrics["replay_end_rate"]) == pytest.approx((ends * real).sum() / 5)


def test_nothing_flows_back_from_the_policy_into_the_world_model(world, differentiate, make_segment):
  segment = make_segment(B, L, mask=[[False, True], [True, True]])
  _, losses, gradient = differentiate["actor_critic"](world.params, segment, KEYS, COIN[True])
  for component in ("encoder", "denoiser", "reward_end"):
    assert largest(gradient[component]) == 0
  assert largest(gradient["actor_critic"]) > 1e-5
  assert losses.terms["policy"].values.shape == (B, H)


def test_imagination_starts_from_the_encoded_segment(world, make_segment, jit):
  segment = make_segment(B, L)
  trajectory = jit(world.model.imagine, static_argnums=3)(world.params, segment, KEYS, 2)
  latents = jit(world.model.encode)(world.params, segment.observations, segment.mask)
  assert trajectory.actions.shape == (B, 2)
  np.testing.assert_allclose(trajectory.latents[:, 0], latents[:, -1], rtol=1e-4, atol=1e-5)


def test_the_policy_acts_as_the_behavior_does_on_latents(world, make_segment, jit):
  segment = make_segment(B, L)
  latents = jit(world.model.encode)(world.params, segment.observations, segment.mask)
  state = world.model.initial_state(B)
  apply = jit(world.actor_critic.apply)
  expected_logits, expected_values, expected_state = apply(world.params["actor_critic"], latents, state)
  policy = jit(world.model.policy)
  for t in range(L):
    logits, values, state = policy(world.params, segment.observations[:, t], state)
    np.testing.assert_allclose(logits, expected_logits[:, t], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(values, expected_values[:, t], rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(state.cell, expected_state.cell, rtol=1e-3, atol=1e-4)


# ---- Sizes ----


def paper(num_actions):
  model = build(make_config(preset="paper"), EnvSpec(num_actions, (64, 64, 3)))
  return model, count_parameters(jax.eval_shape(model.init, jax.random.key(0)))


def conv(inputs, outputs):
  return 9 * inputs * outputs + outputs


def linear(inputs, outputs):
  return inputs * outputs + outputs


def lstm(inputs, width):
  return 4 * width * (inputs + width) + 2 * 4 * width


def attention(channels):
  return 2 * channels + linear(channels, 3 * channels) + linear(channels, channels)


def block(inputs, outputs, condition):
  """A residual block: two adaptive norms, two convolutions, a skip where the channels change."""
  norms = linear(condition, 2 * inputs) + linear(condition, 2 * outputs)
  skip = linear(inputs, outputs) if inputs != outputs else 0
  return norms + conv(inputs, outputs) + conv(outputs, outputs) + skip


@pytest.mark.parametrize("num_actions", [4, 18])
def test_the_papers_model_has_the_papers_size(num_actions):
  model, counts = paper(num_actions)
  assert model.latent_shape == (8, 8, 16)
  small = 2 * 32 + conv(32, 32)  # Norm and convolution of a small residual block.
  encoder = conv(3, 32) + 3 * small + 2 * 32 + conv(32, 16) + linear(32, 16)
  denoiser = (
    num_actions * 256 // 4
    + 2 * linear(256, 256)
    + conv(5 * 16, 160)  # Four past latents and the noisy one.
    + block(160, 160, 256)  # Down.
    + 2 * (block(160, 160, 256) + attention(160))  # Middle.
    + 2 * block(320, 160, 256)  # Up.
    + 2 * 160
    + conv(160, 16)
  )
  reward_end = (
    num_actions * 128
    + conv(2 * 16, 32)
    + 10 * block(32, 32, 128)  # Four levels of two, and the last pair.
    + 2 * attention(32)
    + lstm(8 * 8 * 32, 512)
    + linear(512, 512)
    + 512 * 5
  )
  actor_critic = lstm(8 * 8 * 16, 512) + linear(512, num_actions) + linear(512, 1)
  assert encoder == 34_048
  assert counts == {
    "encoder": encoder,
    "denoiser": denoiser,
    "reward_end": reward_end,
    "actor_critic": actor_critic,
  }
  if num_actions == 18:
    assert round(sum(counts.values()) / 1e6, 1) == 13.4


def test_fixed_frequencies_are_not_counted():
  params = {"denoiser": {"noise_embedding": {"frequencies": np.zeros((1, 8))}, "conv": {"bias": np.zeros(3)}}}
  assert count_parameters(params) == {"denoiser": 3}
