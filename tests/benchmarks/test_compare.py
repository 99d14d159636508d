"""The command ``compare``: tuning, what is kept, and what is not done again."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import baselines, compare, comparison_report, peers
from benchmarks.cli import main
from benchmarks.comparison_report import Outcome, read_outcomes, report, write_region
from benchmarks.comparisons import COMPARISONS
from benchmarks.families import BUDGET, FAMILIES
from benchmarks.methods import METHODS, PEERS
from benchmarks.problems import PROBLEMS
from benchmarks.run_records import RecordedRun
from benchmarks.settings import SettingError
from benchmarks.trials import Contender, Trial

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


def test_tables_are_made_again_from_the_records_alone(monkeypatch, tmp_path):
    runs, made = tmp_path / "runs", tmp_path / "made"
    trial = dataclasses.replace(TRIAL, targets=(1e9, 1e-9))
    monkeypatch.setitem(COMPARISONS, "saddle-free", (trial,))
    assert main(["compare", "saddle-free", "--seeds", "2", "--out", str(runs)]) == 0
    monkeypatch.setattr(compare, "Run", None)
    without = dataclasses.replace(trial, name="other")
    monkeypatch.setitem(COMPARISONS, "saddle-free", (trial, without))
    results = tmp_path / "RESULTS.md"
    command = ["compare", "saddle-free", "--records", str(runs), "--out", str(made)]
    assert main([*command, "--write-results", str(results)]) == 0
    for name in ("small.md", "small.csv", "small.jsonl"):
        assert (made / name).read_text() == (runs / name).read_text()
    text = results.read_text()
    assert (runs / "small.md").read_text() in text
    assert "### other\n\nNot run: there is no other.jsonl." in text
    assert f"--records {runs}" in text


@pytest.mark.parametrize("options", [[], ["--quick"], ["--seeds", "2"]])
def test_folders_without_records_and_options_of_runs_are_refused(
    command, options, tmp_path, capsys
):
    assert main([*command, "--records", str(tmp_path), *options]) == 2
    message = "leave --quick and --seeds out" if options else "has none of the records of"
    assert message in capsys.readouterr().err


def test_results_are_what_the_records_say(monkeypatch, tmp_path):
    """The tables in RESULTS.md that are made from the records in ``results/``."""
    monkeypatch.setattr(comparison_report, "save_panels", lambda *_: None)
    monkeypatch.chdir(Path(__file__).parents[2])
    folder = Path("benchmarks")
    text = (folder / "RESULTS.md").read_text()
    names = [name for name in COMPARISONS if f"compare {name} --records" in text]
    assert set(names) >= set(FAMILIES)
    remade = tmp_path / "RESULTS.md"
    remade.write_text(text)
    for name in names:
        command = ["compare", name, "--records", str(folder / "results"), "--out", str(tmp_path)]
        assert main([*command, "--write-results", str(remade)]) == 0
    assert remade.read_text() == text


def test_contenders_without_records_are_named(tmp_path):
    trial = dataclasses.replace(TRIAL, contenders=(Contender("sgd"), Contender("adam")))
    (tmp_path / "small.jsonl").write_text(
        "".join(json.dumps({**r, "contender": "sgd"}) + "\n" for r in recorded([0.5, 0.4]).records)
    )
    text = report(trial, read_outcomes(trial, tmp_path / "small.jsonl"), tmp_path)
    assert "| sgd | 2 | 20 |" in text
    assert "Without records: adam.\n" in text
    assert "not_run" not in (tmp_path / "small.jsonl").read_text()
    with pytest.raises(SettingError, match="not a file of records"):
        read_outcomes(trial, tmp_path / "none.jsonl")


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
                if METHODS[contender.method].is_available():
                    METHODS[contender.method].settings(PROBLEMS[trial.problem], point)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_methods_have_the_same_budget(name):
    for trial in FAMILIES[name]:
        assert all(len(list(c.points())) == BUDGET for c in trial.contenders)
        assert {c.is_peer for c in trial.contenders} == {False, True}


def test_records_on_file_belong_to_one_trial():
    """The names of the files do not tell how often a run was recorded."""
    seen = {}
    for trial in (trial for trials in COMPARISONS.values() for trial in trials):
        key = (trial.problem, trial.train_size, trial.batch_size, trial.gradients)
        assert seen.setdefault(key, trial.records) == trial.records


def test_names_of_files_stay_what_they_were(tmp_path, monkeypatch):
    names = []

    def stop(run, path, title):
        names.append(path.name)
        raise SettingError("stop")

    monkeypatch.setattr(compare, "Run", lambda options, splits: None)
    monkeypatch.setattr(compare, "_train", stop)
    trial = dataclasses.replace(TRIAL, contenders=(Contender("adam", {"learning_rate": (1e-3,)}),))
    monkeypatch.setitem(COMPARISONS, "saddle-free", (trial,))
    assert main(["compare", "saddle-free", "--out", str(tmp_path)]) == 0
    assert names == ["adam_learning_rate=0.001_200_50_None_6_0.jsonl"]


def test_best_settings_are_run_with_every_seed(monkeypatch, tmp_path):
    trial = dataclasses.replace(TRIAL, tuning=0.5, targets=(1e9, 1e-9))
    monkeypatch.setitem(COMPARISONS, "saddle-free", (trial,))
    command = ["compare", "saddle-free", "--out", str(tmp_path), "--seeds", "2"]
    assert main([*command, "--methods", "sgd"]) == 0
    names = sorted(path.stem for path in (tmp_path / "digits-autoencoder").iterdir())
    assert names == [
        "sgd_learning_rate=0.3_200_50_None_3_0",
        "sgd_learning_rate=0.3_200_50_None_6_0",
        "sgd_learning_rate=0.3_200_50_None_6_1",
        "sgd_learning_rate=1e-09_200_50_None_3_0",
    ]
    text = (tmp_path / "saddle-free.md").read_text()
    assert "`python -m benchmarks compare saddle-free --methods sgd --seeds 2`" in text
    assert "2 settings to try, each with the work of 3 gradients" in text
    assert "±" in text
    assert "| 1e+09 | none |  |  | sgd |" in text
    assert "| 1e-09 | none |  |  | none |" in text
    table = list(csv.DictReader((tmp_path / "small.csv").open()))
    assert {row["seed"] for row in table} == {"0", "1"}
    assert float(table[-1]["flops"]) == 6 * float(table[0]["flops"]) > 0


def test_what_cannot_run_is_a_row_of_the_table(monkeypatch, tmp_path):
    def missing(name, module=None):
        raise SettingError(f"{name} 0.0 does not import on JAX 0.0: ImportError: gone")

    monkeypatch.setattr(peers, "import_peer", missing)

    def refuse(learning_rate, eps, weight_decay):
        raise NotImplementedError("no such layers [yet]\nmore")

    monkeypatch.setattr(baselines, "adam", refuse)
    contenders = (
        Contender("sgd"),
        Contender("kfac-jax"),
        Contender("nag", like="kfac-jax"),
        Contender("adam"),
    )
    trial = dataclasses.replace(TRIAL, contenders=contenders)
    monkeypatch.setitem(COMPARISONS, "saddle-free", (trial,))
    assert main(["compare", "saddle-free", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "small.md").read_text()
    assert "| kfac-jax | not run: kfac_jax 0.0 does not import on JAX 0.0: ImportError" in text
    assert "| adam | not run: NotImplementedError: no such layers [yet] |" in text
    assert "| nag | not run: it takes the settings of kfac-jax, which has not run |" in text
    assert "| sgd |  | 6 |" in text
    again = ["compare", "saddle-free", "--records", str(tmp_path), "--out", str(tmp_path / "new")]
    assert main(again) == 0
    assert (tmp_path / "new" / "small.md").read_text() == text


def recorded(losses, scale=1.0, **header):
    records = [
        {
            "step": number, "gradients": 10 * number, "seconds": scale * number,
            "cpu_seconds": 2 * scale * number, "train_loss": loss, "test_loss": loss,
            "test_accuracy": 1 - loss, "diverged": False,
        }
        for number, loss in enumerate(losses, start=1)
    ]  # fmt: skip
    first = {"settings": {}, "seed": 0, "compile_seconds": 1.0, "problem": "p", "method": "m"}
    return RecordedRun([{**first, **header, **records[0]}, *records[1:]])


def test_work_to_reach_a_target(tmp_path):
    """Numbers by hand: the first record at or below the target, means over the seeds."""
    sgd, kbfgs = Contender("sgd"), Contender("kbfgs")
    outcomes = [
        Outcome(sgd, {}, (recorded([0.9, 0.5, 0.4]), recorded([0.5, 0.45, 0.3]))),
        Outcome(kbfgs, {}, (recorded([0.5, 0.1, 0.1], scale=0.1),)),
    ]
    trial = Trial("t", "digits-cnn", (sgd, kbfgs), 6, targets=(0.5, 0.2), accuracies=(0.6,))
    text = report(trial, outcomes, tmp_path)
    # Seeds of SGD are there after 2 and 1 steps, 1.5 on average: 1.5 s, 3 s, 15 gradients.
    assert "| 0.5 | kbfgs | 0.2 | 10 | sgd | 3 | 15 | 15 |" in text
    assert "| 0.2 | kbfgs | 0.4 | 20 | none |  |  |  |" in text
    assert "| 60.0% | kbfgs | 0.4 | 20 | sgd | 6 | 30 | 15 |" in text
    assert "| sgd | 1.5 / 3 / 15 |  |" in text
    assert "1 or 2 seeds" in text
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_goals_that_nobody_reached_have_no_table(tmp_path):
    contender = Contender("kbfgs")
    outcome = Outcome(contender, {}, (recorded([0.9, 0.8]),))
    trial = Trial("t", "digits-cnn", (contender,), 6, targets=(0.5,), accuracies=(0.1, 0.9))
    text = report(trial, [outcome], tmp_path)
    assert "to reach a training loss" not in text
    assert "| 90.0% | none |  |  | none |  |  |  |" in text


def test_large_numbers_have_no_powers_of_ten(tmp_path):
    contender = Contender("kbfgs")
    outcome = Outcome(contender, {}, (recorded([0.9, 0.1], scale=1234.5),))
    trial = Trial("t", "digits-cnn", (contender,), 6, targets=(0.5,))
    text = report(trial, [outcome], tmp_path)
    assert "| kbfgs | 2 | 20 | 2469 | 4938 | 1 | 0.1 |" in text
    assert "| kbfgs | 2469 / 4938 / 20 |" in text


def test_results_are_replaced_between_their_comments(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n")
    write_region(path, "a", "one")
    write_region(path, "b", "two")
    write_region(path, "a", "three\n")
    text = path.read_text()
    assert text.startswith(
        "# Results\n\n<!-- compare a: begin -->\n\nthree\n\n<!-- compare a: end -->"
    )
    assert "one" not in text
    assert text.count("two") == 1
    path.write_text("<!-- compare a: begin -->\n")
    with pytest.raises(SettingError, match="without"):
        write_region(path, "a", "four")


def test_quick_keeps_all_methods_of_the_first_trial():
    trials = FAMILIES["autoencoders"]
    first, second = trials[0].shortened(is_first=True), trials[1].shortened(is_first=False)
    assert len(first.contenders) == len(trials[0].contenders) > 15
    assert [c.is_peer for c in second.contenders] == [True, False]
    assert first.runs(seeds=1) == len(first.contenders)
    assert all((c.curvature_batch_size or 0) <= 100 for c in first.contenders)
    assert first.batch_size == 100
    assert FAMILIES["transformer"][0].shortened(is_first=True).batch_size == 32


def test_length_of_a_trial():
    """Two settings with half of the work, then three seeds, and three of the one without a grid."""
    trial = dataclasses.replace(TRIAL, tuning=0.5, gradient_seconds=1.0)
    assert trial.runs(3) == 2 + 3 + 3
    evaluations = 2 * 250 / 50 / 3
    seconds = (1 + 3 + 3) * (6 * 1.3 + evaluations) + 20 * 8
    assert trial.hours(3) == pytest.approx(seconds / 3600)
    assert dataclasses.replace(trial, tuning=1.0).runs(1) == 2 + 1


def test_peers_are_methods():
    assert set(METHODS) > PEERS


@pytest.mark.parametrize(
    "options", [["--only", "x"], ["--seeds", "2"], ["--methods", "lm"], ["--records", "."]]
)
def test_suites_have_no_trials(options, capsys):
    assert main(["compare", "classical", *options]) == 2
    assert "has no --only, --methods, --records and --seeds" in capsys.readouterr().err


def test_unknown_methods_and_seeds(command, capsys):
    assert main([*command, "--methods", "adam"]) == 2
    assert "small has no adam; it has: sgd" in capsys.readouterr().err
    assert main([*command, "--methods", "the same rate"]) == 2
    assert "sgd must be among" in capsys.readouterr().err
    assert main([*command, "--seeds", "0"]) == 2
