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
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

LOG_NAMES = ("metrics.jsonl", "trainer_state.json")

# Okabe and Ito's colors, which color-blind readers can tell apart
BLACK, BLUE, VERMILLION, GREY = "#000000", "#0072B2", "#D55E00", "#595959"
RUN_COLORS = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", BLACK)  # in a picture of several runs

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
HEADLINES = ("loss", "rewards/accuracies", "logps/accuracies", "rewards/margins")  # in the terminal and by domain


class PlotError(Exception):
    """One line: what is wrong, where, and what would be right."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass
class Run:
    """What a run has logged."""

    name: str
    folder: Path
    start: dict  # the record of its start: data, device, versions; empty if another program wrote the log
    flags: dict  # of that record
    records: list[dict]  # those that count, in the file's order
    last_step: int
    series: dict[str, dict[int, float]]  # the values of a curve's field by rising steps
    evaluations: list[dict]  # metrics by their names without eval_; domains, lengths and answers
    loss_at_start: float | None  # the loss where policy and reference agree; None if it is no DPO run
    seconds: float  # from the first record to the last, without the pauses before a resume


def find_log(path):
    """The log that a RUN argument means: the file itself, or the one in the folder or in its newest checkpoint."""
    checkpoints = sorted(path.glob("checkpoint-[1-9]*"), key=lambda p: (len(p.name), p.name), reverse=True)
    logs = [folder / name for folder in [path, *checkpoints] for name in LOG_NAMES]
    for log in [path, *logs]:
        if log.is_file():
            return log
    raise PlotError(f"{path}: neither a log nor a folder with {' or '.join(LOG_NAMES)}")


def parse(text):
    """The JSON object that the text is; empty if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_records(log):
    """The JSON objects of a log, in the file's order."""
    text = log.read_text(encoding="utf-8", errors="replace")
    history = parse(text).get("log_history")
    if isinstance(history, list):  # HF's trainer_state.json, one document
        return [record for record in history if isinstance(record, dict)]
    lines = text.split("\n")
    records = [parse(line) for line in lines]
    # The last line may be half-written: the run was killed, or is writing it now
    broken = [i + 1 for i, line in enumerate(lines[:-1]) if line.strip() and not records[i]]
    if broken and any(records):
        print(f"warning: {log}, line {broken[0]}: no JSON object ({len(broken)} such lines skipped)", file=sys.stderr)
    return records


def number(value):
    """The value as a float, or None if it cannot be drawn: null, text, NaN, Infinity, absurdly large."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e100 else None


def read_run(path):
    """Read the log of a run (folder or file). Where a step was logged twice, the last time counts."""
    path = Path(path)
    log = find_log(path)
    start, records, seconds, time_before = {}, [], 0.0, None
    for record in read_records(log):
        step, time, event = number(record.get("step")), number(record.get("time")), record.get("event")
        if event == "start":
            start = record
        if time is not None:
            if time_before is not None and event not in ("start", "resumed"):
                seconds += max(0.0, time - time_before)
            time_before = time
        if step is not None:
            if event == "resumed":  # what was logged beyond this step belongs to lost weights
                records = [old for old in records if old["step"] <= step]
            records.append(record)

    series = {}
    for _, _, field, _, _ in CURVES:
        logged = [record for record in records if number(record.get(field)) is not None]
        if logged:
            logged.sort(key=lambda record: record["step"])
            series[field] = {int(record["step"]): float(record[field]) for record in logged}
    if not series:
        expected = "one JSON object a line with `step` and `loss`, or HF's log_history"
        raise PlotError(f"{log}: nothing to draw yet, or not a training log; expected {expected}")
    evaluations = [
        {group: record.get(group) or {} for group in ("domains", "lengths", "answers")}
        | {
            field.removeprefix("eval_"): value
            for field, value in record.items()
            if field.startswith("eval_") and number(value) is not None
        }
        for record in records
        if record.get("event") == "eval"
    ]
    loss_at_start = number(start.get("loss_at_start"))
    if loss_at_start is None and any("rewards/" in field for field in series):
        loss_at_start = math.log(2)  # older logs and TRL's do not say it
    folder = path if path.is_dir() else path.parent
    name = folder.resolve().name.encode(errors="replace").decode()  # not every folder's name is UTF-8
    flags, last_step = start.get("flags") or {}, int(records[-1]["step"])
    return Run(name, folder, start, flags, records, last_step, series, evaluations, loss_at_start, seconds)


@contextlib.contextmanager
def complete_or_absent(path):
    """Gives a name beside `path` to write a file or a folder to; renamed once it is on the disk, else removed."""
    aside = path.with_name(f".{path.name}.tmp")
    remove(aside)
    try:
        yield aside
        os.sync()  # contents must be on the disk before their name is
        remove(path)
        aside.rename(path)
    finally:
        remove(aside)


def remove(path):
    """A file, a folder, or nothing."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


