"""What a run has logged, to look at: its curves (loss.png) and how it went (report.md), both from the log alone.

    python plot_loss.py output/dpo                                        # writes both into output/dpo
    python plot_loss.py output/beta01 output/beta02 --output compare.svg  # several runs in one picture, no report

A RUN is an output folder with metrics.jsonl, or with HF's trainer_state.json (also in checkpoint-N: the highest N
counts; without a report), or such a file itself. At a run's end, dpo_train.py calls write_results.
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

# Okabe and Ito's colors, which color-blind readers can tell apart
BLACK, BLUE, VERMILLION, GREY = "#000000", "#0072B2", "#D55E00", "#595959"

REWARDS, LOGPS = "rewards (nats, β included)", "log-probability (nats)"
CURVES = (  # panel, label, field of the log, color in a picture of one run, line or points
    ("loss", "training", "loss", BLUE, "-"),
    ("loss", "held-out", "eval_loss", VERMILLION, "o"),
    ("accuracy", "training", "rewards/accuracies", BLUE, "-"),
    ("accuracy", "held-out", "eval_rewards/accuracies", VERMILLION, "o"),
    (REWARDS, "margin", "rewards/margins", BLACK, ":"),
    (REWARDS, "chosen", "rewards/chosen", BLUE, "-"),
    (REWARDS, "rejected", "rewards/rejected", VERMILLION, "--"),
    (LOGPS, "chosen", "logps/chosen", BLUE, "-"),
    (LOGPS, "rejected", "logps/rejected", VERMILLION, "--"),
)
LABELS = {  # of metrics in the report; one that is not here goes by its name in the log
    "loss": "loss (nats)",
    "rewards/accuracies": "accuracy by reward",
    "logps/accuracies": "accuracy by log-probability",
    "rewards/margins": "margin (nats, β included)",
    "nll_loss": "negative log-likelihood of chosen (nats a token)",
    "lengths/accuracies": "accuracy of “the longer one is better”",
}
HEADLINES = ("loss", "rewards/accuracies", "logps/accuracies", "rewards/margins")  # of each domain


class PlotError(Exception):
    """One line: what is wrong, where, and what would be right."""


# ---------------------------------------------------------------------------------------------------------------------
# The log of a run


@dataclass
class Run:
    """What a run has logged."""

    name: str  # of its folder
    folder: Path
    records: list[dict[str, Any]]  # those that count, in the log's order; each has a step

    def events(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record.get("event") == event]

    @property
    def start(self) -> dict[str, Any]:
        """The record of its start: flags, data, device, versions; empty if another program wrote the log."""
        return next(iter(self.events("start")), {})

    @property
    def is_comparison(self) -> bool:
        """Whether it trained nothing (--eval_only): there are no curves."""
        return self.start.get("flags", {}).get("eval_only", False)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Their records, with metrics named without eval_, as they are in `domains` and `lengths`."""
        return [{name.removeprefix("eval_"): x for name, x in record.items()} for record in self.events("eval")]

    def series(self, field: str) -> dict[int, float]:
        """The field's values by rising steps. Where a step was logged twice, the last time counts."""
        values = {int(record["step"]): record[field] for record in self.records if is_number(record.get(field))}
        return dict(sorted(values.items()))


def is_number(value: Any) -> bool:
    """Whether it can be drawn: not null, text, NaN, Infinity or absurdly large."""
    return isinstance(value, int | float) and abs(value) < 1e100


