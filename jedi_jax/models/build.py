"""Builds the model that a configuration describes; the only reader of configuration among the models."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jedi_jax.config import Config
from jedi_jax.errors import UserError
from jedi_jax.models import actor_critic, codecs, dynamics, reward_end
from jedi_jax.models.base import Model, Parts
from jedi_jax.models.compose import compose
from jedi_jax.nn.denoiser import InnerNetwork
from jedi_jax.ops import sampler
from jedi_jax.ops.images import MAX_CHANNELS, resolve_convolution
from jedi_jax.ops.kernels import resolve_kernels
from jedi_jax.types import Compute, EnvSpec, Params

BuildDynamics = Callable[[codecs.Codec], dynamics.Dynamics]


def build(
  config: Config,
  spec: EnvSpec,
  *,
  packed: bool = False,
  codec: codecs.Codec | None = None,
  build_dynamics: BuildDynamics | None = None,
) -> Model:
  """Builds the model that a configuration describes, for an environment.

  Args:
    config: the configuration.
    spec: the environment's.
    packed: whether the model will be mapped over the parameters of several runs.
    codec: replaces the encoder that the configuration describes.
    build_dynamics: codec -> dynamics; replaces the denoiser that the configuration describes.

  Raises:
    UserError: if sizes do not fit the environment (configurations check all other sizes themselves), or `codec` is
      given with encoder.kind=identity.
  """
  slots = config.env.action_slots
  if slots and slots < spec.num_actions:
    raise UserError(f"env.action_slots={slots} is too small for the {spec.num_actions} actions of {config.env.name}")
  if (channels := spec.observation_shape[2]) > MAX_CHANNELS:
    raise UserError(
      f"observations of {config.env.name} have {channels} channels: merge some in the environment, "
      f"at most {MAX_CHANNELS} are supported"
    )
  num_slots = slots or spec.num_actions
  compute = _compute(config, packed=packed)
  learned = config.encoder.kind == "learned"
  if codec is not None and not learned:
    raise UserError("encoder.kind=identity trains no encoder, so `codec` cannot be given: use encoder.kind=learned")
  if codec is None:
    shape = spec.observation_shape
    codec = _encoder(config, shape, compute, packed=packed) if learned else codecs.identity(shape)
  else:
    _check_codec(codec, spec)
  _check_pooling("actor_critic.downsample", config.actor_critic.downsample, codec.latent_shape[:2])
  learns_from = config.encoder.learns_from if learned else ()
  decodes = "reconstruction" in learns_from
  wants_probe = config.training.first_updates.probe or config.training.updates.probe
  decoder = build_decoder(config, codec, spec.observation_shape, packed=packed)
  network = _inner_network(config, num_slots, compute)
  return compose(
    Parts(
      spec=spec._replace(num_actions=num_slots),
      codec=codec,
      dynamics=_dynamics(config, codec, network) if build_dynamics is None else build_dynamics(codec),
      reward_end=_reward_end(config, codec, num_slots, compute),
      actor_critic=_actor_critic(config, codec, spec.num_actions, compute),
      decoder=decoder if decodes else None,
      probe=decoder if wants_probe and codec.decode is None and not decodes else None,
      learns_from=learns_from,
      conditioning_frames=config.denoiser.conditioning_frames,
      targets=config.denoiser.targets,
      horizon=config.actor_critic.horizon,
      trajectories=config.actor_critic.batch_size,
      target_decay=config.encoder.target_decay,
      average_decay=config.denoiser.average_decay,
      final_frames=config.denoiser.final_frames,
      forget_padding=config.actor_critic.forget_padding,
      restart_after_end=config.actor_critic.restart_after_end,
      unroll=config.actor_critic.unroll,
      reward_end_noise=config.reward_end.noise,
    )
  )


def _compute(config: Config, *, packed: bool) -> Compute:
  given = config.precision
  # In float32 its products do not use the matrix units, which XLA's convolution does.
  fused = given.convolution == "pallas" or (given.convolution == "auto" and given.compute_dtype == "bfloat16")
  return Compute(
    dtype=jnp.dtype(given.compute_dtype),
    lowering=resolve_convolution(given.convolution, packed=packed),
    kernels=resolve_kernels(given.kernels),
    fused_convolution=fused,
  )


def _encoder(
  config: Config, observation_shape: tuple[int, int, int], compute: Compute, *, packed: bool
) -> codecs.Codec:
  c = config.encoder
  height, width, _ = observation_shape
  if height % c.patch or width % c.patch:
    raise UserError(f"encoder.patch={c.patch} does not divide the {height} x {width} frames: take a divisor of both")
  _check_pooling("encoder.downsample", c.downsample, (height // c.patch, width // c.patch))
  return codecs.learned(
    observation_shape,
    channels=c.channels,
    downsample=c.downsample,
    patch=c.patch,
    norm=c.norm,
    clamp=c.clamp,
    clamp_estimate=config.denoiser.clamp_estimate,
    chunk=_chunk(packed=packed) if c.chunk < 0 else c.chunk,
    compute=compute,
  )


def _chunk(*, packed: bool) -> int:
  """Returns `encoder.chunk` for the memory of the default device."""
  device = jax.local_devices()[0]
  if device.platform != "gpu":
    return 64
  least = (48 if packed else 8) * 2**30
  return 0 if ((device.memory_stats() or {}).get("bytes_limit") or least) >= least else 208


def _check_codec(codec: codecs.Codec, spec: EnvSpec) -> None:
  images = jax.ShapeDtypeStruct((1, *spec.observation_shape), jnp.float32)
  found = jax.eval_shape(lambda images: codec.encode(codec.init(jax.random.key(0)), images), images)
  if (found.shape[1:], found.dtype) != (codec.latent_shape, jnp.float32):
    raise UserError(f"encode returns {found.dtype} {found.shape[1:]}; expected float32 {codec.latent_shape}")


def _check_pooling(name: str, downsample: Sequence[bool], shape: tuple[int, int]) -> None:
  if min(shape) >> sum(downsample) < 1:
    raise UserError(f"{name} halves {shape[0]} x {shape[1]} {sum(downsample)} times: halve less often")


def build_decoder(
  config: Config, codec: codecs.Codec, observation_shape: tuple[int, int, int], *, packed: bool = False
) -> codecs.Decoder:
  """Builds the decoder that a configuration describes, for the latents of a codec; `packed` as in `build`."""
  c = config.encoder
  return codecs.decoder(
    codec.latent_shape,
    observation_shape,
    channels=c.channels,
    downsample=c.downsample,
    patch=c.patch,
    compute=_compute(config, packed=packed),
  )


def _inner_network(config: Config, num_actions: int, compute: Compute) -> InnerNetwork:
  c = config.denoiser
  return InnerNetwork(
    num_actions=num_actions,
    channels=c.channels,
    depths=c.depths,
    attention=c.attention,
    conditioning_width=c.conditioning_width,
    compute=compute,
  )


def _dynamics(config: Config, codec: codecs.Codec, network: InnerNetwork) -> dynamics.Dynamics:
  c, s = config.denoiser, config.sampler
  segments: dict[str, Any] = {
    "conditioning_frames": c.conditioning_frames,
    "targets": c.targets,
    "switching": c.switching,
  }
  if c.kind == "regression":
    return dynamics.regression(codec, network, sigma_data=c.sigma_data, **segments)
  sigmas = sampler.karras_sigmas(s.num_steps, sigma_min=s.sigma_min, sigma_max=s.sigma_max, rho=s.rho)
  gammas = sampler.churn_gammas(sigmas, churn=s.churn, churn_min=s.churn_min, churn_max=s.churn_max)
  return dynamics.diffusion(
    codec,
    network,
    target=c.target,
    scaling=dynamics.Scaling(c.sigma_data, c.offset_noise),
    levels=dynamics.NoiseLevels(c.sigma_log_mean, c.sigma_log_std, c.sigma_min, c.sigma_max),
    schedule=dynamics.Schedule(sigmas, s.order, gammas, s.churn_noise, s.start),
    **segments,
  )


def _reward_end(config: Config, codec: codecs.Codec, num_actions: int, compute: Compute) -> reward_end.RewardEnd:
  c = config.reward_end
  return reward_end.reward_end_model(
    codec.latent_shape,
    num_actions=num_actions,
    channels=c.channels,
    depths=c.depths,
    attention=c.attention,
    downsample=c.downsample,
    conditioning_width=c.conditioning_width,
    lstm_width=c.lstm_width,
    compute=compute,
  )


def _actor_critic(config: Config, codec: codecs.Codec, num_actions: int, compute: Compute) -> actor_critic.ActorCritic:
  c = config.actor_critic
  return actor_critic.actor_critic(
    codec.latent_shape,
    num_actions=num_actions,
    action_slots=config.env.action_slots,
    channels=c.channels,
    downsample=c.downsample,
    lstm_width=c.lstm_width,
    input_norm=c.input_norm,
    objective=actor_critic.Objective(c.gamma, c.lambda_, c.entropy_weight, c.value_weight),
    compute=compute,
  )


def with_num_actions(params: dict[str, Params], num_actions: int) -> dict[str, Params]:
  """Sets the environment's number of actions in parameters that have `env.action_slots`; others are unchanged."""
  own = params["actor_critic"]
  if "num_actions" not in own:
    return params
  return {**params, "actor_critic": {**own, "num_actions": np.asarray(num_actions, np.float32)}}


def count_parameters(params: dict[str, Params]) -> dict[str, int]:
  """Counts the trained numbers of each component; averages, fixed frequencies and measured scales are not counted."""
  untrained = ("frequencies", "change_std", "num_actions", "mean", "std")

  def size(tree: Any) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(leaf.size for path, leaf in leaves if jax.tree_util.keystr(path[-1:], simple=True) not in untrained)

  averages = ("average_denoiser", "target_encoder")
  return {name: size(tree) for name, tree in params.items() if name not in averages}
