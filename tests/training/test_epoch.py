import itertools

import chex
import jax
import numpy as np
import pytest

from jedi_jax.training.state import make_init

PHASES = ("denoiser", "reward_end", "actor_critic", "probe")
COUNTS = (4, 4, 3, 3)
LEARNED = {
  "denoiser": ("encoder", "denoiser"),
  "reward_end": ("encoder", "reward_end"),
  "actor_critic": ("actor_critic",),
  "probe": ("probe",),
}


def counts(*numbers):
  return {name: np.int32(number) for name, number in itertools.zip_longest(PHASES, numbers, fillvalue=0)}


def run(tiny, *calls, devices=1, seed=0):
  """Calls the epoch; the final state and the sums of each call, on the host."""
  state, replay = tiny.state(seed, devices), tiny.replay(devices)
  sums = []
  for numbers in calls:
    asked = {name: count for name, count in counts(*numbers).items() if name in tiny.optimizers}
    state, result = tiny.epoch(devices)(state, replay, asked)
    sums.append(tiny.devices(devices).to_host(result))
  return tiny.devices(devices).to_host(state), sums


@pytest.fixture(scope="module")
def one(tiny):
  return run(tiny, COUNTS)


@pytest.fixture(scope="module")
def four(tiny):
  return run(tiny, COUNTS, devices=4)


@pytest.fixture(scope="module")
def start(tiny):
  return tiny.devices().to_host(tiny.state())