def parse(text: str) -> dict[str, Any]:
    """The JSON object that the text is; empty if it is none, as the last line of a run that was killed may be."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_run(path: Path) -> Run:
    """Read the log of a run (folder or file). Raises PlotError if there is none, or nothing in it to draw."""
    with named(path):
        states = sorted(path.glob("checkpoint-*/trainer_state.json"), key=lambda state: (len(str(state)), state))
        logs = [path, path / "metrics.jsonl", path / "trainer_state.json", *reversed(states)]
        log = next((log for log in logs if log.is_file()), None)
        if log is None:
            raise PlotError(f"{path}: neither a log nor a folder with metrics.jsonl or trainer_state.json")
        text = log.read_text(encoding="utf-8-sig", errors="replace")
    lines = text.split("\n")
    logged = parse(text).get("log_history")  # of HF's trainer_state.json, one document
    if not isinstance(logged, list):
        logged = [parse(line) for line in lines]
        broken = [i for i, line in enumerate(lines[:-1]) if line.strip() and not logged[i]]
        if broken and any(logged):
            print(f"warning: {log}: no JSON object in line {broken[0] + 1} ({len(broken)} such lines)", file=sys.stderr)
    records: list[dict[str, Any]] = []
    for record in logged:
        if not isinstance(record, dict) or not is_number(record.get("step")):
            continue
        if record.get("event") == "resumed":  # what was logged beyond this step belongs to lost weights
            records = [old for old in records if old["step"] <= record["step"]]
        records.append(record)
    folder = path if path.is_dir() else path.parent
    name = folder.resolve().name.encode(errors="replace").decode()  # not each is UTF-8
    run = Run(name, folder, records)
    if not any(run.series(field) for _, _, field, _, _ in CURVES):
        expected = "one JSON object a line with `step` and `loss`, or HF's log_history"
        raise PlotError(f"{log}: nothing to draw yet, or not a training log; expected {expected}")
    return run


# ---------------------------------------------------------------------------------------------------------------------
# Files, complete or absent


@contextlib.contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write a file or a folder to, which replaces what stands at `path` in the end.

    After an error, `path` is as it was, and nothing is left beside it.
    """
    aside = path.with_name(f".{path.name}.tmp")
    remove(aside)  # of a process that was killed
    try:
        yield aside
        if hasattr(os, "sync"):  # not on Windows
            os.sync()  # contents must be on the disk before their name is
        if aside.is_dir():
            remove(path)
        os.replace(aside, path)
    finally:
        remove(aside)


def remove(path: Path) -> None:
    """Remove a file, a folder, or nothing."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Raises PlotError, which names the path, where the disk refuses what is done inside."""
    try:
        yield
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror or error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# The report: how the run went in words, then in numbers


def report(run: Run) -> Iterator[str]:
    """The lines of report.md, from top to bottom."""
    start, flags = run.start, run.start["flags"]
    title = f"{flags['model_name_or_path']} on {flags['dataset_name']}, {run.records[-1]['step']} steps"
    if run.is_comparison:
        title = f"{flags['ref_model_name_or_path']} (before) and {flags['model_name_or_path']} (after)"
    yield from [f"# {title}", "", *(f"- {sentence}" for sentence in judgement(run))]
    if not run.is_comparison:
        yield from ["", "![Loss, accuracy, rewards and log-probabilities over the steps](loss.png)"]
    if len(run.evaluations) > 1:
        before, after = run.evaluations[0], run.evaluations[-1]
        yield from tables(before, after)
        if before.get("answers") and after.get("answers"):
            yield from answers_side_by_side(before["answers"], after["answers"])
    yield from ["", "## How it was made", "", "Of local paths, only the last part is shown.", ""]
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items() if value is not None]
    yield from fenced(" ".join(["python dpo_train.py", *given]), "sh")
    yield from ["", *fenced(start["data"], "text"), ""]
    seconds = sum(new["time"] - old["time"] for old, new in pairwise(run.records) if new.get("event") != "resumed")
    facts = [f"{seconds / 60:.1f} minutes"]
    if speeds := run.series("pairs_per_second").values():
        facts += [f"{median(speeds):.3g} pairs/s", f"micro-batches of {start['micro_batch_tokens']} tokens"]
    yield ", ".join([*facts, start["device"], start["versions"]]) + "."


