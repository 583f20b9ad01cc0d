"""DIAMOND's checkpoints (github.com/eloialonso/diamond): reading them into our parameters, and writing them.

A table of rules pairs every parameter's name there with its path here and the change of layout between them:
convolutions OIHW and HWIO, linear layers (out, in) and (in, out), and inputs of the LSTMs flattened from CHW and HWC.
"""

import itertools
import math
import os
import re
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
  """How one parameter corresponds: its name there, its path here, and the two changes of layout."""

  name: str
  path: tuple[str, ...]
  ours: Callable[[np.ndarray], np.ndarray]
  theirs: Callable[[np.ndarray], np.ndarray]


def rules(config: Config, spec: EnvSpec) -> list[Rule]:
  """Lists the rules of every parameter of variant `diamond` with this configuration."""
  return [
    *_denoiser_rules(config),
    *_reward_end_rules(config, spec),
    *_actor_critic_rules(config, spec),
  ]


def import_checkpoint(path: str | os.PathLike[str], *, env: str, directory: str | os.PathLike[str]) -> Agent:
  """Makes the directory of a run from DIAMOND's checkpoint file; programs can then evaluate it.

  Args:
    path: the `.pt` file; nothing in it is executed.
    env: name of the environment that it was trained on.
    directory: made if it does not exist; written to only when everything else has been checked.

  Returns:
    The agent.

  Raises:
    UserError: if the file is not DIAMOND's, does not fit the environment, or the directory already holds a run.
  """
  target = workdir.locate(directory)
  for name in ("config.json", "checkpoints"):
    if os.path.exists(target / name):  # Unlike pathlib's, false for names that no file can have.
      raise UserError(f"{target} already holds a run ({name}): take another directory")
  arrays = load(path)
  config, spec = infer(arrays, env=env)
  expected = envs.spec(env)
  if spec != expected:
    raise UserError(
      f"{path} is of {spec.num_actions} actions and frames {spec.observation_shape}, but {env} has "
      f"{expected.num_actions} and {expected.observation_shape}: name the environment that it was trained on"
    )
  params = import_params(arrays, config, spec)
  model = build(config, spec)
  run = workdir.prepare(directory, config, spec)
  checkpoints = checkpoint.Checkpoints(run.checkpoints / "latest", keep=1)
  checkpoints.save(0, params=params)
  checkpoints.close()
  return Agent(model, params, config)


def import_params(arrays: Mapping[str, np.ndarray], config: Config, spec: EnvSpec) -> dict[str, Any]:
  """Turns DIAMOND's arrays into our parameters by component.

  Args:
    arrays: its state dictionary, in PyTorch's layout.
    config: a configuration of variant `diamond` that fits; see `infer`.
    spec: the environment.

  Raises:
    UserError: naming the first array that is missing, unknown, of another shape or not of numbers; or if DIAMOND has
      no model of this configuration.
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
    value = _ours(rule, arrays[rule.name], _at(expected, rule.path).shape)
    node = params
    for key in rule.path[:-1]:
      node = node.setdefault(key, {})
    node[rule.path[-1]] = value
  return params


def export_state_dict(params: Mapping[str, Any], config: Config, spec: EnvSpec) -> dict[str, np.ndarray]:
  """Turns our parameters into DIAMOND's arrays, float32 in PyTorch's layout; the inverse of `import_params`.

  Raises:
    UserError: if DIAMOND has no model of this configuration.
  """
  table, _ = _counterpart(config, spec)
  arrays = {}
  for rule in table:
    arrays[rule.name] = np.ascontiguousarray(rule.theirs(np.asarray(_at(params, rule.path), np.float32)))
  return arrays


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Reads DIAMOND's checkpoint file; nothing in it is executed.

  Raises:
    UserError: if it is not one.
  """
  arrays = load_arrays(path)
  if "denoiser.inner_model.conv_in.weight" not in arrays:
    raise UserError(f"{path} is not a DIAMOND checkpoint: it lacks denoiser.inner_model.conv_in.weight")
  return arrays


def infer(arrays: Mapping[str, np.ndarray], *, env: str) -> tuple[Config, EnvSpec]:
  """Infers the configuration from the shapes of the arrays.

  Args:
    arrays: DIAMOND's state dictionary.
    env: name of the environment that it was trained on, which no array tells.

  Raises:
    UserError: if the shapes contradict one another.
  """
  try:
    return _infer(arrays, env)
  except (KeyError, IndexError, TypeError, ValueError, ArithmeticError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f"the checkpoint's arrays do not make a DIAMOND model ({error!r})") from None


