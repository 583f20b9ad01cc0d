"""Saved agents: `Agent.save`, `load_agent` and what they refuse."""

import errno
import functools
import hashlib
import json
import pathlib
import shutil
import sys
import types

import jax
import numpy as np
import pytest
import yaml
from refusals import refused

import jedi_jax
from jedi_jax import config as config_lib
from jedi_jax.envs.catch import SPEC
from jedi_jax.models import phases
from jedi_jax.runs import checkpoint, safetensors, sharing, workdir

RESULT = {
  "env_steps": 70,
  "updates": {"denoiser": 12, "probe": 12},
  "episode_returns": [1.0, -1.0, 1.0],
  "human_normalized_score": None,
}


@pytest.fixture(scope="module")
def agent(tiny):
  return jedi_jax.Agent(tiny.model, tiny.init(jax.random.key(3)).params, tiny.config, RESULT)


@pytest.fixture(scope="module")
def original(agent, tmp_path_factory):
  return agent.save(tmp_path_factory.mktemp("agents") / "deep" / "agent")


@pytest.fixture
def folder(original, tmp_path):
  """A copy, which a test may damage."""
  return pathlib.Path(shutil.copytree(original, tmp_path / "agent"))


def frames(n=4):
  return np.random.default_rng(0).integers(256, size=(n, *SPEC.observation_shape), dtype=np.uint8)


def edit(folder, **changes):
  """Changes entries of config.json; None removes one."""
  path = folder / "config.json"
  data = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


def rewrite(folder, arrays):
  """Replaces the parameters, with the right checksum."""
  data = arrays if isinstance(arrays, bytes) else safetensors.encode(arrays)
  (folder / "model.safetensors").write_bytes(data)
  edit(folder, sha256=hashlib.sha256(data).hexdigest())


def arrays_of(folder):
  path = folder / "model.safetensors"
  return dict(safetensors.decode(path.read_bytes(), path))


def test_a_saved_agent_is_loaded_as_it_was(agent, original):
  loaded = jedi_jax.load_agent(original)
  assert jax.tree.structure(loaded.params) == jax.tree.structure(agent.params)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), loaded.params, agent.params)
  assert (loaded.config, loaded.result, loaded.model.spec) == (agent.config, RESULT, SPEC)
  assert {"denoiser", "reward_end", "probe"} <= set(loaded.params)  # What a dream needs.
  assert loaded.model.decode is not None
  restart = np.ones(4, bool)
  np.testing.assert_array_equal(loaded.player(4, seed=1)(frames(), restart), agent.player(4, seed=1)(frames(), restart))


def test_of_a_denoiser_and_its_average_the_average_is_saved(agent, tiny, tmp_path):
  config = config_lib.override(agent.config, {"denoiser.average_decay": 0.9})
  model = jedi_jax.build(config, SPEC)
  params = model.init(jax.random.key(3))
  params["average_denoiser"] = jax.tree.map(lambda x: x + 1, params["denoiser"])
  folder = jedi_jax.Agent(model, params, config).save(tmp_path / "averaged")
  assert not any(name.startswith("average_denoiser/") for name in arrays_of(folder))
  loaded = jedi_jax.load_agent(folder)
  assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
  for each in (loaded.params, phases.imagining(loaded.params)):
    jax.tree.map(np.testing.assert_array_equal, each["denoiser"], params["average_denoiser"])


def test_the_folder_has_three_files(original):
  assert {path.name for path in original.iterdir()} == {"model.safetensors", "config.json", "README.md"}
  assert workdir.read(original).config == jedi_jax.load_agent(original).config  # So that programs take it.


def test_the_package_safetensors_reads_the_parameters(agent, original):
  package = pytest.importorskip("safetensors.numpy")
  found = package.load_file(original / "model.safetensors")
  expected = checkpoint.flatten(agent.params)
  assert set(found) == set(expected)
  assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_the_card_says_what_the_agent_is(original):
  text = (original / "README.md").read_text()
  _, metadata, body = text.split("---\n", 2)
  data = yaml.safe_load(metadata)
  assert data["library_name"] == "jedi_jax"
  assert {"reinforcement-learning", "catch"} <= set(data["tags"])
  [entry] = data["model-index"]
  [result] = entry["results"]
  assert result["dataset"]["name"] == "catch"
  assert result["metrics"] == [{"type": "mean_reward", "value": "0.33 +/- 0.94"}]
  for part in (
    "mean return 0.33 over 3 games",
    "| environment steps | 70 |",
    "denoiser 12, probe 12",
    f"jedi_jax {jedi_jax.__version__}, JAX {jax.__version__}",
    "`catch`: 3 actions, observations 24 x 24 x 3",
    "load_agent(",
    "- `actor_critic.horizon=2`",
  ):
    assert part in body


