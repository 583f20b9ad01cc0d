"""Import and export of checkpoints of DIAMOND, the PyTorch program github.com/eloialonso/diamond.

A table of rules maps each of DIAMOND's parameter names to the path of our parameter and converts its layout:
convolutions between OIHW and HWIO, linear layers between (out, in) and (in, out), and LSTM inputs between flattened CHW
and flattened HWC.
"""

import contextlib
import itertools
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jedi_jax import config as config_lib
from jedi_jax import envs
from jedi_jax.agent import Agent
from jedi_jax.config import Config
from jedi_jax.errors import UserError
from jedi_jax.interop.torch_file import load_arrays
from jedi_jax.models.build import build
from jedi_jax.runs import checkpoint, workdir
from jedi_jax.types import EnvSpec


class Rule(NamedTuple):
  """Correspondence of one parameter.

  Attributes:
    name: name in DIAMOND's state dictionary.
    path: keys of our parameter, the component first.
    to_jax: converts DIAMOND's array to our layout.
    to_torch: converts our array to DIAMOND's layout.
  """

  name: str
  path: tuple[str, ...]
  to_jax: Callable[[np.ndarray], np.ndarray]
  to_torch: Callable[[np.ndarray], np.ndarray]


def rules(config: Config, spec: EnvSpec) -> list[Rule]:
  """Returns the rules of all parameters of variant `diamond` with this configuration."""
  return [
    *_denoiser_rules(config),
    *_reward_end_rules(config, spec),
    *_actor_critic_rules(config, spec),
  ]


def import_checkpoint(path: str | os.PathLike[str], *, env: str, directory: str | os.PathLike[str]) -> Agent:
  """Converts a checkpoint file of DIAMOND to the directory of a run, which `load_agent` and all programs accept.

  Args:
    path: the `.pt` file. No code from it is executed.
    env: name of the environment that the checkpoint was trained on.
    directory: the run's working directory; created after all checks have passed.

  Returns:
    The agent.

  Raises:
    UserError: if the file is not a checkpoint of DIAMOND, does not match the environment, or the directory already
      holds a run.
  """
  target = workdir.locate(directory)
  for name in ("config.json", "checkpoints"):
    if os.path.exists(target / name):  # Unlike pathlib's, false for names that no file can have.
      raise UserError(f"{target} already holds a run ({name}): name another directory")
  arrays = load(path)
  config, spec = infer(arrays, env=env)
  expected = envs.spec(env)
  if spec != expected:
    raise UserError(
      f"{path} has {spec.num_actions} actions and frames {spec.observation_shape}, but {env} has "
      f"{expected.num_actions} and {expected.observation_shape}: name the environment that it was trained on"
    )
  params = import_params(arrays, config, spec)
  model = build(config, spec)
  run = workdir.prepare(directory, config, spec)
  try:
    with contextlib.closing(checkpoint.Checkpoints(run.checkpoints / "latest", keep=1)) as checkpoints:
      checkpoints.save(0, params=params)
      checkpoints.wait()
  except checkpoint.SaveError:
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    (run.path / "config.json").unlink()
    raise
  return Agent(model, params, config)


def import_params(arrays: Mapping[str, np.ndarray], config: Config, spec: EnvSpec) -> dict[str, Any]:
  """Converts DIAMOND's arrays to our parameters.

  Args:
    arrays: DIAMOND's state dictionary, in PyTorch's layout.
    config: a matching configuration of variant `diamond`; see `infer`.
    spec: the environment's spec.

  Returns:
    Parameters by component; float32.

  Raises:
    UserError: if an array is missing, unknown, of the wrong shape or not numeric, or DIAMOND cannot represent the
      configuration.
  """
  table, expected = _counterpart(config, spec)
  known = {rule.name for rule in table}
  for name in arrays:
    if name not in known:
      raise UserError(f"the checkpoint has an unknown array {name[:200]!r}")
  params: dict[str, Any] = {component: {} for component in expected}
  for rule in table:
    if rule.name not in arrays:
      raise UserError(f"the checkpoint lacks {rule.name}")
    value = _convert(rule, arrays[rule.name], _at(expected, rule.path).shape)
    node = params
    for key in rule.path[:-1]:
      node = node.setdefault(key, {})
    node[rule.path[-1]] = value
  return params


