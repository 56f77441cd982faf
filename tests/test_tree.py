"""The one idea: a step over token trees has the loss and the gradients of separate rows, however its pairs are cut.

What a micro-batch looks like is shown by the example of `TreeCollator`, which is a test, too.
"""

import contextlib
import copy
import itertools
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_qwen2

import loss
from dataset import StepBatches, TreeCollator, UserError, epoch_order
from dpo_train import Compute, Flags, forward_backward, reference_from_model
from loss import ResponseScorer, attend_at_once, attend_by_segment, dpo_loss, plan_attention, tree_attention

CPU, N_WORDS, SIDES = torch.device("cpu"), 60, ("chosen_ids", "rejected_ids")


def compute_as(attend, dtype=torch.float32, device=CPU, n_processes=1):
    accelerator = SimpleNamespace(
        device=device, num_processes=n_processes, no_sync=lambda scorer: contextlib.nullcontext()
    )
    return Compute(accelerator, dtype, attend)


def make_pairs(n_prompts=5, seed=0):
    """Prompts with 4 responses of 2 to 10 tokens, each response in up to 3 pairs; token id 0 occurs everywhere."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(n_prompts):
        prompt = rng.integers(0, N_WORDS, rng.integers(1, 12)).tolist()
        responses = [[*rng.integers(0, N_WORDS, rng.integers(1, 10)).tolist(), k] for k in range(4)]
        for a, b in [(0, 1), (0, 2), (3, 1), (0, 3), (2, 1)][: rng.integers(1, 6)]:
            names = {"prompt_ids": prompt, "chosen_ids": responses[a], "rejected_ids": responses[b]}
            pairs.append({"index": len(pairs)} | names)
    return pairs


PAIRS = make_pairs()


# --- a step


def step_by_rows(model, reference, pairs):
    """The plain way, in float64: a row for each response of each pair, all logits, no code of ours but the loss."""
    model, logps = copy.deepcopy(model).double(), []
    for pair, name, one in itertools.product(pairs, SIDES, (model, copy.deepcopy(reference).double())):
        one.set_attn_implementation("eager")
        n = len(pair["prompt_ids"])
        ids = torch.tensor([pair["prompt_ids"] + pair[name]])
        found = one(input_ids=ids).logits[0, n - 1 : -1].log_softmax(-1)
        logps.append(found.gather(1, ids[0, n:, None]).sum())
    chosen, ref_chosen, rejected, ref_rejected = torch.stack(logps).view(-1, 4).unbind(1)
    mean = dpo_loss(chosen, rejected, ref_chosen.detach(), ref_rejected.detach())[0].mean()
    mean.backward()
    return torch.stack([mean, chosen.mean(), rejected.mean()]).detach(), [w.grad for w in model.parameters()]


def train(model, reference, batches, n_pairs, n_processes=1, attend=attend_by_segment):
    """One process's part of a step, as in training: adds to the gradients, returns the sums."""
    for one in (model, reference):
        one.set_attn_implementation("tree")
    compute = compute_as(attend, n_processes=n_processes)
    loaded = [compute.to_device(batch) for batch in batches]
    scorer, ref_scorer = ResponseScorer(model, torch.float32), ResponseScorer(reference, torch.float32)
    return forward_backward(loaded, n_pairs, scorer, partial(reference_from_model, ref_scorer), compute, Flags())


def step_by_trees(model, reference, pairs, collate, n_processes=1, attend=attend_by_segment, change=lambda batch: None):
    """The same in training: the sum of each process's part, and the mean of the gradients, which DDP takes."""
    batches, model, sums = collate(pairs, n_processes), copy.deepcopy(model), 0
    for batch in batches:
        change(batch)
    for rank in range(n_processes):
        sums += train(model, reference, batches[rank::n_processes], len(pairs), n_processes, attend)
    n_tokens = sum(batch.segments[-1][1] for batch in batches if len(batch.tensors["pair_index"]))
    assert sums[-2] == len(pairs) and sums[-1] == n_tokens  # fillers don't count
    return sums[[0, 5, 6]] / len(pairs), [w.grad / n_processes for w in model.parameters()]


def error(ours, expected):
    """The largest relative error among loss and log-probabilities, and gradients."""
    both = zip([ours[0], *ours[1]], [expected[0], *expected[1]], strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in both)


@pytest.fixture(scope="module")
def two_models():
    models = tiny_qwen2(N_WORDS).eval(), tiny_qwen2(N_WORDS, seed=1).eval()
    return *models, step_by_rows(*models, PAIRS)


