"""plot_loss.py: what it reads, what it refuses and how, and what is in the report and in the picture."""

import contextlib
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from statistics import fmean, stdev

import pytest
from fontTools.ttLib import TTFont
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.image import imread

import plot_loss
from plot_loss import PlotError, complete_or_absent, main, read_run, remove, write_results

LN_2 = math.log(2)
BLUE, VERMILLION, BLACK, GREY = plot_loss.BLUE, plot_loss.VERMILLION, plot_loss.BLACK, plot_loss.GREY


@pytest.fixture(autouse=True)
def no_warnings():
    """matplotlib warns about glyphs that a font lacks, legends without entries, layouts that failed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def dpo_lines(steps=120, start=LN_2):
    """A log of zigzag curves, with held-out values before and after."""
    lines = [{"step": 0, "eval_loss": start, "eval_rewards/accuracies": 0.5}]
    for step in range(10, steps + 1, 10):
        margin = step / 100 + 0.1 * (step % 20 == 0)
        lines.append({"step": step, "epoch": step / 100, "note": "text", "loss": start - margin / 10,
                      "rewards/accuracies": 0.5 + margin / 4, "rewards/margins": margin, "rewards/chosen": -margin / 3,
                      "rewards/rejected": -margin * 4 / 3, "logps/chosen": -200 - margin,
                      "logps/rejected": -210 - 9 * margin})  # fmt: skip
    return [*lines, {"step": steps, "eval_loss": start / 2, "eval_rewards/accuracies": 0.875}]


def write_run(folder, lines, name="metrics.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def draw(tmp_path, *runs):
    """The text of an SVG made from the command line."""
    main([*map(str, runs), "--output", str(tmp_path / "picture.svg")])
    return (tmp_path / "picture.svg").read_text(encoding="utf-8")


def curves(*folders):
    """For each panel, what is drawn in it: {color, line style and paleness: values}."""
    figure = Figure()
    plot_loss.draw(figure, [read_run(folder) for folder in folders])
    return [
        {f"{line.get_color()} {line.get_linestyle()}{' pale' * bool(line.get_alpha())}": list(line.get_ydata())
         for line in axes.lines if len(line.get_xdata())}
        for axes in figure.axes
    ]  # fmt: skip


# ---- reading


def series(path):
    """The values of each curve's field."""
    return {field: values for _, _, field, *_ in plot_loss.CURVES if (values := read_run(path).series(field))}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"step": 1, "loss": NaN}\n{"step": 2, "loss": null}\n{"step": 4, "loss": "0.4"}\n{"loss": 9}\n\n'
         b'{"step": 3, "loss": 0.5, "rewards/margins": -Infinity, "note": 1}\n{"step": null, "loss": 9}\n'
         b'{"step": 5.0, "loss": 0.3}\r', {"loss": {3: 0.5, 5: 0.3}}),  # nor is a blank line worth a warning
        (b'{"step": 10, "loss": 0.6}\n{"step": 20, "lo', {"loss": {10: 0.6}}),  # half-written
        (b'{"step": 30, "loss": 1}\n{"step": 10, "loss": 2}\n{"step": 30, "loss": 3}', {"loss": {10: 2.0, 30: 3.0}}),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_skipped(tmp_path, capsys, content, expected):
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(content)
    for path in (tmp_path, log):
        assert series(path) == expected and list(series(path)["loss"]) == sorted(expected["loss"])
        assert read_run(path).name == tmp_path.name
    assert capsys.readouterr().err == ""
    log.write_bytes(b'\n{"step": 20, "l\n[1]\n\xff\n' + content)  # broken lines that are not the last
    assert series(log) == expected
    assert f"warning: {log}: no JSON object in line 2 (3 such lines)\n" in capsys.readouterr().err