def judgement(run: Run) -> Iterator[str]:
    """How the run went, in sentences, by its first and its last evaluation."""
    if not run.events("end"):
        yield f"**The run is not finished**: its log ends at step {run.records[-1]['step']}."
    if len(run.evaluations) < 2:
        yield f"Held-out pairs were evaluated {len(run.evaluations)} times: nothing to compare."
        return
    before, after = run.evaluations[0], run.evaluations[-1]
    if not is_number(before["loss"]) or not is_number(after["loss"]):
        yield "**The held-out loss is not a number**: train again with a lower `--learning_rate`."
        return
    # All evaluations are of the same pairs, so the error of a difference is hardly ever above that of the last one.
    change, noise = after["loss"] - before["loss"], 2 * after["loss_se"]
    verdict = "The held-out loss fell:" if change < 0 else "**The held-out loss rose**:"
    if abs(change) <= noise:
        verdict = "The held-out loss has hardly changed (by two standard errors or less):"
    yield f"{verdict} {arrow(before, after, 'loss')}; accuracy {arrow(before, after, 'rewards/accuracies')}."
    if before.get("answers") and after.get("answers"):
        yield from judge_answers(before["answers"], after["answers"], is_loss_better=change < 0)
    yield from judge_last_step(run.series("eval_loss"), noise)
    longer, model = shown(after, "lengths/accuracies"), with_error(after, "rewards/accuracies")
    yield f"“The longer one is better” is right in {longer} of the pairs, the model in {model}."
    old, new = -before["nll_loss"], -after["nll_loss"]
    verb = "fell" if new < old else "rose"
    if f"{old:.3f}" == f"{new:.3f}":
        verb = "has not changed"
    elif new <= old - 0.1:
        verb = "**fell far** (`--sft_weight 0.1` may help)"
    yield f"The chosen responses' log-probability per token {verb}: {old:.3f} → {new:.3f} nats."
    yield (
        "Accuracy alone says little once the policy is far from the reference (https://arxiv.org/abs/2405.19534): "
        "read the answers."
    )


def judge_answers(before: list[dict], after: list[dict], is_loss_better: bool) -> Iterator[str]:
    """A better loss does not mean better answers."""
    old, new = averages(before), averages(after)
    worse, remedies = [], []
    if new["repetition"] > 0.1 and new["repetition"] >= 2 * old["repetition"]:
        worse.append("they repeat themselves")
    if old["stopped"] > 0 and new["stopped"] <= 0.8 * old["stopped"] + 1e-9:
        worse.append("fewer come to an end")
    if worse:
        remedies.append("a lower `--learning_rate` or fewer steps")
    if new["openings"] <= old["openings"] / 2:  # refusals, for instance, which no other figure shows
        worse.append(f"they begin in {new['openings']} ways, no longer in {old['openings']}")
        remedies.append("`--sft_weight 0.1`")
    if worse:
        but = "Although the loss is better, the" if is_loss_better else "The"
        yield f"**{but} answers got worse: {' and '.join(worse)}.** Try {', and '.join(remedies)}."
    yield (
        f"Answers to {len(after)} held-out prompts: {old['n_tokens']:.0f} → {new['n_tokens']:.0f} tokens; "
        f"{old['stopped']:.0%} → {new['stopped']:.0%} ended by themselves; "
        f"{old['repetition']:.0%} → {new['repetition']:.0%} of their 4-grams repeated."
    )


def judge_last_step(losses: dict[int, float], noise: float) -> Iterator[str]:
    """Whether the held-out loss was lower before the end."""
    best, last = min(losses, key=losses.get), max(losses)
    rise = losses[last] - losses[best]
    if rise > noise:
        yield (
            f"**It has gone too far**: the held-out loss was lowest at step {best}, {losses[best]:.4f}; the last is "
            f"higher by {rise:.4f}, more than two standard errors. Train with fewer steps or a lower `--learning_rate`"
            + (", or take a checkpoint near that step." if best > 0 else ".")
        )
    elif len(losses) > 2:
        yield f"The held-out loss was lowest at step {best} of {last}: {losses[best]:.4f}."


def averages(answers: list[dict]) -> dict[str, float]:
    """Means of what is logged of each answer, and in how many ways they begin."""
    means = {fact: fmean(answer[fact] for answer in answers) for fact in ("n_tokens", "stopped", "repetition")}
    return means | {"openings": len({answer["answer"][:8] for answer in answers})}


