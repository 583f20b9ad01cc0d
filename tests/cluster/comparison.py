"""Whether the runs of a disturbed sweep equal those of an undisturbed one."""

import json
import os
import traceback

import running


class Broken(Exception):
  """A promise that was not kept."""


def compare(undisturbed, disturbed, folder):
  """Compares results, records and checkpoints bit for bit, in a fork, since JAX must not start here."""
  child = os.fork()
  if child == 0:
    status = 1
    try:
      for theirs, ours in zip(undisturbed, disturbed, strict=True):
        results = [json.loads((run.workdir / "result.json").read_text()) for run in (theirs, ours)]
        for result in results:
          result.pop("seconds")
        assert results[0] == results[1], (ours.workdir, results)
        records = [timeless(run.workdir / "metrics.jsonl") for run in (theirs, ours)]
        assert records[0] == records[1], f"the records of {ours.workdir} differ"
        last = [running.newest(run.workdir) for run in (theirs, ours)]
        assert last[0].name == last[1].name
        running.assert_equal_bit_for_bit(*(running.arrays(path) for path in last))
        assert not list(ours.workdir.rglob("*.orbax-checkpoint-tmp"))
      status = 0
    except BaseException:
      with (folder / "tracebacks").open("a") as file:
        traceback.print_exc(file=file)
    os._exit(status)
  if os.waitpid(child, 0)[1]:
    raise Broken((folder / "tracebacks").read_text()[-3000:])


def timeless(path):
  """The records without what a clock says."""
  records = [json.loads(line) for line in path.read_text().splitlines()]
  return [{k: v for k, v in r.items() if not k.startswith("time/") and "per_second" not in k} for r in records]
