"""The one idea: a tree row gives what separate rows give, log-probabilities and gradients."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import emulate_varlen, tiny_qwen2

from dataset import TreeCollator, UserError
from loss import ResponseScorer, plan_attention, tree_mask

N_WORDS = 60
SIDES = ("chosen_ids", "rejected_ids")


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
        for side in SIDES:
            ids = torch.tensor([pair["prompt_ids"] + pair[side]])
            n_prompt = len(pair["prompt_ids"])
            logps = model(input_ids=ids).logits[0, n_prompt - 1 : -1].double().log_softmax(-1)
            out.append(logps.gather(1, ids[0, n_prompt:, None]).sum())
    return torch.stack(out).view(-1, 2)


def trees(model, batches, n_pairs):
    """[n, 2] log-probabilities by micro-batches of trees."""
    out = torch.zeros(n_pairs, 2, dtype=torch.float64)
    for batch in batches:
        logps = ResponseScorer(model)(batch)
        sides = torch.stack([logps[batch["chosen_index"]], logps[batch["rejected_index"]]], 1)
        out = out.index_put((batch["pair_index"],), sides)
    return out


def assert_equal_separate_rows(model, collate):
    """Log-probabilities and gradients, in float64 but for the model's own float32 norms."""
    pairs, model = make_pairs(), model.double()
    other = copy.deepcopy(model)
    other.set_attn_implementation("sdpa")
    weights = torch.randn(len(pairs), 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, ours = separate_rows(other, pairs), trees(model, collate(pairs), len(pairs))
    for logps in (expected, ours):
        (logps * weights).sum().backward()
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


ONE_ROW = [
    TreeCollator(10_000, one_row=True), TreeCollator(64, one_row=True), TreeCollator(10_000, one_row=True, share=False)
]  # fmt: skip
ROWS = [TreeCollator(10_000), TreeCollator(64), TreeCollator(10_000, share=False)]


@pytest.mark.parametrize("implementation, collate", [
    *(("sdpa", collate) for collate in ROWS + ONE_ROW), *(("tree", collate) for collate in ONE_ROW),
])  # fmt: skip
def test_trees_equal_separate_rows(implementation, collate):
    model = tiny_qwen2(N_WORDS)
    model.set_attn_implementation(implementation)
    assert_equal_separate_rows(model, collate)


@pytest.mark.parametrize("collate", ONE_ROW)
def test_the_indices_for_varlen_attn_are_right_if_we_read_its_documentation_right(collate, monkeypatch):
    """Index arithmetic alone: the GPU's kernel is not run, but emulated by what its documentation says."""
    emulate_varlen(monkeypatch)
    model = tiny_qwen2(N_WORDS)
    model.set_attn_implementation("tree")
    assert_equal_separate_rows(model, collate)


def test_float32_on_a_gpu_goes_by_segment():
    """The kernel knows no float32."""
    query, key, value = torch.randn(3, 1, 2, 5, 8).unbind(0)
    attend = plan_attention([(0, 5, 0, 0)], torch.float32, torch.device("cuda"))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(attend(query, key, value, None).transpose(1, 2), expected)


@pytest.mark.parametrize("mistake", ["causal mask only", "positions run on", "tree ids ignored", "segments shifted"])
def test_the_comparison_can_fail(mistake):
    """Each wrong way of attending to a tree gives clearly other numbers."""
    pairs, model = make_pairs(), tiny_qwen2(N_WORDS)
    batches = TreeCollator(10_000, one_row=True)(pairs)
    for batch in batches:
        if mistake == "causal mask only":
            batch["branch_ids"] = torch.zeros_like(batch["branch_ids"])
        elif mistake == "positions run on":
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        elif mistake == "tree ids ignored":
            batch["tree_ids"] = torch.zeros_like(batch["tree_ids"])
        else:
            model.set_attn_implementation("tree")
            batch["segments"] = [(a, b, c, max(c, d - 1)) for a, b, c, d in batch["segments"]]
    with torch.no_grad():
        ours = trees(model, batches, len(pairs))
        model.set_attn_implementation("sdpa")
        assert (ours - separate_rows(model, pairs)).abs().max() > 0.1


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
        assert batch["n_tokens"] == (batch["branch_ids"] >= 0).sum() <= batch["input_ids"].numel() <= budget
        assert batch["index_on_host"].tolist() == batch["pair_index"].tolist() and batch["weight"] == 1
        assert len(batch["target_ids"]) == batch["response_lengths"].sum() == (batch["branch_ids"] > 0).sum()
        for index, *sides in zip(
            *(batch[name].tolist() for name in ("pair_index", "chosen_index", "rejected_index")), strict=True
        ):
            for side, response in zip(SIDES, sides, strict=True):
                of_response = batch["response_index"] == response
                assert batch["target_ids"][of_response].tolist() == pairs[index][side]
                first = batch["predictor_index"][of_response][0]
                assert batch["branch_ids"].flatten()[first] == 0  # a prompt's last token predicts a response's first
                assert batch["input_ids"].flatten()[first] == pairs[index]["prompt_ids"][-1]


def test_each_prompt_and_response_is_encoded_once():
    pairs = make_pairs(12, seed=3)
    (batch,) = TreeCollator(100_000)(pairs)
    distinct = {(tuple(p["prompt_ids"]), tuple(p[side])) for p in pairs for side in SIDES}
    prompts = {tuple(p["prompt_ids"]) for p in pairs}
    assert batch["n_tokens"] == sum(map(len, prompts)) + sum(len(response) for _, response in distinct)
    (unshared,) = TreeCollator(100_000, share=False)(pairs)
    assert unshared["n_tokens"] == sum(len(p["prompt_ids"]) + len(p[side]) for p in pairs for side in SIDES)


def test_a_tree_that_fits_is_not_split():
    pairs = make_pairs(12, seed=3)
    prompts = {tuple(pair["prompt_ids"]) for pair in pairs}
    groups = [[pair for pair in pairs if tuple(pair["prompt_ids"]) == prompt] for prompt in prompts]
    sizes = [TreeCollator(100_000)(group)[0]["n_tokens"] for group in groups]
    batches = TreeCollator(max(sizes))(pairs)
    assert len(batches) > 1 and sum(batch["n_tokens"] for batch in batches) == sum(sizes)


def test_a_tree_that_is_cut_is_cut_where_little_is_shared():
    """Two sets of three responses, in turns: each set's pairs stay together, and no response is encoded twice."""
    sets = [[[10 * s + k] * 4 for k in range(3)] for s in (1, 2)]
    pairs = [{"index": 2 * i + s, "prompt_ids": [5, 6], "chosen_ids": sets[s][a], "rejected_ids": sets[s][b]}
             for i, (a, b) in enumerate([(0, 1), (0, 2), (1, 2)]) for s in (0, 1)]  # fmt: skip
    assert [batch["n_tokens"] for batch in TreeCollator(20)(pairs)] == [2 + 3 * 4] * 2


def test_fillers_keep_processes_in_step():
    pairs = make_pairs(2)[:2]
    batches = TreeCollator(10_000)(pairs, n_processes=4)
    assert len(batches) == 4
    real = [batch for batch in batches if batch["weight"]]
    assert sorted(i for batch in real for i in batch["pair_index"].tolist()) == [0, 1]


def test_a_pair_too_long_for_the_budget_is_refused():
    with pytest.raises(UserError, match="--micro_batch_tokens 10 is too small for a pair of 11 tokens"):
        TreeCollator(10)([{"index": 0, "prompt_ids": [1] * 9, "chosen_ids": [1], "rejected_ids": [2]}])


def test_answers_do_not_depend_on_the_attention():
    """Generating, there is no tree: the same tokens as with sdpa, greedy, and the cache is used."""
    model = tiny_qwen2(N_WORDS).eval()
    prompt = torch.arange(1, 20)[None]
    answers = []
    for implementation in ("sdpa", "tree"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            answers.append(model.generate(prompt, max_new_tokens=30, do_sample=False).tolist())
            cache = model(prompt[:, :-1], use_cache=True).past_key_values
            last = model(prompt[:, -1:], past_key_values=cache).logits
            torch.testing.assert_close(last, model(prompt, use_cache=False).logits[:, -1:])
    assert answers[0] == answers[1]