def test_resume_drops_what_belongs_to_lost_weights(tmp_path):
    lines = [{"event": "eval", "step": step, "loss": 1.0, "eval_loss": 2.0} for step in (10, 20, 25, 35)]
    lines += [{"step": 20, "event": "resumed"}, {"step": 30, "loss": 0.5}, {"step": 30, "loss": 0.4}]
    write_run(tmp_path, lines)
    assert series(tmp_path) == {"loss": {10: 1.0, 20: 1.0, 30: 0.4}, "eval_loss": {10: 2.0, 20: 2.0}}
    assert len(read_run(tmp_path).evaluations) == 2


def test_trainer_state_of_the_newest_checkpoint(tmp_path):
    for n in (90, 100, 20):  # as text, "90" and "20" would come after "100"
        folder = tmp_path / "hf" / f"checkpoint-{n}"
        folder.mkdir(parents=True)
        history = [{"step": n, "loss": float(n), "rewards/chosen": 0.1}, {"step": n, "eval_loss": 0.5}]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": n, "log_history": history}, indent=2))
    assert series(tmp_path / "hf") == {"loss": {100: 100.0}, "rewards/chosen": {100: 0.1}, "eval_loss": {100: 0.5}}
    assert series(folder / "trainer_state.json")["loss"] == {20: 20.0}
    main([str(tmp_path / "hf")])
    assert (tmp_path / "hf" / "loss.png").is_file() and not (tmp_path / "hf" / "report.md").exists()
    (tmp_path / "hf" / "trainer_state.json").write_text('{"log_history": [{"step": 120, "loss": 0.25}]}')
    assert series(tmp_path / "hf") == {"loss": {120: 0.25}}


# ---- the picture


def test_one_run_has_all_curves(tmp_path, capsys):
    lines = dpo_lines()
    run = write_run(tmp_path / "run", lines)
    svg = draw(tmp_path, run)
    assert capsys.readouterr() == (f"{tmp_path}/picture.svg\n", "")
    words = ("loss", "accuracy", "training", "held-out", "ln 2", "chance", "margin", "chosen", "rejected", "run")
    assert [word for word in words if f">{word}<" not in svg] == []
    for drawn, fields in zip(curves(run), (
        {"loss": f"{BLUE} -", "eval_loss": f"{VERMILLION} None"},
        {"rewards/accuracies": f"{BLUE} -", "eval_rewards/accuracies": f"{VERMILLION} None"},
        {"rewards/margins": f"{BLACK} :", "rewards/chosen": f"{BLUE} -", "rewards/rejected": f"{VERMILLION} --"},
        {"logps/chosen": f"{BLUE} -", "logps/rejected": f"{VERMILLION} --"},
    ), strict=True):  # fmt: skip
        for field, look in fields.items():
            logged = [line[field] for line in lines if field in line]
            pale = look.replace(" :", " -").replace("--", "-") + " pale"  # as logged, behind the smoothed curve
            assert look in drawn and drawn[look if "None" in look else pale] == logged, field


def test_long_curves_are_smoothed(tmp_path):
    noise = [1.0, -1.0, -1.0, 1.0] * 25
    loss, *_ = curves(write_run(tmp_path / "long", [{"step": i, "loss": 5 + x} for i, x in enumerate(noise)]))
    logged, smoothed = loss[f"{BLUE} - pale"], loss[f"{BLUE} -"]
    assert logged == [5 + x for x in noise]
    assert smoothed[0] == logged[0]  # no mixture with zero
    assert stdev(smoothed[50:]) < stdev(logged) / 2
    assert fmean(smoothed[50:]) == pytest.approx(fmean(logged), rel=0.02)
    loss, *_ = curves(write_run(tmp_path / "short", [{"step": i, "loss": 5 + x} for i, x in enumerate(noise[:9])]))
    assert loss == {f"{BLUE} -": logged[:9]}


