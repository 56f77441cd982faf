"""From a micro-batch of token trees to the losses of its pairs.

In the order of the computation: `ResponseScorer` runs a language model over the trees, in which attention keeps each
response from seeing the other ones; `response_logps` sums log pi(y|x) without ever holding the [tokens, vocabulary]
logits; `dpo_loss` makes a loss of each pair, by one of the formulas in `LOSSES`.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import logsigmoid
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Tokens and words of one tile of logits, on a CPU (docs/performance.md has what was tried) and on a GPU.
TILES = {"cpu": (1024, 4096), "cuda": (2048, 8192)}
# FlashAttention takes fewer key heads as they come; torch's function asks to be told so from 2.13 on.
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

# ---------------------------------------------------------------------------------------------------------------------
# The model over the trees


class ResponseScorer(torch.nn.Module):
    """A causal language model that maps a micro-batch to the log-probabilities of its responses.

    A module of its own, so that what accelerate puts around a model's forward (autocast, DDP) holds for all of it.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, batch: dict) -> torch.Tensor:
        """[M] log pi(y|x) in nats, float64, of the M responses of a micro-batch as `TreeCollator` makes it."""
        head = self.model.get_output_embeddings().weight  # [V, H]
        device = head.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else head.dtype
        if self.model.config._attn_implementation == "tree":
            attention = {"attention_mask": None, "tree": plan_attention(batch["segments"], dtype, device)}
        else:
            attention = {"attention_mask": tree_mask(batch["branch_ids"], batch["tree_ids"], dtype)}  # [R, 1, T, T]
        hidden = self.model.base_model(
            input_ids=batch["input_ids"],  # [R, T]
            position_ids=batch["position_ids"],
            use_cache=False,
            **attention,
        ).last_hidden_state  # [R, T, H]
        hidden = hidden.flatten(0, 1).index_select(0, batch["predictor_index"])  # [N, H]
        n_responses = len(batch["response_lengths"])
        return response_logps(hidden, head, batch["target_ids"], batch["response_index"], n_responses, dtype)


