"""What a model is: its parts, its phases, and the functions that training and acting call."""

import dataclasses
from collections.abc import Callable

from jedi_jax.models.actor_critic import ActorCritic
from jedi_jax.models.codecs import Codec, Decoder
from jedi_jax.models.dynamics import Dynamics
from jedi_jax.models.reward_end import RewardEnd
from jedi_jax.types import Array, EnvSpec, Losses, LstmState, Metrics, Params, Segment, Trajectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
  """One kind of update: what it draws from replay, its loss, and the parameters that the loss trains.

  Attributes:
    name: also the name of its optimiser and of its counter.
    components: names of the parameters that receive gradients.
    length: frames of a segment.
    losses: (all parameters, `Segment`, keys [B], key that the batch shares, update count []) -> `Losses`, which are
      differentiated with respect to `components` alone.
    beyond_end: whether segments may run past the end of their episode.
    final_frames: whether the final frame of an episode may be the last of a segment.
    segments: segments drawn for each element of the batch; the first of all elements come first.
    batch_size: elements of the global batch; 0 for as many as the other phases have.
    after: (all parameters, metrics of the whole batch) -> all parameters, applied after each update. Of phases that
      share an update only the first one's applies.
    clipped_apart: components whose gradients are clipped by a norm of their own.
  """

  name: str
  components: tuple[str, ...]
  length: int
  losses: Callable[[dict[str, Params], Segment, Array, Array, Array], Losses]
  beyond_end: bool = False
  final_frames: bool = False
  segments: int = 1
  batch_size: int = 0
  after: Callable[[dict[str, Params], Metrics], dict[str, Params]] = lambda params, metrics: params
  clipped_apart: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
  """The parts of a model and how they learn; `compose` makes a `Model` of them.

  Attributes:
    spec: the environment; its number of actions is A, the size of the policy's output.
    codec: maps frames to latents.
    dynamics: maps latents to latents.
    reward_end: maps latents to rewards and ends.
    actor_critic: maps latents to actions and values.
    decoder: its reconstruction of the conditioning frames is a term of the denoiser phase; None for none.
    probe: a decoder trained in a phase of its own, on detached latents, so that people can see them; None for none.
    learns_from: the losses that train the encoder, a subset of 'prediction', 'reward_end' and 'reconstruction'.
    conditioning_frames: L.
    targets: n, targets of one denoising segment.
    horizon: H, imagined steps of one actor-critic update.
    trajectories: imagined in one actor-critic update; 0 for the batch size of the other updates.
    target_decay: decay an update of the average encoder ('target_encoder') that gives the targets; 0 for none.
    average_decay: decay an update of the average denoiser ('average_denoiser') that imagines; 0 for none.
    final_frames: whether the final frames of episodes are targets too.
    forget_padding: see `imagination.imagine`.
    restart_after_end: whether imagined trajectories continue from a second segment after their first end.
    unroll: see `imagination.imagine`.
    reward_end_noise: standard deviation of the noise on the latents of half of the reward / end model's segments.
  """

  spec: EnvSpec
  codec: Codec
  dynamics: Dynamics
  reward_end: RewardEnd
  actor_critic: ActorCritic
  decoder: Decoder | None = None
  probe: Decoder | None = None
  learns_from: tuple[str, ...] = ("prediction", "reward_end")
  conditioning_frames: int = 4
  targets: int = 2
  horizon: int = 15
  trajectories: int = 0
  target_decay: float = 0.0
  average_decay: float = 0.0
  final_frames: bool = True
  forget_padding: bool = True
  restart_after_end: bool = False
  unroll: int = 1
  reward_end_noise: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A world model and its actor-critic, as data and pure functions.

  Attributes:
    parts: what the model is made of.
    init: key -> parameters by component. The key is consumed.
    phases: the updates of one epoch, in order.
    encode: (parameters, observations [B, T, H, W, C] uint8, mask [B, T] bool) -> latents [B, T, h, w, c].
    policy: (parameters, observations [B, H, W, C] uint8, state) -> (logits [B, A], values [B], state).
    num_actions: parameters -> number of actions of the environment, an int, or [] int32 with `env.action_slots`.
    imagine: (parameters, `Segment` of B or 2 B times L frames, keys [B], number of steps, actions [B, steps] or None
      for the policy's) -> `Trajectory`; see `imagination.imagine`.
    decode: (parameters, latents [B, T, h, w, c]) -> images [B, T, H, W, C] uint8; None without a decoder.
  """

  parts: Parts
  init: Callable[[Array], dict[str, Params]]
  phases: tuple[Phase, ...]
  encode: Callable[[dict[str, Params], Array, Array], Array]
  policy: Callable[[dict[str, Params], Array, LstmState], tuple[Array, Array, LstmState]]
  num_actions: Callable[[dict[str, Params]], int | Array]
  imagine: Callable[..., Trajectory]
  decode: Callable[[dict[str, Params], Array], Array] | None

  @property
  def spec(self) -> EnvSpec:
    """Number of actions A and observation shape."""
    return self.parts.spec

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """(h, w, c)."""
    return self.parts.codec.latent_shape

  @property
  def conditioning_frames(self) -> int:
    """L."""
    return self.parts.conditioning_frames

  @property
  def dynamics(self) -> Dynamics:
    """Maps latents to latents."""
    return self.parts.dynamics

  @property
  def reward_end(self) -> RewardEnd:
    """Maps latents to rewards and ends."""
    return self.parts.reward_end

  @property
  def actor_critic(self) -> ActorCritic:
    """Maps latents to actions and values."""
    return self.parts.actor_critic

  def initial_state(self, batch: int) -> LstmState:
    """State of the policy at the start of `batch` episodes."""
    return self.parts.actor_critic.initial_state(batch)


Build = Callable[..., Model]
"""(config, spec, packed=False) -> `Model`, as `models.build.build`; its phases are named as the fields of `Updates`."""
