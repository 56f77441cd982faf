"""The guide's drawings, made with the project's own functions: `uv run docs/figures/make_figures.py`.

Drawings are SVG on a light card of their own, so that they read on white and on dark pages alike.
"""

import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402

from dataset import TreeCollator  # noqa: E402
from loss import attend_by_segment, dpo_loss, plan_attention  # noqa: E402

SANS = "Helvetica, Arial, 'DejaVu Sans', 'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', sans-serif"
INK, SOFT, LINE, CARD, EMPTY = "#1F2933", "#52606D", "#9AA5B1", "#FFFFFF", "#EEF1F4"
BRANCHES = ("#5B6675", "#0072B2", "#C44E00", "#00795A")  # of the prompt and three responses; white reads on each
RESPONSES = ("x", "y1", "y2", "y3")

# The example of TreeCollator's docstring: one prompt, two pairs that share their chosen response.
PAIRS = [
    {"index": 0, "prompt_ids": [5, 6], "chosen_ids": [7, 9], "rejected_ids": [8, 9]},
    {"index": 1, "prompt_ids": [5, 6], "chosen_ids": [7, 9], "rejected_ids": [4, 4, 9]},
]


def branches_of(batch) -> list[int]:
    """Of each token 0 for the prompt, k for the k-th response."""
    return [branch for branch, (start, end, _, _) in enumerate(batch.segments) for _ in range(start, end)]


class Drawing:
    """A growing list of SVG elements. Labels are plain text: some renderers garble nested spans."""

    def __init__(self, width: int, height: int, title: str):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="{SANS}">',
            f"<title>{title}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" fill="{SOFT}"/></marker></defs>',
        ]
        self.box(0.5, 0.5, width - 1, height - 1, CARD, LINE, radius=10)

    def box(self, x, y, width, height, fill, stroke="none", radius=6, dash=""):
        dash = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{fill}" stroke="{stroke}"'
            f"{dash}/>"
        )

    def text(self, x, y, text, size=14, color=INK, anchor="middle", bold=False):
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}>{text}</text>'
        )

    def path(self, d, tip=True, dash="", color=SOFT, width=1.6):
        tip, dash = ' marker-end="url(#tip)"' if tip else "", f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<path d="{d}" fill="none" stroke="{color}" stroke-width="{width}"{dash}{tip}/>')

    def token(self, x, y, side, label, color):
        self.box(x + 1, y + 1, side - 2, side - 2, color, radius=4)
        self.text(x + side / 2, y + side / 2 + 5, label, 15, "#FFFFFF", bold=True)

    def save(self, name: str) -> None:
        (HERE / name).write_text("\n".join([*self.parts, "</svg>"]) + "\n", encoding="utf-8")


IDEA = {
    "rlhf_dpo.svg": {
        "title": "RLHF fits a reward model and then samples; DPO puts the pairs into one loss",
        "rlhf": "RLHF: two trainings and a sampling loop",
        "dpo": "DPO: one training on fixed pairs",
        "pairs": ("preference pairs", "chosen > rejected"),
        "reward": ("reward model", "r(x, y)"),
        "policy": ("policy", "πθ (trained)"),
        "reference": ("reference", "πref (frozen)"),
        "fit": "1. fit",
        "score": "2. scores",
        "sample": "answers y",
        "kl": "KL penalty",
        "loss": ("loss of a pair:", "−log σ(β · (log-ratio of chosen − log-ratio of rejected))"),
        "one": "one loss",
        "ratio": "log-ratio",
    },
    "rlhf_dpo.zh.svg": {
        "title": "RLHF 先拟合奖励模型再采样；DPO 把偏好对直接写进一个损失",
        "rlhf": "RLHF：两次训练，外加采样循环",
        "dpo": "DPO：在固定的偏好对上训练一次",
        "pairs": ("偏好对", "chosen > rejected"),
        "reward": ("奖励模型", "r(x, y)"),
        "policy": ("策略模型", "πθ（训练）"),
        "reference": ("参考模型", "πref（冻结）"),
        "fit": "1. 拟合",
        "score": "2. 打分",
        "sample": "采样回答 y",
        "kl": "KL 惩罚",
        "loss": ("偏好对的损失：", "−log σ(β · (chosen 的对数比 − rejected 的对数比))"),
        "one": "一个损失",
        "ratio": "对数比",
    },
}


