"""The model card of a saved agent: a README.md with the metadata that the Hugging Face Hub reads."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jedi_jax import config as config_lib
from jedi_jax.config import Config
from jedi_jax.config.presets import VARIANT_SUMMARIES
from jedi_jax.tables import markdown_table
from jedi_jax.types import BEYOND, EnvSpec

_NAME = re.compile(r"[\w./?=&-]{1,200}")
_COUNTS = {"trained on": "episodes", "held out": "held_out", "steps": "steps"}


def write(
  config: Config,
  spec: EnvSpec,
  *,
  sizes: Mapping[str, int],
  result: Mapping[str, Any] | None,
  data: Mapping[str, Any] | None,
  versions: Mapping[str, str],
) -> str:
  """Returns the model card.

  Args:
    config: the configuration of the run.
    spec: the environment.
    sizes: number of parameters by component.
    result: the contents of the run's result.json, or a part of them; None if they are not known.
    data: of a run on recorded episodes, `datasets.Dataset.record` of them; None otherwise.
    versions: version by name of the package.
  """
  result = result or {}
  returns = _returns(result)
  c = config
  height, width, channels = spec.observation_shape
  env = _env(config, result, data)
  policy = " and its policy, which was trained in imagination," if c.training.updates.actor_critic else ""
  rows: list[tuple[str, str]] = [
    ("environment", f"`{env}`: {spec.num_actions} actions, observations {height} x {width} x {channels} uint8"),
    ("variant", f"`{c.variant}`: {VARIANT_SUMMARIES[c.variant]}"),
    ("preset, seed", f"`{c.preset}`, {c.seed}"),
    ("parameters", ", ".join(f"{name} {count:,}" for name, count in sizes.items() if count)),
  ]
  if data is not None:
    rows.append(("data", _data(data)))
  for name, unit in (("env_steps", "environment steps"), ("frames", "frames")):
    if isinstance(result.get(name), int):
      rows.append((unit, f"{result[name]:,}"))
  updates = result.get("updates")
  if isinstance(updates, Mapping):
    counts = (f"{name} {count:,}" for name, count in updates.items() if isinstance(count, int))
    rows.append(("updates", ", ".join(counts)))
  rows.append(("score", _score(returns, result)))
  rows.append(("versions", ", ".join(f"{name} {number}" for name, number in versions.items())))
  lines = [
    *_metadata(config, env, returns),
    "",
    f"# {c.variant} on {env}",
    "",
    f"A world model{policy} by jedi_jax, an implementation of JEDI",
    "([arXiv:2505.19698](https://arxiv.org/abs/2505.19698)) in JAX.",
    "",
    markdown_table([("", ""), *rows]),
    "",
    "## Use",
    "",
    _USE.format(env=env),
  ]
  changed = _changed(config)
  if changed:
    lines += ["", "## Settings", "", f"Those that differ from preset `{c.preset}`; `config.json` has all.", ""]
    lines += [f"- `{line}`" for line in changed]
  return "\n".join(lines) + "\n"


_USE = """\
The folder is loaded by its path, or by `hf://user/name` from the Hugging Face Hub. Loading executes nothing from it.

```python
import numpy as np

import jedi_jax

agent = jedi_jax.load_agent("path/of/this/folder")
env = jedi_jax.envs.make("{env}", num_envs=4, seed=0, life_loss_ends=False)
policy = agent.player(num_envs=4, seed=0)
observations, restart = env.reset(), np.ones(4, bool)
for _ in range(100):
  step = env.step(policy(observations, restart))
  observations, restart = step.observation, step.game_over
env.close()
```"""


def _env(config: Config, result: Mapping[str, Any], data: Mapping[str, Any] | None) -> str:
  """Returns the environment: of a run on recorded episodes the one that was evaluated in, or the source of the data."""
  if data is None:
    return config.env.name
  names = [result.get("env") if "episode_returns" in result else None, data.get("source")]
  return next((name for name in names if isinstance(name, str) and _NAME.fullmatch(name)), "an/environment")


def _data(data: Mapping[str, Any]) -> str:
  """Describes recorded episodes, without the folder's place on the machine."""
  source = " ".join(str(data.get("source", "")).split())[:100].replace("`", "'").replace("|", "/")
  parts = [f"recorded episodes of `{source}`" if source else "recorded episodes"]
  parts += [f"{name} {data[key]:,}" for name, key in _COUNTS.items() if isinstance(data.get(key), int)]
  return ", ".join([*parts, f"SHA-256 `{str(data.get('fingerprint'))[:64]}`"])


def _metadata(config: Config, env: str, returns: Sequence[float]) -> list[str]:
  """Returns the YAML at the top of a card. A JSON string is a YAML string."""
  name = json.dumps(env)
  lines = [
    "---",
    "library_name: jedi_jax",
    "pipeline_tag: reinforcement-learning",
    "tags:",
    *(f"- {tag}" for tag in ("reinforcement-learning", "deep-reinforcement-learning", "world-model", "jax")),
    f"- {name}",
  ]
  if returns:
    lines += [
      "model-index:",
      f"- name: {json.dumps(config.variant)}",
      "  results:",
      "  - task: {type: reinforcement-learning, name: reinforcement-learning}",
      f"    dataset: {{type: {name}, name: {name}}}",
      f'    metrics: [{{type: mean_reward, value: "{np.mean(returns):.2f} +/- {np.std(returns):.2f}"}}]',
    ]
  return [*lines, "---"]


def _returns(result: Mapping[str, Any]) -> list[float]:
  returns = result.get("episode_returns")
  if not isinstance(returns, list) or not all(isinstance(x, int | float) and abs(x) < BEYOND for x in returns):
    return []
  return [float(x) for x in returns]


def _score(returns: Sequence[float], result: Mapping[str, Any]) -> str:
  """Returns the score in words."""
  if not returns:
    return "not measured"
  text = f"mean return {np.mean(returns):.2f} over {len(returns)} games (standard deviation {np.std(returns):.2f})"
  score = result.get("human_normalized_score")
  return text + (f", human-normalised score {score:.3f}" if isinstance(score, float) else "")


def _changed(config: Config) -> list[str]:
  """Returns the settings that differ from those of the preset, in the form of overrides."""
  usual = config_lib.make_config(env=config.env.name, variant=config.variant, preset=config.preset, seed=config.seed)
  before, after = (config_lib.flatten(config_lib.to_dict(c)) for c in (usual, config))
  return [f"{path}={json.dumps(after[path])}" for path in after if after[path] != before[path]]
