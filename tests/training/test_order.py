"""The orders of the world model's phases: one after the other, in turns, or in one update."""

import functools

import chex
import jax
import numpy as np
import optax
import pytest
import toy_model
from refusals import refused

from jedi_jax.config import make_config, override
from jedi_jax.envs.catch import SPEC
from jedi_jax.models.base import Phase
from jedi_jax.models.build import build
from jedi_jax.training import parallel
from jedi_jax.training.learner import Learner
from jedi_jax.training.loop import plan_calls
from jedi_jax.training.order import group_phases, owned_components
from jedi_jax.training.state import TrainState
from jedi_jax.training.updates import make_update

PHASES = ("denoiser", "reward_end", "actor_critic", "probe")


def learner(toy, order):
  made = Learner(override(toy.config, {"training.order": order}), SPEC, toy.devices(), build=toy.build)
  made.start([made.init(seed=0)], [toy.devices().to_host(toy.replay())])
  return made


@pytest.fixture(scope="module")
def joint(toy):
  """A joint learner before and after one update of the world model, and the sums."""
  made = learner(toy, "joint")
  before, _ = made.snapshot()
  [sums] = made.update({"denoiser": 3, "reward_end": 3, "actor_critic": 3})
  return before, made.snapshot()[0], sums, made


def phase(name, *components):
  return Phase(name=name, components=components, length=1, losses=lambda *_: None)


def test_groups_by_order():
  phases = [phase(name) for name in PHASES]
  denoiser, reward_end, actor_critic, probe = phases
  assert group_phases(phases, "sequential") == {one.name: ((one,),) for one in phases}
  rest = {"actor_critic": ((actor_critic,),), "probe": ((probe,),)}
  joint = group_phases(phases, "joint")
  assert joint == {"world_model": ((denoiser, reward_end),), **rest}
  assert group_phases(phases, "alternating") == {"world_model": ((denoiser,), (reward_end,)), **rest}
  assert list(joint) == ["world_model", "actor_critic", "probe"]


def test_the_first_phase_of_an_update_moves_what_both_train():
  both = (phase("denoiser", "encoder", "denoiser"), phase("reward_end", "encoder", "reward_end"))
  assert owned_components(both) == {"denoiser": ("encoder", "denoiser"), "reward_end": ("reward_end",)}
  late = (phase("denoiser", "denoiser"), phase("reward_end", "encoder", "reward_end"))
  assert owned_components(late) == {"denoiser": ("denoiser",), "reward_end": ("encoder", "reward_end")}


def test_turns_are_updates_of_one_phase_after_the_other(toy):
  turns = learner(toy, "alternating")
  single = learner(toy, "sequential")
  for rounds, each in ((3, {"denoiser": 1, "reward_end": 1}), (2, {"denoiser": 3, "reward_end": 1})):
    [sums] = turns.update({name: rounds * count for name, count in each.items()})
    parts = [single.update(each)[0] for _ in range(rounds)]
    for name in each:
      np.testing.assert_allclose(sums[name]["loss"], sum(part[name]["loss"] for part in parts), rtol=1e-5)
  chex.assert_trees_all_close(turns.snapshot()[0], single.snapshot()[0], rtol=1e-5, atol=1e-6)


def test_a_joint_update_trains_every_component_of_the_world_model_with_one_state_for_the_encoder(joint):
  before, after, sums, made = joint
  for name in ("encoder", "denoiser", "reward_end", "actor_critic"):
    moved = [
      np.max(np.abs(x - y))
      for x, y in zip(*map(jax.tree.leaves, (before.params[name], after.params[name])), strict=True)
    ]
    assert max(moved) > 1e-3, name  # Weight decay alone moves them by less.
  chex.assert_trees_all_equal(before.params["probe"], after.params["probe"])
  count = lambda *names: sum(x.size for name in names for x in jax.tree.leaves(after.params[name]))  # noqa: E731
  vectors = {
    name: sorted(x.size for x in jax.tree.leaves(tree) if x.size > 1) for name, tree in after.optimizers.items()
  }
  assert vectors["denoiser"] == [count("encoder", "denoiser")] * 2
  assert vectors["reward_end"] == [count("reward_end")] * 2
  assert made.updates() == {"denoiser": 3, "reward_end": 3, "actor_critic": 3, "probe": 0}
  for phase in ("denoiser", "reward_end"):
    assert sums[phase]["grad_norm"] > 0
    assert np.isfinite(sums[phase]["loss"])


