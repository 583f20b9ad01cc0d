import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedi_jax.config import OptimizerConfig, make_config
from jedi_jax.models.base import Phase
from jedi_jax.models.build import build
from jedi_jax.training import parallel
from jedi_jax.training.state import TrainState
from jedi_jax.training.updates import decayed, make_optimizer, make_optimizers, make_update, weighted_loss
from jedi_jax.types import EnvSpec, Losses, Term


def tree(seed, scale=1.0):
  generator = np.random.default_rng(seed)

  def draw(*shape):
    return (scale * generator.normal(size=shape)).astype(np.float32)

  return {
    "encoder": {"conv": {"kernel": draw(2, 3), "bias": draw(3)}},
    "denoiser": {"dense": {"kernel": draw(3, 2), "bias": draw(2)}, "norm": {"scale": draw(2)}},
  }


def adamw(params, gradients, config, encoder_factor):
  """AdamW (Loshchilov and Hutter 2019) of a sequence of gradients, in float64, number by number."""
  flat = {jax.tree_util.keystr(path): np.float64(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
  first = dict.fromkeys(flat, 0.0)
  second = dict.fromkeys(flat, 0.0)
  for count, gradient in enumerate(gradients):
    g = {jax.tree_util.keystr(path): np.float64(x) for path, x in jax.tree_util.tree_leaves_with_path(gradient)}
    norm = np.sqrt(sum(np.sum(x**2) for x in g.values()))
    clip = min(1.0, config.max_grad_norm / norm)
    warmup = config.warmup_updates
    rate = config.learning_rate * (min(count / warmup, 1.0) if warmup else 1.0)
    for name, value in tuple(flat.items()):
      first[name] = 0.9 * first[name] + 0.1 * clip * g[name]
      second[name] = 0.999 * second[name] + 0.001 * (clip * g[name]) ** 2
      mean, square = first[name] / (1 - 0.9 ** (count + 1)), second[name] / (1 - 0.999 ** (count + 1))
      decay = config.weight_decay * value if "kernel" in name else 0.0
      factor = encoder_factor if "encoder" in name else 1.0
      flat[name] = value - factor * rate * (mean / (np.sqrt(square) + config.epsilon) + decay)
  return flat


@pytest.mark.parametrize("warmup", [0, 2])
def test_adamw_by_hand(warmup):
  config = OptimizerConfig(learning_rate=0.1, epsilon=1e-2, weight_decay=0.5, max_grad_norm=1.0, warmup_updates=warmup)
  optimizer = make_optimizer(config, {"encoder": 0.3})
  start = tree(0)
  gradients = [tree(1, 5.0), tree(2, 0.05), tree(3, 1.0), tree(4, 20.0)]  # Norms above and below the bound.
  norms = [float(optax.tree_utils.tree_norm(g)) for g in gradients]
  assert min(norms) < 1.0 < max(norms)
  params, state = start, optimizer.init(start)
  for gradient in gradients:
    steps, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, steps)
  expected = adamw(start, gradients, config, 0.3)
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    np.testing.assert_allclose(x, expected[jax.tree_util.keystr(path)], rtol=2e-5, atol=2e-6)


def test_warm_up_is_linear_from_zero():
  # Gradients of one sign and size make Adam's step the learning rate itself (apart from epsilon).
  config = OptimizerConfig(learning_rate=0.5, epsilon=1e-12, weight_decay=0.0, warmup_updates=4)
  optimizer = make_optimizer(config, {})
  params = {"denoiser": {"kernel": jnp.ones(3)}}
  state = optimizer.init(params)
  sizes = []
  for _ in range(7):
    steps, state = optimizer.update(params, state, params)
    sizes.append(-float(steps["denoiser"]["kernel"][0]))
  np.testing.assert_allclose(sizes, [0.0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5], atol=1e-5)
  assert sizes[0] == 0.0


def test_the_first_update_changes_nothing():
  optimizer = make_optimizer(OptimizerConfig(warmup_updates=100), {"encoder": 0.3})
  params = tree(0)
  steps, _ = optimizer.update(tree(1), optimizer.init(params), params)
  chex.assert_trees_all_equal(optax.apply_updates(params, steps), params)


def test_every_component_has_its_optimizer_and_the_encoder_its_factor():
  config = make_config(
    preset="debug",
    overrides={
      "encoder.learning_rate_factor": 0.25,
      "denoiser.optimizer.warmup_updates": 0,
      "denoiser.optimizer.learning_rate": 0.1,
      "reward_end.optimizer.warmup_updates": 0,
      "reward_end.optimizer.learning_rate": 0.2,
      "actor_critic.optimizer.warmup_updates": 0,
      "actor_critic.optimizer.learning_rate": 0.4,
      **{f"{part}.optimizer.weight_decay": 0.0 for part in ("denoiser", "reward_end", "actor_critic")},
    },
  )
  optimizers = make_optimizers(config, build(config, EnvSpec(3, (24, 24, 3))).phases)
  sizes = {}
  for phase, names in (
    ("denoiser", ("encoder", "denoiser")),
    ("reward_end", ("encoder", "reward_end")),
    ("actor_critic", ("actor_critic",)),
  ):
    params = {name: {"kernel": jnp.ones(2)} for name in names}
    steps, _ = optimizers[phase].update(params, optimizers[phase].init(params), params)
    sizes[phase] = {name: -float(steps[name]["kernel"][0]) for name in names}
  np.testing.assert_allclose(list(sizes["denoiser"].values()), [0.025, 0.1], rtol=1e-5)
  np.testing.assert_allclose(list(sizes["reward_end"].values()), [0.05, 0.2], rtol=1e-5)
  np.testing.assert_allclose(list(sizes["actor_critic"].values()), [0.4], rtol=1e-5)


def test_decay_marks_kernels_alone(tiny):
  params = jax.eval_shape(tiny.model.init, jax.random.key(0))
  marks = {jax.tree_util.keystr(path): mark for path, mark in jax.tree_util.tree_leaves_with_path(decayed(params))}
  assert any(marks.values())
  assert not all(marks.values())
  ranks = {jax.tree_util.keystr(path): leaf.ndim for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  for name, mark in marks.items():
    assert mark == ("kernel" in name), name
    assert not mark or ranks[name] >= 2, f"{name} has too few axes for a kernel"
  for word in ("bias", "scale", "embedding", "frequencies"):
    assert not any(mark for name, mark in marks.items() if word in name)


def distributed(function, devices):
  """Runs on slices of the first axis, with the collective axis of the package, on one real device."""
  return jax.vmap(function, axis_name=parallel.AXIS, axis_size=devices)


def test_weighted_loss_is_the_mean_over_the_global_batch():
  generator = np.random.default_rng(0)
  values = generator.normal(size=(4, 3, 2)).astype(np.float32)  # 4 devices.
  weights = generator.integers(0, 2, size=values.shape).astype(np.float32)
  weights[1] = 0.0  # A device without anything real.
  weights[2] = 1.0

  def loss(factor, values, weights):
    return weighted_loss({"a": Term(factor * values, weights), "b": Term(values**2, jnp.ones_like(weights))})

  def share(values, weights):
    (value, means), gradient = jax.value_and_grad(loss, has_aux=True)(2.0, values, weights)
    return parallel.mean((value, means, gradient))

  value, means, gradient = distributed(share, 4)(values, weights)
  expected = 2.0 * np.sum(values * weights) / np.sum(weights)
  np.testing.assert_allclose(means["a"], np.full(4, expected), rtol=1e-5)
  np.testing.assert_allclose(means["b"], np.full(4, np.mean(values**2)), rtol=1e-5)
  np.testing.assert_allclose(value, np.full(4, expected + np.mean(values**2)), rtol=1e-5)
  np.testing.assert_allclose(gradient, np.full(4, expected / 2.0), rtol=1e-5)


def test_weighted_loss_of_nothing_is_zero():
  value, means = jax.tree.map(
    lambda x: x[0], distributed(lambda x: weighted_loss({"a": Term(x, 0.0 * x)}), 1)(jnp.ones((1, 3)))
  )
  assert float(value) == float(means["a"]) == 0.0


def test_weighted_loss_refuses_terms_of_other_shapes_and_types():
  for values, weights in (
    (jnp.ones(3), jnp.ones(2)),
    (jnp.ones(3), jnp.ones(3, bool)),
    (jnp.ones(3, int), jnp.ones(3)),
  ):
    with pytest.raises(AssertionError):
      distributed(lambda v, w: weighted_loss({"a": Term(v, w)}), 1)(values[None], weights[None])


BATCH = 8


def counting_phase():
  """A phase whose gradient is a mean of noise, and whose metrics count what was drawn in the whole batch."""

  def losses(params, segment, keys, shared_key, count):
    noise = jax.vmap(jax.random.uniform)(keys)
    where = jnp.sum(segment.observations.astype(jnp.float32), axis=(1, 2, 3, 4)) % 97
    metrics = {
      "noise": jax.nn.one_hot((noise * 1000).astype(jnp.int32), 1000).sum(axis=0)[None],
      "frames": jax.nn.one_hot(where.astype(jnp.int32), 97).sum(axis=0)[None],
      "shared": jax.random.uniform(shared_key),
      "count": count.astype(jnp.float32),
    }
    return Losses({"a": Term(params["denoiser"]["kernel"] * noise, jnp.ones_like(noise))}, metrics)

  return Phase(name="denoiser", components=("denoiser",), length=4, final_frames=True, losses=losses)


OPTIMIZER = make_optimizer(OptimizerConfig(warmup_updates=0), {})


def fresh(seed=0, updates=0):
  """A state of one parameter, 0.5."""
  params = {"denoiser": {"kernel": jnp.float32(0.5)}}
  return TrainState(
    params=params,
    optimizers={"denoiser": OPTIMIZER.init(params)},
    updates={"denoiser": jnp.int32(updates)},
    skipped={"denoiser": jnp.int32(0)},
    key=jax.random.key_data(jax.random.key(seed)),
  )


def draw(replay, devices, *, seed=0, index=0, updates=0, own_batch=0):
  """One update on so many (pretended) devices; the first one's state and metrics."""
  phase = dataclasses.replace(counting_phase(), batch_size=own_batch)
  update = make_update({index: phase}, {"denoiser": OPTIMIZER}, batch_size=BATCH, age_weights=(0.5, 0.5))
  run = jax.jit(jax.vmap(update, in_axes=None, axis_name=parallel.AXIS, axis_size=devices))
  states, metrics = run(fresh(seed, updates), replay)
  for x in jax.tree.leaves(states):
    np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))  # All devices hold the same state.
  return jax.tree.map(lambda x: np.asarray(x[0]), (states, metrics["denoiser"]))


