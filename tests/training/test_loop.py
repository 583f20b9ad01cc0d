import json
import shutil

import hypothesis
import jax
import numpy as np
import pytest
import walk
from hypothesis import strategies as st

import jedi_jax
from jedi_jax import envs
from jedi_jax.config import make_config, override
from jedi_jax.errors import Interrupted, TrainingError, UserError
from jedi_jax.runs import checkpoint, workdir
from jedi_jax.runs.interruption import Interruption
from jedi_jax.training import seeds
from jedi_jax.training import train as train_lib
from jedi_jax.training.learner import Learner
from jedi_jax.training.loop import plan_calls
from jedi_jax.training.seeds import Purpose

PHASES = ("denoiser", "reward_end", "actor_critic", "probe")
LAST_BEFORE = 3
"""The interrupted run ends within the epoch after this one; its last checkpoint is that of epoch 2."""

numbers = st.integers(0, 50)


@hypothesis.given(st.tuples(*[numbers] * 4), st.integers(1, 60), st.booleans())
@hypothesis.settings(deadline=None, database=None)
def test_calls_add_up_within_the_limit_and_in_order(updates, limit, split):
  counts = dict(zip(PHASES, updates, strict=True))
  calls = list(plan_calls(counts, [(name,) for name in PHASES], limit=limit, split=split))
  totals = [sum(call.values()) for call in calls]
  for name in PHASES:
    assert sum(call[name] for call in calls) == counts[name]
  assert all(total <= limit for total in totals)
  if not any(updates) or (sum(updates) <= limit and not split):
    assert calls == [counts]
  else:
    kinds = [[name for name in PHASES if call[name]] for call in calls]
    assert all(len(kind) == 1 for kind in kinds)
    assert [kind[0] for kind in kinds] == sorted((kind[0] for kind in kinds), key=PHASES.index)


def assert_equal(a, b, exact=True, skip=()):
  leaves = jax.tree_util.tree_leaves_with_path(a)
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(leaves, jax.tree.leaves(b), strict=True):
    name = jax.tree_util.keystr(path)
    if any(word in name for word in skip):
      continue
    if exact:
      np.testing.assert_array_equal(x, y, err_msg=name)
    else:
      np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4, err_msg=name)


def result(directory):
  return json.loads((directory / "result.json").read_text())


def test_result(finished_run):
  got = result(finished_run)
  assert set(got) == {
    "env", "variant", "preset", "seed", "env_steps", "frames", "updates", "episode_returns", "episode_lengths",
    "episodes_truncated", "max_episode_steps", "mean_return", "human_normalized_score", "seconds",
    "runs_together",
  }  # fmt: skip
  assert (got["env"], got["variant"], got["preset"], got["seed"]) == ("catch", "jedi", "debug", 0)
  assert got["env_steps"] == got["frames"] == 70
  assert got["updates"] == dict.fromkeys(PHASES, 4 + 4 * 2)
  assert len(got["episode_returns"]) == 3
  assert set(got["episode_returns"]) <= {-1.0, 1.0}
  assert got["episode_lengths"] == [9, 9, 9]
  assert got["episodes_truncated"] == 0
  assert got["mean_return"] == pytest.approx(np.mean(got["episode_returns"]))
  assert got["human_normalized_score"] is None
  assert got["seconds"] > 0


