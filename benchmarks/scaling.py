"""``scaling``: counts what a step does on each of several devices, from the compiled program.

Nothing is run: the devices are virtual, and the counts are those of the program of one of them.
With work ``W`` on one device and ``w`` on each of ``d``, ``R = (d w - W) / (d - 1)`` is what every
device repeats.
"""

import argparse
import contextlib
import math
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from benchmarks.arguments import add_json
from benchmarks.display import print_table
from benchmarks.programs import Work, read_work
from benchmarks.records import Record, open_writer, versions
from benchmarks.scaling_models import (
    MODELS,
    OPTIMIZERS,
    Model,
    compile_step,
    make_optimizer,
    mlp,
    shard,
)
from benchmarks.settings import SettingError

_DEPTHS = (12, 48)
_COLUMNS = {
    "devices": "devices",
    "work_ratio": "d w / W",
    "repeated_share": "R / W",
    "factorization_ratio": "d f / F",
    "state_ratio": "d s / S",
    "collectives": "collectives",
    "exchanged_bytes": "bytes\nexchanged",
    "compile_seconds": "compile,\nCPU s",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("--models", default="mlp,transformer", metavar="M,N", help=_list(MODELS))
    parser.add_argument(
        "--methods", default=",".join(OPTIMIZERS), metavar="M,N", help=_list(OPTIMIZERS)
    )
    parser.add_argument("--devices", default="1,2,4,8", metavar="D,E", help="1 comes first")
    parser.add_argument("--layout", default="fsdp", choices=("fsdp", "data"))
    parser.add_argument(
        "--depths",
        action="store_true",
        help="instead, compile times with 12 and with 48 equal layers, scanned and not",
    )
    add_json(parser)


def catalogue() -> str:
    """The models and methods."""
    return f"models: {_list(MODELS)}\nmethods: {_list(OPTIMIZERS)}"


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    methods = _chosen(args.methods, OPTIMIZERS)
    counts = [int(count) for count in args.devices.split(",")]
    if min(counts) < 1 or counts[0] != 1:
        raise SettingError("--devices begins with 1, the unit of all ratios.")
    _provide_devices(max(counts))
    with open_writer(args.json) as write:
        if args.depths:
            for method in methods:
                write(_measure_depths(method))
            return 0
        for name in _chosen(args.models, MODELS):
            records = []
            for method in methods:
                found = _measure(name, method, counts, args.layout)
                records += found
                for record in found:
                    write(record)
            _print(name, args.layout, records)
    return 0


def _list(names: Any) -> str:
    return ", ".join(names)


def _chosen(text: str, known: Any) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise SettingError(f"There is no {unknown[0]!r}; there are: {_list(known)}.")
    return names


def _provide_devices(count: int) -> None:
    """Asks JAX for virtual devices, before it starts."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)  # type: ignore[no-untyped-call]
    if jax.device_count() < count:
        raise SettingError(
            f"There are {jax.device_count()} devices; start with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}."
        )


def _measure(name: str, method: str, counts: list[int], layout: str) -> list[Record]:
    """The records of a method, by number of devices; none if it does not know the model."""
    model = MODELS[name]()
    records: list[Record] = []
    for count in counts:
        try:
            record = _count_work(model, method, count, layout)
        except ValueError as error:
            print(f"{method} on {name}: {str(error).splitlines()[0]}")
            return []
        records.append({"model": name, "method": method, "layout": layout, **record})
        _compare(records[-1], records[0])
    return records


def _count_work(model: Model, method: str, count: int, layout: str) -> Record:
    mesh = Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))
    optimizer = make_optimizer(method, model)
    start = time.process_time()
    compiled, state = compile_step(model, optimizer, *shard(model, mesh, layout))
    seconds = time.process_time() - start
    work: Work = read_work(compiled.as_text())
    return {
        "devices": count,
        "flops": work.flops,
        "factorization_flops": work.factorizations,
        "state_bytes": _bytes_per_device(state),
        "collectives": sum(work.collectives.values()),
        "collectives_by_kind": dict(work.collectives),
        "exchanged_bytes": work.bytes,
        "temporary_bytes": getattr(compiled.memory_analysis(), "temp_size_in_bytes", None),
        "compile_seconds": seconds,
        "versions": versions(),
    }


def _bytes_per_device(state: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )


def _compare(record: Record, one: Record) -> None:
    """Adds the ratios to one device; 1 is perfect."""
    count = record["devices"]
    for key, ratio in {
        "flops": "work_ratio",
        "factorization_flops": "factorization_ratio",
        "state_bytes": "state_ratio",
    }.items():
        record[ratio] = count * record[key] / one[key] if one[key] else None
    if count > 1 and record["work_ratio"] is not None:
        record["repeated_share"] = (record["work_ratio"] - 1) / (count - 1)


def _print(name: str, layout: str, records: list[Record]) -> None:
    rows = [
        (record["method"], *(record.get(key) for key in _COLUMNS))
        for record in records
        if record["devices"] > 1
    ]
    print_table(f"Scaling on {name}, layout {layout}", ("method", *_COLUMNS.values()), rows)


def _measure_depths(method: str) -> Record:
    """Compile times of one step with few and with many equal layers."""
    record: Record = {"method": method, "versions": versions()}
    rows = []
    for scanned in (True, False):
        kind = "scanned" if scanned else "unrolled"
        few, many = (_compile_seconds(method, depth, scanned) for depth in _DEPTHS)
        ratio = many / few if few is not None and many is not None else None
        record |= {kind: [few, many], f"{kind}_ratio": ratio}
        rows.append((f"{method}, {kind}", few, many, ratio))
    columns = ("method", *(f"{depth} layers" for depth in _DEPTHS), "ratio")
    print_table("CPU seconds to trace and compile", columns, rows)
    return record


def _compile_seconds(method: str, depth: int, scanned: bool) -> float | None:
    model = mlp(depth, width=32, batch=64, scanned=scanned)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    try:
        optimizer = make_optimizer(method, model)
        start = time.process_time()
        compile_step(model, optimizer, *shard(model, mesh, "data"))
    except ValueError:
        return None
    return time.process_time() - start
