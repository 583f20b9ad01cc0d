import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedi_jax import envs
from jedi_jax.config import CollectConfig
from jedi_jax.errors import UserError
from jedi_jax.training.collector import CHUNK_SLOTS, Collector
from jedi_jax.training.run import epsilon
from jedi_jax.types import EnvSpec, EnvStep, LstmState

N = 3
MAX_CALLS = 200


class Policy:
  """A recurrent policy that depends on everything it is given, and records `restart` of every call."""

  def __init__(self):
    self.restarts = []
    self._act = jax.jit(self._compute)

  @staticmethod
  def _compute(params, observations, state, restart, key, count, epsilon):
    hidden = jnp.where(restart[:, None], 0.0, state.hidden)
    seen = jnp.mean(observations.astype(jnp.float32), axis=(1, 2)) / 64.0
    hidden = jnp.tanh(0.7 * hidden + seen @ params)
    actions = jax.random.categorical(jax.random.fold_in(key, count), 5.0 * hidden)
    return actions.astype(jnp.int32), LstmState(hidden, state.cell + epsilon)

  def __call__(self, params, observations, state, restart, key, count, epsilon):
    self.restarts.append(np.array(restart))
    return self._act(params, observations, state, restart, key, count, epsilon)


def collector(policy=None, *, seed=0, env_seed=5):
  env = envs.make("catch", num_envs=N, seed=env_seed, life_loss_ends=True)
  policy = policy or Policy()
  initial = LstmState(jnp.zeros((N, 3)), jnp.zeros((N, 3)))
  return Collector(env, policy, initial_state=initial, seed=seed, epsilon=lambda steps: 0.25, max_calls=MAX_CALLS)


PARAMS = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)


def collect(collector, steps, check=lambda: None):
  """The chunks' real slots joined, as a list of rows for each stream, and the statistics."""
  chunks, met = collector.collect(PARAMS, [], lambda replay, chunk: [*replay, chunk], steps, check)
  streams = [[] for _ in range(N)]
  for chunk in chunks:
    assert chunk.actions.shape == (N, CHUNK_SLOTS)
    for i in range(N):
      for k in range(chunk.count[i]):
        row = [getattr(chunk, name)[i, k] for name in ("actions", "rewards", "ends", "first", "final")]
        streams[i].append((*(x.item() for x in row), chunk.frames[i, k].tobytes()))
  return streams, met


def test_steps_are_counted_over_all_environments():
  c, counts = collector(), []
  assert c.env_steps == 0
  streams, met = collect(c, 30, lambda: counts.append(c.env_steps))
  assert c.env_steps == met.steps == 30
  assert counts == list(range(3, 31, 3))
  # Ten steps each, and the final frame of the game of nine.
  assert [len(rows) for rows in streams] == [11, 11, 11]
  collect(c, 6)
  assert c.env_steps == 36


def test_games_rewards_and_restarts_of_catch():
  policy = Policy()
  streams, met = collect(collector(policy), 60)  # 20 steps each: two games of nine and two steps.
  assert len(met.returns) == len(met.lengths) == 2 * N
  assert set(met.lengths) == {9}
  assert set(met.returns) <= {-1.0, 1.0}
  wins = sum(r > 0 for r in met.returns)
  assert met.reward_counts == (2 * N - wins, 60 - 2 * N, wins)
  expected = np.zeros((20, N), bool)
  expected[[0, 9, 18]] = True
  np.testing.assert_array_equal(policy.restarts, expected)
  for rows in streams:
    firsts = [k for k, row in enumerate(rows) if row[3]]
    finals = [k for k, row in enumerate(rows) if row[4]]
    ends = [k for k, row in enumerate(rows) if row[2]]
    assert firsts == [0, 10, 20]
    assert finals == [9, 19]
    assert ends == [8, 18]
    assert {row[0] for row in rows} <= {0, 1, 2}


def test_returns_span_two_collections_and_no_slot_depends_on_the_split():
  whole, met = collect(collector(), 60)
  c = collector()
  parts = [collect(c, steps) for steps in (15, 3, 30, 12)]
  joined = [[row for part in parts for row in part[0][i]] for i in range(N)]
  assert joined == whole
  assert [x for part in parts for x in part[1].returns] == met.returns
  assert [x for part in parts for x in part[1].lengths] == met.lengths
  assert sum(part[1].steps for part in parts) == 60


