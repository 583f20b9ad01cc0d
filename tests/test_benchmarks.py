"""The parts of the benchmarks that compute; the programs themselves are in test_programs.py."""

import concurrent.futures
import fcntl
import functools
import importlib
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import absl.flags
import jax
import jax.numpy as jnp
import pytest

from jedi_jax.errors import UserError
from jedi_jax.ops import fused_convolution, images

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch):
  monkeypatch.syspath_prepend(str(BENCHMARKS))
  return importlib.import_module


def test_the_exponent_of_a_power_law(benchmark_module):
  exponent = benchmark_module("scaling").exponent
  xs = [4, 8, 16, 32]
  for power in (-1.0, 0.0, 0.5, 2.0):
    assert exponent(xs, [3e-3 * x**power for x in xs]) == pytest.approx(power, abs=1e-9)


def test_the_exponent_is_the_least_squares_slope(benchmark_module):
  # log y = 0, 2, 1 over log x = 0, 1, 2: slope (1 * 1) / 2.
  assert benchmark_module("scaling").exponent([1, math.e, math.e**2], [1, math.e**2, math.e]) == pytest.approx(0.5)


def test_there_is_no_exponent_of_a_single_value(benchmark_module):
  exponent = benchmark_module("scaling").exponent
  assert exponent([4], [1.0]) is None
  assert exponent([4, 4], [1.0, 2.0]) is None


class FakeCase:
  """Stands in for `throughput.Case`, whose compilation takes most of a minute; FLOP in proportion to the batch."""

  made = 0

  def __init__(self, config, runs, spec, *, slots):
    FakeCase.made += 1
    self.runs, self.flop = runs, dict.fromkeys(("denoiser", "reward_end", "actor_critic"), config.training.batch_size)

  def calls(self):
    return dict.fromkeys(("sampling", "denoiser", "reward_end", "actor_critic"), lambda: time.sleep(1e-3))


def test_the_sweeps_of_scaling(benchmark_module, monkeypatch, tmp_path, capsys):
  scaling = benchmark_module("scaling")
  monkeypatch.setattr(scaling.throughput, "Case", FakeCase)
  lists = ["--batch_sizes=2,4,8", "--horizons=", "--conditioning=2", "--packed=1,2", "--replays=2000,4000"]
  about = ["--env=catch", "--preset=debug", "--batch_size=4", "--updates=2", "--repeats=3", f"--name={tmp_path}/found"]
  scaling.flags.FLAGS(["scaling.py", *lists, *about])
  scaling.main()
  rows = json.loads((tmp_path / "found.json").read_text())["rows"]
  assert [(row["sweep"], row["values"]) for row in rows] == [
    ("batch_size", [2, 4, 8]),
    ("conditioning", [2]),
    ("runs", [1, 2]),
    ("replay", [2000, 4000]),
  ]
  assert FakeCase.made == 6  # The preset's own point is in three sweeps.
  batch, conditioning, runs, stored = rows
  assert batch["flop_exponents"] == pytest.approx(dict.fromkeys(batch["seconds"], 1.0))
  assert batch["flop"]["triple"] == [6, 12, 24]
  assert runs["flop_exponents"]["triple"] == pytest.approx(1.0)
  assert stored["flop_exponents"]["triple"] == pytest.approx(0.0, abs=1e-9)
  assert conditioning["exponents"]["triple"] is None
  for row in rows:
    assert list(row["seconds"]) == ["denoiser", "reward_end", "actor_critic", "triple"]
    for each in zip(*row["seconds"].values(), strict=True):
      *parts, triple = each
      assert triple == pytest.approx([sum(part) for part in zip(*parts, strict=True)])
      assert len(triple) == 3
      assert min(triple) >= 1.5e-3  # Three sleeps of two updates each.
  assert "| jedi | replay | exponent (of FLOP) |" in capsys.readouterr().out


