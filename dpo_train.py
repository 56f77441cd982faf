"""Direct Preference Optimization (arXiv 2305.18290) of a causal language model, in one script.

    python dpo_train.py --demo                                   # a small model and small data that come along
    python dpo_train.py                                          # Qwen2.5-0.5B on COIG-P, one GPU
    accelerate launch dpo_train.py --output_dir output/dpo       # several GPUs
    python dpo_train.py --output_dir output/dpo --resume_from_checkpoint latest

Read it from `train` on: one run from top to bottom. `dataset.py` makes the micro-batches, `loss.py` has the formulas.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # micro-batches differ in shape
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages on CPUs; torch reads it once, at its first allocation
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import accelerate
import datasets
import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    get_scheduler,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dataset import (
    Pairs,
    PreparedData,
    TreeCollator,
    UserError,
    end_of_turn_id,
    epoch_order,
    first_line,
    load_rows,
    prepare,
    refuse_lfs_pointers,
    sees,
    tree_mask,
)
from loss import dpo_loss, response_logps
from plot_loss import PlotError, plot_runs, read_run

LN2 = math.log(2)
REFERENCE_CACHE = Path(huggingface_hub.constants.HF_HOME) / "dpo_reference"
SAMPLE = Path(__file__).resolve().parent / "docs" / "sample"


class Stopped(UserError):
    """Asked to stop, and did: said by the main process alone."""


def flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class Flags:
    """Names as in transformers' TrainingArguments and TRL's DPOConfig wherever the same thing exists there."""

    model_name_or_path: str = flag("Qwen/Qwen2.5-0.5B", "the policy's start: hub name or local folder")
    ref_model_name_or_path: str | None = flag(None, "the frozen reference (default: the policy's start)")
    dataset_name: str = flag("m-a-p/COIG-P", "hub name, local folder (git clone), or .parquet, .json, .jsonl file")
    dataset_split: str = flag("train", "split of a hub data set or folder")
    domains: str | None = flag(None, "only these values of the column `domain`, e.g. chat,math (default: all)")
    output_dir: str | None = flag(
        None, "where everything is written (default: output/dpo, demo or eval, or the next free output/dpo-N)"
    )
    beta: float = flag(0.1, "how strongly the policy is held to the reference; higher means less deviation")
    loss_type: Literal["sigmoid"] = flag("sigmoid", "the loss; sigmoid is the DPO paper's")
    label_smoothing: float = flag(0.0, "assumed share of pairs with swapped labels, 0 to below 0.5")
    max_length: int = flag(1024, "tokens of prompt + response; longer pairs are cut, see dataset.py")
    max_train_samples: int | None = flag(None, "train on this many pairs at most (default: all)")
    max_eval_samples: int = flag(512, "hold out this many pairs at most, by prompt, and at most a tenth; 0: none")
    train_batch_size: int = flag(64, "pairs in one optimizer step, over all processes")
    micro_batch_tokens: int | None = flag(
        None, "tokens in one forward pass of one process; sets the memory, not the result (default: GPU 8192, CPU 2048)"
    )
    shuffle: Literal["prompts", "pairs"] = flag(
        "prompts", "prompts: a prompt's pairs in one step, which is fast; pairs: spread out, see docs/performance.md"
    )
    learning_rate: float = flag(1e-6, "peak learning rate of AdamW")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = flag("cosine", "schedule")
    warmup_ratio: float = flag(0.1, "share of the steps in which the learning rate rises from 0")
    warmup_steps: int = flag(0, "the same in steps; goes before the ratio if above 0")
    weight_decay: float = flag(0.0, "of AdamW")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0: not clipped")
    num_train_epochs: float = flag(1.0, "passes over the pairs")
    max_steps: int = flag(-1, "stop after this many steps; goes before the epochs if above 0")
    mixed_precision: Literal["bf16", "no"] = flag("bf16", "bf16 autocast over float32 weights, or float32 throughout")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, slower")
    torch_compile: bool = flag(False, "compile the model's layers (never run on a GPU by us yet)")
    attn_implementation: Literal["auto", "tree", "flex", "sdpa", "eager"] = flag(
        "auto",
        "tree: no mask, flex: FlexAttention, GPU only (neither has run on a GPU by us yet); sdpa, eager: with a mask; "
        "auto: GPU sdpa, CPU tree",
    )
    precompute_ref_log_probs: bool = flag(
        False, "one pass with the reference before training, then no second model; kept for other runs in HF_HOME"
    )
    logging_steps: int = flag(10, "write metrics every this many steps (step 1 always)")
    eval_steps: int = flag(500, "evaluate every this many steps, besides the start and the end; 0: only those")
    save_steps: int = flag(1000, "write a checkpoint every this many steps; 0: none")
    save_total_limit: int = flag(2, "checkpoints to keep")
    resume_from_checkpoint: str | None = flag(None, "`latest` (of --output_dir) or a checkpoint's folder")
    report_to: str = flag("none", "also log to tensorboard, wandb, swanlab, mlflow ...: whatever accelerate knows")
    push_to_hub: bool = flag(False, "upload the trained model at the end (log in before: `hf auth login`)")
    hub_model_id: str | None = flag(None, "its name on the hub (default: the output folder's)")
    eval_only: bool = flag(False, "train nothing: compare --model_name_or_path with --ref_model_name_or_path")
    max_new_tokens: int = flag(128, "length of the answers shown before and after; 0: no answers")
    seed: int = flag(42, "of the order of the pairs")
    demo: bool = flag(False, "train the small sample model on the sample pairs: no network, two minutes on a CPU")


GROUPS = {  # in --help: a group begins with the flag named here
    "model_name_or_path": "models", "dataset_name": "data", "output_dir": "output", "beta": "loss",
    "max_length": "sizes", "learning_rate": "optimizer", "mixed_precision": "computing",
    "logging_steps": "logs and checkpoints", "max_new_tokens": "other",
}  # fmt: skip

DEMO = {
    "model_name_or_path": str(SAMPLE / "model"),
    "dataset_name": str(SAMPLE / "pairs.jsonl"),
    "learning_rate": 2e-4,
    "train_batch_size": 32,
    "max_length": 256,
    "num_train_epochs": 1.0,
    "mixed_precision": "no",
    "logging_steps": 1,
    "eval_steps": 20,
    "save_steps": 50,
    "max_new_tokens": 64,
}

# What makes a run the run it is: a resumed run must agree in these with the one that it goes on with.
IDENTITY = (
    "beta", "loss_type", "label_smoothing", "train_batch_size", "shuffle", "learning_rate", "lr_scheduler_type",
    "warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm", "num_train_epochs", "max_steps",
    "mixed_precision", "seed",
)  # fmt: skip

METRICS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected", "logps/accuracies",
)  # fmt: skip
LENGTHS = ("lengths/chosen", "lengths/rejected")  # in tokens, end-of-turn included
BYTES_PER_TOKEN = 1.7e6, 0.25e6  # of Qwen2.5-0.5B, a little over what docs/performance.md counts; with checkpointing
SINKING = 0.1  # nats a token by which the chosen responses may become less likely before a warning


# ---------------------------------------------------------------------------------------------------------------------
# Flags


class OneLineParser(HfArgumentParser):
    def add_argument(self, *names, **kwargs):
        name = names[0].removeprefix("--")
        if name not in Flags.__dataclass_fields__:
            return super().add_argument(*names, **kwargs)
        if name in GROUPS:
            self.group = self.add_argument_group(GROUPS[name])
        if "choices" not in kwargs:
            kwargs["metavar"] = {int: "N", float: "X", str: "NAME"}.get(kwargs["type"], "true|false")
        if kwargs["default"] not in (None, False):
            kwargs["help"] += f" (default: {kwargs['default']})"
        return self.group.add_argument(names[0], **kwargs)  # without the second spelling, --train-batch-size

    def error(self, message):  # argparse prints forty lines of usage first
        raise UserError(f"{message} (--help lists the flags)")


def parse_flags(argv: list[str] | None = None) -> Flags:
    """Flags from the command line; `--demo` changes defaults, so that flags given beside it still hold.

    Raises:
        UserError: for values that can't be meant, before anything is loaded.
    """
    parser = OneLineParser(
        Flags, prog="dpo_train.py", usage="dpo_train.py [--flag value ...]", description=__doc__.splitlines()[0],
        allow_abbrev=False, formatter_class=argparse.HelpFormatter,
    )  # fmt: skip
    argv = sys.argv[1:] if argv is None else argv
    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)
    (flags,) = parser.parse_dict(vars(parser.parse_args(argv)))
    for name in (
        "model_name_or_path",
        "ref_model_name_or_path",
        "dataset_name",
        "output_dir",
        "resume_from_checkpoint",
    ):
        if getattr(flags, name) is not None:
            setattr(flags, name, os.path.expanduser(getattr(flags, name)))
    positive = ("beta", "train_batch_size", "num_train_epochs", "logging_steps", "save_total_limit")
    not_negative = (
        "learning_rate", "weight_decay", "max_grad_norm", "max_eval_samples", "eval_steps", "save_steps",
        "warmup_steps", "max_new_tokens", "seed",
    )  # fmt: skip
    rules = [
        *((name, getattr(flags, name) > 0, "must be above 0") for name in positive),
        *((name, getattr(flags, name) >= 0, "must be 0 or above") for name in not_negative),
        ("label_smoothing", 0 <= flags.label_smoothing < 0.5, "must be from 0 to below 0.5"),
        ("warmup_ratio", 0 <= flags.warmup_ratio < 1, "must be from 0 to below 1"),
        ("max_length", flags.max_length >= 16, "must be at least 16"),
        ("max_train_samples", flags.max_train_samples is None or flags.max_train_samples > 0, "must be above 0"),
        ("max_steps", flags.max_steps == -1 or flags.max_steps > 0, "must be above 0, or -1 for all"),
        (
            "micro_batch_tokens",
            flags.micro_batch_tokens is None or flags.micro_batch_tokens >= 2 * flags.max_length,
            f"must be at least {2 * flags.max_length}, twice --max_length: a pair's two responses stay together",
        ),
        (
            "eval_only",
            not flags.eval_only or flags.ref_model_name_or_path is not None and flags.max_eval_samples > 0,
            "needs --ref_model_name_or_path, the model to compare with, and --max_eval_samples above 0",
        ),
        (
            "attn_implementation",
            flags.attn_implementation != "flex" or torch.cuda.is_available(),
            "needs a GPU: FlexAttention has no backward pass on CPUs",
        ),
        ("warmup_steps", flags.max_steps < 0 or flags.warmup_steps < flags.max_steps, "must be below --max_steps"),
    ]
    if flags.report_to != "none":
        there = [str(tracker) for tracker in accelerate.tracking.get_available_trackers()]
        rule = f"not installed: `pip install {flags.report_to}` (there is: {', '.join(there) or 'none'})"
        rules.append(("report_to", flags.report_to in there, rule))
    for name, holds, rule in rules:
        if not holds:
            raise UserError(f"--{name} {getattr(flags, name)}: {rule}")
    return flags


def use_cache_if_hub_is_away(*names: str | None) -> None:
    """If a name must come from the hub, which can't be reached, look in the cache only: at once, not after minutes."""
    if any(name and not Path(name).exists() for name in names):
        try:
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
        except Exception:  # of whichever HTTP library the hub's client uses
            huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def announce_downloads(flags: Flags, say: Callable[[str], None]) -> None:
    """What will come from the hub, and how much it is, before it comes."""
    names = {
        (flags.model_name_or_path, "model"),
        (flags.ref_model_name_or_path, "model"),
        (flags.dataset_name, "dataset"),
    }
    for name, kind in sorted((name, kind) for name, kind in names if name and not Path(name).exists()):
        cached = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
        if cached.exists() or huggingface_hub.constants.HF_HUB_OFFLINE:
            continue
        with contextlib.suppress(Exception):  # a mirror may not know sizes, and loading will tell what is wrong
            files = huggingface_hub.HfApi().repo_info(name, repo_type=kind, files_metadata=True).siblings
            say(f"downloading {name}: {sum(file.size or 0 for file in files) / 1e9:.1f} GB")


