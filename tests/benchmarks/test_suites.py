"""Comparisons that are commands of their own: what they run, keep and show."""

import csv
import math

import pytest

from benchmarks import suites
from benchmarks.cli import main
from benchmarks.data import DataError
from benchmarks.suites import SUITES, Part, _profile


def test_classical(tmp_path, monkeypatch, capsys):
    (deterministic, regression) = SUITES["classical"].parts
    monkeypatch.setattr(suites, "_QUICK_PROBLEMS", 1)
    results = tmp_path / "RESULTS.md"
    command = ["compare", "classical", "--quick", "--out", str(tmp_path)]
    assert main([*command, "--write-results", str(results)]) == 0
    text = results.read_text()
    assert "<!-- compare classical: begin -->" in text
    assert "| rosenbrock-2 | scipy-l-bfgs-b | yes |" in text
    assert "| rosenbrock | optimistix | " in text
    with (tmp_path / "deterministic-quick.csv").open() as file:
        assert {row["problem"] for row in csv.DictReader(file)} == {"rosenbrock-2"}
    for name in ("deterministic-quick", "regression-quick"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(deterministic.command, "run", None)
    monkeypatch.setattr(regression.command, "run", None)
    assert main(command) == 0  # all on file


def test_saddles_show_the_best_settings(tmp_path, monkeypatch):
    (part,) = SUITES["saddles"].parts
    monkeypatch.setattr(suites, "_QUICK_PROBLEMS", 1)
    run = part.command.run

    def run_two_methods(args):
        args.methods = "sgd,adam"
        return run(args)

    monkeypatch.setattr(part.command, "run", run_two_methods)
    assert main(["compare", "saddles", "--quick", "--out", str(tmp_path)]) == 0
    rows = (tmp_path / "saddles.md").read_text().count(f"| {part.problems[0]} |")
    assert rows == 2


def test_problems_that_cannot_be_run_are_named(tmp_path, monkeypatch):
    def fail(args):
        raise DataError("no file")

    for part in SUITES["classical"].parts:
        monkeypatch.setattr(part.command, "run", fail)
    assert main(["compare", "classical", "--quick", "--out", str(tmp_path)]) == 0
    assert "* rosenbrock-2 not run: no file" in (tmp_path / "classical.md").read_text()


def test_profile():
    """Work 10 and 20 on one problem, 30 and unsolved on the other."""
    part = Part(suites.deterministic, (), (), work="w", solved="ok")
    work = {("a", "p"): 10, ("b", "p"): 20, ("a", "q"): 99, ("b", "q"): 30}
    records = [
        {"method": method, "problem": problem, "w": spent, "ok": spent < 99}
        for (method, problem), spent in work.items()
    ]
    a, b = _profile(part, records)
    assert (a.positions, a.losses) == ([1.0], [0.5])
    assert (b.positions, b.losses) == ([1.0, 2.0], [0.5, 1.0])
    assert not any(map(math.isinf, (*a.positions, *b.positions)))


def test_help_lists_all_comparisons(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*SUITES, "autoencoders", "hessian-free-autoencoder"))
