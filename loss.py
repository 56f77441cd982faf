"""From the log-probabilities of pairs to their losses, and from a micro-batch of token trees to log-probabilities.

`dpo_loss` makes a loss of each pair, by one of the formulas in `LOSSES`. The log-probabilities come from
`ResponseScorer`, a language model over token trees: `tree_attention` lets a response see its prompt and itself, and
`response_logps` sums log pi(y|x) without ever holding the [tokens, vocabulary] logits.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dataset import UserError

# ---------------------------------------------------------------------------------------------------------------------
# The losses of the pairs

# The loss of each pair, [P], by name: names and definitions are TRL's (1.16 has no eps in sigmoid). Of a pair, [P]:
#   c, r      log-ratios log pi_theta(y|x) / pi_ref(y|x) of the chosen and the rejected response, in nats
#   n_c, n_r  their lengths in tokens, the end-of-turn included
#   beta, eps two numbers: --beta and --label_smoothing
# To add a loss, add a line: --loss_type offers it.
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    # DPO, arXiv 2305.18290 eq. 7; with eps > 0 conservative DPO: labels are taken to be swapped with that probability.
    "sigmoid": lambda c, r, n_c, n_r, beta, eps:
        (eps - 1) * F.logsigmoid(beta * (c - r)) - eps * F.logsigmoid(beta * (r - c)),
    # Length-normalized DPO, arXiv 2411.15124 (Tulu 3): log-ratios per token. Beta is then larger, 5 for example.
    "sigmoid_norm": lambda c, r, n_c, n_r, beta, eps: -F.logsigmoid(beta * (c / n_c - r / n_r)),
    # SLiC's hinge, arXiv 2305.10425, on DPO's margin, as in RSO, arXiv 2309.06657.
    "hinge": lambda c, r, n_c, n_r, beta, eps: torch.relu(1 - beta * (c - r)),
    # IPO, arXiv 2310.12036 eq. 17, on log-ratios per token, as its authors compute it.
    "ipo": lambda c, r, n_c, n_r, beta, eps: (c / n_c - r / n_r - 1 / (2 * beta)) ** 2,
    # Robust DPO, arXiv 2403.00409 section 3.1: unbiased if labels are swapped with probability eps.
    "robust": lambda c, r, n_c, n_r, beta, eps:
        ((eps - 1) * F.logsigmoid(beta * (c - r)) + eps * F.logsigmoid(beta * (r - c))) / (1 - 2 * eps),
    # APO-zero, arXiv 2408.06266 eq. 7: raises the chosen, lowers the rejected response.
    "apo_zero": lambda c, r, n_c, n_r, beta, eps: 1 - torch.sigmoid(beta * c) + torch.sigmoid(beta * r),
    # APO-down, arXiv 2408.06266 eq. 8: lowers both, rejected more: for chosen responses worse than the model's.
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
        sft_weight: adds this many times the chosen response's negative log-likelihood per token.

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


# ---------------------------------------------------------------------------------------------------------------------
# The model over the trees


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype` over float32 weights; with float32, nothing changes."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class ResponseScorer(torch.nn.Module):
    """A causal language model that maps a micro-batch to the log-probabilities of its responses.

    A module of its own, so that all that is computed lies in the one forward pass which DDP wraps.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, tensors: dict[str, torch.Tensor], plan: "TreePlan") -> torch.Tensor:
        """[M] log pi(y|x) in nats, float64, of the M responses of a micro-batch (see `TreeCollator`)."""
        head = self.model.get_output_embeddings().weight  # [V, H]
        with autocast(head.device, self.dtype):
            hidden = self.model.get_decoder()(
                input_ids=tensors["input_ids"],  # [1, T]
                position_ids=tensors["position_ids"],
                attention_mask=None,
                use_cache=False,
                plan=plan,
            ).last_hidden_state  # [1, T, H]
            hidden = hidden[0].index_select(0, tensors["predictor_index"])  # [N, H]
        n_responses = len(tensors["response_lengths"])
        return response_logps(hidden, head, tensors["target_ids"], tensors["response_index"], n_responses, self.dtype)