def _counterpart(config: Config, spec: EnvSpec) -> tuple[list[Rule], dict[str, Any]]:
  """Returns the rules and the shapes of our parameters; refuses configurations whose networks DIAMOND cannot have."""
  height, width, _ = spec.observation_shape
  levels = len(config.reward_end.channels)
  if not config.reward_end.downsample and levels > 1:
    raise UserError("reward_end.downsample=False has no counterpart in DIAMOND, whose levels always halve the frame")
  if not config.actor_critic.channels:
    raise UserError("actor_critic.channels=() has no counterpart in DIAMOND, whose policy always has a convolution")
  if height != width or height % 2 ** (levels - 1):
    raise UserError(
      f"frames of {height} x {width} have no counterpart in DIAMOND with {levels} reward_end.channels: "
      f"it takes squares of a multiple of {2 ** (levels - 1)}"
    )
  table = rules(config, spec)
  expected = jax.eval_shape(build(config, spec).init, jax.random.key(0))
  known = {rule.path for rule in table}
  for path, _ in jax.tree_util.tree_leaves_with_path(expected):
    names = tuple(key.key for key in path)
    if names not in known:
      raise UserError(f"{'/'.join(names)} has no counterpart in DIAMOND: only the parameters of variant=diamond have")
  return table, expected


