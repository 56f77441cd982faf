"""The README's commands, typed as printed in a copy of the project, except those that say what they need."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parent.parent
SHORTER = {  # one demo in full is enough; commands with these words get further flags
    "accelerate": "--max_steps 3 --max_eval_samples 20 --max_new_tokens 0",
    "output/faster": "--max_steps 3 --max_eval_samples 20 --max_new_tokens 0",
    "--eval_only": "--max_eval_samples 20 --max_new_tokens 0",
    "latest": "--max_new_tokens 0",
}


def commands(page: Path) -> list[str]:
    """The commands of a page's bash blocks, in order; those of a block or line that needs something are left out."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        if not re.match("# (needs|需要)", lines[0]):
            found += [line.split("  #")[0].strip() for line in lines if not re.search("^#|# (needs|需要)", line)]
    return found


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone") / "project"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    changed = subprocess.run(["git", "ls-files", "-mo", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in changed.stdout.splitlines():  # what is being worked on counts, too
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def test_the_commands_work_as_printed(clone):
    for command in commands(ROOT / "README.md"):
        words = shlex.split(command.removeprefix("pip install uv && ").removeprefix("uv run "))
        if words == ["pytest"]:
            continue  # this is it
        if words[:2] == ["pip", "install"]:  # installed here from the same list
            project = tomllib.loads((clone / "pyproject.toml").read_text())["project"]
            assert sorted(words[2:]) == sorted(project["dependencies"])
            continue
        program = ["-m", "accelerate.commands.launch", *words[2:]] if words[0] == "accelerate" else words
        more = [flag for word in words if "dpo_train.py" in words for flag in SHORTER.get(word, "").split()]
        program = [sys.executable, *program, *more]
        done = subprocess.run(program, cwd=clone, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        if "--output" in words:
            assert (clone / words[words.index("--output") + 1]).stat().st_size > 0

    lines = [json.loads(line) for line in (clone / "output/demo/metrics.jsonl").read_text().split("\n") if line]
    first = next(line for line in lines if "loss" in line)
    before, after = ([line for line in lines if "eval_loss" in line][i] for i in (0, -1))
    assert first["loss"] == pytest.approx(0.6931, abs=5e-4)
    assert before["eval_rewards/accuracies"] == 0.5 and 0.4 < before["eval_logps/accuracies"] < 0.6
    assert after["eval_rewards/accuracies"] >= 0.9 and after["eval_logps/accuracies"] >= 0.9
    for name in ("report.md", "loss.png"):
        assert (clone / "output/demo" / name).stat().st_size > 0


def test_the_trained_demo_model_answers_and_stops_by_itself(clone):
    """As any program would use it."""
    if not (clone / "output/demo/model.safetensors").exists():
        pytest.skip("needs the demo's model: run the whole file")
    chat = transformers.pipeline("text-generation", str(clone / "output/demo"))
    question = [{"role": "user", "content": "阿宁比小军起得早，阿成比阿宁起得早，三人里谁起得最晚？"}]
    answer = chat(question, max_new_tokens=200, do_sample=False)[0]["generated_text"][-1]["content"]
    assert "小军" in answer and len(answer) < 100


def test_both_languages_show_the_same_runnable_commands():
    assert set(commands(ROOT / "docs" / "README.zh.md")) == set(commands(ROOT / "README.md"))
