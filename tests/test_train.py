"""dpo_train.py as a user meets it: its command line, what it prints, the files that a run writes.

Most runs are of a tiny model and in this process (`run`), some in processes of their own (`type_command`). Nothing of
dpo_train.py is replaced: what must go wrong goes wrong by a row, a weight, a flag, a signal or a limit of the system.
"""

import contextlib
import dataclasses
import gc
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import types
import warnings
from collections import Counter
from pathlib import Path

import accelerate
import matplotlib.figure
import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from conftest import emulate_varlen, make_rows, tiny_qwen2, write_jsonl
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import dpo_train
from dataset import epoch_order, load_rows, prepare
from loss import LOSSES

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "train_batch_size": 8, "learning_rate": 2e-3, "max_length": 128, "mixed_precision": "no", "logging_steps": 1,
    "max_train_samples": 54, "max_eval_samples": 8, "max_new_tokens": 0, "num_train_epochs": 2, "eval_steps": 0,
    "save_steps": 0,
}  # fmt: skip
SIDES = "chosen_ids", "rejected_ids"
TIMING = "pairs_per_second", "tokens_per_second"


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
    """The command line in this process: as `type_command`, but without the seconds that a process takes to start."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out, err = Screen(**screen), Screen(**screen)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = dpo_train.main([str(word) for word in words])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def run(model_dir, data_file, output_dir, **changes):
    """One run in this process; its metrics, a dict for each line."""
    done = type_here(arguments(model_dir, data_file, output_dir, **changes))
    assert done.returncode == 0, done.stderr
    return read_metrics(output_dir)


def refused(model_dir, data_file, output_dir, **changes):
    """The one line with which a run ends that must not be."""
    done = type_here(arguments(model_dir, data_file, output_dir, **changes))
    assert done.returncode == 1 and done.stderr.startswith("dpo_train.py: ") and done.stderr.count("\n") == 1
    return done.stderr


def type_command(*words, cwd=ROOT, env=None, timeout=170):
    """Run a command as a user would, in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run(words, cwd=cwd, env=environment, timeout=timeout, capture_output=True, text=True)


def read_metrics(folder):
    path = Path(folder) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def training(metrics):
    return [line for line in metrics if "loss" in line]


def losses(metrics):
    return [line["loss"] for line in training(metrics)]


def comparable(metrics):
    """All that a repeated run must log alike."""
    return [{k: v for k, v in line.items() if k not in TIMING} for line in metrics if "event" not in line]


def same_weights(one, other):
    ours, theirs = (load_file(Path(folder) / "model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("*checkpoint*"))


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny(kind, tokenizer, **changes):
    """A model of any family."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": len(tokenizer), "num_key_value_heads": 2}
    return kind(kind.config_class(**sizes | changes))


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
    """The run that others are compared with: 14 steps, with a checkpoint every fourth; its folder and its metrics."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    return folder, run(model_dir, data_file, folder, save_steps=4, save_total_limit=9)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory, tokenizer):
    return save(tiny_qwen2(len(tokenizer), seed=1), tokenizer, tmp_path_factory.mktemp("other"))


# ---------------------------------------------------------------------------------------------------------------------
# The right losses


def test_a_run_starts_at_ln_2_and_learns(plain):
    _, metrics = plain
    start, before, *lines, after = metrics
    assert start["event"] == "start" and start["flags"]["beta"] == 0.1
    assert before["eval_loss"] == pytest.approx(math.log(2)) and before["eval_rewards/accuracies"] == 0.5
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and lines[-1]["loss"] < 0.5
    assert after["eval_loss"] != before["eval_loss"]
    # Warm-up of ceil(0.1 * 14) = 2 steps: the rate is 0, 1/2 and 1 of its peak, then falls as a cosine.
    rates = [0.0, 0.5] + [0.5 * (1 + math.cos(math.pi * k / 12)) for k in range(12)]
    assert [line["learning_rate"] for line in lines] == pytest.approx([2e-3 * rate for rate in rates])


def test_the_trained_model_loads_and_knows_where_to_stop(plain, model_dir, tokenizer):
    folder, _ = plain
    model, loaded = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert loaded.chat_template == tokenizer.chat_template
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [end, tokenizer.eos_token_id]
    assert not same_weights(folder, model_dir)
    for name in ("report.md", "loss.png"):
        assert (folder / name).stat().st_size > 0


def logp(model, pair, side):
    """log pi(y|x) the plain way: a row of its own, full logits."""
    ids, n = torch.tensor([[*pair["prompt_ids"], *pair[side]]]), len(pair["prompt_ids"])
    return model(input_ids=ids).logits[0, n - 1 : -1].log_softmax(-1).gather(1, ids[0, n:, None]).double().sum()


def naive_run(model_dir, data_file, **changes):
    """The same run, written down once more: no sharing, no cutting, no table, no accelerate, the loss spelt out."""
    flags = types.SimpleNamespace(**dataclasses.asdict(dpo_train.Flags()) | SETTINGS | changes)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = load_rows(str(data_file))
    data = prepare(rows, tokenizer, flags.max_length, flags.max_train_samples, flags.max_eval_samples).train
    pairs = data.read(range(len(data)))
    policy = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(flags.ref_model_name_or_path or model_dir, dtype=torch.float32)
    with torch.no_grad():
        ref = [[logp(reference, pair, side) for side in SIDES] for pair in pairs]
    per_epoch = math.ceil(len(pairs) / flags.train_batch_size)
    n_steps = math.ceil(flags.num_train_epochs * per_epoch)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=flags.learning_rate, weight_decay=flags.weight_decay)
    warmup = flags.warmup_steps or math.ceil(flags.warmup_ratio * n_steps)
    scheduler = transformers.get_scheduler(flags.lr_scheduler_type, optimizer, warmup, n_steps)
    lines = []
    for step in range(n_steps):
        epoch, k = divmod(step, per_epoch)
        order = epoch_order(data.keys, flags.seed, epoch, flags.group_by_prompt)
        total, eps = 0.0, flags.label_smoothing
        batch = order[k * flags.train_batch_size : (k + 1) * flags.train_batch_size]
        for i in batch:
            chosen, rejected = (logp(policy, pairs[i], side) for side in SIDES)
            margin = flags.beta * ((chosen - ref[i][0]) - (rejected - ref[i][1]))
            total -= (1 - eps) * logsigmoid(margin) + eps * logsigmoid(-margin)
            total -= flags.sft_weight * chosen / len(pairs[i]["chosen_ids"])
        loss = total / len(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), flags.max_grad_norm or math.inf)
        lines.append({"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": scheduler.get_last_lr()[0]})
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return lines


