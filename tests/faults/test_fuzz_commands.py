"""Malformed command lines of all programs: each ends with status 2 and one line, and leaves every file as it was.

A line is one that would run, with one thing in it that must be refused before any work begins (its poison), among
flags that are fine, senseless or given twice. One process imports the libraries and forks for every line: a process of
its own would cost seconds. A line that runs for too long counts as a hang.
"""

import json
import random
import shutil

import pytest

HUGE = "9" * 25
LONG = "x" * 5000
WRONG = {
  "integer": ("many", "", "1.5", "nan", "inf", "1e3", "٣٫٥", "0x", "-", "1,2", "None", "\udcff"),
  "natural": ("0", "-1", "-" + HUGE),
  "count": (HUGE, str(10**9)),
  "beyond": (HUGE, str(2**32)),
  "float": ("many", "", "1,5", "--", "nan", "inf", "-inf", "\udcff"),
  "bool": ("yes!", "", "2", "nan", "λ"),
  "choice": ("worst", "", "LATEST ", "λ", "latest,best"),
  "game": (
    "atari/Nope", "pong", "", "atari/", "atari/Pong?skip=", "atari/Pong?skip=9-2", "λ\udcff", "catch?x", "a" * 300,
  ),
  "preset": ("papr", "", "PAPER", "λ", "\udcff"),
  "variant": ("jedy", "", "JEDI", "jedi,diamond", "λ"),
  "setting": (
    "", "=", "=3", "actor_critic.horizon", "actor_critic.horizon=", "actor_critic.horizn=3", "actor_critic=3",
    "actor_critic.horizon=0", "actor_critic.horizon=1.5", "actor_critic.gamma=nan", "actor_critic.gamma=1e999",
    "encoder.channels=", "encoder.channels=8,8", "encoder.channels=(8", "denoiser.switching=λ", "λ=1", "seed=-1",
    "replay.capacity=" + HUGE, "training.batch_size=0", "denoiser.depths=" + HUGE, "env.name=atari/Nope",
    "\udcff=\udcff", "actor_critic.horizon=1\n2", "actor_critic.channels=" + ",".join(["8"] * 999),
    "sampler.num_steps=1000000000", "replay.age_weights=nan", "encoder.clamp=inf",
    "precision.compute_dtype=float16", "encoder.patch=7",
  ),
  "run": ("missing", "file", "empty", "taken", "binary", "cut", "null", "list", "deep", "file/run", ".", "/dev/null",
          LONG, "~nobody_of_this_name/run", "\udcff", "λ λ"),
  "new run": ("", "file", "file/run", "taken", "binary", "cut", "null", "list", "deep", "/dev/null", "/proc/run", LONG,
              "~nobody_of_this_name/run", "half"),
  "result": ("missing/**/result.json", "file", "empty/*", "binary/config.json", "cut/config.json", "taken", "[", "***",
             "null/config.json", "scores/*.json", LONG, "\udcff", "λ"),
  "torch": ("missing.pt", "file", "empty", "binary/config.json", "nothing", "/dev/null", LONG, "\udcff",
            "taken/config.json"),
  "film": ("dream.avi", "dream", ".gif.txt", "λ", "file/dream"),
}  # fmt: skip

# Flags that every program has, from its library of flags, and words that are no flags at all.
STRAY = (
  ["--horizon=3"], ["--no such flag"], ["--=3"], ["-"], ["---env=catch"], ["atari/Pong"], ["--", "x"], ["λ"],
  ["\udcff"], ["--flagfile=missing"], ["--flagfile=empty"], ["--flagfile=binary/config.json"], ["--verbosity=loud"],
  ["--seed"], ["--stderrthreshold=x"], ["--novalue="], ["--nooverwrite=1"], ["--env.name=catch"], ["--logger_levels=a"],
  ["  "], [""],
)  # fmt: skip

