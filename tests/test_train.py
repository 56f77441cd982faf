"""dpo_train.py: whole runs of a tiny model, in this process or as a user would type them."""

import copy
import gc
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from conftest import emulate_gpu_attention, make_rows, tiny_qwen2, write_jsonl
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    get_scheduler,
)  # fmt: skip

import dpo_train
from dataset import Encoder, epoch_order, load_rows, prepare, read_triple
from loss import dpo_loss

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "train_batch_size": 8, "learning_rate": 2e-3, "max_length": 128, "mixed_precision": "no", "logging_steps": 1,
    "max_eval_samples": 8, "max_new_tokens": 0, "num_train_epochs": 2, "eval_steps": 0, "save_steps": 0,
}  # fmt: skip


def arguments(model_dir, data_file, output_dir, **changes):
    settings = (
        {"model_name_or_path": model_dir, "dataset_name": data_file, "output_dir": output_dir} | SETTINGS | changes
    )
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]


def run(model_dir, data_file, output_dir, **changes):
    """One run in this process; its metrics, a dict for each line."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    dpo_train.train(dpo_train.parse_flags(arguments(model_dir, data_file, output_dir, **changes)))
    return read_metrics(output_dir)


def read_metrics(folder):
    path = Path(folder) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(metrics):
    return [line["loss"] for line in metrics if "loss" in line]


def type_command(*words, cwd=ROOT, env=None, timeout=170):
    """Run a command as a user would, in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run(words, cwd=cwd, env=environment, timeout=timeout, capture_output=True, text=True)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, model_dir, data_file):
    folder = tmp_path_factory.mktemp("plain") / "run"
    return folder, run(model_dir, data_file, folder)


def test_a_run_starts_at_ln_2_and_learns(plain_run):
    _, metrics = plain_run
    first, last = losses(metrics)[0], losses(metrics)[-1]
    assert first == pytest.approx(math.log(2), abs=1e-6) and last < 0.5
    assert metrics[0]["eval_loss"] == pytest.approx(math.log(2)) and metrics[0]["eval_rewards/accuracies"] == 0.5
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, len(losses(metrics)) + 1))
    assert metrics[-1]["eval_loss"] != metrics[0]["eval_loss"]


def test_the_trained_model_loads_and_knows_where_to_stop(plain_run, model_dir, tokenizer):
    folder, _ = plain_run
    model, loaded = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert loaded.chat_template == tokenizer.chat_template
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [end, tokenizer.eos_token_id]
    start = load_file(model_dir / "model.safetensors")
    assert any(
        not torch.equal(weight, start[name].float()) for name, weight in load_file(folder / "model.safetensors").items()
    )
    for name in ("report.md", "loss.png"):
        assert (folder / name).stat().st_size > 0


def naive_losses(model_dir, data_file, seed=42, **changes):
    """The same run, the plain way: a row for each response, full logits, no sharing, no cutting, no accelerate."""
    settings = SETTINGS | changes
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = [json.loads(line) for line in Path(data_file).read_text().splitlines()]
    data = prepare(load_rows(str(data_file)), tokenizer, settings["max_length"], None, settings["max_eval_samples"])
    pairs = Encoder(tokenizer, settings["max_length"]).encode([read_triple(rows[i]) for i in data.train.rows])
    policy = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    reference = copy.deepcopy(policy)
    per_epoch = math.ceil(len(pairs) / settings["train_batch_size"])
    n_steps = per_epoch * settings["num_train_epochs"]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings["learning_rate"], weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, math.ceil(0.1 * n_steps), n_steps)

    def logp(model, pair, side):
        ids = torch.tensor([pair["prompt_ids"] + pair[side]])
        n = len(pair["prompt_ids"])
        return model(input_ids=ids).logits[0, n - 1 : -1].log_softmax(-1).gather(1, ids[0, n:, None]).sum()

    out = []
    for step in range(n_steps):
        epoch, k = divmod(step, per_epoch)
        order = epoch_order(data.train.keys, seed, epoch)[k * settings["train_batch_size"] :][
            : settings["train_batch_size"]
        ]
        scores = torch.stack([logp(m, pairs[i], side) for i in order for m in (policy, reference)
                              for side in ("chosen_ids", "rejected_ids")]).view(-1, 4)  # fmt: skip
        loss = dpo_loss(*scores[:, :2].unbind(1), *scores[:, 2:].detach().unbind(1))[0].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        out.append(loss.item())
    return out


