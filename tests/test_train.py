"""dpo_train.py as a user meets it: its command line, what it prints, the files that a run writes.

Most runs are of a tiny model and in this process (`run`), some in processes of their own (`start`). Nothing of
dpo_train.py is replaced: what must go wrong goes wrong by a row, a weight, a flag, a signal or a limit of the system.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import accelerate
import huggingface_hub
import matplotlib.figure
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import make_rows, tiny_qwen2, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import dpo_train
from dataset import epoch_order, load_rows, prepare

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "train_batch_size": 8, "learning_rate": 2e-3, "max_length": 128, "mixed_precision": "no", "logging_steps": 1,
    "max_train_samples": 54, "max_eval_samples": 14, "max_new_tokens": 0, "num_train_epochs": 2, "eval_steps": 0,
    "save_steps": 0,
}  # fmt: skip
RESUME = {"resume_from_checkpoint": "latest"}
SIDES = "chosen_ids", "rejected_ids"
NOT_METRICS = {"step", "epoch", "time", "pairs_per_second", "tokens_per_second", "skipped_steps", "grad_norm",
               "learning_rate"}  # fmt: skip


def arguments(model_dir, data_file, output_dir, **changes):
    settings = {"model_name_or_path": model_dir, "dataset_name": data_file, "output_dir": output_dir}
    settings |= SETTINGS | changes
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]


class Screen(io.StringIO):
    """Takes what is printed. When `cue` is printed, it does `act`, once."""

    def __init__(self, cue=None, act=None, terminal=False):
        super().__init__()
        self.cue, self.act, self.terminal = cue, act, terminal

    def isatty(self):
        return self.terminal

    def write(self, text):
        if self.cue and self.cue in text:
            self.cue = None
            self.act()
        return super().write(text)


def type_here(words, **screen):
    """The command line in this process: as `start`, but without the seconds that a process takes to start."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    out, err = Screen(**screen), Screen(**screen)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = dpo_train.main([str(word) for word in words])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def run(model_dir, data_file, output_dir, **changes):
    """One run in this process; what it has logged."""
    done = type_here(arguments(model_dir, data_file, output_dir, **changes))
    assert done.returncode == 0, done.stderr
    return read_metrics(output_dir)


def in_one_line(done):
    """The one line with which a run ends that must not be."""
    assert done.returncode == 1 and done.stderr.startswith("dpo_train.py: ") and done.stderr.count("\n") == 1, done
    return done.stderr


def refused(model_dir, data_file, output_dir, **changes):
    return in_one_line(type_here(arguments(model_dir, data_file, output_dir, **changes)))


def start(*words, launcher=(), **environment):
    """A process of its own, as a user would start it."""
    command = [sys.executable, *launcher, str(ROOT / "dpo_train.py"), *map(str, words)]
    return subprocess.Popen(
        command, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def finish(process):
    out, err = process.communicate(timeout=170)
    return types.SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err)


def read_metrics(folder):
    """What was logged. Lines that are torn, or beyond a step that was gone back to, don't count."""
    records = []
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if record.get("event") == "resumed":
                records = [old for old in records if old["step"] <= record["step"]]
            records.append(record)
    return records


def training(metrics):
    return [line for line in metrics if "loss" in line]


def evaluations(metrics):
    return [line for line in metrics if line.get("event") == "eval"]


def losses(metrics):
    return [line["loss"] for line in training(metrics)]


def comparable(metrics):
    """All that a repeated run must log alike."""
    timing = "time", "pairs_per_second", "tokens_per_second"
    lines = [line for line in metrics if line.get("event") not in ("start", "resumed")]
    return [{name: value for name, value in line.items() if name not in timing} for line in lines]


