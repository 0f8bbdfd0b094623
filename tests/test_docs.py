"""The documentation: its Python runs, its names and links exist, its messages are those of the code, and it renders.

Every block fenced as ``python`` runs, the blocks of a page one after the other in one namespace and in an empty folder. What a page takes for
granted (a model, a folder) is made by code in a comment of that page, ``<!-- setup ... -->``, which readers do not see. A page whose
comment begins with ``setup process`` runs in a process of its own. The marker ``gpu`` on the fence exempts a block that needs one; these are
counted here. Shell commands are fenced as ``bash``.
"""

import ast
import functools
import importlib.util
import inspect
import json
import os
from pathlib import Path
import re
import subprocess
import sys

import pytest
import torch
import yaml

import bitsandbytes as bnb
from bitsandbytes import _ops
from bitsandbytes.consts import DYNAMIC_LIBRARY_SUFFIX
from bitsandbytes.optim.manager import GlobalOptimManager

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "docs" / "source"
PAGES = {path.relative_to(SOURCE).with_suffix("").as_posix(): path for path in sorted(SOURCE.rglob("*.mdx"))}
TEXTS = {**PAGES, **{name: ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")}}

EXEMPT = {"installation": {"gpu": 1}}

COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
FENCE = re.compile(r"^```(\w*)[ ]?([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
AUTODOC = re.compile(r"^\[\[autodoc\]\] *(\S+)\n((?: +- .*\n?)*)", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)")
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
CODE_SPAN = re.compile(r"`([^`\n]+)`")


# ------------------------------------------------------------------------------------------------------------------------- reading pages


def blocks(path: Path) -> list[tuple[str, str, str, int]]:
    """Language, marker, code and first line of every fenced block outside comments."""
    text = path.read_text()
    visible = COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)
    return [(m.group(1), m.group(2).strip(), m.group(3), visible[: m.start(3)].count("\n") + 1) for m in FENCE.finditer(visible)]


def setups(path: Path) -> list[tuple[str, str, int]]:
    """Mode ("" or "process"), code and first line of every setup comment."""
    text = path.read_text()
    found = []
    for match in COMMENT.finditer(text):
        first, _, code = match.group(1).partition("\n")
        if first.split()[:1] == ["setup"]:
            found.append((first.strip().removeprefix("setup").strip(), code, text[: match.start(1)].count("\n") + 2))
    return found


def prose(path: Path) -> str:
    """The text without comments and code."""
    return FENCE.sub("", COMMENT.sub("", path.read_text()))


def program(path: Path) -> list[tuple[str, int]]:
    """The code that runs for a page: setup and blocks in the order in which they stand."""
    parts = [(line, code) for _, code, line in setups(path)]
    parts += [(line, code) for language, marker, code, line in blocks(path) if language == "python" and not marker]
    return [(code, line) for line, code in sorted(parts)]


RUNNING = {name: path for name, path in TEXTS.items() if any(language == "python" for language, *_ in blocks(path))}
IN_OWN_PROCESS = {name for name, path in RUNNING.items() if any(mode == "process" for mode, *_ in setups(path))}


# ------------------------------------------------------------------------------------------------------------------------- running pages


def run(path: Path) -> None:
    """Runs a page. Line numbers of an error are those of the page."""
    namespace = {"__name__": path.stem}
    for code, line in program(path):
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), namespace)


