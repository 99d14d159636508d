"""The command ``compare``: tuning, what is kept, and what is not done again."""

import json

import pytest

from benchmarks import compare
from benchmarks.cli import main
from benchmarks.comparisons import COMPARISONS, Contender, Trial
from benchmarks.methods import METHODS
from benchmarks.problems import PROBLEMS

TRIAL = Trial(
    "small",
    "digits-autoencoder",
    (
        Contender("sgd", {"learning_rate": (1e-9, 0.3)}),
        Contender("nag", name="the same rate", like="sgd"),
    ),
    gradients=6,
    batch_size=50,
    train_size=200,
    test_size=50,
    records=2,
)


@pytest.fixture
def command(monkeypatch, tmp_path):
    monkeypatch.setitem(COMPARISONS, "saddle-free", (TRIAL,))
    return ["compare", "saddle-free", "--out", str(tmp_path)]


def test_best_settings_are_kept_and_finished_runs_are_not_repeated(command, tmp_path, monkeypatch):
    assert main(command) == 0
    records = [json.loads(line) for line in (tmp_path / "small.jsonl").read_text().splitlines()]
    settings = {r["contender"]: r["settings"] for r in records if "settings" in r}
    assert {name: s["learning_rate"] for name, s in settings.items()} == {
        "sgd": 0.3,
        "the same rate": 0.3,
    }
    assert [r["gradients"] for r in records if r["contender"] == "sgd"] == [1, 4, 6]
    table = (tmp_path / "small.md").read_text()
    assert "| sgd | learning_rate=0.3 | 6 |" in table
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(compare, "Run", None)
    assert main(command) == 0
    assert (tmp_path / "small.md").read_text() == table


def test_interrupted_runs_leave_nothing_that_looks_finished(command, tmp_path, monkeypatch):
    def interrupt(run, progress, title):
        yield next(run.epochs())
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "watch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_unknown_trial_lists_the_trials(command, capsys):
    assert main([*command, "--only", "large"]) == 2
    assert "it has: small" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_name_what_there_is(name):
    for trial in COMPARISONS[name]:
        labels = [contender.label for contender in trial.contenders]
        assert len(set(labels)) == len(labels)
        for number, contender in enumerate(trial.contenders):
            assert contender.like is None or contender.like in labels[:number]
            for point in contender.points():
                METHODS[contender.method].settings(PROBLEMS[trial.problem], point)