def movement(a, b):
  """Largest change of any number of a component."""
  return max(float(np.max(np.abs(x - y))) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def without_movement(sums):
  """Removes, from the sums of a call, the figure that belongs to the whole call; returns it too."""
  rest = {name: x for name, x in sums["denoiser"].items() if name != "encoder_movement"}
  return {**sums, "denoiser": rest}, float(sums["denoiser"]["encoder_movement"])


def test_an_epoch_trains_every_component(one, start):
  state, [sums] = one
  for name in ("encoder", *PHASES):
    assert movement(state.params[name], start.params[name]) > 1e-3, name
  assert {name: int(x) for name, x in state.updates.items()} == dict(zip(PHASES, COUNTS, strict=True))
  np.testing.assert_array_equal(state.key, start.key)
  assert set(sums) == set(PHASES)
  for leaf in jax.tree.leaves((state.params, sums)):
    assert leaf.dtype == np.float32
    assert np.all(np.isfinite(leaf))


def test_one_and_four_devices_agree(one, four, start):
  for name in ("encoder", *PHASES):
    chex.assert_trees_all_close(four[0].params[name], one[0].params[name], rtol=1e-3, atol=2e-5)
    # The tolerance means something: the parameters moved far more.
    assert movement(one[0].params[name], start.params[name]) > 50 * 2e-5
  chex.assert_trees_all_close(four[0].optimizers, one[0].optimizers, rtol=2e-3, atol=2e-5)
  chex.assert_trees_all_equal(four[0].updates, one[0].updates)


def test_one_and_four_devices_agree_on_the_metrics(one, four):
  # Ratios too: each is over the weights of the whole batch, not a mean of the devices' ratios.
  for phase in PHASES:
    assert set(four[1][0][phase]) == set(one[1][0][phase])
    for name, value in one[1][0][phase].items():
      np.testing.assert_allclose(four[1][0][phase][name], value, rtol=2e-3, atol=1e-4, err_msg=f"{phase}/{name}")


def test_all_devices_hold_the_same_state(tiny):
  state, sums = tiny.epoch(4)(tiny.state(devices=4), tiny.replay(4), counts(1, 1, 1))
  for x in jax.tree.leaves((state, sums)):
    copies = [np.asarray(shard.data) for shard in x.addressable_shards]
    assert len(copies) == 4
    for copy in copies[1:]:
      np.testing.assert_array_equal(copy, copies[0])


def test_the_fused_call_is_its_phases_one_by_one(tiny, one):
  state, sums = run(tiny, (4,), (0, 4), (0, 0, 3), (0, 0, 0, 3))
  chex.assert_trees_all_equal(state, one[0])
  fused, movement = without_movement(one[1][0])
  sums, movements = zip(*map(without_movement, sums), strict=True)
  # The encoder moves in the two phases that train it. A path is not shorter than the way from its start to its end.
  assert min(movements[:2]) > 0
  assert movements[2:] == (0, 0)
  assert 0 < movement < 1.1 * sum(movements)
  for phase, separate in zip(PHASES, sums, strict=True):
    chex.assert_trees_all_equal(separate[phase], fused[phase])
    for other in set(PHASES) - {phase}:
      assert not any(np.any(x) for x in jax.tree.leaves(separate[other]))


def test_a_phase_in_parts_is_the_whole_phase(tiny, one):
  state, _ = run(tiny, (1,), (3,), (0, 2), (0, 2), (0, 0, 3), (0, 0, 0, 3))
  chex.assert_trees_all_equal(state, one[0])


def test_a_phase_changes_its_own_components_alone(tiny, start):
  for i, phase in enumerate(PHASES):
    state, _ = run(tiny, tuple(3 * (i == j) for j in range(4)))
    for name in start.params:
      assert (movement(state.params[name], start.params[name]) > 0) == (name in LEARNED[phase]), (phase, name)
    for name in set(PHASES) - {phase}:
      chex.assert_trees_all_equal(state.optimizers[name], start.optimizers[name])


def test_the_probe_changes_nothing_of_the_agent(toy, toy_without_probe):
  # Between the other phases too: the probe's updates of one epoch stand before the next one's.
  state, sums = run(toy, (2, 2, 1, 2), (2, 2, 2, 1))
  other, other_sums = run(toy_without_probe, (2, 2, 1), (2, 2, 2))
  assert set(state.params) - set(other.params) == {"probe"}
  chex.assert_trees_all_equal({name: state.params[name] for name in other.params}, other.params)
  chex.assert_trees_all_equal({name: state.optimizers[name] for name in other.optimizers}, other.optimizers)
  for mine, theirs in zip(sums, other_sums, strict=True):
    chex.assert_trees_all_equal({name: mine[name] for name in theirs}, theirs)
  # Nor does the number of its updates.
  chex.assert_trees_all_equal(
    run(toy, (4, 4, 3, 0))[0].params | {"probe": 0}, run(toy, COUNTS)[0].params | {"probe": 0}
  )


def test_the_probe_has_parameters_of_its_own_and_changes_no_others(tiny, tiny_without_probe):
  params, others = (model.init(jax.random.key(1)) for model in (tiny.model, tiny_without_probe.model))
  assert set(params) - set(others) == {"probe"}
  chex.assert_trees_all_equal({name: params[name] for name in others}, others)


def test_the_movement_is_that_of_the_latents_of_replay(tiny, one, start):
  """On all frames of the replay, of which the epoch takes some."""
  replay = tiny.devices().to_host(tiny.replay())
  frames = np.asarray(replay.observations(0, slice(0, 64)))[None]
  encode = jax.jit(lambda params: tiny.model.encode(params, frames, np.ones((1, 64), bool))[0])
  old, new = (np.asarray(encode(state.params)) for state in (start, one[0]))
  expected = np.sqrt(np.mean((new - old) ** 2) / np.mean((new[1:] - new[:-1]) ** 2))
  assert without_movement(one[1][0])[1] == pytest.approx(expected, rel=0.1)


def test_no_updates_leave_the_state_as_it_is(tiny, start):
  state, [sums] = run(tiny, (0, 0, 0))
  chex.assert_trees_all_equal(state, start)
  assert not any(np.any(x) for x in jax.tree.leaves(sums))


def test_the_first_update_of_the_warm_up_has_no_step(tiny, start):
  state, _ = run(tiny, (1, 1, 1, 1))
  chex.assert_trees_all_equal(state.params, start.params)
  assert {int(x) for x in state.updates.values()} == {1}


def test_the_same_seed_repeats_bit_for_bit_and_others_differ(tiny, one):
  state, sums = run(tiny, COUNTS)
  chex.assert_trees_all_equal((state, sums), one)
  # Another key and the same parameters: only the batches and the noise differ.
  other = tiny.state().replace(key=tiny.state(seed=1).key)
  other, _ = tiny.epoch()(other, tiny.replay(), counts(*COUNTS))
  for name in ("encoder", *PHASES):
    assert movement(tiny.devices().to_host(other.params[name]), state.params[name]) > 1e-5


def test_the_state_is_donated_and_the_replay_is_not(tiny):
  state, replay = tiny.state(), tiny.replay()
  new, _ = tiny.epoch()(state, replay, counts(1, 0, 0))
  assert all(x.is_deleted() for x in jax.tree.leaves(state))
  assert not any(x.is_deleted() for x in jax.tree.leaves((new, replay)))


def test_nothing_in_the_call_returns_to_the_host_and_sums_are_small(tiny):
  text = tiny.lowered_epoch(tiny.devices()).as_text()
  for word in ("callback", "outfeed", "infeed"):
    assert word not in text
  assert "tf.aliasing_output" in text or "jax.buffer_donor" in text
  _, sums = tiny.epoch()(tiny.state(), tiny.replay(), counts(0, 0, 0))
  assert sum(x.size for x in jax.tree.leaves(sums)) < 1000


def test_init_can_be_vmapped_and_shaped(tiny):
  init = make_init(tiny.model, tiny.optimizers)
  keys = jax.random.split(jax.random.key(3), 2)
  quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # A third of the time.
  many = jax.jit(jax.vmap(init), compiler_options=quick)(keys)
  for i in range(2):
    single = tiny.init(keys[i])
    chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], many), single, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(init, keys[i]), single)
  assert movement(jax.tree.map(lambda x: x[0], many).params, jax.tree.map(lambda x: x[1], many).params) > 1e-2


def test_a_fresh_state_has_no_history(start):
  assert {int(x) for x in start.updates.values()} == {0}
  assert set(start.params) == {"encoder", *PHASES}
  assert set(start.optimizers) == set(PHASES)
  for leaf in jax.tree.leaves(start.optimizers):
    assert not np.any(leaf)