def tables(before: dict, after: dict) -> Iterator[str]:
    """Of all pairs, one row for each metric; one row for each domain, and by which response is the longer one."""
    yield from ["", "## Held-out pairs", ""]
    yield f"| {after['pairs']} pairs of {after['prompts']} prompts | before | after |"
    yield "|---|---:|---:|"
    for name in after:
        if f"{name}_se" in after:
            yield f"| {LABELS.get(name, name)} | {with_error(before, name)} | {with_error(after, name)} |"
    yield from ["", "± is one standard error over prompts.", ""]
    yield "| before → after | pairs | " + " | ".join(LABELS[name] for name in HEADLINES) + " |"
    yield "|---|---:|" + "---:|" * len(HEADLINES)
    for part in ("domains", "lengths"):
        for group, new in after[part].items():
            cells = [arrow(before[part][group], new, name) for name in HEADLINES]
            yield f"| {group.replace('|', '/')} | {new['pairs']} | {' | '.join(cells)} |"


def answers_side_by_side(before: list[dict], after: list[dict]) -> Iterator[str]:
    yield from ["", "## Answers to held-out prompts (greedy)"]
    for old, new in zip(before, after, strict=True):
        yield from ["", f"### {old['domain'] or 'Prompt'}"]
        texts = {"Prompt": old["prompt"], "Before": old["answer"], "After": new["answer"]}
        for name, text in (texts | {"Preferred in the data": old["chosen"]}).items():
            yield from ["", f"**{name}**", "", *fenced(text, "text")]


def shown(metrics: dict, name: str) -> str:
    value = metrics[name]
    if not is_number(value):
        return "–"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def with_error(metrics: dict, name: str) -> str:
    """The metric ± its standard error, where it has one above 0."""
    value, error = shown(metrics, name), shown(metrics, f"{name}_se")
    return value if "–" in (value, error) or error == "0.0000" else f"{value} ± {error}"


def arrow(before: dict, after: dict, name: str) -> str:
    return f"{shown(before, name)} → {with_error(after, name)}"


