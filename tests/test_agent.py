import itertools

import jax
import numpy as np
import pytest
from refusals import refused

import jedi_jax
from jedi_jax import envs
from jedi_jax.agent import load_agent, make_act
from jedi_jax.config import make_config
from jedi_jax.envs.catch import SPEC
from jedi_jax.evaluation.evaluate import describe_results
from jedi_jax.runs import workdir

N = 4


@pytest.fixture(scope="module")
def agent(finished_run):
  return load_agent(finished_run)


def frames(seed=0, n=N):
  return np.random.default_rng(seed).integers(256, size=(n, *SPEC.observation_shape), dtype=np.uint8)


def test_shapes_and_types(agent, finished_run):
  state = agent.initial_state(N)
  assert all(not np.any(x) for x in state)
  actions, new = agent.act(frames(), state, jax.random.key(0))
  assert (actions.shape, actions.dtype) == ((N,), np.int32)
  assert np.all((actions >= 0) & (actions < SPEC.num_actions))
  for x, y in zip(new, state, strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype) == ((N, 8), np.float32)
    assert np.any(x)
  assert agent.config == jedi_jax.load_agent(finished_run).config
  assert agent.model.spec == SPEC


def test_the_same_key_gives_the_same_actions(agent):
  state = agent.initial_state(N)
  draws = [np.asarray(agent.act(frames(), state, jax.random.key(k))[0]) for k in (1, 1, *range(2, 30))]
  np.testing.assert_array_equal(draws[0], draws[1])
  assert any(np.any(d != draws[0]) for d in draws[2:])  # Actions are sampled.


def test_one_key_serves_a_loop(agent):
  state, key = agent.initial_state(N), jax.random.key(3)
  draws = [np.asarray(agent.act(frames(), state, key, count=count)[0]) for count in (5, 5, *range(6, 30))]
  np.testing.assert_array_equal(draws[0], draws[1])
  assert any(np.any(d != draws[0]) for d in draws[2:])
  for count in (-1, np.int64(-1), np.int64(2**32)):
    with pytest.raises(OverflowError, match=str(count)):
      agent.act(frames(), state, key, count=count)
  with pytest.raises(TypeError, match="float"):
    agent.act(frames(), state, key, count=2.5)


def test_environments_do_not_mix(agent):
  state = agent.initial_state(N)
  _, together = agent.act(frames(), state, jax.random.key(0))
  changed = frames()
  changed[2] = 255 - changed[2]
  _, other = agent.act(changed, state, jax.random.key(0))
  same = np.all(np.asarray(together.hidden) == np.asarray(other.hidden), axis=1)
  np.testing.assert_array_equal(same, [True, True, False, True])


def test_restart_clears_the_state_where_it_is_true(agent):
  fresh = agent.initial_state(N)
  _, used = agent.act(frames(1), fresh, jax.random.key(0))
  restart = np.array([True, False, True, False])
  _, cleared = agent.act(frames(2), used, jax.random.key(1), restart=restart)
  _, same = agent.act(frames(2), used, jax.random.key(1), restart=restart.tolist())
  jax.tree.map(np.testing.assert_array_equal, same, cleared)
  _, from_fresh = agent.act(frames(2), fresh, jax.random.key(1))
  _, from_used = agent.act(frames(2), used, jax.random.key(1))
  for got, new, old in zip(cleared, from_fresh, from_used, strict=True):
    np.testing.assert_array_equal(got, np.where(restart[:, None], new, old))
    assert np.any(np.asarray(new) != np.asarray(old))


def test_epsilon_one_is_uniform(agent):
  # Parameters with which the policy always chooses action 0.
  params = jax.tree.map(np.array, agent.params)
  params["actor_critic"]["actor"]["bias"][:] = [1e4, 0.0, 0.0]
  certain = jedi_jax.Agent(agent.model, params)
  state = certain.initial_state(N)
  counts = {}
  for epsilon in (0.0, 1.0):
    draws = [np.asarray(certain.act(frames(), state, jax.random.key(k), epsilon=epsilon)[0]) for k in range(150)]
    counts[epsilon] = np.bincount(np.ravel(draws), minlength=3)
  np.testing.assert_array_equal(counts[0.0], [600, 0, 0])
  # Standard deviation of a count is sqrt(600 / 3 * 2 / 3) = 11.5.
  assert np.all(np.abs(counts[1.0] - 200) < 60)


