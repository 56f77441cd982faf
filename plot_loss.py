"""Draw the curves of one or several DPO runs: loss, accuracy, rewards and log-probabilities over the steps.

    python plot_loss.py output/dpo                                        # writes output/dpo/loss.png
    python plot_loss.py output/beta01 output/beta02 --output compare.svg

A RUN is an output folder with metrics.jsonl, or with HF's trainer_state.json (also in checkpoint-N: the highest N
counts), or such a file itself.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import textwrap
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

LOG_NAMES = ("metrics.jsonl", "trainer_state.json")
METADATA = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}  # no dates: same data, same file


class Panel(NamedTuple):
    title: str
    curves: dict[str, str]  # label -> field of the training lines
    held_out: str | None = None  # field of the evaluation lines, drawn as points
    reference: float | None = None  # where DPO starts: the policy is the reference model
    reference_label: str = ""


PANELS = (
    Panel("loss", {"loss": "loss"}, "eval_loss", math.log(2), "ln 2"),
    Panel("accuracy", {"accuracy": "rewards/accuracies"}, "eval_rewards/accuracies", 0.5, "chance"),
    Panel("rewards (nats, β included)",
          {"margin": "rewards/margins", "chosen": "rewards/chosen", "rejected": "rewards/rejected"}, reference=0.0),
    Panel("log-probability (nats)", {"chosen": "logps/chosen", "rejected": "logps/rejected"}),
)  # fmt: skip
FIELDS = {field for panel in PANELS for field in (panel.held_out, *panel.curves.values())} - {None}

# Okabe and Ito's colours, which colour-blind readers can tell apart, without their yellow: too pale on paper
BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#E69F00", "#009E73"
VERMILLION, PURPLE, SKY, GREY = "#D55E00", "#CC79A7", "#56B4E9", "#595959"
RUN_COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
RUN_MARKERS = "osD^vP"  # one fewer than the colours, so that the first 42 runs all differ
# Colours for a picture of one run; with several, the colour tells the run, and the line style still tells the curve
LOOKS = {"loss": ("-", BLUE), "accuracy": ("-", BLUE), "margin": (":", BLACK), "chosen": ("-", BLUE),
         "rejected": ("--", VERMILLION)}  # fmt: skip
THIN, THICK = {"linewidth": 0.7, "alpha": 0.35}, {"linewidth": 2.0, "markersize": 5.0}
HOLLOW = {"linestyle": "", "markersize": 6.5, "markerfacecolor": "white", "markeredgewidth": 1.6, "zorder": 4}
DOTTED = {"linestyle": (0, (1, 2)), "linewidth": 1.0, "zorder": 1}
CARET = {"linestyle": "", "marker": 10, "markersize": 7.0}  # marker 10 stands on the axis


class PlotError(Exception):
    """One line: what is wrong, where, and what would be right."""


@dataclass
class Run:
    name: str
    log: Path
    series: dict[str, tuple[list[int], list[float]]]  # field -> its steps (rising) and values (finite)
    resumed: list[int]  # the last step done before each resume


# ---- reading


def find_log(path):
    """The log that a RUN argument means: the file itself, or the one in the folder or in its newest checkpoint."""
    if not path.exists():
        raise PlotError(f"{path}: no such file or folder; give a run's output folder, or its {' or '.join(LOG_NAMES)}")
    if not path.is_dir():
        return path
    checkpoints = {int(p.name[11:]): p for p in path.glob("checkpoint-*") if p.name[11:].isdecimal()}
    for folder in (path, *(checkpoints[n] for n in sorted(checkpoints, reverse=True))):
        for log in (folder / name for name in LOG_NAMES):
            if log.is_file():
                return log
    raise PlotError(f"{path}: neither {' nor '.join(LOG_NAMES)} in this folder; give a run's output folder")


def read_records(log):
    """The JSON objects of a log, in the file's order."""
    try:
        content = log.read_bytes().rstrip()
    except OSError as error:
        raise PlotError(f"{log}: cannot be read ({error.strerror})") from None
    try:
        return [record for record in json.loads(content)["log_history"] if isinstance(record, dict)]
    except (ValueError, TypeError, KeyError, RecursionError):
        pass  # not HF's one document, so one object a line
    records, broken = [], []
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # a ValueError: broken JSON, broken UTF-8
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line.strip():
            broken.append(number)
    if not records:
        what = "not a training log" if content else "empty"
        raise PlotError(f"{log}: {what}; expected one JSON object a line with `step` and `loss`, or HF's log_history")
    if broken and broken[-1] == len(lines):
        broken.pop()  # the last line, half-written: the run was killed, or is writing it now
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        print(f"warning: {log}, line {broken[0]}{more}: not a JSON object, skipped", file=sys.stderr)
    return records


