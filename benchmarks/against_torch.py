"""Times the public PyTorch DIAMOND against ours, update by update and in turn, on the same device in one process.

  git clone https://github.com/eloialonso/diamond
  pip install torch torcheval hydra-core omegaconf gymnasium ale-py opencv-python tqdm wandb h5py
  python benchmarks/against_torch.py --diamond_repo=diamond --variants=diamond,jedi --batch_size=32

Its classes, its constants (config/trainer.yaml) and its own loaders, optimisers and imagination are what is timed;
only batch size and horizon are set to ours. It starts from our parameters, so that networks of other sizes are refused,
and the FLOP of both (PyTorch's own counter there, the trace here) and the calls of its denoiser tell whether the work
is the same. Both draw their batches from a replay of noise within the timed call. Two things spare it work that
training on a game would hardly make either: its model of ends is set to imagine none, since a random one ends half of
all trajectories at every step and it starts each anew, and it prepares the beginnings of one update at a time, not of
256.

float32 on both sides. On a GPU it has TF32 for matrix products, as its trainer sets it, and --compile compiles its
imagination as its trainer does. On a CPU both have a thread a core. Written to
benchmarks/results/against_torch_<platform>.json.
"""

import importlib
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import record
import throughput
from absl import flags

from jedi_jax import envs
from jedi_jax.config import Config
from jedi_jax.errors import UserError
from jedi_jax.interop import diamond
from jedi_jax.models.build import build, count_parameters
from jedi_jax.runs import program
from jedi_jax.types import EnvSpec

_REPO = flags.DEFINE_string("diamond_repo", None, "Clone of github.com/eloialonso/diamond.")
_COMPILE = flags.DEFINE_bool("compile", False, "torch.compile of its imagination, as its trainer does.")
_FLAGS = flags.FLAGS
_FLAGS.set_default("variants", ["diamond", "jedi"])

_COMPONENTS = {"denoiser": "denoiser", "reward_end": "rew_end_model", "actor_critic": "actor_critic"}
"""What DIAMOND calls the components that we call by the keys."""
_CALLS = ("sampling", *throughput.PHASES)