@pytest.mark.parametrize("stride", [1, 2])
def test_operations_of_a_convolution_do_not_depend_on_its_lowering(benchmark_module, monkeypatch, stride):
  monkeypatch.setattr(images, "_MANY_POSITIONS", 1)

  def count(lowering):
    gradient = jax.grad(lambda x, k: jnp.sum(images.conv3x3(x, k, stride=stride, lowering=lowering) ** 2), (0, 1))
    return benchmark_module("flops").count(jax.vmap(gradient), jnp.zeros((2, 3, 6, 6, 4)), jnp.zeros((2, 3, 3, 4, 5)))

  assert count("lax_per_run") == count("lax")
  assert count("matmul_gradient_per_run") == count("matmul_gradient")


def test_the_kernel_of_the_convolution_is_timed_by_its_constants(benchmark_module, tmp_path, monkeypatch):
  own = fused_convolution.CHANNELS, fused_convolution.STAGES, fused_convolution.SHARED
  parsed = absl.flags.FlagValues()
  with monkeypatch.context() as patch:
    for kind in ("integer", "bool", "string"):  # Other benchmarks have flags of the same names.
      define = functools.partial(getattr(absl.flags, f"DEFINE_{kind}"), flag_values=parsed)
      patch.setattr(absl.flags, f"DEFINE_{kind}", define)
    convolution = benchmark_module("convolution")
  parsed(["convolution.py", "--kernel", "--repeats=1", "--loop=1", f"--name={tmp_path}/found"])
  convolution.time_kernel("interpret", shapes=((1, 2, 160),))
  rows = json.loads((tmp_path / "found.json").read_text())["rows"]
  assert [(row.get("channels"), row.get("stages")) for row in rows] == [
    ("XLA", None),
    *((channels, stages) for channels in (32, 64) for stages in (2, 3, 4, 6)),
    *3 * [(None, None)],  # The reward / end model.
  ]
  assert all(len(row["time"]) == 1 and row["time"][0] > 0 for row in rows)
  assert own == (fused_convolution.CHANNELS, fused_convolution.STAGES, fused_convolution.SHARED)
  with pytest.raises(UserError, match="CUDA GPU"):
    convolution.main()


def test_calls_are_timed_in_turn(benchmark_module):
  made = []
  cases = [{name: lambda i=i, name=name: made.append((name, i)) for name in ("a", "b")} for i in range(2)]
  times = benchmark_module("record").in_turn(cases, repeats=2)
  assert made == [("a", 0), ("a", 1), ("b", 0), ("b", 1)] * 3
  assert [{name: len(each) for name, each in taken.items()} for taken in times] == [{"a": 2, "b": 2}] * 2


def test_operations_of_products_convolutions_and_scans(benchmark_module):
  count = benchmark_module("flops").count
  x, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))

  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

  assert count(jnp.matmul, jnp.zeros((2, 3)), jnp.zeros((3, 5))) == 2 * 2 * 3 * 5
  assert count(convolve, x, kernel) == 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)

  def repeated(carry, square):
    return jax.lax.scan(lambda carry, _: (carry @ square, None), carry, length=7)[0]

  assert count(repeated, jnp.zeros((2, 3)), jnp.zeros((3, 3))) == 7 * 2 * 2 * 3 * 3

  def fused(x, kernel):
    layer = fused_convolution.Convolution(kernel, jnp.zeros(32))
    return fused_convolution.convolution(x, layer, group=16, mode="interpret")

  # Nothing is padded: 64 positions, groups of 16 channels.
  assert count(fused, jnp.zeros((2, 8, 8, 32)), jnp.zeros((9 * 32, 32))) == 2 * (2 * 8 * 8 * 32) * (9 * 32)


def test_the_estimate_of_a_tpu_is_completed(benchmark_module):
  estimate = benchmark_module("tpu_compile").estimate
  assert estimate(0.002, 1e9, 1e9) == {"unknown operations": 0, "estimate ms": 2.0}
  assert estimate(0.002, 1e9, 15e9)["estimate ms"] == pytest.approx(30.0)  # A loop of fifteen rounds.
  assert estimate(0.002, 1e9, 0.9e9)["estimate ms"] == 2.0
  three = estimate(-2.991, 1e9, 1e9)
  assert three["unknown operations"] == 3
  assert three["estimate ms"] == pytest.approx(9.0)
  assert estimate(None, 1e9, 1e9) == estimate(0.002, 0.0, 1e9) == {}


