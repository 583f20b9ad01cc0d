import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unoptimised import jit

from jedi_jax.nn import blocks
from jedi_jax.nn.actor_critic import ActorCriticNetwork
from jedi_jax.nn.denoiser import InnerNetwork
from jedi_jax.nn.encoder import EncoderNetwork
from jedi_jax.nn.lstm import zero_lstm_state
from jedi_jax.nn.reward_end import RewardEndNetwork
from jedi_jax.types import Compute, LstmState

B, T, L, A = 2, 3, 2, 4
SHAPE = (4, 4, 2)
LSTM = 6


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


def inner(dtype=jnp.float32):
  network = InnerNetwork(
    num_actions=A, channels=(8,), depths=(1,), attention=(False,), conditioning_width=8, compute=Compute(dtype)
  )
  arguments = (normal(B, *SHAPE), normal(B), normal(B, L, *SHAPE), jnp.asarray([[0, 1], [2, 3]]))
  return network, arguments


def reward_end(dtype=jnp.float32, downsample=False):
  network = RewardEndNetwork(
    num_actions=A,
    channels=(8, 8),
    depths=(1, 0),
    attention=(False, False),
    downsample=downsample,
    conditioning_width=8,
    lstm_width=LSTM,
    compute=Compute(dtype),
  )
  actions = jnp.asarray([[0, 1, 2], [3, 2, 1]])
  frames, following = normal(B, T, *SHAPE), normal(B, T, *SHAPE, seed=1)
  return network, (frames, actions, following, LstmState(normal(B, LSTM), normal(B, LSTM, seed=1)))


def actor_critic(dtype=jnp.float32, channels=(), downsample=()):
  network = ActorCriticNetwork(
    num_actions=A, channels=channels, downsample=downsample, lstm_width=LSTM, compute=Compute(dtype)
  )
  return network, (normal(B, T, *SHAPE), LstmState(normal(B, LSTM), normal(B, LSTM, seed=1)))


def encoder(dtype=jnp.float32):
  return EncoderNetwork(channels=(4, 4), downsample=(True, False), compute=Compute(dtype)), (normal(B, *SHAPE),)


NETWORKS = {"inner": inner, "reward_end": reward_end, "actor_critic": actor_critic, "encoder": encoder}


@functools.cache
def compiled(name):
  """A network's function, parameters of which none is zero, and arguments."""
  network, arguments = NETWORKS[name]()
  shapes = jax.eval_shape(network.init, jax.random.key(0), *arguments)
  params = jax.tree.map(lambda leaf: 0.3 * normal(*leaf.shape), shapes)
  return jit(network.apply), params, arguments


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_is_for_activations_only(name):
  network, arguments = NETWORKS[name](dtype=jnp.bfloat16)
  params = jax.eval_shape(network.init, jax.random.key(0), *arguments)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
  output, state = jax.eval_shape(
    lambda params: network.apply(params, *arguments, capture_intermediates=True, mutable=["intermediates"]), params
  )
  # Latents are cast by the codec, everything else by its network.
  if name != "encoder":
    assert {leaf.dtype for leaf in jax.tree.leaves(output)} == {jnp.dtype(jnp.float32)}
  inside = {
    jax.tree_util.keystr(path): leaf.dtype
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["intermediates"])
    if any(layer in jax.tree_util.keystr(path) for layer in ("conv", "norm", "attention", "skip"))
  }
  assert (name == "actor_critic") == (not inside)  # This one is an LSTM and two linear heads only.
  assert set(inside.values()) <= {jnp.dtype(jnp.bfloat16)}, inside


@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_that_are_cast_before_change_nothing(name):
  network, arguments = NETWORKS[name](dtype=jnp.bfloat16)
  _, params, _ = compiled(name)
  cast = blocks.prepare(params["params"], Compute(jnp.bfloat16))
  dtypes = {jax.tree_util.keystr(path): x.dtype for path, x in jax.tree_util.tree_leaves_with_path(cast)}
  narrow = {path for path, dtype in dtypes.items() if dtype == jnp.bfloat16}
  assert {path for path in dtypes if "kernel" in path} <= narrow
  assert not any("scale" in path or "embedding" in path or "frequencies" in path for path in narrow)
  if name == "actor_critic":  # Its heads compute in float32.
    cast |= {head: params["params"][head] for head in ("actor", "critic")}
  apply = jit(network.apply)
  before, after = apply(params, *arguments), apply({"params": cast}, *arguments)
  for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    np.testing.assert_array_equal(x, y)
  assert jax.tree.map(jnp.shape, cast) == jax.tree.map(jnp.shape, params["params"])


def test_the_inner_network_starts_at_its_bias():
  network, arguments = inner()
  output, params = jit(network.init_with_output)(jax.random.key(0), *arguments)
  assert output.shape == (B, *SHAPE)
  assert output.dtype == jnp.float32
  bias = params["params"]["conv_out"]["bias"]
  np.testing.assert_allclose(output, np.broadcast_to(bias, output.shape), atol=1e-7)