def test_a_phase_may_have_a_batch_size_of_its_own(tiny):
  replay = jax.tree.map(lambda x: x[0], tiny.replay())
  for devices in (1, 4):
    _, metrics = draw(replay, devices, own_batch=3 * BATCH + 4)
    assert metrics["noise"].sum() == metrics["frames"].sum() == 3 * BATCH + 4


def test_devices_share_one_batch_of_random_numbers(tiny):
  replay = jax.tree.map(lambda x: x[0], tiny.replay())
  state, metrics = draw(replay, 1)
  assert metrics["noise"].sum() == metrics["frames"].sum() == BATCH
  assert (metrics["noise"] > 0).sum() >= BATCH - 1  # Every element has noise of its own.
  assert state.updates["denoiser"] == 1
  for devices in (2, 4, 8):
    other_state, other = draw(replay, devices)
    for name in ("noise", "frames", "shared"):
      np.testing.assert_array_equal(other[name], metrics[name])
    np.testing.assert_allclose(other["grad_norm"], metrics["grad_norm"], rtol=1e-6)
    np.testing.assert_allclose(other["loss"], metrics["loss"], rtol=1e-6)
    chex.assert_trees_all_close(other_state.params, state.params, rtol=1e-6)
  bins = np.repeat(np.arange(1000), metrics["noise"][0].astype(int)) + 0.5
  np.testing.assert_allclose(metrics["grad_norm"], bins.mean() / 1000, atol=1e-3)


