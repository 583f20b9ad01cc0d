"""A run's directory from a file of DIAMOND's: it works like one that we trained, and nothing wrong gets in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_diamond import OVERRIDES, SPEC, make_config, random_params

from jedi_jax import config as config_lib
from jedi_jax.agent import load_agent
from jedi_jax.errors import UserError
from jedi_jax.interop import diamond
from jedi_jax.models.build import build
from jedi_jax.runs import checkpoint
from jedi_jax.types import EnvSpec, Segment

INFERRED = (*OVERRIDES, "reward_end.depths", "reward_end.attention", "reward_end.conditioning_width")


@pytest.fixture(scope="module")
def params():
  return random_params()


@pytest.fixture
def arrays(params):
  return dict(diamond.export_state_dict(params, make_config(), SPEC))


def refused(match, call, *args, **kwargs):
  with pytest.raises(UserError, match=match) as error:
    call(*args, **kwargs)
  assert len(str(error.value).splitlines()) == 1


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_run_that_cannot_be_written_can_be_imported_again(pt, arrays, tmp_path, monkeypatch):
  file, directory = pt.save(arrays), tmp_path / "run"

  def fail(checkpoints):
    if checkpoints._saving is not None:
      raise checkpoint.SaveError("no space left")

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, "wait", fail)
    refused("no space left", diamond.import_checkpoint, file, env="catch", directory=directory)
  assert not list(directory.iterdir())
  diamond.import_checkpoint(file, env="catch", directory=directory)


def test_imported_run_acts_and_imagines(pt, arrays, params, tmp_path):
  directory = tmp_path / "run"
  imported = diamond.import_checkpoint(pt.save(arrays), env="catch", directory=directory)
  agent = load_agent(directory)
  equal(agent.params, params)
  equal(imported.params, params)
  assert agent.config == imported.config
  asked, got = (config_lib.flatten(config_lib.to_dict(c)) for c in (make_config(), agent.config))
  assert {path: got[path] for path in INFERRED} == {path: asked[path] for path in INFERRED}
  exported = diamond.export_state_dict(agent.params, agent.config, agent.model.spec)
  assert list(exported) == list(arrays)
  equal(exported, arrays)

  frames = np.random.default_rng(1).integers(256, size=(2, 2, *SPEC.observation_shape), dtype=np.uint8)
  actions, state = agent.act(frames[:, 0], agent.initial_state(2), jax.random.key(0))
  assert actions.shape == (2,)
  assert np.all((np.asarray(actions) >= 0) & (np.asarray(actions) < 3))
  assert np.any(state.hidden)

  zeros = jnp.zeros((2, 2), jnp.int32)
  segment = Segment(frames, zeros, zeros.astype(jnp.float32), zeros > 0, zeros == 0)
  imagine = jax.jit(agent.model.imagine, static_argnums=3)
  trajectory = imagine(agent.params, segment, jax.random.split(jax.random.key(1), 2), 2)
  assert trajectory.latents.shape == (2, 3, *SPEC.observation_shape)
  assert np.all(np.abs(trajectory.latents) <= 1 + 1e-6)  # Up to rounding.


def test_second_import_is_refused(pt, arrays, tmp_path, snapshot):
  directory = tmp_path / "run"
  diamond.import_checkpoint(pt.save(arrays), env="catch", directory=directory)
  before = snapshot(directory)
  other = pt.save({name: value + 1 for name, value in arrays.items()})
  refused("already holds a run", diamond.import_checkpoint, other, env="catch", directory=directory)
  (directory / "config.json").unlink()
  refused("already holds a run", diamond.import_checkpoint, other, env="catch", directory=directory)
  before.pop("config.json")
  assert snapshot(directory) == before
  # A directory that holds something else is fine.
  (tmp_path / "notes").mkdir()
  (tmp_path / "notes" / "mine.txt").write_text("mine")
  diamond.import_checkpoint(other, env="catch", directory=tmp_path / "notes")
  head = load_agent(tmp_path / "notes").params["actor_critic"]["actor"]["bias"]
  np.testing.assert_array_equal(head, arrays["actor_critic.actor_linear.bias"] + 1)


NORM = "rew_end_model.encoder.blocks.0.resblocks.0.norm1.linear.bias"
CHANGES = {
  "missing": (lambda a: a.pop(NORM), f"lacks {NORM}"),
  "unknown": (lambda a: a.update({"actor_critic.more": np.zeros(2)}), "unknown array .actor_critic.more"),
  "odd name": (lambda a: a.update({"a\nb": np.zeros(2)}), "unknown array"),
  "longer": (lambda a: a.update({NORM: np.zeros(9)}), rf"{NORM} has shape \(9,\), expected \(8,\)"),
  "axis more": (lambda a: a.update({NORM: np.zeros((8, 1))}), rf"{NORM} has shape \(8, 1\), expected \(8,\)"),
  "scalar": (lambda a: a.update({NORM: np.zeros(())}), rf"{NORM} has shape \(\), expected \(8,\)"),
  "transposed": (
    lambda a: a.update({"rew_end_model.head.2.weight": a["rew_end_model.head.2.weight"].T}),
    r"head.2.weight has shape \(6, 5\), expected \(5, 6\)",
  ),
  "kernel": (
    lambda a: a.update({"denoiser.inner_model.conv_in.weight": np.zeros((8, 9, 5, 5))}),
    r"conv_in.weight has shape \(8, 9, 5, 5\), expected \(8, 9, 3, 3\)",
  ),
  "cut kernel": (
    lambda a: a.update({"denoiser.inner_model.conv_in.weight": np.zeros((8, 9))}),
    r"conv_in.weight has shape \(8, 9\), expected \(8, 9, 3, 3\)",
  ),
  "cut projection": (
    lambda a: a.update({"actor_critic.encoder.encoder.3.skip_projection.weight": np.zeros(4)}),
    r"skip_projection.weight has shape \(4,\), expected \(8, 4, 1, 1\)",
  ),
  "gates": (
    lambda a: a.update({"actor_critic.lstm.weight_ih": a["actor_critic.lstm.weight_ih"][1:]}),
    r"actor_critic.lstm.weight_ih has shape \(39, 288\), expected \(40, 288\)",
  ),
  "head of other actions": (
    lambda a: a.update({"actor_critic.actor_linear.weight": np.zeros((4, 10))}),
    r"actor_linear.weight has shape \(4, 10\), expected \(3, 10\)",
  ),
  "other actions": (
    lambda a: a.update({"denoiser.inner_model.act_emb.0.weight": np.zeros((4, 6))}),
    "has 4 actions .* but catch has 3",
  ),
  "no pixels": (
    lambda a: a.update({"actor_critic.lstm.weight_ih": np.zeros((40, 0))}),
    "do not form a DIAMOND model",
  ),
  "no levels": (
    lambda a: [a.pop(name) for name in list(a) if "d_blocks" in name],
    "denoiser.channels is empty",
  ),
  "no channels": (lambda a: a.update({"denoiser.inner_model.conv_out.weight": np.zeros(())}), "do not form"),
  "not DIAMOND's": (lambda a: a.pop("denoiser.inner_model.conv_in.weight"), "is not a DIAMOND checkpoint"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_wrong_files_write_nothing(pt, arrays, tmp_path, change):
  change, match = CHANGES[change]
  change(arrays)
  refused(match, diamond.import_checkpoint, pt.save(arrays), env="catch", directory=tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_other_environments_write_nothing(pt, arrays, tmp_path):
  path = pt.save(arrays)
  refused("catch2", diamond.import_checkpoint, path, env="catch2", directory=tmp_path / "run")
  refused("name the environment", diamond.import_checkpoint, path, env="atari/Breakout", directory=tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_any_number_is_imported(arrays):
  config = make_config()
  arrays[NORM] = np.asarray([np.nan, np.inf, -np.inf, 0, 1, 2, 3, 4], np.float64)
  arrays["actor_critic.actor_linear.bias"] = np.asarray([1, 2, 3])
  params = diamond.import_params(arrays, config, SPEC)
  np.testing.assert_array_equal(params["reward_end"]["block_0_0"]["norm_1"]["linear"]["bias"], arrays[NORM])
  assert params["actor_critic"]["actor"]["bias"].dtype == np.float32
  for wrong in (np.asarray(["a", "b", "c"]), np.asarray([1j, 2j, 3j]), np.asarray([None] * 3)):
    arrays["actor_critic.actor_linear.bias"] = wrong
    refused("actor_linear.bias has dtype .* expected numbers", diamond.import_params, arrays, config, SPEC)


@pytest.mark.parametrize(
  ("config", "spec", "match"),
  [
    (make_config(**{"reward_end.downsample": False}), SPEC, "reward_end.downsample=False has no counterpart"),
    (make_config(**{"actor_critic.channels": (), "actor_critic.downsample": ()}), SPEC, "actor_critic.channels=()"),
    (
      config_lib.make_config(
        env="catch",
        variant="jedi",
        preset="debug",
        overrides={"actor_critic.channels": (4,), "actor_critic.downsample": (False,)},
      ),
      SPEC,
      "encoder/conv_in/.* has no counterpart",
    ),
    (make_config(), EnvSpec(3, (24, 20, 3)), "24 x 20 have no counterpart"),
    (make_config(), EnvSpec(3, (25, 25, 3)), "25 x 25 have no counterpart"),
  ],
)
def test_what_diamond_has_not_is_refused(params, arrays, config, spec, match):
  refused(match, diamond.export_state_dict, params, config, spec)
  refused(match, diamond.import_params, arrays, config, spec)


def test_one_level_need_not_halve():
  overrides = {"reward_end.channels": (4,), "reward_end.depths": (1,), "reward_end.attention": (False,)}
  config = make_config(**overrides, **{"reward_end.downsample": False})
  shapes = jax.eval_shape(build(config, SPEC).init, jax.random.key(0))
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
  exported = diamond.export_state_dict(zeros, config, SPEC)
  equal(diamond.import_params(exported, config, SPEC), zeros)
  inferred, spec = diamond.infer(exported, env="catch")
  assert spec == SPEC
  assert inferred.reward_end.channels == (4,)
