import errno
import json
import os
import pathlib
import shutil
import sys
import textwrap
import time

import pytest

from jedi_jax import slurm, sweep
from jedi_jax.envs.catch import SPEC
from jedi_jax.errors import UserError
from jedi_jax.runs import workdir
from jedi_jax.sweep import RunStatus

# Replaces experiments/train.py: sleeps for SECONDS, then writes the files of a run.
TRAIN = """
import json, pathlib, sys, time
flags = dict(text[2:].split("=", 1) for text in sys.argv[1:] if text.startswith("--"))
from jedi_jax import envs
from jedi_jax.runs import workdir
from jedi_jax.config import make_config
config = make_config(
  env=flags["env"], variant=flags["variant"], preset=flags["preset"], seed=int(flags["seed"]),
  overrides=[text[6:] for text in sys.argv[1:] if text.startswith("--set=")],
)
run = workdir.prepare(flags["workdir"], config, envs.spec(config.env.name))
half = {"epoch": 1, "env_steps": 60, "collect/return": -1.0, "time/total_seconds": 30.0}
if not run.metrics.exists():
  run.metrics.write_text(json.dumps(half) + "\\n")
  time.sleep(SECONDS)
if config.seed == BAD:
  sys.exit("broken")
workdir.write_json(run.result, {"mean_return": float(config.seed), "seconds": 60.0})
"""


@pytest.fixture
def train(tmp_path):
  def make(seconds=0.0, bad=-1):
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(TRAIN).replace("SECONDS", str(seconds)).replace("BAD", str(bad)))
    return path

  return make


def make_plan(out, **changes):
  arguments = {"games": ["catch"], "seeds": 2, "variants": ["jedi"], "preset": "debug", "overrides": []}
  return sweep.plan(out, **{**arguments, **changes})


def test_a_plan_has_all_games_of_a_seed_before_the_next_seed(tmp_path):
  plan = make_plan(
    tmp_path, games=["Pong", "catch", "Pong"], variants=["jedi", "diamond"], overrides=["actor_critic.horizon=3"]
  )
  assert [run.workdir.relative_to(tmp_path).as_posix() for run in plan] == [
    f"{variant}/{game}/seed_{seed}" for seed in (0, 1) for variant in ("jedi", "diamond") for game in ("Pong", "catch")
  ]
  assert all(run.config.actor_critic.horizon == 3 for run in plan)
  assert len({run.log for run in plan}) == len(plan)
  command = sweep.command(plan[:1], pathlib.Path("train.py"))
  assert command[:2] == [sys.executable, "train.py"]
  assert {"--env=atari/Pong", "--variant=jedi", "--seed=0", "--set=actor_critic.horizon=3"} < set(command)


def test_atari100k_is_its_games(tmp_path):
  plan = make_plan(tmp_path, games=["atari100k"], seeds=5, preset="paper")
  assert len(plan) == 130
  assert len({run.config.env.name for run in plan}) == 26


def test_minatar_is_its_five_games(tmp_path):
  for group, option in (("minatar", ""), ("minatar_sticky", "?sticky=0.1")):
    plan = make_plan(tmp_path, games=[group])
    assert [run.config.env.name for run in plan] == [
      f"minatar/{game}{option}"
      for _ in range(2)
      for game in ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")
    ]
    assert len({run.workdir for run in plan} | {run.log for run in plan}) == 20
  assert plan[-1].workdir == tmp_path / "jedi" / "minatar_SpaceInvaders?sticky=0.1" / "seed_1"
  assert len(make_plan(tmp_path, games=["minatar", "minatar_sticky", "minatar/Breakout"])) == 20


def test_a_run_with_an_option_in_its_name_is_trained(tmp_path, train):
  plan = make_plan(tmp_path / "out", games=["minatar/Breakout?sticky=0.1"], seeds=1)
  assert finish(plan, train()) == 1
  assert [sweep.run_status(run).name for run in plan] == ["finished"]