def _ours(rule: Rule, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Returns DIAMOND's array in our layout, of the given shape."""
  theirs = rule.theirs(np.broadcast_to(np.float32(0), shape)).shape
  if np.shape(value) != theirs:
    raise UserError(f"{rule.name} has shape {np.shape(value)}, expected {theirs}")
  try:
    converted = np.asarray(value).astype(np.float32, casting="same_kind")
    return np.ascontiguousarray(rule.ours(converted))
  except (TypeError, ValueError):
    raise UserError(f"{rule.name} is of {np.asarray(value).dtype}, expected numbers") from None


def _at(tree: Any, path: tuple[str, ...]) -> Any:
  """The leaf at a path of nested dictionaries."""
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
  """Depths, channels and attention of the levels whose blocks are named by `pattern`."""
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
  """Channels of the actor-critic's stages, and whether each pools (its successor's index then skips one)."""
  found = (re.fullmatch(r"actor_critic\.encoder\.encoder\.(\d+)\.f\.2\.weight", name) for name in shape)
  indices = sorted(int(match.group(1)) for match in found if match)
  channels = tuple(int(shape[f"actor_critic.encoder.encoder.{i}.f.2.weight"][0]) for i in indices)
  # The last stage's pooling leaves no trace in the names, only in the LSTM's input.
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
  there, here = "denoiser.inner_model.", ("denoiser",)
  yield Rule(there + "noise_emb.weight", (*here, "noise_embedding", "frequencies"), _same, _same)
  yield Rule(there + "act_emb.0.weight", (*here, "action_embedding", "embedding"), _same, _same)
  yield from _linear(there + "cond_proj.0", (*here, "condition_0"))
  yield from _linear(there + "cond_proj.2", (*here, "condition_1"))
  yield from _conv(there + "conv_in", (*here, "conv_in"))
  unet, net = there + "unet.", (*here, "unet")
  last = len(c.channels) - 1
  for level, (depth, attention) in enumerate(zip(c.depths, c.attention, strict=True)):
    before = c.channels[max(0, level - 1)]
    features = c.channels[level]
    for i in range(depth):
      inputs = before if i == 0 else features
      yield from _block(
        f"{unet}d_blocks.{level}.resblocks.{i}", (*net, f"down_{level}_{i}"), inputs != features, attention
      )
    for i in range(depth + 1):
      # Skips double the input of every block on the way up, so each has a projection.
      yield from _block(f"{unet}u_blocks.{last - level}.resblocks.{i}", (*net, f"up_{level}_{i}"), True, attention)
    if level > 0:
      yield from _conv(f"{unet}downsamples.{level}.conv", (*net, f"downsample_{level}", "conv"))
      yield from _conv(f"{unet}upsamples.{last - level + 1}.conv", (*net, f"upsample_{level}"))
  for i in range(2):
    yield from _block(f"{unet}mid_blocks.resblocks.{i}", (*net, f"middle_{i}"), False, True)
  yield from _norm(there + "norm_out.norm", (*here, "norm_out"))
  yield from _conv(there + "conv_out", (*here, "conv_out"))


def _reward_end_rules(config: Config, spec: EnvSpec) -> Iterator[Rule]:
  c = config.reward_end
  there, here = "rew_end_model.", ("reward_end",)
  yield from _conv(there + "encoder.conv_in", (*here, "conv_in"))
  levels = len(c.channels)
  for level, (depth, attention) in enumerate(zip(c.depths, c.attention, strict=True)):
    before = c.channels[max(0, level - 1)]
    for i in range(depth):
      projected = i == 0 and before != c.channels[level]
      yield from _block(
        f"{there}encoder.blocks.{level}.resblocks.{i}", (*here, f"block_{level}_{i}"), projected, attention
      )
    if level > 0:
      yield from _conv(f"{there}encoder.downsamples.{level}.conv", (*here, f"downsample_{level}", "conv"))
  for i in range(2):
    yield from _block(f"{there}encoder.blocks.{levels}.resblocks.{i}", (*here, f"last_{i}"), False, True)
  yield Rule(there + "act_emb.weight", (*here, "action_embedding", "embedding"), _same, _same)
  height, width, _ = spec.observation_shape
  for _ in range(levels - 1):
    height, width = -(-height // 2), -(-width // 2)
  yield from _lstm(there + "lstm", (*here, "lstm"), "_l0", (height, width, c.channels[-1]))
  yield from _linear(there + "head.0", (*here, "head_0"))
  yield Rule(there + "head.2.weight", (*here, "head_1", "kernel"), np.transpose, np.transpose)


def _actor_critic_rules(config: Config, spec: EnvSpec) -> Iterator[Rule]:
  c = config.actor_critic
  there, here = "actor_critic.", ("actor_critic",)
  yield from _conv(there + "encoder.encoder.0", (*here, "encoder", "conv_in"))
  index = 1
  height, width, _ = spec.observation_shape
  for stage, pool in enumerate(c.downsample):
    name, path = f"{there}encoder.encoder.{index}", (*here, "encoder", f"stage_{stage}")
    yield from _norm(f"{name}.f.0.norm", (*path, "norm"))
    yield from _conv(f"{name}.f.2", (*path, "conv"))
    if c.channels[max(0, stage - 1)] != c.channels[stage]:
      yield from _projection(f"{name}.skip_projection", (*path, "skip"))
    index += 2 if pool else 1
    height, width = (height // 2, width // 2) if pool else (height, width)
  yield from _lstm(there + "lstm", (*here, "lstm"), "", (height, width, c.channels[-1]))
  yield from _linear(there + "critic_linear", (*here, "critic"))
  yield from _linear(there + "actor_linear", (*here, "actor"))


def _block(name: str, path: tuple[str, ...], projected: bool, attention: bool) -> Iterator[Rule]:
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
  """A 1 x 1 convolution there, a linear layer here."""
  yield Rule(f"{name}.weight", (*path, "kernel"), lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])
  yield Rule(f"{name}.bias", (*path, "bias"), _same, _same)


def _norm(name: str, path: tuple[str, ...]) -> Iterator[Rule]:
  yield Rule(f"{name}.weight", (*path, "scale"), _same, _same)
  yield Rule(f"{name}.bias", (*path, "bias"), _same, _same)


def _lstm(name: str, path: tuple[str, ...], suffix: str, inputs: tuple[int, int, int]) -> Iterator[Rule]:
  height, width, channels = inputs

  def ours(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, channels, height, width).transpose(2, 3, 1, 0).reshape(height * width * channels, -1)

  def theirs(x: np.ndarray) -> np.ndarray:
    return x.reshape(height, width, channels, -1).transpose(3, 2, 0, 1).reshape(-1, height * width * channels)

  yield Rule(f"{name}.weight_ih{suffix}", (*path, "kernel_ih"), ours, theirs)
  yield Rule(f"{name}.weight_hh{suffix}", (*path, "kernel_hh"), np.transpose, np.transpose)
  yield Rule(f"{name}.bias_ih{suffix}", (*path, "bias_ih"), _same, _same)
  yield Rule(f"{name}.bias_hh{suffix}", (*path, "bias_hh"), _same, _same)


def _same(x: np.ndarray) -> np.ndarray:
  return x
