"""Draw the curves of one or several DPO runs: loss, accuracy, rewards and log-probabilities over the steps.

    python plot_loss.py output/dpo                                        # writes output/dpo/loss.png
    python plot_loss.py output/beta01 output/beta02 --output compare.svg

A RUN is an output folder with metrics.jsonl, or with HF's trainer_state.json (also in checkpoint-N: the highest N
counts), or such a file itself.
"""

import argparse
import json
import math
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

LOG_NAMES = ("metrics.jsonl", "trainer_state.json")

# Okabe and Ito's colors, which color-blind readers can tell apart
BLACK, BLUE, VERMILLION, GREY = "#000000", "#0072B2", "#D55E00", "#595959"
RUN_COLORS = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", BLACK)  # in a picture of several runs

TITLES = ("loss", "accuracy", "rewards (nats, β included)", "log-probability (nats)")
CURVES = (  # number of the panel, label, field of the log, color in a picture of one run, line or points
    (0, "training", "loss", BLUE, "-"),
    (0, "held-out", "eval_loss", VERMILLION, "o"),
    (1, "training", "rewards/accuracies", BLUE, "-"),
    (1, "held-out", "eval_rewards/accuracies", VERMILLION, "o"),
    (2, "margin", "rewards/margins", BLACK, ":"),
    (2, "chosen", "rewards/chosen", BLUE, "-"),
    (2, "rejected", "rewards/rejected", VERMILLION, "--"),
    (3, "chosen", "logps/chosen", BLUE, "-"),
    (3, "rejected", "logps/rejected", VERMILLION, "--"),
)
FIELDS = {field for _, _, field, _, _ in CURVES}

STYLE = {
    "font.size": 12, "lines.linewidth": 2, "lines.markerfacecolor": "white", "lines.markeredgewidth": 1.6,
    "axes.titlesize": 13, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#E8E8E8",
    "legend.fontsize": 11, "legend.frameon": False, "legend.handlelength": 1.6, "legend.columnspacing": 1.2,
    "axes.formatter.useoffset": False, "axes.formatter.limits": (-9, 9),  # no "1e-6" in the way above an axis
    "text.parse_math": False,  # a "$" in a folder's name is a dollar
    "svg.fonttype": "none",  # text stays text
}  # fmt: skip
CHINESE_FONTS = (
    "Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei",
    "PingFang SC", "Heiti SC", "Hiragino Sans GB", "Arial Unicode MS",
    "Noto Sans CJK JP",  # Noto's file of all languages has this name in older versions of matplotlib
)  # fmt: skip


class PlotError(Exception):
    """One line: what is wrong, where, and what would be right."""


@dataclass
class Run:
    """What a run has logged."""

    name: str
    folder: Path
    series: dict[str, dict[int, float]]  # the values of a field by rising steps
    loss_at_start: float | None  # the loss where policy and reference agree; None if it is no DPO run


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
    points = {field: {} for field in FIELDS}
    loss_at_start = None
    for record in read_records(log):
        if "loss_at_start" in record:
            loss_at_start = number(record["loss_at_start"])
        step = number(record.get("step"))
        if step is None:
            continue
        if record.get("event") == "resumed":  # what was logged beyond this step belongs to lost weights
            points = {field: {s: v for s, v in old.items() if s <= step} for field, old in points.items()}
        for field in FIELDS & record.keys():
            value = number(record[field])
            if value is not None:
                points[field][int(step)] = value
    series = {field: dict(sorted(values.items())) for field, values in points.items() if values}
    if not series:
        expected = "one JSON object a line with `step` and `loss`, or HF's log_history"
        raise PlotError(f"{log}: nothing to draw yet, or not a training log; expected {expected}")
    if loss_at_start is None and any("rewards/" in field for field in series):
        loss_at_start = math.log(2)  # older logs and TRL's do not say it
    folder = path if path.is_dir() else path.parent
    name = folder.resolve().name.encode(errors="replace").decode()  # not every folder's name is UTF-8
    return Run(name, folder, series, loss_at_start)