def test_the_inner_network_depends_on_all_that_it_is_given_and_on_its_order():
  apply, params, (noisy, c_noise, past, actions) = compiled("inner")
  base = apply(params, noisy, c_noise, past, actions)
  for changed in (
    (noisy + 0.1, c_noise, past, actions),
    (noisy, c_noise + 0.1, past, actions),
    (noisy, c_noise, past.at[:, 0].add(0.1), actions),
    (noisy, c_noise, past[:, ::-1], actions),
    (noisy, c_noise, past, actions[:, ::-1]),
  ):
    difference = np.abs(apply(params, *changed) - base).reshape(B, -1).max(axis=1)
    assert (difference > 1e-4).all()
  # One example's neighbours do not matter.
  alone = apply(params, noisy.at[1].add(1.0), c_noise.at[1].add(1.0), past.at[1].add(1.0), actions.at[1].set(0))
  np.testing.assert_allclose(alone[0], base[0], rtol=1e-5, atol=1e-6)


def test_the_inner_network_stacks_the_frames_oldest_first_and_the_noisy_one_last():
  # Only the first convolution's weights of one frame differ from zero, so only that frame can matter.
  apply, params, (noisy, c_noise, past, actions) = compiled("inner")
  kernel = params["params"]["conv_in"]["kernel"]
  assert kernel.shape == (3, 3, (L + 1) * SHAPE[2], 8)
  channels = SHAPE[2]
  for frame in range(L + 1):
    at = slice(frame * channels, (frame + 1) * channels)
    only = jnp.zeros_like(kernel).at[:, :, at].set(kernel[:, :, at])
    changed = {"params": {**params["params"], "conv_in": {**params["params"]["conv_in"], "kernel": only}}}
    base = apply(changed, noisy, c_noise, past, actions)
    for other in range(L + 1):
      moved = (
        (noisy + 1.0, past) if other == L else (noisy, past.at[:, other].add(jnp.arange(4.0)[None, :, None, None]))
      )
      differs = not np.allclose(apply(changed, moved[0], c_noise, moved[1], actions), base, atol=1e-5)
      assert differs == (other == frame)


@pytest.mark.parametrize("downsample", [False, True])
def test_the_reward_end_network_gives_logits_over_time(downsample):
  network, arguments = reward_end(downsample=downsample)
  (rewards, ends, state), variables = jax.eval_shape(lambda: network.init_with_output(jax.random.key(0), *arguments))
  assert rewards.shape == (B, T, 3)
  assert ends.shape == (B, T, 2)
  assert state.hidden.shape == state.cell.shape == (B, LSTM)
  side = 2 if downsample else 4  # Two levels: one halving.
  assert variables["params"]["lstm"]["kernel_ih"].shape == (side * side * 8, 4 * LSTM)


