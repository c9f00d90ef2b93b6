"""What the documentation's build needs beyond MkDocs and its plugins.

- Formulas: LaTeX becomes MathML while the site is built, so that pages need no script and no network for them.
- Files of the repository that pages link to (`../benchmarks/results/...`), so that the same link works on GitHub.
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINKED = {  # what a page's link says: (where it is in the repository, where it comes in the site)
    "../benchmarks/results/": ("benchmarks/results", "records"),
    "../examples/": ("examples", "examples"),
    "../CONTRIBUTING.md": ("CONTRIBUTING.md", "contributing.md"),
    "../CHANGELOG.md": ("CHANGELOG.md", "changelog.md"),
}
SERVED = (".md", ".json", ".png", ".py", ".ipynb")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    for source, target in LINKED.values():
        path = ROOT / source
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in SERVED:
                uri = target if file == path else f"{target}/{file.relative_to(path).as_posix()}"
                files.append(File.generated(config, uri, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri in ("contributing.md", "changelog.md"):  # their links start at the repository's root
        markdown = re.sub(r"\]\((docs|benchmarks|examples)/", lambda m: "](" + links_from_root(m[1]), markdown)
        markdown = markdown.replace("](CHANGELOG.md)", "](changelog.md)")
    for link, (_source, target) in LINKED.items():
        markdown = markdown.replace(f"]({link}", f"]({target}{'/' if link.endswith('/') else ''}")
    return markdown


def links_from_root(folder: str) -> str:
    return "" if folder == "docs" else f"../{folder}/"


def mathml(match: re.Match[str]) -> str:
    display = "block" if match[2] == "[" else "inline"
    formula = convert(html.unescape(match[3]).strip(), display=display)
    return f'<div class="formula">{formula}</div>' if display == "block" else formula


def on_page_content(content: str, **_: Any) -> str:
    return FORMULA.sub(mathml, content)
