"""Gymnasium environments whose observations are images and whose actions are discrete.

Gymnasium is imported when an environment is first looked up.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from jedi_jax.envs.pooled import check_actions, check_numbers
from jedi_jax.errors import UserError
from jedi_jax.types import EnvSpec, EnvStep


def import_gymnasium() -> Any:
  """Imports Gymnasium; this module alone does so, and not before an environment is looked up.

  Raises:
    UserError: it cannot be imported.
  """
  try:
    import gymnasium
  except ImportError as error:
    raise UserError(f"environments gym/<id> need Gymnasium ({error}): pip install gymnasium") from None
  return gymnasium


def ids() -> tuple[str, ...]:
  """Returns the ids that are registered with Gymnasium now, in order of registration.

  Raises:
    UserError: Gymnasium is not installed.
  """
  return tuple(import_gymnasium().registry)


class View(NamedTuple):
  """How an observation becomes an image: first cropped, then resized.

  Attributes:
    crop: (top, bottom, left, right): rows top to bottom - 1 and columns left to right - 1 are kept; None keeps all.
    size: (height, width) by area averaging, each pixel the mean of what it covers, to within one level; None keeps
      the size.
  """

  crop: tuple[int, int, int, int] | None = None
  size: tuple[int, int] | None = None

  def shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns the shape of the image of an observation of a shape (H, W, C).

    Raises:
      UserError: the crop is empty or not within the observation.
    """
    height, width, channels = shape
    if self.crop is not None:
      top, bottom, left, right = self.crop
      if not (top < bottom <= height and left < right <= width):
        raise UserError(f"crop={top}-{bottom}x{left}-{right} is empty or not within {height} rows x {width} columns")
      height, width = bottom - top, right - left
    return (*(self.size or (height, width)), channels)

  def __call__(self, observations: np.ndarray) -> np.ndarray:
    """Returns the images [N, h, w, C] uint8 of observations [N, H, W, C] or [N, H, W], uint8 or bool, as a new array.

    Bool observations become 0 and 255.
    """
    if observations.ndim == 3:
      observations = observations[..., None]
    if self.crop is not None:
      top, bottom, left, right = self.crop
      observations = observations[:, top:bottom, left:right]
    if observations.dtype == np.bool_:
      observations = observations * np.uint8(255)
    if self.size in {None, observations.shape[1:3]}:
      return observations.copy()
    assert self.size is not None
    return _resize(observations, *self.size)


class GymEnv:
  """N copies of a Gymnasium environment in a `gymnasium.vector.SyncVectorEnv`; see `jedi_jax.types.VectorEnv`.

  Gymnasium's autoreset is off: a finished game is reset on its own within the step that ended it, after its final
  observation was copied. Actions are numbered from 0 also where the action space starts at another number.

  Args:
    env_id: an id that is registered with Gymnasium, such as `ALE/Pong-v5`.
    num_envs: N >= 1.
    seed: the first reset of environment i gets `seed + i`, later ones no seed.
    max_episode_steps: steps after which a game is truncated. It only lowers the limit with which the environment is
      registered; None means that limit. A game that terminates on the last allowed step ends and is not truncated.
    view: how observations become images.
    life_loss_ends: no effect.
    num_threads: no effect; the environments are stepped one after another.

  Attributes:
    repeatable: None (games of the same seed and actions may repeat); False if the environment is registered with
      `nondeterministic=True`.

  Raises:
    UserError: a number is out of its range, the environment cannot be made, its observations are no images, its
      actions are not discrete, or the crop does not fit.
  """

  def __init__(
    self,
    env_id: str,
    *,
    num_envs: int,
    seed: int,
    max_episode_steps: int | None = None,
    view: View = View(),
    life_loss_ends: bool = False,
    num_threads: int = 0,
  ) -> None:
    del life_loss_ends, num_threads
    check_numbers(num_envs, seed, max_episode_steps)
    self.num_envs = num_envs
    self.frames = 0
    self._envs, own = _make(env_id, num_envs, max_episode_steps)
    try:
      self.spec = _spec(self._envs, view)
    except UserError:
      self._envs.close()
      raise
    self.repeatable: bool | None = False if own.nondeterministic else None
    self._first_action = self._envs.single_action_space.start
    self._view = view
    self._seed: int | None = seed

  def reset(self) -> np.ndarray:
    """Begins a new game in every environment; the first call seeds them. Returns observations [N, H, W, C] uint8."""
    observations, _ = self._envs.reset(seed=self._seed)
    self._seed = None
    return self._view(observations)

  def step(self, actions: np.ndarray) -> EnvStep:
    """Takes one step in every environment and restarts finished games; actions [N] integers."""
    actions = check_actions(actions, self.num_envs, self.spec.num_actions)
    last, reward, end, truncated, _ = self._envs.step(actions.astype(np.int64) + self._first_action)
    self.frames += self.num_envs
    next_observation = observation = self._view(last)
    game_over = end | truncated
    if game_over.any():
      first, _ = self._envs.reset(options={"reset_mask": game_over})
      observation = next_observation.copy()
      observation[game_over] = self._view(first[game_over])
    return EnvStep(next_observation, observation, reward.astype(np.float32), end, truncated & ~end, game_over)

  def close(self) -> None:
    """Closes the environments."""
    self._envs.close()


