import json
import pathlib
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

import jedi_jax
from jedi_jax.config import make_config, override
from jedi_jax.envs.catch import SPEC
from jedi_jax.errors import TrainingError, UserError
from jedi_jax.models.build import build, with_num_actions
from jedi_jax.runs import checkpoint, workdir
from jedi_jax.training import train as train_lib
from jedi_jax.training.loop import UnevenError
from jedi_jax.types import EnvSpec

COUNTS = {"denoiser": np.int32(4), "reward_end": np.int32(4), "actor_critic": np.int32(3), "probe": np.int32(3)}
RUNS = 4


def test_each_packed_run_is_what_it_is_alone(tiny):
  devices = tiny.packed_devices()
  states = [tiny.init(jax.random.key(seed)) for seed in range(RUNS)]
  replay = tiny.devices().to_host(tiny.replay())
  start = [jax.device_get(state) for state in states]
  state, sums = tiny.packed_epoch()(devices.to_devices(states), devices.to_devices([replay] * RUNS), COUNTS)
  for seed in range(RUNS):
    alone, alone_sums = tiny.epoch()(tiny.state(seed), tiny.replay(), COUNTS)
    alone, alone_sums = (tiny.devices().to_host(tree) for tree in (alone, alone_sums))
    got, got_sums = devices.to_host(state, seed), devices.to_host(sums, seed)
    chex.assert_trees_all_close(got.params, alone.params, rtol=1e-3, atol=2e-5)
    chex.assert_trees_all_close(got.optimizers, alone.optimizers, rtol=2e-3, atol=2e-5)
    chex.assert_trees_all_equal(got.updates, alone.updates)
    for phase, metrics in alone_sums.items():
      for name, value in metrics.items():
        np.testing.assert_allclose(got_sums[phase][name], value, rtol=2e-3, atol=1e-4, err_msg=f"{phase}/{name}")
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), got.params, start[seed].params)
    assert max(jax.tree.leaves(moved)) > 50 * 2e-5


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
  """Four seeds trained together to their end; returns (configurations, directories, results)."""
  out = tmp_path_factory.mktemp("packed")
  configs = [override(tiny.config, {"seed": seed}) for seed in range(RUNS)]
  places = [out / workdir.relative_path(config) for config in configs]
  return configs, places, _train(tiny, configs, places)


def _train(tiny, configs, places, console=None):
  with tiny.shared():
    return jedi_jax.train_packed(configs, places, devices=tiny.devices(2), console=console)


def test_every_run_has_its_own_files_and_result(packed, finished_run, timeless):
  configs, places, results = packed
  assert [place.relative_to(places[0].parents[1]).as_posix() for place in places] == [
    f"catch/seed_{seed}" for seed in range(RUNS)
  ]
  alone = json.loads((finished_run / "result.json").read_text())
  for config, place, result in zip(configs, places, results, strict=True):
    assert result == json.loads((place / "result.json").read_text())
    assert (result["seed"], result["runs_together"]) == (config.seed, RUNS)
    for name in ("env_steps", "frames", "updates"):
      assert result[name] == alone[name]
    assert set(result) == set(alone)
    # Precision and recall are there for what was met.
    names = [
      {name for name in timeless(directory / "metrics.jsonl")[-1] if "recall" not in name and "precision" not in name}
      for directory in (place, finished_run)
    ]
    assert names[0] == names[1]
  assert len({tuple(result["episode_returns"]) for result in results}) > 1


def test_the_first_epoch_of_a_packed_run_is_that_of_the_run_alone(packed, finished_run, timeless):
  together, alone = timeless(packed[1][0] / "metrics.jsonl")[0], timeless(finished_run / "metrics.jsonl")[0]
  for name in ("collect/rewards_negative", "collect/rewards_positive", "env_steps", "updates/denoiser"):
    assert together[name] == alone[name]
  for name in ("denoiser/loss", "reward_end/loss", "actor_critic/loss", "denoiser/latent_std"):
    assert together[name] == pytest.approx(alone[name], rel=2e-3, abs=1e-4)


@pytest.mark.slow
def test_packed_runs_take_steps_while_they_train(packed, tiny, quiet, tmp_path, timeless):
  """Their second epoch acts as without overlap, and is trained on the first one's steps alone."""
  configs = [override(config, {"collect.overlap": True}) for config in packed[0]]
  places = [tmp_path / str(config.seed) for config in configs]
  _train(tiny, configs, places, quiet)
  for directories in zip(places, packed[1], strict=True):
    ours, theirs = (timeless(directory / "metrics.jsonl") for directory in directories)
    assert ours[0] == theirs[0]
    met = [{name: value for name, value in r[1].items() if name.startswith("collect/")} for r in (ours, theirs)]
    assert met[0] == met[1]
    assert ours[1]["denoiser/loss"] != theirs[1]["denoiser/loss"]