def test_half_precision_halves_the_file_and_loads_as_float32(agent, tmp_path):
  whole = agent.save(tmp_path / "whole")
  half = agent.save(tmp_path / "half", half=True)
  sizes = [(folder / "model.safetensors").stat().st_size for folder in (whole, half)]
  assert 0.45 < sizes[1] / sizes[0] < 0.6  # The header stays.
  loaded = jax.device_get(jedi_jax.load_agent(half).params)
  for value, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(jax.device_get(agent.params)), strict=True):
    assert value.dtype == expected.dtype
    np.testing.assert_allclose(value, expected, rtol=2**-11, atol=2**-25)


def test_half_precision_refuses_what_it_cannot_hold(agent, tmp_path):
  params = jax.tree.map(np.array, jax.device_get(agent.params))
  params["actor_critic"]["actor"]["bias"][0] = 7e4
  large = jedi_jax.Agent(agent.model, params, agent.config)
  refused(lambda: large.save(tmp_path / "half", half=True), "actor_critic/actor/bias", "float16")
  large.save(tmp_path / "whole")


def test_an_agent_without_a_result_has_no_score(agent, tmp_path):
  folder = jedi_jax.Agent(agent.model, agent.params, agent.config).save(tmp_path / "agent")
  text = (folder / "README.md").read_text()
  assert "| score | not measured |" in text
  assert "model-index" not in text
  assert jedi_jax.load_agent(folder).result is None


def test_the_agent_of_a_run_on_recorded_episodes_names_them(agent, tiny, tmp_path):
  data = {
    "directory": "/home/me/data/pong", "source": "atari/Pong", "episodes": 45, "steps": 4_050, "held_out": 5,
    "fingerprint": "1f" * 32,
  }  # fmt: skip
  run = workdir.prepare(tmp_path / "run", tiny.config, SPEC, data=data)
  checkpoints = checkpoint.Checkpoints(run.checkpoints / "latest", keep=1)
  checkpoints.save(5, params=jax.device_get(agent.params))
  checkpoints.close()
  of_run = jedi_jax.load_agent(run.path)
  folder = of_run.save(tmp_path / "agent")
  assert of_run.data == jedi_jax.load_agent(folder).data == workdir.read(folder).data == data
  text = (folder / "README.md").read_text()
  line = f"| data | recorded episodes of `atari/Pong`, trained on 45, held out 5, steps 4,050, SHA-256 `{'1f' * 32}` |"
  assert line in text
  assert "# jedi on atari/Pong" in text
  assert 'envs.make("atari/Pong"' in text
  assert "/home/me" not in text
  of_run.result = {"env": "catch", "episode_returns": [1.0]}
  assert "# jedi on catch" in (of_run.save(folder, overwrite=True) / "README.md").read_text()
  of_run.result, of_run.data = None, {"directory": "d", "fingerprint": "f", "source": "two\nlines | `of` text"}
  text = (of_run.save(folder, overwrite=True) / "README.md").read_text()
  assert "| data | recorded episodes of `two lines / 'of' text`, SHA-256 `f` |" in text
  assert "# jedi on an/environment" in text


def test_a_foreign_result_breaks_nothing(agent, tmp_path):
  result = {"episode_returns": ["x"], "updates": {"denoiser": "many"}, "env_steps": None, "human_normalized_score": []}
  folder = jedi_jax.Agent(agent.model, agent.params, agent.config, result).save(tmp_path / "agent")
  assert "not measured" in (folder / "README.md").read_text()


def test_the_agent_of_a_run_carries_its_result(agent, tiny, tmp_path):
  run = workdir.prepare(tmp_path / "run", tiny.config, SPEC)
  for name, number in (("latest", 5), ("best", 3)):
    checkpoints = checkpoint.Checkpoints(run.checkpoints / name, keep=1)
    checkpoints.save(number, params=jax.device_get(agent.params))
    checkpoints.close()
  assert jedi_jax.load_agent(run.path).result is None  # The run is not at its end.
  workdir.write_json(run.result, RESULT)
  assert jedi_jax.load_agent(run.path).result == RESULT
  assert jedi_jax.load_agent(run.path, "best").result is None  # The result is of other parameters.
  shutil.copytree(run.checkpoints / "latest" / "5", run.checkpoints / "latest" / "6")
  shutil.rmtree(run.checkpoints / "latest" / "6" / "params")
  assert jedi_jax.load_agent(run.path).result is None  # The last checkpoint is damaged, and an older one is used.
  shutil.rmtree(run.checkpoints / "latest" / "6")
  run.result.write_text("{")
  assert jedi_jax.load_agent(run.path).result is None
  refused(lambda: agent.save(run.path, overwrite=True), "holds a run", str(run.path))