PROGRAMS = {
  "train": (
    ["--env=catch", "--preset=debug", "--devices=1", "--workdir=new"],
    {
      "env": ("game",), "variant": ("variant",), "preset": ("preset",), "seed": ("integer", "beyond"),
      "runs": ("integer", "natural", "count"), "workdir": ("new run",), "overwrite": ("bool",), "set": ("setting",),
      "devices": ("integer", "count"), "num_processes": ("natural", "integer"), "process_id": ("integer",),
    },
    (["--devices=-1"], ["--seed=-1"], ["--distributed"], ["--coordinator=host"], ["--num_processes=2"],
     ["--coordinator=host:x", "--num_processes=2", "--process_id=0"], ["--process_id=0"],
     ["--coordinator=h:1", "--num_processes=2", "--process_id=2"], ["--workdir=taken", "--seed=9"],
     ["--env=catch,atari/Pong", "--set=env.action_slots=2"], ["--env=catch,catch", "--runs=3", "--distributed"]),
  ),
  "evaluate": (
    ["--workdir=taken"],
    {
      "workdir": ("run",), "episodes": ("integer", "natural"), "num_envs": ("integer", "natural", "count"),
      "checkpoint": ("choice",), "seed": ("integer",), "max_episode_steps": ("integer", "natural"), "random": ("bool",),
    },
    (["--random"], ["--random", "--env=catch"], ["--random", "--out=x.json", "--workdir="],
     ["--random", "--env=atari/Nope", "--out=x.json", "--workdir="], ["--seed=-1"]),
  ),
  "diagnose": (
    ["--workdir=taken"],
    {
      "workdir": ("run",), "checkpoint": ("choice",), "seed": ("integer",), "steps": ("integer", "natural", "count"),
      "num_envs": ("integer", "natural", "count"), "segments": ("integer", "natural", "count"),
    },
    (["--seed=-1"], ["--workdir="], ["--checkpoint=best"]),
  ),
  "dream": (
    ["--workdir=taken"],
    {
      "workdir": ("run",), "out": ("film",), "checkpoint": ("choice",), "steps": ("integer", "natural", "count"),
      "takes": ("integer", "natural", "count"), "fps": ("float",), "size": ("integer", "natural", "count"),
      "probe_updates": ("natural", "count"), "length": ("integer", "count"),
    },
    (["--fps=0"], ["--fps=inf"], ["--size=1"], ["--workdir="], ["--seed=-1"]),
  ),
  "report": (
    ["--results=scores/good/result.json", "--out=new", "--reps=0"],
    {"results": ("result",), "reps": ("integer", "count"), "seed": ("integer", "beyond"), "methods": ("bool",),
     "latex": ("bool",)},
    (["--compare=λ"], ["--compare=DIAMONT"], ["--compare=,"], ["--out="], ["--out=file"], ["--out=file/report"],
     ["--out=" + LONG], ["--reps=-1"], ["--seed=-1"], ["--results=scores/good/result.json", "--results=scores/same/*"]),
  ),
  "sweep": (
    ["--games=catch", "--seeds=1", "--preset=debug", "--out=new"],
    {
      "seeds": ("integer", "natural", "count"), "preset": ("preset",), "set": ("setting",), "games": ("game",),
      "variants": ("variant",), "workers": ("integer", "natural"), "pack": ("integer",), "launcher": ("choice",),
      "hours_per_run": ("float",), "dry_run": ("bool",), "interval": ("float",),
    },
    (["--out="], ["--out=" + LONG], ["--out=swept"], ["--pack=-1"], ["--hours_per_run=-1"], ["--hours_per_run=inf"],
     ["--interval=0"], ["--games="], ["--variants="], ["--out=file"], ["--out=broken_sweep"], ["--launcher=slurm"]),
  ),
  "ablations": (
    ["--preset=debug", "--seeds=1", "--out=new"],
    {
      "seeds": ("integer", "natural", "count"), "preset": ("preset",), "set": ("setting",), "env": ("game",),
    },
    (["--out="], ["--figure=gradient"], ["--figure=λ"], ["--arms=jedi"], ["--arms=JEDI,λ"], ["--out=file"],
     ["--figure=targets", "--arms=MSE"], ["--out=/dev/null"]),
  ),
  "import_diamond": (
    ["--checkpoint=nothing", "--env=atari/Breakout", "--workdir=new"],
    {"checkpoint": ("torch",), "env": ("game",), "workdir": ("new run",)},
    (["--checkpoint="], ["--env="], ["--workdir="], ["--workdir=taken"]),
  ),
  "variants": (["--env=catch", "--preset=debug"], {"env": ("game",), "preset": ("preset",)}, ()),
}  # fmt: skip
"""Of each program: flags with which it would run, the wrong values of its flags, and other poisons."""

HARMLESS = (["--verbosity=-1"], ["--noshowprefixforinfo"], ["--undefok=nothing"])
REPEATABLE = ("set",)