@pytest.mark.parametrize("changes", [
  {"games": ["Pomg"]}, {"variants": ["jedy"]}, {"preset": "papr"}, {"games": []}, {"overrides": ["horizon=3"]},
])  # fmt: skip
def test_invalid_plans_are_refused(tmp_path, changes):
  with pytest.raises(UserError):
    make_plan(tmp_path, **changes)


def test_packs_hold_games_that_can_share_a_program(tmp_path):
  plan = make_plan(tmp_path, games=["Pong", "catch", "Breakout", "Boxing"], packed=True)
  packs = sweep.packs(plan, 2)
  assert [[(run.config.env.name, run.config.seed) for run in pack] for pack in packs] == [
    group
    for seed in (0, 1)
    for group in ([("atari/Pong", seed), ("atari/Breakout", seed)], [("atari/Boxing", seed)], [("catch", seed)])
  ]
  assert {run.config.env.action_slots for run in plan} == {18}  # Boxing's.
  command = sweep.command(packs[0], pathlib.Path("train.py"))
  assert {"--env=atari/Pong,atari/Breakout", "--seed=0", f"--workdir={tmp_path / 'jedi'}"} < set(command)
  # The training program uses the same paths.
  assert [run.workdir for run in packs[0]] == [
    tmp_path / "jedi" / workdir.relative_path(run.config) for run in packs[0]
  ]


def test_packs_of_each_variant_and_shape_have_their_own_size(tmp_path):
  games = ["Pong", "catch", "Breakout", "Boxing"]
  plan = make_plan(tmp_path, games=games, variants=["jedi", "diamond"], seeds=1, packed=True)
  asked = []

  def fit(run):
    asked.append((run.config.variant, run.config.env.name))
    return 3 if run.config.variant == "jedi" else 1

  assert [len(pack) for pack in sweep.packs(plan, fit)] == [3, 1, 1, 1, 1, 1]
  assert asked == [(variant, name) for variant in ("jedi", "diamond") for name in ("atari/Pong", "catch")]


def test_the_program_reports_how_many_runs_fit(tmp_path):
  [run] = make_plan(tmp_path, seeds=1)
  program = tmp_path / "train.py"
  program.write_text("import sys; assert '--fit' in sys.argv; print('one packed run: ...'); print('runs that fit: 3')")
  assert sweep.runs_that_fit(run, program) == 3
  program.write_text("import sys; sys.exit('no accelerator')")
  with pytest.raises(UserError, match=r"no accelerator\): give --pack"):
    sweep.runs_that_fit(run, program)


def finish(plan, train, workers=1):
  pool = sweep.Pool(sweep.packs(plan, 1), train, workers=workers)
  most = 0
  while pool.step():
    most = max(most, len(pool._running))
    time.sleep(0.05)
  return most


def test_workers_limit_the_runs_at_a_time(tmp_path, train):
  plan = make_plan(tmp_path / "out", seeds=3)
  assert [sweep.run_status(run).name for run in plan] == ["waiting"] * 3
  assert finish(plan, train(), workers=2) == 2
  statuses = [sweep.run_status(run) for run in plan]
  assert [(status.name, status.progress, status.return_, status.seconds) for status in statuses] == [
    ("finished", 1.0, 0.0, 60.0), ("finished", 1.0, 1.0, 60.0), ("finished", 1.0, 2.0, 60.0)
  ]  # fmt: skip
  assert sweep.table(statuses).splitlines()[-1] == "| jedi | catch | done 0 | done 1 | done 2 | - |"