def response_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target_ids: torch.Tensor,
    response_index: torch.Tensor,
    n_responses: int,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    """Summed log-probabilities of responses: log pi(y|x) = sum over t of log softmax(W h_t)[y_t].

    Args:
        hidden: [N, H] the hidden states that predict the N response tokens.
        weight: [V, H] the LM head.
        target_ids: [N] the response tokens.
        response_index: [N] which of the M responses each token belongs to.
        n_responses: M.
        compute_dtype: of the matrix products. The log-softmax is float32, or hidden's dtype if that is wider.

    Returns:
        [M] in nats, float64: in float32, sums around -1,000 are 1e-4 apart, which shows in the loss's fifth digit.
    """
    token_logps = TokenLogps.apply(hidden, weight, target_ids, compute_dtype)  # [N]
    zeros = token_logps.new_zeros(n_responses, dtype=torch.float64)
    return zeros.index_add(0, response_index, token_logps.double())


TILE_WORDS = 4096  # of the vocabulary, whose logits exist at the same time (docs/performance.md has what was tried)


class TokenLogps(torch.autograd.Function):
    """[N] log-probabilities of the target tokens, by tiles of the vocabulary.

    The forward pass keeps the logsumexp of each token, the backward pass computes the logits of each tile once more:
    d logp / d logit_v = [v is the target] - softmax_v. With Qwen2.5's vocabulary, the largest tensor is the weight's
    gradient. Nothing in here asks the GPU for a value.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target_ids, compute_dtype):
        ctx.dtypes = hidden.dtype, weight.dtype
        exact = torch.promote_types(hidden.dtype, torch.float32)
        hidden, weight = hidden.to(compute_dtype), weight.to(compute_dtype)
        logsumexp = torch.full(target_ids.shape, -torch.inf, dtype=exact, device=hidden.device)  # [N]
        target_logit = torch.zeros_like(logsumexp)
        for start in range(0, len(weight), TILE_WORDS):
            logits = hidden @ weight[start : start + TILE_WORDS].T  # [N, words]
            column, is_here = _column_of_target(target_ids, start, logits.shape[1])
            target_logit += logits.gather(1, column).squeeze(1) * is_here
            # logsumexp = logit - log_softmax of any word, here the first: one kernel, from bf16 to float32.
            of_tile = logits[:, 0] - logits.log_softmax(1, dtype=exact)[:, 0]
            logsumexp = torch.logaddexp(logsumexp, of_tile)
        ctx.save_for_backward(hidden, weight, target_ids, logsumexp)
        return target_logit - logsumexp

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, target_ids, logsumexp = ctx.saved_tensors
        exact = logsumexp.dtype
        minus_grad = -grad.to(exact)[:, None]  # [N, 1]
        grad_hidden = torch.zeros_like(hidden, dtype=exact) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        for start in range(0, len(weight), TILE_WORDS):
            tile = weight[start : start + TILE_WORDS]
            logits = hidden @ tile.T  # [N, words]
            column, is_here = _column_of_target(target_ids, start, logits.shape[1])
            softmax = torch.sub(logits, logsumexp[:, None]).exp_()  # in `exact`
            softmax.scatter_add_(1, column, -is_here[:, None].to(exact))
            grad_logits = torch.mul(softmax, minus_grad, out=logits)  # rounded once, for the two products
            if grad_hidden is not None:
                grad_hidden += grad_logits @ tile
            if grad_weight is not None:
                grad_weight[start : start + TILE_WORDS] = grad_logits.T @ hidden
        grads = zip((grad_hidden, grad_weight), ctx.dtypes, strict=True)
        return *(None if tensor is None else tensor.to(dtype) for tensor, dtype in grads), None, None


def _column_of_target(target_ids: torch.Tensor, start: int, n_words: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's target in this tile, [N, 1], and whether it is there at all, [N]; if not, column 0 stands in."""
    is_here = (target_ids >= start) & (target_ids < start + n_words)
    return torch.where(is_here, target_ids - start, 0)[:, None], is_here


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@dataclass
class TreePlan:
    """How to attend in a micro-batch, made once for all layers and for all passes over it.

    Its S segments are the prompts and the responses, in the row's order. The keys of a prompt are its own tokens, those
    of a response its prompt's and then its own: [prompt | prompt, response 1 | prompt, response 2 ...]. In the example
    of `TreeCollator`, key_index is [0 1 | 0 1 2 3 | 0 1 4 5 | 0 1 6 7 8] and n_keys [2, 4, 4, 5].
    """

    attend: Callable  # `attend_by_segment` or `attend_at_once`
    key_index: torch.Tensor  # [K] position in the row of each of these keys
    n_queries: list[int]  # [S] tokens of each segment
    n_keys: list[int]  # [S] tokens that its last token sees
    masks: list[torch.Tensor | None]  # [S] of [queries, keys], for `attend_by_segment`
    query_ends: torch.Tensor  # [S + 1] sums of n_queries, from 0, for `attend_at_once`
    key_ends: torch.Tensor  # [S + 1] sums of n_keys, from 0, for `attend_at_once`