def test_one_record_an_epoch_with_every_figure(finished_run, tiny):
  records = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
  assert [r["epoch"] for r in records] == list(range(1, tiny.epochs + 1))
  assert [r["env_steps"] for r in records] == [tiny.first_steps, 50, 60, 70, 70]
  assert [r["frames"] for r in records] == [r["env_steps"] for r in records]
  assert [r["updates/denoiser"] for r in records] == [4, 6, 8, 10, 12]
  for r in records:
    for name in (
      "denoiser/loss", "denoiser/grad_norm", "denoiser/latent_std", "denoiser/latent_rank", "denoiser/latent_clamped",
      "denoiser/latent_deviation", "denoiser/latent_change", "denoiser/encoder_movement",
      "reward_end/loss", "reward_end/loss_reward", "reward_end/loss_end", "reward_end/grad_norm",
      "reward_end/replay_return", "reward_end/replay_end_rate", "reward_end/reward_count_-1",
      "reward_end/reward_count_0", "reward_end/reward_count_+1", "reward_end/end_count_no", "reward_end/end_count_yes",
      "reward_end/reward_recall_0", "reward_end/end_recall_no",
      "actor_critic/loss", "actor_critic/loss_policy", "actor_critic/loss_value", "actor_critic/loss_entropy",
      "actor_critic/grad_norm", "actor_critic/imagined_return", "actor_critic/policy_entropy",
      "evaluation/return", "evaluation/length", "world_model/error_1", "world_model/error_last",
      "world_model/calibration", "world_model/f1_real", "world_model/f1_imagined",
      "time/collect_seconds", "time/epoch_seconds", "time/total_seconds", "time/update_seconds",
      "time/updates_per_second", "time/evaluation_seconds",
    ):  # fmt: skip
      assert np.isfinite(r[name]), (r["epoch"], name)
    assert 0 < r["denoiser/latent_std"] <= 3.0
    assert 1.0 <= r["denoiser/latent_rank"] <= 4.0
    assert 0.0 <= r["denoiser/latent_clamped"] <= 1.0
    assert 0.0 <= r["actor_critic/policy_entropy"] <= np.log(3) + 1e-5
    parts = [r[f"reward_end/loss_{part}"] for part in ("reward", "end")]
    assert r["reward_end/loss"] == pytest.approx(sum(parts), rel=1e-5)
    # Every counted step has a reward and an end.
    rewards = sum(r[f"reward_end/reward_count_{sign}"] for sign in ("-1", "0", "+1"))
    assert rewards == r["reward_end/end_count_no"] + r["reward_end/end_count_yes"] > 0
    # Every second epoch each phase is a call of its own and has its own time.
    for phase in PHASES:
      assert (f"time/{phase}_seconds" in r) == (r["epoch"] % 2 == 0)


def test_collection_is_reported_and_the_last_epoch_has_none(finished_run):
  records = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
  assert [r.get("collect/steps") for r in records] == [40, 10, 10, 10, None]
  # Two games at once, nine steps each: they end after 18, 36, 54 environment steps.
  assert [r.get("collect/episodes") for r in records] == [4, 0, 2, 0, None]
  for r in records[:-1]:
    assert sum(r[f"collect/rewards_{sign}"] for sign in ("negative", "zero", "positive")) == r["collect/steps"]
    if r["collect/episodes"]:
      signs = r["collect/rewards_positive"] - r["collect/rewards_negative"]
      assert r["collect/return"] == pytest.approx(signs / r["collect/episodes"])
      assert r["collect/length"] == 9
    else:
      assert "collect/return" not in r
  assert not any(name.startswith("collect/") for name in records[-1])


def test_files_of_a_run(finished_run):
  assert {p.name for p in finished_run.iterdir()} == {
    ".lock", "config.json", "metrics.jsonl", "result.json", "tensorboard", "checkpoints",
  }  # fmt: skip
  assert list((finished_run / "tensorboard").glob("events.out.tfevents.*"))
  assert sorted(p.name for p in (finished_run / "checkpoints" / "latest").iterdir()) == ["4", "5"]
  assert len(list((finished_run / "checkpoints" / "best").iterdir())) == 1


def test_the_best_checkpoint_is_the_first_of_the_best_evaluations(finished_run, tiny, timeless):
  returns = [r["evaluation/return"] for r in timeless(finished_run / "metrics.jsonl")]
  [best] = (finished_run / "checkpoints" / "best").iterdir()
  assert int(best.name) == 1 + int(np.argmax(returns))


def test_a_finished_run_only_returns_its_result(finished_run, tiny, monkeypatch, snapshot, quiet):
  monkeypatch.setattr(train_lib, "Trainer", None)
  before, console = snapshot(finished_run), quiet
  assert jedi_jax.train(tiny.config, finished_run, console=console, devices=tiny.devices()) == result(finished_run)
  assert snapshot(finished_run) == before
  assert len(console.lines) == 1
  assert "complete" in console.lines[0]


@pytest.fixture(scope="module")
def interrupted(train_tiny, stopped, tmp_path_factory):
  """A run that was stopped in the middle of epoch 4, after steps had been collected."""
  directory = tmp_path_factory.mktemp("runs") / "interrupted"
  with stopped(epoch=LAST_BEFORE + 1):
    train_tiny(directory)
  assert not (directory / "result.json").exists()
  assert len((directory / "metrics.jsonl").read_text().splitlines()) == LAST_BEFORE
  assert [p.name for p in (directory / "checkpoints" / "latest").iterdir()] == ["2"]
  return directory