def test_long_collections_flush_full_chunks():
  streams, _ = collect(collector(), 3 * 150)
  assert [len(rows) for rows in streams] == [150 + 150 // 9] * N  # More than one chunk of 128.
  assert len(streams[0]) > CHUNK_SLOTS


def test_seeds_matter():
  base = collect(collector(), 60)[0]
  assert collect(collector(), 60)[0] == base
  assert collect(collector(seed=1), 60)[0] != base
  assert collect(collector(env_seed=6), 60)[0] != base


def test_a_restored_collector_goes_on_identically():
  straight = collector()
  collect(straight, 60)
  saved = straight.save()
  frozen = jax.tree.map(np.copy, saved)
  expected, expected_met = collect(straight, 90)
  jax.tree.map(np.testing.assert_array_equal, saved, frozen)  # Collecting on does not change what was saved.

  resumed, counts = collector(), []
  resumed.restore(saved, lambda: counts.append(resumed.env_steps))
  assert counts == list(range(3, 61, 3))
  assert resumed.env_steps == 60
  got, met = collect(resumed, 90)
  assert got == expected
  assert met == expected_met  # Also the return of the game that was under way.
  for a, b in zip(jax.tree.leaves(straight.save()), jax.tree.leaves(resumed.save()), strict=True):
    np.testing.assert_array_equal(a, b)


def test_what_is_saved_has_fixed_shapes_and_holds_the_actions():
  c = collector()
  before = c.save()
  streams, _ = collect(c, 30)
  after = c.save()
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    assert isinstance(b, np.ndarray)
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
  assert after["calls"] == 10
  for i in range(N):
    taken = [row[0] for row in streams[i] if not row[4]]
    np.testing.assert_array_equal(after["actions"][:10, i], taken)
  assert not after["actions"][10:].any()


def test_a_fresh_collector_restores_from_a_fresh_one():
  resumed = collector()
  resumed.restore(collector().save())
  assert collect(resumed, 30)[0] == collect(collector(), 30)[0]


def test_an_environment_that_does_not_repeat_itself_is_noticed():
  c = collector()
  collect(c, 60)
  with pytest.raises(UserError, match="did not repeat its steps") as caught:
    collector(env_seed=77).restore(c.save())
  assert "\n" not in str(caught.value)


class Fake:
  """Two environments whose k-th step returns pictures of k; `wrong` replaces fields of a step."""

  num_envs, frames = 2, 0

  def __init__(self, num_actions, **wrong):
    self.spec = EnvSpec(num_actions, (1, 1, 1))
    self.wrong, self.taken = wrong, []

  def pictures(self):
    return np.full((2, 1, 1, 1), len(self.taken) % 256, np.uint8)

  def reset(self):
    return self.wrong.get("observations", self.pictures())

  def step(self, actions):
    assert actions.dtype == np.int32  # Of a resumed run too: 0 - 1 is 255 for small unsigned integers.
    self.taken.append(actions.tolist())
    no = np.zeros(2, bool)
    return EnvStep(self.pictures(), self.pictures(), np.zeros(2, np.float32), no, no, no)._replace(**self.wrong)


def fake_collector(env):
  def act(params, observations, state, restart, key, count, epsilon):
    return np.array([count % env.spec.num_actions, env.spec.num_actions - 1], np.int32), state

  state = LstmState(jnp.zeros((2, 1)), jnp.zeros((2, 1)))
  return Collector(env, act, initial_state=state, seed=0, epsilon=lambda steps: 0.0, max_calls=400)


@pytest.mark.parametrize(
  ("num_actions", "dtype"), [(1, np.uint8), (256, np.uint8), (257, np.uint16), (300, np.uint16), (65537, np.uint32)]
)
def test_the_log_holds_every_action(num_actions, dtype):
  env, again = Fake(num_actions), Fake(num_actions)
  c = fake_collector(env)
  c.collect(None, None, lambda replay, chunk: None, 2 * 310)
  saved = c.save()
  assert saved["actions"].dtype == dtype
  assert env.taken == [[k % num_actions, num_actions - 1] for k in range(310)]
  fake_collector(again).restore(saved)
  assert again.taken == env.taken


@pytest.mark.parametrize(
  ("name", "value", "part"),
  [
    ("observations", np.zeros((2, 1, 1, 1)), "reset returned observations as float64 (2, 1, 1, 1); expected uint8"),
    ("observations", np.zeros((1, 1, 1), np.uint8), "expected uint8 (2, 1, 1, 1)"),
    ("observation", np.zeros((2, 1, 1, 3), np.uint8), "step returned observation as uint8 (2, 1, 1, 3); expected"),
    ("next_observation", [0, 0], "step returned next_observation as list; expected uint8 (2, 1, 1, 1)"),
    ("reward", np.zeros(2), "step returned reward as float64 (2,); expected float32 (2,)"),
    ("end", np.zeros(2, np.int32), "step returned end as int32 (2,); expected bool (2,)"),
    ("truncated", False, "step returned truncated as bool; expected bool (2,)"),
    ("game_over", np.zeros((2, 1), bool), "expected bool (2,)"),
  ],
)
def test_arrays_of_another_shape_or_type_are_refused(name, value, part):
  with pytest.raises(UserError) as caught:
    fake_collector(Fake(3, **{name: value})).collect(None, None, lambda replay, chunk: None, 2)
  assert part in str(caught.value)
  assert "\n" not in str(caught.value)


def test_an_array_that_is_returned_twice_is_refused():
  pictures = np.zeros((2, 1, 1, 1), np.uint8)
  env = Fake(3, next_observation=pictures)
  env.reset = lambda: pictures
  with pytest.raises(UserError, match="return a new one"):
    fake_collector(env).collect(None, None, lambda replay, chunk: None, 2)


def test_epsilon_depends_on_the_steps_so_far():
  initial = LstmState(jnp.zeros((N, 3)), jnp.zeros((N, 3)))
  env = envs.make("catch", num_envs=N, seed=5, life_loss_ends=True)
  c = Collector(env, Policy(), initial_state=initial, seed=0, epsilon=float, max_calls=MAX_CALLS)
  collect(c, 2 * N)
  collect(c, N)
  np.testing.assert_array_equal(c.save()["state"].cell, 0 + N + 2 * N)


def test_epsilon_falls_in_a_line_and_then_stays():
  falling = CollectConfig(first_epsilon=0.5, epsilon=0.1, epsilon_steps=100)
  assert [epsilon(falling, steps) for steps in (0, 25, 100, 1_000)] == pytest.approx([0.5, 0.4, 0.1, 0.1])
  assert epsilon(CollectConfig(first_epsilon=0.5, epsilon=0.1), 0) == 0.1