def test_a_stopped_sweep_can_be_resumed(tmp_path, train):
  plan = make_plan(tmp_path / "out")
  slow = train(seconds=100)
  pool = sweep.Pool(sweep.packs(plan, 1), slow, workers=1)
  pool.step()
  while sweep.run_status(plan[0]).progress == 0:
    time.sleep(0.05)
  statuses = [sweep.run_status(run) for run in plan]
  assert [(status.name, status.progress, status.return_) for status in statuses] == [
    ("begun", 0.5, -1.0),
    ("waiting", 0.0, None),
  ]
  assert sweep.table(statuses).splitlines()[-1] == "| jedi | catch | 50 % -1 | waiting | 0 min |"
  pool.close()
  assert not pool._running
  finish(plan, train())  # Begun runs are resumed: the fake program sleeps only at the start of a run.
  assert [sweep.run_status(run).name for run in plan] == ["finished", "finished"]


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, train):
  plan = make_plan(tmp_path / "out", seeds=3)
  finish(plan, train(bad=1))
  assert [sweep.run_status(run).name for run in plan] == ["finished", "begun", "finished"]
  assert "broken" in plan[1].log.read_text()


def test_runs_of_another_configuration_are_refused(tmp_path, train):
  finish(make_plan(tmp_path / "out", seeds=1), train())
  with pytest.raises(UserError, match="horizon"):
    sweep.run_status(make_plan(tmp_path / "out", overrides=["actor_critic.horizon=3"])[0])


def test_projections_by_hand(tmp_path):
  runs = make_plan(tmp_path, seeds=4)
  done, half, new = (lambda run: RunStatus(run, "finished", 1.0, 1.0, 7200.0)), 0.5, 0.0
  statuses = [
    done(runs[0]),
    RunStatus(runs[1], "begun", half, None, 10.0),
    *(RunStatus(r, "waiting", new, None, 0.0) for r in runs[2:]),
  ]
  # 2.5 runs of two hours each, two at a time.
  assert "4 runs, 1 finished, 3 left: about 2.5 h with 2 at a time" in sweep.projection(statuses, workers=2)
  # With any number of workers, the longest run takes two hours.
  assert "about 2.0 h with 8" in sweep.projection(statuses, workers=8)
  assert "about 1.2 h with 2" in sweep.projection(statuses, workers=2, hours_per_run=1.0)
  assert "the time is unknown until" in sweep.projection(statuses[1:], workers=1)
  assert sweep.projection(statuses[:1], workers=1) == "1 runs, 1 finished, 0 left"


def test_an_array_job(tmp_path, train):
  pytest.importorskip("submitit")
  plan = make_plan(tmp_path / "out")
  jobs = slurm.submit(sweep.packs(plan, 1), train(), tmp_path / "slurm", workers=1, parameters={}, cluster="local")
  assert len(jobs.split(", ")) == 2
  deadline = time.monotonic() + 120
  while any(sweep.run_status(run).name != "finished" for run in plan):
    assert time.monotonic() < deadline, [p.read_text() for p in (tmp_path / "slurm").glob("*.err")]
    time.sleep(0.2)


def test_what_slurm_refuses_is_one_line(tmp_path, train, monkeypatch):
  pytest.importorskip("submitit")

  def refused(match, **parameters):
    packs = sweep.packs(make_plan(tmp_path / "out"), 1)
    with pytest.raises(UserError, match=match) as error:
      slurm.submit(packs, train(), tmp_path / "slurm", workers=1, parameters=parameters)
    assert len(str(error.value).splitlines()) == 1

  refused("could not be submitted", timeout_min="5")
  shutil.rmtree(tmp_path / "slurm")  # With SLURM installed, the jobs may be in its queue all the same.
  refused("--slurm=timeout_min=")
  monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
  for name in ("srun", "sbatch", "squeue"):  # With them submitit takes SLURM for installed.
    (tmp_path / name).write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\necho more >&2\nexit 1\n")
    (tmp_path / name).chmod(0o755)
  refused("could not be submitted.*timeout_min", timeout_min="24:00:00")
  refused("could not be submitted.*nodes", nodes="1.5", timeout_min="5")
  refused("could not be submitted.*invalid partition", timeout_min="5")
  refused("squeue failed", timeout_min="5")
  refused("slurm_time=24:00:00 is not a whole number of minutes", slurm_time="24:00:00")
  refused("slurm_signal_delay_s=1.5 is not a whole", slurm_signal_delay_s="1.5", timeout_min="5")
  refused("slurm_signal_delay_s=20 is too little .* 30 or more", slurm_signal_delay_s="20", timeout_min="5")
  refused("slurm_job_name cannot be set", slurm_job_name="mine", timeout_min="5")


