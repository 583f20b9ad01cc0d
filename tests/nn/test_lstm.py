import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_layers import normal, random_params, sigmoid

from jedi_jax.nn import blocks
from jedi_jax.nn.lstm import Lstm, zero_lstm_state
from jedi_jax.types import Compute, LstmState


def lstm(inputs, state, keep, params):
  """PyTorch's LSTM: gates input, forget, cell, output; the state is multiplied by `keep` after each step."""
  (kernel_ih, kernel_hh, bias_ih, bias_hh), outputs = (
    (np.asarray(params[name], np.float64) for name in ("kernel_ih", "kernel_hh", "bias_ih", "bias_hh")),
    [],
  )
  hidden, cell = (np.asarray(x, np.float64) for x in state)
  for t in range(inputs.shape[1]):
    gates = np.asarray(inputs[:, t]) @ kernel_ih + bias_ih + hidden @ kernel_hh + bias_hh
    i, f, g, o = np.split(gates, 4, axis=-1)
    cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
    hidden = sigmoid(o) * np.tanh(cell)
    outputs.append(hidden)
    hidden, cell = hidden * keep[:, t, None], cell * keep[:, t, None]
  return np.stack(outputs, axis=1), hidden, cell


@pytest.fixture(scope="module")
def lstm_case():
  inputs = normal((2, 4, 3))
  state = LstmState(normal((2, 5), seed=1), normal((2, 5), seed=2))
  module = Lstm(5)
  params = random_params(module, inputs, state)
  return module, params, inputs, state


def test_the_lstm_equals_a_plain_loop(lstm_case):
  module, params, inputs, state = lstm_case
  outputs, after = module.apply({"params": params}, inputs, state)
  expected = lstm(inputs, state, np.ones((2, 4)), params)
  for actual, value in zip((outputs, *after), expected, strict=True):
    np.testing.assert_allclose(actual, value, rtol=1e-4, atol=1e-5)


