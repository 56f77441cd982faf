"""The documentation: its code prints what the pages show; its diffs apply and work; flags, links and names exist; the
two languages agree."""

import ast
import contextlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import benchmark
import pytest

import plot_loss
from dpo_train import Flags

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
WITH_PYTHON = [page for page in PAGES if page.name.split(".")[0] in ("guide", "theory")]
IN_BOTH_LANGUAGES = [
    (ROOT / "README.md" if page.name == "README.zh.md" else DOCS / page.name.replace(".zh", ""), page)
    for page in PAGES if ".zh." in page.name
]  # fmt: skip
WITH_FORMULA_TABLE = {"theory"}
OTHER_TOOLS = {"no-sync",   # flags of accelerate launch, uv, hf upload, lm_eval
    "multi_gpu", "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port",
    "with", "from", "exclude", "model_args", "tasks",
}  # fmt: skip
FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def named(value) -> str:
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) else "-".join(page.stem for page in value)


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


@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
def test_python_blocks_print_what_the_page_shows(page):
    found = blocks(read(page))
    namespace: dict = {}
    for i, (language, code) in enumerate(found):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{page.name}, block {i}", "exec"), namespace)
        if i + 1 < len(found) and found[i + 1][0] == "text":
            assert printed.getvalue().rstrip() == found[i + 1][1].rstrip()


def copy_with(folder: Path, diffs: list[str]) -> Path:
    """The program in a folder of its own, with these diffs applied."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    shutil.copytree(DOCS / "sample", folder / "docs" / "sample")
    for diff in diffs:
        subprocess.run(["git", "apply", "-"], cwd=folder, input=diff, text=True, check=True)
    return folder


def test_the_diffs_apply_and_work(tmp_path):
    """A new loss, a new metric and rows of another form, all in one run; LoRA where peft is installed."""
    diffs = [content for language, content in blocks(read(DOCS / "guide.md")) if language == "diff"]
    with_peft = [diff for diff in diffs if "peft" in diff]
    (tmp_path / "lora").mkdir()
    copy_with(tmp_path / "lora", with_peft)
    folder = tmp_path / "others"
    folder.mkdir()
    copy_with(folder, [diff for diff in diffs if diff not in with_peft])
    rows = [
        {"instruction": f"{n} + 1?", "input": "", "chosen": f"{n + 1}。", "rejected": "不知道。"} for n in range(40)
    ]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    few = ["--demo", "--max_steps", "2", "--max_new_tokens", "0", "--save_steps", "0", "--output_dir", "run"]

    def trains(folder, *flags):
        words = [sys.executable, "dpo_train.py", *few, *flags]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    trains(folder, "--dataset_name", "alpaca.json", "--loss_type", "sppo")
    log = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert log[0]["loss_at_start"] == pytest.approx(2 * (0.5 / 0.1) ** 2)
    assert all("drift" in line for line in log if "loss" in line)
    assert all("eval_drift_se" in line for line in log if "eval_loss" in line)
    assert "| drift |" in (folder / "run" / "report.md").read_text()
    if importlib.util.find_spec("peft"):
        trains(tmp_path / "lora", "--save_steps", "1")
        assert (tmp_path / "lora" / "run" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("pages", IN_BOTH_LANGUAGES, ids=named)
def test_the_two_languages_have_the_same_parts(pages):
    def shape(text):
        lines = prose(text).splitlines()
        tables = [line for line in FENCE.sub("", text).splitlines() if line.startswith("|")]
        return {
            "blocks": [(language, re.sub(r" *# .*", "", content)) for language, content in blocks(text)],
            "headings": [re.match("#+", line)[0] for line in lines if line.startswith("#")],
            "figures": [re.sub(r"\.zh\b", "", name) for name in re.findall(r"!\[[^]]*\]\([^)]*?([^/)]+)\)", text)],
            "decimals in tables": [re.findall(r"\d+\.\d+", line) for line in tables],
            "list items": sum(line.startswith("- ") for line in lines),
            "paragraph headings": sum(line.startswith("**") for line in lines),
            "threads and papers": set(re.findall(r"\]\((https?://[^)]+)\)", text)),
            "formulas": formulas(text),
            "inline formulas": set(inline_formulas(text)),
        }

    english, chinese = (shape(read(page)) for page in pages)
    assert english == chinese


@pytest.mark.parametrize("page", [page for page in PAGES if ".zh" in page.name], ids=named)
def test_chinese_paragraphs_are_one_line_each(page):
    """A line break between Chinese characters shows as a space."""
    text = re.sub(r"\$\$.+?\$\$", "", FENCE.sub("\n", read(page)), flags=re.DOTALL)
    assert not re.findall(r"^(?![#|>\s-]).+\n(?![#|>\n]|- ).+|^- .+\n +\S.+", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_flags_exist(page, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    for script in (plot_loss, benchmark):
        with contextlib.suppress(SystemExit):
            script.main()
    flags = {field.name for field in fields(Flags)} | set(re.findall(r"--(\w+)", capsys.readouterr().out)) | OTHER_TOOLS
    mentioned = set(re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", read(page)))
    assert not mentioned - flags


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_and_images_exist(page):
    text = prose(read(page))
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for target in targets:
        file, _, anchor = target.partition("#")
        if not re.match(r"[a-z]+:", target):
            linked = page.parent / file if file else page
            assert linked.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.+)$", prose(read(linked)), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings], target


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_functions_of_the_formula_table_exist(page):
    """Rows that link to a source file, such as | term | `name` in [file.py](../file.py) |"""
    cells = [cell for line in read(page).splitlines() if line.startswith("|") for cell in line.split("|")[1:-1]]
    for cell in cells:
        files = re.findall(r"\]\((?:\.\./)?(\w+\.py)\)", cell)
        names = {getattr(node, "name", None) or getattr(getattr(node, "target", None), "id", None)
                 for file in files for node in ast.parse(read(ROOT / file)).body}  # fmt: skip
        assert not files or set(re.findall(r"`([A-Za-z_]+)`", cell)) <= names
    if page.name.split(".")[0] in WITH_FORMULA_TABLE:
        assert any(".py)" in cell for cell in cells)


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
