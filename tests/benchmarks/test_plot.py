"""The command ``plot``: runs from records, their labels, and the plot."""

import json

import pytest

from benchmarks.cli import main
from benchmarks.plot import label_runs
from benchmarks.run_records import axes, read_runs


def write(path, method, settings, count=2, **header):
    with path.open("a") as file:
        for number in range(1, count + 1):
            record = {
                "problem": "p", "method": method, "epoch": number, "step": 5 * number,
                "gradients": 7.5 * number, "seconds": 0.1 * number, "train_loss": 1 / number,
                "test_loss": 2 / number, "diverged": False,
            }  # fmt: skip
            if number == 1:
                record |= {"settings": settings, "batch_size": 10, "seed": 0, **header}
            print(json.dumps(record), file=file)


def test_plot(tmp_path, capsys):
    write(tmp_path / "a.jsonl", "bhf", {"damping": 1}, curvature_batch_size=100)
    write(tmp_path / "a.jsonl", "bhf", {"damping": 1}, curvature_batch_size=500)
    write(tmp_path / "b.jsonl", "adam", {"learning_rate": 0.1})
    runs = [run for name in "ab" for run in read_runs(tmp_path / f"{name}.jsonl")]
    labels = ["bhf curvature_batch_size=100", "bhf curvature_batch_size=500", "adam"]
    assert label_runs(runs) == labels
    assert runs[1].line("gradients", "x").positions == [7.5, 15.0]
    plot = tmp_path / "new" / "plot.png"
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert main(["plot", "--runs", *files, "--png", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "adam" in capsys.readouterr().out


def test_a_column_per_problem(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", "bhf", {"damping": 1}, initial_train_loss=9.0)
    write(tmp_path / "a.jsonl", "adam", {}, cpu_seconds=1.0)
    drawn = []
    monkeypatch.setattr("benchmarks.plot.save_headline", lambda *figure: drawn.append(figure))
    files = [str(tmp_path / "a.jsonl"), "--title", "t", "--png", str(tmp_path / "a.png")]
    assert main(["plot", "--columns", "--runs", *files]) == 0
    ((_, title, (panel,)),) = drawn
    assert (title, panel.title) == ("t", "p")
    assert [(curve.label, curve.is_dashed) for curve in panel.curves] == [
        ("bhf", False),
        ("adam", True),
    ]
    assert panel.curves[0].work == [7.5, 15.0]
    assert panel.curves[1].seconds == [1.0, 0.2]


def test_time_of_the_processor_is_taken_where_all_runs_have_it(tmp_path):
    write(tmp_path / "old.jsonl", "sgd", {})
    write(tmp_path / "new.jsonl", "adam", {}, cpu_seconds=1.0)
    (old,), (new,) = read_runs(tmp_path / "old.jsonl"), read_runs(tmp_path / "new.jsonl")
    assert list(axes([new])) == ["step", "gradients", "cpu_seconds"]
    assert list(axes([new, old])) == ["step", "gradients", "seconds"]


def test_losses_that_are_not_finite_are_left_out(tmp_path):
    write(tmp_path / "a.jsonl", "sgd", {})
    with (tmp_path / "a.jsonl").open("a") as file:
        print(json.dumps({"step": 15, "gradients": 15, "train_loss": None}), file=file)
    (run,) = read_runs(tmp_path / "a.jsonl")
    assert run.line("step", "x").positions == [5, 10]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "not a file of records"),
        ("", "no records of training"),
        ('{"method": "adam"}', "no records of training"),
        ('{"step": 1, "gradients": 1, "train_loss": 1}', "does not begin with the first"),
    ],
)
def test_files_that_cannot_be_compared(tmp_path, content, message, capsys):
    (tmp_path / "x.jsonl").write_text(content)
    assert main(["plot", "--runs", str(tmp_path / "x.jsonl")]) == 2
    assert message in capsys.readouterr().err