def test_programs_for_tpus_are_compared_chip_by_chip(benchmark_module):
  about = {"slice": "v5e:2x2", "chips": 1, "preset": "paper", "batch": 32, "level": "O1"}
  rows = [
    {**about, "variant": "jedi", "set": "a=1", "program": "denoiser", "working MiB": 1000.0, "estimate ms": 2.0},
    {**about, "variant": "diamond", "set": "", "program": "denoiser", "working MiB": 2000.0, "estimate ms": 4.04},
    {**about, "variant": "jedi", "set": "", "program": "epoch", "working MiB": 7.0},
    {**about, "variant": "jedi", "set": "", "program": "denoiser", "working MiB": 500.0},
    {**about, "variant": "jedi", "set": "", "program": "denoiser", "working MiB": 250.0, "chips": 4},
    {**about, "variant": "jedi", "set": "", "program": "denoiser", "working MiB": 240.0, "chips": 4, "level": "O2"},
  ]
  lines, columns = benchmark_module("tpu_compile").compare(rows)
  assert columns == [
    *("slice", "chips", "program", "level", "MiB, jedi", "MiB, jedi a=1", "MiB, diamond", "of diamond"),
    *("ms, jedi", "ms, jedi a=1", "ms, diamond"),
  ]
  assert [[line.get(name, "") for name in columns[1:]] for line in lines] == [
    [1, "denoiser", "O1", "500", "1,000", "2,000", "0.25", "", "2.0", "4.0"],
    [1, "epoch", "O1", "7", "", "", "", "", "", ""],
    [4, "denoiser", "O1", "250", "", "", "", "", "", ""],
    [4, "denoiser", "O2", "240", "", "", "", "", "", ""],
  ]
  lines, columns = benchmark_module("tpu_compile").compare([rows[3], {**rows[3], "dtype": "bfloat16"}])
  assert [line["dtype"] for line in lines] == ["float32", "bfloat16"]


def test_programs_of_another_dtype_are_not_those_that_were_compiled(benchmark_module):
  keys = benchmark_module("absent").keys
  old, new = {"card": "h100"}, {"card": "h100", "dtype": "bfloat16", "env": "catch", "slots": 100}
  names = ("card", "dtype", "env", "slots")
  assert keys([old, new], names) == {("h100", "float32", "atari/Breakout", 2_000), ("h100", "bfloat16", "catch", 100)}


def test_flags_of_the_benchmarks_reach_those_on_a_gpu():
  code = """
    import pathlib, sys, on_gpu
    on_gpu._FLAGS(sys.argv)
    for item in on_gpu.items(pathlib.Path("out"), pathlib.Path("work")):
      print(item.name, *item.command)
  """
  flags = ["--env=catch", "--repeats=7", "--set=encoder.patch=1", "--diamond_repo=x", "--compile", "--games=catch"]
  command = [sys.executable, "-c", textwrap.dedent(code), *flags]
  done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=True)
  lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
  assert {"--env=catch", "--repeats=7", "--set=encoder.patch=1", "--dtype=bfloat16"} <= set(lines["jedi"])
  assert {"--set=encoder.patch=1", "--set=encoder.chunk=208"} <= set(lines["chunk"])
  assert {"--repeats=7", "--diamond_repo=x", "--compile"} <= set(lines["torch"])
  assert "--compile" not in lines["jedi"]
  assert "--repeats=7" not in lines["kernel"] + lines["learn"]


