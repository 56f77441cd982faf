"""Pairs per second and peak memory: this trainer, the same with sharing off, and TRL, on the same token ids.

    uv run tests/benchmark.py                                                # ours only: the sample model, a smoke run
    uv run --with trl tests/benchmark.py --model Qwen/Qwen2.5-0.5B --pairs 32 --max_length 512
    uv run --with trl tests/benchmark.py --model PATH --data COIG-P.jsonl --only "ours|trl 2.*" --steps 4

Each line of the table is a process of its own (so that peaks of memory don't mix), started with the same environment.
All of them train on the same steps of the same pairs, every pair new, in the same order, with fused AdamW over float32
weights: our tokens are handed to TRL. The first step is a warm-up; speeds are over the others. Losses must agree.

What a GPU does with it, in eight minutes at most, without a network; random weights of Qwen2.5-0.5B's real size:

    uv run --with trl tests/benchmark.py --gpu --output results.jsonl        # a line as soon as it is known; a summary
    uv run tests/benchmark.py --gpu --only "core|more"                       # these parts
    uv run tests/benchmark.py --gpu --dry                                    # tiny, on a CPU: is every line in order?

`--data coig-p` writes pairs of COIG-P's shape (pairs and queries by domain: arXiv 2504.05535, table 2), of sentences
put together at random: good for speed and memory, meaningless for what a model learns.
"""

import argparse
import contextlib
import gc
import importlib.util
import io
import itertools
import json
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import dpo_train
import loss
from dataset import StepBatches, TreeCollator, UserError, load_rows, prepare

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "docs" / "sample" / "model"
COIG_P = {  # domain: (pairs, queries)
    "chat": (702_398, 37_323), "math": (155_872, 27_259), "logic": (54_617, 8_816),
    "novel": (34_483, 6_682), "role": (19_363, 4_930), "code": (40_213, 7_774),
}  # fmt: skip
RESPONSES, SCORE_GAP = 15, 2  # of a query; above which a pair is made
PROMPT_CHARACTERS, RESPONSE_CHARACTERS = (3.65, 0.8, 8, 200), (5.3, 1.05, 15, 900)  # log-normal: mean, sd; least, most
CHECKPOINTING = {"gradient_checkpointing": True}
CONFIGS = {
    "ours": {}, "ours checkpointing": CHECKPOINTING, "ours precomputed": {"precompute_ref_log_probs": True},
    "ours, sharing off": {"share": False},
}  # fmt: skip
for size in (1, 2, 4, 8, 16, 32):
    CONFIGS[f"trl {size}"] = {"micro_batch": size}
    CONFIGS[f"trl {size} checkpointing"] = {"micro_batch": size} | CHECKPOINTING
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


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


# ---------------------------------------------------------------------------------------------------------------------
# One training, ours


def our_flags(args: argparse.Namespace, **changes) -> dpo_train.Flags:
    words = {
        "model_name_or_path": args.model, "dataset_name": args.data, "max_length": args.max_length, "seed": args.seed,
        "max_train_samples": args.pairs * args.steps, "train_batch_size": args.pairs, "max_steps": args.steps,
        "max_eval_samples": 0, "learning_rate": args.learning_rate, "lr_scheduler_type": "constant", "warmup_ratio": 0,
        "save_steps": 0, "mixed_precision": "no" if args.fp32 else "bf16", "logging_steps": 1,
        "micro_batch_tokens": args.micro_batch_tokens, "output_dir": Path(tempfile.mkdtemp()) / "run", **changes,
    }  # fmt: skip
    return dpo_train.parse_flags([w for k, v in words.items() if v is not None for w in (f"--{k}", str(v))])


def arithmetic(model, n_tokens: float, n_scored: float, n_attended: float, passes: int = 4) -> float:
    """FLOPs that a step needs, which leaves out what is computed twice: the policy's forward and backward pass, which
    are three passes, and the reference's. Of tokens through the layers and, scored, through the LM head, and of
    (token, token that it sees)."""
    layers = sum(m.weight.numel() for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear))
    config, head = model.config, model.get_output_embeddings().weight.numel()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_hidden_layers * config.num_attention_heads * size
    return passes * (2 * layers * n_tokens + 2 * head * n_scored + 4 * width * n_attended)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


