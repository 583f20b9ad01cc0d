"""The programs on the command line. Imports take seconds, so most mistakes are run in forks of one process."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[1]
EXPERIMENTS, BENCHMARKS = f"{ROOT}/experiments/{{}}.py".format, f"{ROOT}/benchmarks/{{}}.py".format
TRAIN, EVALUATE, DIAGNOSE, DREAM, EXPORT = map(EXPERIMENTS, ("train", "evaluate", "diagnose", "dream", "export"))
PLAY, ABLATIONS, REPORT, SWEEP = map(EXPERIMENTS, ("play", "ablations", "report", "sweep"))
OFFLINE, MAKE = map(EXPERIMENTS, ("train_offline", "make_dataset"))
SCALING, AGAINST_TORCH, ON_GPU = map(BENCHMARKS, ("scaling", "against_torch", "on_gpu"))
TPU_COMPILE, GPU_COMPILE = map(BENCHMARKS, ("tpu_compile", "gpu_compile"))
CUDA = importlib.util.find_spec("jax_cuda12_plugin") or importlib.util.find_spec("jax_cuda13_plugin")
FINE = ["--env=catch", "--preset=debug", "--devices=1", "--workdir=new"]


@pytest.fixture(scope="module")
def tiny_flags(tiny):
  return tiny.flags()


def command(*argv, cwd=None):
  return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=cwd, timeout=300, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory, finished_run, tiny_flags):
  """Trains by the command line. `finished_run` comes first, so that the epoch is in the compilation cache."""
  directory = tmp_path_factory.mktemp("runs") / "command line"
  done = command(TRAIN, *tiny_flags, f"--workdir={directory}")
  assert done.returncode == 0, done.stderr
  assert "Traceback" not in done.stderr
  return directory, done


def test_the_command_line_trains_like_the_library(run, finished_run, timeless):
  directory, done = run
  assert timeless(directory / "metrics.jsonl") == timeless(finished_run / "metrics.jsonl")
  ours, theirs = (json.loads((d / "result.json").read_text()) for d in (directory, finished_run))
  assert ours | {"seconds": 0} == theirs | {"seconds": 0}
  assert json.loads((directory / "config.json").read_text()) == json.loads((finished_run / "config.json").read_text())
  lines = done.stdout.splitlines()
  assert sum(line.startswith("epoch ") and "/5, " in line for line in lines) == 5
  assert lines[-1].startswith("done: mean return")
  assert "\r" not in done.stdout


def test_a_complete_run_is_reported(run, tiny_flags, snapshot):
  directory, _ = run
  before = snapshot(directory)
  done = command(TRAIN, *tiny_flags, f"--workdir={directory}")
  assert done.returncode == 0
  assert done.stdout.splitlines() == [f"{directory} is complete; --overwrite starts it over"]
  assert snapshot(directory) == before


def test_the_number_of_runs_that_fit_is_that_of_packed_runs():
  code = f"""
    import runpy, sys
    from jedi_jax.training import memory

    def measure(config, spec, *, runs):
      assert (config.env.name, runs) == ("catch", 2)
      return memory.Memory(replay=4 << 20, state=2 << 20, working=3 << 20, device=100 << 20)

    memory.measure, sys.argv = measure, ["train.py", "--preset=catch", "--fit"]
    runpy.run_path({TRAIN!r}, run_name="__main__")
  """
  done = command("-c", textwrap.dedent(code))
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [
    "one packed run: replay 4 MiB, state 2 MiB, working 3 MiB; the device has 100 MiB",
    "runs that fit: 10",
  ]


def test_a_program_imports_environments_of_ones_own(tmp_path):
  game = """
    import functools
    import numpy as np
    import jedi_jax

    SPEC = jedi_jax.EnvSpec(num_actions=2, observation_shape=(8, 8, 1))

    class Coin:
      def reset(self, *, seed=None):
        return np.zeros((8, 8, 1), np.uint8), {}

      def step(self, action):
        return np.full((8, 8, 1), 255, np.uint8), 7.0, True, False, {}

    jedi_jax.envs.register("coin", SPEC, functools.partial(jedi_jax.envs.BatchEnv, Coin, SPEC))
  """
  (tmp_path / "coins.py").write_text(textwrap.dedent(game))
  words = ["--import=coins", "--random", "--env=coin", "--episodes=3", "--out=out.json"]
  done = command(EVALUATE, *words, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert json.loads((tmp_path / "out.json").read_text())["episode_returns"] == [7.0] * 3


def test_evaluate(run, snapshot):
  directory, _ = run
  before = snapshot(directory)
  done = command(EVALUATE, f"--workdir={directory}", "--episodes=5", "--num_envs=2", "--seed=3", "--checkpoint=best")
  assert done.returncode == 0, done.stderr
  after = snapshot(directory)
  assert set(after) == {*before, "evaluation.json"}
  assert all(after[name] == before[name] for name in before)
  summary = json.loads((directory / "evaluation.json").read_text())
  assert set(summary) == {
    "env", "variant", "checkpoint", "seed", "episode_returns", "episode_lengths", "mean_return",
    "human_normalized_score", "episodes_truncated", "max_episode_steps",
  }  # fmt: skip
  assert (summary["env"], summary["checkpoint"], summary["seed"]) == ("catch", "best", 3)
  assert summary["episode_lengths"] == [9] * 5
  assert f"mean return {summary['mean_return']:.2f} over 5 games" in done.stdout


def test_export(run, tmp_path, snapshot):
  directory, _ = run
  out = tmp_path / "agent"
  done = command(EXPORT, f"--workdir={directory}", f"--out={out}")
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("jedi on catch, ")
  assert set(snapshot(out)) == {"model.safetensors", "config.json", "README.md"}
  assert "over 3 games" in (out / "README.md").read_text()  # The run's evaluation.episodes.
  words = [f"--workdir={directory}", f"--out={out}", "--checkpoint=best", "--episodes=4"]
  before = snapshot(out)
  refused = command(EXPORT, *words)
  assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
  assert snapshot(out) == before
  done = command(EXPORT, *words, "--overwrite")
  assert done.returncode == 0, done.stderr
  assert "over 4 games" in (out / "README.md").read_text()
  done = command(EVALUATE, f"--workdir={out}", "--episodes=2")
  assert done.returncode == 0, done.stderr
  assert json.loads((out / "evaluation.json").read_text())["env"] == "catch"


def test_evaluate_the_random_policy(tmp_path):
  out = tmp_path / "new" / "random.json"
  done = command(EVALUATE, "--random", "--env=catch", "--episodes=40", f"--out={out}")
  assert done.returncode == 0, done.stderr
  summary = json.loads(out.read_text())
  assert (summary["env"], summary["policy"], len(summary["episode_returns"])) == ("catch", "random", 40)
  assert -1 <= summary["mean_return"] < 0.2


def test_report(tmp_path):
  for game, seed, score in (("Pong", 0, 1.0), ("Pong", 1, 2.0), ("Boxing", 0, 50.0)):
    directory = tmp_path / f"{game}_{seed}"
    directory.mkdir()
    result = {
      "env": f"atari/{game}", "variant": "jedi", "preset": "paper", "seed": seed, "env_steps": 100_000,
      "episode_returns": [score] * 100, "mean_return": score, "max_episode_steps": 27_000,
    }  # fmt: skip
    (directory / "result.json").write_text(json.dumps(result))
  out = tmp_path / "report"
  done = command(
    REPORT, f"--results={tmp_path}/**/result.json", f"--out={out}", "--compare=DIAMOND,JEDI", "--reps=20", "--latex"
  )
  assert done.returncode == 0, done.stderr
  assert "Traceback" not in done.stderr
  text = (out / "report.md").read_text()
  assert text.splitlines()[0] == "# Atari 100k"
  assert "| jedi | 2 | 1 |" in text
  assert "| DIAMOND | 26 | 5 | 1.459 [" in text
  assert "jedi: 2 of 26 games" in text
  assert "left out: Pong 1" in text
  assert "JEDI: no scores by game are available; reported elsewhere: mean_hns 1.45" in text
  assert "| jedi | DIAMOND |" in text
  assert {p.name for p in out.iterdir()} >= {"report.md", "report.tex", "scores.csv", "aggregates.csv", "profiles.svg"}


def test_a_report_of_minatar_alone(tmp_path):
  for seed, score in ((0, 8.0), (1, 10.0)):
    directory = tmp_path / str(seed)
    directory.mkdir()
    result = {
      "env": "minatar/Breakout?sticky=0.1", "variant": "jedi", "preset": "paper", "seed": seed, "env_steps": 100_000,
      "episode_returns": [score] * 100, "mean_return": score, "max_episode_steps": 27_000, "seconds": 60.0,
    }  # fmt: skip
    (directory / "result.json").write_text(json.dumps(result))
    line = {"epoch": 2, "env_steps": 20, "frames": 20, "evaluation/return": 1.5}
    (directory / "metrics.jsonl").write_text(json.dumps(line) + "\n")
  out = tmp_path / "report"
  done = command(REPORT, f"--results={tmp_path}/*/result.json", f"--out={out}", "--reps=20", "--latex")
  assert done.returncode == 0, done.stderr
  text = (out / "report.md").read_text()
  assert text.splitlines()[0] == "# MinAtar"
  assert "| jedi | sticky | 100,000 | 9.00 | [" in text
  assert "| DQN | sticky | 1,000,000 | 9 |" in text
  assert text.strip() in done.stdout
  assert "Atari 100k" not in text
  names = {"report.md", "report.tex", "minatar.csv", "curves.png", "curves.svg"}
  assert {p.name for p in out.iterdir()} == names


def test_published_methods_are_printed_without_a_directory(tmp_path):
  done = command(REPORT, "--methods", "--reps=0", cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert "| DIAMOND | 26 | 5 | 1.459 |" in done.stdout
  assert "JEDI: no scores by game are available" in done.stdout
  assert not any(tmp_path.iterdir())


def test_diagnose_and_dream(run, snapshot):
  directory, _ = run
  before = snapshot(directory)
  done = command(DIAGNOSE, f"--workdir={directory}", "--steps=24", "--num_envs=2")
  assert done.returncode == 0, done.stderr
  assert "weakest: " in done.stdout
  assert "| reward +1 |" in done.stdout
  written = json.loads((directory / "diagnosis.json").read_text())
  assert written["weakest"] in done.stdout
  done = command(DREAM, f"--workdir={directory}", "--steps=12", "--takes=2", f"--out={directory}.gif")
  assert done.returncode == 0, done.stderr
  assert "2 dreams" in done.stdout
  assert pathlib.Path(f"{directory}.gif").read_bytes().startswith(b"GIF89a")
  after = snapshot(directory)
  assert {name for name in after if name not in before} <= {"diagnosis.json", "diagnosis.png"}
  assert all(after[name] == before[name] for name in before)


DRIVER = """
import io, json, os, runpy, sys, traceback
import envpool, jedi_jax.training.loop  # Once for all cases.
cases = json.load(sys.stdin)
results = []
for i, (program, *argv) in enumerate(cases):
  out, err = f"{i}.out", f"{i}.err"
  sys.stdout.flush()
  child = os.fork()
  if child == 0:
    status = 1
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
    sys.argv = [program, *argv]
    sys.path.insert(0, os.path.dirname(program))
    try:
      runpy.run_path(program, run_name="__main__")
      status = 0
    except SystemExit as error:
      status = error.code or 0
    except BaseException:
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  results.append((status, open(out).read(), open(err).read()))
json.dump(results, sys.stdout)
"""

SWEEPS = ("batch_sizes", "horizons", "conditioning", "packed", "replays")

MISTAKES = {
  "unknown game": ([TRAIN, *FINE, "--env=atari/Brekout"], ["atari/Brekout", "atari/Breakout"]),
  "game without prefix": ([TRAIN, *FINE, "--env=pong"], ["pong", "atari/Pong"]),
  "unknown preset": ([TRAIN, *FINE, "--preset=papr"], ["papr", "paper"]),
  "unknown variant": ([TRAIN, *FINE, "--variant=jedy"], ["jedy", "jedi"]),
  "unknown setting": ([TRAIN, *FINE, "--set=actor_critic.horizn=3"], ["horizn", "actor_critic.horizon"]),
  "no value": ([TRAIN, *FINE, "--set=actor_critic.horizon"], ["actor_critic.horizon", "path=value"]),
  "wrong type": ([TRAIN, *FINE, "--set=actor_critic.horizon=1.5"], ["actor_critic.horizon", "1.5"]),
  "horizon 0": ([TRAIN, *FINE, "--set=actor_critic.horizon=0"], ["actor_critic.horizon", "0", "at least 1"]),
  "lengths": ([TRAIN, *FINE, "--set=denoiser.channels=8,8"], ["denoiser.channels", "denoiser.depths"]),
  "negative seed": ([TRAIN, *FINE, "--seed=-1"], ["seed"]),
  "no workdir": ([TRAIN, "--env=catch", "--preset=debug"], ["--workdir"]),
  "workdir is a file": ([TRAIN, *FINE, "--workdir=file"], ["file"]),
  "another run's workdir": ([TRAIN, *FINE, "--workdir=taken"], ["seed: 7 -> 0", "--overwrite"]),
  "unknown flag": ([TRAIN, *FINE, "--horizon=3"], ["horizon"]),
  "flag of a wrong type": ([TRAIN, *FINE, "--seed=many"], ["seed", "many"]),
  "stray argument": ([TRAIN, *FINE, "atari/Pong"], ["atari/Pong", "--name=value"]),
  "unknown logger": ([TRAIN, *FINE, "--log=tensorboard,wandbb"], ["unknown logger 'wandbb'", "nearest: wandb"]),
  "too many devices": ([TRAIN, *FINE, "--devices=64"], ["--devices=64", "has 4"]),
  "no place among processes": ([TRAIN, *FINE, "--coordinator=host:1", "--num_processes=2"], ["--process_id"]),
  "no cluster": ([TRAIN, *FINE, "--distributed"], ["--distributed", "--coordinator"]),
  "an unequal share": (
    [TRAIN, *FINE, "--runs=3", "--coordinator=host:1", "--num_processes=2", "--process_id=0"],
    ["3 runs", "2 processes"],
  ),
  "evaluate nothing": ([EVALUATE], ["--workdir"]),
  "evaluate no run": ([EVALUATE, "--workdir=empty"], ["holds no run", "empty"]),
  "evaluate no checkpoint": ([EVALUATE, "--workdir=taken"], ["no checkpoint", "taken"]),
  "evaluate an unknown agent": ([EVALUATE, "--workdir=jedi://cach"], ["jedi://cach", "nearest: jedi://catch"]),
  "evaluate an agent of the package": ([EVALUATE, "--workdir=jedi://catch"], ["--out is missing", "jedi://catch"]),
  "evaluate no repository": ([EVALUATE, "--workdir=hf://catch"], ["hf://catch", "hf://user/name"]),
  "export nothing": ([EXPORT], ["--workdir"]),
  "export to nowhere": ([EXPORT, "--workdir=taken"], ["--out"]),
  "export no run": ([EXPORT, "--workdir=empty", "--out=new"], ["holds no run and no saved agent", "empty"]),
  "export no checkpoint": ([EXPORT, "--workdir=taken", "--out=new"], ["no checkpoint", "taken"]),
  "evaluate no games": ([EVALUATE, "--workdir=taken", "--episodes=0"], ["--episodes"]),
  "random without an environment": ([EVALUATE, "--random", "--out=x.json"], ["--env"]),
  "random in a run": ([EVALUATE, "--random", "--env=catch", "--out=x.json", "--workdir=taken"], ["--workdir"]),
  "no module to import": ([EVALUATE, "--random", "--env=catch", "--out=x.json", "--import=no_games"], ["no_games"]),
  "random elsewhere": ([EVALUATE, "--random", "--env=cach", "--out=x.json"], ["cach", "catch"]),
  "diagnose nothing": ([DIAGNOSE], ["--workdir"]),
  "diagnose no checkpoint": ([DIAGNOSE, "--workdir=taken"], ["no checkpoint"]),
  "dream nothing": ([DREAM], ["--workdir"]),
  "dream in another format": ([DREAM, "--workdir=taken", "--out=dream.avi"], ["dream.avi", ".gif"]),
  "play an unknown agent": ([PLAY, "--workdir=jedi://cach"], ["jedi://cach", "nearest: jedi://catch"]),
  "play no run": ([PLAY, "--workdir=empty"], ["holds no run", "empty"]),
  "play no checkpoint": ([PLAY, "--workdir=taken", "--port=0"], ["no checkpoint", "taken"]),
  "play at no port": ([PLAY, "--workdir=taken", "--port=70000"], ["port", "70000"]),
  "data without a workdir": ([OFFLINE, "--data=empty"], ["--workdir"]),
  "no data": ([OFFLINE, "--data=empty", "--workdir=new"], ["empty", "no data set", "dataset.json"]),
  "data as an environment": ([TRAIN, *FINE, "--env=data"], ["recorded episodes", "train_offline.py"]),
  "a data set of nothing": ([MAKE, "--out=new"], ["exactly one", "--diamond"]),
  "a data set of no run": ([MAKE, "--workdir=empty", "--out=new"], ["empty", "holds no run"]),
  "a data set without checkpoints": ([MAKE, "--workdir=taken", "--out=new"], ["no checkpoint", "taken"]),
  "the key of no data of Minari": ([MAKE, "--workdir=taken", "--key=image", "--out=new"], ["--key", "--minari"]),
  "episodes without actions": ([MAKE, "--diamond=empty", "--out=new"], ["--num_actions"]),
  "no episodes of DIAMOND": ([MAKE, "--diamond=empty", "--num_actions=3", "--out=new"], ["empty", "no episodes"]),
  "unknown figure": ([ABLATIONS, "--out=new", "--figure=gradient"], ["gradient", "gradients"]),
  "unknown arm": ([ABLATIONS, "--out=new", "--arms=jedi"], ["jedi", "JEDI"]),
  "ablations without a directory": ([ABLATIONS], ["--out"]),
  "report nothing": ([REPORT, "--out=new"], ["--results", "--methods"]),
  "report without a directory": ([REPORT, "--results=file"], ["--out"]),
  "report no files": ([REPORT, "--out=new", "--results=empty/**/result.json"], ["empty", "matches"]),
  "report of something else": ([REPORT, "--out=new", "--results=file"], ["file", "cannot be read"]),
  "report beside an unknown method": ([REPORT, "--out=new", "--methods", "--compare=DIAMONT"], ["DIAMONT", "DIAMOND"]),
  "evaluate another checkpoint": ([EVALUATE, "--workdir=taken", "--checkpoint=worst"], ["checkpoint", "worst"]),
  "sweep of nothing": ([SCALING, *(f"--{name}=" for name in SWEEPS)], ["nothing is swept", "--batch_sizes"]),
  "sweep of words": ([SCALING, "--horizons=5,ten"], ["--horizons=5,ten", "integers"]),
  "sweep from 0": ([SCALING, "--packed=0,1"], ["--packed", "at least 1"]),
  "against no clone": ([AGAINST_TORCH], ["--diamond_repo", "git clone"]),
  "against another clone": ([AGAINST_TORCH, "--diamond_repo=empty"], ["empty", "config/trainer.yaml"]),
  "unknown program for a TPU": ([TPU_COMPILE, "--programs=draw,epoc"], ["epoc", "epoch"]),
  "unknown program for a GPU": ([GPU_COMPILE, "--programs=draw,epoc"], ["epoc", "epoch"]),
  "unknown GPU": ([GPU_COMPILE, "--cards=H10"], ["--cards", "H10", "H100"]),
  "unknown item for a GPU": ([ON_GPU, "--items=pack"], ["--items", "pack", "packed"]),
  "workdir of no possible name": ([TRAIN, *FINE[:-1], f"--workdir={'x' * 300}"], ["cannot make", "too long"]),
  "folder of no possible name": (
    [EXPORT, "--workdir=jedi://catch", f"--out={'x' * 300}"],
    ["cannot write", "too long"],
  ),
  "no possible source": ([MAKE, f"--diamond={'x' * 300}", "--num_actions=3", "--out=new"], ["x cannot be read"]),
  "seed beyond 32 bits": ([DREAM, "--workdir=jedi://catch", f"--seed={2**63}"], ["--seed", str(2**63)]),
  "packs measured for SLURM": ([SWEEP, "--pack=0", "--launcher=slurm", "--out=new"], ["--pack=0", "SLURM"]),
  "unknown data type": ([GPU_COMPILE, "--dtypes=float8"], ["--dtypes", "float8", "bfloat16"]),
}
if importlib.util.find_spec("libtpu") is None:
  MISTAKES["no compiler for TPUs"] = ([TPU_COMPILE], ["libtpu is missing", "pip install libtpu"])
if CUDA is None:
  MISTAKES["no compiler for GPUs"] = ([GPU_COMPILE], ["compiler", "pip install 'jax[cuda12]'"])

ANSWERS = {
  "train help": [TRAIN, "--help"],
  "evaluate help": [EVALUATE, "--help"],
  "settings": [TRAIN, *FINE[:-1], "--settings", "--set=actor_critic.horizon=9"],
}


def prepare(directory):
  """Creates a file, an empty directory, and a directory with a run of seed 7."""
  from jedi_jax.config import make_config
  from jedi_jax.envs.catch import SPEC
  from jedi_jax.runs import workdir

  (directory / "file").write_text("mine")
  (directory / "empty").mkdir()
  workdir.prepare(directory / "taken", make_config(env="catch", preset="debug", seed=7), SPEC)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, snapshot):
  """Returns (status, stdout, stderr) of every case by name, and snapshots of the files before and after."""
  home, results = tmp_path_factory.mktemp("mistakes"), tmp_path_factory.mktemp("results")
  prepare(home)
  before = snapshot(home)
  cases = [argv for argv, _ in MISTAKES.values()] + list(ANSWERS.values())
  # The cases run in `home`; results are written elsewhere.
  driver = textwrap.dedent(DRIVER).replace('f"{i}.', f'f"{results}/{{i}}.')
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", driver],
    input=json.dumps(cases), capture_output=True, text=True, cwd=home, timeout=300, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  names = [*MISTAKES, *ANSWERS]
  return dict(zip(names, json.loads(done.stdout), strict=True)), before, snapshot(home)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(outcomes, name):
  status, out, err = outcomes[0][name]
  assert status == 2, err
  assert len(err.splitlines()) == 1, err
  assert "Traceback" not in err + out
  assert out == ""
  assert err.startswith(f"{pathlib.Path(MISTAKES[name][0][0]).name}: ")
  for part in MISTAKES[name][1]:
    assert part in err


def test_mistakes_change_no_file(outcomes):
  _, before, after = outcomes
  assert after == before


def test_help_lists_the_flags(outcomes):
  for name, flags in (
    ("train help", ["env", "variant", "preset", "seed", "workdir", "overwrite", "set", "settings", "devices"]),
    ("evaluate help", ["workdir", "episodes", "num_envs", "checkpoint", "seed", "max_episode_steps"]),
  ):
    _, out, err = outcomes[0][name]
    assert err == ""
    assert "python experiments/" in out
    for flag in flags:
      assert f"--{flag}:" in out or f"--[no]{flag}:" in out, flag


@pytest.mark.parametrize("name", ["train help", "evaluate help"])
def test_help_exits_with_0(outcomes, name):
  assert outcomes[0][name][0] == 0


def test_settings_are_printed(outcomes):
  status, out, _ = outcomes[0]["settings"]
  assert status == 0
  assert "| `actor_critic.horizon` | **9** | R | Imagined steps H. |" in out.splitlines()
  assert '| `env.name` | **"catch"** | O |' in out


def test_a_mistake_in_its_own_process(tmp_path):
  done = command(TRAIN, "--env=atari/Brekout", f"--workdir={tmp_path / 'run'}")
  assert done.returncode == 2
  assert done.stdout == ""
  assert done.stderr.startswith("train.py: unknown environment 'atari/Brekout'; nearest: atari/Breakout")
  assert done.stderr.count("\n") == 1
  assert not os.listdir(tmp_path)


@pytest.mark.skipif(CUDA is None, reason="jax[cuda12], XLA's compiler for NVIDIA GPUs, is not installed")
def test_programs_are_compiled_for_a_gpu_that_is_not_there(tmp_path):
  record = tmp_path / "gpu"
  flags = ["--preset=debug", "--batch_size=4", "--programs=act", "--variants=jedi", "--by=source"]
  done = command(GPU_COMPILE, *flags, f"--record={record}")
  assert done.returncode == 0, done.stderr
  [row] = json.loads(record.with_suffix(".json").read_text())["rows"]
  assert row["launches"] == sum(row["by kind"].values()) > 10
  assert "nn/blocks.py" in done.stdout
  # Kernels that take no time but their launch.
  assert row["estimate ms"] >= row["launches"] * 2.5e-3
