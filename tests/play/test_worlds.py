import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedi_jax.agent import Agent
from jedi_jax.envs.catch import PADDLE_COLOR
from jedi_jax.errors import UserError
from jedi_jax.models import imagination, phases
from jedi_jax.play.worlds import Dream, Game, draw


@pytest.fixture
def game(agent):
  game = Game(agent, seed=7)
  yield game
  game.close()


def test_steps_of_a_dream_are_those_of_imagination(agent, game):
  game.reset()
  game.step(0)
  start = game.start()
  actions = [0, 1, 1, 0]
  dream = Dream(agent, seed=5)
  first = dream.reset(start)
  moments = [dream.step(action) for action in actions]

  keys = [jax.random.fold_in(jax.random.key(5), i)[None] for i in range(4)]
  draws = [imagination.draw_noise(agent.model.dynamics, key, horizon=1, num_actions=3) for key in keys]
  parts = agent.model.parts
  trajectory = imagination.imagine(
    parts.dynamics,
    parts.reward_end,
    parts.actor_critic,
    phases.imagining(agent.params),
    agent.model.encode(agent.params, start.observations, start.mask),
    start.actions[:, :-1],
    start.mask,
    jax.tree.map(lambda *parts: jnp.concatenate(parts), *draws),
    actions=jnp.asarray([actions]),
  )
  images = agent.model.decode(agent.params, trajectory.latents)
  rewards = jax.nn.softmax(trajectory.reward_logits[0]) @ jnp.asarray([-1.0, 0.0, 1.0])
  np.testing.assert_array_equal(first.frame, start.observations[0, -1])
  np.testing.assert_allclose([first.value, *(m.value for m in moments[:-1])], trajectory.values[0], atol=1e-5)
  np.testing.assert_allclose([m.reward for m in moments], rewards, atol=1e-5)
  for moment, image in zip(moments, images[0, 1:], strict=True):
    assert np.abs(moment.frame.astype(int) - image).max() <= 1  # Rounded to 256 levels.
    np.testing.assert_allclose(moment.probabilities.sum(), 1.0, atol=1e-5)


def test_an_end_is_drawn_from_its_probability(agent, game):
  game.reset()
  dream = Dream(agent)
  assert not dream.reset(game.start()).over
  going, ended = dream.step(1), dream.step(2)
  assert (going.over, ended.over) == (False, True)
  assert going.end < 0.01
  assert ended.end > 0.99


def test_another_number_of_sampler_steps_gives_other_frames_of_the_same_parameters(agent, game):
  game.reset()
  start = game.start()
  values = {}
  for steps in (2, 4, 2):
    dream = Dream(agent, seed=1)
    dream.sampler_steps = steps
    assert dream.sampler_steps == steps
    dream.reset(start)
    values.setdefault(steps, []).append(dream.step(1).reward)  # The untrained value is 0.
  assert values[2][0] == values[2][1] != values[4][0]


def test_a_game_is_played_to_its_end_and_another_follows(game, agent):
  first = game.reset()
  moments = [game.step(1) for _ in range(9)]
  assert [m.over for m in moments] == [False] * 8 + [True]
  assert moments[-1].end == 1.0
  assert abs(moments[-1].reward) == 1.0
  following = game.resume()
  assert not following.over
  start = game.start()
  np.testing.assert_array_equal(start.mask, [[False, True]])
  np.testing.assert_array_equal(start.observations[0, -1], following.frame)
  np.testing.assert_allclose(following.value, game.reset().value, rtol=1e-6)  # It begins with an empty state.
  assert first.frame.shape == (24, 24, 3)


def test_the_start_of_a_dream_has_the_frames_and_actions_of_the_game(game):
  frames = [game.reset().frame]
  frames += [game.step(action).frame for action in (0, 2, 0)]
  start = game.start()
  np.testing.assert_array_equal(start.observations[0], frames[-2:])
  np.testing.assert_array_equal(start.actions, [[0, 0]])
  assert np.all(start.mask)
  paddles = [np.argwhere((frame == PADDLE_COLOR).all(-1))[0, 1] for frame in frames]
  assert paddles[1] < paddles[0]
  assert paddles[2] > paddles[1]


def test_the_policy_plays_first(game):
  game.reset(lead=3)
  assert np.all(np.asarray(game.start().mask))
  game.reset(lead=9)  # A game has nine steps, so the next one follows.
  np.testing.assert_array_equal(game.start().mask, [[False, True]])


def test_agents_that_cannot_dream_are_refused(agent, tiny_without_probe):
  with pytest.raises(UserError, match="decoder"):
    Dream(Agent(tiny_without_probe.model, agent.params, tiny_without_probe.config))
  with pytest.raises(UserError, match="configuration"):
    Dream(Agent(agent.model, agent.params))
  with pytest.raises(UserError, match="configuration"):
    Game(Agent(agent.model, agent.params), seed=0)


def test_actions_are_drawn_even_from_numbers_that_are_not_finite():
  random = np.random.default_rng(0)
  assert draw(random, np.asarray([0.0, 1.0, 0.0])) == 1
  assert {draw(random, np.full(3, np.nan)) for _ in range(50)} == {0, 1, 2}
