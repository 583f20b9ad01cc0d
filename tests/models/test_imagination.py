import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedi_jax.models import imagination

B, L, T = 3, 2, 4
SURE = 1e6  # A Gumbel draw that outweighs all logits.


@pytest.fixture(scope="module")
def start(world):
  rng = np.random.default_rng(0)
  past = jnp.asarray(rng.standard_normal((B, L, *world.codec.latent_shape)), jnp.float32)
  return past, jnp.asarray([[0], [1], [2]]), jnp.ones((B, L), bool)


@pytest.fixture(scope="module")
def draw_noise(world, jit):
  return jit(lambda keys: imagination.draw_noise(world.dynamics, keys, horizon=T, num_actions=3))


@pytest.fixture(scope="module")
def noise(draw_noise):
  return draw_noise(jax.random.split(jax.random.key(0), B))


@pytest.fixture(scope="module")
def imagine(world, jit):
  def run(params, past, past_actions, mask, noise, actions=None, **options):
    parts = world.dynamics, world.reward_end, world.actor_critic
    return imagination.imagine(*parts, params, past, past_actions, mask, noise, actions=actions, **options)

  return jit(run, static_argnames="unroll")


def forced_ends(noise, ends):
  """Makes step t of trajectory b end exactly where ends[b, t]."""
  ends = jnp.asarray(ends).T[..., None]
  return noise._replace(ends=SURE * jnp.concatenate([~ends, ends], axis=-1))


def test_shapes_and_values(world, start, noise, imagine):
  trajectory = imagine(world.params, *start, noise)
  assert trajectory.latents.shape == (B, T + 1, *world.codec.latent_shape)
  for name in ("actions", "rewards", "ends", "alive", "restarts", "values"):
    assert getattr(trajectory, name).shape == (B, T)
  assert (trajectory.reward_logits.shape, trajectory.end_logits.shape) == ((B, T, 3), (B, T, 2))
  assert trajectory.policy_state.hidden.shape == (B, 5)
  assert trajectory.restart_state is None
  assert not np.any(trajectory.restarts)
  assert trajectory.actions.dtype == jnp.int32
  assert trajectory.ends.dtype == bool
  assert set(np.unique(trajectory.rewards)) <= {-1.0, 0.0, 1.0}
  assert set(np.unique(trajectory.actions)) <= {0, 1, 2}


def test_the_draws_of_a_trajectory_come_from_its_own_key(draw_noise, noise):
  alone = draw_noise(jax.random.split(jax.random.key(0), B)[1:2])
  for some, everything in zip(jax.tree.leaves(alone), jax.tree.leaves(noise), strict=True):
    assert everything.shape[:2] == (T, B)
    np.testing.assert_array_equal(some[:, 0], everything[:, 1])


def test_the_same_noise_gives_the_same_trajectory_and_other_noise_another(world, start, noise, imagine):
  first, second = imagine(world.params, *start, noise), imagine(world.params, *start, noise)
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    np.testing.assert_array_equal(a, b)
  frames = noise.frames._replace(start=noise.frames.start.at[0, 1].add(1.0))
  other = imagine(world.params, *start, noise._replace(frames=frames))
  np.testing.assert_array_equal(other.latents[1, 0], first.latents[1, 0])
  assert np.abs(other.latents[1, 1] - first.latents[1, 1]).max() > 1e-3
  np.testing.assert_allclose(other.latents[::2], first.latents[::2], atol=1e-6)


def test_nothing_is_alive_after_the_first_end(world, start, noise, imagine):
  ends = [[False, True, False, True], [False] * 4, [True, False, False, False]]
  trajectory = imagine(world.params, *start, forced_ends(noise, ends))
  np.testing.assert_array_equal(trajectory.ends, ends)
  np.testing.assert_array_equal(trajectory.alive, [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])