OTHER_FLAGS = {
    "beta": 0.3, "label_smoothing": 0.2, "sft_weight": 0.1, "train_batch_size": 10, "learning_rate": 3e-3,
    "lr_scheduler_type": "linear", "warmup_steps": 3, "weight_decay": 2.0, "max_grad_norm": 8.0,
    "num_train_epochs": 1.5, "seed": 7, "group_by_prompt": False, "max_length": 48, "max_train_samples": 50,
    "max_eval_samples": 3,
}  # fmt: skip


UNCLIPPED = {"max_grad_norm": 0, "lr_scheduler_type": "constant", "num_train_epochs": 1}


@pytest.mark.parametrize("changes", [{}, OTHER_FLAGS, UNCLIPPED], ids=["defaults", "every flag another", "unclipped"])
def test_the_run_equals_a_naive_loop(plain, model_dir, data_file, other_model, tmp_path, changes):
    if changes is OTHER_FLAGS:
        changes = changes | {"ref_model_name_or_path": other_model}
    lines = training(run(model_dir, data_file, tmp_path / "run", **changes) if changes else plain[1])
    expected = naive_run(model_dir, data_file, **changes)
    for name, tolerance in (("loss", {"abs": 2e-4}), ("grad_norm", {"rel": 2e-3}), ("learning_rate", {})):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected], **tolerance), name
    assert len(lines) == {1: 7, 2: 14, 1.5: 8}[changes.get("num_train_epochs", 2)]
    if "beta" in changes:  # clipped in some steps only: Adam forgets a factor that is the same in all of them
        assert 2 <= sum(line["grad_norm"] > changes["max_grad_norm"] for line in lines) <= len(lines) - 2


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_tokens": 256},
        {"gradient_checkpointing": True},
        {"attn_implementation": "sdpa", "gradient_checkpointing": True},
        {"precompute_ref_log_probs": True},
        {"max_eval_samples": 8, "eval_steps": 3, "save_steps": 5},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)
def test_one_trajectory_for_every_way_of_computing_it(plain, model_dir, data_file, tmp_path, changes):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics = run(model_dir, data_file, tmp_path / "run", **changes)
    assert losses(metrics) == pytest.approx(losses(plain[1]), abs=1e-5)
    assert not [str(warning.message) for warning in caught if "checkpoint" in str(warning.message)]


def test_one_trajectory_by_our_reading_of_the_varlen_kernel(plain, model_dir, data_file, tmp_path, monkeypatch):
    """The index arithmetic of `tree` on a GPU, with the kernel emulated as we read its documentation."""
    emulate_varlen(monkeypatch)
    assert losses(run(model_dir, data_file, tmp_path / "run")) == pytest.approx(losses(plain[1]), abs=1e-5)


def test_what_accelerate_config_left_in_the_environment_changes_nothing(
    plain, model_dir, data_file, tmp_path, monkeypatch
):
    left = {"GRADIENT_ACCUMULATION_STEPS": "8", "DYNAMO_BACKEND": "INDUCTOR", "MIXED_PRECISION": "bf16"}
    for name, value in left.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert comparable(run(model_dir, data_file, tmp_path / "run")) == comparable(plain[1])


@pytest.mark.parametrize("loss_type, sft_weight", [*((name, 0.0) for name in LOSSES), ("sigmoid", 0.5), ("ipo", 2.0)])
def test_each_loss_starts_where_it_says_is_cut_at_will_and_resumes(
    model_dir, data_file, tmp_path, loss_type, sft_weight
):
    """At the start policy and reference agree: log-ratios are 0, and the SFT term is added to what is known."""
    settings = {"loss_type": loss_type, "sft_weight": sft_weight, "beta": 0.4, "max_steps": 4, "save_steps": 2,
                "max_eval_samples": 0}  # fmt: skip
    whole = run(model_dir, data_file, tmp_path / "whole", save_total_limit=9, **settings)
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    settings |= {"resume_from_checkpoint": "latest", "micro_batch_tokens": 256}
    cut = run(model_dir, data_file, tmp_path / "cut", **settings)
    assert losses(cut) == pytest.approx(losses(whole)[2:], rel=1e-5)
    first = training(whole)[0]
    assert first["loss"] == pytest.approx(whole[0]["loss_at_start"] + sft_weight * first["nll_loss"], rel=1e-5)
    by_hand = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": (1 / (2 * 0.4)) ** 2, "apo_zero": 1.0, "apo_down": 1.0}
    assert whole[0]["loss_at_start"] == pytest.approx(by_hand.get(loss_type, whole[0]["loss_at_start"]))


