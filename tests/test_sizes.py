"""Files and functions stay small enough to read."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(
  path for folder in ("jedi_jax", "experiments", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_sizes(path):
  text = path.read_text()
  assert text.count("\n") <= 450
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef):
      assert node.end_lineno - node.lineno < 130, node.name
      given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
      assert len([argument for argument in given if argument.arg != "self"]) <= 12, node.name