def test_finished_runs_are_not_repeated(packed, tiny, quiet, snapshot):
  configs, places, results = packed
  before = [snapshot(place) for place in places]
  assert _train(tiny, configs, places, quiet) == results
  assert [snapshot(place) for place in places] == before


@pytest.mark.slow
def test_a_packed_run_goes_on_alone(tiny, quiet, train_tiny, stopped, tmp_path):
  configs = [override(tiny.config, {"seed": seed}) for seed in range(RUNS)]
  places = [tmp_path / str(config.seed) for config in configs]
  with stopped(epoch=4):
    _train(tiny, configs, places, quiet)
  assert checkpoint.newest(places[2] / "checkpoints" / "latest") == 2
  result = train_tiny(places[2], config=configs[2])
  assert (result["seed"], result["runs_together"], result["env_steps"]) == (2, 1, 70)
  assert not (places[1] / "result.json").exists()


def test_packed_runs_resume_together_bit_for_bit(packed, tiny, quiet, stopped, timeless, tmp_path):
  configs, straight, results = packed
  places = [tmp_path / str(config.seed) for config in configs]
  with stopped(epoch=4):
    _train(tiny, configs, places, quiet)
  assert [{**r, "seconds": 0} for r in _train(tiny, configs, places, quiet)] == [{**r, "seconds": 0} for r in results]
  assert sum("repeating 50 environment steps" in line for line in quiet.lines) == RUNS
  for ours, theirs in zip(places, straight, strict=True):
    assert timeless(ours / "metrics.jsonl") == timeless(theirs / "metrics.jsonl")


def test_runs_that_cannot_share_a_program_are_refused(tiny, tmp_path):
  config = tiny.config
  other = override(config, {"seed": 1, "collect.epsilon": 0.5})
  with pytest.raises(UserError, match=r"differ in seed and game only, not in collect\.epsilon"):
    jedi_jax.train_packed([config, other], [tmp_path / "a", tmp_path / "b"])
  with pytest.raises(UserError, match="same directory"):
    jedi_jax.train_packed([config, override(config, {"seed": 1})], [tmp_path / "a", tmp_path / "a"])
  games = [make_config(env=name, preset="debug") for name in ("atari/Pong", "atari/Breakout")]
  with pytest.raises(UserError, match=r"env\.action_slots=6"):
    jedi_jax.train_packed(games, [tmp_path / "a", tmp_path / "b"])
  with pytest.raises(UserError, match="observations of one shape"):
    jedi_jax.train_packed(
      [make_config(env="catch", preset="debug"), make_config(env="atari/Breakout", preset="debug")],
      [tmp_path / "a", tmp_path / "b"],
    )
  assert not list(tmp_path.iterdir())


def test_a_saved_agent_keeps_a_pack_from_overwriting_runs(tiny, quiet, snapshot, tmp_path):
  places = [tmp_path / str(seed) for seed in range(2)]
  for place, name in zip(places, ("metrics.jsonl", "model.safetensors"), strict=True):
    place.mkdir()
    (place / name).write_text("precious\n")
  configs = [override(tiny.config, {"seed": seed}) for seed in range(2)]
  with pytest.raises(UserError, match="holds a saved agent"):
    jedi_jax.train_packed(configs, places, overwrite=True, console=quiet)
  assert (places[0] / "metrics.jsonl").read_text() == "precious\n"