def test_an_agent_with_slots_for_actions_keeps_those_of_its_game(tmp_path, tiny):
  config = jedi_jax.config.override(tiny.config, {"env.action_slots": 5})
  model = jedi_jax.build(config, SPEC)
  folder = jedi_jax.Agent(model, model.init(jax.random.key(0)), config).save(tmp_path / "agent")
  loaded = jedi_jax.load_agent(folder)
  assert json.loads((folder / "config.json").read_text())["spec"]["num_actions"] == 3
  assert int(loaded.model.num_actions(loaded.params)) == 3
  assert loaded.model.spec.num_actions == 5


def test_saving_replaces_nothing_unasked(agent, folder, snapshot):
  (folder / "notes.txt").write_text("mine")
  before = snapshot(folder)
  refused(lambda: agent.save(folder), "holds an agent", str(folder))
  assert snapshot(folder) == before
  agent.save(folder, overwrite=True)
  assert snapshot(folder) == before


def test_an_agent_without_a_configuration_is_not_saved(agent, tmp_path):
  refused(lambda: jedi_jax.Agent(agent.model, agent.params).save(tmp_path / "agent"), "no configuration")
  assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(agent, folder, snapshot, monkeypatch):
  before = snapshot(folder)

  write = pathlib.Path.write_bytes

  def full(path, data, *, name):
    if name in path.name:
      raise OSError(errno.ENOSPC, "No space left on device")
    return write(path, data)

  for name in ("", "config.json"):
    with monkeypatch.context() as patch:
      patch.setattr(pathlib.Path, "write_bytes", functools.partialmethod(full, name=name))
      refused(lambda: agent.save(folder, overwrite=True), "No space left on device", str(folder))
    assert snapshot(folder) == before


def test_a_saved_agent_is_no_run(folder, tiny, snapshot):
  before = snapshot(folder)
  refused(lambda: workdir.check(folder, tiny.config, SPEC), "saved agent", "--workdir")
  refused(lambda: workdir.prepare(folder, tiny.config, SPEC, overwrite=True), "saved agent")
  refused(lambda: jedi_jax.load_agent(folder, "best"), "not a run", "best")
  assert snapshot(folder) == before


def truncate(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-1])


def flip(folder):
  path = folder / "model.safetensors"
  data = bytearray(path.read_bytes())
  data[-5] ^= 1
  path.write_bytes(data)


def change_setting(folder, path, value):
  data = json.loads((folder / "config.json").read_text())
  *groups, name = path.split(".")
  node = data["config"]
  for group in groups:
    node = node[group]
  node[name] = value
  (folder / "config.json").write_text(json.dumps(data))


def without(folder, name):
  arrays = arrays_of(folder)
  del arrays[name]
  rewrite(folder, arrays)


BIAS = "actor_critic/actor/bias"
DAMAGES = {
  "truncated": (truncate, ["model.safetensors", "truncated or altered"]),
  "altered": (flip, ["model.safetensors", "truncated or altered"]),
  "no parameters": (lambda f: (f / "model.safetensors").unlink(), ["no model.safetensors"]),
  "no configuration": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
  "parameters that are a folder": (
    lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
    ["model.safetensors", "cannot be read"],
  ),
  "a configuration that is no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json", "cannot be read"]),
  "a configuration that is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "format"]),
  "a deep configuration": (lambda f: (f / "config.json").write_text("[" * 10**5), ["config.json", "cannot be read"]),
  "another format": (lambda f: edit(f, agent=2), ["config.json", "format '2'", "reads 1"]),
  "no format": (lambda f: edit(f, agent=None), ["config.json", "format"]),
  "no checksum": (lambda f: edit(f, sha256=None), ["SHA-256"]),
  "no environment": (lambda f: edit(f, spec=None), ["config.json", "cannot be read", "spec"]),
  "an environment without actions": (
    lambda f: edit(f, spec={"num_actions": 0, "observation_shape": [24, 24, 3]}),
    ["config.json", "num_actions=0"],
  ),
  "other actions": (
    lambda f: edit(f, spec={"num_actions": 4, "observation_shape": [24, 24, 3]}),
    ["model.safetensors", "does not fit", "expected float32"],
  ),
  "an unknown setting": (
    lambda f: change_setting(f, "actor_critic.horizons", 3),
    ["config.json", "unknown setting", "actor_critic.horizon"],
  ),
  "a setting of another version": (
    lambda f: (change_setting(f, "sampler.order_", 3), edit(f, version="9.9\n!")),
    ["config.json", "written by version 9.9 !", "sampler.order_"],
  ),
  "an impossible setting": (lambda f: change_setting(f, "actor_critic.horizon", -1), ["actor_critic.horizon", "-1"]),
  "an unknown environment": (lambda f: change_setting(f, "env.name", "cach"), ["cach", "catch"]),
  "other sizes": (lambda f: change_setting(f, "actor_critic.lstm_width", 16), ["does not fit", "actor_critic/"]),
  "a parameter less": (lambda f: without(f, BIAS), ["does not fit", f"lacks {BIAS}"]),
  "a parameter more": (lambda f: rewrite(f, arrays_of(f) | {"x/y": np.zeros(1)}), ["has an unknown 'x/y'"]),
  "another shape": (
    lambda f: rewrite(f, arrays_of(f) | {BIAS: np.zeros((1, 3), np.float32)}),
    [BIAS, "float32[1, 3]", "expected float32[3]"],
  ),
  "another dtype": (lambda f: rewrite(f, arrays_of(f) | {BIAS: np.zeros(3)}), [BIAS, "float64[3]"]),
  "another file": (lambda f: rewrite(f, b"PK\x03\x04 a zip archive"), ["no safetensors file"]),
}


