"""Array records that are passed between modules, and protocols.

Shape letters: B batch, T time, N environments, S replay streams, H image height, W image width,
C image channels; h, w, c the same of a latent; A number of actions.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import numpy as np

Array = jax.Array
Params = Any
"""A pytree of parameters; float32 leaves."""
Metrics = Mapping[str, Array]
"""Named float32 arrays. Scalars are averaged over updates; matrices (confusion counts) are summed."""

BEYOND = 1e15
"""Bound on the absolute value of a score; sums and squares below it stay finite."""


class EnvSpec(NamedTuple):
  """Sizes of an environment that a model depends on.

  Attributes:
    num_actions: size of the discrete action set.
    observation_shape: (height, width, channels) of one uint8 observation.
  """

  num_actions: int
  observation_shape: tuple[int, int, int]


class EnvStep(NamedTuple):
  """The result of one call of `VectorEnv.step`; NumPy arrays over N environments.

  Attributes:
    next_observation: [N, H, W, C] uint8; the observation that the action led to. At the end of a game it is the true
      final frame.
    observation: [N, H, W, C] uint8; the observation for the next action. It differs from `next_observation` only where
      a game is over, and is then the first frame of the next game.
    reward: [N] float32; the raw reward of the step.
    end: [N] bool; the training episode ended: the game was lost or won or, if life losses end episodes, a life was
      lost. Values are not bootstrapped across it.
    truncated: [N] bool; the time limit stopped the game. Values are bootstrapped across it.
    game_over: [N] bool; a new game has begun. True where the game terminated or was truncated, false where only a life
      was lost.
  """

  next_observation: np.ndarray
  observation: np.ndarray
  reward: np.ndarray
  end: np.ndarray
  truncated: np.ndarray
  game_over: np.ndarray


class VectorEnv(Protocol):
  """N copies of one environment, stepped together on the host.

  Training and evaluation rely on the following:

  - The same seed and the same actions give the same games. A resumed run repeats its actions and fails if it does not
    arrive at the same observations. Environments that promise less have an attribute `repeatable`: None if games may
    repeat, and where they do not a resumed run begins new games and says so; False if they do not, and a resumed run
    begins new games without trying.
  - A finished game restarts within the `step` that ended it; no step is spent on a restart.
  - Every game ends, by itself or by a time limit. Evaluation plays whole games.
  - Returned arrays are not written to later. `observation` and `next_observation` of a step may be the same array.
  - Calls come from one thread at a time, but not always from the same one.
  """

  @property
  def num_envs(self) -> int:
    """N."""

  @property
  def spec(self) -> EnvSpec:
    """Number of actions and observation shape."""

  @property
  def frames(self) -> int:
    """Frames of the underlying game in all steps so far, over all environments (4 a step for plain Atari)."""

  def reset(self) -> np.ndarray:
    """Starts new games everywhere; returns observations [N, H, W, C] uint8.

    Called once, before the first step; again if `repeatable` is not True and a resumed run begins new games.
    """

  def step(self, actions: np.ndarray) -> EnvStep:
    """Takes one step in every environment; actions [N] int32 or int64 in [0, A)."""

  def close(self) -> None:
    """Frees the resources; no call follows."""


class Policy(Protocol):
  """Chooses actions for N environments; may keep state between calls."""

  def __call__(self, observations: np.ndarray, restart: np.ndarray) -> np.ndarray:
    """Returns one action for each environment.

    Args:
      observations: [N, H, W, C] uint8.
      restart: [N] bool; where true, the observation is the first of a new game and recurrent state must be cleared. All
        true at the first call.

    Returns:
      [N] int32 or int64 in [0, A).
    """


class Segment(flax.struct.PyTreeNode):
  """A batch of contiguous frames of replay, padded where a segment leaves its episode.

  Attributes:
    observations: [B, T, H, W, C] uint8; arbitrary where `mask` is false.
    actions: [B, T] int32; the action taken on each frame; 0 where padded and on a final frame.
    rewards: [B, T] float32; raw reward of that action; 0 where padded and on a final frame.
    ends: [B, T] bool; whether that action ended the episode.
    mask: [B, T] bool; false where the frame is padding. Transition t -> t + 1 is real where mask[t] & mask[t + 1].
  """

  observations: Array
  actions: Array
  rewards: Array
  ends: Array
  mask: Array


class Term(NamedTuple):
  """One named part of a loss, per element; the update takes its weighted mean over the global batch.

  Attributes:
    values: [...] float32, already multiplied by the term's coefficient.
    weights: [...] float32 of the same shape; 0 removes an element.
  """

  values: Array
  weights: Array


class Losses(NamedTuple):
  """What every loss function returns.

  Attributes:
    terms: named `Term`s; the loss is the sum of their weighted means.
    metrics: other figures by name. A `Term` is averaged by its weights over the global batch, a matrix of counts is
      summed, and a scalar is the same for every part of the batch. No gradient flows through them.
  """

  terms: Mapping[str, Term]
  metrics: Mapping[str, Term | Array]


class LstmState(NamedTuple):
  """State of an LSTM: `hidden` and `cell`, both [B, D] float32."""

  hidden: Array
  cell: Array


class Compute(NamedTuple):
  """How networks compute.

  Attributes:
    dtype: of activations and products; parameters stay float32.
    lowering: of 3 x 3 convolutions; see `ops.images.conv3x3`.
    kernels: of group norm and attention: 'xla', or see `ops.kernels`. Other than 'xla', loops over time and joint
      parameters also suit GPUs.
    fused_convolution: whether larger kernels that contain convolutions are used where no gradient is needed and
      `kernels` is not 'xla': `ops.fused_convolution`, `ops.fused_attention`, `ops.fused_blocks`.
  """

  dtype: Any = np.dtype("float32")
  lowering: str = "lax"
  kernels: str = "xla"
  fused_convolution: bool = False


class Trajectory(flax.struct.PyTreeNode):
  """An imagined rollout of B trajectories over T steps.

  Attributes:
    latents: [B, T + 1, h, w, c] float32; latent t is what action t was chosen on.
    actions: [B, T] int32.
    rewards: [B, T] float32 in {-1, 0, 1}.
    ends: [B, T] bool; the imagined episode ended with this step.
    alive: [B, T] float32; 1 up to and including the last step of the last episode, 0 after it.
    restarts: [B, T] float32; 1 where the episode ended with this step and a second one starts at latent t + 1.
    reward_logits: [B, T, 3] float32 of the reward signs -1, 0, 1, from which `rewards` are drawn.
    end_logits: [B, T, 2] float32 of continuing and ending.
    values: [B, T] float32; the critic's values of latents 0 to T - 1.
    policy_state: `LstmState` of the actor-critic before step 0.
    restart_state: the same before the first step of a second episode; None without second episodes.
  """

  latents: Array
  actions: Array
  rewards: Array
  ends: Array
  alive: Array
  restarts: Array
  reward_logits: Array
  end_logits: Array
  values: Array
  policy_state: LstmState
  restart_state: LstmState | None = None
