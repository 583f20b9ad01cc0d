"""Composition: makes a model of its parts."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jedi_jax.models import codecs, phases
from jedi_jax.models.base import Model, Parts, Phase
from jedi_jax.types import Array, LstmState, Params


def compose(parts: Parts) -> Model:
  """Makes a model of its parts; the phases are denoiser, reward_end, actor_critic and, with a probe, probe."""
  return Model(
    parts=parts,
    init=functools.partial(_init, parts),
    phases=_phases(parts),
    encode=functools.partial(phases.encode, parts),
    policy=functools.partial(_policy, parts),
    num_actions=functools.partial(_num_actions, parts),
    imagine=functools.partial(phases.imagine, parts),
    decode=_decode(parts),
  )


def _phases(parts: Parts) -> tuple[Phase, ...]:
  length, learns_from = parts.conditioning_frames, parts.learns_from
  reconstructs = parts.decoder is not None
  encoder = ("encoder",) if "prediction" in learns_from or "reconstruction" in learns_from else ()
  denoiser = Phase(
    name="denoiser",
    components=(*encoder, *(("decoder",) if reconstructs else ()), "denoiser"),
    length=length + parts.targets,
    losses=functools.partial(phases.denoiser_losses, parts),
    final_frames=parts.final_frames,
    after=functools.partial(phases.follow_denoiser, parts),
    # An autoencoder that the prediction does not train is a separate model in the same update.
    clipped_apart=("encoder", "decoder") if reconstructs and "prediction" not in learns_from else (),
  )
  reward_end = Phase(
    name="reward_end",
    components=("encoder", "reward_end") if "reward_end" in learns_from else ("reward_end",),
    length=length + parts.horizon,
    losses=functools.partial(phases.reward_end_losses, parts),
    beyond_end=True,
    final_frames=True,
    after=functools.partial(phases.follow_encoder, parts),
  )
  actor_critic = Phase(
    name="actor_critic",
    components=("actor_critic",),
    length=length,
    losses=functools.partial(phases.actor_critic_losses, parts),
    segments=2 if parts.restart_after_end else 1,
    batch_size=parts.trajectories,
  )
  probe = Phase(
    name="probe",
    components=("probe",),
    length=1,
    losses=functools.partial(phases.probe_losses, parts),
    final_frames=True,
  )
  return (denoiser, reward_end, actor_critic, *((probe,) if parts.probe is not None else ()))


def _init(parts: Parts, key: Array) -> dict[str, Params]:
  keys = jax.random.split(key, 4)
  params = {
    "encoder": parts.codec.init(keys[0]),
    "denoiser": parts.dynamics.init(keys[1]),
    "reward_end": parts.reward_end.init(keys[2]),
    "actor_critic": parts.actor_critic.init(keys[3]),
  }
  if parts.decoder is not None:
    params["decoder"] = parts.decoder.init(jax.random.fold_in(key, 4))
  if parts.probe is not None:
    params["probe"] = parts.probe.init(jax.random.fold_in(key, 5))
  if parts.target_decay:
    # A copy, since aliased leaves cannot be donated.
    params["target_encoder"] = jax.tree.map(jnp.copy, params["encoder"])
  if parts.average_decay:
    params["average_denoiser"] = jax.tree.map(jnp.copy, params["denoiser"])
  return params


def _policy(
  parts: Parts, params: dict[str, Params], observations: Array, state: LstmState
) -> tuple[Array, Array, LstmState]:
  observations = observations[:, None]
  latents = phases.encode(parts, params, observations, jnp.ones(observations.shape[:2], bool))
  logits, values, state = parts.actor_critic.apply(params["actor_critic"], latents, state)
  return logits[:, 0], values[:, 0], state


def _num_actions(parts: Parts, params: dict[str, Params]) -> int | Array:
  own = params["actor_critic"].get("num_actions")
  return parts.spec.num_actions if own is None else own.astype(jnp.int32)


def _decode(parts: Parts) -> Callable[[dict[str, Params], Array], Array] | None:
  """Returns `Model.decode`, by the codec itself, the model's decoder or the probe; None if there is none of them."""
  named = [(name, part) for name, part in (("decoder", parts.decoder), ("probe", parts.probe)) if part is not None]
  if parts.codec.decode is None and not named:
    return None

  def decode(params: dict[str, Params], latents: Array) -> Array:
    frames = latents.reshape(-1, *parts.codec.latent_shape)
    if parts.codec.decode is not None:
      images = parts.codec.decode(frames)
    else:
      name, decoder = named[0]
      images = decoder.decode(params[name], frames)
    return codecs.to_pixels(images).reshape(*latents.shape[:2], *parts.spec.observation_shape)

  return decode