def export_state_dict(params: Mapping[str, Any], config: Config, spec: EnvSpec) -> dict[str, np.ndarray]:
  """Converts our parameters to DIAMOND's arrays, the inverse of `import_params`.

  Returns:
    DIAMOND's state dictionary; float32 in PyTorch's layout.

  Raises:
    UserError: if DIAMOND cannot represent the configuration.
  """
  table, _ = _counterpart(config, spec)
  arrays = {}
  for rule in table:
    arrays[rule.name] = np.ascontiguousarray(rule.to_torch(np.asarray(_at(params, rule.path), np.float32)))
  return arrays


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Reads the arrays of a checkpoint file of DIAMOND. No code from the file is executed.

  Raises:
    UserError: if it is not such a file.
  """
  arrays = load_arrays(path)
  if "denoiser.inner_model.conv_in.weight" not in arrays:
    raise UserError(f"{path} is not a DIAMOND checkpoint: it lacks denoiser.inner_model.conv_in.weight")
  return arrays


def infer(arrays: Mapping[str, np.ndarray], *, env: str) -> tuple[Config, EnvSpec]:
  """Infers the configuration and the environment's spec from the shapes of the arrays.

  Args:
    arrays: DIAMOND's state dictionary.
    env: name of the environment that the checkpoint was trained on; the arrays do not contain it.

  Raises:
    UserError: if the shapes are inconsistent.
  """
  try:
    return _infer(arrays, env)
  except (KeyError, IndexError, TypeError, ValueError, ArithmeticError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f"the checkpoint's arrays do not form a DIAMOND model ({error!r})") from None


def _counterpart(config: Config, spec: EnvSpec) -> tuple[list[Rule], dict[str, Any]]:
  """Returns the rules and the shapes of our parameters.

  Raises:
    UserError: if DIAMOND cannot represent the configuration.
  """
  height, width, _ = spec.observation_shape
  levels = len(config.reward_end.channels)
  if not config.reward_end.downsample and levels > 1:
    raise UserError("reward_end.downsample=False has no counterpart in DIAMOND, whose levels always halve the frame")
  if not config.actor_critic.channels:
    raise UserError("actor_critic.channels=() has no counterpart in DIAMOND, whose policy always has a convolution")
  if height != width or height % 2 ** (levels - 1):
    raise UserError(
      f"frames of {height} x {width} have no counterpart in DIAMOND with {levels} reward_end.channels: "
      f"height and width must be equal and a multiple of {2 ** (levels - 1)}"
    )
  table = rules(config, spec)
  expected = jax.eval_shape(build(config, spec).init, jax.random.key(0))
  known = {rule.path for rule in table}
  for path, _ in jax.tree_util.tree_leaves_with_path(expected):
    names = tuple(key.key for key in path)
    if names not in known:
      raise UserError(f"{'/'.join(names)} has no counterpart in DIAMOND: only the parameters of variant=diamond have")
  return table, expected


def _convert(rule: Rule, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Converts DIAMOND's array to our layout as float32; `shape` is the shape of our parameter."""
  expected = rule.to_torch(np.broadcast_to(np.float32(0), shape)).shape
  if np.shape(value) != expected:
    raise UserError(f"{rule.name} has shape {np.shape(value)}, expected {expected}")
  try:
    converted = np.asarray(value).astype(np.float32, casting="same_kind")
    return np.ascontiguousarray(rule.to_jax(converted))
  except (TypeError, ValueError):
    raise UserError(f"{rule.name} has dtype {np.asarray(value).dtype}, expected numbers") from None