@contextlib.contextmanager
def replacing(path):
    """A path to write to instead; in the end, the new file replaces an older one whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise PlotError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# The report


def write_report(run):
    """Write `report.md`: how the run went in words, then in numbers; answers before and after; how it was made."""
    if "data" not in run.start:
        raise PlotError(f"{run.folder}: no report, since the log does not say how the run started")
    model, data = run.flags.get("model_name_or_path", run.name), run.flags.get("dataset_name", "?")
    if run.flags.get("eval_only"):
        lines = [f"# {inline(run.flags['ref_model_name_or_path'])} (before) and {inline(model)} (after)"]
        picture = []
    else:
        lines = [f"# {inline(model)} on {inline(data)}, {run.last_step} steps"]
        picture = ["", "![Loss, accuracy, rewards and log-probabilities over the steps](loss.png)"]
    lines += ["", *(f"- {sentence}" for sentence in judgement(run)), *picture]
    if len(run.evaluations) > 1:
        before, after = run.evaluations[0], run.evaluations[-1]
        lines += ["", "## Held-out pairs", "", *metrics_table(before, after, after)]
        lines += ["", "± is one standard error over prompts.", "", *groups_table(before, after)]
        lines += answers_side_by_side(before, after)
    lines += ["", "## How it was made", "", *settings(run)]
    with replacing(run.folder / "report.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")


def judgement(run):
    """How the run went, in sentences, by its first and its last evaluation."""
    if not any(record.get("event") == "end" for record in run.records):
        yield f"**The run is not finished**: its log ends at step {run.last_step}."
    if len(run.evaluations) < 2:
        yield f"Held-out pairs were evaluated {len(run.evaluations)} times: nothing to compare."
        return
    before, after = run.evaluations[0], run.evaluations[-1]
    if "loss" not in before or "loss" not in after:
        yield "**The held-out loss is not a number**: train again with a lower `--learning_rate`."
        return
    change = after["loss"] - before["loss"]
    if abs(change) <= 2 * math.hypot(before.get("loss_se", 0), after.get("loss_se", 0)):
        verdict = "The held-out loss has hardly changed (by two standard errors or less):"
    else:
        verdict = "The held-out loss fell:" if change < 0 else "**The held-out loss rose**:"
    yield f"{verdict} {arrow(before, after, 'loss')}; accuracy {arrow(before, after, 'rewards/accuracies')}."
    if before["answers"] and after["answers"]:
        yield from judge_answers(before, after)
    yield from judge_last_step(run, after)
    if "lengths/accuracies" in after:
        longer, model = shown(after, "lengths/accuracies"), with_error(after, "rewards/accuracies")
        yield f"“The longer one is better” is right in {longer} of the pairs, the model in {model}."
    if "nll_loss" in before and "nll_loss" in after:
        old, new = -before["nll_loss"], -after["nll_loss"]
        verb = "rose" if new >= old else "fell" if new > old - 0.1 else "**fell far** (`--sft_weight 0.1` may help)"
        yield f"The chosen responses' log-probability per token {verb}: {old:.3f} → {new:.3f} nats."
    yield (
        "Accuracy alone says little once the policy is far from the reference (https://arxiv.org/abs/2405.19534): "
        "read the answers."
    )


def judge_answers(before, after):
    """A better loss does not mean better answers."""
    facts = ("n_tokens", "stopped", "repetition")
    old, new = ({fact: fmean(answer[fact] for answer in side["answers"]) for fact in facts} for side in (before, after))
    worse = []
    if new["repetition"] > 0.1 and new["repetition"] >= 2 * old["repetition"]:
        worse.append("they repeat themselves")
    if old["stopped"] > 0 and new["stopped"] <= 0.8 * old["stopped"] + 1e-9:
        worse.append("fewer come to an end")
    old_starts, new_starts = (len({answer["answer"][:8] for answer in side["answers"]}) for side in (before, after))
    if new_starts <= old_starts / 2:  # refusals, for instance, which no other figure shows
        worse.append(f"they begin in {new_starts} ways, no longer in {old_starts}")
    if worse:
        but = "Although the loss is better, the" if after["loss"] < before["loss"] else "The"
        yield f"**{but} answers got worse: {' and '.join(worse)}.** Try a lower `--learning_rate` or fewer steps."
    yield (
        f"Answers to {len(after['answers'])} held-out prompts: {old['n_tokens']:.0f} → {new['n_tokens']:.0f} tokens; "
        f"{old['stopped']:.0%} → {new['stopped']:.0%} ended by themselves; "
        f"{old['repetition']:.0%} → {new['repetition']:.0%} of their 4-grams repeated."
    )


def judge_last_step(run, after):
    """Whether the held-out loss was lower before the end."""
    losses = run.series["eval_loss"]
    best, last = min(losses, key=losses.get), max(losses)
    rise = losses[last] - losses[best]
    if rise > after.get("loss_se", 0):
        kept = [path.name.removeprefix("checkpoint-") for path in run.folder.glob("checkpoint-*")]
        nearest = min((int(n) for n in kept if n.isdecimal()), key=lambda step: abs(step - best), default=last)
        yield (
            f"**It has gone too far**: the held-out loss was lowest at step {best}, {losses[best]:.4f}; the last is "
            f"higher by {rise:.4f}, more than a standard error. Train with fewer steps or a lower `--learning_rate`"
            + (f", or take checkpoint-{nearest}." if abs(nearest - best) < last - best else ".")
        )
    elif len(losses) > 2:
        yield f"The held-out loss was lowest at step {best} of {last}: {losses[best]:.4f}."


def shown(metrics, name):
    value = number(metrics.get(name))
    return "–" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def with_error(metrics, name):
    """The metric ± its standard error, where it has one above 0."""
    value, error = shown(metrics, name), shown(metrics, f"{name}_se")
    return value if value == "–" or error in ("–", "0.0000") else f"{value} ± {error}"


def arrow(before, after, name):
    return f"{shown(before, name)} → {with_error(after, name)}"


def metrics_table(before, after, names):
    """Before and after, one row for each of these metrics."""
    lines = [f"| {after['pairs']} pairs of {after['prompts']} prompts | before | after |", "|---|---:|---:|"]
    no_metrics = ("pairs", "prompts", "domains", "lengths", "answers")
    for name in names:
        if name in before and name in after and name not in no_metrics and not name.endswith("_se"):
            cells = [LABELS.get(name, inline(name)), with_error(before, name), with_error(after, name)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def groups_table(before, after):
    """One row for each domain, and for the pairs whose chosen response is the longer or the shorter one."""
    lines = ["| before → after | pairs | " + " | ".join(LABELS.get(name, name) for name in HEADLINES) + " |"]
    lines += ["|---|---:|" + "---:|" * len(HEADLINES)]
    for group in ("domains", "lengths"):
        for name, new in after[group].items():
            cells = [arrow(before[group].get(name, {}), new, metric) for metric in HEADLINES]
            lines.append(f"| {inline(name) or '(no domain)'} | {new['pairs']} | {' | '.join(cells)} |")
    return lines


def answers_side_by_side(before, after):
    lines = []
    for old, new in zip(before["answers"], after["answers"], strict=False):
        lines += ["", f"### {inline(old['domain']) or 'Prompt'}"]
        texts = {"Prompt": old["prompt"], "Before": old["answer"], "After": new["answer"]}
        for name, text in (texts | {"Preferred in the data": old["chosen"]}).items():
            lines += ["", f"**{name}**", "", *fenced(text, "text")]
    return ["", "## Answers to held-out prompts (greedy)", *lines] if lines else []


def settings(run):
    """The command, the data, the time and the machine."""
    flags = [f"--{name} {shlex.quote(str(value))}" for name, value in run.flags.items() if value is not None]
    yield from fenced(" ".join(["python dpo_train.py", *flags]), "sh")
    yield from ["", *fenced(str(run.start["data"]), "text"), ""]
    speeds = [record["pairs_per_second"] for record in run.records if number(record.get("pairs_per_second"))]
    minutes = run.seconds / 60
    facts = [f"{minutes:.1f} minutes" if minutes < 100 else f"{minutes / 60:.1f} hours"]
    facts += [f"{median(speeds):.3g} pairs/s"] if speeds else []
    facts += [f"micro-batches of {run.start['micro_batch_tokens']} tokens"] if "micro_batch_tokens" in run.start else []
    facts += [inline(run.start[name]) for name in ("device", "versions") if name in run.start]
    yield ", ".join(facts) + "."


def inline(text):
    """For a heading or a table's cell, which a line break or a bar would break."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def fenced(text, kind):
    """A block that no backticks in the text can end."""
    fence = next("`" * n for n in range(3, len(text) + 4) if "`" * n not in text)
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


