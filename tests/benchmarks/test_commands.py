"""The command line, end to end on the digits."""

import json

import pytest

from benchmarks import cost, demo
from benchmarks.cli import main
from benchmarks.problems import PROBLEMS

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
        assert {"step", "seconds", "train_loss", "test_loss", "test_accuracy"} <= set(record)
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
