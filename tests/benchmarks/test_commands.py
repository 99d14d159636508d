"""The command line, end to end on the digits."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import cost, demo, sensitivity
from benchmarks.cli import main
from benchmarks.functions import FUNCTIONS
from benchmarks.problems import PROBLEMS
from benchmarks.saddle_points import SADDLES
from benchmarks.scipy_peers import PEERS
from benchmarks.solvers import SOLVERS

TINY = ["--train-size", "200", "--test-size", "50"]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_writes_a_record_per_epoch(tmp_path):
    file = tmp_path / "new" / "runs.jsonl"
    command = ["train", "--problem", "digits-cnn", "--method", "adam", "--epochs", "2", *TINY]
    assert main([*command, "--set", "learning_rate=0.002", "b1=0.8", "--json", str(file)]) == 0
    first, second = read(file)
    for record in (first, second):
        assert record["problem"] == "digits-cnn"
        assert record["method"] == "adam"
        assert {
            "step",
            "seconds",
            "cpu_seconds",
            "train_loss",
            "test_loss",
            "test_accuracy",
        } <= set(record)
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert first["settings"] == {"learning_rate": 0.002, "b1": 0.8, "weight_decay": 1e-5}
    assert {"jax", "python", "device"} <= set(first["versions"])
    assert first["compile_seconds"] > 0
    assert "settings" not in second


def test_train_reports_divergence(tmp_path, capsys):
    file = tmp_path / "runs.jsonl"
    command = ["train", "--problem", "digits-autoencoder", "--method", "sgd", "--epochs", "30"]
    assert main([*command, *TINY, "--set", "learning_rate=1e6", "--json", str(file)]) == 1
    assert read(file)[-1]["diverged"] is True
    assert read(file)[-1]["train_loss"] is None
    assert "not finite" in capsys.readouterr().out


def test_unknown_setting(capsys):
    command = ["train", "--problem", "digits-cnn", "--method", "adam"]
    assert main([*command, "--set", "rate=3"]) == 2
    assert "adam has no setting rate. It has: b1, b2" in capsys.readouterr().err


def test_missing_data(tmp_path, capsys):
    command = ["train", "--problem", "mnist-lenet5", "--method", "adam"]
    assert main([*command, "--data-dir", str(tmp_path)]) == 2
    assert "DIR/mnist/train-images-idx3-ubyte.gz" in capsys.readouterr().err


def test_cost_writes_a_record_per_method(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "_COMPILATIONS", 1)
    file = tmp_path / "cost.jsonl"
    methods = "sgd,adam:b1=0.5"
    command = ["cost", "--problem", "digits-autoencoder", "--methods", methods, *TINY]
    assert main([*command, "--repeats", "2", "--json", str(file)]) == 0
    sgd, adam = read(file)
    assert (sgd["method"], adam["method"], adam["label"]) == ("sgd", "adam", "adam:b1=0.5")
    for record in (sgd, adam):
        assert record["step_over_gradient"] > 0
        assert record["step_over_adam"] > 0
        assert record["compile_seconds"] > 0
        assert record["compile_over_adam"] > 0
        assert 1 <= record["flops_over_gradient"] < 1.1
    parameters = 34_764
    assert sgd["state_elements"] == parameters + 1  # moving average, count
    assert adam["state_bytes"] == 4 * (2 * parameters + 1)
    assert adam["state_over_params"] == pytest.approx(2, abs=1e-3)


@pytest.mark.parametrize(
    ("methods", "message"), [("nadam", "no method 'nadam'"), ("sgd:x=1", "sgd has no setting x")]
)
def test_cost_of_what_does_not_exist(methods, message, capsys):
    assert main(["cost", "--problem", "digits-cnn", "--methods", methods]) == 2
    assert message in capsys.readouterr().err


def test_tune_ranks_the_grid(tmp_path, capsys):
    file = tmp_path / "tune.jsonl"
    command = ["tune", "--problem", "digits-autoencoder", "--method", "sgd", "--epochs", "2"]
    grid = ["--grid", "learning_rate=1e6,0.01,0.3"]
    assert main([*command, *TINY, *grid, "--json", str(file)]) == 0
    rates = [record["settings"]["learning_rate"] for record in read(file)]
    assert rates == [1e6, 0.01, 0.3]
    table = capsys.readouterr().out.split("sgd on digits-autoencoder")[1]
    order = [table.index(f"learning_rate={rate}") for rate in ("0.3", "0.01", "1000000.0")]
    assert order == sorted(order)
    assert "diverged" in table


def test_tune_varies_the_batch_size(tmp_path):
    file = tmp_path / "tune.jsonl"
    command = ["tune", "--problem", "digits-autoencoder", "--method", "sgd", "--epochs", "1"]
    assert main([*command, *TINY, "--grid", "batch_size=20,50", "--json", str(file)]) == 0
    assert [record["batch_size"] for record in read(file)] == [20, 50]
    assert [record["gradients"] for record in read(file)] == [10, 4]


def test_sensitivity_plots_and_writes_every_epoch(tmp_path, capsys):
    file, plot = tmp_path / "s.jsonl", tmp_path / "new" / "s.png"
    command = ["sensitivity", "--problem", "digits-autoencoder", "--method", "sgd", *TINY]
    options = ["--epochs", "2", "--json", str(file), "--png", str(plot)]
    assert main([*command, *options, "--vary", "momentum=0.5,0.9"]) == 0
    records = read(file)
    assert [record["vary"]["momentum"] for record in records] == [0.5, 0.5, 0.9, 0.9]
    assert [record["gradients"] for record in records] == [2, 4, 2, 4]
    assert [record["settings"]["momentum"] for record in records[::2]] == [0.5, 0.9]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "momentum=0.9" in capsys.readouterr().out


def test_sensitivity_to_the_batch_size(monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(
        sensitivity, "save_lines", lambda path, title, label, lines: shown.append((label, lines))
    )
    command = ["sensitivity", "--problem", "digits-autoencoder", "--method", "sgd", *TINY]
    options = ["--epochs", "2", "--png", str(tmp_path / "s.png")]
    assert main([*command, *options, "--vary", "batch_size=20,100"]) == 0
    ((label, lines),) = shown
    assert "passes over the training samples" in label
    assert [line.label for line in lines] == ["batch_size=20", "batch_size=100"]
    assert [list(line.positions) for line in lines] == [pytest.approx([0, 1, 2])] * 2


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("momentum=0.5,0.5", "repeats a value"),
        ("batch_size=1.5", "batch_size must be a whole number"),
        ("x=1", "sgd has no setting x"),
    ],
)
def test_sensitivity_to_what_cannot_be(vary, message, capsys):
    command = ["sensitivity", "--problem", "digits-autoencoder", "--method", "sgd"]
    assert main([*command, "--vary", vary]) == 2
    assert message in capsys.readouterr().err


def test_deterministic(tmp_path, data_folder, capsys):
    file = tmp_path / "det.jsonl"
    methods = "lbfgs,lbfgs:memory_size=2,scipy-l-bfgs-b,scipy-trust-krylov"
    command = ["deterministic", "--problems", "beale,a9a", "--methods", methods]
    assert main([*command, "--data-dir", str(data_folder), "--json", str(file)]) == 0
    records = read(file)
    assert [record["problem"] for record in records] == ["beale"] * 4 + ["a9a"] * 4
    assert records[1]["settings"] == {"memory_size": 2}
    for record in records:
        assert record["reached"] is True
        assert record["gradient_norm"] <= 1e-5
        assert record["gradients"] > 1
        assert record["tolerance"] == 1e-5
        assert (record["products"] > 0) == (record["method"] == "scipy-trust-krylov")
        assert "jax" in record["versions"]
    assert len({round(record["value"], 8) for record in records}) == 2
    assert "Beale, 2 variables" in capsys.readouterr().out
    assert jnp.zeros(()).dtype == jnp.float32


def test_deterministic_takes_what_there_is_by_default(tmp_path):
    file = tmp_path / "det.jsonl"
    command = ["deterministic", "--problems", "beale", "--max-gradients", "3"]
    assert main([*command, "--json", str(file)]) == 0
    methods = [record["method"] for record in read(file)]
    assert methods[-4:] == ["lbfgs", *PEERS]
    assert not any(record["reached"] for record in read(file))


def test_saddles(tmp_path, capsys):
    file = tmp_path / "saddles.jsonl"
    problems = "double-well-0,double-well-1-near,factorization-0-near"
    command = ["saddles", "--problems", problems, "--methods", "adam,sgd:learning_rate=0.1"]
    assert main([*command, "--max-gradients", "200", "--json", str(file)]) == 0
    records = read(file)
    assert len(records) == 3 * (4 + 1)  # Adam with four rates, SGD with the one that was given.
    assert sum(record["is_best"] for record in records) == 3 * 2
    best = {(r["problem"], r["method"]): r for r in records if r["is_best"]}
    for method in ("adam", "sgd"):
        stays, leaves = best["double-well-0", method], best["double-well-1-near", method]
        assert stays["gradients_to_reach"] is None
        assert stays["final_value"] == stays["start_value"] == 0
        assert leaves["final_value"] < leaves["minimum"] + 2e-3
        assert 10 < leaves["gradients_to_reach"] <= 200
        assert leaves["gradients"] == 200
    assert "learning_rate=0.1" in capsys.readouterr().out


def test_saddles_from_which_the_method_diverges(tmp_path, capsys):
    file = tmp_path / "saddles.jsonl"
    command = ["saddles", "--problems", "monkey-0-near,double-well-1-near"]
    assert main([*command, "--methods", "sgd:learning_rate=1e9", "--json", str(file)]) == 0
    assert all(record["diverged"] for record in read(file))
    assert "diverged" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["deterministic", "saddles"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--problems", "sphere"], "no problem sphere; there are: "),
        (["--methods", "newton"], "no method 'newton'; there are: lsr1, lrsfn, sfn, lbfgs, adam"),
        (["--methods", "lbfgs:x=1"], "lbfgs has no setting x"),
        (["--max-gradients", "0"], "must be positive"),
    ],
)
def test_minimizing_what_does_not_exist(command, option, message, capsys):
    assert main([command, *option]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "names"),
    [("deterministic", [*FUNCTIONS, *SOLVERS, *PEERS]), ("saddles", [*SADDLES, *SOLVERS])],
)
def test_help_lists_what_the_command_has(command, names, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    assert "mnist" not in shown


def test_help_lists_problems_and_methods(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*PROBLEMS, "adam", "kbfgs"))
    assert "generated, not the papers' files" in shown


def test_demo_without_methods_of_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_methods", lambda: [demo.METHODS[name] for name in demo._PEERS])
    monkeypatch.setattr(demo, "_EPOCHS", {"digits-autoencoder": 2})
    assert main(["demo", "--output", str(tmp_path / "new" / "plot.png")]) == 0
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "Handwritten digits" in capsys.readouterr().out


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "demo.png"), "--seconds-per-run", "1"]) == 0
    shown = capsys.readouterr().out
    for method in demo._methods():
        assert method.name in shown
    assert "diverged" not in shown
