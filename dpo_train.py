"""Direct Preference Optimization (arXiv 2305.18290) of a causal language model, in one script.

    python dpo_train.py --demo                                   # the bundled small model and data
    python dpo_train.py                                          # Qwen2.5-0.5B on COIG-P, one GPU
    accelerate launch dpo_train.py --output_dir output/dpo       # several GPUs
    python dpo_train.py --output_dir output/dpo --resume_from_checkpoint latest

Read `train` first, at the end: one run from top to bottom. `dataset.py` makes the micro-batches, `loss.py` has the
formulas, `plot_loss.py` makes the picture and the report from what was logged, and writes files whole or not at all.
"""

import contextlib
import copy
import hashlib
import json
import math
import os
import resource
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # micro-batches differ in shape
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages on CPUs; torch reads it once, at its first allocation
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else tokenizers warn of each process that datasets forks

import accelerate
import datasets
import numpy as np
import pandas as pd
import psutil
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from accelerate.utils.memory import should_reduce_batch_size as is_out_of_memory
from safetensors import SafetensorError
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedModel

from dataset import (
    MicroBatch,
    Pairs,
    PreparedData,
    StepBatches,
    TreeCollator,
    UserError,
    first_line,
    load_rows,
    prepare,
)
from loss import LOSSES, ResponseScorer, TreePlan, attend_at_once, attend_by_segment, autocast, dpo_loss, plan_attention
from plot_loss import PlotError, complete_or_absent, remove, write_results

SAMPLE = Path(__file__).resolve().parent / "docs" / "sample"

# ---------------------------------------------------------------------------------------------------------------------
# Flags


def flag(default: Any, text: str, **more) -> Any:
    return field(default=default, metadata={"help": text, **more})


# What a flag's value must be, beside its type: a test, and the words for its failure.
def above(least: float) -> tuple[Callable, str]:
    return lambda value: least < value < math.inf, f"must be above {least}"


def at_least(least: float) -> tuple[Callable, str]:
    return lambda value: least <= value < math.inf, f"must be {least} or above"


def from_0_to_below(end: float) -> tuple[Callable, str]:
    return lambda value: 0 <= value < end, f"must be from 0 to below {end}"


@dataclass
class Flags:
    """Mostly named as in transformers' TrainingArguments and TRL's DPOConfig; the README lists what is not."""

    # models and data
    model_name_or_path: str = flag("Qwen/Qwen2.5-0.5B", "the policy's start: hub name or local folder")
    ref_model_name_or_path: str | None = flag(None, "the frozen reference; None: the policy's start")
    dataset_name: str = flag("m-a-p/COIG-P", "hub name, local folder (git clone), or .parquet, .json, .jsonl file")
    dataset_split: str = flag("train", "split of a hub data set or folder")
    domains: str | None = flag(None, "only these values of the column `domain`, e.g. chat,math; None: all")
    max_length: Annotated[int, at_least(16)] = flag(1024, "tokens of prompt + response; longer pairs are cut")
    max_train_samples: Annotated[int | None, above(0)] = flag(None, "train on this many pairs at most; None: all")
    eval_dataset_name: str | None = flag(None, "hold out these pairs (file, or split train of a folder) instead")
    max_eval_samples: Annotated[int, at_least(0)] = flag(
        512, "hold out this many pairs at most, by prompt, and at most a tenth of the prompts; 0: none"
    )
    output_dir: str | None = flag(None, "where everything is written; None: output/dpo, or the next free output/dpo-N")
    # loss
    beta: Annotated[float, above(0)] = flag(0.1, "how strongly the policy is held to the reference; higher: moves less")
    loss_type: str = flag("sigmoid", "the loss, see loss.py; sigmoid is the DPO paper's", choices=list(LOSSES))
    label_smoothing: Annotated[float, from_0_to_below(0.5)] = flag(0.0, "assumed share of pairs with swapped labels")
    sft_weight: Annotated[float, at_least(0)] = flag(
        0.0, "adds this many times the chosen response's negative log-likelihood per token"
    )
    # steps and optimizer
    train_batch_size: Annotated[int, above(0)] = flag(64, "pairs in one optimizer step, over all processes")
    micro_batch_tokens: Annotated[int | None, above(0)] = flag(
        None, "tokens in one forward pass of one process: sets the memory, not the result; None: what fits is found"
    )
    group_by_prompt: bool = flag(True, "a prompt's pairs side by side, so mostly in one step: fast; false: spread out")
    learning_rate: Annotated[float, at_least(0)] = flag(1e-6, "peak learning rate of AdamW")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = flag("cosine", "schedule")
    warmup_ratio: Annotated[float, from_0_to_below(1)] = flag(0.1, "share of the steps in which the rate rises from 0")
    warmup_steps: Annotated[int, at_least(0)] = flag(0, "the same in steps; overrides the ratio if above 0")
    weight_decay: Annotated[float, at_least(0)] = flag(0.0, "of AdamW; norms and biases are spared")
    max_grad_norm: Annotated[float, at_least(0)] = flag(1.0, "gradients are clipped to this norm; 0: not clipped")
    num_train_epochs: Annotated[float, above(0)] = flag(1.0, "passes over the pairs")
    max_steps: Annotated[int, at_least(-1)] = flag(-1, "stop after this many steps; overrides the epochs if above 0")
    seed: Annotated[int, from_0_to_below(2**32)] = flag(42, "of the order of the pairs")
    # computing
    mixed_precision: Literal["bf16", "no"] = flag("bf16", "bf16 autocast over float32 weights, or float32 throughout")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, slower")
    precompute_ref_log_probs: bool = flag(False, "one pass with the reference before training, then no second model")
    # logs and checkpoints
    logging_steps: Annotated[int, above(0)] = flag(10, "write metrics every this many steps (step 1 always)")
    eval_steps: Annotated[int, at_least(0)] = flag(500, "evaluate every this many steps; 0: only at start and end")
    save_steps: Annotated[int, at_least(0)] = flag(1000, "write a checkpoint every this many steps; 0: none")
    save_total_limit: Annotated[int, above(0)] = flag(2, "checkpoints to keep")
    resume_from_checkpoint: str | None = flag(None, "`latest` (of --output_dir), or the newest checkpoint's folder")
    report_to: str = flag("none", "also log to tensorboard, wandb, swanlab, mlflow ...: whatever accelerate knows")
    # other
    eval_only: bool = flag(False, "train nothing: compare --model_name_or_path with --ref_model_name_or_path")
    max_new_tokens: Annotated[int, at_least(0)] = flag(128, "length of the answers shown before and after; 0: none")
    demo: bool = flag(False, "train the bundled small model on bundled pairs: no network, two minutes on a CPU")


DEMO = {
    "model_name_or_path": str(SAMPLE / "model"), "dataset_name": str(SAMPLE / "pairs.jsonl"), "learning_rate": 2e-4,
    "train_batch_size": 32, "max_length": 256, "mixed_precision": "no", "logging_steps": 1, "eval_steps": 20,
    "save_steps": 50, "max_new_tokens": 64,
}  # fmt: skip
PATHS = (
    "model_name_or_path", "ref_model_name_or_path", "dataset_name", "eval_dataset_name", "output_dir",
    "resume_from_checkpoint",
)  # fmt: skip
# What a resumed run may change; all other flags must be as before.
MAY_CHANGE_ON_RESUME = {
    # What these select is compared instead, by hashes of weights and tokens.
    *PATHS, "dataset_split", "domains", "max_length", "max_train_samples", "max_eval_samples",
    # These don't change what is trained.
    "micro_batch_tokens", "gradient_checkpointing", "precompute_ref_log_probs", "logging_steps", "eval_steps",
    "save_steps", "save_total_limit", "report_to", "eval_only", "max_new_tokens", "demo",
}  # fmt: skip


class OneLineParser(HfArgumentParser):
    def error(self, message):  # argparse prints forty lines of usage first
        raise UserError(f"{message} (--help lists the flags; the README has TRL's names beside ours)")