def test_the_run_equals_a_naive_loop(plain_run, model_dir, data_file):
    expected = naive_losses(model_dir, data_file)
    assert losses(plain_run[1]) == pytest.approx(expected, abs=2e-4)
    assert len(expected) == 14 and min(expected) < 0.5


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_tokens": 256},
        {"gradient_checkpointing": True},
        {"attn_implementation": "eager"},
        {"attn_implementation": "sdpa"},
        {"precompute_ref_log_probs": True},
    ],
    ids=lambda changes: "-".join(map(str, *changes.items())),
)
def test_one_trajectory_for_every_way_of_computing_it(plain_run, model_dir, data_file, tmp_path, changes):
    expected = losses(plain_run[1])
    assert losses(run(model_dir, data_file, tmp_path / "run", **changes)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("implementation", ["tree", "flex"])
def test_one_trajectory_with_the_attention_of_gpus(
    plain_run, model_dir, data_file, tmp_path, monkeypatch, implementation
):
    emulate_gpu_attention(monkeypatch, implementation)
    assert losses(run(model_dir, data_file, tmp_path / "run")) == pytest.approx(losses(plain_run[1]), abs=1e-5)


def test_compiled_layers_give_the_same_losses(slow, model_dir, data_file, tmp_path):
    settings = {"max_steps": 2, "lr_scheduler_type": "constant"}
    expected = losses(run(model_dir, data_file, tmp_path / "plain", **settings))
    compiled = losses(run(model_dir, data_file, tmp_path / "run", torch_compile=True, **settings))
    assert compiled == pytest.approx(expected, abs=1e-4)


def test_one_trajectory_without_sharing(plain_run, model_dir, data_file, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo_train, "TreeCollator", lambda *args, **kwargs: UNSHARED(*args, share=False, **kwargs))
    assert losses(run(model_dir, data_file, tmp_path / "run")) == pytest.approx(losses(plain_run[1]), abs=1e-5)


UNSHARED = dpo_train.TreeCollator


def launch(n_processes, *words):
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(n_processes),
        "--main_process_port", "0", "dpo_train.py", *words,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "n_processes, changes", [(2, {}), (4, {"train_batch_size": 3, "max_steps": 20, "save_steps": 9})]
)
def test_one_trajectory_for_any_number_of_processes(
    request, plain_run, model_dir, data_file, tmp_path, n_processes, changes
):
    """Also with steps of fewer pairs, and of fewer prompts, than processes: losses to 1e-5, weights to 1e-3."""
    folder, (alone, expected) = tmp_path / "run", plain_run
    if changes:
        request.getfixturevalue("slow")
        alone = tmp_path / "alone"
        expected = run(model_dir, data_file, alone, **changes)
    done = type_command(*launch(n_processes, *arguments(model_dir, data_file, folder, **changes)))
    assert done.returncode == 0, done.stderr
    assert f"{n_processes} process" in done.stdout
    metrics = read_metrics(folder)
    assert losses(metrics) == pytest.approx(losses(expected), abs=1e-5)
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen"):
        assert metrics[-1][name] == pytest.approx(expected[-1][name], abs=2e-3)
    assert metrics[-2]["learning_rate"] == pytest.approx(expected[-2]["learning_rate"])
    ours, theirs = load_file(folder / "model.safetensors"), load_file(alone / "model.safetensors")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-3, rtol=1e-3)


def test_a_process_that_dies_ends_the_others(model_dir, data_file, tmp_path):
    words = launch(2, *arguments(model_dir, data_file, tmp_path / "run", num_train_epochs=1000))
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_what_is_not_supported_says_so(model_dir, data_file, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(dpo_train.UserError, match="FSDP is not supported, only one process or DDP"):
        run(model_dir, data_file, tmp_path / "run")


def test_too_little_room_is_told_at_the_start(tmp_path, monkeypatch):
    """494M parameters: 2.0 GB of model, 5.9 GB a checkpoint, three at once with --save_total_limit 2."""
    said, usage = [], shutil.disk_usage(tmp_path)
    check = lambda: dpo_train.check_room(tmp_path / "run", 494_000_000, dpo_train.Flags(), said.append)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=7_000_000_000))
    with pytest.raises(dpo_train.UserError, match="7.0 GB are free, and the run may need 7.9 GB"):
        check()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=19_000_000_000))
    check()
    assert "19.0 GB are free, and the run may need 19.8 GB (--save_total_limit 2)" in said.pop()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20_000_000_000))
    check()
    assert not said