class Diamond:
  """DIAMOND as its trainer makes it, on a replay of noise.

  Args:
    repo: its clone.
    config: our configuration of variant `diamond`; batch size and horizon are taken from it.
    spec: of the environment.
  """

  def __init__(self, repo: pathlib.Path, config: Config, spec: EnvSpec):
    import torch
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    torch.backends.cuda.matmul.allow_tf32 = True
    self._torch, self._config = torch, config
    self._device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")
    batch, horizon = config.training.batch_size, config.actor_critic.horizon
    OmegaConf.register_new_resolver("eval", eval)  # Its configuration files calculate.
    with initialize_config_dir(str(repo / "config"), version_base="1.3"):
      changes = [f"{name}.training.batch_size={batch}" for name in _COMPONENTS.values()]
      changes += [f"world_model_env.horizon={horizon}", f"actor_critic.actor_critic_loss.backup_every={horizon}"]
      cfg = compose("trainer", [*changes, "world_model_env.num_batches_to_preload=1"])
    sys.path.insert(0, str(repo / "src"))
    agent, data, world, utils = map(importlib.import_module, ("agent", "data", "envs", "utils"))
    self._agent = agent.Agent(instantiate(cfg.agent, num_actions=spec.num_actions)).to(self._device)
    self._load(config, spec)

    loaders = self._loaders(data, cfg, spec)
    env = world.WorldModelEnv(
      self._agent.denoiser, self._agent.rew_end_model, loaders["actor_critic"], instantiate(cfg.world_model_env)
    )
    self._sampler = env.sampler
    if _COMPILE.value:
      env.predict_next_obs = torch.compile(env.predict_next_obs, mode="reduce-overhead")
      env.predict_rew_end = torch.compile(env.predict_rew_end, mode="reduce-overhead")
    self._agent.setup_training(
      instantiate(cfg.denoiser.sigma_distribution), instantiate(cfg.actor_critic.actor_critic_loss), env
    )
    self._agent.train()
    # Only the world model is trained on batches; the actor-critic begins its imagination from its own.
    self._batches = {name: iter(loaders[name]) for name in ("denoiser", "reward_end")}
    self._steps = {}
    for name, theirs in _COMPONENTS.items():
      optimizer = utils.configure_opt(self._component(name), **cfg[theirs].optimizer)
      schedule = utils.get_lr_sched(optimizer, cfg[theirs].training.lr_warmup_steps)
      self._steps[name] = (optimizer, schedule, cfg[theirs].training.max_grad_norm)
    self.parameters = {name: utils.count_parameters(self._component(name)) for name in _COMPONENTS}

  def _component(self, name: str) -> Any:
    return getattr(self._agent, _COMPONENTS[name])

  def _load(self, config: Config, spec: EnvSpec) -> None:
    """Gives it our initial parameters, but for a model of ends that imagines none."""
    params = jax.device_get(jax.jit(build(config, spec).init)(jax.random.key(0)))
    arrays = diamond.export_state_dict(params, config, spec)
    try:
      self._agent.load_state_dict({name: self._torch.tensor(array) for name, array in arrays.items()})
    except RuntimeError as error:
      raise UserError(f"its networks differ from ours: {' '.join(str(error).split())[:200]}") from None
    first, _, last = self._agent.rew_end_model.head
    with self._torch.no_grad():  # What enters the last layer is positive, so its kernel decides.
      first.bias += 10.0
      last.weight[-2], last.weight[-1] = 0.01, -0.01

  def _loaders(self, data: Any, cfg: Any, spec: EnvSpec) -> dict[str, Any]:
    """Its loaders of segments, over twenty episodes of 100 steps of noise that it keeps in memory."""
    torch = self._torch
    height, width, channels = spec.observation_shape
    # Its samplers give their base class the data set, which PyTorch no longer takes.
    torch.utils.data.Sampler.__init__ = lambda self, data_source=None: None
    # The directory is only named: nothing is saved.
    dataset = data.Dataset(pathlib.Path(tempfile.gettempdir()), "noise", cache_in_ram=True, save_on_disk=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
      frames = torch.randint(256, (101, channels, height, width), generator=generator) / 127.5 - 1.0
      ends = (torch.arange(100) == 99).to(torch.uint8)
      actions = torch.randint(spec.num_actions, (100,), generator=generator)
      rewards = torch.randint(-1, 2, (100,), generator=generator).float()
      info = {"final_observation": frames[100]}
      dataset.add_episode(data.Episode(frames[:100], actions, rewards, ends, torch.zeros_like(ends), info))
    past = cfg.agent.denoiser.inner_model.num_steps_conditioning
    lengths = {
      "denoiser": past + 1 + cfg.denoiser.training.num_autoregressive_steps,
      "reward_end": cfg.rew_end_model.training.seq_length,
      "actor_critic": past,
    }
    loaders = {}
    for name, length in lengths.items():
      training = cfg[_COMPONENTS[name]].training
      sampler = data.BatchSampler(
        dataset, 0, 1, training.batch_size, length, list(training.sample_weights), name == "reward_end"
      )
      loaders[name] = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=data.collate_segments_to_batch,
        pin_memory=self._device.type == "cuda",
      )
    return loaders

  def update(self, name: str) -> None:
    """One update of a component, and waits."""
    model, (optimizer, schedule, bound) = self._component(name), self._steps[name]
    if name in self._batches:
      loss, _ = model(next(self._batches[name]).to(self._device))
    else:
      loss, _ = model()
    loss.backward()
    self._torch.nn.utils.clip_grad_norm_(model.parameters(), bound)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    self._wait()

  def updates(self, name: str) -> None:
    """`--updates` updates of a component."""
    for _ in range(_FLAGS.updates):
      self.update(name)

  def sample(self) -> None:
    """Samples `--frames` successive frames for a batch, and waits."""
    torch, inner = self._torch, self._agent.denoiser.cfg.inner_model
    batch, size = self._config.training.batch_size, self._agent.rew_end_model.cfg.img_size
    past = torch.zeros(batch, inner.num_steps_conditioning, inner.img_channels, size, size, device=self._device)
    actions = torch.zeros(batch, inner.num_steps_conditioning, dtype=torch.long, device=self._device)
    for _ in range(_FLAGS.frames):
      following, _ = self._sampler.sample(past, actions)
      past = torch.cat([past[:, 1:], following[:, None]], dim=1)
    self._wait()

  def calls(self) -> dict[str, Callable[[], Any]]:
    """What is timed, by the names of `throughput.Case.calls`."""
    updates: dict[str, Callable[[], Any]] = {name: (lambda name=name: self.updates(name)) for name in throughput.PHASES}
    return {"sampling": self.sample, **updates}

  def count(self, name: str) -> tuple[int, int]:
    """FLOP and calls of the denoiser's network in one update of a component."""
    from torch.utils.flop_counter import FlopCounterMode

    made: list[int] = []
    hook = self._agent.denoiser.inner_model.register_forward_pre_hook(lambda module, inputs: made.append(1))
    with FlopCounterMode(display=False) as counter:
      self.update(name)
    hook.remove()
    return counter.get_total_flops(), len(made)

  def _wait(self) -> None:
    if self._device.type == "cuda":
      self._torch.cuda.synchronize()