def test_the_growth_of_a_soak_is_that_of_its_samples_after_the_first_fifth():
  """In a process of its own, since two benchmarks that stand alone have flags of the same names."""
  # 3 MiB an hour after a start that takes 100 at once; files and threads stay.
  samples = [
    {"seconds": 36.0 * i, "resident MiB": 0.03 * i + 100.0 * (i >= 10), "device MiB": 5.0, "files": 9, "threads": 4}
    for i in range(100)
  ]
  code = """
    import json, sys, soak
    samples = json.load(sys.stdin)
    print(json.dumps(soak.summary('a soak', samples, epochs=100)))
    print([soak.summary('a short one', samples[:n]).keys() == {'what', 'samples'} for n in (0, 1, 4, 5)])
  """
  command = [sys.executable, "-c", textwrap.dedent(code)]
  done = subprocess.run(command, cwd=BENCHMARKS, input=json.dumps(samples), capture_output=True, text=True, check=True)
  text, short = done.stdout.splitlines()
  row = json.loads(text)
  assert short == "[True, True, True, False]"
  assert (row["what"], row["epochs"], len(row["samples"])) == ("a soak", 100, 100)
  assert row["minutes"] == pytest.approx(0.6 * 99)
  assert row["resident MiB, growth an hour"] == pytest.approx(3.0)
  assert row["resident MiB, second fifth"] == pytest.approx(100.0 + 0.03 * 29.5)
  assert row["resident MiB, last fifth"] == pytest.approx(100.0 + 0.03 * 89.5)
  assert row["files, growth an hour"] == pytest.approx(0.0, abs=1e-9)
  assert (row["threads, second fifth"], row["device MiB, last fifth"]) == (4, 5.0)


@pytest.fixture(scope="module")
def gpu_program():
  """The text of a program for a GPU: a gather, a loop of five convolutions, a product, and a loop of traced length."""
  return (pathlib.Path(__file__).parent / "data" / "gpu_program.txt").read_text()


def test_kernels_of_a_program_for_a_gpu_are_counted(benchmark_module, gpu_program):
  hlo = benchmark_module("hlo")
  kernels = hlo.read(gpu_program)
  gather = next(kernel for kernel in kernels if kernel.source == "model.py:12 f")
  assert gather.bytes == 4 * 8 * 8 * 16 * (1 + 4) + 4 * 4  # Of 1,000 frames only the four that are read.
  [convolution] = [kernel for kernel in kernels if kernel.kind == "convolution"]
  assert convolution.source == "model.py:14 f.step"
  assert convolution.launches == 5
  assert convolution.flop == 2 * (4 * 8 * 8 * 16) * (3 * 3 * 16)
  # Scratch memory is not moved.
  assert kernels == hlo.read(gpu_program.replace("u8[0]", "u8[33554432]"))
  products = [kernel.flop for kernel in kernels if kernel.kind == "product"]
  assert products == [2 * 4 * 32 * 1024, 2 * 4 * 4 * 32, 2 * 4 * 4 * 32]
  assert hlo.loops_of_unknown_length(gpu_program) == 1
  with pytest.raises(ValueError, match="entry"):
    hlo.read("HloModule empty")


def test_products_of_a_kernel_of_ours_are_counted(benchmark_module):
  text = """
ENTRY %main (x: bf16[2,64,32], kernel: bf16[288,16], bias: f32[1,16]) -> bf16[2,64,16] {
  %x = bf16[2,64,32]{2,1,0} parameter(0)
  %kernel = bf16[288,16]{1,0} parameter(1)
  %bias = f32[1,16]{1,0} parameter(2)
  ROOT %call.1 = bf16[2,64,16]{2,1,0} custom-call(%x, %kernel, %bias), custom_call_target="__gpu$xla.gpu.triton"
}
"""
  [kernel] = benchmark_module("hlo").read(text)
  assert kernel.flop == 2 * (2 * 64 * 16) * (288 + 1)


def test_products_of_queries_keys_and_values_in_a_kernel_are_counted(benchmark_module):
  text = """
ENTRY %main (x: bf16[2,64,32], affine: bf16[2,96], qkv: bf16[32,96], bias: bf16[1,96]) -> bf16[2,64,32] {
  %x = bf16[2,64,32]{2,1,0} parameter(0)
  %affine = bf16[2,96]{1,0} parameter(1)
  %qkv = bf16[32,96]{1,0} parameter(2)
  %bias = bf16[1,96]{1,0} parameter(3)
  ROOT %call.1 = bf16[2,64,32]{2,1,0} custom-call(%x, %affine, %qkv, %bias), custom_call_target="__gpu$xla.gpu.triton"
}
"""
  [kernel] = benchmark_module("hlo").read(text)
  assert kernel.flop == 2 * (2 * 64 * 32) * 96