def same_weights(one, other):
    ours, theirs = (load_file(Path(folder) / "model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("*checkpoint*"))


def copy_checkpoint(whole, step, folder):
    shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    """Drawing takes longer than a tiny run. test_plot_loss.py and test_readme.py look at pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "savefig", lambda self, path, **_: Path(path).write_bytes(b"picture"))
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory, model_dir, data_file):
    """The run that others are compared with: 14 steps, a checkpoint every fourth; its folder and what it logged."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    settings = {"save_steps": 4, "save_total_limit": 9, "eval_steps": 6, "max_new_tokens": 6}
    return folder, run(model_dir, data_file, folder, **settings)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory, tokenizer):
    return save(tiny_qwen2(len(tokenizer), seed=1), tokenizer, tmp_path_factory.mktemp("other"))


# The right losses -----------------------------------------------------------------------------------------------------


def test_a_run_starts_at_ln_2_and_learns(plain):
    _, metrics = plain
    first, *_, last = metrics
    lines, (before, *_, after) = training(metrics), evaluations(metrics)
    assert first["event"] == "start" and first["flags"]["beta"] == 0.1 and last["event"] == "end"
    assert before["eval_loss"] == pytest.approx(math.log(2)) and before["eval_rewards/accuracies"] == 0.5
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and lines[-1]["loss"] < 0.5
    assert after["eval_loss"] != before["eval_loss"]
    # Warm-up of ceil(0.1 * 14) = 2 steps: the rate is 0, 1/2 and 1 of its peak, then falls as a cosine.
    rates = [0.0, 0.5] + [0.5 * (1 + math.cos(math.pi * k / 12)) for k in range(12)]
    assert [line["learning_rate"] for line in lines] == pytest.approx([2e-3 * rate for rate in rates])


def test_every_metric_is_in_log_evaluations_and_report(plain):
    folder, metrics = plain
    names = training(metrics)[0].keys() - NOT_METRICS
    assert {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} < names
    assert [(line["step"], "answers" in line) for line in evaluations(metrics)] == [
        (0, True), (6, False), (12, False), (14, True)
    ]  # fmt: skip
    both = names | {f"{name}_se" for name in names} | {"pairs", "prompts"}
    for line in evaluations(metrics):
        assert {name for name in line if name.startswith("eval_")} == {f"eval_{name}" for name in both}
        assert set(line["domains"]) == {"chat", "math"} and set(line["lengths"]) == {"chosen longer", "chosen shorter"}
        for group in (line["domains"], line["lengths"]):
            assert all(part.keys() == both for part in group.values())
            assert sum(part["pairs"] for part in group.values()) == line["eval_pairs"] > 9
    table = (folder / "report.md").read_text().split("| before | after |")[1].split("\n\n")[0]
    assert len(table.splitlines()) == 2 + len(names)


def logp(model, pair, side):
    """log pi(y|x) the plain way: a row of its own, full logits."""
    ids, n = torch.tensor([[*pair["prompt_ids"], *pair[side]]]), len(pair["prompt_ids"])
    return model(input_ids=ids).logits[0, n - 1 : -1].log_softmax(-1).gather(1, ids[0, n:, None]).double().sum()


def test_held_out_figures_and_answers_are_those_of_separate_rows(plain, model_dir, data_file, tokenizer):
    """The last evaluation, computed once more from the folder's model, which loads and knows where to stop."""
    folder, metrics = plain
    last = evaluations(metrics)[-1]
    held_out = prepare(load_rows(str(data_file)), AutoTokenizer.from_pretrained(folder), 128, 54, 14).held_out
    pairs = held_out.read(range(len(held_out)))
    policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype="float32") for path in (folder, model_dir))
    with torch.no_grad():
        ours, theirs = (
            np.array([[logp(model, pair, side).item() for side in SIDES] for pair in pairs])
            for model in (policy, reference)
        )
    lengths = np.array([[len(pair[side]) for side in SIDES] for pair in pairs])
    margins = 0.1 * ((ours - theirs) @ [1, -1])
    right, longer, chat = margins > 0, lengths[:, 0] > lengths[:, 1], held_out.domains == "chat"
    errors = [(right[held_out.keys == key] - right.mean()).sum() for key in set(held_out.keys)]  # of each prompt
    assert 0 < longer.sum() < len(right) and 0 < right.mean() < 1
    expected = {
        "loss": np.log1p(np.exp(-margins)).mean(), "rewards/margins": margins.mean(), "prompts": len(errors),
        "rewards/accuracies": right.mean(), "rewards/accuracies_se": np.linalg.norm(errors) / len(right),
        "logps/chosen": ours[:, 0].mean(), "nll_loss": (-ours / lengths)[:, 0].mean(),
    }  # fmt: skip
    for name, value in expected.items():
        assert last[f"eval_{name}"] == pytest.approx(value, abs=2e-4, rel=1e-4), name
    assert last["lengths"]["chosen longer"]["rewards/accuracies"] == pytest.approx(right[longer].mean())
    assert last["domains"]["chat"]["rewards/margins"] == pytest.approx(margins[chat].mean(), abs=2e-4)

    saved, end = GenerationConfig.from_pretrained(folder), tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert saved.eos_token_id == [end, tokenizer.eos_token_id]
    assert saved.repetition_penalty == 3.0  # as the start's config asked; greedy all the same
    by_prompt = {tokenizer.decode(pair["prompt_ids"], skip_special_tokens=True).strip(): pair for pair in pairs}
    for answer in last["answers"]:
        ids, n = [*by_prompt[answer["prompt"]]["prompt_ids"]], answer["n_tokens"]
        for _ in range(n):
            ids.append(policy(torch.tensor([ids])).logits[0, -1].argmax().item())
        assert answer["answer"] == tokenizer.decode(ids[-n:], skip_special_tokens=True)
        assert n == 6 or ids[-1] in saved.eos_token_id and answer["stopped"]


