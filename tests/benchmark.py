"""Pairs per second and peak memory: this trainer and TRL, on the same token ids.

    uv run tests/benchmark.py                                                # ours only: the sample model, a smoke run
    uv run --with trl tests/benchmark.py --model Qwen/Qwen2.5-0.5B --pairs 32 --max_length 512
    uv run --with trl tests/benchmark.py --model PATH --data COIG-P.jsonl --only "ours|trl 2.*" --steps 4

On a GPU, in eight minutes at most, without a network; random weights of Qwen2.5-0.5B's real size:

    uv run --with trl tests/benchmark.py --gpu --output results.jsonl        # a line as soon as it is known; a table
    uv run tests/benchmark.py --gpu --only "core|more"                       # these parts
    uv run tests/benchmark.py --gpu --dry                                    # tiny, on a CPU: is every line in order?

Each run is a process of its own, so that peaks of memory don't mix and a run that dies costs only itself. Runs of as
many steps and pairs take the same steps of the same pairs, every pair new, in the same order, with fused AdamW over
float32 weights: our tokens are handed to TRL. Their losses must agree. The first step is a warm-up; speeds are over the
others. Steps that are "spread out" (`--group_by_prompt false`), where next to nothing is shared, hold other pairs, and
their losses are not compared.

`--data coig-p` writes pairs of COIG-P's shape (pairs and queries by domain: arXiv 2504.05535, table 2), of sentences
put together at random: good for speed and memory, meaningless for what a model learns.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import dpo_train
import loss
from dataset import StepBatches, TreeCollator, load_rows, prepare

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "docs" / "sample" / "model"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PEAKS = {"H100": 989, "H200": 989, "H800": 989, "A100": 312, "A800": 312, "4090": 165, "5090": 210}  # bf16 TFLOP/s


class Run(NamedTuple):
    """What a run has beside the settings of all."""

    flags: dict = {}  # of dpo_train.py
    trl: int = 0  # by TRL, this many pairs a forward pass; 0: ours
    gib: int = 0  # of the GPU's memory; 0: all
    is_profiled: bool = False
    on_cpu: bool = False


CHECKPOINTING = {"gradient_checkpointing": True}
DEMO = {"demo": True, "mixed_precision": "no"}
RUNS = {
    "ours": Run(),
    "ours checkpointing": Run(CHECKPOINTING),
    "ours precomputed": Run({"precompute_ref_log_probs": True}),
    "ours, spread out": Run({"group_by_prompt": False}),
    **{f"trl {n}": Run(trl=n) for n in (1, 2, 4, 8, 16, 32)},
    **{f"trl {n} checkpointing": Run(CHECKPOINTING, trl=n) for n in (1, 2, 4, 8, 16, 32)},
    # these with --gpu only
    "machine": Run(),
    "demo, CPU": Run(DEMO, on_cpu=True),
    "demo, float32": Run(DEMO | {"save_steps": 5}),
    "demo, resumed": Run(DEMO | {"save_steps": 5, "resume_from_checkpoint": "latest"}),
    "demo, bf16": Run(DEMO | {"mixed_precision": "bf16"}),
    "defaults": Run(is_profiled=True),
    "8192 tokens": Run({"micro_batch_tokens": 8192}),
    "16384 tokens, 256 pairs": Run({"micro_batch_tokens": 16_384, "train_batch_size": 256}),
    "32768 tokens, 256 pairs": Run({"micro_batch_tokens": 32_768, "train_batch_size": 256}),
    "in 16 GiB": Run(gib=16),
    "in 12 GiB, checkpointing": Run(CHECKPOINTING, gib=12),
}
TABLE = {name: (3, [name]) for name in RUNS if name.startswith(("ours", "trl"))}  # steps, runs
PARTS = {  # of --gpu, the most valuable first: a run takes 10 to 25 seconds to start
    "core": (20, ["defaults"]),
    "trl": (5, ["ours", "trl 8 checkpointing", "ours checkpointing", "trl 32 checkpointing", "trl 8"]),
    "demo": (10, ["demo, CPU", "demo, float32", "demo, resumed", "demo, bf16"]),
    "machine": (0, ["machine"]),
    "more": (8, ["8192 tokens", "ours checkpointing", "ours precomputed", "ours, spread out", "16384 tokens, 256 pairs",
                 "32768 tokens, 256 pairs", "in 16 GiB", "in 12 GiB, checkpointing"]),
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Inputs

COIG_P = {  # domain: (pairs, queries)
    "chat": (702_398, 37_323), "math": (155_872, 27_259), "logic": (54_617, 8_816),
    "novel": (34_483, 6_682), "role": (19_363, 4_930), "code": (40_213, 7_774),
}  # fmt: skip
RESPONSES, SCORE_GAP = 15, 2  # of a query; above which a pair is made
PROMPT_CHARACTERS, RESPONSE_CHARACTERS = (3.65, 0.8, 8, 200), (5.3, 1.05, 15, 900)  # log-normal: mean, sd; least, most


def write_coig_p_shaped(path: Path, n_queries: int, seed: int = 0) -> None:
    """Queries by domain in COIG-P's proportions, each with 15 scored responses; pairs whose scores are far apart."""
    rng = random.Random(seed)
    text = (ROOT / "docs" / "sample" / "texts.txt").read_text(encoding="utf-8")
    sentences = re.findall(r"[^。！？\n]{6,}[。！？]", text)

    def compose(mean: float, sd: float, least: int, most: int) -> str:
        while not least <= (length := rng.lognormvariate(mean, sd)) <= most:
            pass
        words = ""
        while len(words) < length:
            words += rng.choice(sentences)
        return words[: int(length)]

    with path.open("w", encoding="utf-8") as file:
        for query in range(n_queries):
            domain = rng.choices(list(COIG_P), [queries for _, queries in COIG_P.values()])[0]
            per_query = COIG_P[domain][0] / COIG_P[domain][1]
            scored = [(rng.gauss(6, 1.8), compose(*RESPONSE_CHARACTERS)) for _ in range(RESPONSES)]
            pairs = [(a, b) for a in scored for b in scored if a[0] - b[0] > SCORE_GAP]
            rng.shuffle(pairs)
            prompt = f"{compose(*PROMPT_CHARACTERS)}（{query}）"
            for (_, chosen), (_, rejected) in pairs[: max(1, round(rng.gauss(per_query, 0.3 * per_query)))]:
                sides = {"chosen": {"from": "gpt", "value": chosen}, "rejected": {"from": "gpt", "value": rejected}}
                row = {"conversations": [{"from": "human", "value": prompt}], **sides, "domain": domain}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_model(folder: Path, tokenizer: str, is_tiny: bool) -> None:
    """Random weights of Qwen2.5-0.5B's size, stored in bf16 as its are."""
    config = {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
              "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
    if is_tiny:
        config |= {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        config |= {"num_attention_heads": 4}
    torch.manual_seed(0)
    with DEVICE:
        Qwen2ForCausalLM(Qwen2Config(**config)).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def inputs(args: argparse.Namespace) -> tuple[str, str]:
    """Model and data; where none are given, they are made by the first process that asks."""
    model, data = Path(args.scratch, "model"), Path(args.scratch, "pairs.jsonl")
    if args.model is None and args.gpu and not model.exists():
        write_model(model, args.tokenizer, args.dry)
    if args.data == "coig-p" and not data.exists():  # a query has eleven pairs on average
        write_coig_p_shaped(data, args.pairs * max(10, args.steps // 8))
    return args.model or str(model if args.gpu else SAMPLE), str(data) if args.data == "coig-p" else args.data


# ---------------------------------------------------------------------------------------------------------------------
# The steps, and what they need, counted on the host


def steps_of(flags: dpo_train.Flags, micro_batch_tokens: int) -> StepBatches:
    """The steps as `dpo_train.train` takes them."""
    tokenizer = AutoTokenizer.from_pretrained(flags.model_name_or_path)
    pairs = prepare(load_rows(flags.dataset_name), tokenizer, flags.max_length, flags.max_train_samples, 0).train
    collate = TreeCollator(micro_batch_tokens)
    return StepBatches(pairs, collate, flags.train_batch_size, flags.seed, flags.group_by_prompt)


def lengths_of_rows(pairs: list[dict]) -> list[int]:
    """Of these pairs' responses, each with its prompt, where nothing is shared."""
    return [len(pair["prompt_ids"]) + len(pair[side]) for pair in pairs for side in ("chosen_ids", "rejected_ids")]


def arithmetic(model, n_tokens: float, n_scored: float, n_attended: float, passes: int = 4) -> float:
    """FLOPs that a step needs, which leaves out what is computed twice: the policy's forward and backward pass, which
    are three passes, and the reference's. Of tokens through the layers and, scored, through the LM head, and of
    (token, token that it sees)."""
    layers = sum(m.weight.numel() for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear))
    config, head = model.config, model.get_output_embeddings().weight.numel()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_hidden_layers * config.num_attention_heads * size
    return passes * (2 * layers * n_tokens + 2 * head * n_scored + 4 * width * n_attended)


def count_steps(flags: dpo_train.Flags, micro_batch_tokens: int) -> list[dict]:
    """Of each step of a run of ours: its pairs, its tokens, also as separate rows, and its FLOPs."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(flags.model_name_or_path))
    steps, passes, counts = steps_of(flags, micro_batch_tokens), 3 if flags.precompute_ref_log_probs else 4, []
    for step in range(flags.max_steps):
        batches, pairs, n_attended = steps[step], steps.pairs.read(steps.indices(step)), 0.0
        n_tokens, n_scored = (sum(b.tensors[name].numel() for b in batches) for name in ("input_ids", "target_ids"))
        for start, end, prompt_start, prompt_end in (segment for batch in batches for segment in batch.segments):
            n_attended += (end - start) * (prompt_end - prompt_start + (end - start) / 2)
        tflop = arithmetic(model, n_tokens, n_scored, n_attended, passes) / 1e12
        count = {"pairs": len(pairs), "tokens": n_tokens, "padded": n_tokens, "separate": sum(lengths_of_rows(pairs))}
        counts.append(count | {"tflop": tflop})
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# One training


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def flags_of(args: argparse.Namespace) -> dpo_train.Flags:
    """The flags of the run `args.worker`."""
    changes = RUNS[args.worker].flags
    if args.dry:
        sizes = "micro_batch_tokens", "train_batch_size"
        changes = {name: value // 16 if name in sizes else value for name, value in changes.items()}
        changes["mixed_precision"] = "no"  # some CPUs take seconds for what is bf16
    words = {"output_dir": Path(args.scratch, args.worker), "max_steps": args.steps, "logging_steps": 1,
             "save_steps": 0, "max_eval_samples": 0, "max_new_tokens": 0}  # fmt: skip
    if "demo" not in changes:
        model, data = inputs(args)
        n_pairs = changes.get("train_batch_size", args.pairs)
        # Spread out and taken from many prompts, pairs of a step hardly ever share theirs.
        n_samples = n_pairs * (args.steps if changes.get("group_by_prompt", True) else 100)
        words |= {
            "model_name_or_path": model, "dataset_name": data, "max_length": args.max_length,
            "max_train_samples": n_samples, "train_batch_size": n_pairs, "micro_batch_tokens": args.micro_batch_tokens,
            "learning_rate": args.learning_rate, "lr_scheduler_type": "constant", "seed": args.seed,
            "mixed_precision": "no" if args.fp32 else "bf16",
        }  # fmt: skip
    words |= changes
    return dpo_train.parse_flags([w for k, v in words.items() if v is not None for w in (f"--{k}", str(v))])


def profile_third_step(found: dict) -> None:
    """Adds to `found` what the device does between the optimizer's second and its third step."""
    kinds = torch.profiler.ProfilerActivity
    profiler = torch.profiler.profile(activities=[kinds.CUDA if CUDA else kinds.CPU])
    n_steps, started = 0, 0.0

    def after_step(*_) -> None:
        nonlocal n_steps, started
        n_steps += 1
        if n_steps == 2:
            now()
            profiler.start()
            started = now()
        elif n_steps == 3:
            found["profiled_step_seconds"] = now() - started
            profiler.stop()
            name = "self_device_time_total" if CUDA else "self_cpu_time_total"
            events = [(getattr(e, name), e.count, e.key) for e in profiler.key_averages() if not e.is_user_annotation]
            kernels = sorted((event for event in events if event[0] > 0), reverse=True)
            found["kernels_busy_seconds"] = sum(microseconds for microseconds, _, _ in kernels) / 1e6
            found["kernels_run"] = sum(count for _, count, _ in kernels)
            found["kernels"] = [[microseconds / 1e3, count, key[:90]] for microseconds, count, key in kernels[:15]]

    register_optimizer_step_post_hook(after_step)


def run_ours(flags: dpo_train.Flags, run: Run) -> tuple[list[dict], dict]:
    """What each step took, was and lost, and what else there is to say."""
    found, folder = {}, Path(flags.output_dir)
    shutil.rmtree(folder, ignore_errors=True)  # of the same run in another part
    if run.is_profiled:
        profile_third_step(found)
    if flags.resume_from_checkpoint:  # the run before, as if it had ended before its last checkpoint
        shutil.copytree(folder.parent / "demo, float32", folder)
        shutil.rmtree(folder / f"checkpoint-{flags.max_steps}")
    not_saved = mock.patch.object(PreTrainedModel, "save_pretrained")  # two gigabytes that nobody reads
    with contextlib.nullcontext() if flags.save_steps else not_saved:
        dpo_train.train(flags)
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    start, *lines = [json.loads(line) for line in text.splitlines() if line]
    lines = {line["step"]: line for line in lines if "loss" in line}.values()  # of a step's two, the resumed run's
    steps = count_steps(flags, start["micro_batch_tokens"])
    for step, line in zip(steps, lines, strict=True):
        step |= {"seconds": step["pairs"] / line["pairs_per_second"], "loss": line["loss"]}
        assert step["tokens"] == round(line["tokens_per_second"] * step["seconds"]), "these are not the trainer's steps"
        if CUDA:
            found["peak_gb"] = line["peak_memory_gb"]
    return steps, found | {name: start[name] for name in ("micro_batch_tokens", "device")}


def run_trl(flags: dpo_train.Flags, run: Run) -> tuple[list[dict], dict]:
    """The same by TRL, with our tokens."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    ours, steps, all_pairs = steps_of(flags, micro_batch_tokens=0), [], []
    for step in range(flags.max_steps):
        pairs = ours.pairs.read(ours.indices(step))
        rows = lengths_of_rows(pairs)
        forwards = [rows[i : i + 2 * run.trl] for i in range(0, len(rows), 2 * run.trl)]
        padded = sum(len(one) * max(one) for one in forwards)
        steps.append({"pairs": len(pairs), "tokens": sum(rows), "padded": padded, "separate": sum(rows)})
        all_pairs += [{name: pair[name].tolist() for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
                      for pair in pairs]  # fmt: skip

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, *_, **__):
            self.started = now()

        def on_step_end(self, args, state, *_, **__):
            steps[state.global_step - 1]["seconds"] = now() - self.started

        def on_log(self, args, state, control, logs, **__):
            if "loss" in logs:
                steps[state.global_step - 1]["loss"] = float(logs["loss"])

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset  # our tokens

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    config = DPOConfig(
        output_dir=flags.output_dir, per_device_train_batch_size=run.trl, max_steps=flags.max_steps,
        gradient_accumulation_steps=flags.train_batch_size // run.trl, max_length=None,
        bf16=flags.mixed_precision == "bf16", gradient_checkpointing=flags.gradient_checkpointing, use_cpu=not CUDA,
        report_to="none", optim="adamw_torch_fused", logging_steps=1, beta=0.1,
        save_strategy="no", learning_rate=flags.learning_rate, lr_scheduler_type="constant", warmup_steps=0,
        disable_tqdm=True, model_init_kwargs={"dtype": torch.float32, "attn_implementation": "sdpa"},
    )  # fmt: skip
    Trainer(
        model=flags.model_name_or_path, args=config, train_dataset=Dataset.from_list(all_pairs), callbacks=[Clock()],
        processing_class=AutoTokenizer.from_pretrained(flags.model_name_or_path),
    ).train()  # fmt: skip
    return steps, {}


def result(args: argparse.Namespace) -> dict:
    """What the run `args.worker` found: speeds over the steps that are neither warm-up nor disturbed by a profiler."""
    run, flags = RUNS[args.worker], flags_of(args)
    if run.gib and CUDA:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, run.gib * 2**30 / total))
    steps, found = (run_trl if run.trl else run_ours)(flags, run)
    peak = torch.cuda.max_memory_allocated() if CUDA else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    timed = steps[3 if run.is_profiled else 1 :]
    seconds, n_pairs = (sum(step[name] for step in timed) for name in ("seconds", "pairs"))
    line = {"seconds_per_step": seconds / len(timed), "pairs_per_second": n_pairs / seconds, "peak_gb": peak / 1e9}
    for name in ("tokens", "padded", "separate", "tflop"):
        if name in steps[0]:  # TRL's FLOPs are not counted
            line[f"{name}_per_pair"] = sum(step[name] for step in steps) / sum(step["pairs"] for step in steps)
    if not run.trl:
        line["tflops"] = sum(step["tflop"] for step in timed) / seconds
        if known := [tflops for card, tflops in PEAKS.items() if card in found["device"]]:
            line["of_peak"] = line["tflops"] / known[0]
    line["takes"] = [flags.dataset_name, flags.max_train_samples, flags.train_batch_size, flags.group_by_prompt]
    line |= {"mixed_precision": flags.mixed_precision, **found}
    return line | {name: [step[name] for step in steps] for name in ("seconds", "loss")}


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def milliseconds(args: argparse.Namespace, run) -> float:
    """The median of seven, after two warm-ups."""
    found = []
    for _ in range(3 if args.dry else 9):
        started = now()
        run()
        found.append(1e3 * (now() - started))
    return statistics.median(found[2:])


def machine(args: argparse.Namespace) -> Iterator[dict]:
    """What there is, what it can do at most, and the two ways to attend against each other."""
    versions = {}
    for name in ("torch", "triton", "transformers", "accelerate", "datasets", "numpy", "trl"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if CUDA else None
    yield {"device": torch.cuda.get_device_name() if CUDA else "CPU", "gpu_gb": memory, "cuda": torch.version.cuda,
           "cpus": os.cpu_count(), "python": sys.version.split()[0], **versions}  # fmt: skip
    n = 64 if args.dry else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    yield {"product_tflops": 2 * n**3 / milliseconds(args, lambda: a @ b) / 1e9}

    trees = [(40, 150, 180, 220, 260, 90, 300), (70, 200, 240, 160, 330)] * 5  # a prompt and its responses, tokens
    segments, at = [], 0
    for n_prompt, *responses in [(5, 9, 12), (6, 7)] if args.dry else trees:
        first = at
        for n, n_before in (n_prompt, 0), *((n, n_prompt) for n in responses):
            segments.append((at, at + n, first, first + n_before))
            at += n
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, at, 64, device=DEVICE).bfloat16() for heads in (14, 2, 2))
    by = torch.randn(1, at, 14, 64, device=DEVICE).bfloat16()  # the output's gradient
    ways, right = [(loss.attend_by_segment, torch.float32), (loss.attend_by_segment, torch.bfloat16)], None
    for attend, dtype in ways + [(loss.attend_at_once, torch.bfloat16)] * CUDA:
        plan = loss.plan_attention(segments, DEVICE, dtype, attend)
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (query, key, value)]

        def forward(plan=plan, leaves=leaves):
            return loss.tree_attention(None, *leaves, None, scaling=1 / 8, plan=plan)[0]

        output = forward()
        grads = torch.autograd.grad(output, leaves, by.to(dtype))
        tensors = [x.detach().float() for x in (output, *grads)]
        right = right or tensors
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(tensors, right, strict=True)]
        with torch.no_grad():
            alone = milliseconds(args, forward)
        both = milliseconds(args, lambda: forward().sum().backward())
        yield {"attention": f"{attend.__name__}, {str(dtype).removeprefix('torch.')}", "tokens": at,
               "forward_ms": alone, "both_ms": both,
               **{f"error_of_{n}": e for n, e in zip(("output", "dq", "dk", "dv"), errors, strict=True)}}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# All of them, each in a process of its own


def work(args: argparse.Namespace) -> int:
    """Does what `args.worker` names, in this process: stdout gets what is found, as lines of JSON, stderr all else."""
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        try:
            for line in machine(args) if args.worker == "machine" else [result(args)]:
                print(json.dumps(line), file=stdout, flush=True)
        except Exception as error:
            traceback.print_exc()
            print(json.dumps({"failed": f"{type(error).__name__}: {error}"[:500]}), file=stdout, flush=True)
    return 0


def start(name: str, steps: int, args: argparse.Namespace) -> list[dict]:
    """What `work` found in a process of its own; {"failed": why} is the last of it if it did not end well."""
    words = ["--worker", name, "--steps", str(steps), "--scratch", args.scratch]
    environment = os.environ | {
        # Both help, and our script asks for them by itself; so TRL is given them, too.
        "THP_MEM_ALLOC_ENABLE": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "HF_DATASETS_CACHE": f"{args.scratch}/datasets", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error",
    }  # fmt: skip
    environment |= {"HF_HUB_OFFLINE": "1"} if Path(args.model or args.tokenizer).exists() else {}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if RUNS[name].on_cpu else {}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        command, left = [sys.executable, __file__, *sys.argv[1:], *words], args.deadline - time.time()
        try:
            code = subprocess.run(command, env=environment, stdout=out, timeout=left).returncode
            failed = [{"failed": f"exit status {code} (-9: killed, out of memory?)"}] if code else []
        except subprocess.TimeoutExpired:
            failed = [{"failed": "out of time"}]
        out.seek(0)
        lines = [json.loads(line) for line in out if line.startswith("{")]
        return [{"run": name} | line for line in lines + failed]


def compared(line: dict, before: list[dict]) -> dict:
    """With the difference of its losses from those of the first run that took the same steps, if there was one."""
    first = next((other for other in before if "takes" in line and other.get("takes") == line["takes"]), None)
    if first is None:
        return line
    off = max(abs(a - b) for a, b in zip(line["loss"], first["loss"], strict=True))
    # Adam's first steps have the gradient's sign: the least of them flip by rounding. In bf16 much else is rounded.
    tolerance = 1e-4 if line["mixed_precision"] == first["mixed_precision"] == "no" else 2e-2
    failed = {"failed": f"losses differ by more than {tolerance:.0e}"} if off > tolerance else {}
    return line | {"losses_differ_by": off} | failed


def print_table(lines: list[dict]) -> None:
    columns = {
        "seconds per step": "seconds_per_step", "pairs/s": "pairs_per_second", "tokens per pair": "tokens_per_pair",
        "with padding": "padded_per_pair", "as separate rows": "separate_per_pair", "TFLOP/s": "tflops",
        "of peak": "of_peak", "peak GB": "peak_gb", "losses differ by": "losses_differ_by",
    }  # fmt: skip
    print(f"\n| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for line in lines:
        if "pairs_per_second" in line:
            cells = [f"{line[name]:.3g}" if name in line else "" for name in columns.values()]
            print(f"| {line['run']} | {' | '.join(cells)} |")
    print("\n".join(["", *(f"{line['run']}: {line['failed']}" for line in lines if "failed" in line)]))


def read_words() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or local folder (default: the sample's; with --gpu random weights)")
    parser.add_argument("--data", default="coig-p", help="file that dpo_train.py reads; coig-p: generated")
    parser.add_argument("--pairs", type=int, help="in one step (default: 32; with --gpu 64)")
    parser.add_argument("--steps", type=int, help="of a run, the first one a warm-up (default: 3; with --gpu by part)")
    parser.add_argument("--max_length", type=int, help="tokens of prompt + response (default: 512; with --gpu 1024)")
    parser.add_argument("--micro_batch_tokens", type=int, help="of ours (default: the trainer's)")
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--fp32", action="store_true", help="float32 throughout (default: bf16 autocast)")
    parser.add_argument("--only", default=".*", help="regular expression: the runs, with --gpu the parts")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--gpu", action="store_true", help=f"its parts: {', '.join(PARTS)}")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--output", help="file to add what is found to, as lines of JSON")
    parser.add_argument("--seconds", type=float, help="for all runs together (default: no limit; with --gpu 480)")
    parser.add_argument("--tokenizer", default=str(SAMPLE), help="hub name or local folder, for the random weights")
    for name in ("worker", "scratch"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    least = 6 if args.gpu else 2  # so that some are timed, and the demo has two checkpoints
    if args.steps and args.steps < least and not args.worker:
        parser.error(f"--steps {args.steps}: must be {least} or above")
    if args.dry:
        args.pairs, args.max_length = 8, 64
    args.pairs = args.pairs or (64 if args.gpu else 32)
    args.max_length = args.max_length or (1024 if args.gpu else 512)
    args.deadline = time.time() + (args.seconds or (480 if args.gpu else math.inf))
    return args


def main() -> int:
    args = read_words()
    if args.worker:
        return work(args)
    parts = [part for name, part in (PARTS if args.gpu else TABLE).items() if re.fullmatch(args.only, name)]
    runs = [(name, args.steps or steps) for steps, names in parts for name in names]
    if importlib.util.find_spec("trl") is None:
        print("TRL isn't installed (`uv run --with trl tests/benchmark.py ...`): ours only", file=sys.stderr)
        runs = [(name, steps) for name, steps in runs if not RUNS[name].trl]
    lines = []
    with tempfile.TemporaryDirectory() as args.scratch, open(args.output or os.devnull, "a", encoding="utf-8") as file:
        for name, steps in runs:
            if args.pairs % max(1, RUNS[name].trl) == 0:
                for line in start(name, steps, args):
                    lines.append(compared(line, lines))
                    text = json.dumps(lines[-1], ensure_ascii=False)
                    print(text, flush=True)
                    print(text, file=file, flush=True)
    print_table(lines)
    return int(not lines or any("failed" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