def plan_attention(
    segments: Sequence[tuple[int, int, int, int]], device: torch.device, dtype: torch.dtype, attend: Callable
) -> TreePlan:
    """A plan from the `segments` of a micro-batch (see `TreeCollator`), for scores in `dtype`."""
    keys = [np.r_[prompt_start:prompt_end, start:end] for start, end, prompt_start, prompt_end in segments]
    n_queries, n_keys, masks = [end - start for start, end, _, _ in segments], [len(index) for index in keys], []
    if attend is attend_by_segment:
        for own, seen in zip(n_queries, n_keys, strict=True):
            never = torch.full((own, seen), torch.finfo(dtype).min, dtype=dtype, device=device)
            masks.append(never.triu(seen - own + 1) if own < seen else None)  # a prompt needs none: is_causal
    index, query_ends, key_ends = (
        torch.from_numpy(array).to(device)
        for array in (np.concatenate(keys), np.cumsum([0, *n_queries]), np.cumsum([0, *n_keys]))
    )
    return TreePlan(attend, index, n_queries, n_keys, masks, query_ends.int(), key_ends.int())


# What transformers may hand to an attention without changing what it computes here.
HARMLESS = ("position_ids", "cache_position", "is_causal", "use_cache", "output_attentions", "output_hidden_states")


def tree_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, plan=None, **others):
    """Attention of one row of token trees, without a [T, T] mask: a prompt sees itself, a response also its prompt.

    transformers calls this in each layer, with query [1, heads, T, D] and key and value [1, key heads, T, D], and hands
    `plan` through. Without it, when generating, it is sdpa. Returns [1, T, heads, D].

    Raises UserError for an attention that is more than softmax(q k) v, or whose window is shorter than a pair.
    """
    if plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    window = others.pop("sliding_window", None)
    if window is not None and window < max(plan.n_keys):
        raise UserError(f"a layer of the model looks back {window} tokens only, a pair has {max(plan.n_keys)}")
    if unknown := [name for name, given in others.items() if given is not None and name not in HARMLESS]:
        raise UserError(f"the model's attention has {', '.join(unknown)}, which is not understood here")
    # In the backward pass, the gradient of a prompt's key is the sum of those that its responses send. By index_select
    # in float32 it is summed in float32; 16 bits would lose its low bits.
    exact, dtype = torch.promote_types(value.dtype, torch.float32), value.dtype
    keys, values = (x.to(exact).index_select(2, plan.key_index).to(dtype) for x in (key, value))
    return plan.attend(plan, query.to(dtype), keys, values, scaling), None


AttentionInterface.register("tree", tree_attention)


def attend_by_segment(plan: TreePlan, query, keys, values, scaling) -> torch.Tensor:
    """On any device, in any precision: a call of torch's attention for each prompt and each response."""
    split = query.split(plan.n_queries, 2), keys.split(plan.n_keys, 2), values.split(plan.n_keys, 2), plan.masks
    outputs = [
        F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=True)
        for q, k, v, mask in zip(*split, strict=True)
    ]
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


# FlashAttention takes fewer key heads as they come; torch's function asks to be told so from 2.13 on.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def attend_at_once(plan: TreePlan, query, keys, values, scaling) -> torch.Tensor:
    """On a GPU, in 16 bits: all segments in one call of FlashAttention. Each run checks it before it trains."""
    query, keys, values = (x[0].transpose(0, 1).contiguous() for x in (query, keys, values))  # [T, heads, D]
    return varlen_attn(
        query, keys, values, plan.query_ends, plan.key_ends, max(plan.n_queries), max(plan.n_keys),
        scale=scaling, window_size=(-1, 0), **GROUPED,
    )[None]  # fmt: skip
