"""The check of a model before training: families that train as separate rows would, or are refused in one line.

docs/guide.md has the table. Weights are random and tiny; what counts is the architecture.
"""

from types import SimpleNamespace

import pytest
import torch
import transformers
from test_tree import (
    CPU,
    N_WORDS,
    PAIRS,
    compute_as,
    emulated_varlen_attn,
    error,
    make_pairs,
    step_by_rows,
    step_by_trees,
)
from transformers import AutoModelForCausalLM

import loss
from dataset import TreeCollator, UserError
from dpo_train import check_model
from loss import attend_at_once, attend_by_segment, plan_attention, tree_attention

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
ACCEPTED = {
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Llama": {"rope_theta": 5e5},
    "Mistral": {"sliding_window": None},
    "Phi3": {},
    "SmolLM3": {},
    "Gemma3Text": {"sliding_window": 4096},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "Persimmon": {},
    "Qwen2Moe": EXPERTS | {"shared_expert_intermediate_size": 32},
    "Qwen3Moe": EXPERTS,
    "Mixtral": {"num_local_experts": 4},
}
SHORT = "looks back 64 tokens only, a pair has 128"
DIFFER = "over shared prompts"
REFUSED = [  # what would be trained in silence is refused for the right reason; others whatever they raise
    ("Mistral", {"sliding_window": 64}, SHORT),
    ("Gemma3Text", {"sliding_window": 64}, SHORT),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, SHORT),
    ("Gemma2", {"sliding_window": 4096, "query_pre_attn_scalar": 8}, "attention has softcap"),
    ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4096}, "attention has s_aux"),
    ("Bloom", {"n_layer": 2, "n_head": 4}, ""),
    ("Cohere", {"logit_scale": 0.5}, DIFFER),
    ("Granite", {"logits_scaling": 2.0}, DIFFER),
    ("Phi", {}, DIFFER),  # its head has a bias, of 0 here
    ("Falcon", {}, ""),
    ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2}, ""),
]  # fmt: skip


def make_model(name, changes, seed=0):
    torch.manual_seed(seed)
    sizes = {} if name in ("GPT2", "Mpt") else SMALL
    if name == "Falcon":
        sizes = {key: value for key, value in SMALL.items() if key != "head_dim"}
    config = getattr(transformers, f"{name}Config")(vocab_size=N_WORDS, **sizes | changes)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    if name in ("Qwen2Moe", "Qwen3Moe", "Mixtral"):
        model.set_experts_implementation("eager")  # the other one knows no float64
    return model.eval()


def check(model, dtype=torch.float32, attend=attend_by_segment, max_length=128):
    given, said = compute_as(attend, dtype), []
    found = check_model(model, SimpleNamespace(read=lambda _: make_pairs()[:1]), given, max_length, said.append)
    assert (found == given) == (not said) and found.dtype == dtype
    return found.attend, said[0] if said else None


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_and_trains_as_separate_rows(name):
    policy, reference = (make_model(name, ACCEPTED[name], seed) for seed in (0, 1))
    for dtype in (torch.float32, torch.bfloat16):
        assert check(policy, dtype) == (attend_by_segment, None)
    pairs = PAIRS[:5]
    expected = step_by_rows(policy, reference, pairs)
    assert error(step_by_trees(policy, reference, pairs, TreeCollator(40)), expected) < 1e-5


@pytest.mark.parametrize("name, changes, reason", REFUSED)
def test_refused_in_one_line(name, changes, reason):
    with pytest.raises(UserError) as caught:
        check(make_model(name, changes))
    text = str(caught.value)
    assert name.removesuffix("Text") in text and "can't be trained here: " in text
    assert reason in text and "\n" not in text


def test_an_attention_with_an_unknown_keyword_is_refused():
    plan = plan_attention([(0, 2, 0, 0)], CPU, torch.float32, attend_by_segment)
    states = torch.zeros(3, 1, 1, 2, 8)
    assert tree_attention(None, *states, None, plan=plan, is_causal=True, new_thing=None)[0].shape == (1, 2, 1, 8)
    with pytest.raises(UserError, match="model's attention has new_thing, which is not understood"):
        tree_attention(None, *states, None, plan=plan, new_thing=1)


# --- the kernel for GPUs, emulated


def without_the_prompt(query, key, value, query_ends, key_ends, *others, **settings):
    """For the last response only."""
    keys, n = key[: key_ends[-2]], int(query_ends[-1] - query_ends[-2])
    key, value = (torch.cat([x[: len(keys)], x[-n:].repeat(len(x), 1, 1)[: len(x) - len(keys)]]) for x in (key, value))
    return emulated_varlen_attn(query, key, value, query_ends, key_ends, *others, **settings)


def without_gradients_of_keys(query, key, value, *others, **settings):
    return emulated_varlen_attn(query, key.detach(), value, *others, **settings)


WRONG = {  # what the warning says
    "raises": (loss.varlen_attn, ""),
    "no prompt": (without_the_prompt, "log-probabilities over shared prompts"),
    "no gradients": (without_gradients_of_keys, "gradients over shared prompts are"),
}


@pytest.mark.parametrize("kernel, reason", WRONG.values(), ids=WRONG)
def test_a_kernel_that_is_wrong_is_not_used(monkeypatch, kernel, reason):
    monkeypatch.setattr(loss, "varlen_attn", kernel)
    attend, warning = check(make_model("Qwen2", {}), torch.bfloat16, attend_at_once)
    assert attend is attend_by_segment
    assert f"FlashAttention can't be used ({reason}" in warning and "attention goes segment by segment" in warning


def test_a_kernel_that_is_right_is_used(monkeypatch):
    monkeypatch.setattr(loss, "varlen_attn", emulated_varlen_attn)
    assert check(make_model("Qwen2", {}), torch.bfloat16, attend_at_once)[1] is None
