"""Saved agents: one folder with parameters, configuration and model card, as the Hugging Face Hub expects it.

`model.safetensors` has the parameters by path, such as 'encoder/conv_in/kernel'. `config.json` is that of a run, with
the format's number ('agent'), the checksum of the parameters ('sha256'), the version of JAX ('jax') and the result of
the run ('result'). `README.md` is written from it. Nothing in a folder is executed.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jedi_jax import config as config_lib
from jedi_jax.config import Config
from jedi_jax.errors import UserError, nearest
from jedi_jax.runs import card, checkpoint, safetensors, workdir
from jedi_jax.types import EnvSpec
from jedi_jax.version import __version__

FORMAT = 1
MODEL, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
SHIPPED = pathlib.Path(__file__).parents[1] / "agents"
"""Folder of the agents that are part of the package."""

_CURE = "download or save the agent again"


class Saved(NamedTuple):
  """A saved agent.

  Attributes:
    config: the configuration of its run.
    spec: the environment of its run.
    arrays: parameters by path, such as 'encoder/conv_in/kernel'.
    result: the contents of the run's result.json; None if they are not known.
    data: of a run on recorded episodes, `datasets.Dataset.record` of them; None otherwise.
  """

  config: Config
  spec: EnvSpec
  arrays: dict[str, np.ndarray]
  result: dict[str, Any] | None
  data: dict[str, Any] | None


def resolve(name: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the folder of a name; downloads it if necessary.

  Args:
    name: a folder; 'hf://user/name' or 'hf://user/name@revision' for a repository of the Hugging Face Hub; or
      'jedi://name' for an agent of the package.

  Raises:
    UserError: if there is no such agent, it cannot be downloaded, or the package `huggingface_hub` is missing.
  """
  text = os.fspath(name)
  if text.startswith("jedi://"):
    shipped = sorted(path.name for path in SHIPPED.glob("*") if path.is_dir())
    if text.removeprefix("jedi://") not in shipped:
      raise UserError(f"{text} is not an agent of this package{nearest(text, [f'jedi://{own}' for own in shipped])}")
    return SHIPPED / text.removeprefix("jedi://")
  return _download(text) if text.startswith("hf://") else workdir.locate(name)


def _download(name: str) -> pathlib.Path:
  match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
  if match is None:
    raise UserError(f"{name[:200]!r} is not of the form hf://user/name or hf://user/name@revision")
  try:
    import huggingface_hub
  except ImportError:
    raise UserError(f"{name} needs huggingface_hub: pip install huggingface_hub") from None
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(match[1], revision=match[2], allow_patterns=[MODEL, CONFIG, CARD])
    )
  except Exception as error:  # The hub, its client and the disk raise many types.
    reason = (str(error).split("\n") or [""])[0][:200] or type(error).__name__
    raise UserError(f"{name} cannot be downloaded ({reason})") from None


def is_saved_agent(path: pathlib.Path) -> bool:
  """Returns whether a folder holds a saved agent, which may not be whole."""
  if os.path.exists(path / MODEL):  # Unlike pathlib's, False for names that no file can have.
    return True
  try:
    data = json.loads((path / CONFIG).read_text())
  except (OSError, ValueError, RecursionError):
    return False
  return isinstance(data, dict) and "agent" in data