@pytest.fixture
def clean_process(tmp_path, monkeypatch):
    """An empty folder to run in, one thread, which is enough for small tensors, and no overrides left behind."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    yield
    GlobalOptimManager.get_instance().initialize()


@pytest.mark.parametrize("name", sorted(RUNNING.keys() - IN_OWN_PROCESS))
def test_blocks_run(name, clean_process):
    if name == "cpu_performance" and not (ROOT / "bitsandbytes" / f"libbitsandbytes_cpu{DYNAMIC_LIBRARY_SUFFIX}").exists():
        pytest.skip("the page asks the native library what it does, and there is none")
    run(RUNNING[name])


@pytest.mark.parametrize("name", sorted(IN_OWN_PROCESS))
def test_blocks_run_in_a_process_of_their_own(name, tmp_path):
    command = [sys.executable, str(Path(__file__).resolve()), name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_exemptions_are_the_known_ones():
    found = {}
    for name, path in TEXTS.items():
        for language, marker, *_ in blocks(path):
            assert language in ("python", "bash", "text", "json", "cpp", ""), f"{name}: a block of language {language!r}"
            if marker:
                assert language == "python" and marker == "gpu", f"{name}: marker {marker!r}"
                found.setdefault(name, {}).setdefault(marker, 0)
                found[name][marker] += 1
    assert found == EXEMPT


# ------------------------------------------------------------------------------------------------------------------- contents and links


def toctree() -> list[str]:
    sections = yaml.safe_load((SOURCE / "_toctree.yml").read_text())
    return [entry["local"] for section in sections for entry in section["sections"]]


def test_every_page_is_in_the_contents_once():
    assert sorted(toctree()) == sorted(PAGES)


def slug(heading: str) -> str:
    text = re.sub(r"[^\w\s-]", "", heading).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


def anchors(path: Path) -> set[str]:
    text = FENCE.sub("", COMMENT.sub("", path.read_text()))
    headings = {slug(line.lstrip("#")) for line in text.splitlines() if re.match(r"#+ ", line)}
    return headings | {match.group(1) for match in AUTODOC.finditer(text)}


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_links_lead_somewhere(name):
    path = TEXTS[name]
    text = prose(path)
    wrong = []
    for target in LINK.findall(text) + IMAGE.findall(text):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        found = path if not file else (path.parent / file)
        if path.suffix == ".mdx" and file and not found.suffix:
            found = found.with_suffix(".mdx")
        if not found.exists() or (anchor and anchor not in anchors(found)):
            wrong.append(target)
    assert not wrong


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_files_that_are_named_exist(name):
    """Code spans that are paths of the repository."""
    spans = CODE_SPAN.findall(prose(TEXTS[name]))
    paths = [span for span in spans if re.fullmatch(r"(?:bitsandbytes|csrc|tests|benchmarking|examples|docs)/[\w./-]+", span)]
    assert [span for span in paths if not (ROOT / span).exists() and not span.startswith("examples/output")] == []


# ------------------------------------------------------------------------------------------------------------------------ API reference


def resolve(name: str):
    """The object of a dotted name, found as hf-doc-builder finds it: by attributes of the package alone."""
    return functools.reduce(getattr, name.split(".")[1:], bnb)


def documented() -> dict[str, str]:
    """Every name that has an ``[[autodoc]]`` entry, members included, and its page."""
    found = {}
    for page, path in PAGES.items():
        for name, lines in AUTODOC.findall(COMMENT.sub("", path.read_text())):
            members = [member for member in re.findall(r"- *(\S+)", lines) if member != "__init__"]
            for entry in (name, *(f"{name}.{member}" for member in members)):
                assert entry not in found, f"{entry} is on {found.get(entry)} and on {page}"
                found[entry] = page
    return found


def test_every_autodoc_name_exists_and_has_a_docstring():
    without = [name for name in documented() if not inspect.getdoc(resolve(name))]
    assert without == []


def public_names() -> set[str]:
    """What a program may use: functions and classes of the public modules that are defined in this package."""
    from bitsandbytes.nn import parametrize

    modules = {"functional": bnb.functional, "optim": bnb.optim, "utils": bnb.utils, "nn.parametrize": parametrize}
    names = {f"nn.{name}" for name in bnb.nn.__all__} | {"matmul", "matmul_4bit", "MatmulLtState"}
    for prefix, module in modules.items():
        for name, found in vars(module).items():
            if name.startswith("_") or not callable(found) or not getattr(found, "__module__", "").startswith("bitsandbytes"):
                continue
            if prefix == "nn.parametrize" and found.__module__ != module.__name__:
                continue
            names.add(f"{prefix}.{name}")
    return {f"bitsandbytes.{name}" for name in names}


# Helpers that the public modules import for themselves, or that programs find there under another module's name.
NOT_FOR_USERS = {
    "functional.float_absmax", "functional.invoke_on_lists", "functional.lib", "functional.pack_dict_to_tensor", "functional.unpack_tensor_to_dict",
}  # fmt: skip


def test_every_public_name_is_in_the_reference():
    assert public_names() - {f"bitsandbytes.{name}" for name in NOT_FOR_USERS} - documented().keys() == set()


def test_every_public_constant_is_in_the_reference():
    """Data that programs may read; functions and classes have entries of their own."""
    spans = {span for path in PAGES.values() for span in CODE_SPAN.findall(path.read_text())}
    constants = [f"{module.__name__}.{name}" for module in (bnb, bnb.functional, bnb.utils) for name in vars(module) if _is_constant(module, name)]
    assert [name for name in constants if name not in spans and name not in INTERNAL_CONSTANTS] == []


INTERNAL_CONSTANTS = {
    f"bitsandbytes.functional.{name}" for name in ("BLOCKSIZES_4BIT", "DEFAULT_BLOCKSIZE_4BIT", "FLOATS", "NESTED_BLOCKSIZE", "QUANT_TYPES_4BIT")
}


def _is_constant(module, name: str) -> bool:
    found = getattr(module, name)
    return not name.startswith("_") and not callable(found) and not inspect.ismodule(found)


def test_every_operator_is_in_the_reference_with_its_schema():
    page = SOURCE / "reference" / "operators.mdx"
    assert set(_ops._CHECKS) - set(CODE_SPAN.findall(page.read_text())) == set()
    written = {code.strip() for language, _, code, _ in blocks(page) if language == "text"}
    operators = [getattr(torch.ops.bitsandbytes, name).default for name in _ops._CHECKS if "." not in name]
    assert written == {str(operator._schema).removeprefix("bitsandbytes::") for operator in operators}


# ----------------------------------------------------------------------------------------------------------------------- error messages


def messages() -> list[str]:
    """Every text of the package's source; what is filled in at run time stands as an ellipsis."""
    found = []
    for path in [*(ROOT / "bitsandbytes").rglob("*.py"), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values))
    return [re.sub(r"%[sd]", "...", re.sub(r"\{\w*\}", "...", text)) for text in found]


