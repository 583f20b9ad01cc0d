"""Fits a probe decoder on recorded frames after training, for runs without a decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jedi_jax.agent import Agent
from jedi_jax.config import override
from jedi_jax.errors import UserError
from jedi_jax.inspection.recording import Episode
from jedi_jax.models.build import build_decoder
from jedi_jax.models.compose import compose
from jedi_jax.training.updates import make_optimizers
from jedi_jax.types import Array, Params, Segment

_BATCH = 32
_PER_CALL = 100


def fit(agent: Agent, episodes: list[Episode], *, updates: int, seed: int = 0) -> Agent:
  """Returns an agent with a decoder of its latents, which `Agent.save` keeps.

  Args:
    agent: an agent with its configuration; returned unchanged if it has a decoder.
    episodes: real games; the probe is trained on their frames.
    updates: number of updates, each on a batch of 32 frames; rounded up to a multiple of 100.
    seed: seed of the probe's parameters and batches.

  Raises:
    UserError: if the agent has no configuration, or there are no episodes.
  """
  if agent.model.decode is not None:
    return agent
  if agent.config is None:
    raise UserError("the agent has no configuration: load it from a run's directory")
  if not episodes:
    raise UserError("there is no episode to fit the probe to: record more steps")
  shape = agent.model.spec.observation_shape
  decoder = build_decoder(agent.config, agent.model.parts.codec, shape)
  model = compose(dataclasses.replace(agent.model.parts, probe=decoder))
  (phase,) = (phase for phase in model.phases if phase.name == "probe")
  optimizer = make_optimizers(agent.config, [phase])["probe"]
  key = jax.random.key(seed)
  probe = model.init(key)["probe"]
  frames = jnp.asarray(np.concatenate([episode.observations for episode in episodes]))

  def update(carry: tuple[Params, optax.OptState], key: Array) -> tuple[tuple[Params, optax.OptState], Array]:
    trained, state = carry
    batch = frames[jax.random.randint(key, (_BATCH, 1), 0, len(frames))]
    blank = jnp.zeros((_BATCH, 1))
    segment = Segment(batch, blank.astype(jnp.int32), blank, blank.astype(bool), jnp.ones((_BATCH, 1), bool))
    keys = jax.random.split(key, _BATCH)

    def loss(trained: Params) -> Array:
      losses = phase.losses({**agent.params, **trained}, segment, keys, key, jnp.zeros((), jnp.int32))
      return jnp.mean(losses.terms["reconstruction"].values)

    value, gradient = jax.value_and_grad(loss)(trained)
    steps, state = optimizer.update(gradient, state, trained)
    return (optax.apply_updates(trained, steps), state), value

  run = jax.jit(lambda carry, keys: jax.lax.scan(update, carry, keys))
  carry = ({"probe": probe}, optimizer.init({"probe": probe}))
  calls = -(-updates // _PER_CALL)
  for call in range(calls):
    carry, _ = run(carry, jax.random.split(jax.random.fold_in(key, call), _PER_CALL))
  # The configuration of a model with a probe, so that the agent can be saved.
  config = override(agent.config, {"training.first_updates.probe": max(calls, 1) * _PER_CALL})
  return Agent(model, {**agent.params, **carry[0]}, config, agent.result, agent.data)
