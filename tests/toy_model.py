"""A model of five small matrices, for tests of updates, orders and epochs: it compiles in a second or two."""

import dataclasses

import jax
import jax.numpy as jnp

import jedi_jax
from jedi_jax.models.base import Phase
from jedi_jax.types import Losses, Term

_CELLS, _COLOURS, _CHANNELS = 3, 3, 4
_KERNELS = {
  "encoder": (_COLOURS, _CHANNELS),
  "denoiser": (_CHANNELS, _CHANNELS),
  "reward_end": (_CELLS**2 * _CHANNELS, 1),
  "actor_critic": (_CHANNELS, 1),
  "probe": (_CHANNELS, _COLOURS),
}


def init(key):
  keys = dict(zip(_KERNELS, jax.random.split(key, len(_KERNELS)), strict=True))
  return {name: {"kernel": jax.random.normal(keys[name], shape)} for name, shape in _KERNELS.items()}


def encode(params, observations, mask):
  """Mean colours of cells of 8 x 8 pixels [B, T, 24, 24, 3] uint8 -> latents [B, T, 3, 3, 4]."""
  return jnp.tanh(_colours(observations) @ params["encoder"]["kernel"]) * mask[..., None, None, None]


def _colours(observations):
  side = observations.shape[2] // _CELLS
  cells = observations.reshape(*observations.shape[:2], _CELLS, side, _CELLS, side, _COLOURS)
  return jnp.mean(cells / 128.0 - 1.0, axis=(3, 5))


def _losses(error):
  """Makes the losses of a phase from (parameters, segment, latents, noise like the latents) -> errors [B, T, ...]."""

  def losses(params, segment, keys, _, __):
    latents = encode(params, segment.observations, segment.mask)
    noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys)
    errors = error(params, segment, latents, noise)
    values = jnp.mean(jnp.square(errors), axis=tuple(range(2, errors.ndim)))
    return Losses({"error": Term(values, segment.mask[:, : values.shape[1]].astype(jnp.float32))}, {})

  return losses


def _denoiser(params, segment, latents, noise):
  return (latents[:, :-1] + 0.1 * noise[:, :-1]) @ params["denoiser"]["kernel"] - latents[:, 1:]


def _reward_end(params, segment, latents, noise):
  flat = (latents + 0.1 * noise).reshape(*latents.shape[:2], -1)
  return (flat @ params["reward_end"]["kernel"])[..., 0] - jnp.sign(segment.rewards)


def _actor_critic(params, segment, latents, noise):
  return (latents + 0.1 * noise) @ params["actor_critic"]["kernel"] - 1.0


def _probe(params, segment, latents, noise):
  return latents @ params["probe"]["kernel"] - _colours(segment.observations)


def phases(*, reward_end=("encoder", "reward_end")):
  """The four phases; `reward_end` names what the second one trains."""
  return (
    Phase(name="denoiser", components=("encoder", "denoiser"), length=3, losses=_losses(_denoiser)),
    Phase(name="reward_end", components=reward_end, length=2, losses=_losses(_reward_end)),
    Phase(name="actor_critic", components=("actor_critic",), length=1, losses=_losses(_actor_critic)),
    Phase(name="probe", components=("probe",), length=1, losses=_losses(_probe)),
  )


def build(config, spec, *, packed=False):
  """A model with these phases and this encoder, without a probe where the configuration has none.

  It trains and encodes; it neither acts nor imagines.
  """
  model = jedi_jax.build(config, spec, packed=packed)
  own = phases()[: len(model.phases)]
  kept = ("encoder", *(phase.name for phase in own))

  def init_kept(key):
    return {name: params for name, params in init(key).items() if name in kept}

  return dataclasses.replace(model, init=init_kept, phases=own, encode=encode)