def test_the_reward_end_network_runs_step_by_step_and_never_looks_ahead():
  apply, params, (frames, actions, following, state) = compiled("reward_end")
  rewards, ends, after = apply(params, frames, actions, following, state)
  for t in range(T):
    at = slice(t, t + 1)
    reward, end, state = apply(params, frames[:, at], actions[:, at], following[:, at], state)
    np.testing.assert_allclose(reward[:, 0], rewards[:, t], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(end[:, 0], ends[:, t], rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(state.hidden, after.hidden, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(state.cell, after.cell, rtol=1e-3, atol=1e-4)


def test_the_reward_end_network_depends_on_action_and_both_frames():
  apply, params, (frames, actions, following, state) = compiled("reward_end")
  base, _, _ = apply(params, frames, actions, following, state)
  for changed in ((following, actions, frames), (frames, (actions + 1) % A, following)):
    assert np.abs(apply(params, *changed, state)[0] - base).max() > 1e-3


@pytest.mark.parametrize("stages", [((), ()), ((4, 4), (True, False))])
def test_the_actor_critic_starts_uniform_and_worthless(stages):
  network, arguments = actor_critic(channels=stages[0], downsample=stages[1])
  (logits, values, after), params = jit(network.init_with_output)(jax.random.key(0), *arguments)
  np.testing.assert_array_equal(logits, np.zeros((B, T, A)))
  np.testing.assert_array_equal(values, np.zeros((B, T)))
  assert {x.dtype for x in (logits, values, *after)} == {jnp.dtype(jnp.float32)}
  assert ("encoder" in params["params"]) == bool(stages[0])
  assert params["params"]["lstm"]["kernel_ih"].shape[0] == (2 * 2 * 4 if stages[0] else 4 * 4 * 2)


def test_the_actor_critic_runs_step_by_step_and_forgets_on_demand():
  apply, params, (frames, state) = compiled("actor_critic")
  logits, values, after = apply(params, frames, state)
  current = state
  for t in range(T):
    logit, value, current = apply(params, frames[:, t : t + 1], current)
    np.testing.assert_allclose(logit[:, 0], logits[:, t], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(value[:, 0], values[:, t], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(current.hidden, after.hidden, rtol=1e-4, atol=1e-5)
  # Forgetting after frame 1 makes frame 2 the first.
  keep = jnp.asarray([[1.0, 0.0, 1.0]] * B)
  forgetful, _, _ = apply(params, frames, state, keep)
  fresh, _, _ = apply(params, frames[:, 2:], zero_lstm_state(B, LSTM))
  np.testing.assert_allclose(forgetful[:, :2], logits[:, :2], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(forgetful[:, 2], fresh[:, 0], rtol=1e-4, atol=1e-5)


def test_wrong_shapes_are_refused():
  key = jax.random.key(0)
  network, (noisy, c_noise, past, actions) = inner()
  for wrong in (
    (noisy, c_noise, past[:, :, :2], actions),
    (noisy, c_noise, past, actions[:, :1]),
    (noisy, c_noise, past[:1], actions),
  ):
    with pytest.raises(AssertionError):
      jax.eval_shape(network.init, key, *wrong)
  network, (frames, actions, following, state) = reward_end()
  for wrong in ((frames[:, 0], actions, following, state), (frames, actions[:, 1:], following, state)):
    with pytest.raises(AssertionError):
      jax.eval_shape(network.init, key, *wrong)
  with pytest.raises(AssertionError):
    jax.eval_shape(network.init, key, frames, actions, following[:, 1:], state)
  network, (frames, state) = actor_critic()
  with pytest.raises(AssertionError):
    jax.eval_shape(network.init, key, frames[:, 0], state)


@pytest.mark.parametrize("name", ["inner", "reward_end"])
def test_kernels_of_our_own_and_joint_layers_change_nothing(name):
  network, _ = NETWORKS[name]()
  apply, params, arguments = compiled(name)
  expected = apply(params, *arguments)
  own = network.clone(compute=Compute(kernels="interpret"))
  prepared = blocks.prepare(params["params"], own.compute)
  assert "adaptive_norms" in prepared
  fused = blocks.prepare(params["params"], own.compute._replace(fused_convolution=True))
  assert "fused" in fused["conv_in"]
  for given in (params["params"], prepared, fused):
    actual = jit(own.apply)({"params": given}, *arguments)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def calls(function, *arguments):
  """How many kernels of our own a function calls."""
  return str(jax.make_jaxpr(function)(*arguments)).count("pallas_call[")


# Levels with and without attention; one step, as in imagination; more than ten blocks, whose names sort otherwise than
# their numbers. Not one kernel: other widths, down-sampling, images that are too large.
@pytest.mark.parametrize(
  ("changes", "side", "time", "expected_calls"),
  [
    ({}, 4, T, 2),
    ({"attention": (True, False), "downsample": True, "channels": (8,), "depths": (1,)}, 4, 1, 2),
    ({"depths": (11, 0)}, 4, 1, 2),
    ({"channels": (8, 16)}, 4, T, 1 + 5 * 3 + 2),
    ({"downsample": True}, 4, T, 1 + 5 * 3 + 2),
    ({}, 16, 1, 1 + 5 * 3),
  ],
)
def test_residual_blocks_of_one_width_are_one_kernel_and_change_nothing(changes, side, time, expected_calls):
  network, (_, actions, _, state) = reward_end()
  changes = {"depths": (2, 1), **changes}
  network = network.clone(
    **{**changes, "attention": changes.get("attention", (False, False))[: len(changes["depths"])]}
  )
  arguments = (normal(B, time, side, side, 2), actions[:, :time], normal(B, time, side, side, 2, seed=1), state)
  params = blocks.init_params(network, jax.random.key(0), *arguments)
  params = jax.tree.map(lambda x: x + 0.1 * normal(*x.shape), params)  # Kernels that start as zeros, too.
  own = network.clone(compute=Compute(kernels="interpret", fused_convolution=True))
  prepared = own.prepare(params)
  actual, expected = (
    jit(each.apply)({"params": given}, *arguments) for each, given in ((own, prepared), (network, params))
  )
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
  assert calls(own.apply, {"params": prepared}, *arguments) == expected_calls


@pytest.mark.parametrize("name", ["inner", "reward_end"])
def test_gradients_through_kernels_of_our_own_and_joint_layers_are_the_same(name):
  network, arguments = NETWORKS[name]()
  _, params, _ = compiled(name)

  def loss(network, params):
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(network.apply(params, *arguments)))

  own = network.clone(compute=Compute(kernels="interpret"))
  expected, actual = (jit(jax.grad(functools.partial(loss, each)))(params) for each in (network, own))
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3 * np.abs(y).max())