def test_a_resumed_run_equals_the_straight_one_bit_for_bit(
  finished_run, interrupted, train_tiny, tiny, tmp_path, timeless, quiet
):
  directory, console, seen = tmp_path / "run", quiet, []
  shutil.copytree(interrupted, directory)
  with (directory / "metrics.jsonl").open("a") as file:
    file.write('{"epoch": 4, "half a li')
  train_tiny(directory, console=console, on_epoch=lambda place, record: seen.append((place, record)))
  assert [place for place, _ in seen] == [directory] * 3
  written = (directory / "metrics.jsonl").read_text().splitlines()
  assert [record for _, record in seen] == [json.loads(line) for line in written[2:]]
  assert any("resuming after epoch 2" in line for line in console.lines)
  assert timeless(directory / "metrics.jsonl") == timeless(finished_run / "metrics.jsonl")
  ours, theirs = result(directory), result(finished_run)
  assert ours.pop("seconds") > 0
  theirs.pop("seconds")
  assert ours == theirs
  # Parameters, optimisers, counts, key, replay, the environments' log: all of the last checkpoint.
  last = [checkpoint.read(d / "checkpoints" / "latest", tiny.epochs) for d in (directory, finished_run)]
  assert_equal(*last, skip=("seconds",))
  best = [sorted(p.name for p in (d / "checkpoints" / "best").iterdir()) for d in (directory, finished_run)]
  assert best[0] == best[1]


def test_a_run_whose_games_do_not_repeat_resumes_with_new_ones(tmp_path, monkeypatch, tiny, train_tiny, quiet):
  walk.register(monkeypatch)

  class StopError(Exception):
    pass

  def stop(directory, record):
    if record["epoch"] == 3:
      raise StopError

  # The shapes are those of Catch, so that the tiny configuration's programs fit.
  config = make_config(env="gym/test/Random-v0?size=24", preset="debug", overrides=tiny.overrides)
  with pytest.raises(StopError):
    train_tiny(tmp_path / "run", config=config, on_epoch=stop)
  result = train_tiny(tmp_path / "run", config=config, console=quiet)
  [repeating] = [line for line in quiet.lines if line.startswith("resuming after epoch 2: repeating ")]
  assert repeating.endswith(" environment steps")
  [line] = [line for line in quiet.lines if "does not repeat its steps: new games begin" in line]
  assert line.startswith("WARNING: gym/test/Random-v0?size=24 ")
  assert result["env_steps"] == result["frames"] == tiny.config.collect.total_steps


@pytest.mark.slow
def test_a_run_is_resumed_on_another_number_of_devices(finished_run, interrupted, train_tiny, tiny, tmp_path, timeless):
  directory = tmp_path / "run"
  shutil.copytree(interrupted, directory)
  got = train_tiny(directory, devices=4)
  assert got["env_steps"] == 70
  assert got["updates"] == result(finished_run)["updates"]
  records, straight = timeless(directory / "metrics.jsonl"), timeless(finished_run / "metrics.jsonl")
  assert [r["epoch"] for r in records] == [r["epoch"] for r in straight]
  assert records[:2] == straight[:2]
  # The first epoch after the resumption sees the same replay and batches.
  for name in ("denoiser/loss", "reward_end/loss", "actor_critic/loss", "denoiser/latent_std"):
    assert records[2][name] == pytest.approx(straight[2][name], rel=1e-2, abs=1e-3)


def test_another_configuration_is_refused_before_anything(interrupted, tiny, train_tiny, snapshot):
  before = snapshot(interrupted)
  other = override(tiny.config, {"collect.epsilon": 0.5})
  with pytest.raises(UserError, match=r"collect\.epsilon: 0\.01 -> 0\.5"):
    train_tiny(interrupted, config=other)
  assert snapshot(interrupted) == before


def test_a_batch_that_devices_cannot_share_is_refused_before_anything(tiny, tmp_path, quiet):
  config = override(tiny.config, {"training.batch_size": 6})
  with pytest.raises(UserError, match=r"training\.batch_size=6 is not divisible by 4 devices"):
    jedi_jax.train(config, tmp_path / "run", devices=tiny.devices(4), console=quiet)
  assert not (tmp_path / "run").exists()


