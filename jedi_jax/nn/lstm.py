"""LSTM over time."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jedi_jax.nn import blocks
from jedi_jax.types import LstmState

Array = jax.Array


class Lstm(nn.Module):
  """LSTM over time with gates in the order input, forget, cell, output, and two biases as in PyTorch.

  The inputs of all steps enter the gates through one matrix product before the recurrence. State and recurrence are
  float32.
  """

  width: int
  dtype: Any = jnp.float32

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
    xavier = blocks.scaled_uniform(1.0, (inputs.shape[-1] + gates) / 2)
    kernel_ih = self.param("kernel_ih", xavier, (inputs.shape[-1], gates))
    # As in PyTorch, whose matrix is the transpose, [gates, width], and has orthogonal columns.
    kernel_hh = self.param("kernel_hh", nn.initializers.orthogonal(column_axis=0), (self.width, gates))
    bias_ih = self.param("bias_ih", _forget_gate_one, (gates,))
    bias_hh = self.param("bias_hh", nn.initializers.zeros_init(), (gates,))
    projected = jnp.dot(inputs.astype(self.dtype), kernel_ih.astype(self.dtype), preferred_element_type=jnp.float32) + (
      bias_ih + bias_hh
    )
    recurrent = kernel_hh.astype(self.dtype)

    def step(carry: LstmState, xs: tuple[Array, Array | None]) -> tuple[LstmState, Array]:
      projection, kept = xs
      hidden = carry.hidden.astype(self.dtype)
      total = projection + jnp.dot(hidden, recurrent, preferred_element_type=jnp.float32)
      i, f, g, o = jnp.split(total, 4, axis=-1)
      cell = nn.sigmoid(f) * carry.cell + nn.sigmoid(i) * jnp.tanh(g)
      hidden = nn.sigmoid(o) * jnp.tanh(cell)
      after = LstmState(hidden, cell)
      if kept is not None:
        after = jax.tree.map(lambda x: x * kept[:, None], after)
        if fallback is not None:
          after = jax.tree.map(lambda x, other: x + other * (1.0 - kept[:, None]), after, fallback)
      return after, hidden

    if inputs.shape[1] == 1:
      state, hidden = step(state, (projected[:, 0], None if keep is None else keep[:, 0]))
      return hidden[:, None], state
    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (projected, keep))
    state, hiddens = lax.scan(step, state, by_time)
    return jnp.moveaxis(hiddens, 0, 1), state


def _forget_gate_one(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
  del key
  quarter = shape[0] // 4
  return jnp.zeros(shape, dtype).at[quarter : 2 * quarter].set(1.0)


def zero_lstm_state(batch: int, width: int) -> LstmState:
  """Returns the state before the first step of an episode: zeros, [batch, width] float32 each."""
  return LstmState(jnp.zeros((batch, width)), jnp.zeros((batch, width)))
