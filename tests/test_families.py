"""Families of models: each trains with the losses of a naive loop over separate rows, or is refused in one line.

docs/guide.md has the table. Weights are random and tiny; what counts is the architecture (and the chat template).
"""

import copy

import pytest
import torch
import transformers
from conftest import CHATML, make_rows, write_jsonl
from test_train import arguments, losses, run, type_here
from transformers import AutoModelForCausalLM

from dataset import StepBatches, TreeCollator, load_rows, prepare
from loss import dpo_loss

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
QWEN3 = CHATML.replace(  # as Qwen3's template does for the last turn
    "{{ m['content'] }}<|im_end|>",
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>",
)
FAMILIES = {
    "Qwen2": ("Qwen2", {"tie_word_embeddings": True}, CHATML),
    "Qwen3, empty think block": ("Qwen3", {}, QWEN3),
    "Qwen2-MoE": ("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 32}, CHATML),
    "Qwen3-MoE": ("Qwen3Moe", EXPERTS, CHATML),
    "Mixtral": ("Mixtral", {"num_local_experts": 4}, CHATML),
    "Llama 3": ("Llama", {"rope_theta": 5e5}, CHATML),
    "Mistral, no window": ("Mistral", {"sliding_window": None}, CHATML),
    "Phi 3": ("Phi3", {"pad_token_id": 0}, CHATML),
    "Gemma 3, window 4096": ("Gemma3Text", {"sliding_window": 4096}, CHATML),
    "SmolLM3": ("SmolLM3", {"pad_token_id": 0}, CHATML),
    "GPT-2, plain text": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}, None),
}
REFUSED = {
    "Mistral, window 64": ("Mistral", {"sliding_window": 64}, "looks back 64 tokens only"),
    "Gemma 2": ("Gemma2", {"sliding_window": 4096, "query_pre_attn_scalar": 8}, "Gemma2ForCausalLM can't be trained"),
    "Gemma 3": ("Gemma3Text", {"sliding_window": 64}, "looks back 64 tokens only"),
}


def make_model(folder, tokenizer, name, changes, template):
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{name}Config")
    small = {} if name == "GPT2" else SMALL
    config = config_class(vocab_size=len(tokenizer), **small | changes)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def plain_rows():
    for row in make_rows():
        yield {"prompt": row["conversations"][0]["value"], **{k: row[k]["value"] for k in ("chosen", "rejected")}}


def naive_losses(folder, data_file, tokenizer, n_steps):
    data = prepare(load_rows(str(data_file)), tokenizer, 128, 40, 8)
    steps = StepBatches(data.train, TreeCollator(2048), 8, seed=42)
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    found = []
    for step in range(n_steps):
        columns = []
        for pair in data.train.read(steps.indices(step)):
            for model in (policy, reference):
                for side in ("chosen_ids", "rejected_ids"):
                    n = len(pair["prompt_ids"])
                    ids = torch.tensor([[*pair["prompt_ids"], *pair[side]]])
                    logps = model(input_ids=ids).logits[0, n - 1 : -1].double().log_softmax(-1)
                    columns.append(logps.gather(1, ids[0, n:, None]).sum())
        scores = torch.stack(columns).view(-1, 4)
        loss = dpo_loss(*scores[:, :2].unbind(1), *scores[:, 2:].detach().unbind(1))[0].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_separate_rows(family, tmp_path, tokenizer):
    name, changes, template = FAMILIES[family]
    own = make_model(tmp_path / "model", tokenizer, name, changes, template)
    data_file = write_jsonl(tmp_path / "pairs.jsonl", list(plain_rows()) if template is None else make_rows())
    settings = {"max_steps": 3, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    settings |= {"max_eval_samples": 8, "max_train_samples": 40}
    found = losses(run(tmp_path / "model", data_file, tmp_path / "run", **settings))
    assert found == pytest.approx(naive_losses(tmp_path / "model", data_file, own, 3), abs=1e-4)
    assert abs(found[-1] - found[0]) > 1e-3  # it has moved


@pytest.mark.parametrize("family", REFUSED)
def test_refused_in_one_line(family, tmp_path, tokenizer, data_file):
    name, changes, reason = REFUSED[family]
    make_model(tmp_path / "model", tokenizer, name, changes, CHATML)
    length = 512 if "Gemma 2" in family else 128
    done = type_here(arguments(tmp_path / "model", data_file, tmp_path / "run", max_length=length))
    assert done.returncode == 1 and reason in done.stderr and done.stderr.count("\n") == 1


def test_the_empty_think_block_is_part_of_the_target(tmp_path, tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = QWEN3
    rows = write_jsonl(tmp_path / "pairs.jsonl", make_rows())
    (pair,) = prepare(load_rows(str(rows)), own).train.read([0])
    assert own.decode(pair["chosen_ids"]).startswith("<think>\n\n</think>\n\n")
    assert own.decode(pair["prompt_ids"]).endswith("<|im_start|>assistant\n")


def test_messages_need_a_chat_template(tmp_path, tokenizer, data_file):
    make_model(tmp_path / "model", tokenizer, "GPT2", FAMILIES["GPT-2, plain text"][1], None)
    done = type_here(arguments(tmp_path / "model", data_file, tmp_path / "run"))
    assert done.returncode == 1 and "the tokenizer has no chat template" in done.stderr