def test_a_kernel_reads_only_what_its_results_depend_on(benchmark_module):
  text = """
%fused (moments: f32[1000], scale: f32[], table: f32[10], whole: f32[8]) -> (f32[8], f32[4]) {
  %moments = f32[1000]{0} parameter(0)
  %scale = f32[] parameter(1)
  %table = f32[10]{0} parameter(2)
  %whole = f32[8]{0} parameter(3)
  %scales = f32[1000]{0} broadcast(%scale), dimensions={}
  %scaled = f32[1000]{0} multiply(%moments, %scales)
  %square = f32[1000]{0} multiply(%scaled, %moments)
  %first = f32[8]{0} slice(%square), slice={[0:8]}
  %second = f32[4]{0} slice(%square), slice={[8:12]}
  %rows = f32[100,10]{1,0} broadcast(%table), dimensions={1}
  %row = f32[1,4]{1,0} slice(%rows), slice={[0:1], [0:4]}
  %four = f32[4]{0} bitcast(%row)
  %sum.1 = f32[8]{0} add(%first, %whole)
  %sum.2 = f32[4]{0} add(%second, %four)
  ROOT %both = (f32[8]{0}, f32[4]{0}) tuple(%sum.1, %sum.2)
}

ENTRY %main (moments: f32[1000], scale: f32[], table: f32[10], whole: f32[8]) -> (f32[8], f32[4]) {
  %moments.1 = f32[1000]{0} parameter(0)
  %scale.1 = f32[] parameter(1)
  %table.1 = f32[10]{0} parameter(2)
  %whole.1 = f32[8]{0} parameter(3)
  ROOT %fusion = (f32[8]{0}, f32[4]{0}) fusion(%moments.1, %scale.1, %table.1, %whole.1), kind=kLoop, calls=%fused
}
"""
  [kernel] = benchmark_module("hlo").read(text)
  read = 12 + 1 + 4 + 8  # Of the 1,000 moments the twelve that are sliced, of the table four.
  assert kernel.bytes == 4 * (read + 8 + 4)


def test_launches_are_summed_by_kind_and_source_and_bound_the_time(benchmark_module, gpu_program):
  hlo = benchmark_module("hlo")
  kernels = hlo.read(gpu_program)
  total = hlo.total(kernels)[""]
  for by in ("kind", "source", "module"):
    parts = hlo.total(kernels, by=by)
    assert {key: sum(part[key] for part in parts.values()) for key in total} == total
    launches = [part["launches"] for part in parts.values()]
    assert launches == sorted(launches, reverse=True)
  slow = {"launch": 1.0, "bandwidth": 1e30, "peak": 1e30}
  assert hlo.seconds(kernels, **slow) == pytest.approx(total["launches"])
  assert hlo.seconds(kernels, **slow | {"launch": 0.0, "bandwidth": 2.0}) == pytest.approx(total["bytes"] / 2)
  assert hlo.seconds(kernels, **slow | {"launch": 0.0, "peak": 2.0}) == pytest.approx(total["flop"] / 2)


def test_programs_that_start_together_are_timed_in_turn(benchmark_module, tmp_path, monkeypatch):
  record = benchmark_module("record")
  monkeypatch.setenv("BENCHMARK_TURNS", f"{tmp_path / 'turns'}:{time.time() + 60}")
  programs, order = [record._Turns() for _ in range(3)], []
  for program in programs:
    program.join()

  def measure(program):
    program.wait()
    order.append(program)
    begun.release()
    finish.acquire()  # As long as a program runs, its files are open.
    for file in program._files:
      file.close()

  begun, finish = threading.Semaphore(0), threading.Semaphore(0)
  threads = [threading.Thread(target=measure, args=(program,), daemon=True) for program in programs]
  for thread in threads[:2]:
    thread.start()
  assert not begun.acquire(timeout=1.5)  # The third is not ready yet.
  threads[2].start()
  for i in range(3):
    assert begun.acquire(timeout=30)
    assert len(order) == i + 1
    assert not begun.acquire(timeout=0.2)
    finish.release()
  assert set(order) == set(programs)