def one_update(replay, phases, optimizer):
  """Parameters -> parameters and metrics after one update of these phases, which are given by number; compiled."""
  optimizers = dict.fromkeys(PHASES, optimizer)
  update = make_update(phases, optimizers, batch_size=4, age_weights=(0.5, 0.5))
  alone = jax.vmap(update, in_axes=None, axis_name=parallel.AXIS, axis_size=1)
  zeros = {name: np.int32(0) for name in PHASES}
  replay = jax.tree.map(lambda x: x[0], replay)

  @jax.jit
  def run(params):
    owned = owned_components(phases.values())
    states = {name: optimizer.init({n: params[n] for n in names}) for name, names in owned.items()}
    state, metrics = alone(TrainState(params, states, zeros, zeros, jax.random.key_data(jax.random.key(2))), replay)
    return jax.tree.map(lambda x: x[0], (state.params, metrics))

  return run


def test_the_gradient_of_a_joint_update_is_the_sum_of_those_of_its_phases(toy):
  """The encoder's step with a plain optimiser equals the sum of the phases' gradients on the phases' own batches."""
  params = toy_model.init(jax.random.key(1))
  denoiser, reward_end, *_ = toy_model.phases()
  both, first, second = (
    one_update(toy.replay(), phases, optax.sgd(1.0))(params)[0]["encoder"]["kernel"] - params["encoder"]["kernel"]
    for phases in ({0: denoiser, 1: reward_end}, {0: denoiser}, {1: reward_end})
  )
  np.testing.assert_allclose(both, first + second, rtol=1e-3, atol=1e-5)
  for alone in (first, second):
    assert np.abs(alone).max() > 1e-3


def test_a_joint_update_keeps_a_loss_from_components_that_its_phase_does_not_train(toy):
  """The encoder gets the gradient of the denoiser's loss alone, as with `learns_from=prediction`."""
  params = toy_model.init(jax.random.key(1))
  denoiser, reward_end, *_ = toy_model.phases(reward_end=("reward_end",))
  both, alone = (
    one_update(toy.replay(), phases, optax.sgd(1.0))(params)[0]
    for phases in ({0: denoiser, 1: reward_end}, {0: denoiser})
  )
  chex.assert_trees_all_close(both["encoder"], alone["encoder"], rtol=1e-4, atol=1e-6)
  assert np.any(both["reward_end"]["kernel"] != params["reward_end"]["kernel"])


def test_an_update_moves_the_running_statistics_and_a_skipped_one_does_not(tiny):
  model = build(override(tiny.config, {"encoder.norm": "running"}), SPEC)
  params = model.init(jax.random.key(1))
  before = params["encoder"]["running"]
  for phase in model.phases[:2]:
    update = one_update(tiny.replay(), {0: phase}, optax.adamw(1e-3))
    after, metrics = update(params)
    moved = after["encoder"]["running"]
    assert np.abs(moved["mean"] - before["mean"]).max() > 1e-4
    # One step of the tracking rate, and no optimiser's step besides.
    assert 0 < abs(np.log(moved["std"] / before["std"])) <= 0.01 / 2 * np.log(1e2) + 1e-6
    assert metrics[phase.name]["skipped"] == 0
    broken = {**params, phase.name: jax.tree.map(lambda x: x * np.nan, params[phase.name])}
    after, metrics = update(broken)
    chex.assert_trees_all_equal(after["encoder"]["running"], before)
    assert metrics[phase.name]["skipped"] == 1


def test_calls_keep_the_phases_of_a_group_together():
  counts = {"denoiser": 7, "reward_end": 7, "actor_critic": 3}
  groups = [("denoiser", "reward_end"), ("actor_critic",)]
  calls = list(plan_calls(counts, groups, limit=4, split=False))
  assert calls == [
    *({"denoiser": n, "reward_end": n, "actor_critic": 0} for n in (2, 2, 2, 1)),
    {"denoiser": 0, "reward_end": 0, "actor_critic": 3},
  ]
  assert sum(call["denoiser"] for call in plan_calls(counts, groups, limit=1, split=True)) == 7
  turns = list(plan_calls({"denoiser": 9, "reward_end": 3, "actor_critic": 0}, groups, limit=9, split=False))
  assert turns == [{"denoiser": 3 * n, "reward_end": n, "actor_critic": 0} for n in (2, 1)]


def test_different_numbers_of_updates_are_refused(joint):
  refused(lambda: joint[3].update({"denoiser": 1}), "denoiser 1, reward_end 0", "training.order=joint", "equal")
  for order, name in (("joint", "updates"), ("alternating", "first_updates")):
    for count in (0, 799):
      overrides = {"training.order": order, f"training.{name}.denoiser": count}
      given = f"training.{name}.denoiser={count}"
      refused(functools.partial(make_config, overrides=overrides), given, order, "sequential")
  for order in ("sequential", "alternating"):
    assert make_config(overrides={"training.order": order, "training.updates.denoiser": 1_200})