def emulated_varlen_attn(query, key, value, query_ends, key_ends, max_q, max_k, scale, window_size, enable_gqa=True):
    """torch's varlen_attn by its documentation: sequences end to end, causal from the lower right corner."""
    assert window_size == (-1, 0) and enable_gqa and query_ends.dtype == key_ends.dtype == torch.int32
    bounds = [list(itertools.pairwise(ends.tolist())) for ends in (query_ends, key_ends)]
    assert [max(b - a for a, b in side) for side in bounds] == [max_q, max_k]
    assert query_ends[-1] == len(query) and key_ends[-1] == len(key) == len(value)
    outputs = []
    for (a, b), (c, d) in zip(*bounds, strict=True):
        k, v = (x[c:d].repeat_interleave(query.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (key, value))
        scores = (query[a:b].transpose(0, 1) @ k.transpose(1, 2)).float() * (scale or query.shape[2] ** -0.5)
        later = torch.ones(b - a, d - c, dtype=torch.bool).triu(d - c - (b - a) + 1)
        outputs.append((scores.masked_fill(later, -torch.inf).softmax(-1).to(v.dtype) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("attend", [attend_by_segment, attend_at_once])
@pytest.mark.parametrize("micro_batch_tokens, n_processes", [(10_000, 1), (64, 1), (40, 3), (10_000, 7)])
def test_a_step_cut_in_any_way_equals_separate_rows(two_models, monkeypatch, micro_batch_tokens, n_processes, attend):
    """In float32; `attend_at_once` with the GPU's kernel emulated. With seven processes there are fillers."""
    monkeypatch.setattr(loss, "varlen_attn", emulated_varlen_attn)
    *models, expected = two_models
    ours = step_by_trees(*models, PAIRS, TreeCollator(micro_batch_tokens), n_processes, attend)
    assert error(ours, expected) < 1e-5


def causal_over_the_row(batch):
    batch.segments[:] = [(0, batch.tensors["input_ids"].numel(), 0, 0)]


def prompt_left_out(batch):
    batch.segments[1] = (*batch.segments[1][:2], *batch.segments[1][:1] * 2)


def prompt_one_token_short(batch):
    batch.segments[:] = [(a, b, c, max(c, d - 1)) for a, b, c, d in batch.segments]


def positions_run_on(batch):
    batch.tensors["position_ids"] = torch.arange(batch.tensors["input_ids"].numel())[None]


MISTAKES = [causal_over_the_row, prompt_left_out, prompt_one_token_short, positions_run_on]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_can_fail(two_models, mistake):
    *models, expected = two_models
    assert error(step_by_trees(*models, PAIRS, TreeCollator(10_000), change=mistake), expected) > 0.01


def test_fillers_have_a_loss_of_exactly_0_and_all_gradients(two_models):
    """None missing: DDP would wait for it."""
    batches, model = TreeCollator(10_000)(PAIRS[:1], 3), copy.deepcopy(two_models[0])
    assert [len(batch.tensors["pair_index"]) for batch in batches] == [1, 0, 0]
    assert not train(model, two_models[1], batches[1:], 1)[:-1].any()
    assert not any(weight.grad.any() for weight in model.parameters())


def test_gradients_of_a_prompt_are_summed_in_float32():
    """600 responses to a prompt, all of one token; each sends back 1/2, which bf16 loses when it is added to 128."""
    segments = [(0, 1, 0, 0), *((i, i + 1, 0, 1) for i in range(1, 601))]
    plan = plan_attention(segments, CPU, torch.bfloat16, attend_by_segment)
    query, key = torch.zeros(2, 1, 1, 601, 8, dtype=torch.bfloat16)
    value = torch.zeros_like(query, requires_grad=True)
    tree_attention(None, query, key, value, None, plan=plan)[0].sum().backward()
    assert value.grad[0, 0, 0].tolist() == [301.0 // 2 * 2] * 8  # 1 + 600 / 2, to the nearest bf16


def test_answers_do_not_depend_on_the_attention():
    """Generating, there is no tree: the same tokens as with sdpa, greedy, and the cache is used."""
    model, prompt, answers = tiny_qwen2(N_WORDS).eval(), torch.arange(1, 20)[None], []
    for implementation in ("sdpa", "tree"):
        model.set_attn_implementation(implementation)
        answers.append(model.generate(prompt, max_new_tokens=30, do_sample=False).tolist())
    assert answers[0] == answers[1]


# --- micro-batches


@pytest.mark.parametrize("budget", [40, 64, 200, 10_000])
def test_micro_batches_keep_to_the_budget_lose_nothing_and_pad_nothing(budget):
    pairs, n_pairs = make_pairs(12, seed=3), 0
    for batch in TreeCollator(budget)(pairs):
        of = batch.tensors
        assert all(type(tensor) is torch.Tensor for tensor in of.values())
        starts, ends = zip(*(segment[:2] for segment in batch.segments), strict=True)
        assert starts == (0, *ends[:-1]) and ends[-1] == of["input_ids"].numel() <= budget
        columns = (of[name].tolist() for name in ("pair_index", "chosen_index", "rejected_index"))
        for number, *responses in zip(*columns, strict=True):
            n_pairs += 1
            for name, response in zip(SIDES, responses, strict=True):
                at = of["response_index"] == response
                assert of["target_ids"][at].tolist() == pairs[number][name]
                assert of["response_lengths"][response] == len(pairs[number][name])
                read = of["input_ids"][0, of["predictor_index"][at]].tolist()
                assert read == [pairs[number]["prompt_ids"][-1], *pairs[number][name][:-1]]
    assert n_pairs == len(pairs)
    for n_processes in (2, 3, 5):
        assert len(TreeCollator(budget)(pairs, n_processes)) % n_processes == 0


def test_each_prompt_and_response_is_encoded_once():
    pairs = make_pairs(12, seed=3)
    (batch,) = TreeCollator(100_000)(pairs)
    prompts = {tuple(pair["prompt_ids"]) for pair in pairs}
    distinct = {(tuple(pair["prompt_ids"]), tuple(pair[name])) for pair in pairs for name in SIDES}
    n_tokens = sum(map(len, prompts)) + sum(len(response) for _, response in distinct)
    assert batch.tensors["input_ids"].numel() == n_tokens


def test_a_tree_is_cut_only_if_it_must_be_and_where_little_is_shared():
    """Two sets of three responses, in turns: each set's pairs stay together, and no response is encoded twice."""
    sets = [[[10 * s + k] * 4 for k in range(3)] for s in (1, 2)]
    pairs = [{"index": 2 * i + s, "prompt_ids": [5, 6], "chosen_ids": sets[s][a], "rejected_ids": sets[s][b]}
             for i, (a, b) in enumerate([(0, 1), (0, 2), (1, 2)]) for s in (0, 1)]  # fmt: skip
    for budget, n_tokens in ((20, [2 + 3 * 4] * 2), (26, [2 + 6 * 4])):
        assert [batch.tensors["input_ids"].numel() for batch in TreeCollator(budget)(pairs)] == n_tokens
    with pytest.raises(UserError, match="--micro_batch_tokens 9 is too small for a pair of 10 tokens"):
        TreeCollator(9)(pairs)


# --- the order of the steps

KEYS = np.array([5, 5, 7, 7, 7, 1, 9, 9, 2, 3, 3, 3])  # of the prompts of twelve pairs


@pytest.mark.parametrize("group_by_prompt", [True, False])
def test_an_epoch_is_a_shuffle_that_keeps_a_prompts_pairs_together(group_by_prompt):
    order, *others = (epoch_order(KEYS, *numbers, group_by_prompt).tolist() for numbers in ((0, 0), (0, 1), (1, 0)))
    assert sorted(order) == list(range(12)) and order not in others and others[0] != others[1]
    assert (np.count_nonzero(np.diff(KEYS[order])) + 1 == len(set(KEYS))) == group_by_prompt


@pytest.mark.parametrize("n_processes", [1, 2, 3])
def test_a_step_has_the_same_pairs_for_any_number_of_processes(n_processes):
    pairs = [{"index": i, "prompt_ids": [key], "chosen_ids": [i, 1], "rejected_ids": [2]} for i, key in enumerate(KEYS)]

    class Set:
        keys, read, __len__ = KEYS, lambda _, index: [pairs[i] for i in index], lambda _: len(KEYS)

    epochs = [epoch_order(KEYS, 3, epoch).tolist() for epoch in (0, 1)]
    expected = [order[i : i + 5] for order in epochs for i in (0, 5, 10)]  # the last step has two pairs
    processes = [StepBatches(Set(), TreeCollator(16), 5, 3, True, rank, n_processes) for rank in range(n_processes)]
    for step in (0, 1, 2, 3, 4, 5, 0, 3):  # in any order: to resume is to begin in the middle
        batches = [steps[step] for steps in processes]
        assert len(set(map(len, batches))) == 1  # processes wait for each other at each micro-batch
        indices = [i for batch in itertools.chain(*batches) for i in batch.tensors["pair_index"].tolist()]
        assert sorted(indices) == sorted(expected[step]) and processes[0].indices(step).tolist() == expected[step]