def _at(tree: Any, path: tuple[str, ...]) -> Any:
  """Returns the leaf at a path of nested dictionaries."""
  for key in path:
    tree = tree[key]
  return tree


def _infer(arrays: Mapping[str, np.ndarray], env: str) -> tuple[Config, EnvSpec]:
  shape = {name: np.shape(value) for name, value in arrays.items()}
  inner, unet = "denoiser.inner_model.", "denoiser.inner_model.unet."
  width = shape[inner + "cond_proj.0.weight"][0]
  num_actions, per_action = shape[inner + "act_emb.0.weight"]
  image_channels = shape[inner + "conv_out.weight"][0]
  depths, channels, attention = _levels(shape, unet + "d_blocks.{}.resblocks.{}.")
  reward = "rew_end_model."
  r_depths, r_channels, r_attention = _levels(shape, reward + "encoder.blocks.{}.resblocks.{}.")
  a_channels, a_down = _stages(shape)
  size_squared = shape[reward + "lstm.weight_ih_l0"][1] // r_channels[-2]
  size = round(size_squared**0.5) * 2 ** (len(r_channels) - 2)
  if min(num_actions, image_channels, size) < 1:
    raise ValueError("an axis of size 0")
  config = config_lib.make_config(
    env=env,
    variant="diamond",
    overrides={
      "denoiser.channels": channels,
      "denoiser.depths": depths,
      "denoiser.attention": attention,
      "denoiser.conditioning_width": width,
      "denoiser.conditioning_frames": width // per_action,
      "reward_end.channels": r_channels[:-1],
      "reward_end.depths": r_depths[:-1],
      "reward_end.attention": r_attention[:-1],
      "reward_end.conditioning_width": shape[reward + "act_emb.weight"][1],
      "reward_end.lstm_width": shape[reward + "lstm.weight_hh_l0"][1],
      "actor_critic.channels": a_channels,
      "actor_critic.downsample": a_down,
      "actor_critic.lstm_width": shape["actor_critic.lstm.weight_hh"][1],
    },
  )
  return config, EnvSpec(int(num_actions), (size, size, int(image_channels)))


