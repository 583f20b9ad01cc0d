import json
import math
import struct

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from jedi_jax.errors import UserError
from jedi_jax.runs.loggers import TensorBoard
from jedi_jax.runs.telemetry import MetricsWriter, f1, latent_summary, summarise, world_model_summary


def moments_of(latents):
  """Returns the sum of x x^T over latents [T, h, w, c], x being 1 and the channels, and the sums of z and z^2."""
  x = latents.reshape(-1, latents.shape[-1])
  x = np.concatenate([np.ones((len(x), 1)), x], axis=1)
  return x.T @ x, np.stack([latents.sum(axis=0), (latents**2).sum(axis=0)])


def summary_of(latents):
  """Returns the summary of latents [T, c] of one position."""
  return latent_summary(*moments_of(latents[:, None, None]))


def test_precision_and_recall_by_hand():
  # Rows are labels, columns predictions; -1, 0, +1.
  reward = np.array([[3.0, 1.0, 0.0], [2.0, 10.0, 4.0], [0.0, 1.0, 5.0]])
  end = np.array([[7.0, 0.0], [2.0, 0.0]])
  values = summarise({"reward_end": {"reward_confusion": reward, "end_confusion": end}}, {"reward_end": 3})
  assert values == pytest.approx(
    {
      "reward_end/reward_count_-1": 4,
      "reward_end/reward_count_0": 16,
      "reward_end/reward_count_+1": 6,
      "reward_end/reward_recall_-1": 3 / 4,
      "reward_end/reward_recall_0": 10 / 16,
      "reward_end/reward_recall_+1": 5 / 6,
      "reward_end/reward_precision_-1": 3 / 5,
      "reward_end/reward_precision_0": 10 / 12,
      "reward_end/reward_precision_+1": 5 / 9,
      "reward_end/end_count_no": 7,
      "reward_end/end_count_yes": 2,
      "reward_end/end_recall_no": 1.0,
      "reward_end/end_recall_yes": 0.0,
      "reward_end/end_precision_no": 7 / 9,  # 'yes' is never predicted and has no precision.
    }
  )


def test_f1_of_rare_events():
  reward = np.array([[3.0, 1.0, 0.0], [2.0, 10.0, 4.0], [0.0, 1.0, 5.0]])
  # Four negative rewards are too few. Six positive ones: precision 5/9, recall 5/6; five ends: 1, 3/5.
  end = np.array([[7.0, 0.0], [2.0, 3.0]])
  assert f1(reward, end) == pytest.approx((2 / (9 / 5 + 6 / 5) + 2 / (1 + 5 / 3)) / 2)
  assert f1(np.zeros((3, 3)), np.zeros((2, 2))) is None
  figures = {"error": np.array([0.2, 0.9]), "copying": np.array([0.4, 1.0]), "calibration": np.float32(0.5)}
  figures |= {"reward_real": reward, "end_real": end, "reward_imagined": 0 * reward, "end_imagined": 0 * end}
  assert world_model_summary(figures) == pytest.approx({
    "world_model/f1_real": f1(reward, end),
    "world_model/error_1": 0.5,
    "world_model/error_last": 0.9,
    "world_model/calibration": 0.5,
  })  # fmt: skip


def test_scalars_are_averaged_and_idle_phases_omitted():
  sums = {"denoiser": {"loss": np.float32(6.0)}, "actor_critic": {"loss": np.float32(0.0)}}
  assert summarise(sums, {"denoiser": 4, "actor_critic": 0}) == {"denoiser/loss": 1.5}
  assert summarise({}, {"denoiser": 0}) == {}


def test_latent_summary_against_numpy():
  generator = np.random.default_rng(0)
  latents = generator.normal(size=(50, 5, 2, 4)) @ generator.normal(size=(4, 4)) + [1.0, -2.0, 0.5, 3.0]
  latents += generator.normal(size=(5, 2, 4))  # What is the same in all frames.
  covariance = np.cov(latents.reshape(-1, 4).T, bias=True)
  shares = np.linalg.eigvalsh(covariance) / np.trace(covariance)
  expected = {
    "latent_std": math.sqrt(np.mean(np.diag(covariance))),
    "latent_rank": math.exp(-np.sum(shares * np.log(shares))),
    "latent_deviation": math.sqrt(np.mean(np.var(latents, axis=0))),
  }
  gram, moments = moments_of(latents)
  assert latent_summary(gram, moments) == pytest.approx(expected, rel=1e-9)
  named = summarise({"denoiser": {"latent_gram": gram, "latent_moments": moments}}, {"denoiser": 2})
  assert named == pytest.approx({f"denoiser/{name}": value for name, value in expected.items()}, rel=1e-9)


def test_latent_rank_counts_directions():
  generator = np.random.default_rng(0)
  basis = np.linalg.qr(generator.normal(size=(6, 6)))[0]
  signs = np.array([[1.0 if (i >> k) & 1 else -1.0 for k in range(3)] for i in range(8)])  # Orthogonal columns.
  figures = summary_of(2.0 * signs @ basis[:3])
  assert figures["latent_rank"] == pytest.approx(3.0, abs=1e-6)
  assert figures["latent_std"] == pytest.approx(2.0 * math.sqrt(3 / 6))
  assert summary_of(np.outer(signs[:, 0], basis[0]))["latent_rank"] == pytest.approx(1.0, abs=1e-6)