def assert_same_evaluation(metrics, expected, tolerance=1e-4):
    for field in ("eval_loss", "eval_logps/chosen", "eval_rewards/margins_se", "eval_rewards/accuracies"):
        ours, theirs = (evaluations(lines)[-1][field] for lines in (metrics, expected))
        assert ours == pytest.approx(theirs, abs=tolerance), field


@contextlib.contextmanager
def watch(kind, see):
    """Calls `see` with the output of each module of this kind."""
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: see(output) if isinstance(module, kind) else None
    )
    try:
        yield
    finally:
        hook.remove()


def test_one_trajectory_for_every_way_of_computing_it(plain, model_dir, data_file, tmp_path, monkeypatch):
    """Also whatever `accelerate config` left in the environment. Checkpointing does the forward pass twice."""
    left = {"GRADIENT_ACCUMULATION_STEPS": "8", "DYNAMO_BACKEND": "INDUCTOR", "MIXED_PRECISION": "bf16"}
    for variable, text in left.items():
        monkeypatch.setenv(f"ACCELERATE_{variable}", text)
    ways, counts = ({"seed": 42}, {"micro_batch_tokens": 256}, {"gradient_checkpointing": True}), []
    for way in ways:
        counts.append(Counter())
        with watch(torch.nn.Linear, lambda output: counts[-1].update([output.dtype])):
            metrics = run(model_dir, data_file, tmp_path / "_".join(way), **way)
        assert losses(metrics) == pytest.approx(losses(plain[1]), abs=1e-5)
        assert_same_evaluation(metrics, plain[1])
        assert set(counts[-1]) == {torch.float32}
    assert counts[2].total() > 1.2 * counts[0].total()


def test_bf16_computes_in_bf16_over_float32_weights_and_decay_spares_vectors(model_dir, data_file, tmp_path):
    """Rate times decay is 0.1: matrices shrink by a tenth a step, norms and biases move by 1e-6, as Adam does."""
    settings = {"mixed_precision": "bf16", "lr_scheduler_type": "constant", "learning_rate": 1e-6, "weight_decay": 1e5}
    counts = []
    for n_steps in (1, 4):
        counts.append(Counter())
        with watch(torch.nn.Linear, lambda output: counts[-1].update([output.dtype])):
            metrics = run(model_dir, data_file, tmp_path / str(n_steps), max_steps=n_steps, **settings)
    assert losses(metrics)[0] == pytest.approx(math.log(2), abs=1e-6)
    fewer, more = counts  # only the check of the model before the first step is in float32, too
    assert set(more) == {torch.bfloat16, torch.float32} and fewer[torch.float32] == more[torch.float32]
    assert fewer[torch.bfloat16] < more[torch.bfloat16]
    begin, end = (load_file(folder / "model.safetensors") for folder in (model_dir, tmp_path / "4"))
    for name, weight in end.items():
        expected = begin[name].float() * (0.9**4 if weight.dim() > 1 else 1)
        assert weight.dtype == torch.float32 and not torch.equal(weight, begin[name].float()), name
        torch.testing.assert_close(weight, expected, atol=5e-6, rtol=0)