def fenced(text: str, kind: str) -> list[str]:
    """A block that no backticks in the text can end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [fence + kind, text, fence]


# ---------------------------------------------------------------------------------------------------------------------
# The picture

STYLE = {
    "font.size": 12, "lines.linewidth": 2, "lines.markerfacecolor": "white", "lines.markeredgewidth": 1.6,
    "axes.titlesize": 13, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#E8E8E8",
    "legend.fontsize": 11, "legend.frameon": False, "legend.handlelength": 1.6, "legend.columnspacing": 1.2,
    "axes.formatter.useoffset": False, "axes.formatter.limits": (-9, 9),  # no "1e-6" in the way above an axis
    "text.parse_math": False,  # a "$" in a folder's name is a dollar
    "svg.fonttype": "none",  # text stays text
}  # fmt: skip
CHINESE_FONTS = (  # Noto's file of all languages has the name ... JP in older versions of matplotlib
    "Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei",
    "PingFang SC", "Heiti SC", "Hiragino Sans GB", "Arial Unicode MS", "Noto Sans CJK JP",
)  # fmt: skip


def plot_runs(runs: list[Run], output: Path) -> None:
    """Draw the runs into one picture. Raises PlotError if its name has no known suffix, or it cannot be written."""
    suffix = output.suffix.lower()
    if suffix not in (".png", ".svg", ".pdf"):
        raise PlotError(f"{output}: a picture's name ends in .png, .svg or .pdf")

    from matplotlib import font_manager, style  # here, because it takes time and training imports this file
    from matplotlib.figure import Figure  # without pyplot: no window, no state shared with the caller

    installed = font_manager.get_font_names()
    fonts = ["DejaVu Sans", *(font for font in CHINESE_FONTS if font in installed), "sans-serif"]
    with style.context(["default", "petroff10", STYLE, {"font.family": fonts}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # no Chinese font: a folder's name is boxes
        figure = Figure(dpi=200, layout="constrained")
        draw(figure, runs)
        with named(output), complete_or_absent(output) as aside:
            figure.savefig(aside, format=suffix[1:])


def draw(figure, runs: list[Run]) -> None:
    """Fill the figure: panels in two columns, with a legend each; the names of the runs above."""
    curves = [curve for curve in CURVES if any(run.series(curve[2]) for run in runs)]
    titles = list(dict.fromkeys(panel for panel, *_ in curves))
    n_rows = math.ceil(len(titles) / 2)
    figure.set_size_inches(8, 3 * n_rows + 0.2 * (len(runs) - 1))
    panels = {title: figure.add_subplot(n_rows, 2, place) for place, title in enumerate(titles, start=1)}
    several = len(runs) > 1
    for panel, label, field, color, look in curves:
        panels[panel].plot([], [], look, color=BLACK if several else color, label=label)  # for the legend
        for i, run in enumerate(runs):
            draw_curve(panels[panel], run.series(field), f"C{i}" if several else color, look)
    thin = {"color": GREY, "linewidth": 1, "zorder": 1.5}
    if "loss" in panels and "accuracy" in panels:  # these are DPO's
        panels["accuracy"].axhline(0.5, label="chance", **thin)
        of_dpo = [run for run in runs if not run.start.get("flags", {}).get("sft_weight")]  # the SFT term lifts a curve
        for start in sorted({round(run.start.get("loss_at_start", math.log(2)), 4) for run in of_dpo}):
            panels["loss"].axhline(start, label="ln 2" if start == 0.6931 else f"start {start}", **thin)
    for title, axes in panels.items():
        axes.locator_params(axis="x", nbins=5, integer=True, min_n_ticks=1)
        axes.set_title(title, pad=24)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.97), ncols=3)  # below the title, above the curves
    figure.supxlabel("step (thin lines: as logged)", fontsize=12)
    if several:
        handles = [figure.axes[0].plot([], [], color=f"C{i}")[0] for i in range(len(runs))]
        figure.legend(handles, [run.name for run in runs], loc="outside upper center")
    else:
        figure.suptitle(runs[0].name, fontsize=12, color=GREY)


def draw_curve(axes, points: dict[int, float], color: str, look: str) -> None:
    """One curve of one run. A long one is smoothed, with the logged values pale behind it."""
    steps, values = list(points), list(points.values())
    if look != "o" and len(values) < 10:
        look = "." + look
    elif look != "o":
        axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
        rate = 1 / max(2.5, 0.03 * len(values))
        values = list(accumulate(values, lambda average, value: average + rate * (value - average)))
    axes.plot(steps, values, look, color=color)


# ---------------------------------------------------------------------------------------------------------------------
# At a run's end, and by hand


def write_results(path: Path) -> list[str]:
    """Write report.md and loss.png of a run (folder or log); returns how it went, in sentences for the terminal.

    Raises PlotError if the log cannot be read or the report not be written; a picture that fails is one more sentence.
    """
    run, sentences = read_run(path), ["no report: the log does not say how the run started"]
    if "flags" in run.start:
        report_file = run.folder / "report.md"
        with named(report_file), complete_or_absent(report_file) as aside:
            aside.write_text("\n".join([*report(run), ""]), encoding="utf-8", errors="replace")
        sentences = [sentence.replace("**", "") for sentence in judgement(run)]
    if not run.is_comparison:
        try:
            plot_runs([run], run.folder / "loss.png")
        except PlotError as error:
            sentences.append(f"warning: no picture: {error}")
    return sentences


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="output folder, or its log file")
    parser.add_argument("--output", metavar="FILE", type=Path, help="a picture and no report: .png, .svg or .pdf (for "
                        "several runs without it: loss.png in the current folder)")  # fmt: skip
    arguments = parser.parse_args(argv)
    try:
        if len(arguments.runs) == 1 and arguments.output is None:
            print("\n".join(write_results(arguments.runs[0])))
        else:
            runs, output = [read_run(path) for path in arguments.runs], arguments.output or Path("loss.png")
            if len({run.name for run in runs}) < len(runs):
                for run, path in zip(runs, arguments.runs, strict=True):
                    run.name = str(path).encode(errors="replace").decode()
            plot_runs(runs, output)
            print(output)
    except PlotError as error:
        sys.exit(f"plot_loss.py: {error}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name need not fit the terminal
    main()