def choose_output_dir(flags: Flags) -> Path:
    """The folder of this run. A folder that holds another run is never written to."""
    if flags.output_dir is not None:
        folder = Path(flags.output_dir)
        resume = flags.resume_from_checkpoint
        its_own = resume == "latest" or resume and Path(resume).resolve().parent == folder.resolve()
        if _holds_run(folder) and not its_own:
            raise UserError(
                f"--output_dir {folder} holds another run: give another folder, or go on with "
                "`--resume_from_checkpoint latest`"
            )
        return folder
    if flags.resume_from_checkpoint not in (None, "latest"):
        return Path(flags.resume_from_checkpoint).parent
    name = "eval" if flags.eval_only else "demo" if flags.demo else "dpo"
    folders = [Path("output") / (name if n == 1 else f"{name}-{n}") for n in range(1, 10_000)]
    used = [folder for folder in folders if _holds_run(folder)]
    if flags.resume_from_checkpoint is not None:
        return used[-1] if used else folders[0]
    return next(folder for folder in folders if not _holds_run(folder))


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that there is."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def check_writable(folder: Path) -> None:
    there = nearest_existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--output_dir {folder}: {there} is no folder that can be written to")


def check_room(folder: Path, n_parameters: int, flags: Flags, say: Callable[[str], None]) -> None:
    """Is there room on the disk for the trained model and the checkpoints, weights and AdamW's two moments in float32?

    Raises:
        UserError: if not even one of each fits.
    """
    model, checkpoint = 4 * n_parameters, 12 * n_parameters * bool(flags.save_steps)
    there = nearest_existing(folder)
    free = shutil.disk_usage(there).free
    # The oldest checkpoint is removed only after the new one is whole.
    for needed, enough in ((model + checkpoint, True), (model + checkpoint * (flags.save_total_limit + 1), False)):
        if free < needed:
            text = f"--output_dir {folder}: {free / 1e9:.1f} GB are free, and the run may need {needed / 1e9:.1f} GB"
            if enough:
                raise UserError(f"{text}: make room, or give another folder or --save_steps 0")
            say(f"warning: {text} (--save_total_limit {flags.save_total_limit})")


def _holds_run(folder: Path) -> bool:
    names = ("metrics.jsonl", "model.safetensors", "report.md")
    return any((folder / name).exists() for name in names) or any(folder.glob("checkpoint-*"))


# ---------------------------------------------------------------------------------------------------------------------
# Models


def load_tokenizer(name: str):
    with _explained("--model_name_or_path", name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def choose_attention(flags: Flags) -> str:
    """torch.compile would compile anew for each micro-batch's segments, so it goes with a mask."""
    if flags.attn_implementation != "auto":
        return flags.attn_implementation
    return "sdpa" if torch.cuda.is_available() or flags.torch_compile else "tree"


def load_model(name: str, flags: Flags, flag_name: str = "--model_name_or_path") -> PreTrainedModel:
    """A causal LM in float32, without dropout. As stored, in bf16, its weights would be too coarse to learn in."""
    if Path(name).is_dir():
        refuse_lfs_pointers(Path(name).glob("*.safetensors"))
    with _explained(flag_name, name):
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=torch.float32,
            attn_implementation=choose_attention(flags),
            use_safetensors=True,  # a pickle could run code
            trust_remote_code=False,
        )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


@contextlib.contextmanager
def _explained(flag_name: str, name: str) -> Iterator[None]:
    """Whatever goes wrong inside, in one line that says what to do."""
    try:
        yield
    except Exception as error:  # dozens of types, from the hub, from config files, from weights
        reason = first_line(error)
        if Path(name).exists():
            remedy = "expected a model's folder with config.json, model.safetensors and the tokenizer's files"
        else:
            if huggingface_hub.constants.HF_HUB_OFFLINE:
                reason = f"{huggingface_hub.constants.ENDPOINT} can't be reached, and it is not in the cache"
            remedy = (
                "set HF_ENDPOINT to a mirror of the hub, or give a local folder (git clone), or run `--demo`, which "
                "needs no network"
            )
        raise UserError(f"{flag_name} {name} can't be loaded ({reason}): {remedy}") from None


def weights_hash(model: torch.nn.Module) -> str:
    """A hash of names, shapes and values of all weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def code_version() -> str:
    """A hash of everything that log-probabilities depend on, besides weights and token ids."""
    sources = [Path(__file__).with_name(name).read_bytes() for name in ("dpo_train.py", "dataset.py", "loss.py")]
    versions = f"{torch.__version__} {transformers.__version__}".encode()
    return hashlib.blake2b(b"".join([*sources, versions]), digest_size=16).hexdigest()


class ResponseScorer(torch.nn.Module):
    """A causal LM that maps a micro-batch to the log-probabilities of its responses.

    A module of its own, so that what accelerate puts around a model's forward (autocast, DDP) holds for all of it.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.head_grad: torch.Tensor | None = None  # see `weight_grad` of response_logps
        self.cast_head: torch.Tensor | None = None  # the head as it computes; whoever moves the weights removes it

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """[M] summed log-probabilities in nats, float64, of a micro-batch as `TreeCollator` makes it."""
        head = self.model.get_output_embeddings().weight  # [V, H]
        device = head.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else head.dtype
        if self.head_grad is not None:  # its gradient goes past autograd, so it can be cast once for a whole step
            self.cast_head = head = head.detach().to(dtype) if self.cast_head is None else self.cast_head
        match self.model.config._attn_implementation:
            case "tree":
                attention = {"attention_mask": None, "tree": _tree(batch["segments"], dtype, device)}
            case "flex":
                attention = {"attention_mask": None, "tree": _blocks(batch["branch_ids"], batch["tree_ids"])}
            case _:  # [R, 1, T, T]
                attention = {"attention_mask": tree_mask(batch["branch_ids"], batch["tree_ids"], dtype)}
        hidden = self.model.base_model(
            input_ids=batch["input_ids"],  # [R, T]
            position_ids=batch["position_ids"],
            use_cache=False,
            **attention,
        ).last_hidden_state  # [R, T, H]
        hidden = hidden.flatten(0, 1).index_select(0, batch["predictor_index"])  # [N, H]
        return response_logps(
            hidden, head, batch["target_ids"], batch["response_index"], len(batch["response_lengths"]), dtype,
            self.head_grad if torch.is_grad_enabled() else None,
        )  # fmt: skip