def test_damaged_checkpoints_are_one_line(interrupted, train_tiny, tmp_path):
  directory = tmp_path / "run"
  shutil.copytree(interrupted, directory)
  for file in (directory / "checkpoints" / "latest" / "2").rglob("*"):
    if file.is_file():
      file.write_bytes(b"")
  with pytest.raises(UserError) as caught:
    train_tiny(directory)
  assert "\n" not in str(caught.value)
  assert "checkpoint 2" in str(caught.value)


def test_seeds_of_purposes_differ_and_never_share_games():
  drawn = {(s, p): seeds.env_seed(s, p) for s in range(50) for p in Purpose}
  assert len(set(drawn.values())) == len(drawn)
  for (_, purpose), seed in drawn.items():
    assert (seed < 2**29) == (purpose == Purpose.COLLECTION)
    assert seed < 2**31 - 1000
  assert seeds.evaluation_seed(3) == seeds.env_seed(3, Purpose.SEPARATE)


def test_a_run_makes_the_games_of_training_and_of_each_evaluation_from_other_seeds(tmp_path, train_tiny, monkeypatch):
  made, make = [], envs.make

  def noted(name, *, num_envs, seed, **options):
    made.append(range(seed, seed + num_envs))
    return make(name, num_envs=num_envs, seed=seed, **options)

  monkeypatch.setattr(envs, "make", noted)
  train_tiny(tmp_path / "run")
  assert len(made) == 1 + 5 + 1  # Collection, five evaluations, the last one.
  assert len({seed for seeds in made for seed in seeds}) == sum(map(len, made))


def test_a_real_atari_game(tmp_path, tiny, timeless, quiet):
  config = make_config(
    env="atari/Breakout",
    preset="debug",
    overrides={
      **tiny.networks,
      "encoder.channels": (4, 4, 4),
      "encoder.downsample": (True, True, True),
      "collect.total_steps": 30,
      "collect.first_epoch_min_steps": 20,
      "collect.first_epoch_max_steps": 20,
      "collect.steps_per_epoch": 10,
      "training.final_epochs": 0,
      "evaluation.interval_epochs": 0,
      "evaluation.max_episode_steps": 20,
      "checkpoint.interval_epochs": 10,
    },
  )
  console = quiet
  got = jedi_jax.train(config, tmp_path / "run", devices=tiny.devices(), console=console)
  assert got == result(tmp_path / "run")
  assert got["env_steps"] == 30
  assert got["frames"] == 4 * 30
  assert got["updates"] == dict.fromkeys(PHASES[:3], 4 + 2)  # The preset debug has no probe.
  assert got["episode_lengths"] == [20, 20]
  assert (got["episodes_truncated"], got["max_episode_steps"]) == (2, 20)
  assert isinstance(got["human_normalized_score"], float)
  records = timeless(tmp_path / "run" / "metrics.jsonl")
  assert [(r["env_steps"], r["frames"]) for r in records] == [(20, 80), (30, 120)]
  assert any("compiled in" in line for line in console.lines)
  assert "done: mean return" in console.lines[-1]


def test_a_run_whose_numbers_are_not_finite_stops_and_goes_on_from_its_last_checkpoint(
  tiny, train_tiny, finished_run, poisoned, timeless, quiet, tmp_path
):
  config = override(tiny.config, {"training.max_skipped": 1})
  with poisoned(run=0, epoch=4), pytest.raises(TrainingError) as caught:
    train_tiny(tmp_path / "run", config=config, console=quiet)
  message = str(caught.value)
  assert "\n" not in message
  assert "loss or gradient of denoiser was not finite in 2 updates in a row, in epoch 4" in message
  assert "checkpoint 2 was saved before" in message
  assert not (tmp_path / "run" / "result.json").exists()
  assert [p.name for p in (tmp_path / "run" / "checkpoints" / "latest").iterdir()] == ["2"]
  assert train_tiny(tmp_path / "run", config=config)["env_steps"] == 70
  assert timeless(tmp_path / "run" / "metrics.jsonl") == timeless(finished_run / "metrics.jsonl")


def test_all_losses_that_were_not_finite_are_named(train_tiny, monkeypatch, tmp_path):
  counts = {"denoiser": 21, "reward_end": 21, "actor_critic": 20}  # As after joint updates.
  monkeypatch.setattr(Learner, "skipped", lambda self, run: counts)
  with pytest.raises(
    TrainingError, match=r"denoiser or reward_end was .* 21 updates.*denoiser.optimizer and reward_end"
  ):
    train_tiny(tmp_path / "run")