def test_draws_differ_by_run_phase_and_update_and_repeat_otherwise(tiny):
  replay = jax.tree.map(lambda x: x[0], tiny.replay())
  _, base = draw(replay, 1)
  _, again = draw(replay, 1)
  chex.assert_trees_all_equal(base, again)
  for changes in ({"seed": 1}, {"index": 1}, {"updates": 1}):
    _, other = draw(replay, 1, **changes)
    assert np.any(other["noise"] != base["noise"]), changes
    assert other["shared"] != base["shared"], changes
    assert other["count"] == changes.get("updates", 0)


def harmful_phase(harm, when):
  """A phase whose loss or gradient is not finite at some updates, in the last element of the batch alone."""

  @jax.custom_vjp
  def poison(x, bad):
    return x

  poison.defvjp(lambda x, bad: (x, bad), lambda bad, g: (jnp.where(bad, jnp.nan, g), None))

  def losses(params, segment, keys, shared_key, count):
    del segment, shared_key
    bad = jnp.isin(count, jnp.asarray(when)) & (parallel.local_share(jnp.arange(BATCH)) == BATCH - 1)
    values = params["denoiser"]["kernel"] * jnp.ones(len(keys))
    values = poison(values, bad) if harm == "gradient" else jnp.where(bad, harm, values)
    return Losses({"a": Term(values, jnp.ones(len(keys)))}, {"count": count.astype(jnp.float32)})

  def after(params, metrics):
    return {"denoiser": {"kernel": params["denoiser"]["kernel"] + 0.0 * metrics["loss"]}}  # Not finite where it is not.

  return Phase(name="denoiser", components=("denoiser",), length=4, final_frames=True, losses=losses, after=after)