@pytest.mark.parametrize(("damage", "parts"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_one_line(folder, damage, parts):
  damage(folder)
  refused(lambda: jedi_jax.load_agent(folder), str(folder), *parts)


def test_a_folder_without_an_agent(tmp_path):
  refused(lambda: jedi_jax.load_agent(tmp_path), "holds no run and no saved agent", str(tmp_path))


def hub(monkeypatch, snapshot_download):
  monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))


def test_agents_of_the_hub(original, monkeypatch, agent):
  asked = []

  def snapshot_download(name, *, revision, allow_patterns):
    asked.append((name, revision))
    assert {path.name for path in original.iterdir()} == set(allow_patterns)
    return str(original)

  hub(monkeypatch, snapshot_download)
  assert jedi_jax.load_agent("hf://some-one/catch_1.0").config == agent.config
  jedi_jax.load_agent("hf://some-one/catch@v2")
  assert asked == [("some-one/catch_1.0", None), ("some-one/catch", "v2")]
  for name in ("hf://catch", "hf://a/b/c", "hf://a/b@", "hf://a/b c"):
    refused(lambda name=name: jedi_jax.load_agent(name), "hf://user/name")
  assert len(asked) == 2


def test_a_download_that_fails_is_one_line(monkeypatch):
  def snapshot_download(name, **_):
    raise OSError("404 Client Error.\nRepository Not Found for url")

  hub(monkeypatch, snapshot_download)
  refused(lambda: jedi_jax.load_agent("hf://a/b"), "hf://a/b cannot be downloaded", "404 Client Error")
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  refused(lambda: jedi_jax.load_agent("hf://a/b"), "pip install huggingface_hub")


def test_an_unknown_agent_of_the_package():
  refused(lambda: jedi_jax.load_agent("jedi://cach"), "jedi://cach", "jedi://catch")
  refused(lambda: jedi_jax.load_agent("jedi://../agents/catch"), "not an agent of this package")


# The random policy has -0.52 and 0.29.
@pytest.mark.parametrize(("name", "episodes", "least"), [("catch", 40, 0.8), ("breakout", 8, 4)])
def test_shipped_agents_play(name, episodes, least):
  agent = jedi_jax.load_agent(f"jedi://{name}")
  files = list((sharing.SHIPPED / name).iterdir())
  assert {path.name for path in files} == {"model.safetensors", "config.json", "README.md"}
  assert sum(path.stat().st_size for path in files) < 3 * 10**6
  results = jedi_jax.evaluate(agent, agent.config.env.name, episodes=episodes)
  assert np.mean([result.return_ for result in results]) > least
  assert agent.result["mean_return"] > least


def test_the_shipped_agent_dreams():
  agent = jedi_jax.load_agent("jedi://catch")
  count, length = 2, agent.model.conditioning_frames
  start = jedi_jax.Segment(
    np.zeros((count, length, 24, 24, 3), np.uint8),
    np.zeros((count, length), np.int32),
    np.zeros((count, length), np.float32),
    np.zeros((count, length), bool),
    np.ones((count, length), bool),
  )
  dream = jax.jit(agent.model.imagine, static_argnums=3)(
    agent.params, start, jax.random.split(jax.random.key(0), count), 2
  )
  assert agent.model.decode(agent.params, dream.latents).shape == (count, 3, 24, 24, 3)