@functools.cache
def game_spec(env_id: str, view: View) -> EnvSpec:
  """Returns the number of actions and the shape of the images of an environment, which is made and closed.

  Raises:
    UserError: see `GymEnv`.
  """
  envs, _ = _make(env_id, 1, None)
  try:
    return _spec(envs, view)
  finally:
    envs.close()


def _make(env_id: str, num_envs: int, max_episode_steps: int | None) -> tuple[Any, Any]:
  """Returns Gymnasium's vectorised environments, of any spaces, and the entry of its registry."""
  gymnasium = import_gymnasium()
  own = gymnasium.registry[env_id]
  limits = [limit for limit in (max_episode_steps, own.max_episode_steps) if limit is not None]
  options = {"max_episode_steps": min(limits)} if limits else {}
  mode = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED}
  try:
    return gymnasium.make_vec(own, num_envs, vectorization_mode="sync", vector_kwargs=mode, **options), own
  except (gymnasium.error.Error, ImportError) as error:
    raise UserError(f"environment gym/{env_id} cannot be made: {' '.join(str(error).split())}") from None


def _spec(envs: Any, view: View) -> EnvSpec:
  spaces = import_gymnasium().spaces
  actions, observations = envs.single_action_space, envs.single_observation_space
  name = f"environment gym/{envs.spec.id}"
  if not isinstance(actions, spaces.Discrete):
    raise UserError(f"{name}: its actions are not discrete but {_line(actions)}; choose or wrap one with Discrete(n)")
  image = isinstance(observations, spaces.Box) and observations.dtype in (np.uint8, np.bool_)
  if not image or len(observations.shape) not in (2, 3):
    raise UserError(
      f"{name}: its observations are no images but {_line(observations)}; choose or wrap one with a Box of "
      "(height, width, channels) or (height, width), uint8 or bool"
    )
  shape = observations.shape if len(observations.shape) == 3 else (*observations.shape, 1)
  try:
    return EnvSpec(int(actions.n), view.shape(shape))
  except UserError as error:
    raise UserError(f"{name}: {error}") from None


def _line(space: Any) -> str:
  """Describes a space in a line of at most 120 characters."""
  text = " ".join(str(space).split())
  return text if len(text) <= 120 else f"{text[:117]}..."


def _resize(images: np.ndarray, height: int, width: int) -> np.ndarray:
  """Resizes images [N, H, W, C] uint8 by area averaging with Pillow, channel by channel."""
  from PIL import Image

  out = np.empty((len(images), height, width, images.shape[3]), np.uint8)
  for n, c in np.ndindex(len(images), images.shape[3]):
    channel = Image.fromarray(images[n, :, :, c])
    out[n, :, :, c] = np.asarray(channel.resize((width, height), Image.Resampling.BOX))
  return out