def test_latent_summary_of_degenerate_latents():
  assert latent_summary(np.zeros((4, 4)), np.zeros((2, 1, 1, 3))) == {}
  names = ("latent_std", "latent_rank", "latent_deviation")
  assert summary_of(np.zeros((5, 3))) == dict.fromkeys(names, 0.0)
  broken = latent_summary(np.full((4, 4), math.nan), np.full((2, 1, 1, 3), math.nan))
  assert all(math.isnan(broken[name]) for name in names)
  assert len(broken) == 3


def test_a_constant_picture_has_no_deviation_over_time():
  picture = np.random.default_rng(0).normal(size=(3, 2, 4))
  figures = latent_summary(*moments_of(np.stack([picture] * 6)))
  assert figures["latent_deviation"] == pytest.approx(0.0, abs=1e-7)
  assert figures["latent_std"] > 0.5


def test_the_change_is_a_root_of_a_mean_and_the_movement_is_not_averaged():
  sums = {"denoiser": {"latent_change_square": np.float32(0.36), "encoder_movement": np.float32(0.7)}}
  figures = {"denoiser/latent_change": 0.3, "denoiser/encoder_movement": 0.7}
  assert summarise(sums, {"denoiser": 4}) == pytest.approx(figures)


def records(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def writer(tmp_path, last_epoch=0):
  events = TensorBoard(tmp_path / "tensorboard", last_epoch=last_epoch)
  return MetricsWriter(tmp_path / "metrics.jsonl", [events], last_epoch=last_epoch)


def test_skipped_updates_are_counted_and_not_averaged():
  sums = {"denoiser": {"loss": 6.0, "skipped": 2.0}, "reward_end": {"loss": 0.0, "skipped": 3.0}}
  assert summarise(sums, {"denoiser": 5, "reward_end": 3}) == {
    "denoiser/loss": 2.0,
    "denoiser/skipped": 2.0,
    "reward_end/skipped": 3.0,
  }


def events(path):
  """Reads the events of a file. Each is stored as length, checksum, event, checksum."""
  data, found = path.read_bytes(), []
  while data:
    [length] = struct.unpack("<Q", data[:8])
    found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
    data = data[16 + length :]
  return found


def test_tensorboard_has_the_metrics_and_drops_repeated_steps(tmp_path):
  w = writer(tmp_path, last_epoch=3)
  w.write(4, {"a": 1.5, "b": "text"})
  w.write_image(4, "i", np.full((2, 3, 3), 255, np.uint8))
  w.close()
  [path] = (tmp_path / "tensorboard").iterdir()
  _, start, scalar, image = events(path)
  assert (start.step, start.session_log.status) == (4, event_pb2.SessionLog.START)
  assert (scalar.step, scalar.summary.value[0].tag, scalar.summary.value[0].simple_value) == (4, "a", 1.5)
  assert (image.summary.value[0].image.height, image.summary.value[0].image.width) == (2, 3)


def test_a_full_disk_is_one_line_and_closing_succeeds(tmp_path):
  w = writer(tmp_path)
  w._file.close()
  w._file = open("/dev/full", "w")  # noqa: SIM115 - the writer closes it.
  with pytest.raises(UserError, match="No space left on device") as caught:
    w.write(1, {"a": 1.0})
  assert "\n" not in str(caught.value)
  w.close()


def test_records_are_json_and_events_exist(tmp_path):
  w = writer(tmp_path)
  w.write(1, {"a": 1.5, "b": math.nan, "c": math.inf, "d": 3, "e": -math.inf, "f": np.float64(2.0)})
  assert records(tmp_path / "metrics.jsonl") == [
    {"epoch": 1, "a": 1.5, "b": None, "c": None, "d": 3, "e": None, "f": 2}
  ]
  for word in ("NaN", "Infinity"):
    assert word not in (tmp_path / "metrics.jsonl").read_text()
  w.close()
  [events] = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
  assert events.stat().st_size > 100


def test_resuming_removes_later_records_and_an_incomplete_line(tmp_path):
  w = writer(tmp_path)
  for epoch in range(1, 6):
    w.write(epoch, {"a": float(epoch)})
  w.close()
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text() + '{"epoch": 6, "a": 0.')
  w = writer(tmp_path, last_epoch=3)
  assert [record["epoch"] for record in records(path)] == [1, 2, 3]
  w.write(4, {"a": 40.0})
  w.close()
  assert [(r["epoch"], r["a"]) for r in records(path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
  assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["{}\n", "[1]\n", "3\n", "null\n", '{"epoch": null}\n', "\n", "\x00\x00\n"])
def test_lines_without_a_record_are_removed(tmp_path, damage):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"epoch": 1}\n' + damage + '{"epoch": 2}\n')
  writer(tmp_path, last_epoch=2).close()
  assert records(path) == [{"epoch": 1}, {"epoch": 2}]


def test_a_record_without_its_newline_is_kept(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"epoch": 1}\n{"epoch": 2}')
  w = writer(tmp_path, last_epoch=2)
  w.write(3, {})
  w.close()
  assert records(path) == [{"epoch": 1}, {"epoch": 2}, {"epoch": 3}]


def test_a_line_with_invalid_bytes_is_removed(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"epoch": 1}\n{"epoch": 2, "\xff\xfe')
  writer(tmp_path, last_epoch=2).close()
  assert records(path) == [{"epoch": 1}]


def test_a_new_run_starts_an_empty_file(tmp_path):
  w = writer(tmp_path)
  w.write(1, {})
  w.close()
  writer(tmp_path, last_epoch=0).close()
  assert (tmp_path / "metrics.jsonl").read_text() == ""