def test_a_first_step_that_is_not_ln_2_is_explained(model_dir, data_file, tmp_path):
    """The reference has the policy's weights, and computes something else with them."""
    shutil.copytree(model_dir, tmp_path / "other")
    edit_json(tmp_path / "other" / "config.json", num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    message = refused(model_dir, data_file, tmp_path / "run", ref_model_name_or_path=tmp_path / "other")
    assert re.search(r"the loss at the first step is \S+ and not 0.6931, though policy and reference", message)
    assert "same precision and without dropout" in message


def test_a_closed_terminal_and_a_contradictory_generation_config_cost_no_model(model_dir, data_file, tmp_path):
    """As many published models have it: how to sample is said, and not to."""
    shutil.copytree(model_dir, tmp_path / "start")
    edit_json(tmp_path / "start" / "generation_config.json", do_sample=False, temperature=0.6)

    def close():
        raise OSError(5, "Input/output error")

    words = arguments(tmp_path / "start", data_file, tmp_path / "run", save_steps=4, max_steps=6)
    done = type_here(words, cue="step 2/", act=close)
    assert done.returncode == 0, done.stderr
    assert checkpoints(tmp_path / "run") == ["checkpoint-4", "checkpoint-6"]
    assert GenerationConfig.from_pretrained(tmp_path / "run").temperature == 0.6


def test_eval_only_compares_two_models(plain, model_dir, data_file, tmp_path, monkeypatch):
    """What a run's first and last evaluation say, from its start and its model alone; twice, in new folders."""
    folder, metrics = plain
    monkeypatch.chdir(tmp_path)
    for name in ("eval", "eval-2"):
        words = arguments(folder, data_file, None, ref_model_name_or_path=model_dir, eval_only=True, max_new_tokens=6)
        done = type_here(words)
        assert done.returncode == 0, done.stderr
        output = tmp_path / "output" / name
        assert sorted(path.name for path in output.iterdir()) == ["metrics.jsonl", "report.md"]
        found, expected = evaluations(read_metrics(output)), evaluations(metrics)[:: len(evaluations(metrics)) - 1]
        assert [line["answers"] for line in found] == [line["answers"] for line in expected]
        for ours, theirs in zip(found, expected, strict=True):
            for field in theirs.keys() - {"step", "epoch", "time", "event", "answers", "domains", "lengths"}:
                assert ours[field] == pytest.approx(theirs[field], abs=1e-5), field
    assert f"{model_dir.name} (before) and {folder.name} (after)" in (output / "report.md").read_text()


# Resuming and stopping ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rare(tmp_path_factory, model_dir, data_file):
    """A run with the reference's table, log windows of 3 steps and a checkpoint every fourth step."""
    folder, settings = tmp_path_factory.mktemp("rare") / "run", {"logging_steps": 3, "save_steps": 4, "eval_steps": 6}
    settings |= {"precompute_ref_log_probs": True, "save_total_limit": 9}
    done = type_here(arguments(model_dir, data_file, folder, **settings), terminal=True)
    assert done.returncode == 0 and "Reference:" in done.stderr
    return folder, settings


def test_resume_equals_uninterrupted(rare, model_dir, data_file, tmp_path):
    """Bit for bit, from the middle of an epoch and of a log window, after a log that a crash has torn."""
    whole, settings = rare
    folder = copy_checkpoint(whole, 4, tmp_path / "run")
    shutil.copy(whole / "reference.pt", folder)
    torn = (whole / "metrics.jsonl").read_text().partition('{"step": 9')[0] + '{"step": 9, "lo'
    (folder / "metrics.jsonl").write_text(torn)
    written = (folder / "reference.pt").stat().st_mtime_ns
    done = type_here(arguments(model_dir, data_file, folder, **settings, **RESUME), terminal=True)
    assert done.returncode == 0, done.stderr
    assert "Reference:" not in done.stderr and (folder / "reference.pt").stat().st_mtime_ns == written
    text = (folder / "metrics.jsonl").read_text()
    assert text.startswith(torn + '\n{"event": "resumed", "step": 4') and text.count('{"step": 6') == 2
    assert comparable(read_metrics(folder)) == comparable(read_metrics(whole))
    assert same_weights(folder, whole) and same_weights(folder / "checkpoint-14", whole / "checkpoint-14")
    report, expected = ((path / "report.md").read_text().partition("## How it was made")[0] for path in (folder, whole))
    assert report == expected


@pytest.mark.parametrize("changes, n_steps", [({"max_train_samples": 40, "max_steps": 3}, 3), (RESUME, 10)])
def test_a_torn_table_or_one_of_other_pairs_is_made_anew(rare, plain, model_dir, data_file, tmp_path, changes, n_steps):
    """It gives the losses of a run without it; when resuming, too, its values are those of the policy's start."""
    expected, table = losses(plain[1])[4:], (rare[0] / "reference.pt").read_bytes()
    if changes is RESUME:
        copy_checkpoint(plain[0], 4, tmp_path / "run")
        table = table[:-100]
    else:
        expected = losses(run(model_dir, data_file, tmp_path / "by model", **changes))
        (tmp_path / "run").mkdir()
    (tmp_path / "run" / "reference.pt").write_bytes(table)
    found = losses(run(model_dir, data_file, tmp_path / "run", precompute_ref_log_probs=True, **changes))
    assert found == pytest.approx(expected, abs=1e-5) and len(found) == n_steps
    assert (tmp_path / "run" / "reference.pt").read_bytes() != table


def test_stopped_by_each_signal_and_resumed_as_it_says(plain, model_dir, data_file, tmp_path):
    """The end is that of the run that nobody stopped, bit for bit. A second signal would end the process."""

    def ask_to_stop(number):
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) == signal.SIG_DFL

    words = arguments(model_dir, data_file, tmp_path / "run")
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    for number, step in ((signal.SIGTERM, 0), (signal.SIGINT, 6), (signal.SIGHUP, 9)):
        done = type_here(words, cue=f"step {step}", act=partial(ask_to_stop, number))
        assert done.returncode == 1 and "stopping after this step, with a checkpoint (again: exit" in done.stderr
        resume = f"--output_dir {tmp_path / 'run'} --resume_from_checkpoint latest"
        assert re.search(rf"py: stopped after step {step + 1}; go on .* {resume}\n$", done.stderr), done.stderr
        words += resume.split() if step == 0 else []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        done = type_here(words, cue="step 12", act=partial(os.kill, os.getpid(), signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert done.returncode == 0, done.stderr
    assert same_weights(tmp_path / "run", plain[0])
    assert losses(read_metrics(tmp_path / "run")) == losses(plain[1])


def test_killed_at_any_time_nothing_is_lost(model_dir, data_file, tmp_path, pytestconfig):
    """Killed when a checkpoint is half written, and again at random moments; each time, all that is there is whole.
    Its terminal can't write Chinese, which is no matter.

    `uv run pytest tests/test_train.py -k killed --kills 20` is the long form.
    """
    n_kills = pytestconfig.getoption("kills")
    settings = {"save_steps": 1, "max_steps": 20 * n_kills, "num_train_epochs": 99, "max_train_samples": 40}
    whole, folder = tmp_path / "whole", tmp_path / "run"
    expected = run(model_dir, data_file, whole, **settings | {"save_steps": 0})
    words = arguments(model_dir, data_file, folder, **settings)
    for kill in range(n_kills):
        resume = ["--resume_from_checkpoint", "latest"] if kill else []
        process = start(*words, *resume, PYTHONIOENCODING="ascii")
        wait_for(folder / f".checkpoint-{5 + 20 * kill}.tmp", process)
        time.sleep(0.03 * (kill % 5))
        process.kill()
        done = finish(process)
        assert done.returncode == -signal.SIGKILL and "\\u" in done.stdout
        for path in folder.glob("checkpoint-*"):
            assert torch.load(path / "state.pt")["step"] == int(path.name.partition("-")[2])
    metrics = run(model_dir, data_file, folder, **settings, **RESUME)
    assert same_weights(folder, whole) and losses(metrics) == losses(expected)
    assert not list(folder.glob(".*"))


def test_checkpoints_are_limited_and_an_older_or_damaged_one_is_refused(model_dir, data_file, tmp_path):
    folder = tmp_path / "run"
    run(model_dir, data_file, folder, save_steps=3)
    assert checkpoints(folder) == ["checkpoint-12", "checkpoint-14"]
    older = {"resume_from_checkpoint": folder / "checkpoint-12"}
    assert "checkpoint-14 is newer; take `latest`" in refused(model_dir, data_file, folder, **older)
    missing = {"resume_from_checkpoint": folder / "checkpoint-99"}
    assert "is no checkpoint; the newest in" in refused(model_dir, data_file, folder, **missing)
    assert "a run goes on in its own folder" in refused(model_dir, data_file, tmp_path / "branch", **older)
    for path in (folder / "checkpoint-14").iterdir():
        path.write_bytes(path.read_bytes()[:100])  # as no crash leaves them, but a copy may
    assert "checkpoint-14 is no whole checkpoint" in refused(model_dir, data_file, folder, **RESUME)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_batch_size": 4}, "--train_batch_size was 8 and is 4 now"),
        ({"max_train_samples": 20}, "data (the file, the tokenizer, --max_length, --max_*_samples or --domains) was"),
        ({"loss_type": "hinge"}, "--loss_type was sigmoid and is hinge now"),
        ({"model_dir": "other", "ref_model_name_or_path": "same"}, "policy's start (hash) was"),
        ({"ref_model_name_or_path": "other"}, "reference (hash) was"),
        ({"output_dir": "newer"}, "--new_flag was 3 and is None now"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_resuming_another_run_is_refused(plain, model_dir, data_file, other_model, tmp_path, changes, message):
    folder = copy_checkpoint(plain[0], 4, tmp_path / "newer")
    state = torch.load(folder / "checkpoint-4" / "state.pt")
    state["belongs_to"]["--new_flag"] = 3  # of a later version of this program, for example
    torch.save(state, folder / "checkpoint-4" / "state.pt")
    places = {"other": other_model, "same": model_dir, "newer": folder}
    settings = {"model_dir": model_dir, "output_dir": plain[0]} | {k: places.get(v, v) for k, v in changes.items()}
    before = {path: path.stat().st_mtime_ns for path in plain[0].rglob("*")}
    assert message in refused(data_file=data_file, **settings, **RESUME)
    assert "holds another run: give another" in refused(data_file=data_file, **settings)
    assert {path: path.stat().st_mtime_ns for path in plain[0].rglob("*")} == before


def test_only_what_is_listed_may_change_on_resume(plain):
    """So a new flag, which nobody has thought about, must be as it was."""
    belongs_to = torch.load(plain[0] / "checkpoint-4" / "state.pt")["belongs_to"]
    flags = {field.name for field in dataclasses.fields(dpo_train.Flags)}
    assert dpo_train.MAY_CHANGE_ON_RESUME < flags
    must_match = {f"--{name}" for name in flags - dpo_train.MAY_CHANGE_ON_RESUME}
    assert {name for name in belongs_to if name.startswith("--")} == must_match
    assert {"--beta", "--seed", "--learning_rate", "--mixed_precision", "--num_train_epochs"} < must_match


# Several processes ----------------------------------------------------------------------------------------------------

ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_processes", "4"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_one_run_in_one_four_and_two_processes(plain, model_dir, data_file, tmp_path):
    """Losses, learning rates, evaluations and weights are those of one process. Four go on from its checkpoint, some
    steps having fewer prompts, until SIGTERM to their launcher stops them, with a checkpoint; two go on from there.
    """
    folder = copy_checkpoint(plain[0], 4, tmp_path / "run")
    settings = RESUME | {"precompute_ref_log_probs": True}
    words = arguments(model_dir, data_file, folder, eval_steps=1, save_steps=1, **settings)
    process, out = start(*words, launcher=ACCELERATE), ""
    while "step 6/" not in out:
        out += (line := process.stdout.readline())
        assert line, finish(process).stderr
    process.terminate()
    done = finish(process)
    assert "4 process(es)" in out and re.search(r"stopped after step ([7-9]|1\d);", done.stderr), done.stderr
    assert done.returncode != 0

    done = finish(start(*words, launcher=TORCHRUN))
    assert done.returncode == 0 and "2 process(es)" in done.stdout, done.stderr
    metrics, expected = read_metrics(folder), plain[1]
    assert len(losses(metrics)) == 10
    for ours, theirs in zip(training(metrics), training(expected)[4:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["learning_rate"] == pytest.approx(theirs["learning_rate"])
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    for step in (6, 14):
        assert_same_evaluation(*([line for line in lines if line["step"] <= step] for lines in (metrics, expected)))
    ours, theirs = (load_file(place / "model.safetensors") for place in (folder, plain[0]))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-3, rtol=1e-3)


# Memory ---------------------------------------------------------------------------------------------------------------


def memory_for(n_tokens):
    """Holds micro-batches of up to n_tokens[0] tokens."""

    def check(output):
        if output.shape[-2] > n_tokens[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return watch(torch.nn.Embedding, check)


def test_the_micro_batch_that_fits_is_found(plain, model_dir, data_file, tmp_path):
    assert plain[1][0]["micro_batch_tokens"] == 2048
    with memory_for([1500]):
        metrics = run(model_dir, data_file, tmp_path / "run")
    assert metrics[0]["micro_batch_tokens"] == 1492  # 2048, 1843, 1658 were too many
    assert losses(metrics) == pytest.approx(losses(plain[1]), abs=1e-5)


def test_memory_that_is_too_small_and_memory_that_runs_out(model_dir, data_file, tmp_path):
    with memory_for([1000]):
        message = refused(model_dir, data_file, tmp_path / "run", max_length=512)
    assert "1,024 tokens" in message and "--gradient_checkpointing true" in message and "--max_length" in message
    limit = [10_000]
    with memory_for(limit):
        act = {"cue": "step 3/", "act": lambda: limit.__setitem__(0, 100)}
        done = type_here(arguments(model_dir, data_file, tmp_path / "run"), **act)
    assert re.search("CUDA out of memory. .* Lower --micro_batch_tokens", in_one_line(done))


# What is refused, in one line -----------------------------------------------------------------------------------------


def spoil(how, folder, tokenizer):
    """Makes something of a model's folder that can't be trained."""
    config, weights, words = folder / "config.json", folder / "model.safetensors", folder / "tokenizer.json"
    if how == "LoRA adapter":
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5"}')
    elif how == "quantized":
        edit_json(config, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    elif how == "small vocabulary":
        tiny_qwen2(len(tokenizer) - 1).save_pretrained(folder)
    elif how == "permuted vocabulary":
        changed = json.loads(words.read_text())
        ids = changed["model"]["vocab"]
        ids["a"], ids["b"] = ids["b"], ids["a"]
        words.write_text(json.dumps(changed))
    elif how == "a layer is missing":
        kept = {name: weight for name, weight in load_file(weights).items() if ".layers.1." not in name}
        save_file(kept, weights, metadata={"format": "pt"})
    elif how == "git-lfs pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


@pytest.mark.parametrize(
    "how, message",
    [
        ("LoRA adapter", "--model_name_or_path .* is a LoRA adapter"),
        ("quantized", "--model_name_or_path .* is quantized"),
        ("small vocabulary", "its vocabulary is smaller"),
        ("permuted vocabulary", "--ref_model_name_or_path .* 2 tokens have other ids .*'[ab]'"),
        ("a layer is missing", r"--model_name_or_path .* weights are missing .*model.layers.1.input_layernorm.weight"),
        ("git-lfs pointer", "--model_name_or_path .* can't be loaded .*git lfs pull"),
    ],
)
def test_models_that_are_refused(model_dir, data_file, tokenizer, tmp_path, how, message):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    spoil(how, folder, tokenizer)
    flag = "--ref_model_name_or_path" if how == "permuted vocabulary" else "--model_name_or_path"
    words = arguments(model_dir, data_file, tmp_path / "run")
    assert re.search(message, in_one_line(type_here([*words, flag, folder])))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ("--beta 0", "--beta 0.0: must be above 0"),
        ("--train_batch_size many", "invalid int value: 'many'"),
        ("--loss_type hinged", "invalid choice: 'hinged'"),
        ("--label_smoothing 0.1 --loss_type hinge", "--label_smoothing 0.1: for sigmoid and robust only"),
        ("--warmup_steps 5 --max_steps 5", "--warmup_steps 5: must be below --max_steps"),
        ("--micro_batch_tokens 100", "--micro_batch_tokens 100: must be at least 256"),
        ("--no_such_flag", "unrecognized arguments: --no_such_flag"),
        ("--per_device_train_batch_size 4", "--per_device_train_batch_size 4 .*the README has TRL's names"),
        ("--max_length 513", "--max_length 513: .* has only 512 positions"),
        ("--eval_only", "--eval_only True: needs --ref_model_name_or_path"),
        ("--report_to wandb", "--report_to wandb: not installed"),
        ("--output_dir /dev/null/run", "/dev/null/run"),
        ("--model_name_or_path ./nope", "--model_name_or_path ./nope: there is no such folder"),
        (
            "--model_name_or_path nobody/nothing",
            "can't be loaded .* HF_ENDPOINT .*--demo.* HF_HUB_OFFLINE=1",
        ),
        ("--model_name_or_path README.md", "--model_name_or_path README.md can't be loaded"),
        ("--dataset_name nowhere.jsonl", "--dataset_name nowhere.jsonl: there is no such file"),
        ("--resume_from_checkpoint latest", "--resume_from_checkpoint latest: needs --output_dir"),
        ("--resume_from_checkpoint latest --output_dir nowhere", "there is no checkpoint in nowhere"),
        ("--resume_from_checkpoint=", "--resume_from_checkpoint is empty"),
        ("--seed 4294967296", "--seed 4294967296: must be from 0 to below 4294967296"),
        ("--warmup_steps 99", "--warmup_steps 99: the run has only 14 steps"),
        ("--eval_dataset_name none.jsonl", "--eval_dataset_name none.jsonl: there is no such file"),
        ("--eval_dataset_name x.jsonl --max_eval_samples 0", "needs --max_eval_samples above 0"),
        ("ACCELERATE_USE_FSDP=true", "FSDP is not supported, only one process or DDP"),
    ],
    ids=lambda value: value,
)
def test_bad_input_gets_one_line(words, message, model_dir, data_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if words.startswith("ACCELERATE"):
        monkeypatch.setenv(*words.split("="))
        words = ""
    shutil.copy(ROOT / "README.md", tmp_path)
    done = type_here([*arguments(model_dir, data_file, None), *words.split()])
    assert re.search(message, in_one_line(done))
    assert not [path for path in tmp_path.rglob("*") if path.is_dir() and path.name not in ("output", "dpo")]


# Folders, files and trackers ------------------------------------------------------------------------------------------


def test_no_path_of_this_machine_in_what_a_run_writes(plain, model_dir, data_file):
    folder, _ = plain
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert len(paths) > 15
    for path in paths:
        for private in (model_dir, data_file.parent, folder.parent, ROOT, Path.home()):
            assert str(private).encode() not in path.read_bytes(), path


@contextlib.contextmanager
def files_limited_to(n_bytes):
    """No file can grow beyond this size: writing fails in the middle, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_checkpoint_that_cannot_be_written_costs_nothing(plain, model_dir, data_file, tmp_path):
    """There is room for the model, not for the optimizer's state beside it."""
    folder, needed = tmp_path / "run", (plain[0] / "model.safetensors").stat().st_size
    copy_checkpoint(plain[0], 4, folder)
    words = arguments(model_dir, data_file, folder, save_steps=4, **RESUME)
    with files_limited_to(needed + 1000):
        done = type_here(words)
    assert done.returncode == 0, done.stderr
    warned = re.findall(r"warning: no checkpoint at step (\d+): .+; the last one: .*/checkpoint-4\n", done.stdout)
    assert warned == ["8", "12", "14"] and checkpoints(folder) == ["checkpoint-4"]
    assert same_weights(folder, plain[0])


def test_a_disk_that_is_full_from_the_start_ends_in_one_line(model_dir, data_file, tmp_path):
    """Also the log can't be written: that is said once, and the training goes on as long as it can."""
    words = arguments(model_dir, data_file, tmp_path / "run", save_steps=7)
    with files_limited_to(1000):
        done = type_here(words)
        table = type_here([*words, "--precompute_ref_log_probs", "--output_dir", tmp_path / "table"])
    assert "run can't be written" in in_one_line(done)
    assert done.stdout.count("metrics.jsonl can't be written to") == 1 and "no checkpoint at step 7" in done.stdout
    assert "step 14/14" in done.stdout and not checkpoints(tmp_path / "run")
    assert "reference.pt can't be written" in in_one_line(table)
    assert not list((tmp_path / "table").iterdir())


def test_a_tracker_gets_the_numbers_of_the_log(model_dir, data_file, tmp_path, monkeypatch):
    """accelerate's own wandb tracker, with a stand-in for wandb."""
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [accelerate.utils.LoggerType.WANDB])
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    metrics = run(model_dir, data_file, tmp_path / "my-run", max_steps=3, report_to="wandb")
    assert wandb.init.call_args.kwargs["project"] == "mine"
    (config,) = wandb.config.update.call_args.args
    assert config.keys() == {field.name for field in dataclasses.fields(dpo_train.Flags)}
    assert (config["beta"], config["model_name_or_path"]) == (0.1, model_dir.name)
    assert (config["dataset_name"], config["output_dir"]) == (data_file.name, "my-run")
    lines = wandb.init.return_value.log.call_args_list
    logged = {(line.kwargs["step"], name): value for line in lines for name, value in line.args[0].items()}
    wandb.init.return_value.finish.assert_called_once()
    for line in (*training(metrics), evaluations(metrics)[-1]):
        for name in line.keys() - {"step", "event", "domains", "lengths", "time"}:
            assert logged[line["step"], name] == line[name], name


# Steps that can't train, and what a run warns of ----------------------------------------------------------------------


def test_a_step_that_is_not_finite_changes_nothing_and_is_named(model_dir, tokenizer, tmp_path):
    """One token's embedding is infinite: the one pair that contains it gives NaN, in one step of each epoch."""
    rows = make_rows()
    bad = len(rows) // 2
    rows.insert(bad, {"prompt": "天地", "chosen": "山~水", "rejected": "火木"})
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config.from_pretrained(model_dir, tie_word_embeddings=False))
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("~")["input_ids"]] = math.inf
    save(model, tokenizer, tmp_path / "model")
    words = arguments(
        tmp_path / "model", write_jsonl(tmp_path / "pairs.jsonl", rows), tmp_path / "run", max_eval_samples=0,
        save_steps=1, save_total_limit=99, lr_scheduler_type="constant",
    )  # fmt: skip
    done = type_here(words)
    assert done.returncode == 0, done.stderr
    lines = training(read_metrics(tmp_path / "run"))
    skipped = [line["step"] for line in lines if line["skipped_steps"]]
    assert [line["skipped_steps"] for line in lines].count(1) == len(skipped) == 2
    folders = [tmp_path / "model", *(tmp_path / "run" / f"checkpoint-{line['step']}" for line in lines)]
    unchanged = [line["step"] for line in lines if same_weights(folders[line["step"] - 1], folders[line["step"]])]
    assert unchanged == skipped
    assert all((line["loss"] is None) == (line["step"] in skipped) for line in lines)
    assert lines[-1]["loss"] is None or lines[-1]["loss"] < 0.6
    ((step, named),) = re.findall(r"warning: .*step (\d+) is not finite \(rows \[(.*?)\] of the data\)", done.stdout)
    assert int(step) == skipped[0] and str(bad) in named.split(", ") and len(named.split(", ")) == 8


def test_five_steps_in_a_row_that_are_not_finite_end_the_run(model_dir, data_file, tmp_path):
    """A beta that no float32 holds: the loss is ln 2, its gradient infinite, so that all rows of the step are named."""
    done = type_here(arguments(model_dir, data_file, tmp_path / "run", beta=1e39, save_steps=1))
    data = prepare(load_rows(str(data_file)), AutoTokenizer.from_pretrained(model_dir), 128, 54, 14).train
    rows = [sorted(data.rows[epoch_order(data.keys, 42, 0)[8 * k :][:8]].tolist()) for k in (0, 4)]
    assert f"step 5 is not finite (rows {rows[1]} of the data), the fifth in a row" in in_one_line(done)
    assert f"step 1 is not finite (rows {rows[0]} of the data)" in done.stdout
    assert done.stdout.count("not finite") == 1
    AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).save_pretrained(tmp_path / "start")
    assert same_weights(tmp_path / "run" / "checkpoint-4", tmp_path / "start")


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"learning_rate": 1e-9}, "stays where it began, at 0.6931: --learning_rate 1e-09 hardly moves"),
        ({"loss_type": "apo_down", "beta": 2}, "chosen responses have become less likely than under the reference"),
    ],
)
def test_what_goes_wrong_is_told_once(model_dir, data_file, tmp_path, changes, why):
    done = type_here(arguments(model_dir, data_file, tmp_path / "run", max_eval_samples=0, **changes))
    assert len(re.findall(rf"warning: the .*{why}", done.stdout)) == 1