def plot_runs(runs, output):
    """Draw the runs into one PNG, SVG or PDF (by suffix)."""
    output = Path(output)
    suffix = output.suffix.lower()
    if suffix not in (".png", ".svg", ".pdf"):
        raise PlotError(f"{output}: a picture's name ends in .png, .svg or .pdf")

    from matplotlib import font_manager, style  # here, because it takes time and training imports this file
    from matplotlib.figure import Figure  # without pyplot: no window, no state shared with the caller

    installed = font_manager.get_font_names()
    fonts = ["DejaVu Sans", *(font for font in CHINESE_FONTS if font in installed), "sans-serif"]
    with style.context(["default", STYLE, {"font.family": fonts}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # no Chinese font: a folder's name is boxes
        figure = Figure(dpi=200, layout="constrained")
        draw(figure, runs)
        with replacing(output) as temporary:
            figure.savefig(temporary, format=suffix[1:])


def draw(figure, runs):
    """Fill the figure: panels in two columns, with a legend each; the names of the runs above."""
    titles = list(dict.fromkeys(panel for panel, *_ in CURVES))
    n_rows = math.ceil(len(titles) / 2)
    figure.set_size_inches(8, 3 * n_rows + 0.2 * (len(runs) - 1))
    panels = dict(zip(titles, figure.subplots(n_rows, 2, sharex=True).flat, strict=False))
    for unused in figure.axes[len(titles) :]:
        unused.remove()
    several = len(runs) > 1
    run_colors = [RUN_COLORS[i % len(RUN_COLORS)] for i in range(len(runs))]
    for panel, label, field, curve_color, look in CURVES:
        for run, run_color in zip(runs, run_colors, strict=True):
            if field in run.series:
                draw_curve(panels[panel], run.series[field], run_color if several else curve_color, look)
        if any(field in run.series for run in runs):
            panels[panel].plot([], [], look, color=BLACK if several else curve_color, label=label)  # for the legend

    # Where DPO starts: the policy still is the reference model
    starts = {round(run.loss_at_start, 6) for run in runs if run.loss_at_start is not None}
    if len(starts) == 1:
        start = starts.pop()
        label = "ln 2" if start == round(math.log(2), 6) else f"start {start:.4f}"
        panels["loss"].axhline(start, label=label, color=GREY, linewidth=1, zorder=1.5)
    if panels["accuracy"].lines:
        panels["accuracy"].axhline(0.5, label="chance", color=GREY, linewidth=1, zorder=1.5)

    for title, axes in panels.items():
        axes.locator_params(axis="x", nbins=5, integer=True, min_n_ticks=1)
        axes.set_title(title if axes.lines else f"{title}: not logged", pad=24)
        if axes.lines:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.97), ncols=3)  # below the title, above the curves
    figure.supxlabel("step (thin lines: as logged)", fontsize=12)
    if several:
        handles = [panels["loss"].plot([], [], color=color)[0] for color in run_colors]
        figure.legend(handles, [run.name for run in runs], loc="outside upper center")
    else:
        figure.suptitle(runs[0].name, fontsize=12, color=GREY)