def finite(value):
    """The value as a float, or None if it cannot be drawn: null, text, NaN, Infinity, absurdly large."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100
    return float(value) if usable else None


def read_run(path):
    """Read the log of a run (folder or file). Where a step was logged twice, the last time counts."""
    log = find_log(Path(path))
    points = {}  # field -> {step: value}
    resumed, newest = [], -1
    for record in read_records(log):
        step, is_resume = finite(record.get("step")), record.get("event") == "resumed"
        if step is None:
            continue
        if is_resume or "loss" in record:
            if is_resume or step < newest:
                # Back at a checkpoint: what was logged beyond it belongs to weights that are gone
                points = {field: {s: v for s, v in old.items() if s <= step} for field, old in points.items()}
                resumed = [s for s in resumed if s < step] + [int(step)] * is_resume
            newest = step
        for field, value in record.items():
            if finite(value) is not None:
                points.setdefault(field, {})[int(step)] = finite(value)
    series = {field: (sorted(p), [p[step] for step in sorted(p)]) for field, p in points.items() if p}
    if not FIELDS & series.keys():
        raise PlotError(f"{log}: nothing to draw yet, or not a training log; expected lines with `step` and `loss`")
    return Run(run_folder(log).name, log, series, resumed)


def run_folder(log):
    folder = log.absolute().parent
    return folder.parent if folder.name.startswith("checkpoint-") else folder


def read_runs(paths):
    """Read several runs, each once, and name each by the shortest part of its path that tells it from the others."""
    runs = list({run.log.resolve(): run for run in map(read_run, paths)}.values())
    parts = [run_folder(run.log).parts for run in runs]
    if len(set(parts)) < len(parts):  # several logs in one folder
        parts = [run.log.absolute().parts for run in runs]
    while len(runs) > 1 and len({own[-1] for own in parts}) == 1:  # beta01/output and beta02/output: beta01, beta02
        parts = [own[:-1] for own in parts]
    for run, own in zip(runs, parts, strict=True):
        n = 1
        while n < len(own) and sum(other[-n:] == own[-n:] for other in parts) > 1:
            n += 1
        run.name = "/".join(own[-n:])
    return runs


# ---- computing


def smooth(steps, values, time_constant):
    """Exponential moving average over real steps, with bias correction.

    A value logged d steps ago weighs exp(-d / time_constant), `time_constant` in steps, and the weights are divided by
    their sum: the first average is the first value, not a mixture with zero.
    """
    averages, total, weight, previous = [], 0.0, 0.0, None
    for step, value in zip(steps, values, strict=True):
        decay = math.exp((previous - step) / time_constant) if averages else 0.0
        total, weight, previous = total * decay + value, weight * decay + 1, step
        averages.append(total / weight)
    return averages


def default_time_constant(steps):
    """In steps: 3% of the run, but at least two logging intervals."""
    return max(0.03 * (steps[-1] - steps[0]), 2 * statistics.median(b - a for a, b in pairwise(steps)))


def epoch_boundaries(steps, epochs):
    """The steps, interpolated, at which the epoch passes a whole number; the end of the run is none."""
    boundaries = []
    for (step, epoch), (next_step, next_epoch) in pairwise(zip(steps, epochs, strict=True)):
        # An epoch has at least one step: a nonsense value must not make this loop endless
        for whole in range(math.floor(epoch) + 1, math.floor(min(next_epoch, next_step)) + 1):
            boundaries.append(step + (next_step - step) * (whole - epoch) / (next_epoch - epoch))
    return [step for step in boundaries if step < steps[-1]]


def summary(run):
    """Last values on one line, such as: 120 steps, loss 0.6931 -> 0.4213, held-out 0.4500, accuracy 0.91"""
    last = {field: values[-1] for field, (_, values) in run.series.items()}
    words = [f"{max(run.series[field][0][-1] for field in FIELDS & last.keys())} steps"]
    if "loss" in last:
        words.append(f"loss {run.series['loss'][1][0]:.4f} -> {last['loss']:.4f}")
    formats = {"eval_loss": "held-out {:.4f}", "rewards/accuracies": "accuracy {:.2f}",
               "eval_rewards/accuracies": "held-out accuracy {:.2f}"}  # fmt: skip
    return ", ".join(words + [text.format(last[field]) for field, text in formats.items() if field in last])


# ---- drawing (matplotlib is imported here, so that mistakes in the arguments are answered at once)


def fonts_for(names):
    """The names as they can be drawn, and the font families that have their characters."""
    from matplotlib import font_manager

    def escape(text, drawable):
        return "".join(c if drawable(c) else c.encode("unicode_escape").decode() for c in text)

    names = [escape(name, str.isprintable) for name in names]
    latin = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()  # comes with matplotlib
    missing = {ord(c) for name in names for c in name} - latin.keys()
    if not missing:
        return names, ["DejaVu Sans"]
    manager = font_manager.fontManager
    for path in set(font_manager.findSystemFonts()) - {font.fname for font in manager.ttflist}:
        with contextlib.suppress(Exception):  # matplotlib cannot read every kind of font
            manager.addfont(path)  # installed since matplotlib wrote its list of fonts
    # Sans before serif, Chinese shapes before Japanese ones; a "last resort" font has a box for every character
    fonts = [font for font in manager.ttflist if not font.name.lstrip(".").startswith("Last")]
    for font in sorted(fonts, key=lambda f: ("Serif" in f.name, "Mono" in f.name, "SC" not in f.name, f.name)):
        with contextlib.suppress(Exception):
            if missing <= font_manager.get_font(font.fname).get_charmap().keys():
                return names, ["DejaVu Sans", font.name]
    print("note: no installed font has all characters of the run names: they are escaped (\\u...)", file=sys.stderr)
    return [escape(name, lambda c: ord(c) in latin) for name in names], ["DejaVu Sans"]


def check_output(output):
    if output.suffix.lower() not in METADATA:
        raise PlotError(f"{output}: unknown suffix; the picture can be {', '.join(METADATA)}")
    if output.is_dir() or not output.parent.is_dir():
        reason = "it is a folder" if output.is_dir() else f"there is no folder {output.parent}"
        raise PlotError(f"{output}: cannot be written, {reason}")


def plot_runs(runs, output):
    """Draw the runs into one PNG, SVG or PDF (by suffix). An older picture is replaced whole or not at all."""
    output = Path(output)
    check_output(output)
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no window, no state shared with the caller

    names, families = fonts_for([run.name for run in runs])
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the reader's own matplotlibrc must not change the picture
        matplotlib.rcParams.update({
            "font.family": [*families, "sans-serif"], "font.sans-serif": ["DejaVu Sans"], "font.size": 12,
            "text.parse_math": False, "axes.formatter.useoffset": False, "axes.spines.top": False,
            "axes.spines.right": False, "svg.fonttype": "none", "svg.hashsalt": "dpo",
        })  # fmt: skip
        # 12 points on 8 inches: 12 pixels high at 600 pixels wide. The PNG has 1600 x 1200, more with many names
        figure = Figure(figsize=(8, 6 + 0.2 * max(0, len(runs) - 4)), dpi=200, layout="constrained")
        draw(figure, runs, names)
        try:
            figure.savefig(temporary, format=output.suffix[1:].lower(), metadata=METADATA[output.suffix.lower()])
            os.replace(temporary, output)
        except OSError as error:
            raise PlotError(f"{output}: cannot be written ({error.strerror})") from None
        finally:
            temporary.unlink(missing_ok=True)


def draw(figure, runs, names):
    from matplotlib.lines import Line2D

    colors = [RUN_COLORS[i % len(RUN_COLORS)] for i in range(len(runs))]
    markers = [RUN_MARKERS[i % len(RUN_MARKERS)] for i in range(len(runs))]
    shown = {}  # label -> look of what the picture has, for the legend below it
    for panel, axes in zip(PANELS, figure.subplots(2, 2, sharex=True).flat, strict=True):
        draw_panel(axes, panel, runs, colors, markers, shown)
    for axes in figure.axes[2:]:
        axes.set_xlabel("step")
    names = ["\n".join(textwrap.wrap(name, 60 if name.isascii() else 30)) for name in names]
    if len(runs) > 1:
        handles = [Line2D([], [], color=color, marker=marker, **THICK)
                   for color, marker in zip(colors, markers, strict=True)]  # fmt: skip
        columns = max(1, min(4, 75 // (max(map(len, names)) + 7)))
        figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False)
    else:
        figure.suptitle(names[0], fontsize=12, color=GREY)
    handles = [Line2D([], [], **look) for look in shown.values()]
    figure.legend(handles, shown.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=11)


def draw_panel(axes, panel, runs, colors, markers, shown):
    from matplotlib.lines import Line2D

    several = len(runs) > 1
    boundaries = [epoch_boundaries(*run.series.get("epoch", ([], []))) for run in runs]
    labels = [label for label, field in panel.curves.items() if any(field in run.series for run in runs)]
    logged = labels or any(panel.held_out in run.series for run in runs)
    axes.set_title(panel.title, fontsize=13, pad=24 if len(labels) > 1 else 6)
    axes.grid(color="#E8E8E8", linewidth=0.6)
    axes.locator_params(nbins=6)
    axes.locator_params(axis="x", nbins=5, integer=True, min_n_ticks=1)
    axes.ticklabel_format(axis="y", scilimits=(-9, 9))  # a "1e-6" above the axis would lie on the legend
    for run, run_color, marker, epochs in zip(runs, colors, markers, boundaries, strict=True):
        for label in labels:
            steps, values = run.series.get(panel.curves[label], ([], []))
            linestyle, color = LOOKS[label]
            color = run_color if several else color
            marked = None  # each point gets a marker
            if len(steps) >= 10:  # enough to smooth
                axes.plot(steps, values, color=color, **THIN)
                values = smooth(steps, values, default_time_constant(steps))
                marked = [-1] if several else []  # the run's marker at its end, for readers without colours
                shown |= {"as logged": {"color": GREY, **THIN}, "smoothed": {"color": GREY, **THICK}}
            axes.plot(steps, values, color=color, linestyle=linestyle, marker=marker, markevery=marked, **THICK)
        if panel.held_out in run.series:
            color = run_color if several else VERMILLION
            axes.plot(*run.series[panel.held_out], color=color, marker=marker, **HOLLOW)
            shown["held-out"] = {"color": GREY if several else VERMILLION, "marker": "o", **HOLLOW}
        for step in epochs if len(epochs) <= 20 else []:  # more would be a curtain
            axes.axvline(step, color=run_color if boundaries.count(epochs) < len(runs) else GREY, **DOTTED)
            shown["epoch"] = {"color": GREY, **DOTTED}
        for step in run.resumed:
            axes.plot(step, 0, color=run_color if several else GREY, transform=axes.get_xaxis_transform(), **CARET)
            shown["resumed"] = {"color": GREY, **CARET}
    if not logged:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color=GREY)
        axes.set_yticks([])
    elif panel.reference is not None and any("rewards/" in field for run in runs for field in run.series):  # DPO
        axes.axhline(panel.reference, color=GREY, linewidth=1, zorder=1.5)
        axes.annotate(panel.reference_label, (1.01, panel.reference), xycoords=("axes fraction", "data"), va="center",
                      color=GREY)  # fmt: skip
    if len(labels) > 1:  # between title and curves, where it covers none of them
        handles = [Line2D([], [], color=GREY if several else LOOKS[label][1], linestyle=LOOKS[label][0], **THICK)
                   for label in labels]  # fmt: skip
        axes.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 0.97), ncols=3, frameon=False,
                    fontsize=11, handlelength=1.8, columnspacing=1.2, borderpad=0.2)  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="output folder, or its log file")
    parser.add_argument("--output", metavar="FILE", type=Path, help="picture to write, .png, .svg or .pdf (default: "
                        "loss.png in the run's folder; for several runs, in the current folder)")  # fmt: skip
    arguments = parser.parse_args(argv)
    try:
        if arguments.output:
            check_output(arguments.output)  # before the slow part
        runs = read_runs(arguments.runs)
        folder = arguments.runs[0] if arguments.runs[0].is_dir() else arguments.runs[0].parent
        output = arguments.output or (Path() if len(runs) > 1 else folder) / "loss.png"
        plot_runs(runs, output)
    except (PlotError, OSError) as error:
        print(f"plot_loss.py: {error}", file=sys.stderr)
        return 2
    names = [f"{run.name}: " if len(runs) > 1 else "" for run in runs]
    line = f"{output}: " + "; ".join(name + summary(run) for name, run in zip(names, runs, strict=True))
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))
    return 0


if __name__ == "__main__":
    sys.exit(main())