@pytest.mark.parametrize("harm", [np.nan, np.inf, -np.inf, "gradient"])
@pytest.mark.parametrize("devices", [1, 4])
def test_an_update_that_is_not_finite_is_skipped_and_counted(tiny, harm, devices):
  replay = jax.tree.map(lambda x: x[0], tiny.replay())
  phase = harmful_phase(harm, (1, 2, 4))
  update = make_update({0: phase}, {"denoiser": OPTIMIZER}, batch_size=BATCH, age_weights=(0.5, 0.5))
  run = jax.jit(jax.vmap(update, in_axes=None, axis_name=parallel.AXIS, axis_size=devices))
  state, values, rows, steps = fresh(), [], [], []
  for _ in range(6):
    states, metrics = run(state, replay)
    for x in jax.tree.leaves(states):
      np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))  # All devices skip together.
    state, metrics = jax.tree.map(lambda x: x[0], (states, metrics["denoiser"]))
    values.append(float(state.params["denoiser"]["kernel"]))
    rows.append(int(state.skipped["denoiser"]))
    steps.append({name: float(value) for name, value in metrics.items()})
  assert rows == [0, 1, 2, 0, 1, 0]
  assert int(state.updates["denoiser"]) == 6
  assert [step["skipped"] for step in steps] == [0, 1, 1, 0, 1, 0]
  assert all(np.isfinite(list(step.values())).all() for step in steps)
  assert values[0] == values[1] == values[2] > values[3] == values[4] > values[5]
  # Adam knows nothing of what was skipped: three updates lead to where three lead without any harm.
  phase = harmful_phase(0.0, ())
  untouched = make_update({0: phase}, {"denoiser": OPTIMIZER}, batch_size=BATCH, age_weights=(0.5, 0.5))
  straight = fresh()
  for _ in range(3):
    straight, _ = jax.jit(untouched)(straight, replay)
  np.testing.assert_allclose(values[-1], straight.params["denoiser"]["kernel"], rtol=1e-6)
  chex.assert_trees_all_close(state.optimizers, straight.optimizers, rtol=1e-6)


def test_a_component_clipped_apart_does_not_feel_the_others():
  config = OptimizerConfig(warmup_updates=0, weight_decay=0.0, max_grad_norm=1.0, epsilon=1.0, learning_rate=0.1)
  optimizer = make_optimizer(config, {}, clipped_apart=("encoder", "decoder"))
  params = {name: {"kernel": jnp.ones(2)} for name in ("encoder", "decoder", "denoiser")}
  steps = {}
  for scale in (1.0, 1000.0):
    gradient = {name: {"kernel": jnp.asarray([0.3, 0.4])} for name in ("encoder", "decoder")}
    gradient["denoiser"] = {"kernel": scale * jnp.asarray([0.3, 0.4])}
    steps[scale], _ = optimizer.update(gradient, optimizer.init(params), params)
  for name in ("encoder", "decoder"):
    np.testing.assert_array_equal(steps[1.0][name]["kernel"], steps[1000.0][name]["kernel"])
  # Norm 500 is cut to 1, so the gradient is (0.6, 0.8); Adam's first step is g / (|g| + epsilon).
  np.testing.assert_allclose(steps[1000.0]["denoiser"]["kernel"], [-0.06 / 1.6, -0.08 / 1.8], rtol=1e-5)
  # The norm of encoder and decoder together is sqrt(0.5): nothing to cut.
  np.testing.assert_allclose(steps[1.0]["encoder"]["kernel"], [-0.03 / 1.3, -0.04 / 1.4], rtol=1e-5)