def test_quoted_messages_are_those_of_the_code():
    quoted = re.findall(r"^### `(.+)`$", (SOURCE / "troubleshooting.mdx").read_text(), re.MULTILINE)
    assert len(quoted) > 15
    source = messages()
    wrong = []
    for message in quoted:
        wanted = ".*".join(re.escape(part) for part in message.split("..."))
        if not any(re.search(wanted, text, re.DOTALL) for text in source):
            wrong.append(message)
    assert wrong == []


# ------------------------------------------------------------------------------------------------------------------------------- HTML


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "docs" / "build.py")
    builder = sys.modules["build_docs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    folder = tmp_path_factory.mktemp("site")
    return folder, builder.build(folder)


def test_the_html_is_whole(site):
    folder, written = site
    assert {path.relative_to(folder).with_suffix("").as_posix() for path in written} == set(PAGES)
    for path in written:
        text = path.read_text()
        for leftover in ("[[autodoc]]", "FENCE", "INSERTED", "<!-- setup", "```"):
            assert leftover not in re.sub(r"<(pre|code).*?</\1>", "", text, flags=re.DOTALL), f"{leftover} in {path.name}"
        for target in re.findall(r'(?:href|src)="([^"#]+)', text):
            assert target.startswith("http") or (path.parent / target).exists(), f"{target} in {path.name}"


def test_anchors_of_the_html_are_those_that_links_use(site):
    folder, _ = site
    for name, path in PAGES.items():
        identifiers = set(re.findall(r' id="([^"]+)"', (folder / f"{name}.html").read_text()))
        assert anchors(path) - identifiers == set(), name


# ------------------------------------------------------------------------------------------------------------------------------ figures


def test_times_in_the_readme_are_those_of_the_recorded_run():
    run = json.loads((ROOT / "benchmarking" / "results" / "cpu-zen5-2-cores.json").read_text())
    recorded = [1000 * case[key] for case in run["cases"] for key in ("seconds", "published_seconds") if case.get(key)]
    claimed = re.findall(r"\| ([\d.]+) ms", (ROOT / "README.md").read_text())
    assert len(claimed) > 30
    assert [time for time in claimed if not any(_rounds_to(measured, time) for measured in recorded)] == []


def test_models_in_the_readme_are_those_of_the_recorded_run():
    """Size, perplexity and speed of each format."""
    results = json.loads((ROOT / "benchmarking" / "results" / "inference-cpu-zen5-2-cores.json").read_text())["results"]
    recorded = {(r["bytes"] / 1e6, r["perplexity"], r["tokens_per_second"]) for r in results.values()}
    claimed = re.findall(r"\| (\d+) MB \| ([\d.]+) \| ([\d.]+) \|", (ROOT / "README.md").read_text())
    assert len(claimed) >= 8
    for row in claimed:
        assert any(all(f"{value:.{len(text.partition('.')[2])}f}" == text for value, text in zip(run, row)) for run in recorded), row


def test_losses_in_the_readme_are_those_of_the_recorded_run():
    runs = json.loads((ROOT / "benchmarking" / "results" / "training-curves.json").read_text())["runs"]
    readme = (ROOT / "README.md").read_text()
    for name in ("torch.optim.AdamW", "bitsandbytes AdamW8bit"):
        last, size = runs[name]["losses"][-10:], runs[name]["state_bytes"]
        assert f"{sum(last) / len(last):.4f}" in readme and f" {size / 1e6:.0f}" in readme, name


def _rounds_to(value: float, text: str) -> bool:
    digits = len(text.replace(".", "").lstrip("0"))
    return float(f"{value:.{digits}g}") == float(text)


def test_figures_are_those_of_the_recorded_numbers():
    """The numbers under ``benchmarking/results`` from which the figures are drawn are computed again."""
    spec = importlib.util.spec_from_file_location("figures", ROOT / "benchmarking" / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    recorded = figures.recorded()
    assert figures.quantisation_errors().keys() == recorded.keys()
    for series, errors in figures.quantisation_errors().items():
        assert errors == pytest.approx(recorded[series], rel=1e-4), series


if __name__ == "__main__":
    run(TEXTS[sys.argv[1]])