class Products(TorchDispatchMode):
    """Counts the matrix products and the attention by the dtype that they compute in."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm") or "attention" in name:
            self.counts[(out[0] if isinstance(out, tuple) else out).dtype] += 1
        return out


def test_bf16_computes_in_bf16_over_float32_weights(model_dir, data_file, tmp_path):
    """Only the comparison with the model's own logits, before the first step, is in float32."""
    counts = []
    for n_steps in (2, 5):
        settings = {"mixed_precision": "bf16", "lr_scheduler_type": "constant", "learning_rate": 1e-6}
        with Products() as products:
            metrics = run(model_dir, data_file, tmp_path / str(n_steps), max_steps=n_steps, **settings)
        counts.append(products.counts)
    fewer, more = counts
    assert set(more) == {torch.bfloat16, torch.float32}
    assert fewer[torch.float32] == more[torch.float32] < fewer[torch.bfloat16] < 0.7 * more[torch.bfloat16]
    assert losses(metrics)[0] == pytest.approx(math.log(2), abs=1e-6)
    start, end = (load_file(folder / "model.safetensors") for folder in (model_dir, tmp_path / "5"))
    for name, weight in end.items():  # 5e-6 beside 0.3: bf16 weights would have stayed as they were
        assert weight.dtype == torch.float32 and not torch.equal(weight, start[name].float())
        torch.testing.assert_close(weight, start[name].float(), atol=1e-5, rtol=0)


def test_gradient_checkpointing_computes_again_instead_of_keeping(model_dir, data_file, tmp_path):
    """Of the three passes of a step with its reference, the policy's forward pass is done twice."""
    counts = []
    for checkpointing in (False, True):
        settings = {"gradient_checkpointing": checkpointing, "max_steps": 4}
        with Products() as products:
            run(model_dir, data_file, tmp_path / str(checkpointing), **settings)
        counts.append(products.counts[torch.float32])
    assert counts[1] > 1.15 * counts[0]


def test_logged_values_are_means_over_the_pairs_since_the_last_line(plain, model_dir, data_file, tmp_path):
    sparse = training(run(model_dir, data_file, tmp_path / "run", logging_steps=5))
    assert [line["step"] for line in sparse] == [1, 5, 10, 14]
    each = training(plain[1])[5:10]
    sizes = [8, 6, 8, 8, 8]  # 54 pairs: the tail of each epoch is a step of its own, here the seventh
    for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "nll_loss", "lengths/rejected"):
        mean = np.average([line[name] for line in each], weights=sizes)
        assert sparse[2][name] == pytest.approx(mean, abs=1e-5, rel=1e-5), name
    assert sparse[2]["grad_norm"] == pytest.approx(each[-1]["grad_norm"], rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Held out


def test_held_out_figures_are_those_of_separate_rows(model_dir, tmp_path):
    """The last evaluation line and the report, computed once more from the folder's model."""
    file = write_jsonl(tmp_path / "pairs.jsonl", make_rows(90))
    metrics = run(model_dir, file, tmp_path / "run", max_eval_samples=64, max_steps=6)
    held_out = prepare(load_rows(str(file)), AutoTokenizer.from_pretrained(model_dir), 128, None, 64).held_out
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (tmp_path / "run", model_dir)
    )
    with torch.no_grad():
        found = np.array([
            [logp(model, pair, side).item() for model in (policy, reference) for side in SIDES]
            for pair in held_out.read(range(len(held_out)))
        ])  # fmt: skip
    lengths = np.array([[len(pair[side]) for side in SIDES] for pair in held_out.read(range(len(held_out)))])
    margins = 0.1 * ((found[:, 0] - found[:, 2]) - (found[:, 1] - found[:, 3]))
    right, longer, shorter = margins > 0, lengths[:, 0] > lengths[:, 1], lengths[:, 0] < lengths[:, 1]
    errors = {key: (right[held_out.keys == key] - right.mean()).sum() for key in held_out.keys}
    expected = {
        "loss": np.log1p(np.exp(-margins)).mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": right.mean(),
        "rewards/accuracies_se": np.sqrt(sum(error**2 for error in errors.values())) / len(right),
        "rewards/accuracies_chosen_longer": right[longer].mean(),
        "rewards/accuracies_chosen_shorter": right[shorter].mean(),
        "pairs/chosen_longer": longer.sum(),
        "pairs/chosen_shorter": shorter.sum(),
        "logps/chosen": found[:, 0].mean(),
        "nll_loss": (-found[:, 0] / lengths[:, 0]).mean(),
        "pairs": len(right),
        "prompts": len(errors),
    }
    last = metrics[-1]
    for name, value in expected.items():
        assert last[f"eval_{name}"] == pytest.approx(value, abs=2e-4, rel=1e-4), name
    assert 0 < longer.sum() < shorter.sum() + longer.sum() and 0 < right.mean() < 1 and len(errors) == 9
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"| held out, {len(right)} pairs of 9 prompts | before | after |" in report
    accuracy, error = last["eval_rewards/accuracies"], last["eval_rewards/accuracies_se"]
    assert f"| accuracy by reward | 0.500 ± 0.000 | {accuracy:.3f} ± {error:.3f} |" in report
    assert f"| {longer.sum()} | {longer.sum()} |" in report and f"| {shorter.sum()} | {shorter.sum()} |" in report
    for domain in ("chat", "math"):
        here = held_out.domains == domain
        assert f"| {domain} | {here.sum()} | 0.6931 → {np.log1p(np.exp(-margins[here])).mean():.4f} |" in report