class Watch:
    """Stands in for `dpo_train.forward_backward`, with which each step begins. Counts; and from the beginning of one
    step to that of the next notes where the host waits (`waits`), profiles (`profiled`), or asks to stop (`stop`)."""

    def __init__(self, waits: int = 0, profiled: int = 0, stop: int = 0):
        self.original, self.waits, self.profiled, self.stop = dpo_train.forward_backward, waits, profiled, stop
        self.tokens, self.flops, self.n_micro_batches, self.found, self.at_end = [], [], 0, {}, []

    def __call__(self, batches, n_pairs, scorer, reference, *others):
        self.end()
        sizes = [size for _, plan in batches for size in zip(plan.n_queries, plan.n_keys, strict=True)]
        n_attended = sum(own * (seen - own) + own * own / 2 for own, seen in sizes)
        n_tokens, n_scored = (sum(t[name].numel() for t, _ in batches) for name in ("input_ids", "target_ids"))
        passes = 3 + isinstance(reference, dpo_train.ReferenceModel)
        self.tokens.append(n_tokens)
        self.flops.append(arithmetic(scorer.model, n_tokens, n_scored, n_attended, passes))
        self.n_micro_batches += len(batches)
        if len(self.tokens) == self.stop:
            signal.raise_signal(signal.SIGTERM)
        if len(self.tokens) == self.waits and CUDA:
            self.note_waits()
        if len(self.tokens) == self.profiled:
            self.profile()
        return self.original(batches, n_pairs, scorer, reference, *others)

    def end(self) -> None:
        while self.at_end:
            self.at_end.pop()()

    def note_waits(self) -> None:
        places, shown = self.found.setdefault("host_waits", {}), warnings.showwarning

        def see(message, *_, **__):
            if "called a synchronizing" in str(message):
                frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent == ROOT]
                place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else "?"
                places[place] = places.get(place, 0) + 1

        def end():
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = shown

        warnings.simplefilter("always")
        warnings.showwarning = see
        torch.cuda.set_sync_debug_mode("warn")
        self.at_end.append(end)

    def profile(self) -> None:
        kinds = torch.profiler.ProfilerActivity
        profiler = torch.profiler.profile(activities=[kinds.CUDA if CUDA else kinds.CPU])
        synchronize()
        profiler.start()
        started = time.perf_counter()

        def end():
            synchronize()
            seconds = time.perf_counter() - started
            profiler.stop()
            events, name = profiler.key_averages(), "self_device_time_total" if CUDA else "self_cpu_time_total"
            kernels = sorted(((getattr(e, name), e.count, e.key) for e in events if getattr(e, name) > 0), reverse=True)
            self.found |= {
                "profiled_step_seconds": seconds, "kernels_busy_seconds": sum(us for us, _, _ in kernels) / 1e6,
                "kernels_run": sum(count for _, count, _ in kernels), "profiled_tokens": self.tokens[self.profiled - 1],
                "kernels": [[round(us / 1e3, 2), count, key[:90]] for us, count, key in kernels[:15]],
            }  # fmt: skip

        self.at_end.append(end)


def logged(flags: dpo_train.Flags, watch: Watch, share: bool = True) -> list[dict]:
    """What a run logs, without its tables, its picture and, where no one reads it, its model."""
    changed = {"forward_backward": watch, "TreeCollator": partial(TreeCollator, share=share)}
    changed |= {"weights_hash": lambda _: "", "write_results": lambda _: []}
    changed |= {} if flags.demo else {"save_model": lambda *_: None}
    try:
        with mock.patch.multiple(dpo_train, **changed), contextlib.redirect_stdout(io.StringIO()):
            folder = dpo_train.train(flags)
    finally:
        watch.end()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if line]