def tree_mask(branch_ids: torch.Tensor, tree_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The additive attention mask of token trees, [R, 1, T, T]: 0 where a query may attend, else the dtype's minimum.

    Args:
        branch_ids, tree_ids: [R, T], as in `TreeCollator`. Padding sees padding: no row of the softmax is empty.
        dtype: that of the attention scores. Additive, because a bool mask is silently wrong under `eager`.
    """
    n = branch_ids.shape[1]
    not_later = torch.ones(n, n, dtype=torch.bool, device=branch_ids.device).tril()
    same_tree = tree_ids[:, :, None] == tree_ids[:, None]
    # The one idea: a token sees the earlier tokens of its own branch and of its tree's prompt, which is branch 0.
    can_attend = not_later & same_tree & ((branch_ids[:, None] == 0) | (branch_ids[:, None] == branch_ids[:, :, None]))
    aligned = -(-n // 8) * 8  # CUDA's kernels copy a mask whose rows are not aligned, once in each layer
    mask = torch.zeros(len(branch_ids), n, aligned, dtype=dtype, device=branch_ids.device)[:, :, :n]
    return mask.masked_fill_(~can_attend, torch.finfo(dtype).min)[:, None]


def tree_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, tree=None, **kwargs):
    """Attention of one row of token trees, without a [T, T] mask: a prompt sees itself, a response also its prompt.

    transformers calls this in each layer, with query [1, heads, T, D] and key and value [1, key heads, T, D], and hands
    `tree` (from `plan_attention`) through. Without it, when generating, it is sdpa.
    """
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary embeddings leave float32 behind
    return tree(query, key, value, scaling), None  # [1, T, heads, D]


AttentionInterface.register("tree", tree_attention)


def plan_attention(segments: list[tuple[int, int, int, int]], dtype: torch.dtype, device: torch.device) -> Callable:
    """How to attend in a micro-batch, made once for all its layers: a function of query, key, value and scaling."""
    if device.type == "cuda" and dtype.itemsize == 2:  # the kernel knows no float32
        return partial(_attend_at_once, _gather_plan(segments, device))
    plan = []
    for start, end, prompt_start, prompt_end in segments:
        n_prompt, n_own, mask = prompt_end - prompt_start, end - start, None
        if n_prompt:  # a response's queries see the whole prompt and, of the response, what is not later
            later = torch.ones(n_own, n_prompt + n_own, dtype=torch.bool, device=device).triu(n_prompt + 1)
            mask = torch.zeros(later.shape, dtype=dtype, device=device).masked_fill_(later, torch.finfo(dtype).min)
        plan.append((slice(start, end), slice(prompt_start, prompt_end), mask))
    return partial(_attend_by_segment, plan)


def _attend_by_segment(plan, query, key, value, scaling) -> torch.Tensor:
    outputs = []
    for own, prompt, mask in plan:
        keys, values = key[:, :, own], value[:, :, own]
        if mask is not None:
            keys = torch.cat([key[:, :, prompt], keys], 2)
            values = torch.cat([value[:, :, prompt], values], 2)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, own], keys, values, mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def _gather_plan(segments: list[tuple[int, int, int, int]], device: torch.device) -> tuple:
    """Queries stay as they are, keys are gathered as [prompt | prompt, response 1 | prompt, response 2 ...]."""
    keys = [np.r_[prompt_start:prompt_end, start:end] for start, end, prompt_start, prompt_end in segments]
    n_queries, n_keys = [end - start for start, end, *_ in segments], [len(index) for index in keys]
    numbers = torch.from_numpy(np.concatenate([*keys, [0], np.cumsum(n_queries), [0], np.cumsum(n_keys)]))
    if device.type == "cuda":  # from pinned memory, the copy waits for nothing
        numbers = numbers.pin_memory().to(device, non_blocking=True)
    key_index, query_ends, key_ends = numbers.split([sum(n_keys), len(segments) + 1, len(segments) + 1])
    return key_index, query_ends.int(), key_ends.int(), max(n_queries), max(n_keys)


def _attend_at_once(plan, query, key, value, scaling) -> torch.Tensor:
    """All segments in one call of torch's kernel. Never run on a GPU by us yet: a test has emulated the kernel."""
    key_index, query_ends, key_ends, max_queries, max_keys = plan
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    keys, values = key.index_select(0, key_index), value.index_select(0, key_index)
    return varlen_attn(
        query.contiguous(), keys, values, query_ends, key_ends, max_queries, max_keys,
        scale=scaling, window_size=(-1, 0), **GQA,
    )[None]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities of the responses


def response_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target_ids: torch.Tensor,
    response_index: torch.Tensor,
    n_responses: int,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Summed log-probabilities of responses: log pi(y|x) = sum over t of log softmax(W h_t)[y_t].

    Args:
        hidden: [N, H] the hidden states that predict the N response tokens.
        weight: [V, H] the LM head.
        target_ids: [N] the response tokens.
        response_index: [N] which of the M responses each token belongs to.
        n_responses: M.
        compute_dtype: of the matrix products (None: hidden's). The log-softmax is float32, or hidden's if wider.

    Returns:
        [M] in nats, float64: in float32, sums around -1,000 are 1e-4 apart, which shows in the loss's fifth digit.
    """
    token_logps = _TokenLogps.apply(hidden, weight, target_ids, compute_dtype or hidden.dtype)  # [N]
    zeros = token_logps.new_zeros(n_responses, dtype=torch.float64)
    return zeros.index_add(0, response_index, token_logps.double())


class _TokenLogps(torch.autograd.Function):
    """[N] log-probabilities of the target tokens, in tiles of tokens by vocabulary.

    The forward pass keeps the logsumexp of each token, the backward pass computes the logits of each tile once more:
    d logp / d logit_v = [v is the target] - softmax_v. The largest thing that ever exists is the weight's gradient.
    Nothing in here asks the GPU for a value.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target_ids, compute_dtype):
        ctx.dtypes = hidden.dtype, weight.dtype
        exact = torch.promote_types(hidden.dtype, torch.float32)
        hidden, weight = hidden.to(compute_dtype), weight.to(compute_dtype)
        logsumexp = torch.full(target_ids.shape, -torch.inf, dtype=exact, device=hidden.device)
        target_logit = torch.zeros_like(logsumexp)
        for tokens, words, logits, _ in _tiles(hidden, weight, exact):
            column, inside = _column_of_target(target_ids[tokens], words)
            target_logit[tokens] += logits.gather(1, column).squeeze(1) * inside
            top = logits.amax(1)
            tile_logsumexp = logits.sub_(top[:, None]).exp_().sum(1).log_().add_(top)
            logsumexp[tokens] = torch.logaddexp(logsumexp[tokens], tile_logsumexp)
        ctx.save_for_backward(hidden, weight, target_ids, logsumexp)
        return target_logit - logsumexp

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, target_ids, logsumexp = ctx.saved_tensors
        exact = logsumexp.dtype
        grad = grad.to(exact)
        grad_hidden = torch.zeros_like(hidden, dtype=exact) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        for tokens, words, logits, low in _tiles(hidden, weight, exact):
            scale = grad[tokens, None]
            column, inside = _column_of_target(target_ids[tokens], words)
            grad_logits = logits.sub_(logsumexp[tokens, None]).exp_().mul_(-scale)
            grad_logits.scatter_add_(1, column, scale * inside[:, None])
            low.copy_(grad_logits)  # the products below are in compute_dtype, their sums over tiles are exact
            if grad_hidden is not None:
                grad_hidden[tokens] += low @ weight[words]
            if grad_weight is not None:
                grad_weight[words] += low.T @ hidden[tokens]
        grads = zip((grad_hidden, grad_weight), ctx.dtypes, strict=True)
        return *(None if tensor is None else tensor.to(dtype) for tensor, dtype in grads), None, None


def _tiles(hidden: torch.Tensor, weight: torch.Tensor, exact: torch.dtype) -> Iterator[tuple]:
    """Slices of tokens and of vocabulary; their logits in `exact`, and a buffer of that shape in hidden's dtype.

    All tiles live in the same two buffers (one, where the dtypes agree): done with before the next one.
    """
    n_tokens, n_words = len(hidden), len(weight)
    tile_tokens, tile_words = TILES[hidden.device.type]
    size = min(n_tokens, tile_tokens) * min(n_words, tile_words)
    low_buffer = hidden.new_empty(size)
    exact_buffer = low_buffer if hidden.dtype == exact else low_buffer.to(exact)
    for word in range(0, n_words, tile_words):
        words = slice(word, min(word + tile_words, n_words))
        for token in range(0, n_tokens, tile_tokens):
            tokens = slice(token, min(token + tile_tokens, n_tokens))
            shape = tokens.stop - tokens.start, words.stop - words.start
            low, logits = (buffer[: shape[0] * shape[1]].view(shape) for buffer in (low_buffer, exact_buffer))
            torch.mm(hidden[tokens], weight[words].T, out=low)
            yield tokens, words, logits.copy_(low), low


def _column_of_target(target_ids: torch.Tensor, words: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's target in this tile, [n, 1], and whether it is there at all, [n]; if not, column 0 stands in."""
    inside = (target_ids >= words.start) & (target_ids < words.stop)
    return torch.where(inside, target_ids - words.start, 0)[:, None], inside


# ---------------------------------------------------------------------------------------------------------------------
# The losses of the pairs

# The loss of each pair, [P], by name: names and definitions are TRL's, which knows no eps in sigmoid. Of a pair, [P]:
#   c, r      log-ratios log pi_theta(y|x) / pi_ref(y|x) of the chosen and the rejected response, in nats
#   n_c, n_r  their lengths in tokens, the end-of-turn included
#   beta, eps two numbers: --beta and --label_smoothing
# To add a loss, add a line: --loss_type offers it.
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    # DPO, arXiv 2305.18290 eq. 7; with eps > 0 conservative DPO: labels are taken to be swapped with that probability.
    "sigmoid": lambda c, r, n_c, n_r, beta, eps:
        (eps - 1) * logsigmoid(beta * (c - r)) - eps * logsigmoid(beta * (r - c)),
    # Length-normalized DPO, arXiv 2411.15124 (Tulu 3): log-ratios a token. Beta is then larger, 5 for example.
    "sigmoid_norm": lambda c, r, n_c, n_r, beta, eps: -logsigmoid(beta * (c / n_c - r / n_r)),
    # SLiC's hinge, arXiv 2305.10425, on DPO's margin, as in RSO, arXiv 2309.06657.
    "hinge": lambda c, r, n_c, n_r, beta, eps: torch.relu(1 - beta * (c - r)),
    # IPO, arXiv 2310.12036 eq. 17, on log-ratios a token, as its authors compute it.
    "ipo": lambda c, r, n_c, n_r, beta, eps: (c / n_c - r / n_r - 1 / (2 * beta)) ** 2,
    # Robust DPO, arXiv 2403.00409 section 3.1: unbiased if labels are swapped with probability eps.
    "robust": lambda c, r, n_c, n_r, beta, eps:
        ((eps - 1) * logsigmoid(beta * (c - r)) + eps * logsigmoid(beta * (r - c))) / (1 - 2 * eps),
    # APO-zero, arXiv 2408.06266 eq. 7: raises the chosen, lowers the rejected response.
    "apo_zero": lambda c, r, n_c, n_r, beta, eps: 1 - torch.sigmoid(beta * c) + torch.sigmoid(beta * r),
    # APO-down, arXiv 2408.06266 eq. 8: lowers both, the rejected response more; for chosen ones worse than the model's.
    "apo_down": lambda c, r, n_c, n_r, beta, eps: torch.sigmoid(beta * c) + 1 - torch.sigmoid(beta * (c - r)),
}  # fmt: skip


def dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    ref_chosen_logps: torch.Tensor,
    ref_rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor | None = None,
    rejected_lengths: torch.Tensor | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    sft_weight: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of each pair, and the implicit rewards of its two responses.

    Args:
        policy_chosen_logps: [P] log pi_theta(y_w|x), summed over the response's tokens, in nats.
        policy_rejected_logps: [P] log pi_theta(y_l|x).
        ref_chosen_logps: [P] log pi_ref(y_w|x).
        ref_rejected_logps: [P] log pi_ref(y_l|x).
        chosen_lengths, rejected_lengths: [P] tokens of the responses; only some losses and the SFT term need them.
        beta: how strongly the policy is held to the reference: a higher beta means less deviation from it.
        label_smoothing: the assumed share of pairs with swapped labels, in [0, 0.5), for `sigmoid` and `robust`.
        loss_type: a name in `LOSSES`.
        sft_weight: adds this many times the chosen response's negative log-likelihood a token.

    Returns:
        losses, chosen_rewards, rejected_rewards: [P] each, in nats; only the losses carry a gradient. No mean is taken.

    Raises:
        KeyError: for an unknown loss_type.
    """
    chosen_logratios = policy_chosen_logps - ref_chosen_logps  # log pi_theta(y_w|x) / pi_ref(y_w|x)
    rejected_logratios = policy_rejected_logps - ref_rejected_logps  # log pi_theta(y_l|x) / pi_ref(y_l|x)
    lengths = chosen_lengths, rejected_lengths
    losses = LOSSES[loss_type](chosen_logratios, rejected_logratios, *lengths, beta, label_smoothing)
    if sft_weight:
        losses = losses - sft_weight * policy_chosen_logps / chosen_lengths
    # Eq. 5's reward, beta * log-ratio; its part that depends on the prompt alone cancels in a pair.
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()