def test_skipped_updates_are_reported_and_a_state_after_them_is_not_saved(tiny, train_tiny, poisoned, quiet, tmp_path):
  config = override(tiny.config, {"training.max_skipped": 1000})
  with poisoned(run=0, epoch=2):
    train_tiny(tmp_path / "run", config=config, console=quiet)
  records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [record["denoiser/skipped"] for record in records] == [0, 2, 2, 2, 2]
  assert ["denoiser/loss" in record for record in records] == [True, False, False, False, False]
  assert [record["reward_end/skipped"] for record in records] == [0] * 5
  unsaved = [line for line in quiet.lines if "is not saved" in line]
  assert [line.split()[1] for line in unsaved] == ["2", "4"]
  assert all("denoiser" in line for line in unsaved)


def test_collapsed_latents_are_a_warning(tiny, train_tiny, quiet, tmp_path):
  train_tiny(tmp_path / "run", config=override(tiny.config, {"training.collapse_std": 1e6}), console=quiet)
  warnings = [line for line in quiet.lines if "the latents have" in line]
  assert len(warnings) == 1
  assert warnings[0].startswith("WARNING: the latents have collapsed: deviation over time ")


@pytest.mark.parametrize(("bound", "lines"), [(1e-6, 1), (1e6, 0), (0, 0)])
def test_an_encoder_that_outruns_the_game_is_one_warning(tiny, train_tiny, quiet, tmp_path, bound, lines):
  train_tiny(tmp_path / "run", config=override(tiny.config, {"training.runaway_movement": bound}), console=quiet)
  warnings = [i for i, line in enumerate(quiet.lines) if "the latents move faster than the game" in line]
  assert len(warnings) == lines
  if lines:
    # Not in the first epoch, whose updates are many.
    assert quiet.lines[warnings[0] - 1].startswith("epoch 2/5")
    assert "lower encoder.learning_rate_factor" in quiet.lines[warnings[0]]


def test_a_directory_that_another_process_trains_in_is_refused(tiny, train_tiny, tmp_path):
  with workdir.locked(tmp_path / "run"), pytest.raises(UserError, match="is being trained by process"):
    train_tiny(tmp_path / "run")
  assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_run_that_is_told_to_stop_ends_after_its_epoch(
  tiny, train_tiny, finished_run, timeless, quiet, tmp_path, monkeypatch
):
  interruption = Interruption(grace=600.0)
  monkeypatch.setattr(train_lib, "Interruption", lambda: interruption)
  monkeypatch.setattr(quiet, "log", lambda text: text.startswith("epoch 3") and interruption.request_stop("a test"))
  with pytest.raises(Interrupted, match="stopped by a test after epoch 3"):
    train_tiny(tmp_path / "run", console=quiet)
  assert checkpoint.newest(tmp_path / "run" / "checkpoints" / "latest") == 3
  monkeypatch.undo()
  train_tiny(tmp_path / "run")
  assert timeless(tmp_path / "run" / "metrics.jsonl") == timeless(finished_run / "metrics.jsonl")


def test_a_run_without_time_left_stops_where_it_is(tiny, train_tiny, quiet, tmp_path, monkeypatch):
  interruption = Interruption(grace=0.0)
  monkeypatch.setattr(train_lib, "Interruption", lambda: interruption)
  monkeypatch.setattr(quiet, "show", lambda task, *_: "collecting" in task and interruption.request_stop("a test"))
  with pytest.raises(Interrupted, match="before the end of its epoch"):
    train_tiny(tmp_path / "run", console=quiet)
  assert interruption.exiting
  assert checkpoint.newest(tmp_path / "run" / "checkpoints" / "latest") is None


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
  finished_run, train_tiny, timeless, quiet, tmp_path
):
  directory = tmp_path / "run"
  shutil.copytree(finished_run, directory)
  (directory / "result.json").unlink()
  latest = directory / "checkpoints" / "latest"
  largest = max((p for p in (latest / "5" / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(data)
  train_tiny(directory, console=quiet)
  said = [line for line in quiet.lines if "checkpoint 5" in line]
  assert len(said) == 1
  assert "checkpoint 4 is used" in said[0]
  assert any("resuming after epoch 4" in line for line in quiet.lines)
  assert [p.name for p in (directory / "checkpoints" / "damaged").iterdir()] == ["latest_5"]
  assert timeless(directory / "metrics.jsonl") == timeless(finished_run / "metrics.jsonl")
  assert result(directory) | {"seconds": 0} == result(finished_run) | {"seconds": 0}