def parse_flags(argv: Sequence[str]) -> Flags:
    """Flags from the command line; `--demo` changes defaults, so that flags given beside it still hold.

    Raises UserError for values that can't be meant, before anything is loaded.
    """
    parser = OneLineParser(Flags, prog="dpo_train.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)
    flags = Flags(**vars(parser.parse_args(argv)))
    for name in PATHS:
        if getattr(flags, name) == "":
            raise UserError(f"--{name} is empty")
        setattr(flags, name, getattr(flags, name) and os.path.expanduser(getattr(flags, name)))
    for name, hint in get_type_hints(Flags, include_extras=True).items():
        for holds, rule in getattr(hint, "__metadata__", ()):
            if getattr(flags, name) is not None and not holds(getattr(flags, name)):
                raise UserError(f"--{name} {getattr(flags, name)}: {rule}")
    refuse_what_does_not_fit_together(flags)
    return flags


def refuse_what_does_not_fit_together(flags: Flags) -> None:
    least, resumes = 2 * flags.max_length, flags.resume_from_checkpoint
    trackers = ["none", *map(str, accelerate.tracking.get_available_trackers())]
    rules = [
        ("label_smoothing", flags.label_smoothing and flags.loss_type not in ("sigmoid", "robust"),
         "for sigmoid and robust only"),
        ("max_steps", flags.max_steps == 0, "must be above 0, or -1 for all"),
        ("warmup_steps", flags.warmup_steps and flags.lr_scheduler_type == "constant",
         "--lr_scheduler_type constant has no warm-up, constant_with_warmup has"),
        ("warmup_steps", 0 < flags.max_steps <= flags.warmup_steps, "must be below --max_steps"),
        ("micro_batch_tokens", flags.micro_batch_tokens and flags.micro_batch_tokens < least,
         f"must be at least {least}, twice --max_length: a pair's two responses stay together"),
        ("eval_only", flags.eval_only and not (flags.ref_model_name_or_path and flags.max_eval_samples),
         "needs --ref_model_name_or_path, the model to compare with, and --max_eval_samples above 0"),
        ("eval_dataset_name", flags.eval_dataset_name and not flags.max_eval_samples,
         "needs --max_eval_samples above 0"),
        ("resume_from_checkpoint", resumes and flags.eval_only, "--eval_only trains nothing"),
        ("precompute_ref_log_probs", flags.precompute_ref_log_probs and flags.eval_only, "--eval_only needs no table"),
        ("resume_from_checkpoint", resumes == "latest" and not flags.output_dir, "needs --output_dir"),
        ("report_to", flags.report_to not in trackers,
         f"not installed (there is: {', '.join(trackers)}): pip install it"),
    ]  # fmt: skip
    for name, is_wrong, rule in rules:
        if is_wrong:
            raise UserError(f"--{name} {getattr(flags, name)}: {rule}")


def without_folders(flags: Flags) -> dict[str, Any]:
    """All flags, for logs that may be shown to others: of local paths only the last part."""
    shown = asdict(flags)
    return shown | {name: Path(shown[name]).name for name in PATHS if shown[name] and Path(shown[name]).exists()}


# ---------------------------------------------------------------------------------------------------------------------
# Models


def load(kind: type, flag_name: str, name: str, **options) -> Any:
    """`kind.from_pretrained(name)`; if that fails, one line that says what to do."""
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{flag_name} {name}: there is no such folder")
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # dozens of types, from the hub, from config files, from weights
        remedy = "expected config.json, the tokenizer's files, and whole .safetensors files (after `git lfs pull`)"
        if not Path(name).exists():
            remedy = "set HF_ENDPOINT to a mirror of the hub, or give a local folder (git clone), or try `--demo`; "
            remedy += "without a network, HF_HUB_OFFLINE=1 takes what was downloaded before, at once"
        raise UserError(f"{flag_name} {name} can't be loaded ({first_line(error)}): {remedy}") from None


def load_model(name: str, flags: Flags, flag_name: str = "--model_name_or_path") -> PreTrainedModel:
    """A causal LM in float32, without dropout. In bf16, as they are stored, weights would round most updates away.

    Raises UserError if it can't be loaded, or if some weights are missing, which would then be random.
    """
    if (Path(name) / "adapter_config.json").exists():
        raise UserError(f"{flag_name} {name} is a LoRA adapter: merge it into its model first, with peft")
    if getattr(load(AutoConfig, flag_name, name), "quantization_config", None):
        raise UserError(f"{flag_name} {name} is quantized: take the model as it was before, in bf16 or float32")
    model, report = load(
        AutoModelForCausalLM, flag_name, name, dtype=torch.float32, attn_implementation="tree",
        use_safetensors=True, output_loading_info=True,  # safetensors: a pickle could run code
    )  # fmt: skip
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{flag_name} {name}: {len(missing)} of its weights are missing in its files: {missing[0]} ...")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    if flags.gradient_checkpointing:  # acts in training mode only; older transformers know only the second name
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    return model.eval()


def freeze(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Freeze the reference. What autocast would cast anew for each micro-batch is cast once, to the same values."""
    model.requires_grad_(False)
    for module in model.get_decoder().modules():
        if isinstance(module, torch.nn.Linear):
            module.to(dtype)


def weights_hash(model: torch.nn.Module) -> str:
    """A hash of names, shapes and values of all weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_vocabulary(model: PreTrainedModel, own_tokenizer, tokenizer, flag_name: str, name: str) -> None:
    """Raises UserError if the ids of the policy's tokenizer are not this model's."""
    own = own_tokenizer.get_vocab()
    differ = [token for token, number in tokenizer.get_vocab().items() if own.get(token, number) != number]
    if differ:
        raise UserError(f"{flag_name} {name}: {len(differ)} tokens have other ids than in the policy, as {differ[0]!r}")
    if model.get_output_embeddings().weight.shape[0] < len(tokenizer):
        raise UserError(f"{flag_name} {name}: its vocabulary is smaller than that of the policy's tokenizer")


class Compute(NamedTuple):
    """How this process computes, among the others. Of what is called here, only `attend` depends on the device."""

    accelerator: Accelerator
    dtype: torch.dtype  # of matrix products and attention
    attend: Callable  # `attend_at_once` or `attend_by_segment` of loss.py

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def to_device(self, batch: MicroBatch) -> tuple[dict[str, torch.Tensor], TreePlan]:
        """A micro-batch on the device, as `ResponseScorer` takes it."""
        tensors = {name: tensor.to(self.device) for name, tensor in batch.tensors.items()}
        return tensors, plan_attention(batch.segments, self.device, self.dtype, self.attend)


# ---------------------------------------------------------------------------------------------------------------------
# The check of a model before it trains


def probe_pair(pairs: Pairs, length: int) -> dict:
    """A pair of `length` tokens: the first one, its responses cut, its prompt cut or repeated."""
    (pair,) = pairs.read([0])
    chosen, rejected = pair["chosen_ids"][: length // 4], pair["rejected_ids"][-(length // 4) :]
    prompt = np.resize(pair["prompt_ids"], length - max(len(chosen), len(rejected)))
    return {"index": 0, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def logps_by_rows(pair: dict, model: PreTrainedModel, compute: Compute) -> torch.Tensor:
    """[2] log-probabilities of the pair's responses by the model's own logits, one row at a time."""
    logps = []
    for name in ("chosen_ids", "rejected_ids"):
        n = len(pair[name])
        row = torch.from_numpy(np.r_[pair["prompt_ids"], pair[name]].astype(np.int64))[None].to(compute.device)
        with autocast(compute.device, compute.dtype):
            logits = model(input_ids=row, use_cache=False, logits_to_keep=n + 1).logits[0, :-1].float()
        logps.append(logits.log_softmax(-1).gather(1, row[0, -n:, None]).sum())
    return torch.stack(logps)


def logps_by_tree(pair: dict, model: PreTrainedModel, compute: Compute) -> torch.Tensor:
    """[2] log-probabilities of the pair's responses as in training."""
    (batch,) = TreeCollator(micro_batch_tokens=10**9)([pair])
    tensors, plan = compute.to_device(batch)
    return per_pair(ResponseScorer(model, compute.dtype)(tensors, plan), tensors)[0]


def relative_error(values: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest |a - b| / |b| of these tensors; nan if one is."""
    errors = [(a - b).norm() / b.norm().clamp(min=1e-30) for a, b in zip(values, expected, strict=True)]
    return float(torch.stack(errors).max())


def gradients(logps_of: Callable, pair: dict, model: PreTrainedModel, compute: Compute) -> Sequence[torch.Tensor]:
    """Gradients of the pair's summed log-probabilities, for the embedding, one matrix of each kind from the middle of
    the model, and the last weight."""
    weights = list(model.parameters())
    matrices = [weight for weight in weights if weight.dim() > 1]
    middle = len(matrices) // 2
    some = [matrices[0], *matrices[middle : middle + 7], weights[-1]]
    return torch.autograd.grad(logps_of(pair, model, compute).sum(), some, materialize_grads=True)


class Probed(NamedTuple):
    """What is compared. Gradients take more memory, so they are of a short pair."""

    logps: torch.Tensor  # [2] of the long pair, in nats
    gradients: Sequence[torch.Tensor]  # of the short pair


def probe(logps_of: Callable, short: dict, long: dict, model: PreTrainedModel, compute: Compute) -> Probed:
    with torch.no_grad():
        logps = logps_of(long, model, compute).double()
    return Probed(logps, gradients(logps_of, short, model, compute))


def fault_of_tree(
    short: dict, long: dict, model: PreTrainedModel, tested: Compute, own: Probed, rounding: float
) -> str | None:
    """What is wrong over a token tree, computed as `tested` says, in comparison with plain rows; None if nothing is.

    In 16 bits, gradients may be off by a few times `rounding`, the error that 16 bits cause in plain rows.
    """
    try:
        found = probe(logps_by_tree, short, long, model, tested)
    except Exception as error:  # whatever a model's or a kernel's forward or backward pass raises
        if is_out_of_memory(error):
            raise
        return first_line(error)
    share_of_logp, nats, share_of_gradient = 2e-5, 1e-2, 1e-3
    if tested.dtype != torch.float32:
        share_of_logp, nats, share_of_gradient = 5e-3, 0.5, 0.02 + 3 * rounding
    if not torch.allclose(found.logps, own.logps, rtol=share_of_logp, atol=nats):
        texts = [", ".join(f"{value:.3f}" for value in values) for values in (found.logps, own.logps)]
        return f"log-probabilities over shared prompts ({texts[0]}) differ from its own ({texts[1]})"
    error = relative_error(found.gradients, own.gradients)
    if not error <= share_of_gradient:  # also if it is nan
        return f"gradients over shared prompts are {error:.1%} off its own"
    return None


def check_model(model: PreTrainedModel, pairs: Pairs, compute: Compute, max_length: int, say: Callable) -> Compute:
    """Check that a token tree gives the log-probabilities and gradients that plain rows give.

    Rows go through the model's own logits and its "eager" attention, in float32. A tree gives others if the model has
    another kind of attention, or if its logits are more than LM head times hidden states.

    Returns `compute`; where the kernel for GPUs is wrong, with `attend_by_segment`, and a warning. Raises UserError for
    a model that can't be trained here.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or max_length
    if positions < max_length:
        raise UserError(f"--max_length {max_length}: {model.name_or_path} has only {positions} positions")
    short = probe_pair(pairs, min(max_length, 512))  # several tiles of an attention kernel
    long = probe_pair(pairs, max_length)
    exact = compute._replace(dtype=torch.float32, attend=attend_by_segment)
    try:
        model.set_attn_implementation("eager")
        own, rounding = probe(logps_by_rows, short, long, model, exact), 0.0
        if compute.dtype != exact.dtype:
            rounding = relative_error(gradients(logps_by_rows, short, model, compute), own.gradients)
        model.set_attn_implementation("tree")
        fault = fault_of_tree(short, long, model, exact, own, rounding)
    except Exception as error:  # of a model that can't be run row by row either
        if is_out_of_memory(error):
            raise
        fault = first_line(error)
    if not fault and compute != exact:  # the tree as in training; then without the kernel
        fault = fault_of_tree(short, long, model, compute, own, rounding)
        if fault and compute.attend is attend_at_once:
            say(f"warning: FlashAttention can't be used ({fault}): attention goes segment by segment, which is slower")
            compute = compute._replace(attend=attend_by_segment)
            fault = fault_of_tree(short, long, model, compute, own, rounding)
    if fault:
        raise UserError(
            f"{type(model).__name__} can't be trained here: {fault}. What works are decoders with plain attention, "
            "such as Qwen2, Qwen3, Llama or Mistral, dense or as mixture of experts"
        )
    return compute


# ---------------------------------------------------------------------------------------------------------------------
# The micro-batch that fits


def preferred_tokens(compute: Compute, flags: Flags) -> int:
    """--micro_batch_tokens, or a number beyond which nothing gets faster."""
    return flags.micro_batch_tokens or max(2 * flags.max_length, 16_384 if compute.device.type == "cuda" else 2048)


def find_micro_batch_tokens(
    policy: PreTrainedModel, reference: PreTrainedModel | None, compute: Compute, flags: Flags
) -> int:
    """The tokens of a micro-batch that fits into memory, the same in all processes.

    Tries the preferred number, then 10% fewer each time, down to 2 * max_length, the longest pair. A given
    --micro_batch_tokens is tried, and never lowered. So memory runs out here, if at all, and hardly ever later.
    Raises UserError, with what would help.
    """
    most, least = preferred_tokens(compute, flags), flags.micro_batch_tokens or 2 * flags.max_length
    sizes = [size for i in range(40) if (size := int(most * 0.9**i)) > least] + [least]
    found = next((size for size in sizes if fits(size, policy, reference, compute, flags.max_length)), 0)
    found = int(compute.accelerator.gather(torch.tensor([found], device=compute.device)).min())
    if not found:
        raise UserError(
            f"the memory is too small for {least:,} tokens in a micro-batch: try --gradient_checkpointing true, "
            "--precompute_ref_log_probs true, a smaller --max_length (or --micro_batch_tokens) or a larger GPU"
        )
    return found


def fits(
    n_tokens: int, policy: PreTrainedModel, reference: PreTrainedModel | None, compute: Compute, max_length: int
) -> bool:
    """Whether memory holds a full micro-batch's forward and backward pass beside all that training keeps there."""
    is_cpu = compute.device.type == "cpu"
    try:
        with memory_limited_to_what_is_free() if is_cpu else contextlib.nullcontext():
            rehearse(n_tokens, policy, reference, compute, max_length)
        result = True
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
        result = False
    policy.zero_grad()  # after the handler: inside it, the error still holds the tensors
    clear_device_cache(garbage_collection=True)
    return result


@contextlib.contextmanager
def memory_limited_to_what_is_free() -> Iterator[None]:
    """On Linux: inside, memory that is not there raises, as on a GPU. Else the system would kill the run."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if sys.platform == "linux":
        limit = psutil.Process().memory_info().data + psutil.virtual_memory().available
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def rehearse(
    n_tokens: int, policy: PreTrainedModel, reference: PreTrainedModel | None, compute: Compute, max_length: int
) -> None:
    """Forward and backward of a full micro-batch, with gradients in place and room taken for AdamW and DDP's buckets.

    It is one tree: a prompt of half the length that a pair may have, and as many responses, all different, as fit.
    """
    n_prompt = max_length // 2
    n_pairs = math.ceil((n_tokens - n_prompt) / (2 * (max_length - n_prompt)))
    responses = np.zeros((2 * n_pairs, (n_tokens - n_prompt) // (2 * n_pairs)), dtype=np.int64)
    # Two ids that no two responses share, so that none is merged.
    responses[:, 0], responses[:, 1] = np.divmod(np.arange(2 * n_pairs), 64)
    prompt = np.zeros(n_prompt, dtype=np.int64)
    pairs = [{"index": i, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
             for i, (chosen, rejected) in enumerate(responses.reshape(n_pairs, 2, -1))]  # fmt: skip
    (batch,) = TreeCollator(n_tokens)(pairs)

    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    n_more = 2 if compute.accelerator.num_processes == 1 else 3  # AdamW's two moments; DDP's copy of the gradients
    room = torch.empty(n_more * sum(weight.numel() for weight in weights), device=compute.device)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    tensors, plan = compute.to_device(batch)
    logps = ResponseScorer(policy.train(), compute.dtype)(tensors, plan)
    if reference is not None:
        with torch.no_grad():
            ResponseScorer(reference, compute.dtype)(tensors, plan)
    (logps.sum() * 0.0).backward()
    del room


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities and metrics of pairs


def is_higher(values: torch.Tensor) -> torch.Tensor:
    """[P] of [P, 2]: 1 where the chosen response has the higher value, 0 where the rejected one has it, else 1/2."""
    return 0.5 + 0.5 * torch.sign(values[:, 0] - values[:, 1])


class Measured(NamedTuple):
    """What METRICS are made of, without gradients; of P pairs, [P, 2] with the chosen response first."""

    losses: torch.Tensor  # [P]
    logps: torch.Tensor  # under the policy, in nats
    rewards: torch.Tensor  # in nats
    lengths: torch.Tensor  # in tokens


# What is logged, as means over pairs. Names are TRL's where it has them. To add a metric, add a line: it is in the log
# and, with its standard error, in evaluations and in the report.
METRICS: dict[str, Callable[[Measured], torch.Tensor]] = {
    "loss": lambda of: of.losses,
    "rewards/chosen": lambda of: of.rewards[:, 0],
    "rewards/rejected": lambda of: of.rewards[:, 1],
    "rewards/margins": lambda of: of.rewards[:, 0] - of.rewards[:, 1],
    "rewards/accuracies": lambda of: is_higher(of.rewards),
    "logps/chosen": lambda of: of.logps[:, 0],
    "logps/rejected": lambda of: of.logps[:, 1],
    "logps/accuracies": lambda of: is_higher(of.logps),
    "nll_loss": lambda of: -of.logps[:, 0] / of.lengths[:, 0],
    "lengths/chosen": lambda of: of.lengths[:, 0],
    "lengths/rejected": lambda of: of.lengths[:, 1],
    "lengths/accuracies": lambda of: is_higher(of.lengths),  # of "the longer one is better"
}


def per_pair(values: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """[M] of responses to [P, 2] of pairs, chosen first."""
    return torch.stack([values[tensors["chosen_index"]], values[tensors["rejected_index"]]], dim=1)


def losses_and_metrics(logps: torch.Tensor, ref_logps: torch.Tensor, tensors: dict, flags: Flags):
    """Losses [P] and, without gradient, the K METRICS [P, K], from log-probabilities [P, 2] in nats, chosen first."""
    lengths = per_pair(tensors["response_lengths"], tensors)  # [P, 2]
    losses, *rewards = dpo_loss(
        *logps.unbind(1), *ref_logps.unbind(1), *lengths.unbind(1),
        flags.beta, flags.label_smoothing, flags.loss_type, flags.sft_weight,
    )  # fmt: skip
    measured = Measured(losses.detach(), logps.detach(), torch.stack(rewards, dim=1), lengths)
    return losses, torch.stack([metric(measured).double() for metric in METRICS.values()], dim=1)


def all_batches(pairs: Pairs, collate: TreeCollator, compute: Compute, title: str) -> Iterator[tuple[dict, TreePlan]]:
    """This process's micro-batches of all pairs, on its device; all processes get equally many.

    A prompt's pairs come together, in chunks of 256.
    """
    rank, n_processes = compute.accelerator.process_index, compute.accelerator.num_processes
    order = np.argsort(pairs.keys, kind="stable")
    starts = range(0, len(pairs), 256)
    for start in tqdm(starts, title, leave=False, disable=rank > 0 or not sys.stderr.isatty()):
        for batch in collate(pairs.read(order[start : start + 256]), n_processes)[rank::n_processes]:
            yield compute.to_device(batch)


# ---------------------------------------------------------------------------------------------------------------------
# The reference: a function from a micro-batch to log pi_ref(y|x) of its pairs, [P, 2] in nats, chosen first


@torch.no_grad()
def reference_from_model(scorer: ResponseScorer, tensors: dict[str, torch.Tensor], plan: TreePlan) -> torch.Tensor:
    """By the frozen model, beside the policy."""
    return per_pair(scorer(tensors, plan), tensors)


def reference_from_table(logps: torch.Tensor, tensors: dict[str, torch.Tensor], plan: TreePlan) -> torch.Tensor:
    """From a table of all pairs, [n, 2]."""
    return logps[tensors["pair_index"]]


def reference_tables(
    path: Path, belongs_to: dict, sets: Sequence[Pairs], reference: Callable, n_tokens: int, compute: Compute
) -> list[torch.Tensor]:
    """A table for each of these sets, from the file if it belongs to this run, else computed once and written there."""
    saved = {}
    with contextlib.suppress(Exception):  # no file, or what is no whole file
        saved = torch.load(path, map_location=compute.device, weights_only=True)
    if all(gather_object([saved.get("belongs_to") == belongs_to])):  # in all processes, which may have several disks
        return saved["logps"]
    tables = []
    for pairs in sets:
        logps = torch.zeros(len(pairs), 2, dtype=torch.float64, device=compute.device)
        for tensors, plan in all_batches(pairs, TreeCollator(n_tokens), compute, "Reference"):
            logps[tensors["pair_index"]] = reference(tensors, plan)
        tables.append(compute.accelerator.reduce(logps, "sum"))
    if compute.accelerator.is_main_process:
        with written(path), complete_or_absent(path) as aside:
            torch.save({"belongs_to": belongs_to, "logps": tables}, aside)
    return tables


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(
    scorer: ResponseScorer, reference: Callable, pairs: Pairs, collate: TreeCollator, compute: Compute, flags: Flags
) -> dict[str, Any]:
    """Held-out metrics of this model: of all pairs, by domain, and by which response is the longer one.

    The same for any number of processes and any cut into micro-batches. Empty if no pairs are held out.
    """
    if not len(pairs):
        return {}
    scorer.eval()
    table = torch.zeros(len(pairs), len(METRICS), dtype=torch.float64, device=compute.device)
    for tensors, plan in all_batches(pairs, collate, compute, "Evaluating"):
        logps = per_pair(scorer(tensors, plan), tensors)
        _, metrics = losses_and_metrics(logps, reference(tensors, plan), tensors, flags)
        table[tensors["pair_index"]] = metrics
    scorer.train()
    table = compute.accelerator.reduce(table, "sum").cpu().numpy()
    longer_one = table[:, list(METRICS).index("lengths/accuracies")]
    groups = {
        "domains": {str(name): pairs.domains == name for name in sorted(set(pairs.domains)) if name},
        "lengths": {"chosen longer": longer_one == 1, "chosen shorter": longer_one == 0},
    }
    record = {f"eval_{name}": value for name, value in summarize(table, pairs.keys).items()}
    for group, parts in groups.items():
        record[group] = {name: summarize(table[rows], pairs.keys[rows]) for name, rows in parts.items() if rows.any()}
    return record


def summarize(table: np.ndarray, keys: np.ndarray) -> dict[str, Any]:
    """Means and standard errors of the METRICS of n pairs [n, K], whose prompts have these keys [n].

    The standard error is over prompts, since a prompt's pairs are not independent.
    """
    prompts, prompt = np.unique(keys, return_inverse=True)
    summary = {"pairs": len(keys), "prompts": len(prompts)}
    for name, values in zip(METRICS, table.T, strict=True):
        mean = float(values.mean())
        sum_of_prompt = np.bincount(prompt, values - mean)
        summary |= {name: mean, f"{name}_se": float(np.sqrt((sum_of_prompt**2).sum()) / len(keys))}
    return summary


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel, tokenizer, data: PreparedData, compute: Compute, flags: Flags
) -> dict[str, list[dict]]:
    """What the model answers to six prompts, of different domains as far as there are so many: greedy, one at a time.

    `repetition` is the share of the answer's 4-grams of tokens that stood in it before; `stopped`, whether it ended its
    turn by itself.
    """
    pairs, end_ids = data.held_out, data.end_ids
    if not (len(pairs) and flags.max_new_tokens and compute.accelerator.is_main_process):
        return {}
    prompts = pd.DataFrame({"prompt": pairs.keys, "domain": pairs.domains}).drop_duplicates("prompt")
    # Each domain's first prompt, then each one's second ...
    by_round = prompts.groupby("domain").cumcount().sort_values(kind="stable")
    # The model's own generation config may ask for penalties or for sampling; a copy of the model, not of its weights,
    # has another one.
    greedy, records = copy.copy(model.eval()), []
    greedy.generation_config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=end_ids, pad_token_id=end_ids[0], max_new_tokens=flags.max_new_tokens
    )
    for pair in pairs.read(sorted(by_round.index[:6])):
        prompt = torch.tensor(np.asarray(pair["prompt_ids"]), dtype=torch.long, device=compute.device)[None]
        with autocast(compute.device, compute.dtype):
            output = greedy.generate(prompt, attention_mask=torch.ones_like(prompt))
        ids = output[0, prompt.shape[1] :].tolist()
        grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
        records.append(
            {
                "domain": str(pairs.domains[pair["index"]]),
                "prompt": tokenizer.decode(prompt[0], skip_special_tokens=True).strip(),
                "answer": tokenizer.decode(ids, skip_special_tokens=True),
                "chosen": tokenizer.decode(pair["chosen_ids"], skip_special_tokens=True),
                "n_tokens": len(ids),
                "stopped": not {*end_ids}.isdisjoint(ids),
                "repetition": (len(grams) - len(set(grams))) / max(1, len(grams)),
            }
        )
    model.train()
    return {"answers": records}


# ---------------------------------------------------------------------------------------------------------------------
# One step, and what there is to say about it


def forward_backward(
    batches: Sequence[tuple[dict, TreePlan]], n_pairs: int, scorer: torch.nn.Module, reference: Callable,
    compute: Compute, flags: Flags,
) -> torch.Tensor:  # fmt: skip
    """The gradients of one step's loss: the mean over exactly the step's `n_pairs` pairs, however they are cut.

    `batches` are this process's micro-batches of the step; `n_pairs` counts the pairs of all processes.

    Returns sums of this process: [K + 2], of the METRICS, then of pairs and of tokens.
    """
    accelerator = compute.accelerator
    sums = torch.zeros(len(METRICS) + 2, dtype=torch.float64, device=compute.device)
    for number, (tensors, plan) in enumerate(batches, start=1):
        with contextlib.nullcontext() if number == len(batches) else accelerator.no_sync(scorer):
            logps = per_pair(scorer(tensors, plan), tensors)  # [P, 2]
            losses, metrics = losses_and_metrics(logps, reference(tensors, plan), tensors, flags)  # [P], [P, K]
            # DDP averages the gradients over the processes; the loss is a mean over the pairs of all of them.
            (losses.sum() * (accelerator.num_processes / n_pairs)).backward()
        sums[:-2] += metrics.sum(0)
        sums[-2] += len(losses)
        sums[-1] += tensors["input_ids"].numel() if len(losses) else 0  # fillers don't count
    return sums


def sum_over_processes(sums: torch.Tensor, grad_norm: torch.Tensor, is_asked_to_stop: bool, accelerator: Accelerator):
    """As numbers: the sums of all processes, the norm of the gradient, and whether any process was asked to stop.

    Here, at the latest, the host waits for the step's results.
    """
    asked = sums.new_tensor([is_asked_to_stop])
    *sums, asked = accelerator.reduce(torch.cat([sums, asked]), "sum").tolist()
    return sums, grad_norm.item(), asked > 0


@dataclass
class Window:
    """What has happened since the last log line, over all processes; plain numbers, which checkpoints can hold."""

    sums: list[float] = field(default_factory=lambda: [0.0] * (len(METRICS) + 2))  # of METRICS, of pairs, of tokens
    seconds: float = 0.0  # in steps, so without evaluations and checkpoints
    skipped: int = 0
    skipped_in_a_row: int = 0

    def add(self, sums: list[float]) -> None:
        self.sums = [old + new for old, new in zip(self.sums, sums, strict=True)]
        self.skipped_in_a_row = 0

    def skip(self, step: int, rows: Sequence[int]) -> str:
        """Count a step whose gradient is not finite; returns what to say about it.

        Raises UserError after five in a row.
        """
        self.skipped += 1
        self.skipped_in_a_row += 1
        text = f"the loss or its gradient at step {step} is not finite (rows {sorted(map(int, rows))} of the data)"
        if self.skipped_in_a_row < 5:
            return f"{text}: the step was skipped, and later ones are counted in skipped_steps"
        raise UserError(
            f"{text}, the fifth in a row; none has changed the weights. Look at the rows, lower --learning_rate or try "
            "--mixed_precision no: in a new run, which may start from a checkpoint's folder as --model_name_or_path, "
            "with --ref_model_name_or_path as it was"
        )

    def read(self) -> dict[str, Any]:
        """Means over the pairs and rates; then begin anew."""
        *totals, n_pairs, n_tokens = self.sums
        line = {name: total / n_pairs if n_pairs else None for name, total in zip(METRICS, totals, strict=True)}
        line |= {"pairs_per_second": n_pairs / self.seconds, "tokens_per_second": n_tokens / self.seconds}
        line |= {"skipped_steps": self.skipped}
        self.sums, self.seconds, self.skipped = [0.0] * len(self.sums), 0.0, 0
        return line


def loss_at_start(flags: Flags, nll_loss: float = 0.0) -> float:
    """The loss where policy and reference agree: ln 2 for sigmoid, and the SFT term, for this `nll_loss`."""
    zero, one = torch.zeros(1), torch.ones(1)
    losses, *_ = dpo_loss(zero, zero, zero, zero, one, one, flags.beta, flags.label_smoothing, flags.loss_type)
    return losses.item() + flags.sft_weight * nll_loss


def check_first_step(line: dict[str, Any], flags: Flags) -> None:
    """Where policy and reference are the same model, each reward is 0 and the loss known. UserError if it isn't so."""
    tolerance = 10 * flags.beta * (1e-3 if flags.mixed_precision == "no" else 0.05)
    if line["loss"] is not None and max(abs(line["rewards/chosen"]), abs(line["rewards/rejected"])) > tolerance:
        expected = loss_at_start(flags, line["nll_loss"])
        raise UserError(
            f"the loss at the first step is {line['loss']:.4f} and not {expected:.4f}, though policy and reference "
            f"have the same weights (rewards {line['rewards/chosen']:.4f}, {line['rewards/rejected']:.4f}): they must "
            "compute in the same precision and without dropout"
        )


def warnings_about(line: dict[str, Any], flags: Flags, warmup_steps: int) -> Iterator[tuple[str, str]]:
    """What a log line gives reason to warn of: (name, text)."""
    if line["loss"] is None:  # all steps were skipped
        return
    if line["step"] >= 10 and abs(line["rewards/margins"]) < 2e-4:
        why = f"--learning_rate {flags.learning_rate} hardly moves the log-probabilities; try ten times as much"
        if flags.learning_rate == 0:
            why = "--learning_rate is 0"
        elif line["step"] <= warmup_steps:
            why = f"the learning rate is still rising, until step {warmup_steps} (--warmup_ratio, --warmup_steps)"
        elif line["grad_norm"] == 0:
            why = "the gradients are 0"
        elif flags.beta < 0.01:
            why = f"--beta {flags.beta} is so small that the rewards, beta times log-ratio, hardly differ"
        yield why, f"the loss stays where it began, at {loss_at_start(flags, line['nll_loss']):.4f}: {why}"
    sunk = -line["rewards/chosen"] / flags.beta / line["lengths/chosen"]
    if sunk > 0.1:
        text = f"the chosen responses have become less likely than under the reference, by {sunk:.2f} nats per token"
        text += " (more than 0.1): DPO raises only the margin. --sft_weight 0.1, a lower --learning_rate, fewer steps "
        yield "sinking", text + "or a higher --beta help"


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder, its checkpoints and its log


@contextlib.contextmanager
def written(path: Path):
    """What is done inside writes there. Raises UserError if that fails: for a full disk each library has its own error,
    and transformers refuses to write a generation config that contradicts itself."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} can't be written ({first_line(error)})") from None


def output_dir_of(flags: Flags) -> Path | None:
    """The run's folder, if flags say which. Raises UserError if it holds another run, or can't be written to."""
    resume = flags.resume_from_checkpoint
    if resume in (None, "latest"):
        folder = Path(flags.output_dir) if flags.output_dir else None
    else:
        folder = Path(resume).parent
        if flags.output_dir and Path(flags.output_dir).resolve() != folder.resolve():
            raise UserError(f"--output_dir {flags.output_dir}: {resume} isn't in it; a run goes on in its own folder")
    if folder is None:
        return None
    used = ("metrics.jsonl", "report.md", "model.safetensors")
    if not resume and (find_checkpoints(folder) or any((folder / name).exists() for name in used)):
        raise UserError(f"--output_dir {folder} holds another run: give another, or --resume_from_checkpoint latest")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"--output_dir {folder} can't be written to")
    return folder


def make_output_dir(folder: Path | None, flags: Flags) -> Path:
    """The folder, if flags say which; else output/dpo (or demo, eval), output/dpo-2 ..., made here, so that a run that
    starts at the same moment can't take it.

    By now flags, data and models are read: a run that fails at these leaves no empty folder.
    """
    if folder is not None:
        with written(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder
    name = "eval" if flags.eval_only else "demo" if flags.demo else "dpo"
    for folder in [Path("output", name if n == 1 else f"{name}-{n}") for n in range(1, 1000)]:
        with written(folder), contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise UserError(f"output/{name}-999 is taken, too: give an --output_dir")


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def read_checkpoint(folder: Path, belongs_to: dict[str, Any], wanted: str) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint in this folder, from which a run goes on, and its state.

    Raises UserError if there is none, if another one is wanted, if it is damaged, or another run's.
    """
    there = find_checkpoints(folder)
    if not there:
        raise UserError(f"--resume_from_checkpoint {wanted}: there is no checkpoint in {folder}")
    newest, folders = there[0], [path.resolve() for path in there]
    if wanted != "latest" and Path(wanted).resolve() != folders[0]:
        why = f"{newest} is newer; take `latest`, or remove what is newer"
        if Path(wanted).resolve() not in folders:
            why = f"is no checkpoint; the newest in {folder} is {newest.name}"
        raise UserError(f"--resume_from_checkpoint {wanted}: {why}")
    try:
        state = torch.load(newest / "state.pt", map_location="cpu", weights_only=True)
        before = state["belongs_to"]
    except Exception as error:  # whatever a file that is no archive makes torch raise
        text = f"{newest} is no whole checkpoint of this trainer ({first_line(error)})"
        raise UserError(f"{text}: remove it if the disk was full then; `latest` is the one before") from None
    for name in belongs_to | before:  # in a fixed order, the hashes first
        if before.get(name) != belongs_to.get(name):
            hint = " (the file, the tokenizer, --max_length, --max_*_samples or --domains)" * (name == "data")
            values = f"{name}{hint} was {before.get(name)} and is {belongs_to.get(name)} now"
            raise UserError(f"{newest} belongs to another run: {values}")
    return newest, state


def save_model(model: PreTrainedModel, tokenizer, end_ids: list[int], folder: Path) -> None:
    """What `from_pretrained` needs. The generation config names the end-of-turn token: that is where to stop."""
    eos = [token for token in dict.fromkeys([*end_ids, tokenizer.eos_token_id]) if token is not None]
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = eos[-1] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # says how to sample and not to: transformers loads that, but does not write it
        model.generation_config.do_sample = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_checkpoint(folder: Path, state: dict, save: Callable, limit: int, log: "Log") -> None:
    """A checkpoint is complete or absent. A disk that is full costs the checkpoint, not the run."""
    final = folder / f"checkpoint-{state['step']}"
    try:
        with written(final), complete_or_absent(final) as aside:
            save(aside)
            torch.save(state, aside / "state.pt")
    except UserError as error:
        last = next((str(path) for path in find_checkpoints(folder)), "none")
        log.say(f"warning: no checkpoint at step {state['step']}: {error}; the last one: {last}")
    for old in find_checkpoints(folder)[limit:]:
        remove(old)


class Log:
    """metrics.jsonl, trackers, progress bar and printed lines of a run: all in the main process."""

    def __init__(self, folder: Path, accelerator: Accelerator, flags: Flags, step: int, total_steps: int):
        self.path, self.accelerator, self.flags = folder / "metrics.jsonl", accelerator, flags
        self.total_steps, self.warned = total_steps, set()
        if flags.report_to != "none":  # in the project "dpo", or as WANDB_PROJECT, SWANLAB_PROJECT ... says
            config = {name: str(value) if value is None else value for name, value in without_folders(flags).items()}
            accelerator.project_configuration.logging_dir = str(folder)
            accelerator.init_trackers(os.environ.get(f"{flags.report_to.upper()}_PROJECT", "dpo"), config)
        self.bar = tqdm(
            total=total_steps, initial=step, disable=not (accelerator.is_main_process and sys.stderr.isatty()),
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )  # fmt: skip

    def say(self, text: str) -> None:
        self.bar.clear()
        with contextlib.suppress(OSError):  # a closed terminal, a pipe whose reader is gone: no reason to stop
            self.accelerator.print(text)

    def warn(self, name: str, text: str) -> None:
        """Say it, once in a run."""
        if name not in self.warned:
            self.warned.add(name)
            self.say(f"warning: {text}")

    def write(self, record: dict[str, Any]) -> None:
        """Append a record. A resumed run appends, too; readers drop records of steps after the one it goes on from."""
        if not self.accelerator.is_main_process:
            return
        text = json.dumps(record | {"time": round(time.time(), 3)}, ensure_ascii=False) + "\n"
        try:
            with self.path.open("ab+") as file:
                if file.tell() and record.get("event") == "resumed":
                    text = "\n" + text  # the last line may be torn
                file.write(text.encode(errors="backslashreplace"))
        except OSError as error:  # a full disk: training is worth more than its log
            self.warn("metrics", f"{self.path} can't be written to ({first_line(error)})")
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
        self.accelerator.log(numbers, step=record["step"])

    def start(self, facts: dict[str, Any]) -> None:
        shown = {"loss_at_start": loss_at_start(self.flags), "flags": without_folders(self.flags)}
        self.write({"event": "start", "step": 0} | shown | facts)

    def training(self, line: dict[str, Any]) -> None:
        self.write(line)
        if line["loss"] is not None:  # else all steps were skipped
            text = f"loss {line['loss']:.4f}  acc {line['rewards/accuracies']:.2f}"
            text += f"  {line['pairs_per_second']:.2f} pairs/s"
            self.bar.set_postfix_str(text)
            if self.bar.disable:
                more = f"margin {line['rewards/margins']:.3f}  lr {line['learning_rate']:.2e}"
                self.say(f"step {line['step']}/{self.total_steps}  {text}  {more}")

    def evaluation(self, step: int, epoch: float, record: dict[str, Any]) -> None:
        if not record:  # nothing is held out
            return
        self.write({"event": "eval", "step": step, "epoch": epoch} | record)
        by_reward, by_logp = record["eval_rewards/accuracies"], record["eval_logps/accuracies"]
        text = f"loss {record['eval_loss']:.4f}  acc {by_reward:.3f} by reward, {by_logp:.3f} by logp"
        self.say(f"step {step}, held out: {text}  margin {record['eval_rewards/margins']:.3f}")

    def end(self, step: int) -> None:
        """The last record; then the picture and the report, and what they say in short."""
        self.write({"event": "end", "step": step})
        if self.accelerator.is_main_process:
            try:
                self.say("\n".join(["", *write_results(self.path.parent)]))
            except (PlotError, ImportError) as error:
                self.say(f"warning: no report: {error}")


class StopSignals:
    """Notes Ctrl-C, SIGTERM and a closed terminal, so that the run can stop between two steps; a second one ends the
    process."""

    def __init__(self, is_main: bool):
        self.caught, self.is_main = False, is_main
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
            numbers.append(signal.SIGHUP)
        self.handlers = {number: signal.signal(number, self.note) for number in numbers}

    def restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        self.caught = True
        signal.signal(number, signal.SIG_DFL)
        if self.is_main:
            with contextlib.suppress(OSError, RuntimeError):  # a closed terminal; another print that is just writing
                print("\nstopping after this step, with a checkpoint (again: exit at once)", file=sys.stderr)


class Stopped(UserError):
    """Ended on request; only the main process reports it."""


# ---------------------------------------------------------------------------------------------------------------------
# One run


def start_accelerator(flags: Flags) -> Accelerator:
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise UserError(f"{name} is not supported, only one process or DDP: `accelerate launch --multi_gpu`")
    # Containers that ask for TF32 would make the check of the model refuse a sound one.
    torch.set_float32_matmul_precision("highest")
    accelerate.utils.set_seed(flags.seed)
    try:
        return Accelerator(
            log_with=None if flags.report_to == "none" else flags.report_to,
            project_dir=".",  # some trackers want one now; where they write is set below
            mixed_precision="no",  # ours is in `ResponseScorer`, whatever the environment says
            # Otherwise accelerate would not connect several processes on CPUs, and would take a Mac's GPU, which has no
            # float64.
            cpu=not torch.cuda.is_available(),
            # `accelerate config` may have left both in the environment, to divide gradients and to compile the model.
            gradient_accumulation_plugin=accelerate.utils.GradientAccumulationPlugin(num_steps=1),
            dynamo_backend="no",
            kwargs_handlers=[
                accelerate.DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                # The others wait while the first process tokenizes a million rows: longer than NCCL's 10 minutes.
                accelerate.InitProcessGroupKwargs(timeout=timedelta(hours=3)),
            ],
        )
    except ValueError as error:
        raise UserError(f"accelerate can't start with these flags: {first_line(error)}") from None


def load_data(flags: Flags, tokenizer) -> PreparedData:
    """The pairs to train on and to hold out, as the flags select them."""
    held_out_rows = flags.eval_dataset_name and load_rows(flags.eval_dataset_name, flag="--eval_dataset_name")
    if flags.eval_only and flags.eval_dataset_name:  # no others are needed
        rows = held_out_rows.select([])
    else:
        rows = load_rows(flags.dataset_name, flags.dataset_split)
    return prepare(
        rows, tokenizer, flags.max_length, 0 if flags.eval_only else flags.max_train_samples, flags.max_eval_samples,
        flags.domains.split(",") if flags.domains else None, held_out_rows,
    )  # fmt: skip


def count_steps(n_pairs: int, flags: Flags) -> tuple[int, int]:
    """How many steps the run has, and in how many of them the learning rate rises."""
    if flags.eval_only:
        return 0, 0
    per_epoch = math.ceil(n_pairs / flags.train_batch_size)
    total = max(1, math.ceil(round(flags.num_train_epochs * per_epoch, 6)))  # 1.1 * 100 is a little more than 110
    if flags.max_steps > 0:
        total = flags.max_steps
    if flags.warmup_steps >= total:
        raise UserError(f"--warmup_steps {flags.warmup_steps}: the run has only {total} steps")
    if flags.lr_scheduler_type == "constant":
        return total, 0
    return total, flags.warmup_steps or min(math.ceil(flags.warmup_ratio * total), total - 1)


def facts_of(flags: Flags, data: PreparedData, compute: Compute, steps: str) -> dict[str, Any]:
    """For the header, the log and the report."""
    shown = without_folders(flags)
    return {
        "model": shown["model_name_or_path"],
        "reference": shown["ref_model_name_or_path"] or "the same, frozen",
        "data": data.summary(),
        "steps": steps,
        "device": f"{torch.cuda.get_device_name() if compute.device.type == 'cuda' else 'CPU'}, "
                  f"{compute.attend.__name__.replace('_', ' ')}",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }  # fmt: skip


def header(facts: dict[str, str], flags: Flags, tokenizer, pair: dict) -> str:
    """The facts, the flags that were given, and the first pair, as the model sees it."""
    given = {name: value for name, value in asdict(flags).items() if value != getattr(Flags(), name)}
    lines = facts | {"flags": " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in given.items())}
    lines |= {name: repr(tokenizer.decode(pair[f"{name}_ids"]))[-140:] for name in ("prompt", "chosen", "rejected")}
    return "\n".join(f"{name:10}{text}" for name, text in lines.items())


def train(flags: Flags) -> Path:
    """One run, from flags to files; returns the output folder."""
    # 1. This process among the others, how it computes, and the run's folder
    accelerator = start_accelerator(flags)
    device, is_main, say = accelerator.device, accelerator.is_main_process, accelerator.print
    dtype = {"bf16": torch.bfloat16, "no": torch.float32}[flags.mixed_precision]
    has_kernel = device.type == "cuda" and dtype.itemsize == 2  # FlashAttention, on a GPU, in 16 bits
    compute = Compute(accelerator, dtype, attend_at_once if has_kernel else attend_by_segment)
    folder = output_dir_of(flags)
    if device.type == "cpu" and not flags.demo:
        hint = "; on most CPUs --mixed_precision no is several times as fast" * (dtype != torch.float32)
        say(f"warning: torch {torch.__version__} sees no GPU (is the driver too old for it?): the CPU computes{hint}")

    # 2. Rows to token ids, split by prompt; the steps that this makes
    tokenizer = load(AutoTokenizer, "--model_name_or_path", flags.model_name_or_path)
    with accelerator.local_main_process_first():
        data = load_data(flags, tokenizer)
    any_pairs = data.train if len(data.train) else data.held_out
    total_steps, warmup_steps = count_steps(len(data.train), flags)

    # 3. The policy as it starts, and the reference, which is the same unless another one is given; both are checked
    policy = load_model(flags.model_name_or_path, flags).to(device)
    check_vocabulary(policy, tokenizer, tokenizer, "--model_name_or_path", flags.model_name_or_path)  # only its size
    compute = check_model(policy, any_pairs, compute, flags.max_length, say)
    start_hash = ref_hash = weights_hash(policy)
    if flags.ref_model_name_or_path in (None, flags.model_name_or_path):
        ref_model = copy.deepcopy(policy)  # the start, also when resuming: a checkpoint is loaded in room 7
    else:
        ref_model = load_model(flags.ref_model_name_or_path, flags, "--ref_model_name_or_path").to(device)
        ref_tokenizer = load(AutoTokenizer, "--ref_model_name_or_path", flags.ref_model_name_or_path)
        check_vocabulary(ref_model, ref_tokenizer, tokenizer, "--ref_model_name_or_path", flags.ref_model_name_or_path)
        compute = check_model(ref_model, any_pairs, compute, flags.max_length, say)
        ref_hash = weights_hash(ref_model)

    # 4. The checkpoint to go on from, if any, which must belong to this run; the run's folder
    belongs_to = {"policy's start (hash)": start_hash, "reference (hash)": ref_hash}
    belongs_to |= {"data": f"{data.train.fingerprint} {data.held_out.fingerprint}"}
    settings = {"metrics": ", ".join(METRICS)}
    settings |= {f"--{name}": value for name, value in asdict(flags).items() if name not in MAY_CHANGE_ON_RESUME}
    checkpoint, state = None, {"step": 0}
    if flags.resume_from_checkpoint:
        checkpoint, state = read_checkpoint(folder, belongs_to | settings, flags.resume_from_checkpoint)
    (folder,) = accelerate.utils.broadcast_object_list([make_output_dir(folder, flags) if is_main else None])

    # 5. The reference: the model beside the policy, or a table, and the model goes
    freeze(ref_model, dtype)
    train_reference = eval_reference = partial(reference_from_model, ResponseScorer(ref_model, dtype))
    if flags.precompute_ref_log_probs:
        tables = reference_tables(
            folder / "reference.pt", belongs_to | {"--mixed_precision": flags.mixed_precision},
            (data.train, data.held_out), train_reference, preferred_tokens(compute, flags), compute,
        )  # fmt: skip
        train_reference, eval_reference = (partial(reference_from_table, table) for table in tables)
        ref_model = None

    # 6. The micro-batches of each step, as large as fits
    micro_batch_tokens = preferred_tokens(compute, flags)
    if not flags.eval_only:
        micro_batch_tokens = find_micro_batch_tokens(policy, ref_model, compute, flags)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    collate = TreeCollator(micro_batch_tokens)
    rank, n_processes = accelerator.process_index, accelerator.num_processes
    steps = StepBatches(
        data.train, collate, flags.train_batch_size, flags.seed, flags.group_by_prompt, rank, n_processes
    )

    # 7. The policy and what else changes from step to step, as they are at the start or in the checkpoint
    if checkpoint is not None:
        policy = load_model(str(checkpoint), flags, "--resume_from_checkpoint").to(device)
    transformers.logging.disable_progress_bar()  # its bars while saving would break ours
    scorer = ResponseScorer(policy.train(), dtype)
    ddp_scorer = accelerator.prepare(scorer)  # with several processes, inside DDP
    matrices, vectors = ([w for w in policy.parameters() if (w.dim() > 1) == is_matrix] for is_matrix in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": flags.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=flags.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True,
    )  # fmt: skip
    # Not prepared: a prepared scheduler steps once per process, and the learning rate would fall N times too fast.
    scheduler = transformers.get_scheduler(flags.lr_scheduler_type, optimizer, warmup_steps, total_steps)
    step, window = state["step"], Window(**state.get("window", {}))
    if checkpoint is not None:
        optimizer.load_state_dict(state.pop("optimizer"))
        scheduler.load_state_dict(state.pop("scheduler"))

    # 8. What is said and logged before the first step
    what = f"{total_steps:,} of {flags.train_batch_size} pairs, in micro-batches of up to {micro_batch_tokens:,} tokens"
    what = "none: two models are compared" if flags.eval_only else f"{what}, {n_processes} process(es)"
    facts = facts_of(flags, data, compute, what)
    say(header(facts, flags, tokenizer, any_pairs.read([0])[0]))
    n_bytes = 4 * sum(weight.numel() for weight in policy.parameters())  # of the model; AdamW's moments are two more
    n_checkpoints = 1 + flags.save_total_limit - len(find_checkpoints(folder))  # one more while it is written
    free, needed = shutil.disk_usage(folder).free, n_bytes * (1 + 3 * n_checkpoints)
    if flags.save_steps and total_steps and free < needed:
        say(f"warning: {free / 1e9:.1f} GB are free; model and checkpoints may need {needed / 1e9:.1f} more")
    log = Log(folder, accelerator, flags, step, total_steps)
    stop = StopSignals(is_main)
    if step == total_steps:
        stop.restore()
    save = partial(save_model, policy, tokenizer, data.end_ids)
    evaluate_held_out = partial(
        evaluate, reference=eval_reference, pairs=data.held_out, collate=collate, compute=compute, flags=flags
    )
    answer = partial(generate_answers, tokenizer=tokenizer, data=data, compute=compute, flags=flags)
    if checkpoint is None:
        log.start(facts | {"micro_batch_tokens": micro_batch_tokens})
        before = ResponseScorer(ref_model, dtype) if flags.eval_only else scorer
        log.evaluation(0, 0.0, evaluate_held_out(before) | answer(before.model))
    else:
        log.write({"event": "resumed", "step": step, "checkpoint": checkpoint.name})

    # 9. The steps
    batches = [compute.to_device(batch) for batch in steps[step]] if step < total_steps else []
    while step < total_steps:
        started, pairs_of_step = time.perf_counter(), steps.indices(step)
        sums = forward_backward(batches, len(pairs_of_step), ddp_scorer, train_reference, compute, flags)
        grad_norm = clip_grad_norm_(policy.parameters(), flags.max_grad_norm or math.inf)
        if step + 1 < total_steps:  # read and laid out while the device works; the first copy waits until it has done
            batches = [compute.to_device(batch) for batch in steps[step + 1]]
        sums, grad_norm, stopping = sum_over_processes(sums, grad_norm, stop.caught, accelerator)
        learning_rate = scheduler.get_last_lr()[0]
        if math.isfinite(grad_norm):
            optimizer.step()
            window.add(sums)
        else:
            log.warn("skipped", window.skip(step + 1, data.train.rows[pairs_of_step]))
        optimizer.zero_grad()
        scheduler.step()
        step += 1
        window.seconds += time.perf_counter() - started
        epoch, is_last = step / steps.steps_per_epoch, step == total_steps

        if step == 1 or step % flags.logging_steps == 0 or is_last:
            line = {"step": step, "epoch": epoch} | window.read()
            line |= {"grad_norm": grad_norm if math.isfinite(grad_norm) else None, "learning_rate": learning_rate}
            if device.type == "cuda":
                line["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            if step == 1 and start_hash == ref_hash:
                check_first_step(line, flags)
            log.training(line)
            for name, text in warnings_about(line, flags, warmup_steps):
                log.warn(name, text)
        if flags.eval_steps and step % flags.eval_steps == 0 and not is_last:
            log.evaluation(step, epoch, evaluate_held_out(scorer))
        stopping = stopping and not is_last
        if stopping or flags.save_steps and (step % flags.save_steps == 0 or is_last):
            if is_main:
                state = {"step": step, "belongs_to": belongs_to | settings, "window": asdict(window),
                         "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}  # fmt: skip
                save_checkpoint(folder, state, save, flags.save_total_limit, log)
            accelerator.wait_for_everyone()
        log.bar.update()
        if stopping:
            log.bar.close()
            again = f"go on with the same flags and --output_dir {folder} --resume_from_checkpoint latest"
            if not (folder / f"checkpoint-{step}").exists():
                again = "without a checkpoint of it"
            raise Stopped(f"stopped after step {step}; {again}")

    # 10. The trained model, and what has become of it
    log.bar.close()
    stop.restore()
    if is_main and not flags.eval_only:
        with written(folder):
            save(folder)
    log.evaluation(step, step / max(1, steps.steps_per_epoch), evaluate_held_out(scorer) | answer(policy))
    log.end(step)
    ddp_scorer = accelerator.free_memory(ddp_scorer)  # if DDP outlives its process group, torch 2.11's gloo may hang
    accelerator.end_training()
    return folder


def main(argv: Sequence[str]) -> int:
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
    rank, text = os.environ.get("RANK", "0"), None
    try:
        train(parse_flags(argv))
        return 0
    except UserError as error:
        if rank == "0" or not isinstance(error, Stopped):
            text = str(error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        text = f"{first_line(error)} Lower --micro_batch_tokens, also to resume, or --max_length; if the model itself "
        text += "does not fit (16 bytes a weight in training, and 2 to 4 for the reference), take a smaller one"
    except KeyboardInterrupt:
        text = "stopped"
    if text:
        with contextlib.suppress(OSError):  # a closed terminal
            print(f"dpo_train.py{'' if rank == '0' else f' (process {rank})'}: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # into a pipe, too: line by line
    sys.stderr.reconfigure(errors="backslashreplace")
    sys.exit(main(sys.argv[1:]))