def _levels(
  shape: Mapping[str, tuple[int, ...]], pattern: str
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
  """Returns depths, channels and attention of the levels with blocks named by `pattern`."""
  depths: list[int] = []
  channels: list[int] = []
  attention: list[bool] = []
  while pattern.format(len(depths), 0) + "conv1.weight" in shape:
    level, depth = len(depths), 0
    while pattern.format(level, depth) + "conv1.weight" in shape:
      depth += 1
    depths.append(depth)
    channels.append(int(shape[pattern.format(level, 0) + "conv1.weight"][0]))
    attention.append(pattern.format(level, 0) + "attn.qkv_proj.weight" in shape)
  return tuple(depths), tuple(channels), tuple(attention)


def _stages(shape: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[bool, ...]]:
  """Returns the channels of the actor-critic's stages, and whether each pools: then the next index skips one."""
  found = (re.fullmatch(r"actor_critic\.encoder\.encoder\.(\d+)\.f\.2\.weight", name) for name in shape)
  indices = sorted(int(match.group(1)) for match in found if match)
  channels = tuple(int(shape[f"actor_critic.encoder.encoder.{i}.f.2.weight"][0]) for i in indices)
  # Pooling of the last stage shows only in the LSTM's input size.
  down = [after - before == 2 for before, after in itertools.pairwise(indices)]
  inputs = shape["actor_critic.lstm.weight_ih"][1] // channels[-1]
  reward = shape["rew_end_model.lstm.weight_ih_l0"][1]
  blocks = {name.split(".")[3] for name in shape if name.startswith("rew_end_model.encoder.blocks.")}
  last_channels = shape[f"rew_end_model.encoder.blocks.{len(blocks) - 1}.resblocks.0.conv1.weight"][0]
  size = round((reward // last_channels) ** 0.5) * 2 ** (len(blocks) - 2)
  pools = round(math.log2(size / inputs**0.5))
  down.append(pools > sum(down))
  return channels, tuple(down)


def _denoiser_rules(config: Config) -> Iterator[Rule]:
  c = config.denoiser
  prefix, root = "denoiser.inner_model.", ("denoiser",)
  yield Rule(prefix + "noise_emb.weight", (*root, "noise_embedding", "frequencies"), _same, _same)
  yield Rule(prefix + "act_emb.0.weight", (*root, "action_embedding", "embedding"), _same, _same)
  yield from _linear(prefix + "cond_proj.0", (*root, "condition_0"))
  yield from _linear(prefix + "cond_proj.2", (*root, "condition_1"))
  yield from _conv(prefix + "conv_in", (*root, "conv_in"))
  unet, net = prefix + "unet.", (*root, "unet")
  last = len(c.channels) - 1
  for level, (depth, attention) in enumerate(zip(c.depths, c.attention, strict=True)):
    before = c.channels[max(0, level - 1)]
    features = c.channels[level]
    for i in range(depth):
      inputs = before if i == 0 else features
      yield from _block(
        f"{unet}d_blocks.{level}.resblocks.{i}",
        (*net, f"down_{level}_{i}"),
        projected=inputs != features,
        attention=attention,
      )
    for i in range(depth + 1):
      # Skip connections double the input of each upsampling block, so each has a projection.
      yield from _block(
        f"{unet}u_blocks.{last - level}.resblocks.{i}", (*net, f"up_{level}_{i}"), projected=True, attention=attention
      )
    if level > 0:
      yield from _conv(f"{unet}downsamples.{level}.conv", (*net, f"downsample_{level}", "conv"))
      yield from _conv(f"{unet}upsamples.{last - level + 1}.conv", (*net, f"upsample_{level}"))
  for i in range(2):
    yield from _block(f"{unet}mid_blocks.resblocks.{i}", (*net, f"middle_{i}"), projected=False, attention=True)
  yield from _norm(prefix + "norm_out.norm", (*root, "norm_out"))
  yield from _conv(prefix + "conv_out", (*root, "conv_out"))


def _reward_end_rules(config: Config, spec: EnvSpec) -> Iterator[Rule]:
  c = config.reward_end
  prefix, root = "rew_end_model.", ("reward_end",)
  yield from _conv(prefix + "encoder.conv_in", (*root, "conv_in"))
  levels = len(c.channels)
  for level, (depth, attention) in enumerate(zip(c.depths, c.attention, strict=True)):
    before = c.channels[max(0, level - 1)]
    for i in range(depth):
      projected = i == 0 and before != c.channels[level]
      yield from _block(
        f"{prefix}encoder.blocks.{level}.resblocks.{i}",
        (*root, f"block_{level}_{i}"),
        projected=projected,
        attention=attention,
      )
    if level > 0:
      yield from _conv(f"{prefix}encoder.downsamples.{level}.conv", (*root, f"downsample_{level}", "conv"))
  for i in range(2):
    yield from _block(
      f"{prefix}encoder.blocks.{levels}.resblocks.{i}", (*root, f"last_{i}"), projected=False, attention=True
    )
  yield Rule(prefix + "act_emb.weight", (*root, "action_embedding", "embedding"), _same, _same)
  height, width, _ = spec.observation_shape
  for _ in range(levels - 1):
    height, width = -(-height // 2), -(-width // 2)
  yield from _lstm(prefix + "lstm", (*root, "lstm"), "_l0", (height, width, c.channels[-1]))
  yield from _linear(prefix + "head.0", (*root, "head_0"))
  yield Rule(prefix + "head.2.weight", (*root, "head_1", "kernel"), np.transpose, np.transpose)


def _actor_critic_rules(config: Config, spec: EnvSpec) -> Iterator[Rule]:
  c = config.actor_critic
  prefix, root = "actor_critic.", ("actor_critic",)
  yield from _conv(prefix + "encoder.encoder.0", (*root, "encoder", "conv_in"))
  index = 1
  height, width, _ = spec.observation_shape
  for stage, pool in enumerate(c.downsample):
    name, path = f"{prefix}encoder.encoder.{index}", (*root, "encoder", f"stage_{stage}")
    yield from _norm(f"{name}.f.0.norm", (*path, "norm"))
    yield from _conv(f"{name}.f.2", (*path, "conv"))
    if c.channels[max(0, stage - 1)] != c.channels[stage]:
      yield from _projection(f"{name}.skip_projection", (*path, "skip"))
    index += 2 if pool else 1
    height, width = (height // 2, width // 2) if pool else (height, width)
  yield from _lstm(prefix + "lstm", (*root, "lstm"), "", (height, width, c.channels[-1]))
  yield from _linear(prefix + "critic_linear", (*root, "critic"))
  yield from _linear(prefix + "actor_linear", (*root, "actor"))


def _block(name: str, path: tuple[str, ...], *, projected: bool, attention: bool) -> Iterator[Rule]:
  if projected:
    yield from _projection(f"{name}.proj", (*path, "skip"))
  for i in (1, 2):
    yield from _linear(f"{name}.norm{i}.linear", (*path, f"norm_{i}", "linear"))
    yield from _conv(f"{name}.conv{i}", (*path, f"conv_{i}"))
  if attention:
    yield from _norm(f"{name}.attn.norm.norm", (*path, "attention", "norm"))
    yield from _projection(f"{name}.attn.qkv_proj", (*path, "attention", "qkv"))
    yield from _projection(f"{name}.attn.out_proj", (*path, "attention", "out"))


def _linear(name: str, path: tuple[str, ...]) -> Iterator[Rule]:
  yield Rule(f"{name}.weight", (*path, "kernel"), np.transpose, np.transpose)
  yield Rule(f"{name}.bias", (*path, "bias"), _same, _same)


def _conv(name: str, path: tuple[str, ...]) -> Iterator[Rule]:
  yield Rule(f"{name}.weight", (*path, "kernel"), lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
  yield Rule(f"{name}.bias", (*path, "bias"), _same, _same)


def _projection(name: str, path: tuple[str, ...]) -> Iterator[Rule]:
  """A 1 x 1 convolution in DIAMOND, a linear layer in this library."""
  yield Rule(f"{name}.weight", (*path, "kernel"), lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])
  yield Rule(f"{name}.bias", (*path, "bias"), _same, _same)


def _norm(name: str, path: tuple[str, ...]) -> Iterator[Rule]:
  yield Rule(f"{name}.weight", (*path, "scale"), _same, _same)
  yield Rule(f"{name}.bias", (*path, "bias"), _same, _same)


def _lstm(name: str, path: tuple[str, ...], suffix: str, inputs: tuple[int, int, int]) -> Iterator[Rule]:
  height, width, channels = inputs

  def to_jax(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, channels, height, width).transpose(2, 3, 1, 0).reshape(height * width * channels, -1)

  def to_torch(x: np.ndarray) -> np.ndarray:
    return x.reshape(height, width, channels, -1).transpose(3, 2, 0, 1).reshape(-1, height * width * channels)

  yield Rule(f"{name}.weight_ih{suffix}", (*path, "kernel_ih"), to_jax, to_torch)
  yield Rule(f"{name}.weight_hh{suffix}", (*path, "kernel_hh"), np.transpose, np.transpose)
  yield Rule(f"{name}.bias_ih{suffix}", (*path, "bias_ih"), _same, _same)
  yield Rule(f"{name}.bias_hh{suffix}", (*path, "bias_hh"), _same, _same)


def _same(x: np.ndarray) -> np.ndarray:
  return x