def test_a_submission_that_was_cut_short_is_found_and_not_repeated(tmp_path, train, monkeypatch):
  submitit = pytest.importorskip("submitit")
  plan, folder = make_plan(tmp_path / "out"), tmp_path / "slurm"

  def submit():
    slurm.submit(sweep.packs(plan, 1), train(), folder, workers=1, parameters={"timeout_min": "5"})

  monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
  # The jobs are in the queue, but the answer is lost.
  names = f"cd {folder}; for x in jedi*; do echo 7_1 ${{x%_runs.json}}; done"
  variables = f"env >{tmp_path}/variables; exit 1"
  scripts = {"srun": "", "sbatch": variables, "squeue": names}
  monkeypatch.setenv("SBATCH_JOB_NAME", "mine")
  monkeypatch.setenv("SBATCH_ACCOUNT", "ours")
  for name, script in scripts.items():
    (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / name).chmod(0o755)
  with pytest.raises(UserError, match="could not be submitted"):
    submit()
  assert os.environ["SBATCH_JOB_NAME"] == "mine"
  assert "SBATCH_JOB_NAME" not in (tmp_path / "variables").read_text()
  assert "SBATCH_ACCOUNT" in (tmp_path / "variables").read_text()
  jobs = [submitit.core.utils.DelayedSubmission.load(path).function for path in folder.glob("**/*.pkl")]
  assert {(job.command[-1], job.patience) for job in jobs} == {("--grace=60.0", 80.0)}  # Of 90 seconds.
  assert slurm.queued(folder) == {plan[1].workdir}
  with pytest.raises(UserError, match="1 of the runs were submitted by another process"):
    submit()
  with workdir.locked(folder), pytest.raises(UserError, match="another sweep submits jobs in"):
    submit()


def test_a_directory_that_cannot_be_read_is_not_taken_for_a_waiting_run(tmp_path, monkeypatch):
  run = make_plan(tmp_path)[0]
  assert sweep.run_status(run).name == "waiting"

  def stale(path):
    raise OSError(errno.ESTALE, "Stale file handle", str(path))

  monkeypatch.setattr(sweep.os, "stat", stale)
  with pytest.raises(UserError, match="Stale file handle"):
    sweep.run_status(run)


def test_a_damaged_result_is_one_line(tmp_path, train):
  plan = make_plan(tmp_path / "out", seeds=1)
  finish(plan, train())
  (plan[0].workdir / "result.json").write_text("{")
  with pytest.raises(UserError, match=r"result\.json"):
    sweep.run_status(plan[0])
  assert json.loads((plan[0].workdir / "config.json").read_text())
  assert workdir.read(plan[0].workdir).config == plan[0].config


@pytest.mark.parametrize(("name", "text"), [
  ("result.json", "{}"), ("result.json", "3"), ("result.json", '{"mean_return": null, "seconds": 1}'),
  ("metrics.jsonl", "{}\n"), ("metrics.jsonl", "3\n3\n"), ("metrics.jsonl", '{"env_steps": []}\n'),
])  # fmt: skip
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, text):
  run = make_plan(tmp_path)[0]
  workdir.prepare(run.workdir, run.config, SPEC)
  (run.workdir / name).write_text(text)
  with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
    sweep.run_status(run)
  assert len(str(caught.value).splitlines()) == 1


def test_a_run_with_an_invalid_directory_name_is_waiting(tmp_path):
  assert sweep.run_status(make_plan(tmp_path / ("x" * 5000))[0]).name == "waiting"