def test_the_lstm_forgets_where_keep_is_zero(lstm_case):
  module, params, inputs, state = lstm_case
  keep = jnp.asarray([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]])
  outputs, after = module.apply({"params": params}, inputs, state, keep)
  expected = lstm(inputs, state, np.asarray(keep), params)
  for actual, value in zip((outputs, *after), expected, strict=True):
    np.testing.assert_allclose(actual, value, rtol=1e-4, atol=1e-5)
  # The first sequence starts afresh after step 1, the second ends empty.
  fresh, _ = module.apply({"params": params}, inputs[:, 2:], zero_lstm_state(2, 5))
  np.testing.assert_allclose(outputs[0, 2:], fresh[0], rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(after.hidden[1], 0)
  np.testing.assert_array_equal(after.cell[1], 0)


def test_the_lstm_falls_back_on_a_given_state(lstm_case):
  module, params, inputs, state = lstm_case
  keep = jnp.asarray([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
  fallback = LstmState(normal((2, 5), seed=3), normal((2, 5), seed=4))
  outputs, after = module.apply({"params": params}, inputs, state, keep, fallback)
  plain, _ = module.apply({"params": params}, inputs, state)
  np.testing.assert_allclose(outputs[0, :2], plain[0, :2], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(outputs[1], plain[1], rtol=1e-5, atol=1e-6)
  fresh, fresh_after = module.apply({"params": params}, inputs[:, 2:], fallback)
  np.testing.assert_allclose(outputs[0, 2:], fresh[0], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(after.cell[0], fresh_after.cell[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_keep", [False, True])
def test_single_steps_and_the_scan_give_the_same(lstm_case, with_keep):
  module, params, inputs, state = lstm_case
  keep = jnp.asarray([[1.0, 0.0, 1.0, 0.5], [0.0, 1.0, 1.0, 1.0]]) if with_keep else None
  outputs, after = module.apply({"params": params}, inputs, state, keep)
  for t in range(4):
    step_keep = None if keep is None else keep[:, t : t + 1]
    output, state = module.apply({"params": params}, inputs[:, t : t + 1], state, step_keep)
    np.testing.assert_allclose(output[:, 0], outputs[:, t], rtol=1e-5, atol=1e-6)
  for actual, expected in zip(state, after, strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_step_with_joint_parameters_is_the_same(lstm_case):
  module, params, inputs, state = lstm_case
  prepared = blocks.prepare(params, Compute(kernels="interpret"))
  assert prepared["joint_kernel"].shape == (8, 20)
  step = functools.partial(module.apply, {"params": prepared}, inputs[:, :1])
  expected, actual = module.apply({"params": params}, inputs[:, :1], state), step(state)
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  assert str(jax.make_jaxpr(step)(state)).count("dot_general") == 1


def test_parameters_of_another_recurrent_layer_are_not_joined():
  params = {"kernel_ih": jnp.zeros((2, 3)), "kernel_hh": jnp.zeros((3, 3)), "bias": jnp.zeros(3)}
  assert blocks.prepare(params, Compute(kernels="interpret")).keys() == params.keys()


@pytest.mark.parametrize("kernels", ["xla", "interpret"])
def test_the_gradient_of_the_lstm_is_that_of_its_steps(lstm_case, kernels):
  """Automatic differentiation of a plain recurrence, for parameters, inputs, state and fallback."""
  module, params, inputs, state = lstm_case
  module = module.clone(compute=Compute(kernels=kernels))
  keep = jnp.asarray([[1.0, 0.0, 1.0, 0.5], [0.0, 1.0, 1.0, 1.0]])
  fallback = LstmState(normal((2, 5), seed=3), normal((2, 5), seed=4))

  def plain(params, inputs, state, fallback):
    outputs = []
    for t in range(4):
      gates = inputs[:, t] @ params["kernel_ih"] + state.hidden @ params["kernel_hh"]
      i, f, g, o = jnp.split(gates + params["bias_ih"] + params["bias_hh"], 4, axis=-1)
      cell = jax.nn.sigmoid(f) * state.cell + jax.nn.sigmoid(i) * jnp.tanh(g)
      outputs.append(jax.nn.sigmoid(o) * jnp.tanh(cell))
      kept = keep[:, t, None]
      state = jax.tree.map(lambda x, y, k=kept: k * x + (1 - k) * y, LstmState(outputs[-1], cell), fallback)
    return jnp.stack(outputs, axis=1), state

  def loss(function):
    def value(*arguments):
      outputs, after = function(*arguments)
      return jnp.sum(jnp.sin(outputs)) + jnp.sum(jnp.cos(3 * after.hidden)) + jnp.sum(jnp.square(after.cell))

    return value

  def ours(params, inputs, state, fallback):
    return module.apply({"params": params}, inputs, state, keep, fallback)

  arguments = (dict(params), inputs, state, fallback)
  expected, actual = (jax.grad(loss(function), argnums=(0, 1, 2, 3))(*arguments) for function in (plain, ours))
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    assert np.any(np.abs(y) > 1e-3)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_gradient_of_the_lstm_under_bfloat16_and_vmap(lstm_case, steps):
  """Near that of float32, alone and mapped over the parameters of two runs that share the rest."""
  _, params, inputs, state = lstm_case
  both = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), dict(params))

  def gradient(dtype):
    def loss(params):
      outputs, after = Lstm(5, Compute(dtype)).apply({"params": params}, inputs[:, :steps], state)
      return jnp.sum(jnp.sin(outputs)) + jnp.sum(after.cell)

    return jax.grad(loss)

  mapped = jax.vmap(gradient(jnp.bfloat16))(both)
  assert {x.dtype for x in jax.tree.leaves(mapped)} == {jnp.dtype(jnp.float32)}
  for run in range(2):
    expected = gradient(jnp.float32)(jax.tree.map(lambda x, run=run: x[run], both))
    for name, value in expected.items():
      np.testing.assert_allclose(mapped[name][run], value, rtol=0.05, atol=0.05)


def test_the_lstm_starts_with_open_forget_gates_and_an_orthogonal_recurrence():
  module = Lstm(4)
  params = module.init(jax.random.key(0), jnp.zeros((1, 1, 3)), zero_lstm_state(1, 4))["params"]
  np.testing.assert_array_equal(params["bias_ih"], np.repeat([0, 1, 0, 0], 4))
  np.testing.assert_array_equal(params["bias_hh"], 0)
  np.testing.assert_allclose(params["kernel_hh"] @ params["kernel_hh"].T, np.eye(4), atol=1e-5)


def test_the_lstm_keeps_a_float32_state_under_bfloat16(lstm_case):
  _, params, inputs, state = lstm_case
  outputs, after = Lstm(5, Compute(jnp.bfloat16)).apply({"params": params}, inputs, state)
  assert {x.dtype for x in (outputs, *after)} == {jnp.dtype(jnp.float32)}
  expected, _, _ = lstm(inputs, state, np.ones((2, 4)), params)
  np.testing.assert_allclose(outputs, expected, atol=3e-2)