def tree_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, tree=None, **kwargs):
    """Attention of a row of token trees, without a [T, T] mask of numbers and without computing what it would hide.

    A prompt sees itself, a response sees its prompt and itself. transformers calls this in each layer, with query
    [1, heads, T, D], key and value [1, key heads, T, D], and hands `tree` through; without it (generating), it is sdpa.
    """
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary embeddings leave float32 behind
    attend = {list: _attend_by_segment, tuple: _attend_at_once, BlockMask: _attend_by_blocks}[type(tree)]
    return attend(query, key, value, scaling, tree), None  # [1, T, heads, D]


AttentionInterface.register("tree", tree_attention)
AttentionInterface.register("flex", tree_attention)


def _tree(segments: list[tuple[int, int, int, int]], dtype: torch.dtype, device: torch.device):
    """What `tree_attention` needs of a micro-batch's segments, made once for all layers: a tuple to attend at once."""
    if device.type == "cuda" and dtype.itemsize == 2:  # the kernel knows no float32
        return _tree_at_once(segments, device)
    masks = []
    for start, end, prompt_start, prompt_end in segments:
        shape = end - start, prompt_end - prompt_start + end - start
        mask = None
        if prompt_end > prompt_start:
            hidden = torch.ones(shape, dtype=torch.bool, device=device).triu(prompt_end - prompt_start + 1)
            mask = torch.zeros(shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)
        masks.append(mask)
    return list(zip(segments, masks, strict=True))


def _tree_at_once(segments: list[tuple[int, int, int, int]], device: torch.device):
    """Queries stay as they are, keys are gathered as [prompt | prompt, response 1 | prompt, response 2 ...]."""
    keys = [np.r_[prompt_start:prompt_end, start:end] for start, end, prompt_start, prompt_end in segments]
    n_queries, n_keys = [end - start for start, end, *_ in segments], list(map(len, keys))
    numbers = torch.from_numpy(np.concatenate([*keys, [0], np.cumsum(n_queries), [0], np.cumsum(n_keys)]))
    if device.type == "cuda":  # from pinned memory, the copy waits for nothing
        numbers = numbers.pin_memory().to(device, non_blocking=True)
    key_index, query_ends, key_ends = numbers.split([sum(n_keys), len(segments) + 1, len(segments) + 1])
    return key_index, query_ends.int(), key_ends.int(), max(n_queries), max(n_keys)


def _attend_by_segment(query, key, value, scaling, tree) -> torch.Tensor:
    outputs = []
    for (start, end, prompt_start, prompt_end), mask in tree:
        keys, values = key[:, :, start:end], value[:, :, start:end]
        if mask is not None:
            keys, values = (
                torch.cat([x[:, :, prompt_start:prompt_end], own], 2) for x, own in ((key, keys), (value, values))
            )
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end], keys, values, mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def _attend_at_once(query, key, value, scaling, tree) -> torch.Tensor:
    """All segments in one call of torch's kernel. Never run on a GPU by us yet: a test has emulated the kernel."""
    key_index, query_ends, key_ends, max_queries, max_keys = tree
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    keys, values = key.index_select(0, key_index), value.index_select(0, key_index)
    return varlen_attn(
        query.contiguous(), keys, values, query_ends, key_ends, max_queries, max_keys,
        scale=scaling, window_size=(-1, 0), enable_gqa=True,
    )[None]  # fmt: skip


compiled_flex_attention = torch.compile(flex_attention, dynamic=True)  # without compiling, it makes the whole mask


def _blocks(branch_ids: torch.Tensor, tree_ids: torch.Tensor) -> BlockMask:
    """Which blocks of 128 queries by 128 keys have anything to see."""
    branch, tree = branch_ids[0], tree_ids[0]  # [T]

    def visible(_batch, _head, query, key):
        return (query >= key) & sees(branch[query], tree[query], branch[key], tree[key])

    return create_block_mask(visible, None, None, len(branch), len(branch), device=branch.device)


