"""The one idea: a tree row gives what separate rows give, log-probabilities and gradients."""

import copy
import itertools

import numpy as np
import pytest
import torch
from conftest import emulate_gpu_attention, tiny_qwen2

import dataset
import dpo_train
from dataset import TreeCollator, tree_mask
from dpo_train import ResponseScorer, of_pairs

N_WORDS = 60


def make_pairs(n_prompts=5, seed=0):
    """Prompts with 4 responses of 1 to 9 tokens, each response in up to 3 pairs; token id 0 occurs everywhere."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(n_prompts):
        prompt = rng.integers(0, N_WORDS, rng.integers(1, 12)).tolist()
        responses = [rng.integers(0, N_WORDS, rng.integers(1, 10)).tolist() + [k] for k in range(4)]
        for a, b in [(0, 1), (0, 2), (3, 1), (0, 3), (2, 1)][: rng.integers(1, 6)]:
            pairs.append(
                {"index": len(pairs), "prompt_ids": prompt, "chosen_ids": responses[a], "rejected_ids": responses[b]}
            )
    return pairs


def separate_rows(model, pairs):
    """[n, 2] log-probabilities the plain way: a row for each response of each pair, full logits, float64 softmax."""
    out = []
    for pair in pairs:
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([pair["prompt_ids"] + pair[side]])
            n_prompt = len(pair["prompt_ids"])
            logps = model(input_ids=ids).logits[0, n_prompt - 1 : -1].double().log_softmax(-1)
            out.append(logps.gather(1, ids[0, n_prompt:, None]).sum())
    return torch.stack(out).view(-1, 2)


def trees(scorer, pairs, collate):
    out = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for batch in collate(pairs):
        out = out.index_put((batch["pair_index"],), of_pairs(scorer(batch), batch))
    return out


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("implementation, collate", [
    *itertools.product(["sdpa", "eager"], [
        TreeCollator(10_000), TreeCollator(64), TreeCollator(10_000, one_row=True), TreeCollator(10_000, share=False),
    ]),
    *itertools.product(["tree", "tree, as on a GPU", "flex, as on a GPU"], [
        TreeCollator(10_000, one_row=True), TreeCollator(64, one_row=True),
        TreeCollator(10_000, one_row=True, share=False),
    ]),
])  # fmt: skip
def test_trees_equal_separate_rows(implementation, collate, monkeypatch):
    implementation, _, emulated = implementation.partition(", ")
    if emulated:
        emulate_gpu_attention(monkeypatch, implementation)
    pairs = make_pairs()
    model = tiny_qwen2(N_WORDS)
    model.set_attn_implementation(implementation)
    other = copy.deepcopy(model)
    weights = torch.randn(len(pairs), 2, generator=torch.Generator().manual_seed(1))

    expected = separate_rows(other, pairs)
    (expected * weights).sum().backward()
    ours = trees(ResponseScorer(model), pairs, collate)
    (ours * weights).sum().backward()
    torch.testing.assert_close(ours.double(), expected, atol=2e-4, rtol=1e-5)
    theirs = gradients(other)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(
            gradient, theirs[name], atol=2e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_flex_compiled_without_gradients(slow):
    """What can be compiled on a CPU: several lengths, so that the kernel is made for any length."""
    pairs, model = make_pairs(), tiny_qwen2(N_WORDS)
    model.set_attn_implementation("flex")
    with torch.no_grad():
        expected = separate_rows(model.eval(), pairs)
        for budget in (64, 128, 10_000):
            ours = trees(ResponseScorer(model), pairs, TreeCollator(budget, one_row=True))
            torch.testing.assert_close(ours.double(), expected, atol=2e-4, rtol=1e-5)


def test_what_the_kernel_of_a_gpu_does_not_know_goes_by_segment():
    segments, gpu = [(0, 3, 0, 0)], torch.device("cuda")
    assert dpo_train._tree(segments, torch.float32, gpu) == [((0, 3, 0, 0), None)]


@pytest.mark.parametrize("mistake", ["causal mask only", "positions run on", "tree ids ignored"])
def test_the_comparison_can_fail(mistake, monkeypatch):
    """Each wrong way of attending to a tree gives clearly other numbers."""
    pairs, model = make_pairs(), tiny_qwen2(N_WORDS)
    expected = separate_rows(model, pairs)
    batches = TreeCollator(10_000, one_row=True)(pairs)
    for batch in batches:
        if mistake == "causal mask only":
            batch["branch_ids"] = torch.zeros_like(batch["branch_ids"])
        elif mistake == "positions run on":
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        else:
            batch["tree_ids"] = torch.zeros_like(batch["tree_ids"])
    ours = trees(ResponseScorer(model), pairs, lambda _: batches)
    assert (ours.double() - expected).abs().max() > 0.1


def test_mask_by_hand():
    """Prompt a b, responses c d and e; then a second tree f with response g; one padding token."""
    branch_ids = torch.tensor([[0, 0, 1, 1, 2, 0, 3, -1]])
    tree_ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1, -1]])
    seen = tree_mask(branch_ids, tree_ids, torch.float32)[0, 0] == 0
    expected = [
        "x.......",
        "xx......",
        "xxx.....",
        "xxxx....",
        "xx..x...",
        ".....x..",
        ".....xx.",
        ".......x",
    ]
    assert ["".join(".x"[int(value)] for value in row) for row in seen] == expected


@pytest.mark.parametrize("budget", [40, 64, 200, 10_000])
@pytest.mark.parametrize("one_row", [False, True])
def test_micro_batches_keep_to_the_budget_and_lose_nothing(budget, one_row):
    pairs = make_pairs(12, seed=3)
    batches = TreeCollator(budget, one_row=one_row)(pairs)
    assert sorted(i for batch in batches for i in batch["pair_index"].tolist()) == list(range(len(pairs)))
    for batch in batches:
        assert batch["input_ids"].numel() <= budget
        assert len(batch["target_ids"]) == batch["response_lengths"].sum() == (batch["branch_ids"] > 0).sum()
        for index, *sides in zip(
            *(batch[name].tolist() for name in ("pair_index", "chosen_index", "rejected_index")), strict=True
        ):
            for side, response in zip(("chosen_ids", "rejected_ids"), sides, strict=True):
                of_response = batch["response_index"] == response
                assert batch["target_ids"][of_response].tolist() == pairs[index][side]
                first = batch["predictor_index"][of_response][0]
                assert batch["branch_ids"].flatten()[first] == 0  # a prompt's last token predicts a response's first
                assert batch["input_ids"].flatten()[first] == pairs[index]["prompt_ids"][-1]


def test_each_prompt_and_response_is_encoded_once():
    pairs = make_pairs(12, seed=3)
    (batch,) = TreeCollator(100_000)(pairs)
    distinct = {(tuple(p["prompt_ids"]), tuple(p[side])) for p in pairs for side in ("chosen_ids", "rejected_ids")}
    prompts = {tuple(p["prompt_ids"]) for p in pairs}
    expected = sum(map(len, prompts)) + sum(len(response) for _, response in distinct)
    assert (batch["branch_ids"] >= 0).sum() == expected
    (unshared,) = TreeCollator(100_000, share=False)(pairs)
    assert (unshared["branch_ids"] >= 0).sum() == sum(
        2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs
    )


def test_a_tree_that_fits_is_not_split():
    pairs = make_pairs(12, seed=3)
    largest = max(unit.n_tokens for unit in TreeCollator(100_000)._units(pairs))
    batches = TreeCollator(largest)(pairs)
    assert len(batches) > 1
    prompts = [tuple(row[tree == t][(branch == 0)[tree == t]].tolist()) for batch in batches
               for row, branch, tree in zip(batch["input_ids"], batch["branch_ids"], batch["tree_ids"], strict=True)
               for t in range(int(tree.max()) + 1)]  # fmt: skip
    assert len(prompts) == len(set(prompts)) == len({tuple(p["prompt_ids"]) for p in pairs})


def test_fillers_keep_processes_in_step():
    pairs = make_pairs(2)[:2]
    batches = TreeCollator(10_000)(pairs, n_processes=4)
    assert len(batches) == 4
    assert sum(batch["pair_weight"].sum().item() for batch in batches) == 2


def test_a_pair_too_long_for_the_budget_is_refused():
    with pytest.raises(dataset.UserError, match="--micro_batch_tokens 10 is too small for a pair of"):
        TreeCollator(10)([{"index": 0, "prompt_ids": [1] * 9, "chosen_ids": [1], "rejected_ids": [2]}])


def test_answers_do_not_depend_on_the_attention():
    """Generating, there is no tree: the same tokens as with sdpa, greedy, and the cache is used."""
    model = tiny_qwen2(N_WORDS).eval()
    prompt = torch.arange(1, 20)[None]
    answers = []
    for implementation in ("sdpa", "tree", "flex"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            answers.append(model.generate(prompt, max_new_tokens=30, do_sample=False).tolist())
            cache = model(prompt[:, :-1], use_cache=True).past_key_values
            last = model(prompt[:, -1:], past_key_values=cache).logits
            torch.testing.assert_close(last, model(prompt, use_cache=False).logits[:, -1:])
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("stored_in_bf16", [True, False])
def test_freezing_changes_no_value(stored_in_bf16):
    """Cast once or in every forward pass: the same bits. Embeddings that bf16 can hold exactly are kept once."""
    model = tiny_qwen2(N_WORDS)
    if stored_in_bf16:
        model = model.bfloat16().float()
    pairs = make_pairs()
    (batch,) = TreeCollator(10_000)(pairs)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = ResponseScorer(model)(batch)
        frozen = dpo_train.freeze(copy.deepcopy(model), "bf16")
        assert torch.equal(ResponseScorer(frozen)(batch), expected)
    assert (frozen.model.embed_tokens.weight.dtype == torch.bfloat16) == stored_in_bf16
    assert frozen.lm_head.weight.dtype == frozen.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert frozen.model.norm.weight.dtype == torch.float32
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    unchanged = dpo_train.freeze(copy.deepcopy(model), "no")
    assert all(weight.dtype == torch.float32 for weight in unchanged.parameters())