def test_random_actions_are_held(agent):
  # The policy always chooses action 0, so runs of 1 and 2 are random actions.
  params = jax.tree.map(np.array, agent.params)
  params["actor_critic"]["actor"]["bias"][:] = [1e4, 0.0, 0.0]
  observations, restart, state = np.zeros((256, 24, 24, 3), np.uint8), np.zeros(256, bool), agent.initial_state(256)
  lengths = {}
  for max_hold in (1, 3):
    act = jax.jit(make_act(agent.model, max_hold=max_hold))
    actions = np.stack(
      [
        act(params, observations, state, restart, jax.random.key(5), np.uint32(t + 10), np.float32(0.02))[0]
        for t in range(100)
      ]
    )
    runs = [len(list(run)) for env in actions.T for action, run in itertools.groupby(env.tolist()) if action]
    lengths[max_hold] = np.bincount(runs, minlength=4)
  # 341 are expected, of one step each; few follow each other.
  assert 250 < lengths[1][1] < 430
  assert lengths[1][2:].sum() < 25
  # At most 3 steps long, 36, 9 and 4 of 49 are held for 1, 2 and 3.
  np.testing.assert_allclose(lengths[3][1:4] / lengths[3].sum(), np.array([36, 9, 4]) / 49, atol=0.08)
  assert lengths[3][4:].sum() < 5


def test_wrong_observations_are_refused(agent):
  state, key = agent.initial_state(N), jax.random.key(0)
  refused(lambda: agent.act(frames()[0], state, key), "(24, 24, 3)", "(N, 24, 24, 3)")
  refused(lambda: agent.act(frames()[:, :20], state, key), "(4, 20, 24, 3)")
  refused(lambda: agent.act(frames().transpose(0, 3, 1, 2), state, key), "(4, 3, 24, 24)")
  refused(lambda: agent.act(frames().astype(np.float32), state, key), "float32", "uint8")
  refused(lambda: agent.act(frames().astype(np.int64), state, key), "int64")
  refused(lambda: agent.act(frames(n=2), state, key), "4 environments", "have 2", "initial_state")


def test_observations_in_a_list_are_refused(agent):
  refused(lambda: agent.act(frames().tolist(), agent.initial_state(N), jax.random.key(0)), "int64", "uint8")


def test_parameters_are_those_of_the_last_checkpoint_and_the_best(agent, finished_run, tiny):
  best = load_agent(finished_run, which="best")
  assert jax.tree.structure(best.params) == jax.tree.structure(agent.params)
  like = jax.eval_shape(tiny.model.init, jax.random.key(0))
  for x, y in zip(jax.tree.leaves(agent.params), jax.tree.leaves(like), strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
  leaves = zip(jax.tree.leaves(best.params), jax.tree.leaves(agent.params), strict=True)
  [name] = (p.name for p in (finished_run / "checkpoints" / "best").iterdir())
  assert any(np.any(x != y) for x, y in leaves) == (name != "5")


def test_there_must_be_a_run(tmp_path, finished_run):
  refused(lambda: load_agent(tmp_path), "holds no run", str(tmp_path))
  refused(lambda: load_agent(tmp_path / "missing"), "holds no run")
  refused(lambda: load_agent(finished_run, which="worst"), "no checkpoint", "worst")


def test_a_run_without_a_checkpoint(tmp_path, tiny):
  config = make_config(env="catch", preset="debug", overrides=tiny.networks)
  workdir.prepare(tmp_path, config, SPEC)
  refused(lambda: load_agent(tmp_path), "no checkpoint")


def test_evaluation_repeats_itself(agent):
  def play(seed):
    return jedi_jax.evaluate(agent, "catch", episodes=8, num_envs=N, seed=seed, max_episode_steps=100)

  results = play(11)
  assert play(11) == results
  assert any(play(seed) != results for seed in (12, 13, 14))
  assert [r.env for r in results] == [0, 0, 1, 1, 2, 2, 3, 3]
  assert {r.length for r in results} == {9}
  summary = describe_results("catch", results)
  assert summary["mean_return"] == np.mean([r.return_ for r in results])


def test_the_player_clears_its_state_at_restarts(agent):
  env = envs.make("catch", num_envs=N, seed=1, life_loss_ends=False)
  observations = env.reset()
  env.close()
  play = agent.player(N, seed=5)
  first = play(observations, np.ones(N, bool))
  again = agent.player(N, seed=5)
  np.testing.assert_array_equal(again(observations, np.ones(N, bool)), first)


def test_a_player_says_what_is_wrong(agent):
  refused(lambda: agent.player(0, seed=1), "num_envs is 0")
  play = agent.player(N, seed=1)
  refused(lambda: play(frames(n=2), np.ones(2, bool)), "4 environments", "have 2", "player")
  refused(lambda: play(frames(), True), "restart has shape ()", "(4,)")
  refused(lambda: play(frames(), np.ones(3, bool)), "restart has shape (3,)", "(4,)")


def test_players_are_apart_and_repeat_themselves(agent):
  restart = np.ones(N, bool)

  def games(play):
    return np.stack([play(frames(i), restart) for i in range(20)])

  first, second, other = (agent.player(N, seed) for seed in (5, 5, 6))
  np.testing.assert_array_equal(games(first), games(second))
  assert np.any(games(agent.player(N, 5)) != games(other))
  assert games(first).dtype == np.int32