def draw_idea(name: str, words: dict) -> None:
    d = Drawing(700, 400, words["title"])

    def node(x, y, key, fill, dash=""):
        d.box(x, y, 150, 56, fill, SOFT, dash=dash)
        d.text(x + 75, y + 24, words[key][0], 15, bold=True)
        d.text(x + 75, y + 44, words[key][1], 14, SOFT)

    pair, reward, policy, reference = "#E3EEF9", "#FCEBD9", "#DDF2EA", "#F1F3F5"
    d.text(20, 30, words["rlhf"], 16, anchor="start", bold=True)
    node(20, 56, "pairs", pair)
    node(275, 56, "reward", reward)
    node(530, 56, "policy", policy)
    node(530, 162, "reference", reference, "5 4")
    d.path("M172 84H272")
    d.text(222, 77, words["fit"], 13, SOFT)
    d.path("M427 74H527")
    d.text(477, 67, words["score"], 13, SOFT)
    d.path("M528 98H430")
    d.text(477, 117, words["sample"], 13, SOFT)
    d.path("M605 160V116", dash="5 4")
    d.text(596, 143, words["kl"], 13, SOFT, "end")
    d.path("M20 240H680", tip=False, color=LINE, width=1)
    d.text(20, 270, words["dpo"], 16, anchor="start", bold=True)
    node(20, 290, "pairs", pair)
    node(275, 290, "policy", policy)
    node(530, 290, "reference", reference, "5 4")
    d.path("M172 318H272")
    d.path("M528 318H428", dash="5 4")
    d.text(20, 378, words["loss"][0], 14, anchor="start", bold=True)
    d.text(142 if words["loss"][0].isascii() else 126, 378, words["loss"][1], 14, anchor="start")
    d.text(222, 311, words["one"], 13, SOFT)
    d.text(477, 311, words["ratio"], 13, SOFT)
    d.save(name)


def draw_tree() -> None:
    """Separate rows for each response of each pair, and the one row of the collator with its predictor arcs."""
    (batch,) = TreeCollator(micro_batch_tokens=16)(PAIRS)
    side, left = 44, 250
    d = Drawing(700, 454, "Four separate rows of 17 tokens, or one tree row of 9")
    rows = [(PAIRS[0], "chosen", 1), (PAIRS[0], "rejected", 2), (PAIRS[1], "chosen", 1), (PAIRS[1], "rejected", 3)]
    total = 0
    for r, (pair, name, branch) in enumerate(rows):
        y = 20 + r * 48
        d.text(24, y + 27, f"pair {pair['index']}, {name}: {RESPONSES[branch]}", 15, anchor="start")
        ids = pair["prompt_ids"] + pair[f"{name}_ids"]
        total += len(ids)
        for i, token in enumerate(ids):
            d.token(left + i * side, y, side, token, BRANCHES[0 if i < 2 else branch])
    d.text(676, 118, f"{total} tokens", 15, SOFT, "end")
    d.path("M20 226H680", tip=False, color=LINE, width=1)
    y = 336
    tokens, branches = batch.tensors["input_ids"][0].tolist(), branches_of(batch)
    for i, (token, branch) in enumerate(zip(tokens, branches, strict=True)):
        d.token(left + i * side, y, side, token, BRANCHES[branch])
    response_positions = [i for i, branch in enumerate(branches) if branch > 0]
    for predictor, at in zip(batch.tensors["predictor_index"].tolist(), response_positions, strict=True):
        a, b = left + (predictor + 0.5) * side, left + (at + 0.5) * side
        height = 16 + 13 * (at - predictor)
        d.path(f"M{a} {y - 2}C{a} {y - height} {b} {y - height} {b} {y - 3}", color=BRANCHES[branches[at]])
    d.text(24, y + 27, "input_ids", 15, anchor="start")
    d.text(24, y + 68, "position_ids", 15, anchor="start")
    for i, value in enumerate(batch.tensors["position_ids"][0].tolist()):
        d.text(left + (i + 0.5) * side, y + 68, value, 15, SOFT)
    d.text(24, y + 98, "segments", 15, anchor="start")
    for first, width, branch in ((0, 2, 0), (2, 2, 1), (4, 2, 2), (6, 3, 3)):
        x = left + first * side
        d.path(f"M{x + 4} {y + 82}H{x + width * side - 4}", tip=False, color=BRANCHES[branch], width=3)
        d.text(x + width * side / 2, y + 102, RESPONSES[branch], 15, BRANCHES[branch], bold=True)
    d.text(24, y - 40, f"{len(tokens)} tokens", 15, SOFT, "start")
    d.text(24, y - 18, "predictor → target", 15, SOFT, "start")
    d.save("tree.svg")


