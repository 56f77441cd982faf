"""plot_loss.py: what it reads, what it refuses and how, and what is in the picture."""

import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from statistics import correlation, fmean, stdev
from xml.etree import ElementTree

import pytest
from fontTools.ttLib import TTFont
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.image import imread

from plot_loss import main, plot_runs, read_run

LOSS, ACCURACY, REWARDS, LOGPS = range(1, 5)  # the panels
LN_2 = math.log(2)
BLUE, VERMILLION, GREEN, BLACK, GREY = "#0072b2", "#d55e00", "#009e73", "#000000", "#595959"


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
    assert main([*map(str, runs), "--output", str(tmp_path / "picture.svg")]) == 0
    return (tmp_path / "picture.svg").read_text(encoding="utf-8")


def curves(svg, panel):
    """What is drawn in a panel: a list of (look and color, heights); heights grow downwards."""
    found = []
    for group in ElementTree.fromstring(svg).find(f".//*[@id='axes_{panel}']"):
        if not group.get("id").startswith("line2d") or not len(group):
            continue
        path, points = group.find("{*}path"), group.findall(".//{*}use")
        style = (points[0] if path is None else path).get("style")
        looks = {"points": path is None, "pale": "opacity: 0.35" in style, "dotted": "dasharray: 2," in style,
                 "dashed": "dasharray: 7" in style, "solid": True}  # fmt: skip
        look = next(name for name, applies in looks.items() if applies)
        heights = [point.get("y") for point in points] or re.findall(r"[ML] \S+ (\S+)", path.get("d"))
        found.append((f"{look} {re.search('stroke: (#......)', style)[1]}", [float(y) for y in heights]))
    return found


# ---- reading


def test_values_that_cannot_be_drawn_are_skipped(tmp_path, capsys):
    lines = ['{"step": 1, "loss": NaN}', '{"step": 2, "loss": null}', '{"step": 4, "loss": "0.4"}', '{"loss": 9}', "",
             '{"step": 3, "loss": 0.5, "rewards/margins": -Infinity, "note": 1}', '{"step": null, "loss": 9}',
             '{"step": 5.0, "loss": 0.3}\r']  # fmt: skip
    write_run(tmp_path / "run", []).joinpath("metrics.jsonl").write_text("\n".join(lines))
    for path in (tmp_path / "run", tmp_path / "run" / "metrics.jsonl"):
        run = read_run(path)
        assert (run.name, run.series) == ("run", {"loss": {3: 0.5, 5: 0.3}})
    assert capsys.readouterr().err == ""  # nor is a blank line worth a warning


@pytest.mark.parametrize("rest", [b'{"step": 20, "lo', '{"step": 20, "note": "半'.encode()[:-1], b"\0\0\0\0"])
def test_half_written_last_line_does_no_harm(tmp_path, capsys, rest):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 10, "loss": 0.6}\n' + rest)
    assert read_run(tmp_path).series == {"loss": {10: 0.6}}
    assert capsys.readouterr().err == ""


def test_broken_lines_in_the_middle_are_skipped_with_one_warning(tmp_path, capsys):
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b'{"step": 10, "loss": 0.6}\n{"step": 20, "l\n{"step": 30, "loss": 0.5}\n[1]\n\xff\n{"step": 40}\n')
    assert read_run(tmp_path).series == {"loss": {10: 0.6, 30: 0.5}}
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and f"{log}, line 2: " in warning and "3 such lines" in warning


def test_resume_drops_what_belongs_to_lost_weights(tmp_path):
    lines = [{"step": step, "loss": 1.0, "eval_loss": 2.0} for step in (10, 20, 25, 30, 35)]
    lines += [{"step": 20, "event": "resumed"}, {"step": 30, "loss": 0.5}, {"step": 30, "loss": 0.4}]
    run = read_run(write_run(tmp_path, lines))
    assert run.series == {"loss": {10: 1.0, 20: 1.0, 30: 0.4}, "eval_loss": {10: 2.0, 20: 2.0}}  # 30: the last counts
    run = read_run(write_run(tmp_path, [{"step": step, "loss": float(i)} for i, step in enumerate((10, 30, 20, 10))]))
    assert list(run.series["loss"].items()) == [(10, 3.0), (20, 2.0), (30, 1.0)]