def test_lines_where_dpo_starts(tmp_path):
    for name, start in {"other": 1.0, "rounded": 0.6931472, "unsaid": None}.items():
        first = [{"event": "start", "step": 0, "loss_at_start": start}] if start else []
        write_run(tmp_path / name, [*first, *dpo_lines(start=start or LN_2)])
        loss, accuracy, *_ = curves(tmp_path / name)
        assert loss[f"{GREY} -"] == pytest.approx([start or LN_2] * 2, abs=1e-4) and accuracy[f"{GREY} -"] == [0.5] * 2
    svg = draw(tmp_path, tmp_path / "other", tmp_path / "unsaid")
    assert ">ln 2<" in svg and ">start 1.0<" in svg and ">chance<" in svg
    start = {"event": "start", "step": 0, "loss_at_start": LN_2, "flags": {"sft_weight": 0.1}}
    svg = draw(tmp_path, write_run(tmp_path / "both terms", [start, *dpo_lines(start=LN_2 + 0.3)]))
    assert ">chance<" in svg and ">ln 2<" not in svg
    sft = write_run(tmp_path / "sft", [{"step": step, "loss": 2.0 - step / 100} for step in range(1, 40)])
    svg = draw(tmp_path, sft)  # a panel for what is logged, and no line of DPO's
    assert not any(f">{word}<" in svg for word in ("ln 2", "chance", "held-out", "accuracy", "margin"))


def test_several_runs_in_one_picture(tmp_path):
    names = ("beta_$1$", "_beta02", "b&<3>")
    folders = [write_run(tmp_path / name, dpo_lines(steps)) for name, steps in zip(names, (60, 120, 130), strict=True)]
    svg = draw(tmp_path, *folders)
    assert all(f">{name}<" in svg for name in ("beta_$1$", "_beta02", "b&amp;&lt;3&gt;", "margin", "training"))
    rewards = curves(*folders)[2]
    assert {f"C{i} {look}" for i in range(3) for look in ("-", "--", ":", "- pale")} - {"C0 - pale"} == set(rewards)
    again = write_run(tmp_path / "elsewhere" / "b&<3>", dpo_lines())
    svg = draw(tmp_path, folders[2], again)
    assert all(f">{path}<".replace("b&<3>", "b&amp;&lt;3&gt;") in svg for path in (folders[2], again))


def test_what_is_written_where(tmp_path, capsys, monkeypatch):
    one, two, three = tmp_path / "one", write_run(tmp_path / "two", [{"step": 1, "loss": 0.6}]), tmp_path / "three.PDF"
    terminal, report = report_of(one, START, evaluation(60, 0.55), END)
    for name in ("report.md", "loss.png"):
        (one / name).unlink()
    monkeypatch.chdir(tmp_path)
    main([str(one), "--output", str(three)])
    assert three.read_bytes().startswith(b"%PDF") and not (one / "report.md").exists()
    main([str(one), str(two)])
    main([str(one)])
    assert capsys.readouterr().out == f"{three}\nloss.png\n{terminal}\n"
    assert imread(one / "loss.png").shape[:2] == (600, 1600)
    assert (one / "report.md").read_text(encoding="utf-8") == report
    assert Path("loss.png").is_file() and not (two / "loss.png").exists()