def test_the_rehearsal_changes_nothing_and_explains_a_full_gpu(tokenizer):
    """On a CPU here; it has not run on a GPU yet."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    policy, seen = tiny_qwen2(len(tokenizer)), []
    reference = dpo_train.ResponseScorer(copy.deepcopy(policy))
    reference.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    before = copy.deepcopy(policy.state_dict())
    dpo_train.rehearse(policy, reference, accelerator, dpo_train.TreeCollator(300), max_length=64)
    assert all(weight.grad is None for weight in policy.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())
    (batch,) = seen
    assert batch["input_ids"].shape == (1, 1 + 4 * 63) and batch["position_ids"].max() == 63

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    policy.forward = policy.base_model.forward = full
    with pytest.raises(dpo_train.UserError, match="memory is too small"):
        dpo_train.rehearse(policy, reference, accelerator, dpo_train.TreeCollator(8192), max_length=1024)
    # 31,616 weights: 108.8 bytes a token, 12 * 31,616 for gradients and AdamW; room for 5,000 tokens is left.
    limit = 9_000_000 + 12 * 31_616 + 5_000 * 109
    text = dpo_train.out_of_memory(8192, 9_000_000, limit, tiny_model_of(31_616))
    assert "--micro_batch_tokens 8192: 4864 should fit" in text and "--gradient_checkpointing" in text
    assert "\n" not in text


def tiny_model_of(n_parameters):
    return torch.nn.ParameterList([torch.zeros(n_parameters)])


def test_the_schedule(plain_run, model_dir, data_file, tmp_path):
    """14 steps, warm-up of ceil(0.1 * 14) = 2: the rate is 0, 1/2 and 1 of its peak, then falls as a cosine."""
    rates = [line["learning_rate"] for line in plain_run[1] if "loss" in line]
    expected = [0.0, 0.5] + [0.5 * (1 + math.cos(math.pi * k / 12)) for k in range(12)]
    assert rates == pytest.approx([2e-3 * rate for rate in expected])
    constant = run(model_dir, data_file, tmp_path / "run", lr_scheduler_type="constant", max_steps=3)
    assert [line["learning_rate"] for line in constant if "loss" in line] == [2e-3] * 3


def test_logged_values_are_means_over_the_pairs_since_the_last_line(plain_run, model_dir, data_file, tmp_path):
    sparse = run(model_dir, data_file, tmp_path / "run", logging_steps=5)
    lines = [line for line in sparse if "loss" in line]
    assert [line["step"] for line in lines] == [1, 5, 10, 14]
    each = losses(plain_run[1])
    sizes = [8, 8, 8, 8, 8, 8, 6] * 2  # 54 pairs: the tail of each epoch is a step of its own
    expected = sum(loss * n for loss, n in zip(each[5:10], sizes[5:10], strict=True)) / sum(sizes[5:10])
    assert lines[2]["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("precompute", [False, True])
def test_resume_equals_uninterrupted(model_dir, data_file, tmp_path, precompute):
    """Bit for bit, from the middle of an epoch, of a log window and of the reference's first pass."""
    settings = {"logging_steps": 3, "save_steps": 4, "eval_steps": 6, "precompute_ref_log_probs": precompute}
    whole = run(model_dir, data_file, tmp_path / "whole", save_total_limit=9, **settings)
    folder = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", folder / "checkpoint-4")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", folder)  # with lines behind step 4, as a crash leaves them
    resumed = run(model_dir, data_file, folder, resume_from_checkpoint="latest", **settings)
    timing = ("pairs_per_second", "tokens_per_second")

    def comparable(metrics):
        return [{k: v for k, v in line.items() if k not in timing} for line in metrics if "event" not in line]

    assert comparable(resumed) == comparable(whole)
    assert [line["step"] for line in resumed if "event" in line] == [4]
    for name in ("model.safetensors", "checkpoint-14/model.safetensors"):
        ours, theirs = load_file(folder / name), load_file(tmp_path / "whole" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (folder / "report.md").read_text() == (tmp_path / "whole" / "report.md").read_text()


def test_checkpoints_are_whole_and_limited(model_dir, data_file, tmp_path):
    folder = tmp_path / "run"
    run(model_dir, data_file, folder, save_steps=3, save_total_limit=2)
    assert sorted(path.name for path in folder.glob("*checkpoint*")) == ["checkpoint-12", "checkpoint-14"]
    older = {"resume_from_checkpoint": folder / "checkpoint-12"}
    with pytest.raises(dpo_train.UserError, match="checkpoint-14 is newer and would be lost; go on with `latest`, or"):
        run(model_dir, data_file, folder, **older)
    branch = run(model_dir, data_file, tmp_path / "branch", **older)
    assert [line["step"] for line in branch if "loss" in line] == [13, 14]
    with pytest.raises(dpo_train.UserError, match="branch holds another run"):
        run(model_dir, data_file, tmp_path / "branch", **older)
    (folder / "checkpoint-14" / "optimizer.pt").write_bytes(b"half")
    AcceleratorState._reset_state(reset_partial_state=True)
    said = []
    flags = dpo_train.parse_flags(arguments(model_dir, data_file, folder, resume_from_checkpoint="latest"))
    assert dpo_train.choose_checkpoint(flags, folder, said.append).name == "checkpoint-12"
    assert "checkpoint-14 is no whole checkpoint (optimizer.pt has another size" in said[0]


def test_the_checkpoint_just_written_outlives_a_damaged_one_of_a_higher_number(tmp_path):
    def save(step, limit):
        dpo_train.save_checkpoint(tmp_path, limit, lambda folder: (folder / "x").write_text("whole"), {"step": step})
        return sorted(path.name for path in tmp_path.iterdir())

    save(1, 9)
    save(2, 9)
    save(3, 9)
    (tmp_path / "checkpoint-3" / "x").write_text("hal")  # `latest` goes on from 2
    assert save(4, 9) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    (tmp_path / "checkpoint-4" / "x").write_text("hal")
    assert save(3, 1) == ["checkpoint-3"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_batch_size": 4}, "--train_batch_size was 8 and is 4 now"),
        ({"max_train_samples": 20}, "data was"),
        ({"beta": 0.2}, "--beta was 0.1 and is 0.2 now"),
        ({"model_name_or_path": "other"}, "policy's start (hash) was"),
    ],
)
def test_resuming_another_run_is_refused(model_dir, data_file, tmp_path, tokenizer, changes, message):
    folder = tmp_path / "run"
    run(model_dir, data_file, folder, save_steps=2, max_steps=2)
    if "model_name_or_path" in changes:
        tiny_qwen2(len(tokenizer), seed=1).save_pretrained(tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
        changes = {"model_name_or_path": tmp_path / "other"}
    with pytest.raises(dpo_train.UserError) as error:
        run(**{"model_dir": model_dir, "data_file": data_file, "output_dir": folder, "max_steps": 2,
               "resume_from_checkpoint": "latest"} | changes)  # fmt: skip
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bf16_computes_in_bf16_over_float32_weights(model_dir, data_file, tmp_path, monkeypatch):
    seen = set()
    forward = torch.nn.functional.scaled_dot_product_attention
    score = dpo_train.ResponseScorer.forward
    n_cast = []

    def look_at_head(self, batch):
        logps = score(self, batch)
        if self.cast_head is not None:
            n_cast.append(self.cast_head.data_ptr())
            assert torch.equal(self.cast_head, self.model.get_output_embeddings().weight.bfloat16())
        return logps

    def spy(query, *args, **kwargs):
        out = forward(query, *args, **kwargs)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(dpo_train, "check_scorer", lambda *_: None)  # it computes in float32
    monkeypatch.setattr(dpo_train.ResponseScorer, "forward", look_at_head)
    metrics = run(model_dir, data_file, tmp_path / "run", mixed_precision="bf16")
    assert len(n_cast) >= len(losses(metrics))
    assert seen == {torch.bfloat16}
    assert losses(metrics)[0] == pytest.approx(math.log(2), abs=1e-6) and losses(metrics)[-1] < 0.55
    assert {weight.dtype for weight in load_file(tmp_path / "run" / "model.safetensors").values()} == {torch.float32}


def test_a_first_step_that_is_not_ln_2_is_explained(model_dir, data_file, tmp_path, monkeypatch):
    real = dpo_train.ReferenceLogps.__call__
    monkeypatch.setattr(dpo_train.ReferenceLogps, "__call__", lambda *args: real(*args) - 1 * torch.tensor([1.0, 0.0]))
    with pytest.raises(
        dpo_train.UserError, match="first step is 0.6.* and not ln 2 = 0.6931, though policy and reference"
    ):
        run(model_dir, data_file, tmp_path / "run")


def test_a_model_that_ignores_the_mask_is_refused(model_dir, data_file, tmp_path, monkeypatch):
    real = dpo_train.tree_mask
    monkeypatch.setattr(dpo_train, "tree_mask", lambda branch, tree, dtype: real(branch * 0, tree, dtype))
    with pytest.raises(dpo_train.UserError, match="Qwen2ForCausalLM can't be trained here"):
        run(model_dir, data_file, tmp_path / "run", attn_implementation="sdpa")


def test_another_reference(plain_run, model_dir, data_file, tmp_path, tokenizer):
    tiny_qwen2(len(tokenizer), seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    metrics = run(model_dir, data_file, tmp_path / "run", max_steps=2, ref_model_name_or_path=tmp_path / "other")
    assert abs(losses(metrics)[0] - math.log(2)) > 0.01  # and no complaint: the reference is another model on purpose


def test_nothing_held_out(model_dir, data_file, tmp_path):
    metrics = run(model_dir, data_file, tmp_path / "run", max_eval_samples=0, max_steps=2)
    assert not any("eval_loss" in line for line in metrics)
    assert "No pairs were held out" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--beta", "0"], "--beta 0.0: must be above 0"),
        (["--beta", "nan"], "--beta nan: must be"),
        (["--learning_rate", "-1"], "--learning_rate -1.0: must be 0 or above"),
        (["--train_batch_size", "0"], "--train_batch_size 0: must be above 0"),
        (["--train_batch_size", "many"], "argument --train_batch_size: invalid int value: 'many'"),
        (["--loss_type", "hinge"], "argument --loss_type: invalid choice: 'hinge'"),
        (["--label_smoothing", "0.5"], "--label_smoothing 0.5: must be from 0 to below 0.5"),
        (["--warmup_steps", "5", "--max_steps", "5"], "--warmup_steps 5: must be below --max_steps"),
        (["--micro_batch_tokens", "100"], "--micro_batch_tokens 100: must be at least 2048"),
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        (
            ["--output_dir", "/dev/null/run"],
            "--output_dir /dev/null/run: /dev/null is no folder that can be written to",
        ),
        (["--model_name_or_path", "README.md"], "--model_name_or_path README.md can't be loaded"),
        (["--resume_from_checkpoint", "latest", "--output_dir", "nowhere"], "there is no whole checkpoint in nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags_get_one_line(words, message, model_dir, data_file, capsys, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(ROOT)
    defaults = ["--model_name_or_path", str(model_dir), "--dataset_name", str(data_file), "--mixed_precision", "no"]
    assert dpo_train.main(defaults + words) == 1
    error = capsys.readouterr().err
    assert error.startswith("dpo_train.py: ") and message in error and error.count("\n") == 1
    assert not (ROOT / "nowhere").exists()


def test_another_runs_folder_is_never_written_to(plain_run, model_dir, data_file):
    folder, metrics = plain_run
    with pytest.raises(dpo_train.UserError, match="holds another run: give another folder"):
        run(model_dir, data_file, folder)
    assert read_metrics(folder) == metrics


def test_lines_fit_the_terminal_in_chinese_too(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for text in ("标点，与 English words 混排。" * 12, "没有空格也要折行" * 20, "a" + "没有空格也要折行" * 20):
        lines = dpo_train.fold("prompt", text).splitlines()
        columns = [sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in line) for line in lines]
        assert len(lines) > 3 and max(columns) <= 80 and min(columns[:-1]) > 60
        assert "".join("".join(lines).removeprefix("prompt").split()) == "".join(text.split())


def test_default_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = dpo_train.Flags(demo=True)
    assert dpo_train.choose_output_dir(flags) == Path("output/demo")
    (tmp_path / "output/demo/checkpoint-5").mkdir(parents=True)
    assert dpo_train.choose_output_dir(flags) == Path("output/demo-2")
    flags.resume_from_checkpoint = "latest"
    assert dpo_train.choose_output_dir(flags) == Path("output/demo")


def test_without_a_network_one_line_says_what_is_missing(tmp_path):
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = type_command(sys.executable, str(ROOT / "dpo_train.py"), cwd=tmp_path, env=away, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    for words in ("Qwen/Qwen2.5-0.5B", "http://127.0.0.1:9 can't be reached", "HF_ENDPOINT", "git clone", "--demo"):
        assert words in done.stderr
    assert not list(tmp_path.glob("output"))


def test_bad_rows_among_good_ones(model_dir, tmp_path):
    rows = [row for good in make_rows() for row in (good, {"chosen": None}, 7)]
    run(model_dir, write_jsonl(tmp_path / "mixed.jsonl", rows), tmp_path / "mixed", max_steps=3)
    run(model_dir, write_jsonl(tmp_path / "good.jsonl", make_rows()), tmp_path / "good", max_steps=3)
    assert losses(read_metrics(tmp_path / "mixed")) == losses(read_metrics(tmp_path / "good"))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_the_run(model_dir, data_file, tmp_path, monkeypatch, what):
    """A pair's loss, or only the gradient, is not finite in the fifth step: its rows are named, the weights kept."""
    real, armed = dpo_train.pair_metrics, []

    def poisoned(policy, reference, flags):
        losses, metrics = real(policy, reference, flags)
        if policy.requires_grad:
            armed.append(1)
            if len(armed) == 5:
                factor = torch.tensor(float("nan")) if what == "loss" else torch.ones(())
                losses = losses * torch.cat([factor[None], torch.ones(len(losses) - 1)])
                if what == "gradient":
                    losses.register_hook(lambda gradient: gradient * math.inf)
        return losses, metrics

    monkeypatch.setattr(dpo_train, "pair_metrics", poisoned)
    with pytest.raises(dpo_train.UserError) as error:
        run(model_dir, data_file, tmp_path / "run", save_steps=1, save_total_limit=9)
    rows = re.search(r"at step 5 is not finite \(row ([0-9, ]+) of the data\); the weights were not", str(error.value))
    data = prepare(load_rows(str(data_file)), AutoTokenizer.from_pretrained(model_dir), 128, None, 8)
    step = epoch_order(data.train.keys, 42, 0)[32:40]
    named = [int(row) for row in rows.group(1).split(", ")]
    assert sorted(set(data.train.rows[step]) & set(named)) == named and len(named) == {"loss": 1, "gradient": 8}[what]
    assert "--resume_from_checkpoint latest" in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in dpo_train.find_checkpoints(tmp_path / "run")][0] == "checkpoint-4"


def test_the_fused_optimizer_leaves_the_weights_alone_when_told_so():
    """What a GPU relies on, where nobody looks at the gradients between log lines."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for found, expected in ((1.0, 1.0), (0.0, 0.9)):
        weight.grad = torch.full((3,), 5.0)
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()
        assert weight[0].item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"learning_rate": 0}, "--learning_rate is 0"),
        ({"warmup_steps": 12, "learning_rate": 1e-9}, "still rising, until step 12"),
        ({"beta": 1e-6}, "--beta 1e-06 is so small"),
        ({"learning_rate": 1e-9}, "--learning_rate 1e-09 hardly moves the log-probabilities"),
    ],
)
def test_a_loss_stuck_at_ln_2_is_explained_once(model_dir, data_file, tmp_path, capsys, changes, why):
    run(model_dir, data_file, tmp_path / "run", **changes)
    said = [line for line in capsys.readouterr().out.splitlines() if "stays at ln 2" in line]
    assert len(said) == 1 and why in said[0]


def test_sinking_chosen_log_probabilities_are_told(plain_run, model_dir, data_file, tmp_path, capsys, monkeypatch):
    """Rewards of -0.5 at beta 0.1 are 5 nats below the reference: 0.1 a token for 50 tokens, the limit, more for 40."""
    line = {"step": 30, "loss": 0.4, "rewards/chosen": -0.5, "lengths/chosen": 40.0, "lengths/rejected": 40.0}
    ((name, text),) = dpo_train.worries(line, dpo_train.Flags(), 0)
    assert name == "sinking" and "by 0.12 nats a token" in text
    assert not list(dpo_train.worries(line | {"lengths/chosen": 51.0}, dpo_train.Flags(), 0))
    monkeypatch.setattr(dpo_train, "SINKING", -1.0)  # so that every line warns: it is said once all the same
    run(model_dir, data_file, tmp_path / "run", max_steps=3)
    assert capsys.readouterr().out.count("have become less likely") == 1


def test_sigterm_finishes_the_step_and_tells_how_to_go_on(model_dir, data_file, tmp_path, monkeypatch):
    """Stopped in the middle and resumed with the printed command: the same end as without the stop.

    Bit for bit, given as many threads: kernels divide their sums among them.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    settings = {"num_train_epochs": 8, "save_steps": 1000}
    run(model_dir, data_file, tmp_path / "whole", **settings)
    folder = tmp_path / "stopped"
    words = [sys.executable, "dpo_train.py", *arguments(model_dir, data_file, folder, **settings)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 9/"):
            process.send_signal(signal.SIGTERM)
            break
    _, error = process.communicate(timeout=100)
    assert process.returncode == 1
    stopped = re.search(r"stopped after step (\d+); go on with: (?:uv run|python) (dpo_train.py .*)\n", error)
    assert 9 <= int(stopped.group(1)) < 56
    assert (folder / f"checkpoint-{stopped.group(1)}" / "state.json").exists()
    done = type_command(sys.executable, *shlex.split(stopped.group(2)))
    assert done.returncode == 0, done.stderr
    ours, theirs = load_file(folder / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_that_cannot_be_written_costs_nothing(model_dir, data_file, tmp_path, monkeypatch, capsys):
    real = dpo_train.save_model

    def full_disk(model, tokenizer, folder, end_id):
        if folder.name == ".checkpoint-4.tmp":
            raise OSError(28, "No space left on device")
        real(model, tokenizer, folder, end_id)

    monkeypatch.setattr(dpo_train, "save_model", full_disk)
    run(model_dir, data_file, tmp_path / "run", save_steps=2, max_steps=5, save_total_limit=9)
    assert "no checkpoint at step 4 ([Errno 28] No space left on device); the last one:" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "run").glob("*checkpoint*"))
    assert names == ["checkpoint-2", "checkpoint-5"]


def test_a_vocabulary_or_a_window_that_is_too_small_is_refused(model_dir, data_file, tmp_path, tokenizer):
    tiny_qwen2(len(tokenizer) - 1).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(dpo_train.UserError, match="its vocabulary is smaller"):
        run(tmp_path / "small", data_file, tmp_path / "run")
    config = Qwen2Config.from_pretrained(model_dir, use_sliding_window=True, sliding_window=64)
    config.layer_types = ["sliding_attention"] * 2
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "window")
    tokenizer.save_pretrained(tmp_path / "window")
    with pytest.raises(dpo_train.UserError, match="--max_length 128: .*window looks back 64 tokens only"):
        run(tmp_path / "window", data_file, tmp_path / "run")


def test_weights_that_git_lfs_did_not_fetch_are_named(model_dir, data_file, tmp_path):
    shutil.copytree(model_dir, tmp_path / "clone")
    (tmp_path / "clone" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(dpo_train.UserError, match="model.safetensors is a git-lfs pointer.*git lfs pull"):
        run(tmp_path / "clone", data_file, tmp_path / "run")


def test_pickled_weights_and_foreign_code_are_refused(model_dir, data_file, tmp_path):
    shutil.copytree(model_dir, tmp_path / "pickled")
    weights = load_file(tmp_path / "pickled" / "model.safetensors")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(dpo_train.UserError, match="expected a model's folder with config.json, model.safetensors"):
        run(tmp_path / "pickled", data_file, tmp_path / "run")
    shutil.copytree(model_dir, tmp_path / "foreign")
    config = json.loads((tmp_path / "foreign" / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config))
    (tmp_path / "foreign" / "code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n"
    )
    with pytest.raises(dpo_train.UserError):
        run(tmp_path / "foreign", data_file, tmp_path / "run")
    assert not (tmp_path / "ran").exists()


def test_no_path_of_this_machine_in_what_a_run_writes(model_dir, data_file, tmp_path):
    run(model_dir, data_file, tmp_path / "run", save_steps=2, max_steps=2)
    for path in (tmp_path / "run").rglob("*"):
        if path.suffix in (".json", ".jsonl", ".md", ".jinja"):
            assert str(tmp_path.parent) not in path.read_text(), path


def test_eval_only_compares_two_models(plain_run, model_dir, data_file, tmp_path):
    """The figures of a run's end, from its model and its start alone."""
    folder, metrics = plain_run
    run(folder, data_file, tmp_path / "eval", ref_model_name_or_path=model_dir, eval_only=True, max_new_tokens=4)
    report = (tmp_path / "eval" / "report.md").read_text()
    assert f"| loss (nats) | 0.6931 | {metrics[-1]['eval_loss']:.4f} |" in report
    assert f"{model_dir.name} (before) and {folder.name} (after)" in report and "**Before**" in report
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["report.md"]
    with pytest.raises(dpo_train.UserError, match="--eval_only True: needs --ref_model_name_or_path"):
        dpo_train.parse_flags(["--eval_only"])


def test_a_tracker_gets_the_lines_of_metrics(model_dir, data_file, tmp_path, monkeypatch):
    got = []

    class Tracker(GeneralTracker):
        name, requires_logging_directory, main_process_only, tracker = "mine", True, True, None

        def __init__(self, run_name, logging_dir=None, **kwargs):
            super().__init__()
            assert (run_name, Path(logging_dir)) == ("run", tmp_path / "run")

        def store_init_configuration(self, values):
            got.append(values)

        def log(self, values, step=None, **kwargs):
            got.append({"step": step} | values)

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "mine", Tracker)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["mine"])
    metrics = run(model_dir, data_file, tmp_path / "run", max_steps=3, report_to="mine")
    assert got[0]["beta"] == 0.1 and got[1:] == metrics
    with pytest.raises(
        dpo_train.UserError, match="--report_to wandb: not installed: `pip install wandb` .there is: mine"
    ):
        dpo_train.parse_flags(["--report_to", "wandb"])


def test_the_card_and_the_upload(model_dir, data_file, tmp_path, monkeypatch, capsys):
    uploaded = {}

    class Api:
        def create_repo(self, name, exist_ok, private):
            assert private  # report.md quotes the data
            return SimpleNamespace(repo_id=f"somebody/{name}")

        def upload_folder(self, **kwargs):
            uploaded.update(kwargs)

    monkeypatch.setattr(dpo_train.huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(dpo_train.huggingface_hub, "whoami", lambda: {})
    run(model_dir, data_file, tmp_path / "run", max_steps=2, push_to_hub=True)
    assert uploaded["repo_id"] == "somebody/run" and "checkpoint-*" in uploaded["ignore_patterns"]
    assert "somebody/run" in capsys.readouterr().out
    card = (tmp_path / "run" / "README.md").read_text()
    assert (
        card.startswith("---\nlibrary_name: transformers\n") and "| beta | 0.1 |" in card and "| loss (nats) |" in card
    )

    def nobody():
        raise OSError("Token is required")

    monkeypatch.setattr(dpo_train.huggingface_hub, "whoami", nobody)
    with pytest.raises(dpo_train.UserError, match="--push_to_hub.*Token is required.*hf auth login"):
        run(model_dir, data_file, tmp_path / "again", max_steps=2, push_to_hub=True)


def test_help_names_every_flag_once_in_a_group(capsys):
    with pytest.raises(SystemExit):
        dpo_train.parse_flags(["--help"])
    text = capsys.readouterr().out
    for name in dpo_train.Flags.__dataclass_fields__:
        assert text.count(f"\n  --{name} ") == 1, name
    assert all(f"\n{group}:\n" in text for group in dpo_train.GROUPS.values())


@pytest.mark.parametrize("precompute", [False, True])
def test_precomputing_lets_the_reference_go(model_dir, data_file, tmp_path, monkeypatch, precompute):
    def models():
        gc.collect()
        return sum(isinstance(thing, Qwen2ForCausalLM) for thing in gc.get_objects())

    counts, others, real = [], models(), dpo_train.check_first_step
    monkeypatch.setattr(dpo_train, "check_first_step", lambda *args: (counts.append(models() - others), real(*args)))
    run(model_dir, data_file, tmp_path / "run", max_steps=1, precompute_ref_log_probs=precompute)
    assert counts == [1 if precompute else 2]


def test_a_home_path_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert dpo_train.parse_flags(["--model_name_or_path=~/model"]).model_name_or_path == "/somewhere/model"


def n_scored(monkeypatch):
    """Counts the calls that compute log-probabilities, without gradients: the reference's, and evaluation's."""
    calls, real = [], dpo_train.ResponseScorer.forward
    monkeypatch.setattr(
        dpo_train.ResponseScorer, "forward", lambda *args: (torch.is_grad_enabled() or calls.append(1), real(*args))[1]
    )
    return calls


def test_a_sweep_pays_for_the_reference_once(model_dir, data_file, tmp_path, monkeypatch, capsys, reference_cache):
    settings = {"max_eval_samples": 0, "max_steps": 4, "precompute_ref_log_probs": True}
    calls = n_scored(monkeypatch)
    first = losses(run(model_dir, data_file, tmp_path / "a", **settings, micro_batch_tokens=256))
    (file,) = reference_cache.iterdir()
    assert f"kept in {file}" in capsys.readouterr().out
    n_first = len(calls)
    again = losses(run(model_dir, data_file, tmp_path / "b", **settings, micro_batch_tokens=256))
    assert f"from {file} (re-checked" in capsys.readouterr().out
    assert again == first
    n_again = len(calls) - n_first
    assert n_again < n_first / 2  # the check of the model and of some values
    run(model_dir, data_file, tmp_path / "c", **settings, beta=0.3)
    assert len(list(reference_cache.iterdir())) == 1
    run(model_dir, data_file, tmp_path / "d", **settings, max_length=20)  # other token ids
    assert len(list(reference_cache.iterdir())) == 2


@pytest.mark.parametrize("damage, reason", [
    (lambda table: {name: logps + 5 for name, logps in table.items()}, "re-computed values differ"),
    (lambda table: table | {"train": table["train"].index_fill(0, torch.tensor(7), math.nan)}, "train values are not"),
    (lambda table: table | {"train": table["train"][1:]}, "train values are not all there"),
    (lambda table: {"held out": table["held out"]}, "train"),
    ("another reference", "another reference"),
    ("cut", "."),
], ids=["stale", "missing", "short", "absent", "foreign", "cut"])  # fmt: skip
def test_a_reference_cache_that_does_not_hold_is_refused(
    plain_run, model_dir, data_file, tmp_path, capsys, reference_cache, damage, reason
):
    run(model_dir, data_file, tmp_path / "a", max_steps=1, precompute_ref_log_probs=True)
    (file,) = reference_cache.iterdir()
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "another reference":
        save_file(load_file(file), file, metadata=metadata | {"reference": "0"})
    else:
        save_file(damage(load_file(file)), file, metadata=metadata)
    capsys.readouterr()
    metrics = run(model_dir, data_file, tmp_path / "b", precompute_ref_log_probs=True)
    assert re.search(rf"cache {file} is refused \(.*{reason}.*\): computing it anew", capsys.readouterr().out)
    assert losses(metrics) == pytest.approx(losses(plain_run[1]), abs=1e-5)


def test_the_reference_is_never_one_that_has_trained(plain_run, model_dir, data_file, tmp_path):
    """Precomputing that is asked for only when resuming: its values are those of the policy's start."""
    stopped = tmp_path / "run"
    run(model_dir, data_file, stopped, save_steps=4, save_total_limit=9)
    for path in (stopped / "checkpoint-12", stopped / "checkpoint-14"):
        shutil.rmtree(path)
    metrics = run(
        model_dir, data_file, stopped, save_steps=4, precompute_ref_log_probs=True, resume_from_checkpoint="latest"
    )
    assert losses(metrics) == pytest.approx(losses(plain_run[1]), abs=1e-5)