def test_a_program_does_not_wait_for_others_beyond_the_deadline(benchmark_module, tmp_path, monkeypatch):
  record = benchmark_module("record")
  monkeypatch.setenv("BENCHMARK_TURNS", f"{tmp_path / 'turns'}:{time.time() + 0.5}")
  slow, quick = record._Turns(), record._Turns()
  slow.join()
  quick.join()
  quick.wait()
  assert time.time() > float(os.environ["BENCHMARK_TURNS"].rpartition(":")[2])


def test_an_item_on_a_gpu_ends_by_itself_or_is_stopped(benchmark_module, tmp_path):
  on_gpu = benchmark_module("on_gpu")
  outcome = on_gpu.run_item(on_gpu.Item("fine", ("-c", "print('text')")), tmp_path, 60)
  assert (outcome["status"], outcome["command"]) == (0, "python -c print('text')")
  assert (tmp_path / "fine.log").read_text() == "text\n"
  slow = on_gpu.Item("slow", ("-c", "import time; time.sleep(100)"))
  outcome = on_gpu.run_item(slow, tmp_path, 1)
  assert outcome["status"] == -signal.SIGTERM
  assert outcome["seconds"] < 30


def test_runs_of_several_directories_are_summarised_by_directory():
  code = """
    import learning

    def row(run, mean_return, error, movement):
      returns = [9.0, 1.0, 1.0, 1.0, None, 2.0, 2.0, None]
      curve = {"collect/return": returns, "denoiser/encoder_movement": [movement] * 6}
      return {"run": run, "mean_return": mean_return, "error_last": error, "seconds": 10, "curve": curve}

    rows = [row("a/seed_0", 1.0, 0.5, 0.1), row("b/seed_0", 4.0, None, None), row("a/seed_1", 2.0, 0.7, 0.3)]
    assert learning._by_directory([rows[0], rows[2], {"run": "random policy", "mean_return": 0.0}]) == []
    first, second = learning._by_directory(rows)
    print(*first.values(), sep="|")
    print(*second.values(), sep="|")
    none = [row(name, None, None, None) for name in ("a/seed_0", "b/seed_0")]
    print(*learning._by_directory(none)[0].values(), sep="|")
    epochs = [{"collect/episodes": 2, "collect/return": i} for i in range(12)] + 50 * [{"collect/episodes": 0}]
    print(learning._training_games(epochs)["mean_return"])
  """
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code)], cwd=BENCHMARKS, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == ["a|1.5|1.00, 2.00|1.4|0.2|-|0.6|-|-|10", "b|4|4.00|1.4|-|-|-|-|-|10",
                                      "a|-|-|1.4|-|-|-|-|-|10", "6.5"]  # fmt: skip


def test_a_learning_run_stands_still_while_a_benchmark_is_timed(benchmark_module, tmp_path):
  on_gpu, ticks = benchmark_module("on_gpu"), tmp_path / "ticks"
  code = f"import time\nwhile True:\n  open({str(ticks)!r}, 'a').write('.')\n  time.sleep(0.05)"
  item = on_gpu.Item("learn", ("-c", code), resumes=True)

  def count(wait):
    time.sleep(wait)
    return ticks.stat().st_size

  with concurrent.futures.ThreadPoolExecutor() as pool, (tmp_path / "turns.turn").open("a") as turn:
    outcome = pool.submit(on_gpu.run_item, item, tmp_path, on_gpu._GRACE + 6)
    while not ticks.exists():
      time.sleep(0.05)
    fcntl.flock(turn, fcntl.LOCK_EX)
    assert count(1.0) == count(0.5)
    fcntl.flock(turn, fcntl.LOCK_UN)
    assert count(0.0) < count(1.0)
    fcntl.flock(turn, fcntl.LOCK_EX)
    assert outcome.result(60)["status"] == -signal.SIGTERM  # A stopped run ends at its deadline.
