"""Episodes recorded by other libraries: DIAMOND's files, and data sets of Minari."""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jedi_jax.episodes import Episode
from jedi_jax.errors import UserError, nearest
from jedi_jax.interop.torch_file import load_arrays

_DIAMOND = {"obs": 4, "act": 1, "rew": 1, "end": 1, "trunc": 1}
"""Arrays of DIAMOND's episodes, and their dimensions."""


def read_diamond(directory: str | os.PathLike[str]) -> Iterator[Episode]:
  """Yields the episodes that DIAMOND recorded, in the order of their numbers; nothing in a file is executed.

  DIAMOND stores a final frame only for an episode that ended. The last step of another episode is dropped.

  Args:
    directory: DIAMOND's folder of episodes, such as `dataset/train`, with files such as `000/00/0/0.pt`.

  Raises:
    UserError: if there are no episodes, or a file is damaged or has other arrays.
  """
  path = pathlib.Path(os.path.expanduser(directory))
  try:
    files = [file for file in path.rglob("*.pt") if file.stem.isdecimal()]
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}") from None
  if not files:
    raise UserError(f"{path} holds no episodes of DIAMOND: name a folder with files such as 000/00/0/0.pt")
  if len({int(file.stem) for file in files}) < len(files):
    raise UserError(f"{path} has several episodes of one number: name the folder of one data set, such as train")
  for file in sorted(files, key=lambda file: int(file.stem)):
    arrays = load_arrays(file, nested=True)
    for name, dimensions in _DIAMOND.items():
      if name not in arrays or arrays[name].ndim != dimensions or len(arrays[name]) != len(arrays["obs"]):
        found = f"{name} of {arrays[name].shape}" if name in arrays else f"no {name}"
        raise UserError(f"{file} is not an episode of DIAMOND: it has {found}")
    frames = arrays["obs"]
    steps = len(frames)
    final = arrays.get("info.final_observation")
    if final is None:
      steps -= 1
    if steps < 1:
      continue
    if final is not None:
      final = final[None] if final.ndim == 3 else final
      if final.shape != (1, *frames.shape[1:]):
        raise UserError(f"{file} is not an episode of DIAMOND: its final frame is of {final.shape}")
      # Kept in [-1, 1], whereas the other frames are stored as bytes.
      frames = np.concatenate([frames, np.clip(np.rint((final + 1) * 127.5), 0, 255).astype(np.uint8)])
    ends = bool(arrays["end"][steps - 1])
    yield Episode(frames.transpose(0, 2, 3, 1), arrays["act"][:steps], arrays["rew"][:steps], ends)


def load_minari(name: str, *, download: bool = False) -> Any:
  """Loads a data set of Minari.

  Args:
    name: such as `atari/breakout/expert-v0`.
    download: whether it is downloaded if it is not here.

  Raises:
    UserError: if Minari is not installed, or it cannot load the data set.
  """
  try:
    import minari
  except ImportError:
    raise UserError("data sets of Minari need the package: pip install 'jedi_jax[minari]'") from None
  try:
    return minari.load_dataset(name, download=download)
  except Exception as error:  # Minari, h5py and the network raise many types.
    reason = (str(error).splitlines() or [""])[0][:200]
    raise UserError(f"Minari cannot load {name!r} ({type(error).__name__}: {reason})") from None


def minari_actions(dataset: Any) -> int:
  """Returns the number of actions of a data set of Minari.

  Raises:
    UserError: if its actions are not discrete.
  """
  space = dataset.action_space
  if not hasattr(space, "n") or np.shape(space.n) != ():
    raise UserError(f"the data set has actions of {space}: they must be discrete (gymnasium.spaces.Discrete)")
  return int(space.n)


def read_minari(dataset: Any, *, key: str = "") -> Iterator[Episode]:
  """Yields the episodes of a data set of Minari. Actions are counted from 0.

  Args:
    dataset: a `minari.MinariDataset` with uint8 images [H, W, C] or [H, W] and discrete actions.
    key: of the images, where observations are dictionaries.

  Raises:
    UserError: if actions are not discrete, or observations are dictionaries without this key.
  """
  minari_actions(dataset)
  first = int(getattr(dataset.action_space, "start", 0))
  for data in dataset.iterate_episodes():
    observations = data.observations
    if isinstance(observations, Mapping):
      if key not in observations:
        raise UserError(f"observations are dictionaries without {key!r}{nearest(key, observations)}: name the images")
      observations = observations[key]
    elif key:
      raise UserError(f"observations are no dictionaries: leave out the key {key!r}")
    observations = np.asarray(observations)
    if observations.ndim == 3:
      observations = observations[..., None]
    terminated = np.asarray(data.terminations)
    yield Episode(
      observations, np.asarray(data.actions) - first, np.asarray(data.rewards), bool(terminated.size and terminated[-1])
    )