def draw_mask() -> None:
    """What attention lets each token see, by `plan_attention`."""
    (batch,) = TreeCollator(micro_batch_tokens=16)(PAIRS)
    plan = plan_attention(batch.segments, torch.device("cpu"), torch.float32, attend_by_segment)
    tokens, branches = batch.tensors["input_ids"][0].tolist(), branches_of(batch)
    keys = [set(index.tolist()) for index in plan.key_index.split(plan.n_keys)]  # of each segment
    sees = [[k <= q and k in keys[branches[q]] for k in range(len(tokens))] for q in range(len(tokens))]
    side, left, top = 38, 92, 70
    d = Drawing(700, 432, "Which token of the example sees which")
    d.text(left + 4.5 * side, 26, "key →", 14, SOFT)
    d.text(16, top - 12, "query ↓", 14, SOFT, "start")
    for q, row in enumerate(sees):
        d.text(left - 14, top + (q + 0.5) * side + 5, tokens[q], 15, BRANCHES[branches[q]], bold=True)
        d.text(left + (q + 0.5) * side, top - 12, tokens[q], 15, BRANCHES[branches[q]], bold=True)
        for k, seen in enumerate(row):
            color = BRANCHES[branches[k]] if seen else EMPTY
            d.box(left + k * side + 1, top + q * side + 1, side - 2, side - 2, color, radius=4)
    side, x, y = 40, 452, 96  # the same row as a tree
    middle = y + 2 * 74 + 20
    for i, token in enumerate(tokens[:2]):
        d.token(x + i * side, middle - 20 - 74, side, token, BRANCHES[0])
    d.text(x + side, middle - 20 - 74 - 10, RESPONSES[0], 15, BRANCHES[0], bold=True)
    at = 2
    for branch, width in ((1, 2), (2, 2), (3, 3)):
        row_y = y + (branch - 1) * 74
        start = x + 3 * side - 12
        d.path(f"M{x + 2 * side + 2} {middle - 74}C{x + 2 * side + 16} {middle - 74} {start - 18} {row_y + 20} "
               f"{start - 2} {row_y + 20}", color=BRANCHES[branch])  # fmt: skip
        for i in range(width):
            d.token(start + i * side, row_y, side, tokens[at + i], BRANCHES[branch])
        d.text(start + 14, row_y - 8, RESPONSES[branch], 15, BRANCHES[branch], bold=True)
        at += width
    for i, color in enumerate((*BRANCHES, EMPTY)):
        d.box(x + i * 22 + 50 * (color == EMPTY), 372, 20, 20, color, LINE, radius=4)
    d.text(x + 94, 388, "seen", 14, SOFT, "start")
    d.text(x + 166, 388, "not seen", 14, SOFT, "start")
    d.save("tree_mask.svg")


def draw_loss() -> None:
    """The loss of a pair over its margin, and the weight of its gradient, from `dpo_loss`."""
    import matplotlib
    from matplotlib.figure import Figure

    margins = torch.linspace(-4, 4, 161, dtype=torch.float64)
    zero = torch.zeros_like(margins)
    curves = {}
    for smoothing in (0.0, 0.1):
        x = margins.clone().requires_grad_()
        losses, _, _ = dpo_loss(x, zero, zero, zero, beta=1.0, label_smoothing=smoothing)
        (slope,) = torch.autograd.grad(losses.sum(), x)
        curves[smoothing] = losses.detach().tolist(), (-slope).tolist()
    with matplotlib.rc_context({"font.size": 13, "svg.hashsalt": "dpo", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(8, 3.6), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.14, h_pad=0.12)
        titles = ("L(m)", "−dL / dm")
        for k, (axes, title) in enumerate(zip(figure.subplots(1, 2), titles, strict=True)):
            for smoothing, style, color in ((0.0, "-", BRANCHES[1]), (0.1, "--", BRANCHES[2])):
                axes.plot(margins.tolist(), curves[smoothing][k], style, color=color, linewidth=2.2,
                          label=f"ε = {smoothing:g}")  # fmt: skip
            start = (math.log(2), 0.5)[k]  # at margin 0, where every run begins
            axes.plot([0], [start], "o", color=INK, markersize=6)
            axes.annotate(("ln 2 = 0.6931", "0.5")[k], (0, start), (8, 6), textcoords="offset points")
            axes.set_title(title, fontsize=14)
            axes.set_xlabel("m")
            axes.grid(color="#E4E7EB", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        figure.savefig(HERE / "loss_of_margin.svg", metadata={"Date": None})


def main() -> None:
    for name, words in IDEA.items():
        draw_idea(name, words)
    draw_tree()
    draw_mask()
    draw_loss()


if __name__ == "__main__":
    main()