def _attend_by_blocks(query, key, value, scaling, tree) -> torch.Tensor:
    """Never run on a GPU by us yet: a test has run it uncompiled on a CPU, gradients included."""
    output = compiled_flex_attention(query, key, value, block_mask=tree, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous()


def freeze(model: PreTrainedModel, mixed_precision: str) -> PreTrainedModel:
    """Make it the frozen reference. What autocast would cast anew for each micro-batch is cast once, to the same."""
    model.requires_grad_(False).eval()
    if mixed_precision == "bf16":
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                for name, weight in list(module.named_parameters(recurse=False)):  # new ones: the head may be tied
                    setattr(module, name, torch.nn.Parameter(weight.bfloat16(), requires_grad=False))
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        if torch.equal(embeddings.weight, head.weight.float()):  # tied, and of a model that was stored in bf16
            embeddings.weight = head.weight
            embeddings.register_forward_hook(lambda module, arguments, output: output.float())
    return model


def compile_layers(model: PreTrainedModel) -> None:
    for layer in model.base_model.layers:
        layer.compile(dynamic=True)


def check_model(model: PreTrainedModel, tokenizer, flags: Flags) -> None:
    if model.get_output_embeddings().weight.shape[0] < len(tokenizer):
        raise UserError(f"{model.name_or_path}: its vocabulary is smaller than that of the policy's tokenizer")
    window = (
        model.config.sliding_window
        if "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
        else None
    )
    if window and window < flags.max_length:
        raise UserError(f"--max_length {flags.max_length}: {model.name_or_path} looks back {window} tokens only")


def check_scorer(scorer: ResponseScorer, pairs: Pairs, collate: TreeCollator, accelerator: Accelerator) -> None:
    """Compare the tree of the first pair with the model's own logits for its two responses, in float32.

    A model whose attention ignores the mask, or whose logits are more than hidden states times LM head, fails here.
    Once more in the run's precision, in which attention may be another kernel, and only roughly equal.

    Raises:
        UserError: if they differ.
    """
    device = accelerator.device
    (pair,) = pairs.read([0])
    pair = {"index": 0, **{name: np.asarray(pair[name])[-64:] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}}
    batch = to_device(collate([pair])[0], device)
    expected = torch.zeros(2)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for k, name in enumerate(("chosen_ids", "rejected_ids")):
            ids = torch.from_numpy(np.concatenate([pair["prompt_ids"], pair[name]]).astype(np.int64)).to(device)[None]
            targets = ids[:, len(pair["prompt_ids"]) :]
            logits = scorer.model(input_ids=ids, use_cache=False).logits[:, len(pair["prompt_ids"]) - 1 : -1].float()
            expected[k] = logits.log_softmax(-1).gather(-1, targets[..., None]).sum()
        found = of_pairs(scorer(batch), batch)[0].cpu().float()
    with torch.no_grad(), accelerator.autocast():
        roughly = of_pairs(scorer(batch), batch)[0].cpu().float()
    for logps, rtol, atol in ((found, 2e-5, 1e-2), (roughly, 2e-2, 0.5)):
        if not torch.allclose(logps, expected, rtol, atol):
            raise UserError(
                f"{type(scorer.model).__name__} can't be trained here: log-probabilities over shared prompts "
                f"({logps[0]:.3f}, {logps[1]:.3f}) differ from its own ({expected[0]:.3f}, {expected[1]:.3f}); its "
                "attention or its LM head is of another kind"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities of pairs


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def of_pairs(logps: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[M] of responses to [P, 2] of pairs, chosen first."""
    return torch.stack([logps[batch["chosen_index"]], logps[batch["rejected_index"]]], dim=1)


def pair_metrics(policy: torch.Tensor, reference: torch.Tensor, flags: Flags) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [P], and METRICS [P, K] without gradient, from log-probabilities [P, 2] of policy and reference."""
    losses, chosen, rejected = dpo_loss(
        *policy.unbind(1), *reference.unbind(1), flags.beta, flags.label_smoothing, flags.loss_type
    )
    policy = policy.detach()
    higher = [0.5 * (torch.sign(a - b) + 1) for a, b in ((chosen, rejected), policy.unbind(1))]  # a tie is one half
    columns = [losses.detach(), chosen, rejected, chosen - rejected, higher[0], *policy.unbind(1), higher[1]]
    return losses, torch.stack(columns, dim=1)


class ReferenceLogps:
    """The reference's log-probabilities, [n, 2] over all pairs of a set, each computed once in a run."""

    def __init__(self, pairs: Pairs, collate: TreeCollator, scorer: ResponseScorer, accelerator: Accelerator):
        self.pairs, self.collate, self.scorer, self.accelerator = pairs, collate, scorer, accelerator
        self.logps = torch.zeros(len(pairs), 2, dtype=torch.float64, device=accelerator.device)
        self.known = np.zeros(len(pairs), dtype=bool)  # on the host: asking the GPU would stall it

    @torch.no_grad()
    def __call__(self, batch: dict[str, torch.Tensor], index: np.ndarray, filler: bool = False) -> torch.Tensor:
        """[P, 2] for a micro-batch whose pairs have these indices."""
        if self.known[index].all():
            return self.logps[batch["pair_index"]]
        with self.accelerator.autocast():
            logps = of_pairs(self.scorer(batch), batch)
        if not filler:
            self.logps[batch["pair_index"]] = logps
            self.known[index] = True
        return logps

    def fill(self) -> None:
        """Compute all that isn't known yet, the work divided between the processes."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        missing = np.flatnonzero(~self.known)
        missing = missing[np.argsort(self.pairs.keys[missing], kind="stable")]  # a prompt's pairs together
        bar = tqdm(total=len(missing), desc="Reference", unit="pair", disable=rank > 0 or not sys.stderr.isatty())
        for start in range(0, len(missing), 256):
            chunk = missing[start : start + 256]
            with self.accelerator.autocast():
                for batch in self.collate(self.pairs.read(chunk), world)[rank::world]:
                    index, filler = batch["pair_index"].numpy(), not batch["pair_weight"].any()
                    self(to_device(batch, self.accelerator.device), index, filler)
            bar.update(len(chunk))
        bar.close()
        self.share()

    def recheck(self, n: int = 16) -> float:
        """Compute some of the known values again: by how much they differ at most, as a share of the tolerance.

        In bf16 a log-probability depends a little on what else is in its micro-batch.
        """
        some = np.random.default_rng(0).permutation(len(self.pairs))[:n]
        old, known = self.logps.clone(), self.known.copy()
        self.known[some] = False
        self.fill()
        exact = self.accelerator.mixed_precision == "no"
        tolerance = 1e-2 + 1e-5 * old.abs() if exact else 0.5 + 1e-2 * old.abs()
        worst = float(((self.logps - old).abs() / tolerance)[some].max())
        self.logps, self.known = old, known
        return worst

    def share(self) -> None:
        """Give every process what each of them has computed."""
        if self.accelerator.num_processes > 1:
            known = torch.from_numpy(self.known).to(self.logps)
            count = self.accelerator.reduce(known, "sum")
            self.logps = self.accelerator.reduce(self.logps * known[:, None], "sum") / count.clamp(min=1)[:, None]
            self.known = (count > 0).cpu().numpy()


def precompute(references: dict[str, ReferenceLogps], key: dict[str, str], accelerator: Accelerator, say) -> None:
    """Fill the tables from the cache on disk or, where it has nothing that holds, with the model, and write the cache.

    `key` is all that the values depend on: it is written into the file and compared when the file is read. Some values
    are computed again before the others are believed.
    """
    path = REFERENCE_CACHE / f"{hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()}.safetensors"
    refused = None
    if accelerator.is_main_process and path.exists():
        try:
            with safe_open(path, "pt") as file:
                if different := [name for name, value in key.items() if (file.metadata() or {}).get(name) != value]:
                    raise ValueError(f"another {', '.join(different)}")
                for name, reference in references.items():
                    logps = file.get_tensor(name)
                    if logps.shape != reference.logps.shape or not torch.isfinite(logps).all():
                        raise ValueError(f"its {name} values are not all there")
                    reference.logps.copy_(logps)
                    reference.known[:] = True
        except (OSError, ValueError, SafetensorError) as error:
            refused = first_line(error)
    for reference in references.values():
        reference.known &= refused is None
        reference.share()
    if all(reference.known.all() for reference in references.values()) and not refused:
        worst = max(reference.recheck() for reference in references.values() if len(reference.known))
        if worst <= 1:
            return say(f"reference log-probabilities from {path} (re-checked: {worst:.0%} of the tolerance)")
        refused = f"re-computed values differ, {worst:.0f} times the tolerance"
        for reference in references.values():
            reference.known[:] = False
    if refused:
        say(f"warning: the reference's cache {path} is refused ({refused}): computing it anew")
    for reference in references.values():
        reference.fill()
    if accelerator.is_main_process:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: table.logps.cpu() for name, table in references.items()}, temporary, metadata=key)
            _sync(temporary)
            temporary.replace(path)
            say(f"reference log-probabilities kept in {path}")
        except (OSError, SafetensorError) as error:  # the run has them in memory
            temporary.unlink(missing_ok=True)
            say(f"warning: the reference log-probabilities are not kept for other runs ({first_line(error)})")


@torch.no_grad()
def evaluate(
    scorer: torch.nn.Module, reference: ReferenceLogps, pairs: Pairs, collate: TreeCollator, accelerator: Accelerator,
    flags: Flags,
) -> np.ndarray:  # fmt: skip
    """METRICS of each pair, [n, K] in float64: the same for any number of processes and any cut into micro-batches."""
    policy = torch.zeros(len(pairs), 2, dtype=torch.float64, device=accelerator.device)
    main = accelerator.is_main_process and sys.stderr.isatty()
    for start in tqdm(range(0, len(pairs), 256), desc="Evaluating", leave=False, disable=not main):
        batches = collate(pairs.read(range(start, min(start + 256, len(pairs)))), accelerator.num_processes)
        for batch in batches[accelerator.process_index :: accelerator.num_processes]:
            index, filler = batch["pair_index"].numpy(), not batch["pair_weight"].any()
            batch = to_device(batch, accelerator.device)
            reference(batch, index, filler)
            with accelerator.autocast():
                logps = of_pairs(scorer(batch), batch)
            if not filler:
                policy[batch["pair_index"]] = logps
    reference.share()
    policy = accelerator.reduce(policy, "sum")
    return pair_metrics(policy.cpu().double(), reference.logps.cpu().double(), flags)[1].numpy()


def means(table: np.ndarray, prefix: str = "") -> dict[str, float]:
    return {prefix + name: float(value) for name, value in zip(METRICS, table.mean(0), strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# Answers, before and after


def pick_prompts(pairs: Pairs, n: int = 6) -> list[int]:
    """Indices of up to n pairs with different prompts, from as many domains as there are."""
    first = {key: i for i, key in reversed(list(enumerate(pairs.keys.tolist())))}
    by_domain: dict[str, list[int]] = {}
    for i in sorted(first.values()):
        by_domain.setdefault(pairs.domains[i], []).append(i)
    rounds = [group[k] for k in range(n) for group in by_domain.values() if k < len(group)]
    return sorted(rounds[:n])


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer, pairs: Pairs, indices: list[int], end_id: int, max_new_tokens: int):
    """What the model answers to the prompts of these pairs: greedy, one at a time.

    `repetition` is the share of the answer's 4-grams of tokens that stood in it before; `stopped`, whether it ended its
    turn by itself.
    """
    answers = []
    for pair in pairs.read(indices):
        prompt = torch.tensor(np.asarray(pair["prompt_ids"]), dtype=torch.long, device=model.device)[None]
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end_id,
            pad_token_id=end_id,
        )[0, prompt.shape[1] :].tolist()
        grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
        answers.append(
            {
                "domain": pairs.domains[pair["index"]],
                "prompt": tokenizer.decode(prompt[0], skip_special_tokens=True).strip(),
                "answer": tokenizer.decode(ids, skip_special_tokens=True),
                "chosen": tokenizer.decode(pair["chosen_ids"], skip_special_tokens=True),
                "n_tokens": len(ids),
                "stopped": end_id in ids,
                "repetition": 1 - len(set(grams)) / len(grams) if grams else 0.0,
            }
        )
    return answers


def write_report(path: Path, before: dict, after: dict, flags: Flags, steps: int) -> list[str]:
    """Write `report.md`, before and after side by side; returns its figures as lines for the terminal."""

    rows = [
        ("loss (nats)", "loss", ".4f"),
        ("accuracy by reward", "rewards/accuracies", ".3f"),
        ("accuracy by log-probability", "logps/accuracies", ".3f"),
        ("margin (nats, beta included)", "rewards/margins", ".3f"),
        ("log-probability of chosen (nats)", "logps/chosen", ".2f"),
        ("log-probability of rejected (nats)", "logps/rejected", ".2f"),
    ]
    held_out = []
    if before:
        old, new = before["metrics"], after["metrics"]
        held_out = [f"| held out, {before['n_pairs']} pairs | before | after |", "|---|---:|---:|"]
        held_out += [f"| {name} | {old[key]:{form}} | {new[key]:{form}} |" for name, key, form in rows]
        for side in ("chosen", "rejected"):
            values = (metrics[f"logps/{side}"] / metrics[f"lengths/{side}"] for metrics in (old, new))
            held_out.append(f"| the same a token, {side} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    names = [short_name(name) for name in (flags.model_name_or_path, flags.dataset_name)]
    if flags.eval_only:
        names[0] = f"{short_name(flags.ref_model_name_or_path)} (before) and {names[0]} (after)"
    lines = ["# Before and after", "", " on ".join(names) + (f", {steps} steps." if steps else "."), ""]
    if before:
        lengths = " and ".join(f"{old[f'lengths/{side}']:.0f} tokens ({side})" for side in ("chosen", "rejected"))
        lines += [f"The held-out responses have {lengths} on average, the end-of-turn included.", ""]
    lines += held_out or ["No pairs were held out (`--max_eval_samples 0`): nothing to compare."]
    if len(before.get("domains", {})) > 1:
        columns = [row for row in rows if "log-probability of" not in row[0]]
        lines += ["", "| before → after | " + " | ".join(name for name, _, _ in columns) + " |"]
        lines += ["|---|" + "---:|" * len(columns)]
        for domain, old in before["domains"].items():
            cells = (f"{old[key]:{form}} → {after['domains'][domain][key]:{form}}" for _, key, form in columns)
            lines.append(f"| {domain or '(none)'} | " + " | ".join(cells) + " |")
    if before.get("answers"):
        lines += ["", f"## Answers to held-out prompts (greedy, at most {flags.max_new_tokens} tokens)", ""]
        lines += ["| | before | after |", "|---|---:|---:|"]
        for name, key, form in (
            ("tokens", "n_tokens", ".0f"), ("ended by themselves", "stopped", ".0%"),
            ("repeated 4-grams", "repetition", ".0%"),
        ):  # fmt: skip
            averages = (np.mean([float(one[key]) for one in side["answers"]]) for side in (before, after))
            lines.append(f"| {name} | " + " | ".join(f"{average:{form}}" for average in averages) + " |")
        for old, new in zip(before["answers"], after["answers"], strict=True):
            for name, text in (
                (f"Prompt ({old['domain']})" if old["domain"] else "Prompt", old["prompt"]),
                ("Before", old["answer"]),
                ("After", new["answer"]),
                ("Preferred in the data", old["chosen"]),
            ):
                fence = "`" * max(
                    3, 1 + max(map(len, "".join(c if c == "`" else " " for c in text).split()), default=0)
                )
                lines += ["", f"**{name}**", "", fence + "text", text, fence]
    _write_whole(path, "\n".join(lines) + "\n")
    return held_out


def model_card(figures: list[str], flags: Flags, data: PreparedData, steps: int) -> str:
    """The trained model's README.md, as the hub shows it."""
    base, source = short_name(flags.model_name_or_path), short_name(flags.dataset_name)
    on_hub = [f"{key}: {name}" for key, name, given in (("base_model", base, flags.model_name_or_path),
              ("datasets", f"[{source}]", flags.dataset_name)) if not Path(given).exists()]  # fmt: skip
    settings = {name: getattr(flags, name) for name in (*IDENTITY, "max_length")}
    return "\n".join(
        [
            "---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [dpo]", *on_hub, "---", "",
            f"# {base}, trained with DPO on {source}", "",
            f"{steps} steps over {len(data.train):,} preference pairs with Direct Preference Optimization "
            "([arXiv 2305.18290](https://arxiv.org/abs/2305.18290)).", "", *figures, "",
            "| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in settings.items()), "",
            "```python", "from transformers import pipeline", "",
            'chat = pipeline("text-generation", "path/of/this/folder")',
            'chat([{"role": "user", "content": "你好"}], max_new_tokens=128)', "```", "",
            "The weights are float32. The model stops at its end-of-turn token, named in generation_config.json.", "",
        ]
    )  # fmt: skip


def short_name(name: str) -> str:
    """A hub name as it is, a path without its folders: they are nobody's business."""
    return Path(name).resolve().name if Path(name).exists() else name


def push(folder: Path, name: str) -> str:
    api = huggingface_hub.HfApi()
    name = api.create_repo(name, exist_ok=True, private=True).repo_id  # the report quotes some of the data
    api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=["checkpoint-*", ".*"])
    return f"{huggingface_hub.constants.ENDPOINT}/{name}"


def _write_whole(path: Path, text: str) -> None:
    """The file holds all of the text or what it held before."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_model(model: PreTrainedModel, tokenizer, folder: Path, end_id: int) -> None:
    """What `from_pretrained` needs. The generation config names the end-of-turn token: that is where to stop."""
    eos = [end_id, tokenizer.eos_token_id] if tokenizer.eos_token_id not in (None, end_id) else [end_id]
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[-1]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_checkpoint(folder: Path, limit: int, write, state: dict[str, Any]) -> None:
    """A checkpoint is complete or absent: written aside by `write(folder)`, synced, then renamed."""
    final = folder / f"checkpoint-{state['step']}"
    aside = folder / f".{final.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write(aside)
        state["files"] = {file.name: file.stat().st_size for file in sorted(aside.iterdir())}
        (aside / "state.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        for path in [*aside.iterdir(), aside]:
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _sync(folder)
    # Later ones are damaged: the run has passed over them, or else it would have gone on from there.
    found = find_checkpoints(folder)
    kept = [path for path in found if _number(path) <= state["step"]][:limit]
    for old in set(found) - set(kept):
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=_number, reverse=True)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state of a checkpoint.

    Raises:
        UserError: if it is damaged.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        for name, size in state["files"].items():
            if (checkpoint / name).stat().st_size != size:
                raise ValueError(f"{name} has another size than it was written with")
        return state
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{checkpoint} is no whole checkpoint ({error})") from None


def choose_checkpoint(flags: Flags, output_dir: Path, say) -> Path | None:
    """The checkpoint to go on from. Damaged ones are passed over, which is said; a whole one is never left behind.

    Raises:
        UserError: if there is none, or if the output folder holds a newer one than the one asked for.
    """

    def is_whole(checkpoint: Path) -> bool:
        try:
            read_state(checkpoint)
        except UserError as error:
            say(f"passed over: {error}")
            return False
        return True

    if flags.resume_from_checkpoint is None:
        return None
    if flags.resume_from_checkpoint != "latest":
        chosen = Path(flags.resume_from_checkpoint)
        step = read_state(chosen)["step"]
    newest = next(filter(is_whole, find_checkpoints(output_dir)), None)
    if flags.resume_from_checkpoint == "latest":
        if newest is None:
            raise UserError(f"--resume_from_checkpoint latest: there is no whole checkpoint in {output_dir}")
        return newest
    if newest is not None and _number(newest) > step:
        raise UserError(
            f"--resume_from_checkpoint {chosen}: {newest} is newer and would be lost; go on with `latest`, or "
            "give another --output_dir"
        )
    return chosen


def check_identity(old: dict[str, Any], new: dict[str, Any], checkpoint: Path) -> None:
    parts = {"data": " (of the data: the file, the tokenizer, --max_length, --max_*_samples or --domains)"}
    for name, value in new.items():
        if old.get(name) != value:
            raise UserError(
                f"{checkpoint} belongs to another run: {name} was {old.get(name)} and is {value} now; resume with what "
                f"it was, or start anew in another --output_dir{parts.get(name, '')}"
            )


# ---------------------------------------------------------------------------------------------------------------------
# One run


class StepBatches(torch.utils.data.Dataset):
    """Item s: this process's micro-batches of optimizer step s. A function of (seed, s): resuming is starting at s."""

    def __init__(self, pairs: Pairs, collate: TreeCollator, flags: Flags, accelerator: Accelerator):
        self.pairs, self.collate, self.flags, self.batch_size = pairs, collate, flags, flags.train_batch_size
        self.process, self.n_processes = accelerator.process_index, accelerator.num_processes
        self.steps_per_epoch = math.ceil(len(pairs) / flags.train_batch_size)
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> np.ndarray:
        """The pairs of a step; the last step of an epoch has what is left."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = epoch_order(self.pairs.keys, self.flags.seed, epoch, self.flags.shuffle)
        return self.order[number * self.batch_size : (number + 1) * self.batch_size]

    def __getitem__(self, step: int) -> list[dict[str, torch.Tensor]]:
        return self.collate(self.pairs.read(self.indices(step)), self.n_processes)[self.process :: self.n_processes]


def train(flags: Flags) -> Path:
    """One run, from flags to files; returns the output folder."""
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise UserError(f"{name} is not supported, only one process or DDP: `accelerate launch --multi_gpu`")
    if flags.push_to_hub:
        try:
            huggingface_hub.whoami()
        except Exception as error:
            raise UserError(f"--push_to_hub: not logged in ({first_line(error)}): run `hf auth login` first") from None
    try:
        accelerator = Accelerator(
            log_with=None if flags.report_to == "none" else flags.report_to,
            project_dir=".",  # trackers that write files want one; where they write is set below
            mixed_precision=flags.mixed_precision,
            # Otherwise accelerate lets several processes on CPUs run side by side and know nothing of each other, and
            # takes a Mac's GPU, which has no float64.
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                # The others wait while the first process tokenizes a million rows: longer than NCCL's 10 minutes.
                InitProcessGroupKwargs(timeout=timedelta(hours=3)),
            ],
        )
    except ValueError as error:
        raise UserError(f"--mixed_precision {flags.mixed_precision}: {error}") from None
    device, main = accelerator.device, accelerator.is_main_process
    say = accelerator.print
    set_seed(flags.seed)
    # On Hopper and newer, cuDNN's attention is preferred and builds a graph for each new shape: here, for nearly each
    # micro-batch. (From reading torch's sources; not measured.)
    torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cpu" and not flags.demo:
        say(f"warning: torch {torch.__version__} sees no GPU: this runs on the CPU (is the driver too old for it?)")
    (output_dir,) = accelerate.utils.broadcast_object_list([choose_output_dir(flags) if main else None])
    # With BYTES_PER_TOKEN, 14 GB on a GPU. A CPU gains nothing from large micro-batches.
    micro_batch_tokens = flags.micro_batch_tokens or max(2 * flags.max_length, 8192 if device.type == "cuda" else 2048)
    check_writable(output_dir)
    if flags.report_to != "none":
        accelerator.project_configuration.logging_dir = str(output_dir)
        settings = {name: getattr(flags, name) for name in (*IDENTITY, "max_length")}
        accelerator.init_trackers(output_dir.name, config=settings)
    metrics_file = output_dir / "metrics.jsonl"

    # Data: rows to token ids, split by prompt.
    use_cache_if_hub_is_away(flags.model_name_or_path, flags.ref_model_name_or_path, flags.dataset_name)
    if main:
        announce_downloads(flags, say)
    tokenizer = load_tokenizer(flags.model_name_or_path)
    end_id = end_of_turn_id(tokenizer)
    with accelerator.local_main_process_first():
        data = prepare(
            load_rows(flags.dataset_name, flags.dataset_split),
            tokenizer,
            flags.max_length,
            1 if flags.eval_only else flags.max_train_samples,
            flags.max_eval_samples,
            flags.domains.split(",") if flags.domains else None,
        )
    collate = TreeCollator(micro_batch_tokens, one_row=choose_attention(flags) in ("tree", "flex"))
    steps = StepBatches(data.train, collate, flags, accelerator)
    total_steps = flags.max_steps if flags.max_steps > 0 else math.ceil(flags.num_train_epochs * steps.steps_per_epoch)
    warmup_steps = flags.warmup_steps or math.ceil(flags.warmup_ratio * total_steps)
    if warmup_steps >= total_steps and flags.warmup_steps:
        raise UserError(f"--warmup_steps {warmup_steps}: the run has only {total_steps} steps")

    # Models: the policy, and the reference as it is before the first step.
    policy = load_model(flags.model_name_or_path, flags).to(device)
    start_hash = reference_hash = weights_hash(policy)
    precomputing = flags.precompute_ref_log_probs and not flags.eval_only
    if flags.ref_model_name_or_path not in (None, flags.model_name_or_path):
        reference = load_model(flags.ref_model_name_or_path, flags, "--ref_model_name_or_path").to(device)
        reference_hash = weights_hash(reference)
    else:  # until the first step, the policy is its own reference
        reference = policy if precomputing else copy.deepcopy(policy)
    transformers.logging.disable_progress_bar()  # from here on its bars, of saving, would tear ours
    check_model(policy, tokenizer, flags)
    check_model(reference, tokenizer, flags)
    reference_scorer = ResponseScorer(reference.eval())
    check_scorer(reference_scorer, data.train, collate, accelerator)
    if reference is not policy:
        freeze(reference, flags.mixed_precision)
    if flags.torch_compile:
        compile_layers(policy)
        compile_layers(reference)
    if main:
        check_room(output_dir, sum(weight.numel() for weight in policy.parameters()), flags, say)

    identity = {"policy's start (hash)": start_hash, "reference (hash)": reference_hash, "data": data.fingerprint}
    identity |= {f"--{name}": getattr(flags, name) for name in IDENTITY}
    checkpoint = choose_checkpoint(flags, output_dir, say)
    if checkpoint is not None:
        state = read_state(checkpoint)
        check_identity(state["identity"], identity, checkpoint)
    if main:
        output_dir.mkdir(parents=True, exist_ok=True)
        print("\n".join(header(flags, accelerator, policy, data, tokenizer, steps, total_steps, output_dir)))

    if flags.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if device.type == "cuda" and not flags.eval_only:
        rehearse(policy, None if reference is policy else reference_scorer, accelerator, collate, flags.max_length)
    train_reference, eval_reference = (
        ReferenceLogps(pairs, collate, reference_scorer, accelerator) for pairs in (data.train, data.held_out)
    )
    if precomputing:
        key = {"reference": reference_hash, "data": data.fingerprint, "precision": flags.mixed_precision}
        key |= {"attention": choose_attention(flags), "device": device.type, "code": code_version()}
        precompute({"train": train_reference, "held out": eval_reference}, key, accelerator, say)
        train_reference.scorer = eval_reference.scorer = None
        del reference, reference_scorer  # no second model in memory

    bare_scorer = ResponseScorer(policy.train())
    scorer, optimizer = accelerator.prepare(
        bare_scorer,
        torch.optim.AdamW(
            bare_scorer.parameters(), lr=flags.learning_rate, betas=(0.9, 0.999), eps=1e-8,
            weight_decay=flags.weight_decay, fused=True,
        ),
    )  # fmt: skip
    # Not prepared: a prepared scheduler steps once per process, and the learning rate would fall N times too fast.
    scheduler = get_scheduler(flags.lr_scheduler_type, optimizer.optimizer, warmup_steps, total_steps)

    # Where the run stands: everything that changes from step to step is here, in the weights or in the optimizer.
    step, before = 0, {}
    # Sums over the pairs since the last log line, and their number; added up where they are, looked at when logged.
    window = torch.zeros(len(METRICS + LENGTHS) + 1, dtype=torch.float64, device=device)
    warned: set[str] = set()
    pair_losses = torch.zeros(len(data.train), dtype=torch.float64, device=device)
    first_broken = torch.full((), -1.0, device=device)  # the step whose gradients are not finite
    if checkpoint is not None:
        step, before = state["step"], state["before"]
        load_checkpoint(checkpoint, accelerator, scorer, optimizer, scheduler, window, train_reference)
        window *= main  # it holds the sums of all processes
        if main:
            cut_metrics(metrics_file, step)
            append(metrics_file, {"step": step, "event": "resumed", "checkpoint": checkpoint.name})

    held_out_pairs = data.held_out.read(range(len(data.held_out)))
    held_out_lengths = [
        float(np.mean([len(pair[side]) for pair in held_out_pairs]))
        for side in ("chosen_ids", "rejected_ids")
        if held_out_pairs
    ]

    def write_checkpoint() -> None:
        train_reference.share()
        sums = accelerator.reduce(window, "sum")
        if main:
            tensors = {
                "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "window": sums,
                "reference": {"logps": train_reference.logps.cpu(), "known": torch.from_numpy(train_reference.known)},
                "rng": torch.get_rng_state(),
            }  # fmt: skip

            def write(folder: Path) -> None:
                save_model(accelerator.unwrap_model(scorer).model, tokenizer, folder, end_id)
                torch.save(tensors, folder / "optimizer.pt")

            state = {"step": step, "identity": identity, "before": before}
            try:
                save_checkpoint(output_dir, flags.save_total_limit, write, state)
            except (OSError, SafetensorError, RuntimeError) as error:  # a full disk, as each library puts it
                last = next((str(path) for path in find_checkpoints(output_dir)), "none")
                say(f"warning: no checkpoint at step {step} ({first_line(error)}); the last one: {last}")
        accelerator.wait_for_everyone()

    def look(scorer: torch.nn.Module = scorer, answers: bool = False) -> dict:
        """Held-out figures of the policy as it is now, and its answers if asked for."""
        if not len(data.held_out):
            return {}
        scorer.eval()
        table = evaluate(scorer, eval_reference, data.held_out, collate, accelerator, flags)
        names = np.array(data.held_out.domains)
        found = {"n_pairs": len(table), "metrics": means(table) | dict(zip(LENGTHS, held_out_lengths, strict=True))}
        found["domains"] = {name: means(table[names == name]) for name in sorted(set(data.held_out.domains))}
        if answers and main and flags.max_new_tokens:
            model, indices = accelerator.unwrap_model(scorer).model, pick_prompts(data.held_out)
            with accelerator.autocast():
                found["answers"] = answer(model, tokenizer, data.held_out, indices, end_id, flags.max_new_tokens)
        scorer.train()
        return found

    def log(line: dict) -> None:
        if main:
            try:
                append(metrics_file, line)
            except OSError as error:  # a full disk: training is worth more than its log
                warn("metrics", f"{metrics_file} can't be written to ({first_line(error)})")
            accelerator.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def warn(name: str, text: str) -> None:
        if name not in warned:
            warned.add(name)
            say(f"warning: {text}")

    def log_eval(found: dict) -> None:
        if found:
            log({"step": step, "epoch": round(step / steps.steps_per_epoch, 6)}
                | {f"eval_{name}": value for name, value in found["metrics"].items()})  # fmt: skip

    def check_finite() -> None:
        """Asks the GPU, and so waits for it: only where something is waited for anyway."""
        if first_broken < 0:
            return
        broken = steps.indices(int(first_broken))
        values = accelerator.reduce(pair_losses, "sum")[broken].cpu().numpy()
        culprits = broken[~np.isfinite(values)] if not np.isfinite(values).all() else broken
        rows = ", ".join(str(row) for row in sorted(data.train.rows[culprits].tolist())[:8])
        last = next((f"`{resume_command(output_dir)}`" for _ in find_checkpoints(output_dir)), "there is no checkpoint")
        raise UserError(
            f"the loss or its gradient at step {int(first_broken) + 1} is not finite (row {rows} of the data"
            f"{' and others' if len(culprits) > 8 else ''}); the weights were not changed by it. Look at these rows, "
            f"lower --learning_rate, or try --mixed_precision no. To go on from the last checkpoint: {last}"
        )

    if flags.eval_only:
        before, after = look(reference_scorer, answers=True), look(answers=True)
        if main:
            table = write_report(output_dir / "report.md", before, after, flags, 0)
            print("\n".join(["", *table, *describe_answers(before, after), "", f"report {output_dir / 'report.md'}"]))
        accelerator.end_training()
        return output_dir
    if step == 0:
        before = look(answers=True)
        log_eval(before)
        if before:
            say(describe_eval(0, before["metrics"]))

    if accelerator.num_processes == 1:
        head = policy.get_output_embeddings().weight
        head.grad = bare_scorer.head_grad = torch.zeros_like(head)

    # The loop.
    interrupted, give_signals_back = catch_signals(accelerator)
    loader = torch.utils.data.DataLoader(
        steps, sampler=range(step, total_steps), batch_size=None,
        num_workers=1 if device.type == "cuda" else 0, pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_main,
    )  # fmt: skip
    bar = tqdm(
        total=total_steps, initial=step, disable=not (main and sys.stderr.isatty()),
        bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",  # 80 columns
    )  # fmt: skip
    clock, n_tokens, n_pairs_timed = time.perf_counter(), 0, 0
    for batches in loader:
        n_pairs = len(steps.indices(step))  # over all processes
        with accelerator.autocast():  # around all micro-batches: weights are cast to bf16 once a step
            for i, batch in enumerate(batches):
                index, filler = batch["pair_index"].numpy(), not batch["pair_weight"].any()
                n_tokens += int((batch["branch_ids"] >= 0).sum()) * (not filler)
                batch = to_device(batch, device)
                last = i == len(batches) - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(scorer):
                    policy_logps = of_pairs(scorer(batch), batch)  # [P, 2]
                    losses, metrics = pair_metrics(policy_logps, train_reference(batch, index, filler), flags)
                    # The mean over exactly this step's pairs, however they are cut; DDP will average over processes.
                    loss = (losses * batch["pair_weight"]).sum() * accelerator.num_processes / n_pairs
                    accelerator.backward(loss)
                columns = torch.cat([metrics, of_pairs(batch["response_lengths"], batch)], dim=1)
                window[:-1] += (columns * batch["pair_weight"][:, None]).sum(0)
                window[-1] += batch["pair_weight"].sum()
                if not filler:
                    pair_losses[batch["pair_index"]] = losses.detach()
        grad_norm = accelerator.clip_grad_norm_(scorer.parameters(), flags.max_grad_norm or math.inf)
        if step == 0:
            check_first_step(accelerator.reduce(window, "sum"), start_hash == reference_hash, flags)
        # Once a gradient is not finite, the fused AdamW leaves the weights alone, here and in all later steps.
        bad = (first_broken < 0) & ~torch.isfinite(grad_norm)
        first_broken = torch.where(bad, float(step), first_broken)
        optimizer.optimizer.found_inf = (first_broken >= 0).float()
        if device.type == "cpu":
            check_finite()
        optimizer.step()
        bare_scorer.cast_head = None
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()
        optimizer.zero_grad(set_to_none=False)
        step += 1
        n_pairs_timed += n_pairs
        if step % steps.steps_per_epoch == 0:
            train_reference.share()

        if step == 1 or step % flags.logging_steps == 0 or step == total_steps:
            check_finite()
            totals = accelerator.reduce(window, "sum")
            seconds = time.perf_counter() - clock
            values = (totals[:-1] / totals[-1]).tolist()
            line = {"step": step, "epoch": round(step / steps.steps_per_epoch, 6)}
            line |= dict(zip(METRICS + LENGTHS, values, strict=True))
            line |= {"grad_norm": float(grad_norm), "learning_rate": learning_rate}
            all_tokens = int(accelerator.reduce(torch.tensor(n_tokens, device=device), "sum"))
            line |= {"pairs_per_second": n_pairs_timed / seconds, "tokens_per_second": all_tokens / seconds}
            if device.type == "cuda":
                line["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            log(line)
            bar.set_postfix_str(
                f"loss {line['loss']:.4f}, acc {line['rewards/accuracies']:.2f}, {line['pairs_per_second']:.1f} pairs/s"
            )
            if bar.disable:
                say(describe_step(line, total_steps))
            for name, text in worries(line, flags, warmup_steps):
                bar.clear()
                warn(name, text)
            window.zero_()
            clock, n_tokens, n_pairs_timed = time.perf_counter(), 0, 0
        bar.update()

        if flags.eval_steps and step % flags.eval_steps == 0 and step < total_steps and len(data.held_out):
            paused = time.perf_counter()
            found = look()
            log_eval(found)
            bar.clear()
            say(describe_eval(step, found["metrics"]))
            clock += time.perf_counter() - paused
        stop = interrupted()
        if stop or flags.save_steps and (step % flags.save_steps == 0 or step == total_steps):
            paused = time.perf_counter()
            check_finite()
            write_checkpoint()
            clock += time.perf_counter() - paused
        if stop and step < total_steps:
            bar.close()
            give_signals_back()
            raise Stopped(f"stopped after step {step}; go on with: {resume_command(output_dir)}")
    bar.close()
    give_signals_back()

    # The end: figures, the model, the report, the picture.
    after = look(answers=True)
    log_eval(after)
    if main:
        try:
            save_model(accelerator.unwrap_model(scorer).model, tokenizer, output_dir, end_id)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(
                f"the trained model can't be written to {output_dir} ({first_line(error)}); make room, then: "
                f"{resume_command(output_dir)}"
            ) from None
        table = []
        try:
            table = write_report(output_dir / "report.md", before, after, flags, step)
            _write_whole(output_dir / "README.md", model_card(table, flags, data, step))
            plot_runs([read_run(output_dir)], output_dir / "loss.png")
        except (OSError, PlotError) as error:  # no reason to lose a run's last lines
            say(f"warning: no report or no picture ({first_line(error)})")
        print("\n".join(["", *table, *describe_answers(before, after)]))
        print(f"\nmodel {output_dir}\nreport {output_dir / 'report.md'}\npicture {output_dir / 'loss.png'}")
        if flags.push_to_hub:
            try:
                print(f"uploaded {push(output_dir, flags.hub_model_id or output_dir.name)}")
            except Exception as error:
                raise UserError(
                    f"--push_to_hub: not uploaded ({first_line(error)}); the model is in {output_dir}"
                ) from None
    accelerator.end_training()
    return output_dir


def load_checkpoint(checkpoint, accelerator, scorer, optimizer, scheduler, window, train_reference) -> None:
    from safetensors.torch import load_model as load_safetensors

    try:
        model = accelerator.unwrap_model(scorer).model
        load_safetensors(model, checkpoint / "model.safetensors", strict=False, device=str(accelerator.device))
        tensors = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{checkpoint} can't be read ({type(error).__name__}: {error})") from None
    optimizer.load_state_dict(tensors["optimizer"])
    scheduler.load_state_dict(tensors["scheduler"])
    window.copy_(tensors["window"])
    known = tensors["reference"]["known"]
    train_reference.logps[known] = tensors["reference"]["logps"][known].to(train_reference.logps)
    train_reference.known |= known.numpy()
    torch.set_rng_state(tensors["rng"])


def worries(line: dict, flags: Flags, warmup_steps: int) -> Iterator[tuple[str, str]]:
    """What a log line gives reason to warn of: (name, text). Each is said once in a run."""
    if line["step"] >= 10 and abs(line["loss"] - LN2) < 1e-4:
        if flags.learning_rate == 0:
            why = "--learning_rate is 0"
        elif line["step"] <= warmup_steps:
            why = f"the learning rate is still rising, until step {warmup_steps} (--warmup_ratio, --warmup_steps)"
        elif line["grad_norm"] == 0:
            why = "the gradients are 0"
        elif flags.beta < 0.01:
            why = f"--beta {flags.beta} is so small that the rewards, beta times log-ratio, hardly differ"
        else:
            why = f"--learning_rate {flags.learning_rate} hardly moves the log-probabilities; try ten times as much"
        yield "stuck", f"the loss stays at ln 2 = 0.6931: {why}"
    sunk = -line["rewards/chosen"] / flags.beta / line["lengths/chosen"]
    if sunk > SINKING:
        text = (
            f"the chosen responses have become less likely than under the reference, by {sunk:.2f} nats a token (more "
            f"than {SINKING}): DPO raises only the margin. A lower --learning_rate, fewer steps, a higher --beta help"
        )
        yield "sinking", text


def check_first_step(window: torch.Tensor, same_start: bool, flags: Flags) -> None:
    """At step 0 policy and reference are the same model, so each reward is 0 and the loss ln 2.

    Raises:
        UserError: if it isn't so, or if the loss is not a number.
    """
    values = dict(zip(METRICS + LENGTHS, (window[:-1] / window[-1]).tolist(), strict=True))
    if not math.isfinite(values["loss"]):
        raise UserError(f"the loss at the first step is {values['loss']}: the model's log-probabilities are not finite")
    tolerance = 1e-3 if flags.mixed_precision == "no" else 0.05
    if same_start and max(abs(values["rewards/chosen"]), abs(values["rewards/rejected"])) > tolerance * flags.beta * 10:
        raise UserError(
            f"the loss at the first step is {values['loss']:.4f} and not ln 2 = {LN2:.4f}, though policy and reference "
            f"have the same weights (rewards {values['rewards/chosen']:.4f}, {values['rewards/rejected']:.4f}): they "
            "must compute in the same precision and without dropout"
        )


def rehearse(
    policy: PreTrainedModel, reference: ResponseScorer | None, accelerator: Accelerator, collate: TreeCollator,
    max_length: int,
) -> None:  # fmt: skip
    """Forward and backward of the largest micro-batch there can be, with gradients in place, room taken for AdamW, and
    the reference's forward pass between: if memory runs out, then now and not after an hour.

    Raises:
        UserError: with the number of tokens that should fit.
    """
    device, n_tokens, weights = accelerator.device, collate.micro_batch_tokens, list(policy.parameters())
    cuda = device.type == "cuda"
    resident = torch.cuda.memory_allocated() if cuda else 0
    try:
        room_for_adam = torch.empty(2 * sum(weight.numel() for weight in weights), device=device)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        responses = [[n] + [0] * (max_length - 2) for n in range((n_tokens - 1) // (max_length - 1))]
        pairs = [
            {"index": n, "prompt_ids": [0], "chosen_ids": responses[n], "rejected_ids": responses[n + 1]}
            for n in range(len(responses) - 1)
        ]
        batch = to_device(collate(pairs)[0], device)
        with accelerator.autocast():
            logps = ResponseScorer(policy.train())(batch)
            if reference is not None:
                with torch.no_grad():
                    reference(batch)
            (logps.sum() * 0.0).backward()
        del room_for_adam
    except torch.OutOfMemoryError:
        free, limit = 0, 0
        if cuda:  # what others have taken of the card is not ours, nor what lies beyond the process's share
            free, total = torch.cuda.mem_get_info()
            limit = min(free + torch.cuda.memory_reserved(), torch.cuda.get_per_process_memory_fraction() * total)
        raise UserError(out_of_memory(n_tokens, resident, int(limit), policy)) from None
    finally:
        policy.eval()
        for weight in weights:
            weight.grad = None


def out_of_memory(n_tokens: int, resident: int, limit: int, policy: torch.nn.Module) -> str:
    """What to do, in one line, when `n_tokens` don't fit into `limit` bytes of which `resident` are taken."""
    n_weights = sum(weight.numel() for weight in policy.parameters())
    checkpointing = getattr(policy, "is_gradient_checkpointing", False)
    more = "a larger GPU" if checkpointing else "--gradient_checkpointing, or a larger GPU"
    per_token = BYTES_PER_TOKEN[checkpointing] * n_weights / 494e6
    room = limit - resident - 12 * n_weights  # gradients and AdamW
    fits = min(int(0.8 * n_tokens), int(room / per_token)) // 256 * 256
    if fits < 512:
        return f"the GPU's memory is too small for this model: try {more}"
    return (
        f"the GPU's memory is too small for --micro_batch_tokens {n_tokens}: {fits} should fit (at least twice "
        f"--max_length is needed), or try {more}"
    )


def catch_signals(accelerator: Accelerator) -> tuple[Callable[[], bool], Callable[[], None]]:
    """Two functions: one says True after SIGTERM or Ctrl-C, in all processes alike; one gives the signals back.

    A second signal ends the process at once.
    """
    caught: list[int] = []

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
        if accelerator.is_main_process:
            print("\nfinishing this step, then writing a checkpoint (again: exit at once)", file=sys.stderr)

    # Processes agree through a group of their own on CPUs: a question to the GPU in each step would stall it.
    group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def interrupted() -> bool:
        count = torch.tensor(len(caught))
        if group is not None:
            torch.distributed.all_reduce(count, group=group)
        return bool(count)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}

    def give_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    return interrupted, give_back


def leave_signals_to_main(worker: int) -> None:
    """Ctrl-C and SIGTERM go to whole process groups: a loader that died of them would end the run in the middle."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def resume_command(output_dir: Path) -> str:
    words = sys.argv[1:]
    for name in ("--output_dir", "--resume_from_checkpoint"):
        while name in words:
            del words[words.index(name) : words.index(name) + 2]
        words = [word for word in words if not word.startswith(name + "=")]
    words += ["--output_dir", str(output_dir), "--resume_from_checkpoint", "latest"]
    launcher = "python"
    if (n_processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        launcher = f"accelerate launch --multi_gpu --num_processes {n_processes}"
    if "UV_RUN_RECURSION_DEPTH" in os.environ:
        launcher = f"uv run {launcher}".removesuffix(" python")
    return f"{launcher} dpo_train.py {shlex.join(words)}"


def append(path: Path, line: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines behind a step: the resumed run will write them again."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    _write_whole(path, "".join(line + "\n" for line in kept))


# ---------------------------------------------------------------------------------------------------------------------
# What the terminal shows


def header(flags, accelerator, policy, data: PreparedData, tokenizer, steps, total_steps, output_dir) -> list[str]:
    """What will be trained, on what, how: the lines before the first step."""
    n = sum(p.numel() for p in policy.parameters())
    place = (
        torch.cuda.get_device_name() if accelerator.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    versions = ", ".join(
        f"{module.__name__} {module.__version__}" for module in (torch, transformers, accelerate, datasets)
    )
    shared = unshared = 0
    for step in range(min(20, total_steps)):
        pairs = data.train.read(steps.indices(step))
        unshared += sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs)
        shared += sum(int((batch["branch_ids"] >= 0).sum()) for batch in steps.collate(pairs))
    (pair,) = data.train.read([int(steps.indices(0)[0])])

    def marked(ids) -> str:
        words = [repr(tokenizer.decode([i]))[1:-1] for i in ids]
        if len(words) > 16:
            words = [*words[:8], f"... {len(words) - 12} more ...", *words[-4:]]
        return "|".join(words)

    fields = Flags.__dataclass_fields__
    changed = [f"--{name} {value}" for name, value in asdict(flags).items() if value != fields[name].default]
    prompt_text = repr(tokenizer.decode(pair["prompt_ids"]))[1:-1]
    n_micro = steps.collate.micro_batch_tokens
    lines = [
        ("model", f"{short_name(flags.model_name_or_path)}, {n:,} parameters, float32 weights, "
                  f"{flags.mixed_precision} autocast"),
        ("reference", f"{flags.ref_model_name_or_path or 'the same'}, frozen"),
        ("data", flags.dataset_name),
        *(("", line) for line in data.summary()),
        ("sharing", f"{shared / unshared:.0%} of the tokens that separate rows would need"),
        ("steps", f"{total_steps:,} of {flags.train_batch_size} pairs, micro-batches of up to {n_micro:,} tokens, "
                  f"{accelerator.num_processes} process(es)"),
        ("device", f"{place}, attention {choose_attention(flags)}; {versions}"),
        ("flags", " ".join(changed) or "all defaults"),
        ("output", str(output_dir)),
        ("prompt", f"{'...' if len(prompt_text) > 140 else ''}{prompt_text[-140:]}"),
        ("chosen", f"|{marked(pair['chosen_ids'])}|  (targets between |)"),
        ("rejected", f"|{marked(pair['rejected_ids'])}|"),
    ]  # fmt: skip
    if flags.eval_only:
        lines = [line for line in lines if line[0] not in ("", "sharing", "steps")]
    return [fold(name, text) for name, text in lines]


def fold(name: str, text: str) -> str:
    """A name and a text behind it, broken into lines that fit the terminal. Chinese characters take two columns."""
    wide = "".join(c + "\0" * (unicodedata.east_asian_width(c) in "WF") for c in text)
    width = max(60, min(120, shutil.get_terminal_size().columns)) - 1  # one may be cut in its middle, and stays here
    lines = textwrap.fill(wide, width, initial_indent=f"{name:10}", subsequent_indent=" " * 10, break_on_hyphens=False)
    return lines.replace("\0", "")


def describe_step(line: dict, total_steps: int) -> str:
    return (
        f"step {line['step']}/{total_steps}  loss {line['loss']:.4f}  margin {line['rewards/margins']:.3f}  "
        f"acc {line['rewards/accuracies']:.2f}  lr {line['learning_rate']:.2e}  {line['pairs_per_second']:.2f} pairs/s"
    )


def describe_eval(step: int, metrics: dict[str, float]) -> str:
    return (
        f"step {step}, held out: loss {metrics['loss']:.4f}  margin {metrics['rewards/margins']:.3f}  "
        f"acc {metrics['rewards/accuracies']:.3f} by reward, {metrics['logps/accuracies']:.3f} by logp"
    )


def describe_answers(before: dict, after: dict, n: int = 3) -> list[str]:
    lines = []
    for old, new in list(zip(before.get("answers", []), after.get("answers", []), strict=False))[:n]:
        question = old["prompt"].removesuffix("assistant").strip().splitlines()[-1:]
        texts = (("prompt", "".join(question)[-120:]), ("before", old["answer"][:160]), ("after", new["answer"][:160]))
        lines += ["", *(fold(name, repr(text)[1:-1]) for name, text in texts)]
    return lines


def main(argv: list[str] | None = None) -> int:
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
    rank = os.environ.get("RANK", "0")
    try:
        train(parse_flags(argv))
    except UserError as error:
        if rank == "0":
            print(f"dpo_train.py: {error}", file=sys.stderr)
        elif not isinstance(error, Stopped):
            print(f"dpo_train.py (process {rank}): {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"dpo_train.py: {first_line(error)} Lower --micro_batch_tokens; if the run has a checkpoint, go on from "
              "it with `--resume_from_checkpoint latest`", file=sys.stderr)  # fmt: skip
        return 1
    except KeyboardInterrupt:
        print("dpo_train.py: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # into a pipe or a file, too, a line comes when it is said
    sys.exit(main())