def test_standard_errors_by_hand():
    """Accuracies 1, 0 (one prompt), 1, 1: mean 3/4; residuals by prompt -1/2, 1/4, 1/4; sqrt(3/8) / 4."""
    table = np.zeros((4, len(dpo_train.METRICS)))
    table[:, dpo_train.METRICS.index("rewards/accuracies")] = [1, 0, 1, 1]
    table[:, dpo_train.METRICS.index("lengths/chosen")] = [5, 5, 5, 7]
    table[:, dpo_train.METRICS.index("lengths/rejected")] = [6, 4, 5, 6]
    found = dpo_train.summarize(table, np.array([3, 3, 1, 2]))
    assert found["rewards/accuracies_se"] == pytest.approx(math.sqrt(3 / 8) / 4)
    assert (found["pairs"], found["prompts"]) == (4, 3)
    assert (found["pairs/chosen_longer"], found["rewards/accuracies_chosen_longer"]) == (2, 0.5)
    assert (found["pairs/chosen_shorter"], found["rewards/accuracies_chosen_shorter"]) == (1, 1.0)


def test_nothing_held_out(model_dir, data_file, tmp_path):
    metrics = run(model_dir, data_file, tmp_path / "run", max_eval_samples=0, max_steps=2)
    assert not any("eval_loss" in line for line in metrics)
    assert "No pairs were held out" in (tmp_path / "run" / "report.md").read_text()


def test_eval_only_compares_two_models(plain, model_dir, data_file, tmp_path, monkeypatch):
    """The figures of a run's end, from its model and its start alone; twice, in default folders of their own."""
    folder, metrics = plain
    settings = {"ref_model_name_or_path": model_dir, "eval_only": True, "max_new_tokens": 4}
    monkeypatch.chdir(tmp_path)
    for name in ("eval", "eval-2"):
        assert type_here(arguments(folder, data_file, None, **settings)).returncode == 0
        report = (tmp_path / "output" / name / "report.md").read_text()
        assert f"| loss (nats) | 0.6931 | {metrics[-1]['eval_loss']:.4f} |" in report
        assert f"{model_dir.name} (before) and {folder.name} (after)" in report and "**Before**" in report
        assert [path.name for path in (tmp_path / "output" / name).iterdir()] == ["report.md"]