def lines():
  """All poisons of all programs, each once, in a fixed random order, mixed with flags that change nothing."""
  rng = random.Random(0)
  by_program = {}
  for program, (base, flags, others) in PROGRAMS.items():
    poisons = [[f"--{flag}={value}"] for flag, kinds in flags.items() for kind in kinds for value in WRONG[kind]]
    poisons += [[f"--{flag}"] for flag in flags if flags[flag] != ("bool",)]  # The last word: its value is missing.
    poisons += [list(words) for words in (*others, *STRAY)]
    rng.shuffle(poisons)
    found = []
    for poison in poisons:
      if program == "sweep" and poison == ["--launcher=slurm"] and shutil.which("sbatch"):
        continue
      if poison in DEFAULTS.get(program, ()):
        continue
      named = {word.lstrip("-").partition("=")[0] for word in poison}
      words = [word for word in base if word[2:].partition("=")[0] not in named - set(REPEATABLE)]
      twice = [word for word in words if rng.random() < 0.1]  # Given twice.
      extra = rng.choice(HARMLESS) if rng.random() < 0.2 else []
      before = rng.random() < 0.2 and "=" in poison[0] and poison[0].startswith("--")
      found.append((program, [*poison, *words, *twice] if before else [*words, *twice, *extra, *poison]))
    by_program[program] = found
  return by_program


DEFAULTS = {
  # An empty value stands for the default here, or the value is right, so that the line would run.
  "train": (["--env="], ["--seed"]),
  "ablations": (["--env="], ["--seed"]),
  "sweep": (["--variants=jedi,diamond"],),
}


def choose(count):
  """So many lines, the programs in turn."""
  queues = [list(found) for found in lines().values()]
  chosen = []
  while len(chosen) < count:
    for queue in queues:
      if queue and len(chosen) < count:
        chosen.append(queue.pop())
  return chosen


def furnish(home):
  """Directories and files that lines speak of."""
  from jedi_jax import sweep
  from jedi_jax.config import make_config
  from jedi_jax.envs.catch import SPEC
  from jedi_jax.runs import workdir

  noise = random.Random(1).randbytes(3000)
  config = make_config(env="catch", preset="debug", seed=7)
  workdir.prepare(home / "taken", config, SPEC)
  whole = (home / "taken" / "config.json").read_text()
  (home / "empty").mkdir()
  (home / "file").write_text("mine")
  (home / "nothing").write_bytes(b"")
  (home / "half" / "checkpoints").mkdir(parents=True)
  for name, contents in (
    ("binary", noise),
    ("cut", whole[: len(whole) // 2].encode()),
    ("null", b"null"),
    ("list", b'{"spec": [], "config": []}'),
    ("deep", b"[" * 100_000),
  ):
    (home / name).mkdir()
    (home / name / "config.json").write_bytes(contents)
  result = {
    "env": "atari/Pong", "variant": "jedi", "preset": "paper", "seed": 0, "env_steps": 100_000, "frames": 400_000,
    "episode_returns": [1.0] * 100, "mean_return": 1.0, "max_episode_steps": 27_000, "seconds": 1.0,
  }  # fmt: skip
  for name in ("good", "same"):
    (home / "scores" / name).mkdir(parents=True)
    (home / "scores" / name / "result.json").write_text(json.dumps(result))
  (home / "scores" / "odd.json").write_text(json.dumps({**result, "mean_return": [1]}))
  for out, text in (("swept", whole), ("broken_sweep", "{")):
    (place,) = sweep.plan(home / out, games=["catch"], seeds=1, variants=["jedi"], preset="debug", overrides=[])
    place.workdir.mkdir(parents=True)
    (place.workdir / "config.json").write_text(text)


@pytest.fixture
def run(tmp_path, tree, commands):
  """Runs lines in a furnished directory, where no file may change; returns (status, output, errors) of each."""

  def furnished(cases):
    furnish(tmp_path)
    before = tree(tmp_path)
    outcomes = commands(cases, tmp_path)
    after = tree(tmp_path)
    assert after == before, sorted(name for name in {**before, **after} if after.get(name) != before.get(name))
    return outcomes

  return furnished


def check(cases, outcomes):
  wrong = []
  for (program, argv), (status, out, err) in zip(cases, outcomes, strict=True):
    refused = status == 2 and len(err.splitlines()) == 1 and err.startswith(f"{program}.py: ") and len(err) < 20_000
    if not refused or "Traceback" in out + err:
      wrong.append((program, [word[:80] for word in argv], status, err[-1000:]))
  assert not wrong, "\n".join(map(str, wrong))


def test_some_malformed_lines_are_refused_in_one_line_and_change_no_file(run):
  cases = choose(10)
  check(cases, run(cases))


@pytest.mark.faults
def test_200_malformed_lines_are_refused_in_one_line_and_change_no_file(run):
  cases = choose(200)
  assert {program for program, _ in cases} == set(PROGRAMS)
  check(cases, run(cases))


def test_asking_for_help_among_mistakes_is_answered_with_0(run):
  cases = [(program, ["--help", "--seed=many"]) for program in ("train", "report")]
  for status, out, err in run(cases):
    assert (status, err) == (0, "")
    assert "Flags:" in out
