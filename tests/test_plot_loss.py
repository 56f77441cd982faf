"""plot_loss.py: what it reads, what it refuses and how, and what is in the picture."""

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import plot_loss  # noqa: E402


def line(step, loss, **more):
    return {"step": step, "epoch": step / 100, "loss": loss, "rewards/accuracies": 0.5 + step / 500,
            "rewards/chosen": -0.1, "rewards/rejected": -0.1 - step / 50, "rewards/margins": step / 50,
            "logps/chosen": -200.0, "logps/rejected": -210.0 - step, **more}  # fmt: skip


def dpo_lines(steps=120, slope=0.002, resumed=None):
    lines = [line(step, 0.6931 - slope * step) for step in range(10, steps + 1, 10)]
    lines.insert(0, {"step": 0, "epoch": 0.0, "eval_loss": 0.6931, "eval_rewards/accuracies": 0.5})
    lines.append({"step": steps, "epoch": steps / 100, "eval_loss": 0.45, "eval_rewards/accuracies": 0.875})
    if resumed:
        lines.insert(resumed // 10 + 1, {"step": resumed, "event": "resumed"})
    return lines


def write_run(folder, lines, name="metrics.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return folder


def run_as_user(*arguments, cwd, env=None):
    command = [sys.executable, ROOT / "plot_loss.py", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def no_warnings():
    """matplotlib warns about glyphs that a font lacks, legends without entries, layouts that failed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---- reading


def test_reads_metrics_by_folder_and_by_file(tmp_path):
    write_run(tmp_path / "run", [line(10, 0.69, note="text", flag=True), {"step": 20, "epoch": 0.2, "eval_loss": 0.6}])
    for path in (tmp_path / "run", tmp_path / "run" / "metrics.jsonl"):
        run = plot_loss.read_run(path)
        assert run.name == "run"
        assert run.series["loss"] == ([10], [0.69])
        assert run.series["eval_loss"] == ([20], [0.6])
        assert run.series["epoch"] == ([10, 20], [0.1, 0.2])
        assert "note" not in run.series and "flag" not in run.series


def test_values_that_cannot_be_drawn_are_skipped(tmp_path, capsys):
    lines = ['{"step": 1, "loss": NaN}', '{"step": 2, "loss": null}', '{"step": 4, "loss": "0.4"}', '{"loss": 9}', "",
             '{"step": 3, "loss": 0.5, "rewards/margins": Infinity}', '{"step": null, "loss": 9}',
             '{"step": 5.0, "loss": 0.3}\r']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    run = plot_loss.read_run(tmp_path)
    assert run.series["loss"] == ([3, 5], [0.5, 0.3])
    assert "rewards/margins" not in run.series
    assert capsys.readouterr().err == ""  # nor is a blank line worth a warning


@pytest.mark.parametrize("rest", [b'{"step": 20, "lo', '{"step": 20, "note": "半'.encode()[:-1], b"\0\0\0\0"])
def test_half_written_last_line_does_no_harm(tmp_path, capsys, rest):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 10, "loss": 0.6}\n' + rest)
    assert plot_loss.read_run(tmp_path).series["loss"] == ([10], [0.6])
    assert capsys.readouterr().err == ""


def test_broken_middle_line_is_skipped_with_one_warning(tmp_path, capsys):
    log = tmp_path / "metrics.jsonl"
    good = [b'{"step": 10, "loss": 0.6}', b'{"step": 30, "loss": 0.5}', b'{"step": 40, "loss": 0.4}']
    log.write_bytes(b"\n".join([good[0], b'{"step": 20, "l', good[1], b"[1]", good[2], b""]))
    assert plot_loss.read_run(tmp_path).series["loss"] == ([10, 30, 40], [0.6, 0.5, 0.4])
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert f"{log}, line 2 (and 1 more)" in warning


def test_step_logged_twice_counts_the_last_time(tmp_path):
    lines = [{"step": s, "loss": 1.0} for s in (10, 20, 30, 40, 55)] + [{"step": s, "loss": 0.5} for s in (30, 40, 50)]
    run = plot_loss.read_run(write_run(tmp_path, lines))
    assert run.series["loss"] == ([10, 20, 30, 40, 50], [1.0, 1.0, 0.5, 0.5, 0.5])  # 55: of the run that crashed


def test_resume_drops_what_was_logged_after_the_checkpoint(tmp_path):
    lines = [{"step": s, "loss": 1.0, "eval_loss": 2.0} for s in (10, 20, 25, 30, 35)]
    lines += [{"step": 20, "event": "resumed", "loss": None}, {"step": 30, "loss": 0.5}]
    run = plot_loss.read_run(write_run(tmp_path, lines))
    assert run.series["loss"] == ([10, 20, 30], [1.0, 1.0, 0.5])
    assert run.series["eval_loss"] == ([10, 20], [2.0, 2.0])
    assert run.resumed == [20]


def test_trainer_state_of_the_newest_checkpoint(tmp_path):
    for n in (90, 100, 20):  # as text, "90" and "20" would come after "100"
        history = [{"step": n, "loss": float(n)}, {"step": n, "eval_loss": 0.5}, {"step": n, "train_loss": 7.0}]
        folder = write_run(tmp_path / "hf" / f"checkpoint-{n}", [])
        (folder / "metrics.jsonl").unlink()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": n, "log_history": history}, indent=2))
    (tmp_path / "hf" / "checkpoint-best").mkdir()
    for path in (tmp_path / "hf", tmp_path / "hf" / "checkpoint-100" / "trainer_state.json"):
        run = plot_loss.read_run(path)
        assert run.name == "hf"
        assert run.series["loss"] == ([100], [100.0])
        assert run.series["eval_loss"] == ([100], [0.5])
    (tmp_path / "hf" / "trainer_state.json").write_text('{"log_history": [{"step": 120, "loss": 0.25}]}')
    assert plot_loss.read_run(tmp_path / "hf").series["loss"] == ([120], [0.25])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/beta01/output", "a/beta02/output"], ["beta01", "beta02"]),
        (["a/x", "b/x", "c/y"], ["a/x", "b/x", "y"]),
        (["a", "a", "b"], ["a", "b"]),
    ],
)
def test_names_are_the_shortest_parts_that_differ(tmp_path, paths, names):
    folders = [write_run(tmp_path / path, [line(10, 0.6)]) for path in paths]
    assert [run.name for run in plot_loss.read_runs(folders)] == names


def test_names_of_two_logs_in_one_folder(tmp_path):
    write_run(tmp_path, [line(10, 0.6)])
    write_run(tmp_path, [line(10, 0.5)], name="older.jsonl")
    runs = plot_loss.read_runs([tmp_path, tmp_path / "older.jsonl"])
    assert [run.name for run in runs] == ["metrics.jsonl", "older.jsonl"]


# ---- computing


def test_smooth_against_numbers_computed_by_hand():
    # One time constant of ln 2 halves a weight every 1/ln 2 steps: with time_constant = 1/ln 2, every step
    halving = 1 / math.log(2)
    assert plot_loss.smooth([1, 2, 3], [4.0, 1.0, 7.0], halving) == pytest.approx(
        [4.0, (0.5 * 4 + 1) / 1.5, (0.25 * 4 + 0.5 * 1 + 7) / 1.75]
    )
    # Two steps between the values: a quarter. Weights count steps, not lines of the log
    assert plot_loss.smooth([10, 12], [4.0, 1.0], halving) == pytest.approx([4.0, (0.25 * 4 + 1) / 1.25])
    assert plot_loss.smooth([5, 6, 900], [3.0] * 3, 7.0) == pytest.approx([3.0] * 3)
    assert plot_loss.smooth([], [], 7.0) == []


def test_time_constant_grows_with_the_run_and_covers_two_intervals():
    assert plot_loss.default_time_constant(list(range(0, 1001, 10))) == pytest.approx(30)
    assert plot_loss.default_time_constant(list(range(0, 101, 10))) == pytest.approx(20)


def test_epoch_boundaries_are_interpolated_and_leave_out_the_end():
    assert plot_loss.epoch_boundaries([10, 20, 30, 40], [0.5, 1.5, 2.5, 3.0]) == pytest.approx([15, 25])
    assert plot_loss.epoch_boundaries([10, 20, 30, 40], [0, 0, 1, 1]) == [30]
    assert len(plot_loss.epoch_boundaries([1, 2, 3], [0.5, 1e300, 1e300])) < 4  # nonsense, but it ends
    assert plot_loss.epoch_boundaries([], []) == []


# ---- the picture


def read_png(path):
    from matplotlib.image import imread

    return imread(path)


def test_png_has_its_size_and_curves_in_every_panel(tmp_path, capsys):
    run = write_run(tmp_path / "run", dpo_lines(resumed=60))
    assert plot_loss.main([str(run)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out == (
        f"{run}/loss.png: 120 steps, loss 0.6731 -> 0.4531, held-out 0.4500, accuracy 0.74, held-out accuracy 0.88\n"
    )
    assert sorted(path.name for path in run.iterdir()) == ["loss.png", "metrics.jsonl"]  # no temporary file left
    pixels = read_png(run / "loss.png")
    assert pixels.shape[:2] == (1200, 1600)
    blue = (abs(pixels[..., :3] - [0, 0x72 / 255, 0xB2 / 255]) < 0.02).all(axis=-1)
    # above and below the titles and legends in the middle; chosen, or the only curve, is blue
    for rows in (slice(0, 550), slice(615, 1100)):
        for columns in (slice(0, 800), slice(800, 1600)):
            assert blue[rows, columns].sum() > 300


def test_several_runs_in_an_svg(tmp_path, capsys):
    folders = [
        write_run(tmp_path / name / "out", dpo_lines(slope=slope, resumed=resumed))
        for name, slope, resumed in (("beta_$1$", 0.001, 60), ("_beta02", 0.002, None), ("b&<3>", 0.0025, None))
    ]
    picture = tmp_path / "compare.SVG"
    assert plot_loss.main([*map(str, folders), "--output", str(picture)]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    svg = picture.read_text(encoding="utf-8")
    words = ("beta_$1$", "_beta02", "b&amp;&lt;3&gt;", "ln 2", "chance", "step", "chosen", "rejected", "margin",
             "held-out", "smoothed", "as logged", "resumed", "epoch")  # fmt: skip
    assert [word for word in words if f">{word}<" not in svg] == []
    assert "not logged" not in svg
    for color in plot_loss.RUN_COLORS[:3]:
        assert color.lower() in svg
    assert plot_loss.RUN_COLORS[3].lower() not in svg
    plot_loss.plot_runs(plot_loss.read_runs(folders), tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text(encoding="utf-8") == svg  # same data, same file


def test_log_with_only_a_loss_leaves_the_other_panels(tmp_path, capsys):
    run = write_run(tmp_path, [{"step": s, "loss": 2.0 - s / 100} for s in range(1, 5)])  # too short to smooth
    assert plot_loss.main([str(run), "--output", str(tmp_path / "sft.svg")]) == 0
    assert capsys.readouterr().err == ""
    svg = (tmp_path / "sft.svg").read_text()
    assert svg.count(">not logged<") == 3
    assert ">smoothed<" not in svg
    assert ">ln 2<" not in svg  # means nothing to an SFT loss


def test_pdf_and_default_place_for_several_runs(tmp_path, monkeypatch):
    folders = [write_run(tmp_path / name, [line(1, 0.6)]) for name in "ab"]
    assert plot_loss.main([str(folders[0]), "--output", str(tmp_path / "one.pdf")]) == 0
    assert (tmp_path / "one.pdf").read_bytes().startswith(b"%PDF")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert plot_loss.main(list(map(str, folders))) == 0
    assert Path("loss.png").is_file() and not (folders[0] / "loss.png").exists()


def test_chinese_names_are_drawn_or_escaped(tmp_path, capsys, monkeypatch):
    from matplotlib import font_manager

    folders = [write_run(tmp_path / name, [line(1, 0.6)]) for name in ("学习率", "b\t2")]
    picture = tmp_path / "chinese.svg"
    command = [*map(str, folders), "--output", str(picture)]
    assert plot_loss.main(command) == 0  # whatever fonts this machine has: no glyph warning
    fonts = [font for font in font_manager.fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    capsys.readouterr()
    assert plot_loss.main(command) == 0
    note = capsys.readouterr().err
    assert note.startswith("note: no installed font") and note.count("\n") == 1
    svg = picture.read_text(encoding="utf-8")
    assert r"\u5b66\u4e60\u7387" in svg and r"b\t2" in svg and "学习率" not in svg


def test_a_font_that_has_the_characters_is_found(tmp_path, capsys):
    # U+1D81 is in STIX, which comes with matplotlib, and not in DejaVu Sans: as 学 is in a Chinese font
    run = write_run(tmp_path / "\u1d81\t", [line(1, 0.6)])
    assert plot_loss.main([str(run), "--output", str(tmp_path / "x.svg")]) == 0
    assert capsys.readouterr().err == ""
    assert ">\u1d81\\t<" in (tmp_path / "x.svg").read_text(encoding="utf-8")


# ---- refusals


def test_refusals_are_one_line_and_no_traceback(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run", dpo_lines())
    (tmp_path / "empty").mkdir()
    for name, content in {"empty.jsonl": b"\n", "picture.jsonl": b"\x89PNG\r\n\0\xff", "list.json": b"[1, 2]",
                          "other.jsonl": b'{"prompt": "x"}\n{"prompt": "y"}\n', "state.json": b'{"log_history": null}',
                          "young.jsonl": b'{"step": 0, "event": "resumed"}\n'}.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    cases = [
        (["missing"], "no such file or folder"),
        (["empty"], "neither metrics.jsonl nor trainer_state.json"),
        (["empty.jsonl"], "empty; expected"),
        (["picture.jsonl"], "not a training log"),
        (["list.json"], "not a training log"),
        (["other.jsonl"], "not a training log"),
        (["state.json"], "not a training log"),
        (["young.jsonl"], "nothing to draw yet"),
        ([str(run), "missing"], "missing: no such file"),
        (["x" * 300], "too long"),
        ([str(run), "--output", "loss.jpg"], ".png, .svg, .pdf"),
        ([str(run), "--output", "loss"], ".png, .svg, .pdf"),
        ([str(run), "--output", "nowhere/loss.png"], "no folder nowhere"),
        ([str(run), "--output", "folder.png"], "it is a folder"),
    ]
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    for arguments, reason in cases:
        assert plot_loss.main(arguments) == 2, arguments
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("plot_loss.py: ") and printed.err.count("\n") == 1, arguments
        assert reason in printed.err


def test_refusal_as_a_user_sees_it(tmp_path):
    result = run_as_user("missing/run", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "plot_loss.py: missing/run: no such file or folder; give a run's output folder, "
        "or its metrics.jsonl or trainer_state.json\n"
    )


def test_existing_picture_survives_a_failure(tmp_path, capsys, monkeypatch):
    from matplotlib.figure import Figure

    run = write_run(tmp_path / "run", [line(1, 0.6)])
    (run / "loss.png").write_bytes(b"the old picture")

    def full_disk(self, path, **options):
        Path(path).write_bytes(b"half a pict")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    assert plot_loss.main([str(run)]) == 2
    assert capsys.readouterr().err == f"plot_loss.py: {run}/loss.png: cannot be written (No space left on device)\n"
    assert (run / "loss.png").read_bytes() == b"the old picture"
    assert sorted(path.name for path in run.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_success_as_a_user_sees_it(tmp_path):
    write_run(tmp_path / "output", dpo_lines())
    # A backend with windows, and no display: neither may matter
    result = run_as_user("output", cwd=tmp_path, env={**os.environ, "MPLBACKEND": "TkAgg", "DISPLAY": ""})
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("output/loss.png: 120 steps, loss 0.6731 -> 0.4531, ")
    assert (tmp_path / "output" / "loss.png").is_file()
