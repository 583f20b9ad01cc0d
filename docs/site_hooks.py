"""Hooks of MkDocs: pages from beside docs/, and copies of the other files there that pages link to."""

import pathlib
import re
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_LINK = re.compile(r"""(?:(?<=\]\()|(?<=src="))([^)#\s"]+)(?=[)#"])""")
"""The target of a link or picture."""
_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Names on the site of pages from beside docs/."""
_COPIED = "repository"
"""Folder of the site with other files from beside docs/."""


def on_files(files: Files, config: Any) -> Files:
  """Adds the pages and the copies."""
  for name, page in _PAGES.items():
    files.append(File.generated(config, page, content=_LINK.sub(_from_docs, (_ROOT / name).read_text())))
  for file in list(files.documentation_pages()):
    for target in _LINK.findall(file.content_string):
      path = (_ROOT / "docs" / target).resolve()
      if target.startswith("../") and path.is_file() and path.name not in _PAGES:
        copy = File.generated(config, f"{_COPIED}/{path.relative_to(_ROOT)}", abs_src_path=str(path))
        if copy.src_uri not in files.src_uris:
          files.append(copy)
  return files


def on_page_markdown(markdown: str, **_: Any) -> str:
  """Leads links beside docs/ to the pages and copies."""
  return _LINK.sub(lambda link: _on_site(link[1]), markdown)


def _on_site(target: str) -> str:
  if not target.startswith("../"):
    return target
  return _PAGES.get(target[3:], f"{_COPIED}/{target[3:]}")


def _from_docs(link: re.Match[str]) -> str:
  """Returns a link of a page in the root as a page in docs/ would have it."""
  target = link[1]
  if ":" in target:
    return target
  return target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"
