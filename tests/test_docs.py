"""The documentation: its code prints what the pages show, its flags, links and names exist, its two languages agree."""

import ast
import contextlib
import importlib.util
import io
import re
from dataclasses import fields
from pathlib import Path

import pytest

import plot_loss
from dpo_train import Flags

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
GUIDES = [DOCS / "guide.md", DOCS / "guide.zh.md"]
OTHER_TOOLS = {  # flags of accelerate launch, of uv, of TRL (bf16), and of tests/benchmark.py and study_order.py
    "multi_gpu", "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "with",
    "bf16", "model", "pairs", "steps", "only", "seeds", "bytes_per_token",
}  # fmt: skip
FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return [(language, content) for _, language, content in FENCE.findall(text)]


def prose(text: str) -> str:
    """The text without fenced blocks and without inline code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def formulas(text: str) -> list[str]:
    """The $$ blocks."""
    return re.findall(r"\$\$(.+?)\$\$", prose(text), re.DOTALL)


def inline_formulas(text: str) -> list[str]:
    return re.findall(r"\$([^$\n]+)\$", re.sub(r"\$\$.+?\$\$", "", prose(text), flags=re.DOTALL))


@pytest.mark.parametrize("guide", GUIDES, ids=named)
def test_python_blocks_print_what_the_page_shows(guide):
    found = blocks(read(guide))
    namespace: dict = {}
    for i, (language, code) in enumerate(found):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{guide.name}, block {i}", "exec"), namespace)
        if i + 1 < len(found) and found[i + 1][0] == "text":
            assert printed.getvalue().rstrip() == found[i + 1][1].rstrip()


def test_the_two_guides_have_the_same_parts():
    english, chinese = map(read, GUIDES)

    def without_comments(text):
        return [(language, re.sub(r" *# .*", "", content)) for language, content in blocks(text)]

    def shape(text):
        lines = prose(text).splitlines()
        return {
            "headings": [line.split()[0] for line in lines if line.startswith("#")],
            "figures": [re.sub(r"\.zh\b", "", target) for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)],
            "table rows": sum(line.startswith("|") for line in lines),
            "list items": sum(line.startswith("- ") for line in lines),
            "paragraph headings": sum(line.startswith("**") for line in lines),
            "threads and papers": set(re.findall(r"\]\((https?://[^)]+)\)", text)),
        }

    assert shape(english) == shape(chinese)
    assert without_comments(english) == without_comments(chinese)
    assert formulas(english) == formulas(chinese) and len(formulas(english)) >= 10
    assert set(inline_formulas(english)) == set(inline_formulas(chinese))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_flags_exist(page):
    with contextlib.redirect_stdout(io.StringIO()) as usage, contextlib.suppress(SystemExit):
        plot_loss.main(["--help"])
    flags = {field.name for field in fields(Flags)} | set(re.findall(r"--(\w+)", usage.getvalue())) | OTHER_TOOLS
    mentioned = set(re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", read(page)))
    assert not mentioned - flags


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_and_images_exist(page):
    text = prose(read(page))
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    targets = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("guide", GUIDES, ids=named)
def test_functions_of_the_formula_table_exist(guide):
    rows = [line.split("|")[2] for line in read(guide).splitlines() if line.startswith("|") and "](../" in line]
    named_functions = [
        (ROOT / file, name) for row in rows for file in re.findall(r"\]\(\.\./(\w+\.py)\)", row)
        for name in re.findall(r"`(\w+)`", row)
    ]  # fmt: skip
    assert len(named_functions) >= 10
    for file, name in named_functions:
        definitions = (ast.FunctionDef, ast.ClassDef)
        assert name in {node.name for node in ast.parse(read(file)).body if isinstance(node, definitions)}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_formulas_survive_markdown(page):
    """What breaks on GitHub or elsewhere: escapes that Markdown eats, emphasis, cells cut in two, no space around $."""
    text = read(page)
    for formula in formulas(text) + inline_formulas(text):
        assert not re.search(r"\\[^a-zA-Z]", formula), formula  # \, \{ \\ lose their backslash
        assert not re.search(r"[*<>]|[})]_", formula), formula
        assert formula.count("{") == formula.count("}"), formula
    for line in prose(text).splitlines():
        if line.startswith("|"):
            assert all("|" not in formula for formula in re.findall(r"\$([^$]+)\$", line)), line
        bare = re.sub(r"\$\$.+?\$\$", "", line)
        assert re.fullmatch(r"(?:[^$]|(?<![^\s(*|])\$[^\s$](?:[^$]*[^\s$])?\$(?![^\s.,;:)*|-]))*", bare), line


def test_hand_drawn_figures_are_those_of_the_script(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("make_figures", DOCS / "figures" / "make_figures.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "HERE", tmp_path)
    for name, words in script.IDEA.items():
        script.draw_idea(name, words)
    script.draw_tree()
    script.draw_mask()
    drawings = sorted(tmp_path.glob("*.svg"))
    assert len(drawings) == 4
    for drawing in drawings:
        assert read(drawing) == read(DOCS / "figures" / drawing.name)


def test_the_two_performance_pages_have_the_same_figures():
    def figures(name):
        rows = [line for line in read(DOCS / name).splitlines() if re.match(r"\| .*\d", line)]
        return [re.findall(r"\d+\.\d+", row) for row in rows]

    assert figures("performance.md") == figures("performance.zh.md") and len(figures("performance.md")) > 20
