"""What TRL gets in eight steps with each loss that both trainers have: writes tests/trl_losses.json.

    uv run --with trl==1.16.0 tests/make_trl_fixture.py

test_loss.py follows these figures without TRL, and compares anew where TRL is installed. TRL gets the token ids that
our trainer makes of conftest.py's rows, in our order, one step's pairs in one padded batch.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

FIXTURE = Path(__file__).with_name("trl_losses.json")
STEPS, PAIRS, SEED, LEARNING_RATE = 8, 6, 42, 1e-3  # PAIRS in a step; two epochs
FLAGS = {  # of dpo_train.py; in float32, everything constant, a step in several micro-batches
    "max_train_samples": 4 * PAIRS, "train_batch_size": PAIRS, "max_steps": STEPS, "seed": SEED, "max_length": 128,
    "micro_batch_tokens": 256, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "warmup_ratio": 0,
    "mixed_precision": "no", "logging_steps": 1, "save_steps": 0, "max_eval_samples": 0,
}  # fmt: skip
CASES = {  # each one's further flags of dpo_train.py
    "sigmoid": {"loss_type": "sigmoid"},
    "sigmoid_norm": {"loss_type": "sigmoid_norm", "beta": 5.0},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "apo_zero": {"loss_type": "apo_zero"},
    "apo_down": {"loss_type": "apo_down"},
    "sigmoid and SFT": {"loss_type": "sigmoid", "sft_weight": 0.1},
}
COMPARED = (  # not the accuracies: a tie counts one half here and nothing in TRL
    "loss", "grad_norm", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins",
)  # fmt: skip


def train_trl(case: str, model: Path, data: Path) -> list[dict[str, float]]:
    """COMPARED of each step, by TRL's DPOTrainer."""
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from dataset import StepBatches, TreeCollator, load_rows, prepare

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset  # our tokens

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    tokenizer, flags = AutoTokenizer.from_pretrained(model), CASES[case]
    pairs = prepare(load_rows(str(data)), tokenizer, FLAGS["max_length"], FLAGS["max_train_samples"], 0).train
    steps = StepBatches(pairs, TreeCollator(FLAGS["micro_batch_tokens"]), PAIRS, SEED)
    rows = [
        {name: list(map(int, pair[name])) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        for step in range(STEPS)
        for pair in pairs.read(steps.indices(step))
    ]
    sft = flags.get("sft_weight")
    # TRL's SFT term is a mean over all chosen tokens of a forward pass, ours over pairs: the same for one pair in each.
    micro_batch = 1 if sft else PAIRS
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder, max_steps=STEPS, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
            per_device_train_batch_size=micro_batch, gradient_accumulation_steps=PAIRS // micro_batch,
            loss_type=[flags["loss_type"], *["sft"] * bool(sft)], loss_weights=[1.0, sft] if sft else None,
            beta=flags.get("beta", 0.1), label_smoothing=flags.get("label_smoothing", 0.0), max_grad_norm=1.0,
            weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, warmup_steps=0, max_length=None,
            bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", logging_steps=1,
            save_strategy="no", disable_tqdm=True, model_init_kwargs={"dtype": torch.float32},
        )  # fmt: skip
        trainer = Trainer(model=str(model), args=config, train_dataset=Dataset.from_list(rows),
                          processing_class=tokenizer)  # fmt: skip
        trainer.train()
    return [{name: float(line[name]) for name in COMPARED} for line in trainer.state.log_history if "loss" in line]


def main() -> None:
    from conftest import make_rows, make_tokenizer, write_jsonl, write_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = write_model(folder / "model", make_tokenizer()), write_jsonl(folder / "pairs.jsonl", make_rows())
        found = {case: train_trl(case, model, data) for case in CASES}
    found = {"made with": {name: version(name) for name in ("trl", "transformers", "torch")}, **found}
    FIXTURE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
