"""Renders the documentation as a folder of HTML files that need no server and nothing from outside.

    pip install markdown pygments pyyaml        (and this package, for the API reference)
    python docs/build.py                        writes build/docs/index.html and so on

The pages are written for hf-doc-builder, which makes the published site: plain Markdown, ``[[autodoc]] name`` where a docstring goes, and
``_toctree.yml`` for the order. This renders the same files.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
import functools
import html
import inspect
from pathlib import Path
import re
import shutil
from typing import Any

import markdown
from pygments.formatters import HtmlFormatter
import yaml

import bitsandbytes

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "source"
EXTENSIONS = ["fenced_code", "tables", "sane_lists", "toc", "codehilite", "md_in_html"]
EXTENSION_CONFIGS = {"codehilite": {"guess_lang": False}}

COMMENT = re.compile(r"<!--.*?-->\s*", re.DOTALL)
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
AUTODOC = re.compile(r"^\[\[autodoc\]\] *(\S+)\n((?: +- .*\n?)*)", re.MULTILINE)
CALLOUT = re.compile(r"^> \[!(TIP|NOTE|WARNING)\]\n((?:>.*\n?)*)", re.MULTILINE)
LANDMARK = re.compile(r'<(h[23]) id="([^"]+)">(.*?)</h[23]>|<div class="(object)" id="([^"]+)">')
LINK = re.compile(r'href="(\.{1,2}/[^"#]*|#)?(#[^"]*)?"')


# ----------------------------------------------------------------------------------------------------------------- table of contents


@dataclass(frozen=True)
class Page:
    """A page: its path without suffix below the source folder, its title in the contents, and the section it belongs to."""

    path: str
    title: str
    section: str

    @property
    def source(self) -> Path:
        return SOURCE / f"{self.path}.mdx"

    @property
    def to_root(self) -> str:
        return "../" * self.path.count("/")


def read_toctree() -> list[Page]:
    """All pages in the order of ``_toctree.yml``."""
    sections = yaml.safe_load((SOURCE / "_toctree.yml").read_text())
    return [Page(entry["local"], entry["title"], section["title"]) for section in sections for entry in section["sections"]]


# --------------------------------------------------------------------------------------------------------------------- docstrings


@dataclass
class Docstring:
    """A Google-style docstring in parts: paragraphs, and sections such as "Args" with their text."""

    text: str
    sections: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, raw: str) -> Docstring:
        parts = re.split(r"^(Args|Attributes|Returns|Raises|Example):{1,2}\n", raw, flags=re.MULTILINE)
        sections = {}
        text = [parts[0]]
        for name, body in zip(parts[1::2], parts[2::2]):
            indented = re.match(r"(?:(?: .*)?\n|\s*$)*(?: .*(?:\n|$)(?:\n(?= ))*)*", body).group()
            sections[name] = inspect.cleandoc(indented)
            text.append(body[len(indented) :])
        return cls("\n".join(text).strip(), sections)


def resolve(name: str) -> Any:
    """The object of a dotted name such as ``bitsandbytes.nn.Linear4bit.forward``, found as hf-doc-builder finds it.

    Raises:
        AttributeError: there is none.
    """
    return functools.reduce(getattr, name.split(".")[1:], bitsandbytes)


def signature_of(found: Any) -> str:
    """How to call it, as text; "" for what cannot be called."""
    if not callable(found):
        return ""
    try:
        signature = inspect.signature(found)
    except ValueError:
        return ""
    parameters = [p for name, p in signature.parameters.items() if name not in ("self", "cls")]
    return re.sub(r"\b(?:torch|typing|collections|bitsandbytes)(?:\.\w+)*\.(?=[A-Z])", "", str(signature.replace(parameters=parameters)))


def members_of(lines: str) -> list[str]:
    """The members that the lines below an ``[[autodoc]]`` ask for; the constructor is part of its class."""
    return [name for name in re.findall(r"- *(\S+)", lines) if name != "__init__"]


def document(name: str, lines: str, kind: str = "function") -> str:
    """HTML for one ``[[autodoc]]`` entry."""
    found = resolve(name)
    short = name.removeprefix("bitsandbytes.")
    kind = "class" if inspect.isclass(found) else "property" if isinstance(found, property) else kind
    docstring = inspect.getdoc(found) or ""
    of_constructor = vars(found).get("__init__") if inspect.isclass(found) and "__init__" in lines else None
    if of_constructor is not None and of_constructor.__doc__ and "Args:" not in docstring:
        docstring = f"{docstring}\n\n{inspect.cleandoc(of_constructor.__doc__)}"
    head = f'<span class="kind">{kind}</span> <b>{html.escape(short)}</b>{html.escape(signature_of(found))}'
    body = render_docstring(Docstring.parse(docstring))
    inner = "".join(document(f"{name}.{member}", "", "method") for member in members_of(lines))
    place = "member" if kind == "method" or isinstance(found, property) else "object"
    return f'<div class="{place}" id="{html.escape(name)}"><div class="signature">{head}</div><div class="docstring">{body}{inner}</div></div>'


def render_docstring(docstring: Docstring) -> str:
    blocks = [to_html(as_markdown(docstring.text))]
    for name, body in docstring.sections.items():
        blocks.append(f"<h5>{name}</h5>")
        if name in ("Args", "Attributes", "Raises"):
            rows = [f"<dt>{html.escape(item)}</dt><dd>{to_html(as_markdown(text))}</dd>" for item, text in items_of(body)]
            blocks.append(f"<dl>{''.join(rows)}</dl>")
        elif name == "Example":
            blocks.append(to_html(f"```python\n{body}\n```"))
        else:
            blocks.append(to_html(as_markdown(body)))
    return "".join(blocks)


def items_of(body: str) -> list[tuple[str, str]]:
    """``name: text`` entries; lines that are indented continue the entry before, and an entry without a name has "" for one."""
    entries: list[tuple[str, str]] = []
    for line in body.splitlines():
        start = re.match(r"([\w*][\w*, ]*): (.*)", line)
        if start:
            entries.append((start.group(1), start.group(2)))
        elif entries:
            entries[-1] = (entries[-1][0], f"{entries[-1][1]} {line.strip()}")
        else:
            entries.append(("", line.strip()))
    return entries


def as_markdown(text: str) -> str:
    """reStructuredText literals and literal blocks of docstrings in Markdown."""
    text = re.sub(r"::\n\n((?:    .*\n?|\n)+)", lambda match: f":\n\n```python\n{inspect.cleandoc(match.group(1))}\n```\n", text)
    text = re.sub(r":func:`(\w+)`", r"`\1`", text)
    text = re.sub(r"(?<![(<])https://[^\s),;]+\w", r"<\g<0>>", text)
    return text.replace("``", "`") if "```" not in text else text


# -------------------------------------------------------------------------------------------------------------------------- pages


def to_html(text: str) -> str:
    return markdown.markdown(text, extensions=EXTENSIONS, extension_configs=EXTENSION_CONFIGS)


def prepare(text: str) -> tuple[str, dict[str, str]]:
    """A page as Markdown for ``markdown``, and what to put in place of the placeholders that it holds."""
    fences: dict[str, str] = {}
    inserted: dict[str, str] = {}

    def insert(rendered: str) -> str:
        key = f"INSERTED{len(inserted)}END"
        inserted[f"<p>{key}</p>"] = rendered
        return f"\n\n{key}\n\n"

    def keep_fence(match: re.Match) -> str:
        if match.group(1) == "text":
            return insert(f'<pre class="plain"><code>{html.escape(match.group(2))}</code></pre>')
        key = f"FENCE{len(fences)}END"
        fences[key] = f"```{match.group(1)}\n{match.group(2)}```"
        return key

    text = COMMENT.sub("", text)  # setup code of the tests lies in comments, fences included
    text = FENCE.sub(keep_fence, text)
    text = AUTODOC.sub(lambda match: insert(document(match.group(1), match.group(2))), text)

    def callout(match: re.Match) -> str:
        inner = re.sub(r"^> ?", "", match.group(2), flags=re.MULTILINE)
        return insert(f'<div class="callout {match.group(1).lower()}">{to_html(inner)}</div>')

    text = CALLOUT.sub(callout, text)
    for key, fence in fences.items():
        text = text.replace(key, fence)
    return text, inserted


def render(page: Page) -> tuple[str, str]:
    """The body of a page and its own table of contents, both HTML."""
    text, inserted = prepare(page.source.read_text())
    body = to_html(text)
    for placeholder, rendered in inserted.items():
        body = body.replace(placeholder, rendered)
    return with_html_links(body), contents_of(body)


def contents_of(body: str) -> str:
    """Links to the headings and the documented objects of a page."""
    links = []
    for level, heading, title, is_object, name in LANDMARK.findall(body):
        text = name.removeprefix("bitsandbytes.").rpartition(".")[2] if is_object else re.sub(r"<.*?>", "", title)
        mark = "" if level == "h2" else ' class="below"'
        links.append(f'<a{mark} href="#{heading or name}">{text}</a>')
    return "".join(links)


def with_html_links(body: str) -> str:
    def link(match: re.Match) -> str:
        path, anchor = match.group(1) or "", match.group(2) or ""
        return f'href="{path}.html{anchor}"' if path.startswith(".") else match.group()

    return LINK.sub(link, body)


def navigation(pages: list[Page], current: Page) -> str:
    parts, section = [], None
    for page in pages:
        if page.section != section:
            section = page.section
            parts.append(f"<h4>{html.escape(section)}</h4>")
        mark = ' class="here"' if page == current else ""
        parts.append(f'<a{mark} href="{current.to_root}{page.path}.html">{html.escape(page.title)}</a>')
    return "".join(parts)


def neighbours(pages: list[Page], current: Page) -> str:
    place = pages.index(current)
    links = []
    for label, index in (("&larr;", place - 1), ("&rarr;", place + 1)):
        if 0 <= index < len(pages):
            page = pages[index]
            title = html.escape(page.title)
            text = f"{label} {title}" if index < place else f"{title} {label}"
            links.append(f'<a href="{current.to_root}{page.path}.html">{text}</a>')
        else:
            links.append("<span></span>")
    return "".join(links)


def styles() -> str:
    light = HtmlFormatter(style="default").get_style_defs(".codehilite")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".codehilite")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{(HERE / 'build.css').read_text()}"


TEMPLATE = """<!doctype html>
<html lang="en-GB">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - bitsandbytes</title>
<link rel="stylesheet" href="{root}style.css">
</head>
<body>
<nav class="pages"><a class="name" href="{root}index.html">bitsandbytes</a>{navigation}</nav>
<main>{body}<footer>{neighbours}</footer></main>
<aside class="contents">{contents}</aside>
</body>
</html>
"""


def build(out: Path) -> list[Path]:
    """Writes the whole documentation. Returns the files of the pages."""
    pages = read_toctree()
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for page in pages:
        body, contents = render(page)
        target = out / f"{page.path}.html"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(
            TEMPLATE.format(
                title=html.escape(page.title),
                root=page.to_root,
                navigation=navigation(pages, page),
                body=body,
                neighbours=neighbours(pages, page),
                contents=contents,
            )
        )
        written.append(target)
    (out / "style.css").write_text(styles())
    shutil.copytree(SOURCE / "images", out / "images", dirs_exist_ok=True)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Render the documentation as HTML.")
    parser.add_argument("--out", type=Path, default=HERE.parent / "build" / "docs", help="folder to write to")
    out = parser.parse_args().out
    print(f"{len(build(out))} pages in {out / 'index.html'}")


if __name__ == "__main__":
    main()