def smooth(values):
    """Exponential moving average over about 3% of the values, but at least two; it begins with the first value."""
    decay = math.exp(-1 / max(2, 0.03 * len(values)))
    averages, total, weight = [], 0.0, 0.0
    for value in values:
        total = decay * total + value
        weight = decay * weight + 1
        averages.append(total / weight)
    return averages


def plot_runs(runs, output):
    """Draw the runs into one PNG, SVG or PDF (by suffix). An older picture is replaced whole or not at all."""
    output = Path(output)
    suffix = output.suffix.lower()
    if suffix not in (".png", ".svg", ".pdf"):
        raise PlotError(f"{output}: a picture's name ends in .png, .svg or .pdf")

    from matplotlib import font_manager, style  # here, because it takes time and training imports this file
    from matplotlib.figure import Figure  # without pyplot: no window, no state shared with the caller

    installed = font_manager.get_font_names()
    fonts = ["DejaVu Sans", *(font for font in CHINESE_FONTS if font in installed), "sans-serif"]
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    with style.context(["default", STYLE, {"font.family": fonts}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # no Chinese font: a folder's name is boxes
        figure = Figure(figsize=(8, 6 + 0.2 * (len(runs) - 1)), dpi=200, layout="constrained")
        draw(figure, runs)
        try:
            figure.savefig(temporary, format=suffix[1:])
            os.replace(temporary, output)
        except OSError as error:
            raise PlotError(f"{output}: cannot be written ({error.strerror})") from None
        finally:
            temporary.unlink(missing_ok=True)


def draw(figure, runs):
    """Fill the figure: four panels with a legend each, the names of the runs above."""
    panels = figure.subplots(2, 2, sharex=True).flatten()
    run_colors = [RUN_COLORS[i % len(RUN_COLORS)] for i in range(len(runs))]
    several = len(runs) > 1
    for panel, label, field, curve_color, look in CURVES:
        axes = panels[panel]
        for run, run_color in zip(runs, run_colors, strict=True):
            if field in run.series:
                draw_curve(axes, run.series[field], run_color if several else curve_color, look)
        if any(field in run.series for run in runs):
            axes.plot([], [], look, color=BLACK if several else curve_color, label=label)  # for the legend
    draw_starts(panels, runs)
    for axes, title in zip(panels, TITLES, strict=True):
        axes.locator_params(axis="x", nbins=5, integer=True, min_n_ticks=1)
        axes.set_title(title if axes.lines else f"{title}: not logged", pad=24)
        if axes.lines:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.97), ncols=3)  # below the title, above the curves
    figure.supxlabel("step (thin lines: as logged)", fontsize=12)
    if several:
        handles = [panels[0].plot([], [], color=color)[0] for color in run_colors]
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


def draw_starts(panels, runs):
    """Lines at the loss and the accuracy with which DPO starts: the policy still is the reference model."""
    loss, accuracy, _, _ = panels
    values = {round(run.loss_at_start, 6) for run in runs if run.loss_at_start is not None}
    if len(values) == 1:
        value = values.pop()
        label = "ln 2" if value == round(math.log(2), 6) else f"start {value:.4f}"
        loss.axhline(value, label=label, color=GREY, linewidth=1, zorder=1.5)
    if accuracy.lines:
        accuracy.axhline(0.5, label="chance", color=GREY, linewidth=1, zorder=1.5)


def summary(run):
    """Such as: 65 steps, loss 0.6931 -> 0.4213, held-out loss 0.6931 -> 0.4500, accuracy 0.5000 -> 0.9100"""
    words = [f"{max(max(points) for points in run.series.values())} steps"]
    for name, field in (("loss", "loss"), ("held-out loss", "eval_loss"), ("accuracy", "rewards/accuracies")):
        if field in run.series:
            values = list(run.series[field].values())
            words.append(f"{name} {values[0]:.4f} -> {values[-1]:.4f}")
    return ", ".join(words)


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="output folder, or its log file")
    parser.add_argument("--output", metavar="FILE", type=Path, help="picture to write, .png, .svg or .pdf (default: "
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
    except (PlotError, OSError) as error:
        print(f"plot_loss.py: {error}", file=sys.stderr)
        return 2
    print(f"{output}: " + "; ".join(f"{run.name}, {summary(run)}" for run in runs))
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name need not fit the terminal
    sys.exit(main())