def run_ours(args: argparse.Namespace, share: bool = True, watch: Watch | None = None, **changes) -> dict:
    watch = watch or Watch()
    start, *lines = logged(our_flags(args, **changes), watch, share)
    lines = [line for line in lines if "loss" in line]
    return {
        "seconds": [args.pairs / line["pairs_per_second"] for line in lines],
        "losses": [line["loss"] for line in lines], "grad_norm": lines[0]["grad_norm"],
        "tokens": sum(watch.tokens), "padded": sum(watch.tokens), "micro_batch_tokens": start["micro_batch_tokens"],
        "device": start["device"], **({"peak_gb": lines[-1]["peak_memory_gb"]} if CUDA else {}),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The table


def run_trl(args: argparse.Namespace, micro_batch: int, gradient_checkpointing: bool = False) -> dict:
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    def now() -> float:
        synchronize()
        return time.perf_counter()

    class Clock(TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, *_, **__):
            self.started = now()

        def on_step_end(self, *_, **__):
            self.seconds.append(now() - self.started)

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset  # our tokens

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    all_pairs = prepare(load_rows(args.data), tokenizer, args.max_length, args.pairs * args.steps, 0).train
    steps = StepBatches(all_pairs, None, args.pairs, args.seed)  # as our trainer takes them
    pairs = [
        {name: [int(token) for token in pair[name]] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        for step in range(args.steps) for pair in all_pairs.read(steps.indices(step))
    ]  # fmt: skip
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=micro_batch, max_steps=args.steps,
        gradient_accumulation_steps=args.pairs // micro_batch, max_length=None, bf16=not args.fp32,
        gradient_checkpointing=gradient_checkpointing, use_cpu=not CUDA, report_to="none",
        optim="adamw_torch_fused", logging_steps=1, beta=0.1,
        save_strategy="no", learning_rate=args.learning_rate, lr_scheduler_type="constant", warmup_steps=0,
        disable_tqdm=True, model_init_kwargs={"dtype": torch.float32, "attn_implementation": "sdpa"},
    )  # fmt: skip
    trainer = Trainer(
        model=args.model, args=config, train_dataset=Dataset.from_list(pairs), callbacks=[Clock()],
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    rows = [len(pair["prompt_ids"]) + len(pair[side]) for pair in pairs for side in ("chosen_ids", "rejected_ids")]
    forwards = [rows[i : i + 2 * micro_batch] for i in range(0, len(rows), 2 * micro_batch)]
    losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    padded = sum(len(one) * max(one) for one in forwards)
    return {"seconds": Clock.seconds, "losses": losses, "tokens": sum(rows), "padded": padded}


def child(args: argparse.Namespace, worker: str) -> list[str]:
    given = {name: value for name, value in vars(args).items() if value is not None and value is not False}
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    return [sys.executable, __file__, *words, f"--worker={worker}"]


def start(name: str, args: argparse.Namespace) -> dict:
    """A configuration in a process of its own; what it found, or {"failed": why}."""
    # Large pages in the CPU allocator help; our script asks for them by itself, so TRL is given them, too.
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(child(args, name), env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        why = "killed, out of memory?" if done.returncode == -9 else (done.stderr.strip().splitlines() or ["?"])[-1]
        return {"name": name, "failed": why}
    found = json.loads(lines[-1].removeprefix("RESULT "))
    return found | {"pairs_per_second": args.pairs * (args.steps - 1) / sum(found["seconds"][1:])}


def work(args: argparse.Namespace) -> None:
    found = (run_trl if args.worker.startswith("trl") else run_ours)(args, **CONFIGS[args.worker])
    peak = torch.cuda.max_memory_allocated() if CUDA else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("RESULT " + json.dumps({"peak_gb": peak / 1e9, "name": args.worker} | found), flush=True)


def table(args: argparse.Namespace) -> int:
    names = [name for name in CONFIGS if re.fullmatch(args.only, name)]
    names = [name for name in names if args.pairs % CONFIGS[name].get("micro_batch", 1) == 0]
    if importlib.util.find_spec("trl") is None:
        print("TRL isn't installed (`uv run --with trl tests/benchmark.py ...`): ours only", file=sys.stderr)
        names = [name for name in names if not name.startswith("trl")]
    results = []
    for name in names:
        results.append(start(name, args))
        print(*[f"{key} {results[-1].get(key)}" for key in ("name", "failed", "pairs_per_second")], file=sys.stderr)
    results = [found for found in results if "failed" not in found]
    if not results:
        return 1
    n, first, worst = args.pairs * args.steps, results[0], 0.0
    # Adam's first steps have the gradient's sign: the least of them flip by rounding. In bf16 much else is rounded.
    tolerance = 1e-4 if args.fp32 else 2e-2
    print("| | seconds a step | pairs/s | tokens a pair | with padding | peak GB | speed | loss differs by |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for found in results:
        off = max(abs(a - b) for a, b in zip(found["losses"], first["losses"], strict=True))
        worst = max(worst, off)
        seconds, ratio = args.pairs / found["pairs_per_second"], found["pairs_per_second"] / first["pairs_per_second"]
        print(
            f"| {found['name']} | {seconds:.2f} | {found['pairs_per_second']:.3f} | {found['tokens'] / n:.0f} "
            f"| {found['padded'] / n:.0f} | {found['peak_gb']:.2f} | {ratio:.2f} | {off:.1e} |"
        )
    print(f"\nlosses of the first: {' '.join(f'{loss:.6f}' for loss in first['losses'])}")
    if worst > tolerance:
        print(f"losses differ by {worst:.1e}, more than {tolerance:.0e}")
    return int(worst > tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# What a GPU does with it: parts, each in a process of its own


def note(args: argparse.Namespace, **line) -> None:
    """A result, as a line of JSON: into the file, and to stdout if none was asked for."""
    rounded = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in line.items()}
    text = json.dumps(rounded, ensure_ascii=False)
    with open(args.results, "a", encoding="utf-8") as file:
        file.write(text + "\n")
    if not args.output:
        print(text, flush=True)


@contextlib.contextmanager
def attempt(args: argparse.Namespace, **line):
    """What fails in here is noted, and costs only itself."""
    gc.collect()  # what is left of an earlier one
    if CUDA:
        torch.cuda.empty_cache()
    try:
        yield
    except UserError as error:  # what the trainer says, for example that the memory is too small
        note(args, **line, refused=str(error))
    except Exception as error:
        traceback.print_exc()
        note(args, **line, failed=f"{type(error).__name__}: {error}"[:500])


def milliseconds(args: argparse.Namespace, run) -> float:
    """The median of seven, after two warm-ups."""
    found = []
    for _ in range(3 if args.dry else 9):
        synchronize()
        started = time.perf_counter()
        run()
        synchronize()
        found.append(1e3 * (time.perf_counter() - started))
    return statistics.median(found[2:])


def product_tflops(args: argparse.Namespace) -> float:
    n = 64 if args.dry else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / milliseconds(args, lambda: a @ b) / 1e9


def prepare_inputs(args: argparse.Namespace) -> None:
    """A model of Qwen2.5-0.5B's size with random weights, and pairs of COIG-P's shape: made by the first who asks."""
    args.model, pairs = f"{args.scratch}/model", Path(args.scratch, "pairs.jsonl")
    args.data = str(pairs)
    if pairs.exists():
        return
    config = {
        "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32_768,
        "rope_theta": 1e6, "tie_word_embeddings": True,
    }  # fmt: skip
    if args.dry:
        config |= {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        config |= {"num_attention_heads": 4}
    torch.manual_seed(0)
    with DEVICE:
        Qwen2ForCausalLM(Qwen2Config(**config)).to(torch.bfloat16).save_pretrained(args.model)
    AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(args.model)
    write_coig_p_shaped(pairs, n_queries=20 if args.dry else 250)


def machine(args: argparse.Namespace) -> None:
    """What there is, what it can do at most, and the two attention kernels against each other."""
    found = {}
    for name in ("torch", "triton", "transformers", "accelerate", "datasets", "numpy", "trl"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if CUDA else None
    note(args, machine=torch.cuda.get_device_name() if CUDA else "CPU", gpu_gb=memory, cuda=torch.version.cuda,
         cpus=os.cpu_count(), python=sys.version.split()[0], **found)  # fmt: skip
    with attempt(args, machine="ceilings"):
        big, small = (torch.zeros(n, dtype=torch.uint8, device=DEVICE) for n in (1 << (20 if args.dry else 30), 1))
        note(args, machine="ceilings", product_tflops=product_tflops(args),
             copy_gb_s=2 * big.numel() / milliseconds(args, big.clone) / 1e6,
             microseconds_a_launch=milliseconds(args, lambda: [small.add_(1) for _ in range(1000)]))  # fmt: skip
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
        name = f"{attend.__name__}, {str(dtype).removeprefix('torch.')}"
        with attempt(args, attention=name):
            plan = loss.plan_attention(segments, DEVICE, dtype, attend)
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in (query, key, value)]

            def forward(plan=plan, leaves=leaves):
                return loss.tree_attention(None, *leaves, None, scaling=1 / 8, tree=plan)[0]

            output = forward()
            grads = torch.autograd.grad(output, leaves, by.to(dtype))
            tensors = [x.detach().float() for x in (output, *grads)]
            right = right or tensors
            errors = [((a - b).norm() / b.norm()).item() for a, b in zip(tensors, right, strict=True)]
            with torch.no_grad():
                alone = milliseconds(args, forward)
            both = milliseconds(args, lambda: forward().sum().backward())
            note(args, attention=name, tokens=at, forward_ms=alone, both_ms=both, **{
                f"error_of_{n}": e for n, e in zip(("output", "dq", "dk", "dv"), errors, strict=True)})  # fmt: skip


def demo(args: argparse.Namespace) -> None:
    """Steps of the demo, as a user starts it, against those of this machine's CPU; and stopped and resumed."""
    steps, folder, expected = 3 if args.dry else 10, Path(tempfile.mkdtemp()), None
    words = ["--demo", "--max_steps", str(steps), "--max_eval_samples", "0", "--save_steps", "0", "--output_dir"]

    def compare(name: str, lines: list[dict], **more) -> list[float]:
        losses = [line["loss"] for line in sorted(lines, key=lambda line: line["step"]) if "loss" in line]
        off = max(abs(a - b) for a, b in zip(losses, expected or losses, strict=True))
        note(args, demo=name, steps=len(losses), last_loss=losses[-1], off_the_cpu_by=off, **more)
        return losses

    running = {}
    for name, flag, more in ("CPU", "no", {"CUDA_VISIBLE_DEVICES": ""}), ("float32", "no", {}), ("bf16", "bf16", {}):
        command = [sys.executable, "dpo_train.py", *words, str(folder / name), "--mixed_precision", flag]
        to = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        running[name] = subprocess.Popen(command, cwd=ROOT, env=os.environ | more, **to)
    for name, process in running.items():
        with attempt(args, demo=name):
            error = process.communicate()[1]
            if process.returncode:
                raise RuntimeError(error[-400:])
            losses = compare(name, [json.loads(line) for line in (folder / name / "metrics.jsonl").open()])
            expected = expected or losses
    with attempt(args, demo="stopped and resumed"):
        flags = dpo_train.parse_flags([*words, str(folder / "resumed")])
        with contextlib.suppress(dpo_train.Stopped):
            logged(flags, Watch(stop=steps // 2))
        flags.resume_from_checkpoint = "latest"
        lines = logged(flags, Watch())
        compare("stopped and resumed", lines, at=[line["step"] for line in lines if line.get("event") == "resumed"])


PEAKS = {"H100": 989, "H200": 989, "H800": 989, "A100": 312, "A800": 312, "4090": 165, "5090": 210}  # bf16 TFLOP/s


def measured(args: argparse.Namespace, name: str, pairs=64, steps=8, share=True, watch=None, **changes) -> None:
    """A run of ours: speeds over the steps that are neither the first one nor watched."""
    if args.dry:
        pairs, steps, changes = 4, 4, {name: min(value, 512) for name, value in changes.items()}
    args = argparse.Namespace(**vars(args) | {"pairs": pairs, "steps": steps})
    with attempt(args, run=name):
        watch, started = Watch(**watch or {}), time.time()
        found = run_ours(args, share, watch, **changes)
        timed = [i for i in range(1, steps) if i + 1 not in (watch.waits, watch.profiled)]
        seconds, n_tokens, flops = (sum(of[i] for i in timed) for of in (found["seconds"], watch.tokens, watch.flops))
        if "profiled_tokens" in watch.found:
            watch.found["step_seconds"] = watch.found.pop("profiled_tokens") * seconds / n_tokens
        known = next((peak for card, peak in PEAKS.items() if CUDA and card in torch.cuda.get_device_name()), None)
        note(
            args, run=name, pairs_per_second=pairs * len(timed) / seconds, tokens_per_second=n_tokens / seconds,
            tflop_a_pair=flops / 1e12 / pairs / len(timed), tflops=flops / 1e12 / seconds,
            mfu=flops / 1e12 / seconds / (known or product_tflops(args)),
            mfu_of=f"{known} TFLOP/s, the card's peak" if known else "the measured product",
            peak_gb=found.get("peak_gb"), micro_batch_tokens=found["micro_batch_tokens"], device=found["device"],
            micro_batches_a_step=watch.n_micro_batches / steps, tokens_a_pair=found["tokens"] / pairs / steps,
            grad_norm=found["grad_norm"], loss=found["losses"][-1], seconds_in_all=time.time() - started, **watch.found,
        )  # fmt: skip


def core(args: argparse.Namespace) -> None:
    """What a user gets: the defaults at full size."""
    prepare_inputs(args)
    measured(args, "defaults", steps=20, watch={"profiled": 2, "waits": 3} if args.dry else {"profiled": 5, "waits": 8})


def more(args: argparse.Namespace) -> None:
    prepare_inputs(args)
    for n_tokens, pairs in (8192, 64), (32_768, 256), (16_384, 256):
        measured(args, f"{n_tokens} tokens, {pairs} pairs a step", pairs=pairs, micro_batch_tokens=n_tokens)
    measured(args, "checkpointing", **CHECKPOINTING)
    with mock.patch.object(dpo_train, "attend_at_once", loss.attend_by_segment):
        measured(args, "segments, not the kernel")
    measured(args, "precomputed", precompute_ref_log_probs=True)
    measured(args, "sharing off", share=False)
    for size, flags in ((24, {}), (16, {}), (12, CHECKPOINTING), (32, {}), (12, {}))[: 1 if args.dry else 5]:
        if CUDA:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, size * 2**30 / total))
        measured(args, f"in {size} GiB" + ", checkpointing" * bool(flags), steps=4, **flags)


def trl(args: argparse.Namespace) -> None:
    """On the same pairs, both with and without checkpointing, TRL's micro-batches of 8 pairs, 16,384 tokens at most."""
    prepare_inputs(args)
    args.steps, n = 3 if args.dry else 5, min(8, args.pairs)
    names = ["ours", f"trl {n} checkpointing", "ours checkpointing", f"trl {n}"]
    if importlib.util.find_spec("trl") is None:
        note(args, table="TRL isn't installed: ours only")
        names = names[:1]
    for name in names:
        note(args, table=name, **start(name, args))


def fused_norm(module, hidden: torch.Tensor) -> torch.Tensor:
    """RMSNorm by torch's own kernel, cast once for all products that read it."""
    kind, scale = hidden.device.type, module.weight
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        return torch.nn.functional.rms_norm(hidden.float(), scale.shape, scale, module.variance_epsilon).to(dtype)


def variants(args: argparse.Namespace) -> None:
    """What single changes would bring: tiles of the LM head, alone; a whole run with another RMSNorm."""
    prepare_inputs(args)
    width, n_words, sizes = (64, 4096, (8,)) if args.dry else (896, 151_936, (7600, 15_000))
    for n, tile in itertools.product(sizes, (2048, 4096, 8192, 16_384)):
        with attempt(args, head=f"{n} tokens, tiles of {tile}"), mock.patch.object(loss, "TILE_WORDS", tile):
            leaves = [torch.randn(size, width, device=DEVICE, requires_grad=True) for size in (n, n_words)]
            targets, grad = torch.randint(n_words, (n,), device=DEVICE), torch.randn(n, device=DEVICE)
            forward = partial(loss.TokenLogps.apply, *leaves, targets, torch.bfloat16)
            with torch.no_grad():
                alone = milliseconds(args, forward)
            both = milliseconds(args, lambda run=forward, by=grad: run().backward(by))
            note(args, head=f"{n} tokens, tiles of {tile}", forward_ms=alone, both_ms=both)
            del leaves, forward
    measured(args, "as it is")
    with mock.patch.object(Qwen2RMSNorm, "forward", fused_norm):
        measured(args, "a fused RMSNorm")


PARTS = {machine: 40, demo: 70, core: 70, more: 120, trl: 120, variants: 60}  # in this order: seconds at most


def gpu(args: argparse.Namespace) -> int:
    started, args.results = time.time(), args.output or f"{args.scratch}/results.jsonl"
    environment = os.environ | {"HF_HOME": f"{args.scratch}/hf", "HF_HUB_OFFLINE": "1", "TMPDIR": args.scratch}
    environment |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    for part, limit in PARTS.items():
        began, name, rc = time.time(), part.__name__, "no time was left"
        limit = min(limit * (10 if args.dry else 1), args.seconds - (began - started))
        if re.fullmatch(args.only, name):
            if limit > 10:
                process = subprocess.Popen(child(args, name), env=environment, start_new_session=True)
                try:
                    rc = process.wait(limit)
                except subprocess.TimeoutExpired:
                    rc = "out of time"
                    os.killpg(process.pid, signal.SIGKILL)  # its own children, too
                    process.wait()
            note(args, part=name, seconds=time.time() - began, **({"failed": rc} if rc else {}))
    lines = [json.loads(line) for line in Path(args.results).read_text(encoding="utf-8").splitlines()]
    print("\nin short:")
    for line in lines:
        long = ("kernels", "losses", "seconds", "padded", "name", "loss", "seconds_in_all", "device", "mfu_of", "cpus")
        short = {key: value for key, value in line.items() if value is not None and ("part" in line or key not in long)}
        print(json.dumps(short, ensure_ascii=False).replace('"', "")[1:-1][:400])
    return int(any("failed" in line for line in lines))


# ---------------------------------------------------------------------------------------------------------------------


def read_words(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SAMPLE), help="hub name or local folder")
    parser.add_argument("--data", default="coig-p", help="file that dpo_train.py reads; coig-p: generated")
    parser.add_argument("--pairs", type=int, help="in one step (default: 32; on a GPU 64)")
    parser.add_argument("--steps", type=int, default=3, help="the first one is a warm-up")
    parser.add_argument("--max_length", type=int, help="tokens of prompt + response (default: 512; on a GPU 1024)")
    parser.add_argument("--micro_batch_tokens", type=int, help="of ours (default: the trainer's)")
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--fp32", action="store_true", help="float32 throughout (default: bf16 autocast)")
    parser.add_argument("--only", default=".*", help="regular expression: the configurations, or parts, to run")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--gpu", action="store_true", help=f"its parts: {', '.join(part.__name__ for part in PARTS)}")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--output", help="file for the results of --gpu")
    parser.add_argument("--seconds", type=float, default=480, help="for all of --gpu")
    parser.add_argument("--tokenizer", default=str(SAMPLE), help="folder, for --gpu")
    for name in ("worker", "scratch", "results"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.dry:
        args.pairs, args.max_length, args.fp32 = 4, 64, True  # some CPUs take seconds for what is bf16
    args.pairs = args.pairs or (64 if args.gpu else 32)
    args.max_length = args.max_length or (1024 if args.gpu else 512)
    return args


def main() -> int:
    args = read_words()
    if args.worker:
        {part.__name__: part for part in PARTS}.get(args.worker, work)(args)
        return 0
    with tempfile.TemporaryDirectory() as args.scratch:
        if args.gpu:
            return gpu(args)
        if args.data == "coig-p":
            args.data = f"{args.scratch}/pairs.jsonl"
            write_coig_p_shaped(Path(args.data), n_queries=max(100, args.pairs * args.steps // 5))
        return table(args)


if __name__ == "__main__":
    sys.exit(main())