def test_trainer_state_of_the_newest_checkpoint(tmp_path, capsys):
    for n in (90, 100, 20):  # as text, "90" and "20" would come after "100"
        history = [{"step": n, "loss": float(n), "rewards/chosen": 0.1}, {"step": n, "eval_loss": 0.5}]
        folder = tmp_path / "hf" / f"checkpoint-{n}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": n, "log_history": history}, indent=2))
    run = read_run(tmp_path / "hf")
    assert run.name == "hf"
    assert run.series == {"loss": {100: 100.0}, "rewards/chosen": {100: 0.1}, "eval_loss": {100: 0.5}}
    assert read_run(folder / "trainer_state.json").series["loss"] == {20: 20.0}
    assert main([str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "loss.png").is_file()
    (tmp_path / "hf" / "trainer_state.json").write_text('{"log_history": [{"step": 120, "loss": 0.25}]}')
    assert read_run(tmp_path / "hf").series == {"loss": {120: 0.25}}


# ---- the picture


def test_one_run_has_all_curves_at_their_heights(tmp_path, capsys):
    lines = dpo_lines()
    svg = draw(tmp_path, write_run(tmp_path / "run", lines))
    end = "120 steps, loss 0.6831 -> 0.5631, held-out loss 0.6931 -> 0.3466, accuracy 0.5250 -> 0.8250\n"
    assert capsys.readouterr() == (f"{tmp_path}/picture.svg: run, {end}", "")
    expected = {
        LOSS: {"loss": f"solid {BLUE}", "eval_loss": f"points {VERMILLION}"},
        ACCURACY: {"rewards/accuracies": f"solid {BLUE}", "eval_rewards/accuracies": f"points {VERMILLION}"},
        REWARDS: {"rewards/margins": f"dotted {BLACK}", "rewards/chosen": f"solid {BLUE}",
                  "rewards/rejected": f"dashed {VERMILLION}"},
        LOGPS: {"logps/chosen": f"solid {BLUE}", "logps/rejected": f"dashed {VERMILLION}"},
    }  # fmt: skip
    for panel, looks in expected.items():
        drawn = curves(svg, panel)
        all_values, all_heights = [], []
        for field, look in looks.items():
            as_logged = look if "points" in look else f"pale {look[-7:]}"
            assert look in dict(drawn), field  # smoothed, or points
            all_values += [line[field] for line in lines if field in line]
            all_heights += dict(drawn)[as_logged]
        assert correlation(all_values, all_heights) == pytest.approx(-1)  # one scale for all curves of the panel


def test_long_curves_are_smoothed(tmp_path):
    noise = [1.0, -1.0, -1.0, 1.0] * 25
    svg = draw(tmp_path, write_run(tmp_path / "long", [{"step": i, "loss": 5 + x} for i, x in enumerate(noise)]))
    (_, logged), (_, smoothed) = curves(svg, LOSS)
    assert correlation(noise, logged) == pytest.approx(-1)
    assert smoothed[0] == logged[0]  # no mixture with zero
    assert stdev(smoothed[50:]) < stdev(logged) / 2
    assert fmean(smoothed[50:]) == pytest.approx(fmean(logged), rel=0.02)
    svg = draw(tmp_path, write_run(tmp_path / "short", [{"step": i, "loss": 5 + x} for i, x in enumerate(noise[:9])]))
    ((look, logged),) = curves(svg, LOSS)
    assert look == f"solid {BLUE}" and correlation(noise[:9], logged) == pytest.approx(-1)


@pytest.mark.parametrize(("start", "label"), [(1.0, "start 1.0000"), (0.6931472, "ln 2"), (None, "ln 2")])
def test_a_line_where_dpo_starts(tmp_path, start, label):
    lines = dpo_lines(start=start or LN_2)
    if start:
        lines.insert(0, {"event": "start", "loss_at_start": start})
    svg = draw(tmp_path, write_run(tmp_path / "run", lines))
    assert f">{label}<" in svg and ">chance<" in svg
    for panel in (LOSS, ACCURACY):
        drawn = dict(curves(svg, panel))
        assert drawn[f"solid {GREY}"] == pytest.approx([drawn[f"points {VERMILLION}"][0]] * 2, abs=0.001)


def test_no_line_where_the_starts_differ_or_nothing_starts(tmp_path):
    sigmoid = write_run(tmp_path / "sigmoid", dpo_lines())
    hinge = write_run(tmp_path / "hinge", [{"event": "start", "loss_at_start": 1.0}, *dpo_lines(start=1.0)])
    sft = write_run(tmp_path / "sft", [{"step": step, "loss": 2.0 - step / 100} for step in range(1, 40)])
    svg = draw(tmp_path, sigmoid, hinge)
    assert ">ln 2<" not in svg and ">start" not in svg and ">chance<" in svg
    assert ">start 1.0000<" in draw(tmp_path, hinge, sft)
    svg = draw(tmp_path, sft)
    assert svg.count("not logged<") == 3
    assert ">ln 2<" not in svg and ">chance<" not in svg and ">held-out<" not in svg


def test_several_runs_in_one_picture(tmp_path, capsys):
    names = ("beta_$1$", "_beta02", "b&<3>")
    folders = [write_run(tmp_path / name, dpo_lines(steps)) for name, steps in zip(names, (60, 120, 130), strict=True)]
    svg = draw(tmp_path, *folders)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and all(f"{name}, " in printed for name in names)
    words = ("beta_$1$", "_beta02", "b&amp;&lt;3&gt;", "ln 2", "chance", "training", "held-out", "margin", "chosen",
             "rejected")  # fmt: skip
    assert [word for word in words if f">{word}<" not in svg] == []
    looks = [look for look, _ in curves(svg, REWARDS)]
    for color in (BLUE, VERMILLION, GREEN):
        assert {f"dotted {color}", f"solid {color}", f"dashed {color}"} <= set(looks)
    assert len(looks) == 3 + 6 + 6  # too short to smooth; pale and smoothed
    assert BLUE not in svg[svg.index('id="legend_1"') : svg.index('id="axes_2"')]  # "training" is no run

    again = write_run(tmp_path / "elsewhere" / "b&<3>", dpo_lines())
    svg = draw(tmp_path, folders[2], again)
    assert all(f">{path}<".replace("b&<3>", "b&amp;&lt;3&gt;") in svg for path in (folders[2], again))


def test_other_formats_and_default_places(tmp_path, monkeypatch):
    one, two = (write_run(tmp_path / name, [{"step": 1, "loss": 0.6}]) for name in ("one", "two"))
    plot_runs([read_run(one)], one / "loss.png")
    assert imread(one / "loss.png").shape[:2] == (1200, 1600)
    assert main([str(one), "--output", str(tmp_path / "one.PDF")]) == 0
    assert (tmp_path / "one.PDF").read_bytes().startswith(b"%PDF")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main([str(one), str(two)]) == 0
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
    assert main([str(run), "--output", str(tmp_path / "picture.pdf")]) == 0
    assert b"+SimHei" in (tmp_path / "picture.pdf").read_bytes()
    assert capsys.readouterr().err == "" and caplog.messages == []


# ---- refusals


def test_refusals_are_one_line_and_no_traceback(tmp_path, capsys, monkeypatch):
    run = str(write_run(tmp_path / "run", dpo_lines()))
    contents = {"empty.jsonl": b"\n", "picture.jsonl": b"\x89PNG\r\n\0\xff\n", "list.json": b"[1, 2]",
                "other.jsonl": b'{"prompt": "x"}\n{"prompt": "y"}\n', "state.json": b'{"log_history": 5}',
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
        ([run, "--output", "nowhere/loss.png"], "nowhere/loss.png: cannot be written (No such file or directory)"),
        ([run, "--output", "folder.png"], "folder.png: cannot be written (Is a directory)"),
    ]
    monkeypatch.chdir(tmp_path)
    for arguments, reason in cases:
        assert main(arguments) == 2, arguments
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("plot_loss.py: ") and printed.err.count("\n") == 1, printed.err
        assert reason in printed.err


def test_existing_picture_survives_a_failure(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 0.6}])
    (run / "loss.png").write_bytes(b"the old picture")

    def full_disk(self, path, **options):
        Path(path).write_bytes(b"half a pict")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    assert main([str(run)]) == 2
    assert capsys.readouterr().err == f"plot_loss.py: {run}/loss.png: cannot be written (No space left on device)\n"
    assert (run / "loss.png").read_bytes() == b"the old picture"
    assert sorted(path.name for path in run.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_as_a_user_sees_it(tmp_path):
    """A folder's name that is no UTF-8, an ASCII terminal, a backend for windows without a display: all no matter."""
    name = os.fsdecode("学率".encode("gbk"))
    write_run(tmp_path / name, dpo_lines())
    script = Path(__file__).parent.parent / "plot_loss.py"
    env = {**os.environ, "MPLBACKEND": "TkAgg", "DISPLAY": "", "PYTHONIOENCODING": "ascii"}
    for argument, status in ((name, 0), ("missing", 2)):
        command = [sys.executable, script, argument]
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert result.returncode == status
        printed, other = (result.stderr, result.stdout) if status else (result.stdout, result.stderr)
        assert printed.count("\n") == 1 and other == ""
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["loss.png", "metrics.jsonl"]
