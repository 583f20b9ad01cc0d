"""Compares update times with those of DIAMOND's PyTorch program, on the same device in one process.

  git clone https://github.com/eloialonso/diamond
  pip install torch torcheval hydra-core omegaconf gymnasium ale-py opencv-python tqdm wandb h5py
  python benchmarks/against_torch.py --diamond_repo=diamond --variants=diamond,jedi --batch_size=32

The benchmark times DIAMOND's own classes, constants (config/trainer.yaml), loaders, optimisers and imagination. Only
batch size and horizon are changed, to ours. DIAMOND loads our initial parameters, which fails if sizes differ. The FLOP
of both programs (PyTorch's counter, our trace) and the number of denoiser calls show whether they do the same work.
Both draw batches from a replay of noise within the timed call. Two changes save DIAMOND work that training on a game
would rarely need: its end model predicts no ends, since a random model would end half of all trajectories at every step
and each end starts a new trajectory; and it prepares initial states for one update at a time instead of 256.

Both programs use float32. On a GPU, DIAMOND uses TF32 for matrix products, as its trainer does, and --compile compiles
its imagination, as its trainer does. On a CPU, both use one thread per core. The result is written to
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
_COMPILE = flags.DEFINE_bool("compile", default=False, help="Applies torch.compile to DIAMOND's imagination.")
_FLAGS = flags.FLAGS
_FLAGS.set_default("variants", ["diamond", "jedi"])

_COMPONENTS = {"denoiser": "denoiser", "reward_end": "rew_end_model", "actor_critic": "actor_critic"}
"""Maps our names of components to DIAMOND's."""
_CALLS = ("sampling", *throughput.PHASES)


class Diamond:
  """DIAMOND's agent, set up as its trainer does, with a replay of noise.

  Args:
    repo: clone of DIAMOND's repository.
    config: our configuration of variant `diamond`, which sets batch size and horizon.
    spec: the environment's spec.
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
    OmegaConf.register_new_resolver("eval", eval)  # DIAMOND's configuration files use eval.
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
    # Only the world model is trained on these batches; the actor-critic's environment has a loader of its own.
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
    """Loads our initial parameters, with an end model changed to predict no ends."""
    params = jax.device_get(build(config, spec).init(jax.random.key(0)))
    arrays = diamond.export_state_dict(params, config, spec)
    try:
      self._agent.load_state_dict({name: self._torch.tensor(array) for name, array in arrays.items()})
    except RuntimeError as error:
      raise UserError(f"DIAMOND's networks differ from ours: {' '.join(str(error).split())[:200]}") from None
    first, _, last = self._agent.rew_end_model.head
    with self._torch.no_grad():  # Inputs of the last layer become positive, so its kernel decides.
      first.bias += 10.0
      last.weight[-2], last.weight[-1] = 0.01, -0.01

  def _loaders(self, data: Any, cfg: Any, spec: EnvSpec) -> dict[str, Any]:
    """Makes DIAMOND's loaders of segments, over twenty episodes of 100 steps of noise in memory."""
    torch = self._torch
    height, width, channels = spec.observation_shape
    # DIAMOND's samplers pass the data set to their base class, which PyTorch no longer accepts.
    torch.utils.data.Sampler.__init__ = lambda self, data_source=None: None
    # Nothing is saved to the directory.
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
    """Runs one update of a component and waits for it."""
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
    """Runs `--updates` updates of a component."""
    for _ in range(_FLAGS.updates):
      self.update(name)

  def sample(self) -> None:
    """Samples `--frames` successive frames for a batch and waits for them."""
    torch, inner = self._torch, self._agent.denoiser.cfg.inner_model
    batch, size = self._config.training.batch_size, self._agent.rew_end_model.cfg.img_size
    past = torch.zeros(batch, inner.num_steps_conditioning, inner.img_channels, size, size, device=self._device)
    actions = torch.zeros(batch, inner.num_steps_conditioning, dtype=torch.long, device=self._device)
    for _ in range(_FLAGS.frames):
      following, _ = self._sampler.sample(past, actions)
      past = torch.cat([past[:, 1:], following[:, None]], dim=1)
    self._wait()

  def calls(self) -> dict[str, Callable[[], Any]]:
    """Returns the timed calls, with the names of `throughput.Case.calls`."""
    updates: dict[str, Callable[[], Any]] = {name: (lambda name=name: self.updates(name)) for name in throughput.PHASES}
    return {"sampling": self.sample, **updates}

  def count(self, name: str) -> tuple[int, int]:
    """Returns the FLOP and the number of denoiser calls of one update of a component."""
    from torch.utils.flop_counter import FlopCounterMode

    calls: list[int] = []
    hook = self._agent.denoiser.inner_model.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    with FlopCounterMode(display=False) as counter:
      self.update(name)
    hook.remove()
    return counter.get_total_flops(), len(calls)

  def _wait(self) -> None:
    if self._device.type == "cuda":
      self._torch.cuda.synchronize()


def main() -> None:
  """Runs the benchmark."""
  repo = repository()
  try:
    import torch
  except ImportError:
    raise UserError("PyTorch is missing: pip install torch") from None
  threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  torch.set_num_threads(threads)  # As many as XLA uses.
  started = {**record.machine(), "torch": torch.__version__, "threads": {"torch": torch.get_num_threads()}}
  if jax.default_backend() == "cpu":
    started["threads"]["jax"] = threads
  spec = envs.spec(_FLAGS.env)
  config = throughput.make_config("diamond")
  try:
    theirs = Diamond(repo, config, spec)
  except ImportError as error:
    raise UserError(f"--diamond_repo: its modules cannot be imported ({error}): install its requirements") from None
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
    steps, order = case.config.sampler.num_steps, case.config.sampler.order  # Heun's last step is one of Euler's.
    row |= {"denoiser calls": float(steps * order - (order - 1)), "flop": case.flop, "parameters, each": numbers}
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
  print("`denoiser calls` is per imagined step; `sampling` is the time of one frame of a batch")
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
      raise UserError(f"--diamond_repo={_REPO.value} is not a clone of github.com/eloialonso/diamond: it lacks {name}")
  return repo


if __name__ == "__main__":
  program.run(main, __doc__ or "")
