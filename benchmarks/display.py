"""What a person sees: progress bars and tables."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from benchmarks.training import EpochRecord, Run

console = Console()

# Drawing a bar is not training: it must not be asked for at every step of a small network.
_SECONDS_BETWEEN_UPDATES = 0.1

LOSS_COLUMNS = ("train loss", "test loss", "accuracy")


def progress_bar() -> Progress:
    """A progress display for runs; `watch` adds a bar to it."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        console=console,
    )


def watch(run: Run, progress: Progress, title: str) -> Iterator[EpochRecord]:
    """Trains a run and moves its own bar.

    Args:
        run: The run.
        progress: A running display.
        title: What the bar is called.

    Yields:
        The records of the run.
    """
    options = run.options
    # With no limit on epochs the bar counts steps towards an unknown total.
    total = None if options.epochs is None else options.epochs * run.steps_per_epoch
    task = progress.add_task(title, total=total, status="")

    last_update = time.perf_counter()

    def on_step(step: int, loss: float) -> None:
        nonlocal last_update
        if time.perf_counter() - last_update > _SECONDS_BETWEEN_UPDATES:
            last_update = time.perf_counter()
            progress.update(task, completed=step, status=f"batch loss {loss:.5g}")

    for record in run.epochs(on_step):
        progress.update(task, completed=record.step, status=f"train loss {record.train_loss:.5g}")
        yield record
    _finish(progress, task)


def describe(record: EpochRecord) -> str:
    """The losses of a record in a few words."""
    parts = [f"train {record.train_loss:.5g}", f"test {record.test_loss:.5g}"]
    if record.test_accuracy is not None:
        parts.append(f"accuracy {record.test_accuracy:.2%}")
    return ", ".join(parts)


def loss_cells(record: EpochRecord) -> tuple[Any, Any, Any]:
    """What stands under `LOSS_COLUMNS` in a table."""
    if record.diverged:
        return "diverged", None, None
    accuracy = None if record.test_accuracy is None else f"{record.test_accuracy:.2%}"
    return record.train_loss, record.test_loss, accuracy


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table; floats are rounded to four significant digits, None is a dash."""
    # Narrow enough for a terminal of 80 columns.
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for number, column in enumerate(columns):
        is_name = number == 0
        table.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
    for row in rows:
        table.add_row(*map(_cell, row))
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return rounded(value) if isinstance(value, float) else escape(str(value))


def rounded(number: float, digits: int = 4) -> str:
    """A number for a table; one below a million has all digits before its point.

    Args:
        number: The number.
        digits: How many digits to show, at least.

    Returns:
        The text.
    """
    text = f"{number:.{digits}g}"
    return f"{number:.0f}" if "e+" in text and abs(number) < 1e6 else text


def _finish(progress: Progress, task: TaskID) -> None:
    """Fills the bar: a run that ended on time or by divergence is over too."""
    completed = progress.tasks[progress.task_ids.index(task)].completed
    progress.update(task, total=completed)