def test_a_run_of_a_pack_goes_on_with_the_flags_of_its_own_game(tmp_path):
  config = make_config(env="catch", preset="debug", overrides={"env.action_slots": 18})
  run = workdir.prepare(tmp_path / "run", config, SPEC)
  workdir.write_json(run.result, {})
  train = pathlib.Path(jedi_jax.__file__).parents[1] / "experiments" / "train.py"
  command = [sys.executable, str(train), "--env=catch", "--preset=debug", f"--workdir={run.path}"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert (done.returncode, "is complete" in done.stdout) == (0, True), done.stderr
  done = subprocess.run([*command, "--set=env.action_slots=0"], capture_output=True, text=True, check=False)
  assert (done.returncode, "action_slots: 18 -> 0" in done.stderr) == (2, True), done.stderr


def test_actions_that_a_game_does_not_have_are_never_chosen(tiny):
  config = override(tiny.config, {"env.action_slots": 7})
  model = build(config, SPEC)
  assert model.spec.num_actions == 7
  params = with_num_actions(model.init(jax.random.key(0)), 2)  # As of a game with two actions.
  own = params["actor_critic"]
  own["actor"]["bias"] = np.arange(7.0, dtype=np.float32)
  observations = np.random.default_rng(0).integers(256, size=(64, *SPEC.observation_shape), dtype=np.uint8)
  agent = jedi_jax.Agent(model, params)
  for epsilon in (0.0, 1.0):
    actions, _ = agent.act(observations, agent.initial_state(64), jax.random.key(1), epsilon=epsilon)
    assert set(np.unique(actions)) == {0, 1}
  logits, _, _ = jax.jit(model.policy)(params, observations, model.initial_state(64))
  shares = jax.nn.softmax(logits)
  np.testing.assert_allclose(shares[:, 0], 1 / (1 + np.e), rtol=0.2)
  assert np.all(np.asarray(shares[:, 2:]) == 0)


def test_too_few_slots_are_refused(tiny):
  with pytest.raises(UserError, match=r"env\.action_slots=2 is too small for the 3 actions"):
    build(override(tiny.config, {"env.action_slots": 2}), SPEC)
  assert build(override(tiny.config, {"env.action_slots": 3}), EnvSpec(3, SPEC.observation_shape)).spec.num_actions == 3


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_others_be(tiny, quiet, poisoned, tmp_path):
  configs = [override(tiny.config, {"seed": seed, "training.max_skipped": 1}) for seed in range(RUNS)]
  places = [tmp_path / str(config.seed) for config in configs]
  with poisoned(run=1, epoch=4), pytest.raises(TrainingError) as caught:
    _train(tiny, configs, places, quiet)
  assert str(places[1]) in str(caught.value)
  assert not any(str(place) in str(caught.value) for place in (places[0], *places[2:]))
  assert [(place / "result.json").exists() for place in places] == [True, False, True, True]
  assert checkpoint.newest(places[1] / "checkpoints" / "latest") == 2


@pytest.fixture
def groups(monkeypatch):
  """Groups of runs and their numbers of devices, as they would train; they end at once."""
  groups = []

  class Trainer:
    def __init__(self, group, *, learner, **_):
      self.group = [run.path for run in group]
      groups.append(([path.name for path in self.group], learner.devices.count))

    def run_to_end(self):
      for path in self.group:
        workdir.write_json(path / "result.json", {})

    def __enter__(self):
      return self

    def __exit__(self, *_):
      pass

  monkeypatch.setattr(train_lib, "Trainer", Trainer)
  return groups


@pytest.mark.parametrize(
  ("finished", "expected"),
  [
    (0, [(["0", "1", "2", "3"], 2)]),
    (1, [(["1", "2"], 2), (["3"], 1)]),
    (2, [(["2", "3"], 2)]),
    (3, [(["3"], 1)]),
  ],
)
def test_what_is_left_of_a_pack_is_spread_over_the_devices(tiny, tmp_path, quiet, groups, finished, expected):
  configs = [override(tiny.config, {"seed": seed}) for seed in range(4)]
  places = [tmp_path / str(config.seed) for config in configs]
  for config, place in zip(configs[:finished], places, strict=False):
    workdir.prepare(place, config, SPEC)
    workdir.write_json(place / "result.json", {})
  jedi_jax.train_packed(configs, places, devices=tiny.devices(2), console=quiet)
  assert groups == expected


def test_runs_whose_newest_checkpoint_is_damaged_are_grouped_anew(tiny, tmp_path, quiet, groups, monkeypatch):
  configs = [override(tiny.config, {"seed": seed}) for seed in range(3)]
  places = [tmp_path / str(config.seed) for config in configs]
  for config, place in zip(configs, places, strict=True):
    workdir.prepare(place, config, SPEC)
    for number in ("2", "4"):
      (place / "checkpoints" / "latest" / number).mkdir(parents=True)
  end = train_lib.Trainer.run_to_end

  def damaged(trainer):
    monkeypatch.setattr(train_lib.Trainer, "run_to_end", end)
    (places[1] / "checkpoints" / "latest" / "4").rmdir()  # As if it had been set aside.
    raise UnevenError

  monkeypatch.setattr(train_lib.Trainer, "run_to_end", damaged)
  jedi_jax.train_packed(configs, places, devices=tiny.devices(1), console=quiet)
  assert [group for group, _ in groups] == [["0", "1", "2"], ["1"], ["0", "2"]]