def draw_curve(axes, points, color, look):
    """One curve of one run. A long one is smoothed, with the logged values pale behind it."""
    steps, values = list(points), list(points.values())
    if look != "o" and len(values) < 10:
        look = "." + look
    elif look != "o":
        axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
        values = smooth(values)
    axes.plot(steps, values, look, color=color)


def smooth(values):
    """Exponential moving average over about 3% of the values, but at least two; it begins with the first value."""
    decay = math.exp(-1 / max(2, 0.03 * len(values)))
    averages, total, weight = [], 0.0, 0.0
    for value in values:
        total = decay * total + value
        weight = decay * weight + 1
        averages.append(total / weight)
    return averages


# ---------------------------------------------------------------------------------------------------------------------
# At a run's end, and by hand


def write_results(folder):
    """Write report.md and loss.png of the run in this folder; returns how it went, as lines for the terminal.

    Raises PlotError if there can be no report; a picture that fails is only one of the lines.
    """
    try:
        run = read_run(folder)
    except OSError as error:
        raise PlotError(f"{folder}: the log cannot be read ({error.strerror})") from None
    write_report(run)
    lines = [sentence.replace("**", "") for sentence in judgement(run)]
    if len(run.evaluations) > 1:
        lines += ["", *metrics_table(run.evaluations[0], run.evaluations[-1], HEADLINES)]
    if not run.flags.get("eval_only"):
        try:
            plot_runs([run], run.folder / "loss.png")
        except (PlotError, OSError, ImportError) as error:
            lines += ["", f"warning: no picture ({error})"]
    return lines


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="output folder, or its log file")
    parser.add_argument("--output", metavar="FILE", type=Path, help="only a picture: .png, .svg or .pdf (default: "
                        "loss.png in the run's folder; for several runs, in the current folder)")  # fmt: skip
    arguments = parser.parse_args(argv)
    try:
        runs = [read_run(path) for path in arguments.runs]
        if len({run.name for run in runs}) < len(runs):
            for run, path in zip(runs, arguments.runs, strict=True):
                run.name = str(path)
        folder = runs[0].folder if len(runs) == 1 else Path()
        output = arguments.output or folder / "loss.png"
        plot_runs(runs, output)
        print(output)
        if len(runs) == 1 and "data" in runs[0].start and not arguments.output:  # an older log says too little
            write_report(runs[0])
            print(folder / "report.md")
    except (PlotError, OSError) as error:
        print(f"plot_loss.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name need not fit the terminal
    sys.exit(main())