def main() -> None:
  """Measures and writes."""
  repo = repository()
  try:
    import torch
  except ImportError:
    raise UserError("PyTorch is missing: pip install torch") from None
  threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  torch.set_num_threads(threads)  # As many as XLA takes.
  started = {**record.machine(), "torch": torch.__version__, "threads": {"torch": torch.get_num_threads()}}
  if jax.default_backend() == "cpu":
    started["threads"]["jax"] = threads
  spec = envs.spec(_FLAGS.env)
  config = throughput.make_config("diamond")
  try:
    theirs = Diamond(repo, config, spec)
  except ImportError as error:
    raise UserError(f"--diamond_repo: its programs cannot be imported ({error}): install what they need") from None
  cases = [throughput.Case(throughput.make_config(variant), 1, spec) for variant in _FLAGS.variants]
  counts = {name: theirs.count(name) for name in throughput.PHASES}
  rows: list[dict[str, Any]] = [
    {
      "program": "PyTorch DIAMOND" + (", compiled" if _COMPILE.value else ""),
      "parameters": sum(theirs.parameters.values()),
      "denoiser calls": counts["actor_critic"][1] / config.actor_critic.horizon,
      "flop": {name: flop for name, (flop, _) in counts.items()},
      "parameters, each": theirs.parameters,
    }
  ]
  for case in cases:
    params = jax.eval_shape(build(case.config, spec).init, jax.random.key(0))
    numbers = {name: number for name, number in count_parameters(params).items() if number}
    row = {"program": f"ours, {case.config.variant}", "parameters": sum(numbers.values())}
    row |= {"denoiser calls": float(case.config.sampler.num_steps), "flop": case.flop, "parameters, each": numbers}
    if case.config.variant == "diamond" and numbers != theirs.parameters:
      raise UserError(f"--diamond_repo: its networks have {theirs.parameters} parameters, ours {numbers}")
    rows.append(row)
  times = record.in_turn([case.calls() for case in (theirs, *cases)], repeats=_FLAGS.repeats)
  for row, taken in zip(rows, times, strict=True):
    row["batch"] = _FLAGS.batch_size
    row |= {f"{name} TFLOP": flop / 1e12 for name, flop in row["flop"].items()}
    row |= {name: [t / _FLAGS.updates for t in taken[name]] for name in throughput.PHASES}
    row["sampling"] = [t / _FLAGS.frames for t in taken["sampling"]]
  columns = ["program", "batch", "parameters", "denoiser calls", *_CALLS]
  print(record.table(rows, [*columns, *(f"{name} TFLOP" for name in throughput.PHASES)]))
  print("`denoiser calls` are those of an imagined step; `sampling` is the time of one frame of the batch")
  for row in rows[1:]:
    faster = [f"{name} {statistics.median(rows[0][name]) / statistics.median(row[name]):.2f}" for name in _CALLS]
    print(f"{row['program']} is faster than {rows[0]['program']} by a factor of: {', '.join(faster)}")
  path = record.write(_FLAGS.name or f"against_torch_{jax.default_backend()}", rows, started=started)
  print(f"written to {path}")


def repository() -> pathlib.Path:
  """Returns the clone that --diamond_repo names."""
  if not _REPO.value:
    raise UserError("--diamond_repo is missing: git clone https://github.com/eloialonso/diamond and name the clone")
  repo = pathlib.Path(_REPO.value).expanduser().absolute()
  for name in ("config/trainer.yaml", "src/agent.py"):
    if not (repo / name).is_file():
      raise UserError(f"--diamond_repo={_REPO.value} is no clone of github.com/eloialonso/diamond: it lacks {name}")
  return repo


if __name__ == "__main__":
  program.run(main, __doc__ or "")
