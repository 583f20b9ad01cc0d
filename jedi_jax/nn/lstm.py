"""LSTM over time."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jedi_jax.nn import initializers
from jedi_jax.types import Compute, LstmState

Array = jax.Array

GPU_UNROLL = 4
"""Steps in one round of the loop with kernels for GPUs. A round has launches of its own; more steps compile slowly."""


class Lstm(nn.Module):
  """LSTM over time with gates in the order input, forget, cell, output, and two biases as in PyTorch.

  The inputs of all steps enter the gates through one matrix product before the recurrence. State and recurrence are
  float32.
  """

  width: int
  compute: Compute = Compute()

  @nn.compact
  def __call__(
    self, inputs: Array, state: LstmState, keep: Array | None = None, fallback: LstmState | None = None
  ) -> tuple[Array, LstmState]:
    """Runs over T steps.

    Args:
      inputs: [B, T, I].
      state: state before the first step, [B, width] each.
      keep: optional [B, T]; the state after step t becomes keep[:, t] state + (1 - keep[:, t]) fallback.
      fallback: [B, width] each; zeros if None.

    Returns:
      Hidden states [B, T, width] float32 (before `keep` applies), and the state after the last step.
    """
    gates = 4 * self.width
    xavier = initializers.scaled_uniform(1.0, (inputs.shape[-1] + gates) / 2)
    kernel_ih = self.param("kernel_ih", xavier, (inputs.shape[-1], gates))
    # As in PyTorch, whose matrix is the transpose, [gates, width], and has orthogonal columns.
    kernel_hh = self.param("kernel_hh", nn.initializers.orthogonal(column_axis=0), (self.width, gates))
    bias_ih = self.param("bias_ih", _forget_gate_one, (gates,))
    bias_hh = self.param("bias_hh", nn.initializers.zeros_init(), (gates,))
    if inputs.shape[1] == 1 and keep is None and self.has_variable("params", "joint_kernel"):
      return self._one_step(inputs[:, 0], state)
    dtype, unroll = self.compute.dtype, 1 if self.compute.kernels == "xla" else GPU_UNROLL
    projected = jnp.dot(inputs.astype(dtype), kernel_ih.astype(dtype), preferred_element_type=jnp.float32)
    projected += bias_ih + bias_hh
    keep = jnp.ones(inputs.shape[:2]) if keep is None else keep.astype(jnp.float32)
    fallback = zero_lstm_state(inputs.shape[0], self.width) if fallback is None else fallback
    hidden, state = _recur(dtype, unroll, jnp.moveaxis(projected, 1, 0), kernel_hh, state, keep.T, fallback)
    return jnp.moveaxis(hidden, 0, 1), state

  def _one_step(self, inputs: Array, state: LstmState) -> tuple[Array, LstmState]:
    """One step in one matrix product, with the joint kernel and bias of `blocks.prepare`."""
    kernel: Array = self.get_variable("params", "joint_kernel")
    bias: Array = self.get_variable("params", "joint_bias")
    both = jnp.concatenate([x.astype(self.compute.dtype) for x in (inputs, state.hidden)], axis=-1)
    gates = _gates(jnp.dot(both, kernel.astype(both.dtype), preferred_element_type=jnp.float32) + bias)
    state = _advance(gates, state.cell)
    return state.hidden[:, None], state


def _gates(total: Array) -> tuple[Array, ...]:
  i, f, g, o = jnp.split(total, 4, axis=-1)
  return nn.sigmoid(i), nn.sigmoid(f), jnp.tanh(g), nn.sigmoid(o)


def _advance(gates: tuple[Array, ...], cell: Array) -> LstmState:
  i, f, g, o = gates
  cell = f * cell + i * g
  return LstmState(o * jnp.tanh(cell), cell)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recur(
  dtype: Any, unroll: int, projected: Array, kernel: Array, state: LstmState, keep: Array, fallback: LstmState
) -> tuple[Array, LstmState]:
  """Runs the recurrence; its gradient is written out, so that a step saves two arrays and the kernel's is one product.

  Args:
    dtype: of the products.
    unroll: steps in one round of the compiled loop.
    projected: [T, B, 4 D] what inputs and biases add to the gates.
    kernel: [D, 4 D], of the hidden state.
    state: before the first step.
    keep: [T, B]; has no gradient.
    fallback: see `Lstm`.

  Returns:
    Hidden states [T, B, D], before `keep` applies, and the state after the last step.
  """
  return _forward(dtype, unroll, projected, kernel, state, keep, fallback)[0]


def _forward(
  dtype: Any, unroll: int, projected: Array, kernel: Array, state: LstmState, keep: Array, fallback: LstmState
) -> tuple[tuple[Array, LstmState], tuple[Any, ...]]:
  recurrent = kernel.astype(dtype)

  def step(carry: LstmState, xs: tuple[Array, Array]) -> tuple[LstmState, tuple[Array, Array]]:
    projection, kept = xs
    gates = _gates(projection + jnp.dot(carry.hidden.astype(dtype), recurrent, preferred_element_type=jnp.float32))
    state = _advance(gates, carry.cell)
    saved = jnp.concatenate([state.cell, *gates], axis=-1)  # For the gradient only.
    return _blend(state, kept, fallback), (state.hidden, saved)

  if len(projected) == 1:  # As in imagination and acting, without a loop.
    after, one = step(state, (projected[0], keep[0]))
    hidden, saved = jax.tree.map(lambda x: x[None], one)
  else:
    after, (hidden, saved) = lax.scan(step, state, (projected, keep), unroll=unroll)
  return (hidden, after), (hidden, saved, kernel, state, keep, fallback)


def _backward(
  dtype: Any, unroll: int, residuals: tuple[Any, ...], cotangents: tuple[Array, LstmState]
) -> tuple[Array, Array, LstmState, Array, LstmState]:
  hidden, saved, kernel, state, keep, fallback = residuals
  cell, i, f, g, o = jnp.split(saved, 5, axis=-1)
  before = _blend(LstmState(hidden[:-1], cell[:-1]), keep[:-1], fallback)
  before = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), state, before)
  recurrent = kernel.astype(dtype)
  squashed = jnp.tanh(cell)
  # What each gate's gradient takes from the cell's and, last, from the hidden state's.
  into_gates = jnp.stack([g * i * (1 - i), before.cell * f * (1 - f), i * (1 - jnp.square(g)), squashed * o * (1 - o)])
  into_cell = o * (1 - jnp.square(squashed))

  def step(after: LstmState, xs: tuple[Array, ...]) -> tuple[LstmState, tuple[Array, LstmState]]:
    of_hidden, kept, into_gate, through, forget = xs
    of_hidden = of_hidden + kept[:, None] * after.hidden
    of_cell = kept[:, None] * after.cell + of_hidden * through
    of_gates = jnp.concatenate([*(of_cell * into_gate[:3]), of_hidden * into_gate[3]], axis=-1)
    of_before = jnp.dot(of_gates.astype(dtype), recurrent.T, preferred_element_type=jnp.float32)
    lost = jax.tree.map(lambda x: (1 - kept)[:, None] * x, after)
    return LstmState(of_before, of_cell * forget), (of_gates, lost)

  of_hiddens, of_after = cotangents
  xs = (of_hiddens, keep, jnp.moveaxis(into_gates, 1, 0), into_cell, f)
  of_state, (of_gates, lost) = lax.scan(step, of_after, xs, reverse=True, unroll=unroll)
  of_kernel = jnp.einsum(
    "tbi,tbj->ij", before.hidden.astype(dtype), of_gates.astype(dtype), preferred_element_type=jnp.float32
  )
  of_fallback = jax.tree.map(lambda x: jnp.sum(x, axis=0), lost)
  return of_gates, of_kernel.astype(kernel.dtype), of_state, jnp.zeros_like(keep), of_fallback


_recur.defvjp(_forward, _backward)


def _blend(state: LstmState, keep: Array, fallback: LstmState) -> LstmState:
  """Returns keep state + (1 - keep) fallback, for state [..., B, D], keep [..., B] and fallback [B, D]."""
  return jax.tree.map(lambda x, other: x * keep[..., None] + other * (1 - keep)[..., None], state, fallback)


def _forget_gate_one(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
  del key
  quarter = shape[0] // 4
  return jnp.zeros(shape, dtype).at[quarter : 2 * quarter].set(1.0)


def zero_lstm_state(batch: int, width: int) -> LstmState:
  """Returns the state before the first step of an episode: zeros, [batch, width] float32 each."""
  return LstmState(jnp.zeros((batch, width)), jnp.zeros((batch, width)))