def test_answers_are_greedy_whatever_the_models_own_config_asks_for(model_dir, data_file, tmp_path):
    """The same weights before and after, but one model's generation config wants penalties and samples."""
    shutil.copytree(model_dir, tmp_path / "penalty")
    asked = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "do_sample": True, "temperature": 5.0}
    edit_json(tmp_path / "penalty" / "generation_config.json", **asked)
    settings = {"ref_model_name_or_path": model_dir, "max_new_tokens": 24}
    run(tmp_path / "penalty", data_file, tmp_path / "run", eval_only=True, **settings)
    report = (tmp_path / "run" / "report.md").read_text()
    sides = "Before", "After"
    before, after = (re.findall(rf"\*\*{name}\*\*\n\n```text\n(.*?)\n```", report, re.S) for name in sides)
    assert len(before) == 2 and before == after and all(before)
    run(tmp_path / "penalty", data_file, tmp_path / "trained", max_steps=1, max_new_tokens=1)
    saved = GenerationConfig.from_pretrained(tmp_path / "trained")  # as it was asked for, for whoever uses the model
    assert (saved.repetition_penalty, saved.no_repeat_ngram_size) == (5.0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming and stopping


@pytest.fixture(scope="module")
def rare_lines(tmp_path_factory, model_dir, data_file):
    """A run with log windows of 3 steps and a checkpoint every fourth step, by whether the reference is precomputed."""
    folder, settings = tmp_path_factory.mktemp("rare"), {"logging_steps": 3, "save_steps": 4, "eval_steps": 6}
    for precompute in (False, True):
        changes = settings | {"precompute_ref_log_probs": precompute, "save_total_limit": 9}
        run(model_dir, data_file, folder / str(precompute), **changes)
    return folder, settings


@pytest.mark.parametrize("precompute", [False, True])
def test_resume_equals_uninterrupted(rare_lines, model_dir, data_file, tmp_path, precompute):
    """Bit for bit, from the middle of an epoch, of a log window and of the reference's first pass."""
    whole, settings = rare_lines[0] / str(precompute), rare_lines[1] | {"precompute_ref_log_probs": precompute}
    folder = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-4", folder / "checkpoint-4")
    shutil.copy(whole / "metrics.jsonl", folder)  # with lines behind step 4, as a crash leaves them
    words = arguments(model_dir, data_file, folder, resume_from_checkpoint="latest", **settings)
    done, resumed = type_here(words, terminal=True), read_metrics(folder)
    assert done.stderr.count("Reference:   0%") == precompute  # for held-out pairs: the others are in the checkpoint
    assert comparable(resumed) == comparable(read_metrics(whole))
    assert [(line["event"], line["step"]) for line in resumed if "event" in line] == [("start", 0), ("resumed", 4)]
    assert same_weights(folder, whole) and same_weights(folder / "checkpoint-14", whole / "checkpoint-14")
    assert (folder / "report.md").read_text() == (whole / "report.md").read_text()


def test_the_reference_is_never_one_that_has_trained(plain, model_dir, data_file, tmp_path):
    """Precomputing that is asked for only when resuming: its values are those of the policy's start."""
    shutil.copytree(plain[0] / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    settings = {"precompute_ref_log_probs": True, "resume_from_checkpoint": "latest"}
    metrics = run(model_dir, data_file, tmp_path / "run", **settings)
    assert losses(metrics) == pytest.approx(losses(plain[1])[4:], abs=1e-5)


@pytest.mark.parametrize(
    "number, precompute, cues, stops",
    [
        (signal.SIGTERM, False, ["step 9/", "step 12/"], ["after step 9", "after step 12"]),
        (signal.SIGINT, True, ["Reference:   0%", "Reference:   0%"], ["while precomputing"] * 2),
    ],
    ids=["SIGTERM in a step", "Ctrl-C while precomputing"],
)
def test_stopped_and_resumed(rare_lines, model_dir, data_file, tmp_path, number, precompute, cues, stops):
    """Stopped twice and resumed as it says: the end is that of the run that nobody stopped, bit for bit."""
    settings = {"precompute_ref_log_probs": precompute, "save_steps": 1000}
    words = arguments(model_dir, data_file, tmp_path / "run", **settings)
    for cue, stop in zip(cues, stops, strict=True):
        press = {"cue": cue, "act": lambda: os.kill(os.getpid(), number), "terminal": precompute}
        done = type_here(words, **press)
        assert done.returncode == 1
        told = re.search(r"py: stopped (.*); go on .* (--output_dir \S+) (--resume\S+ latest)\n$", done.stderr)
        assert told.groups()[:2] == (stop, f"--output_dir {tmp_path / 'run'}"), done.stderr
        assert len(checkpoints(tmp_path / "run")) >= 1
        if "--resume_from_checkpoint" not in words:
            words += told[3].split()
    done = type_here(words)
    assert done.returncode == 0, done.stderr
    assert same_weights(tmp_path / "run", rare_lines[0] / str(precompute))
    assert [line["step"] for line in training(read_metrics(tmp_path / "run"))] == list(range(1, 15))


def test_a_run_that_was_killed_behind_its_last_step_can_be_finished(plain, model_dir, data_file, tmp_path):
    shutil.copytree(plain[0] / "checkpoint-14", tmp_path / "run" / "checkpoint-14")
    metrics = run(model_dir, data_file, tmp_path / "run", resume_from_checkpoint="latest")
    assert same_weights(tmp_path / "run", plain[0])
    assert comparable(metrics)[-1] == comparable(plain[1])[-1]


def test_checkpoints_are_limited_and_an_older_one_is_not_gone_on_from(model_dir, data_file, tmp_path):
    folder = tmp_path / "run"
    run(model_dir, data_file, folder, save_steps=3, save_total_limit=2)
    assert checkpoints(folder) == ["checkpoint-12", "checkpoint-14"]
    older = {"resume_from_checkpoint": folder / "checkpoint-12"}
    assert "checkpoint-14 is newer and would be lost" in refused(model_dir, data_file, folder, **older)
    branch = run(model_dir, data_file, tmp_path / "branch", **older)
    assert [line["step"] for line in training(branch)] == [13, 14]
    assert "branch holds another run" in refused(model_dir, data_file, tmp_path / "branch", **older)
    for path in (folder / "checkpoint-14").iterdir():
        path.write_bytes(path.read_bytes()[:100])  # as no crash leaves them, but a copy may
    latest = {"resume_from_checkpoint": "latest"}
    assert "checkpoint-14 is no whole checkpoint" in refused(model_dir, data_file, folder, **latest)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_batch_size": 4}, "--train_batch_size was 8 and is 4 now"),
        ({"max_train_samples": 20}, "data (the file, the tokenizer, --max_length, --max_*_samples or --domains) was"),
        ({"beta": 0.2}, "--beta was 0.1 and is 0.2 now"),
        ({"loss_type": "hinge"}, "--loss_type was sigmoid and is hinge now"),
        ({"model_name_or_path": "other"}, "policy's start (hash) was"),
        ({"ref_model_name_or_path": "other"}, "reference (hash) was"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_resuming_another_run_is_refused(plain, model_dir, data_file, other_model, changes, message):
    changes = {name: other_model if value == "other" else value for name, value in changes.items()}
    settings = {"model_dir": model_dir, "resume_from_checkpoint": "latest"} | changes
    assert message in refused(data_file=data_file, output_dir=plain[0], **settings)
    assert read_metrics(plain[0]) == plain[1]


def test_a_mixture_of_experts_resumes_with_all_its_weights(data_file, tokenizer, tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    experts |= {"shared_expert_intermediate_size": 32, "initializer_range": 0.3}
    model = save(tiny(transformers.Qwen2MoeForCausalLM, tokenizer, **experts), tokenizer, tmp_path / "model")
    settings = {"save_steps": 2, "save_total_limit": 9, "max_steps": 4}
    whole = run(model, data_file, tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = run(model, data_file, tmp_path / "resumed", resume_from_checkpoint="latest", **settings)
    assert comparable(training(resumed)) == comparable(training(whole))[2:]
    assert same_weights(tmp_path / "resumed", tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def launch(*words, n_processes=2, port=0):
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(n_processes),
        "--main_process_port", str(port), *words,
    ]  # fmt: skip


def assert_same_run(folder, metrics, expected_folder, expected):
    """Losses to 1e-5, weights to 1e-3: sums are taken in another order."""
    assert losses(metrics) == pytest.approx(losses(expected), abs=1e-5)
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen"):
        assert metrics[-1][name] == pytest.approx(expected[-1][name], abs=2e-3)
    assert training(metrics)[-1]["learning_rate"] == pytest.approx(training(expected)[-1]["learning_rate"])
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, expected_folder))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-3, rtol=1e-3)


def test_two_processes_are_one_run_end_together_and_resume(plain, model_dir, data_file, tmp_path):
    """One of them is killed in the fourth step or soon after, and both go on from the last checkpoint."""
    words = launch("dpo_train.py", *arguments(model_dir, data_file, tmp_path / "run", save_steps=1))
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said, ranks = [], []
    for line in process.stdout:
        said.append(line)
        if line.startswith("step 1/"):
            ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        if line.startswith("step 3/"):
            os.kill(int(ranks[1]), signal.SIGKILL)
            break
    process.communicate(timeout=60)
    assert process.returncode != 0 and len(ranks) == 2 and "2 process" in "".join(said), "".join(said)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    done = type_command(*words, "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    metrics = read_metrics(tmp_path / "run")
    assert [line["step"] for line in training(metrics)] == list(range(1, 15))
    assert [line["event"] for line in metrics if "event" in line] == ["start", "resumed"]
    assert_same_run(tmp_path / "run", metrics, *plain)


def test_four_processes_with_fewer_pairs_than_processes_in_a_step(slow, model_dir, data_file, tmp_path):
    changes = {"train_batch_size": 3, "max_steps": 20, "save_steps": 9, "precompute_ref_log_probs": True}
    expected = run(model_dir, data_file, tmp_path / "alone", **changes)
    words = arguments(model_dir, data_file, tmp_path / "run", **changes)
    done = type_command(*launch("dpo_train.py", *words, n_processes=4))
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", read_metrics(tmp_path / "run"), tmp_path / "alone", expected)


def test_two_nodes_are_one_run(slow, plain, model_dir, data_file, tmp_path):
    """Two launchers, as on two machines, on this machine's loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        subprocess.Popen(
            launch("--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
                   "dpo_train.py", *arguments(model_dir, data_file, tmp_path / "run"), port=port),
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [node.communicate(timeout=170)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert_same_run(tmp_path / "run", read_metrics(tmp_path / "run"), *plain)


def test_sigterm_to_the_launcher_stops_both_processes_with_a_checkpoint(slow, plain, model_dir, data_file, tmp_path):
    words = launch("dpo_train.py", *arguments(model_dir, data_file, tmp_path / "run"))
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("step 5/"):
            process.terminate()
            break
    process.communicate(timeout=60)
    assert process.returncode != 0 and checkpoints(tmp_path / "run")
    done = type_command(*words, "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", read_metrics(tmp_path / "run"), *plain)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, in one line


def small_vocabulary(folder, model_dir, tokenizer):
    save(tiny_qwen2(len(tokenizer) - 1), tokenizer, folder)


def window_of_some_layers(folder, model_dir, tokenizer):
    config = Qwen2Config.from_pretrained(model_dir, use_sliding_window=True, sliding_window=64)
    config.layer_types = ["full_attention", "sliding_attention"]
    save(Qwen2ForCausalLM(config), tokenizer, folder)


def window_of_all_layers(folder, model_dir, tokenizer):
    """Its config.json has no `layer_types`."""
    save(tiny(transformers.MistralForCausalLM, tokenizer, sliding_window=64), tokenizer, folder)
    assert "layer_types" not in json.loads((folder / "config.json").read_text())


def scaled_logits(folder, model_dir, tokenizer):
    save(tiny(transformers.GraniteForCausalLM, tokenizer, logits_scaling=2.0), tokenizer, folder)


def a_layer_is_missing(folder, model_dir, tokenizer):
    shutil.copytree(model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".layers.1." not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def git_lfs_pointer(folder, model_dir, tokenizer):
    shutil.copytree(model_dir, folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def pickled(folder, model_dir, tokenizer):
    shutil.copytree(model_dir, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def foreign_code(folder, model_dir, tokenizer):
    shutil.copytree(model_dir, folder)
    auto_map = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    edit_json(folder / "config.json", model_type="foreign", auto_map=auto_map)
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")


@pytest.mark.parametrize(
    "make, message",
    [
        (small_vocabulary, "its vocabulary is smaller"),
        (window_of_some_layers, "--max_length 128: .* looks back 64 tokens only"),
        (window_of_all_layers, "--max_length 128: .* looks back 64 tokens only"),
        (scaled_logits, "GraniteForCausalLM can't be trained here"),
        (a_layer_is_missing, r"--model_name_or_path .* weights are missing .*model.layers.1.input_layernorm.weight"),
        (git_lfs_pointer, "--model_name_or_path .* can't be loaded .*git lfs pull"),
        (pickled, "--model_name_or_path .* can't be loaded .*safetensors"),
        (foreign_code, "--model_name_or_path .* can't be loaded"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_models_that_are_refused(model_dir, data_file, tokenizer, tmp_path, make, message):
    make(tmp_path / "model", model_dir, tokenizer)
    assert re.search(message, refused(tmp_path / "model", data_file, tmp_path / "run"))
    assert not (tmp_path / "model" / "ran").exists() and not (tmp_path / "run").exists()


def test_a_first_step_that_is_not_ln_2_is_explained(model_dir, data_file, tmp_path):
    """The reference has the policy's weights, and computes something else with them."""
    shutil.copytree(model_dir, tmp_path / "other")
    edit_json(tmp_path / "other" / "config.json", num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    message = refused(model_dir, data_file, tmp_path / "run", ref_model_name_or_path=tmp_path / "other")
    assert re.search(r"the loss at the first step is \S+ and not 0.6931, though policy and reference", message)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--beta 0", "--beta 0.0: must be above 0"),
        ("--beta nan", "--beta nan: must be"),
        ("--learning_rate -1", "--learning_rate -1.0: must be 0 or above"),
        ("--train_batch_size 0", "--train_batch_size 0: must be above 0"),
        ("--train_batch_size many", "invalid int value: 'many'"),
        ("--loss_type hinged", "invalid choice: 'hinged'"),
        ("--label_smoothing 0.5", "--label_smoothing 0.5: must be from 0 to below 0.5"),
        ("--label_smoothing 0.1 --loss_type hinge", "--label_smoothing 0.1: for sigmoid and robust only"),
        ("--warmup_steps 5 --max_steps 5", "--warmup_steps 5: must be below --max_steps"),
        ("--micro_batch_tokens 100", "--micro_batch_tokens 100: must be at least 2048"),
        ("--no_such_flag", "unrecognized arguments: --no_such_flag"),
        ("--eval_only", "--eval_only True: needs --ref_model_name_or_path"),
        ("--report_to wandb", "--report_to wandb: not installed"),
        ("--output_dir /dev/null/run", "/dev/null/run"),
        ("--model_name_or_path README.md", "--model_name_or_path README.md can't be loaded"),
        ("--dataset_name nowhere.jsonl", "--dataset_name nowhere.jsonl: there is no such file"),
        ("--resume_from_checkpoint latest", "--resume_from_checkpoint latest: needs --output_dir"),
        ("--resume_from_checkpoint latest --output_dir nowhere", "there is no checkpoint in nowhere"),
        ("ACCELERATE_USE_FSDP=true", "FSDP is not supported, only one process or DDP"),
    ],
    ids=lambda value: value,
)
def test_bad_flags_get_one_line(words, message, model_dir, data_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if words.startswith("ACCELERATE"):
        monkeypatch.setenv(*words.split("="))
        words = ""
    shutil.copy(ROOT / "README.md", tmp_path)
    defaults = ["--model_name_or_path", model_dir, "--dataset_name", data_file, "--mixed_precision", "no"]
    done = type_here([*defaults, *words.split()])
    assert done.returncode == 1
    assert done.stderr.startswith("dpo_train.py: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_dir() and path.name != "output"]


def test_help_names_every_flag_and_home_is_expanded(monkeypatch):
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), pytest.raises(SystemExit):
        dpo_train.main(["--help"])
    for field in dataclasses.fields(dpo_train.Flags):
        assert f"--{field.name}" in screen.getvalue()
    monkeypatch.setenv("HOME", "/somewhere")
    assert dpo_train.parse_flags(["--model_name_or_path=~/model"]).model_name_or_path == "/somewhere/model"


def test_without_a_network_one_line_says_what_is_missing(tmp_path):
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = type_command(sys.executable, str(ROOT / "dpo_train.py"), cwd=tmp_path, env=away, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert re.search("no answer from http://127.0.0.1:9 .*HF_HUB_ETAG_TIMEOUT", done.stdout)
    for words in ("Qwen/Qwen2.5-0.5B", "http://127.0.0.1:9 can't be reached", "HF_ENDPOINT", "git clone", "--demo"):
        assert words in done.stderr
    assert not list(tmp_path.glob("output/*"))


# ---------------------------------------------------------------------------------------------------------------------
# Folders and files


def test_another_runs_folder_is_never_written_to(plain, model_dir, data_file):
    folder, metrics = plain
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "holds another run: give another" in refused(model_dir, data_file, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_two_runs_started_at_once_take_two_folders(model_dir, data_file, tmp_path):
    words = [sys.executable, str(ROOT / "dpo_train.py")]
    words += arguments(model_dir, data_file, None, max_steps=2, max_eval_samples=0)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    for process in both:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == ["dpo", "dpo-2"]
    for folder in ("dpo", "dpo-2"):
        lines = read_metrics(tmp_path / "output" / folder)
        assert [line.get("event", line["step"]) for line in lines] == ["start", 1, 2]


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
    shutil.copytree(plain[0] / "checkpoint-4", folder / "checkpoint-4")
    words = arguments(model_dir, data_file, folder, save_steps=4, resume_from_checkpoint="latest")
    with files_limited_to(needed + 1000):
        done = type_here(words)
    assert done.returncode == 0, done.stderr
    warned = re.findall(r"warning: no checkpoint at step (\d+) \(.+\); the last one: .*/checkpoint-4\n", done.stdout)
    assert warned == ["8", "12", "14"] and checkpoints(folder) == ["checkpoint-4"]
    assert same_weights(folder, plain[0])


def test_a_disk_that_is_full_from_the_start_ends_in_one_line(plain, model_dir, data_file, tmp_path):
    """Also the log can't be written: that is said once, and the training goes on as long as it can."""
    with files_limited_to(1000):
        done = type_here(arguments(model_dir, data_file, tmp_path / "run", save_steps=7))
    assert done.returncode == 1 and done.stderr.startswith("dpo_train.py: ") and done.stderr.count("\n") == 1
    assert done.stdout.count("metrics.jsonl can't be written to") == 1 and "no checkpoint at step 7" in done.stdout
    assert "step 14/14" in done.stdout and not checkpoints(tmp_path / "run")


def test_a_disk_that_is_nearly_full_is_told_before_the_first_step(model_dir, data_file, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=500_000))
    settings = {"max_steps": 1, "max_eval_samples": 0, "save_steps": 1}
    done = type_here(arguments(model_dir, data_file, tmp_path / "run", **settings))
    assert "warning: 0.0 GB are free" in done.stdout.partition("step 1/")[0]


FAKE_WANDB = """
class Run:
    def log(self, values, step=None):
        lines.append((step, values))
    def finish(self):
        lines.append("finished")
class config:
    update = staticmethod(lambda values, allow_val_change: given.update(config=values))
lines, given = [], {}
def init(**options):
    given.update(options)
    return Run()
"""


def test_a_tracker_gets_the_lines_of_metrics(model_dir, data_file, tmp_path, monkeypatch):
    """accelerate's own wandb tracker, with a wandb that keeps what it is given."""
    (tmp_path / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [accelerate.utils.LoggerType.WANDB])
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    metrics = run(model_dir, data_file, tmp_path / "my-run", max_steps=3, report_to="wandb")
    import wandb

    assert (wandb.given["project"], wandb.given["name"]) == ("dpo", "my-run")
    config = wandb.given["config"]
    assert config.keys() == {field.name for field in dataclasses.fields(dpo_train.Flags)}
    assert (config["beta"], config["model_name_or_path"]) == (0.1, model_dir.name)
    assert (config["dataset_name"], config["output_dir"]) == (data_file.name, "my-run")
    logged = [line for line in wandb.lines[:-1] if "loss_at_start" not in line[1]]
    expected = [(line.pop("step"), line) for line in metrics if "event" not in line]
    assert wandb.lines[-1] == "finished" and logged == expected and len(logged) == 5
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run(model_dir, data_file, tmp_path / "again", max_steps=1, report_to="wandb")
    assert (wandb.given["project"], wandb.given["name"]) == ("mine", "again")
    monkeypatch.delitem(sys.modules, "wandb")


# ---------------------------------------------------------------------------------------------------------------------
# Rows and steps that can't train, and what a run warns of


def test_bad_rows_among_good_ones(plain, model_dir, tmp_path):
    rows = [row for good in make_rows() for row in (good, {"chosen": None}, 7)]
    done = type_here(arguments(model_dir, write_jsonl(tmp_path / "mixed.jsonl", rows), tmp_path / "run"))
    assert comparable(read_metrics(tmp_path / "run")) == comparable(plain[1])
    assert re.search(r"dropped \d+ rows: row is not an object \(first: row 2\)", done.stdout)


def test_a_step_that_is_not_finite_changes_nothing_and_is_named(model_dir, tokenizer, tmp_path):
    """One token's embedding is infinite: the one pair that contains it gives NaN, in one step of each epoch."""
    rows = make_rows()
    bad = len(rows) // 2
    rows.insert(bad, {"prompt": "天地", "chosen": "山~水", "rejected": "火木"})
    config = Qwen2Config.from_pretrained(model_dir, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
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
    warned = re.findall(r"warning: .*step (\d+) is not finite \(rows (.*?) of the data\)", done.stdout)
    assert warned == [(str(skipped[0]), str([bad]))]

    words[words.index("--output_dir") + 1] = tmp_path / "sparse"  # means are over the steps that were not skipped
    assert type_here([*words, "--logging_steps", 7]).returncode == 0
    sparse = training(read_metrics(tmp_path / "sparse"))
    assert sum(line["skipped_steps"] for line in sparse) == 2 and all(math.isfinite(line["loss"]) for line in sparse)


def test_five_steps_in_a_row_that_are_not_finite_end_the_run(model_dir, data_file, tmp_path):
    """A beta that no float32 holds: the loss is ln 2, its gradient infinite, so that all rows of the step are named."""
    done = type_here(arguments(model_dir, data_file, tmp_path / "run", beta=1e39, save_steps=1))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    data = prepare(load_rows(str(data_file)), AutoTokenizer.from_pretrained(model_dir), 128, 54, 8).train
    rows = sorted(data.rows[epoch_order(data.keys, 42, 0)[:8]].tolist())
    assert f"step 1 is not finite (rows {rows} of the data), and so on for 5 steps in a row" in done.stderr
    assert done.stdout.count("not finite") == 1
    AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).save_pretrained(tmp_path / "start")
    assert same_weights(tmp_path / "run" / "checkpoint-4", tmp_path / "start")


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"learning_rate": 0}, "stays where it began, at 0.6931: --learning_rate is 0"),
        ({"warmup_steps": 12, "learning_rate": 1e-9}, "still rising, until step 12"),
        ({"beta": 1e-6}, "--beta 1e-06 is so small"),
        ({"learning_rate": 1e-9}, "--learning_rate 1e-09 hardly moves the log-probabilities"),
        ({"loss_type": "apo_down", "beta": 2}, "chosen responses have become less likely than under the reference"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_loss_that_is_stuck_and_chosen_responses_that_sink_are_told_once(
    model_dir, data_file, tmp_path, changes, why
):
    done = type_here(arguments(model_dir, data_file, tmp_path / "run", max_eval_samples=0, **changes))
    assert len(re.findall(rf"warning: the .*{why}", done.stdout)) == 1


@pytest.mark.parametrize("precompute, n_models", [(False, 2), (True, 1)])
def test_precomputing_lets_the_reference_go(model_dir, data_file, other_model, tmp_path, precompute, n_models):
    def count():
        gc.collect()
        counts.append(sum(type(thing) is Qwen2ForCausalLM for thing in gc.get_objects()))

    counts, settings = [], {"max_steps": 1, "ref_model_name_or_path": other_model}
    settings["precompute_ref_log_probs"] = precompute
    count()
    type_here(arguments(model_dir, data_file, tmp_path / "run", **settings), cue="step 1/", act=count)
    assert counts[1] - counts[0] == n_models
