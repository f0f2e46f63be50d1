"""mkdocs: the README files of the project are pages of the site, and links to its source stay readable there."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def _site_path(path: Path) -> str:
    """Where a file of the project lies in the site, as if that were the project's folder with docs/ in its root."""
    path = path.relative_to(ROOT)
    return str(path.relative_to("docs")) if path.parts[0] == "docs" else str(path)


def on_files(files, config):
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("examples/**/README.md"))):
        files.append(File.generated(config, _site_path(page), abs_src_path=str(page)))
    for picture in ROOT.glob("examples/*/*.png"):
        files.append(File.generated(config, _site_path(picture), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    source = page.file.src_uri
    here = (
        ROOT / source
        if source in ("README.md", "CONTRIBUTING.md") or source.startswith("examples/")
        else ROOT / "docs" / source
    )
    depth = source.count("/")

    def relink(match):
        text, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target:
            return match[0]
        path = (here.parent / target).resolve()
        assert path.exists(), f"{here}: {target} does not exist"
        if path.suffix in (".md", ".png") and files.get_file_from_path(_site_path(path)):
            return f"[{text}]({'../' * depth}{_site_path(path)}{anchor})"
        return f"{text} (`{path.relative_to(ROOT)}`)"  # source is read in the repository

    return LINK.sub(relink, markdown)