def test_chinese_name(tmp_path, capsys, caplog, monkeypatch):
    """Without a font that has it: no warnings. With one: that font is in the picture."""
    run = write_run(tmp_path / "学", [{"step": 1, "loss": 0.6}])
    latin = [font for font in font_manager.fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", latin)
    assert ">学<" in draw(tmp_path, run)

    font = TTFont(font_manager.findfont("DejaVu Sans"))
    for table in font["cmap"].tables:
        if table.isUnicode():
            table.cmap[ord("学")] = "A"
    for record in font["name"].names:
        record.string = "SimHei"
    font.save(tmp_path / "simhei.ttf")
    font_manager.fontManager.addfont(tmp_path / "simhei.ttf")
    main([str(run), "--output", str(tmp_path / "picture.pdf")])
    assert b"+SimHei" in (tmp_path / "picture.pdf").read_bytes()
    assert capsys.readouterr().err == "" and caplog.messages == []


# ---- the report

GOOD = {"n_tokens": 20, "stopped": True, "repetition": 0.04, "domain": "a|b", "prompt": "hi", "answer": "ho",
        "chosen": "`x`\n```\ny"}  # fmt: skip
BAD = GOOD | {"stopped": False, "repetition": 0.12}
DIFFERENT = [GOOD | {"answer": letter} for letter in "abcdef"]


def evaluation(step, loss, accuracy=0.75, nll=2.0, **more):
    """A record as the trainer writes it."""
    metrics = {"loss": loss, "rewards/accuracies": accuracy, "rewards/margins": 1.5, "logps/accuracies": 0.6,
               "logps/chosen": -123.456, "nll_loss": nll, "lengths/accuracies": 0.7}  # fmt: skip
    errors = {"loss": 0.02, "rewards/accuracies": 0.05}
    metrics = {"pairs": 60, "prompts": 18} | metrics | {f"{name}_se": errors.get(name, 0.0) for name in metrics}
    answers = [GOOD | {"answer": f"answer at {step}"}] * 6
    record = {"event": "eval", "step": step, "time": 1e9 + 90 * step, "answers": answers}
    record |= {"domains": {"chat": metrics, "a|b": dict(metrics)}, "lengths": {"chosen longer": metrics}}
    return record | {f"eval_{name}": value for name, value in metrics.items()} | more


def report_of(folder, *records, **flags):
    """The lines for the terminal, and the report."""
    flags = {"model_name_or_path": "m", "dataset_name": "my pairs.jsonl", "ref_model_name_or_path": None} | flags
    start = {"event": "start", "step": 0, "time": 1e9, "flags": flags, "data": "60 pairs", "device": "CPU"}
    start |= {"versions": "torch 2", "micro_batch_tokens": 2048}
    lines = write_results(write_run(folder, [start, *records]))
    return "\n".join(lines), (folder / "report.md").read_text(encoding="utf-8")


START, END = evaluation(0, LN_2, 0.5), {"event": "end", "step": 60, "time": 1e9 + 5400}


@pytest.mark.parametrize(
    ("records", "said", "not_said"),
    [
        ([START, evaluation(60, 0.55), END],
         ["The held-out loss fell: 0.6931 → 0.5500 ± 0.0200; accuracy 0.5000 → 0.7500 ± 0.0500.", "arxiv.org/abs/24",
          "“The longer one is better” is right in 0.7000 of the pairs, the model in 0.7500 ± 0.0500.",
          "to 6 held-out prompts: 20 → 20 tokens; 100% → 100% ended by themselves; 4% → 4% of",
          "per token has not changed: -2.000 → -2.000"], ["**", "lowest"]),
        ([START, evaluation(60, 0.55, answers=[BAD] + [GOOD] * 5), END], ["100% → 83% ended"], ["worse"]),
        ([START, evaluation(60, 0.55, answers=[BAD] * 2 + [GOOD] * 4), END],
         ["**Although the loss is better, the answers got worse: fewer come to an end.**"], ["repeat themselves"]),
        ([START, evaluation(60, 0.75, answers=[GOOD | {"repetition": 0.2}] * 6), END],
         ["**The held-out loss rose**", "lowest at step 0", "**The answers got worse: they repeat themselves.** Try a "
          "lower `--learning_rate` or fewer steps.\n"], ["--sft_weight"]),
        ([START | {"answers": DIFFERENT}, evaluation(60, 0.55, answers=DIFFERENT[:1] * 3 + DIFFERENT[:3]), END],
         ["worse: they begin in 3 ways, no longer in 6.** Try `--sft_weight 0.1`.\n"], ["too far", "--learning_rate"]),
        ([START, evaluation(20, 0.6, answers=[]), evaluation(60, 0.65), END],
         ["**It has gone too far**: the held-out loss was lowest at step 20, 0.6000; the last is higher by 0.0500, "
          "more than two standard errors. Train with fewer steps or a lower `--learning_rate`, or take a checkpoint "],
         []),
        ([START, evaluation(20, 0.6), evaluation(60, 0.63), END], ["lowest at step 20 of 60: 0.6000"], ["too far"]),
        ([START, evaluation(60, 0.69), END], ["hardly changed"], ["loss fell", "loss rose"]),
        ([START, evaluation(60, 0.5, nll=2.05), END], ["per token fell: -2.000 → -2.050"], ["far**"]),
        ([START, evaluation(60, 0.5, nll=1.95), END], ["per token rose: -2.000 → -1.950"], []),
        ([START, evaluation(60, 0.5, nll=2.25), END], ["**fell far** (`--sft_weight 0.1`"], []),
        ([START, evaluation(60, 0.5)], ["**The run is not finished**: its log ends at step 60."], []),
        ([START, evaluation(60, math.nan), END], ["**The held-out loss is not a number**"], ["gone too far"]),
        ([{"step": 1, "loss": 0.6, "time": 1e9}, END], ["evaluated 0 times: nothing to compare"], ["finished"]),
        ([START, evaluation(40, 0.3), {"event": "resumed", "step": 20, "time": 2e9}, evaluation(60, 0.6), END],
         ["0.6"], ["0.3"]),
    ],
)  # fmt: skip
def test_how_a_run_went_in_words(tmp_path, monkeypatch, records, said, not_said):
    monkeypatch.setattr(plot_loss, "plot_runs", lambda runs, output: None)  # takes a second
    terminal, report = report_of(tmp_path, *records)
    words = report[: report.index("![")]
    assert [text for text in said if text not in words or text.replace("**", "") not in terminal] == []
    assert [text for text in not_said if text in words] == []


def test_what_else_is_in_the_report(tmp_path):
    speed = {"step": 30, "pairs_per_second": 2.5, "time": 1e9 + 60}
    before, after = START | {"eval_mine": 2.0, "eval_mine_se": 0.0}, evaluation(60, 0.55)
    after |= {"eval_mine": 3.0, "eval_mine_se": 0.1}
    after["domains"]["a|b"]["loss"] = math.nan
    pause = {"event": "resumed", "step": 60, "time": 2e9}  # does not count as time of the run
    end = END | {"time": 2e9 + 60}
    _, report = report_of(tmp_path, before, speed, after, pause, end, beta=0.1)
    for text in ("# m on my pairs.jsonl, 60 steps\n", "](loss.png)", "| 60 pairs of 18 prompts | before | after |\n",
                 "\n| loss (nats) | 0.6931 ± 0.0200 | 0.5500 ± 0.0200 |\n", "\n| mine | 2.0000 | 3.0000 ± 0.1000 |\n",
                 "\n| logps/chosen | -123.46 | -123.46 |\n", "\n| a/b | 60 | 0.6931 → – | 0.5000 → 0.7500 ± 0.0500 |",
                 "\n### a|b\n", "**Before**\n\n```text\nanswer at 0\n```\n\n**After**\n\n```text\nanswer at 60\n",
                 "\n````text\n`x`\n```\ny\n````\n", "only the last part is shown.\n\n```sh\npython dpo_train.py",
                 "--dataset_name 'my pairs.jsonl' --beta 0.1\n", "60 pairs\n",
                 "\n91.0 minutes, 2.5 pairs/s, micro-batches of 2048 tokens, CPU, torch 2.\n"):  # fmt: skip
        assert text in report, text
    assert "ref_model" not in report


def test_comparison_of_two_models(tmp_path):
    records = [START, evaluation(0, 0.55, answers=None), END | {"step": 0}]
    _, report = report_of(tmp_path, *records, eval_only=True, ref_model_name_or_path="r")
    assert report.startswith("# r (before) and m (after)\n\n- The held-out loss fell: 0.6931 → 0.5500 ± 0.0200;")
    assert "](loss.png)" not in report and "## Answers" not in report and not (tmp_path / "loss.png").exists()


def test_a_full_disk_costs_no_older_file_and_a_picture_no_report(tmp_path, monkeypatch):
    def full_disk(self, path, **options):
        Path(path).write_bytes(b"half a pict")
        raise OSError(28, "No space left on device")

    (tmp_path / "loss.png").write_bytes(b"the old picture")
    monkeypatch.setattr(Figure, "savefig", full_disk)
    terminal, _ = report_of(tmp_path, START, evaluation(60, 0.55), END)
    reason = f"{tmp_path}/loss.png: No space left on device"
    assert terminal.endswith(f"\nwarning: no picture: {reason}")
    with pytest.raises(SystemExit, match=f"plot_loss.py: {reason}"):
        main([str(tmp_path), "--output", str(tmp_path / "loss.png")])
    assert (tmp_path / "loss.png").read_bytes() == b"the old picture"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl", "report.md"]
    (tmp_path / "report.md").unlink()
    (tmp_path / "report.md").mkdir()
    with pytest.raises(PlotError, match="report.md: "):
        write_results(tmp_path)


def test_complete_or_absent(tmp_path):
    """A file or a folder that replaces the one before, or leaves it."""
    for make in (lambda path: path.write_text("new"), lambda path: (path.mkdir(), (path / "x").write_text("new"))):
        for n in range(2):
            with complete_or_absent(tmp_path / "it") as aside:
                make(aside)
            with contextlib.suppress(ZeroDivisionError), complete_or_absent(tmp_path / "it") as aside:
                make(aside)
                (aside / "x" if aside.is_dir() else aside).write_text(f"half, {n / 0}")
            found = tmp_path / "it" / "x" if (tmp_path / "it").is_dir() else tmp_path / "it"
            assert found.read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["it"]
        remove(tmp_path / "it")


# ---- refusals


def test_refusals_are_one_line_and_no_traceback(tmp_path, capsys, monkeypatch):
    run = str(write_run(tmp_path / "run", dpo_lines()))
    contents = {"empty.jsonl": b"\n", "picture.jsonl": b"\x89PNG\r\n\0\xff\n", "state.json": b'{"log_history": 5}',
                "young.jsonl": b'{"event": "start", "loss_at_start": 1.0}\n{"step": 0, "event": "resumed"}\n',
                "deep.jsonl": b"[" * 100_000}  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.png").mkdir()
    cases = [([name], f"{name}: nothing to draw yet, or not a training log") for name in contents]
    cases += [
        (["missing"], "missing: neither a log nor a folder with metrics.jsonl or trainer_state.json"),
        (["empty"], "empty: neither a log nor a folder with"),
        ([run, "missing"], "missing: neither"),
        (["x" * 300], "too long"),
        ([run, "--output", "loss.jpg"], "loss.jpg: a picture's name ends in .png, .svg or .pdf"),
        ([run, "--output", "loss"], ".png, .svg or .pdf"),
        ([run, "--output", "nowhere/loss.png"], "nowhere/loss.png: No such file or directory"),
        ([run, "--output", "folder.png"], "folder.png: Is a directory"),
    ]
    monkeypatch.chdir(tmp_path)
    for arguments, reason in cases:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert str(caught.value).startswith("plot_loss.py: ") and "\n" not in str(caught.value), arguments
        assert reason in str(caught.value) and capsys.readouterr().out == ""


def test_as_a_user_sees_it(tmp_path):
    """A folder's name that is no UTF-8, an ASCII terminal, a backend for windows without a display: all no matter."""
    name = os.fsdecode("学率".encode("gbk"))
    write_run(tmp_path / name, dpo_lines())
    script = Path(__file__).parent.parent / "plot_loss.py"
    env = {**os.environ, "MPLBACKEND": "TkAgg", "DISPLAY": "", "PYTHONIOENCODING": "ascii"}
    for argument, status in ((name, 0), ("missing", 1)):
        command = [sys.executable, script, argument]
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert result.returncode == status
        printed, other = (result.stderr, result.stdout) if status else (result.stdout, result.stderr)
        assert printed.count("\n") == 1 and other == ""
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["loss.png", "metrics.jsonl"]
    command = [sys.executable, "-c", "import plot_loss, sys; print({'torch', 'matplotlib'} & set(sys.modules))"]
    assert subprocess.run(command, cwd=script.parent, capture_output=True, text=True).stdout == "set()\n"