def test_gumbel_draws_force_actions_and_rewards(world, start, noise, imagine):
  actions = np.array([[0, 1, 2, 0], [2, 2, 1, 1], [1, 0, 0, 2]])
  rewards = np.array([[-1, 0, 1, 0], [1, 1, 1, -1], [0, 0, -1, -1]])
  forced = noise._replace(actions=SURE * jax.nn.one_hot(actions.T, 3), rewards=SURE * jax.nn.one_hot(rewards.T + 1, 3))
  trajectory = imagine(world.params, *start, forced)
  np.testing.assert_array_equal(trajectory.actions, actions)
  np.testing.assert_array_equal(trajectory.rewards, rewards)


def test_the_trajectory_is_what_its_parts_say_step_by_step(world, start, noise, imagine, jit):
  past, past_actions, _ = start
  params = world.params
  trajectory = imagine(params, *start, noise)
  sample, predict, apply = (jit(f) for f in (world.dynamics.sample, world.reward_end.predict, world.actor_critic.apply))
  np.testing.assert_array_equal(trajectory.latents[:, 0], past[:, -1])
  _, _, reward_end_state = predict(
    params["reward_end"], past[:, :-1], past_actions, past[:, 1:], world.reward_end.initial_state(B)
  )
  _, _, policy_state = apply(params["actor_critic"], past[:, :-1], world.actor_critic.initial_state(B))
  np.testing.assert_allclose(trajectory.policy_state.hidden, policy_state.hidden, atol=1e-5)
  np.testing.assert_allclose(trajectory.policy_state.cell, policy_state.cell, atol=1e-5)
  frames, actions = past, past_actions
  for t in range(T):
    current = frames[:, -1:]
    logits, values, policy_state = apply(params["actor_critic"], current, policy_state)
    np.testing.assert_allclose(trajectory.values[:, t], values[:, 0], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(trajectory.actions[:, t], np.argmax(logits[:, 0] + noise.actions[t], axis=-1))
    actions = jnp.concatenate([actions, trajectory.actions[:, t : t + 1]], axis=1)
    draws = jax.tree.map(lambda x, t=t: x[t], noise.frames)
    following = sample(params["denoiser"], frames[:, -L:], actions[:, -L:], draws)
    np.testing.assert_allclose(trajectory.latents[:, t + 1], following, rtol=1e-3, atol=1e-3)
    following = trajectory.latents[:, t + 1 : t + 2]
    rewards, ends, reward_end_state = predict(
      params["reward_end"], current, actions[:, -1:], following, reward_end_state
    )
    np.testing.assert_allclose(trajectory.reward_logits[:, t], rewards[:, 0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(trajectory.end_logits[:, t], ends[:, 0], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(trajectory.rewards[:, t], np.argmax(rewards[:, 0] + noise.rewards[t], -1) - 1)
    np.testing.assert_array_equal(trajectory.ends[:, t], np.argmax(ends[:, 0] + noise.ends[t], -1) == 1)
    frames = jnp.concatenate([frames, following], axis=1)


def test_padding_leaves_the_policy_as_at_the_start_of_an_episode(world, start, noise, imagine):
  past, past_actions, _ = start
  mask = jnp.asarray([[False, True], [True, True], [False, True]])
  state = imagine(world.params, past, past_actions, mask, noise).policy_state
  for x in state:
    np.testing.assert_array_equal(x[jnp.asarray([0, 2])], 0)
    assert np.abs(x[1]).max() > 1e-3


def test_the_reward_end_model_is_burned_in_on_padding_too(world, start, noise, imagine):
  # It saw padding in training as well, so the mask must not change what it says.
  past, past_actions, mask = start
  quiet = noise._replace(actions=SURE * jax.nn.one_hot(jnp.zeros((T, B), int), 3))
  masked = imagine(world.params, past, past_actions, mask.at[:, 0].set(False), quiet)
  plain = imagine(world.params, past, past_actions, mask, quiet)
  np.testing.assert_array_equal(masked.rewards, plain.rewards)
  np.testing.assert_array_equal(masked.ends, plain.ends)
  np.testing.assert_array_equal(masked.latents, plain.latents)


def test_one_frame_needs_no_burn_in(world, jit, make_dynamics, random_params, start):
  dynamics = make_dynamics(world.codec, conditioning_frames=1)
  params = {**world.params, "denoiser": random_params(dynamics.init)}
  noise = jit(lambda keys: imagination.draw_noise(dynamics, keys, horizon=1, num_actions=3))(
    jax.random.split(jax.random.key(0), B)
  )
  trajectory = jit(
    lambda past, actions, mask: imagination.imagine(
      dynamics, world.reward_end, world.actor_critic, params, past, actions, mask, noise
    )
  )(start[0][:, :1], jnp.zeros((B, 0), jnp.int32), jnp.ones((B, 1), bool))
  assert trajectory.latents.shape == (B, 2, *world.codec.latent_shape)
  np.testing.assert_array_equal(trajectory.policy_state.hidden, 0)


def test_unrolling_changes_nothing_but_the_program(world, start, noise, imagine):
  plain, unrolled = (imagine(world.params, *start, noise, unroll=unroll) for unroll in (1, 3))
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(unrolled), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_given_actions_are_taken_instead_of_the_policys(world, start, noise, imagine):
  given = jnp.asarray([[0, 1, 2, 0], [2, 2, 1, 1], [1, 0, 0, 2]], jnp.int32)
  trajectory = imagine(world.params, *start, noise, given)
  forced = imagine(world.params, *start, noise._replace(actions=SURE * jax.nn.one_hot(given.T, 3)))
  np.testing.assert_array_equal(trajectory.actions, given)
  for a, b in zip(jax.tree.leaves(trajectory), jax.tree.leaves(forced), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_reserve_begins_after_the_first_end_and_is_cut_at_the_second(world, start, noise, imagine):
  rng = np.random.default_rng(1)
  past, past_actions, mask = start
  other = jnp.asarray(rng.standard_normal(past.shape), jnp.float32)
  other_actions, other_mask = jnp.asarray([[2], [2], [0]]), mask.at[0, 0].set(False)
  ends = [[False, True, False, True], [False] * 4, [True, True, False, False]]
  noise = forced_ends(noise, ends)
  both = imagine(
    world.params,
    jnp.concatenate([past, other]),
    jnp.concatenate([past_actions, other_actions]),
    jnp.concatenate([mask, other_mask]),
    noise,
  )
  plain = imagine(world.params, past, past_actions, mask, noise)
  np.testing.assert_array_equal(both.ends, ends)
  np.testing.assert_array_equal(both.restarts, [[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
  np.testing.assert_array_equal(both.alive, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
  # As without a reserve up to the first end and where there is none; the reserve's last frame follows.
  np.testing.assert_allclose(both.latents[0, :2], plain.latents[0, :2], atol=1e-5)
  np.testing.assert_allclose(both.latents[1], plain.latents[1], atol=1e-4)
  np.testing.assert_array_equal(both.latents[0, 2], other[0, -1])
  np.testing.assert_array_equal(both.latents[2, 1], other[2, -1])
  np.testing.assert_array_equal(both.actions[0, :2], plain.actions[0, :2])
  # What follows is what the reserve alone would have led to, with the draws of those steps.
  later = jax.tree.map(lambda x: jnp.concatenate([x[2:], x[2:]]), noise)
  alone = imagine(world.params, other, other_actions, other_mask, later)
  np.testing.assert_array_equal(both.actions[0, 2:], alone.actions[0, :2])
  np.testing.assert_array_equal(both.rewards[0, 2:], alone.rewards[0, :2])
  np.testing.assert_allclose(both.latents[0, 2:], alone.latents[0, :3], rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(both.values[0, 2:], alone.values[0, :2], rtol=1e-3, atol=1e-4)
  for mine, theirs in zip(both.restart_state, alone.policy_state, strict=True):
    np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_rows_that_fit_no_trajectory_are_refused(world, start, noise):
  past, past_actions, mask = start
  with pytest.raises(ValueError, match="2 rows"):
    imagination.imagine(
      world.dynamics, world.reward_end, world.actor_critic, world.params, past[:2], past_actions[:2], mask[:2], noise
    )