def write(
  folder: str | os.PathLike[str],
  *,
  params: Any,
  config: Config,
  spec: EnvSpec,
  sizes: Mapping[str, int],
  result: Mapping[str, Any] | None = None,
  data: Mapping[str, Any] | None = None,
  half: bool = False,
  overwrite: bool = False,
) -> pathlib.Path:
  """Writes an agent and returns the folder.

  Args:
    folder: created if missing.
    params: pytree of arrays.
    config: the configuration of its run.
    spec: the environment of its run.
    sizes: numbers of trained parameters, for the model card.
    result: the contents of the run's result.json, for the model card.
    data: of a run on recorded episodes, `datasets.Dataset.record` of them, for the model card.
    half: whether float32 parameters are rounded to float16.
    overwrite: replaces the three files of an earlier save. Other files stay as they are.

  Raises:
    UserError: if the folder holds a run, or an agent and `overwrite` is false, or cannot be written.
  """
  path = workdir.locate(folder)
  if os.path.exists(path / "checkpoints"):
    raise UserError(f"{path} holds a run: name another folder")
  found = [name for name in (MODEL, CONFIG, CARD) if os.path.exists(path / name)]
  if found and not is_saved_agent(path):
    raise UserError(f"{path} has {found[0]}, which is not a saved agent's: name another folder")
  if found and not overwrite:
    raise UserError(f"{path} holds an agent: name another folder, or overwrite it")
  arrays = checkpoint.flatten(params)
  if half:
    arrays = {name: _halved(name, value) if value.dtype == np.float32 else value for name, value in arrays.items()}
  model = safetensors.encode(arrays)
  about = {
    "agent": FORMAT,
    "version": __version__,
    "jax": jax.__version__,
    "sha256": hashlib.sha256(model).hexdigest(),
    **({"half": True} if half else {}),
    "spec": {"num_actions": spec.num_actions, "observation_shape": list(spec.observation_shape)},
    "config": config_lib.to_dict(config),
    "result": None if result is None else dict(result),
    **({} if data is None else {"data": dict(data)}),
  }
  versions = {"jedi_jax": __version__, "JAX": jax.__version__}
  text = card.write(config, spec, sizes=sizes, result=result, data=data, versions=versions)
  _write_together(path, {MODEL: model, CARD: text.encode(), CONFIG: (json.dumps(about, indent=2) + "\n").encode()})
  return path


def _halved(name: str, value: np.ndarray) -> np.ndarray:
  with np.errstate(over="ignore"):
    half = value.astype(np.float16)
  if not np.array_equal(np.isfinite(half), np.isfinite(value)):
    raise UserError(f"{name} has values beyond float16's range: save the agent without `half`")
  return half


def _write_together(path: pathlib.Path, files: Mapping[str, bytes]) -> None:
  """Writes files to a folder. None is replaced before all are written."""
  temporary = {name: path / f".{name}.tmp" for name in files}
  try:
    path.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
      temporary[name].write_bytes(data)
    for name in files:
      temporary[name].replace(path / name)
  except OSError as error:
    raise UserError(f"cannot write the agent in {path}: {error.strerror}") from None
  finally:
    for file in temporary.values():
      with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)


def read(path: pathlib.Path) -> Saved:
  """Reads a saved agent. Nothing in the folder is executed.

  Args:
    path: the folder.

  Raises:
    UserError: if a file is missing, truncated, altered or of another format, or a setting is unknown or not valid.
  """
  try:
    about = json.loads((path / CONFIG).read_text())
    number = about.get("agent") if isinstance(about, dict) else None
  except FileNotFoundError:
    raise UserError(f"{path} has {MODEL} but no {CONFIG}: {_CURE}") from None
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path / CONFIG} cannot be read ({repr(error)[:200]}): {_CURE}") from None
  if number != FORMAT:
    raise UserError(
      f"{path / CONFIG} has the format {str(number)[:40]!r} ('agent'), and version {__version__} of jedi_jax reads "
      f"{FORMAT}: load it with the version that wrote it"
    )
  about, config, spec = workdir.read_config(path, cure=_CURE)
  try:
    data = (path / MODEL).read_bytes()
  except FileNotFoundError:
    raise UserError(f"{path} has {CONFIG} but no {MODEL}: {_CURE}") from None
  except OSError as error:
    raise UserError(f"{path / MODEL} cannot be read ({error.strerror}): {_CURE}") from None
  if hashlib.sha256(data).hexdigest() != about.get("sha256"):
    raise UserError(f"{path / MODEL} is truncated or altered: its SHA-256 differs from that in {CONFIG}; {_CURE}")
  result = about.get("result")
  arrays = safetensors.decode(data, path / MODEL)
  if about.get("half") is True:
    arrays = {name: value.astype(np.float32) if value.dtype == np.float16 else value for name, value in arrays.items()}
  recorded = about.get("data")
  return Saved(config, spec, arrays, *(value if isinstance(value, dict) else None for value in (result, recorded)))
