"""What a compiled program does on each device: floating-point operations, and what it exchanges.

Read from the text of the optimized program, which is that of one device. XLA's own count leaves out
factorizations, which are calls of a library, and tells nothing of collectives.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r"known_trip_count[^\d]*(\d+)")
# Multiples of n^3 for the library calls of factorizations and triangular solves.
_FACTORIZATIONS = {"potrf": 1 / 3, "trsm": 1.0, "getrf": 2 / 3, "syevd": 9.0, "geqrf": 4 / 3}


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in one run of a program; of a branch, the one with more of it.

    Attributes:
        products: Operations of matrix products and convolutions.
        factorizations: Operations of matrix factorizations and eigendecompositions, about.
        collectives: How many of each kind.
        exchanged: Bytes that come out of collectives, by kind.
    """

    products: float = 0
    factorizations: float = 0
    collectives: Mapping[str, float] = dataclasses.field(default_factory=dict)
    exchanged: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def flops(self) -> float:
        """All operations."""
        return self.products + self.factorizations

    @property
    def bytes(self) -> float:
        """All bytes that come out of collectives."""
        return sum(self.exchanged.values())

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.products + other.products,
            self.factorizations + other.factorizations,
            _add(self.collectives, other.collectives),
            _add(self.exchanged, other.exchanged),
        )

    def times(self, count: float) -> "Work":
        """The same work several times."""
        return Work(
            self.products * count,
            self.factorizations * count,
            {kind: number * count for kind, number in self.collectives.items()},
            {kind: size * count for kind, size in self.exchanged.items()},
        )


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
        name: Of the result.
        result: Its type.
        kind: Of operation.
        rest: Operands and attributes.
    """

    name: str
    result: str
    kind: str
    rest: str


Computations = dict[str, list[Instruction]]


def read_work(text: str) -> Work:
    """Counts what an optimized program does on each device.

    Args:
        text: `jax.stages.Compiled.as_text`.

    Returns:
        The work. A loop counts as often as XLA knows that it runs, once where it does not know.
    """
    computations, entry = _parse(text)
    known: dict[str, Work] = {}

    def total(name: str) -> Work:
        if name not in known:
            known[name] = sum(
                (_instruction_work(i, computations[name], total) for i in computations[name]),
                Work(),
            )
        return known[name]

    return total(entry)


def batched_sizes(text: str, kind: str) -> list[tuple[int, ...]]:
    """The shapes that operations of a kind have on one device.

    Args:
        text: `jax.stages.Compiled.as_text`.
        kind: Such as ``"dot"``; or a part of the name of a library call, such as ``"potrf"``.

    Returns:
        For each of them the shape of its (first) result; in a loop that XLA knows to run several
        times, that number comes first.
    """
    computations, entry = _parse(text)
    return [
        ((trips,) if trips > 1 else ()) + _arrays(instruction.result)[0][1]
        for name, trips in _runs(computations, entry).items()
        for instruction in computations[name]
        if instruction.kind == kind or (_target(instruction) and kind in _target(instruction))
    ]


def _parse(text: str) -> tuple[Computations, str]:
    """The computations of a program by name, and the name of the first to run."""
    computations: Computations = {}
    current, entry = "", ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" ") and not line.startswith("HloModule"):
            is_entry = line.startswith("ENTRY ")
            current = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%").split("(")[0]
            computations[current] = []
            entry = current if is_entry else entry
        elif current and (match := _INSTRUCTION.match(line)):
            computations[current].append(Instruction(*match.groups()))
    return computations, entry


def _runs(computations: Computations, entry: str) -> dict[str, int]:
    """How often each computation runs, if all branches are taken."""
    runs: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        runs[name] = max(count, runs.get(name, 0))
        for instruction in computations[name]:
            for called in _called(instruction):
                visit(called, count * _trips(instruction))

    visit(entry, 1)
    return runs


def _called(instruction: Instruction) -> list[str]:
    """The computations that an instruction runs, of a loop the body."""
    branches = _BRANCHES.search(instruction.rest)
    if instruction.kind == "conditional" and branches:
        return [name.strip().lstrip("%") for name in branches.group(1).split(",")]
    return _CALLED.findall(instruction.rest) if instruction.kind in _CALLING else []


def _trips(instruction: Instruction) -> int:
    known = _TRIPS.search(instruction.rest) if instruction.kind == "while" else None
    return int(known.group(1)) if known else 1


def _instruction_work(
    instruction: Instruction, siblings: list[Instruction], total: Callable[[str], Work]
) -> Work:
    """The work of one instruction, with that of the computations that it calls."""
    kind = instruction.kind
    own = kind.removesuffix("-start")
    if own in COLLECTIVES:
        # What an asynchronous one starts with holds its operands too.
        sizes = [math.prod(shape) * width for width, shape in _arrays(instruction.result)]
        size = sum(sizes) if own == kind else sum(sizes) / 2
        return Work(collectives={own: 1}, exchanged={own: size})
    if kind == "dot":
        return Work(products=_dot_flops(instruction, siblings))
    if kind == "convolution":
        return Work(products=_convolution_flops(instruction, siblings))
    if kind == "custom-call":
        return _call_work(instruction, siblings)
    works = [total(name) for name in _called(instruction)]
    if kind == "conditional":
        return max(works, key=lambda work: (work.flops, work.bytes))
    return sum(works, Work()).times(_trips(instruction))


_CALLING = ("while", "fusion", "call", "async-start", "conditional")


def _dot_flops(instruction: Instruction, siblings: list[Instruction]) -> float:
    shape = _operand_shapes(instruction, siblings)[0]
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    axes = [int(axis) for axis in found.group(1).split(",") if axis] if found else []
    size = math.prod(_arrays(instruction.result)[0][1])
    return 2.0 * size * math.prod(shape[axis] for axis in axes)


def _convolution_flops(instruction: Instruction, siblings: list[Instruction]) -> float:
    kernel = _operand_shapes(instruction, siblings)[1]
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.rest)
    outputs = kernel[labels.group(1).index("o")] if labels else kernel[-1]
    return 2.0 * math.prod(_arrays(instruction.result)[0][1]) * math.prod(kernel) / outputs


def _call_work(instruction: Instruction, siblings: list[Instruction]) -> Work:
    target = _target(instruction)
    matrix = _arrays(instruction.result)[0][1]
    if "matmul" in target or "gemm" in target or "dot" in target:
        left, right = _operand_shapes(instruction, siblings)[:2]
        inner = math.sqrt(math.prod(left) * math.prod(right) / math.prod(matrix))
        return Work(products=2.0 * math.prod(matrix) * inner)
    for name, factor in _FACTORIZATIONS.items():
        if name in target and len(matrix) >= 2:
            return Work(factorizations=factor * math.prod(matrix[:-2]) * max(matrix[-2:]) ** 3)
    return Work()


def _target(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    return found.group(1) if found else ""


def _operand_shapes(instruction: Instruction, siblings: list[Instruction]) -> list[tuple[int, ...]]:
    """The shapes of the operands, which stand where they are made."""
    operands = re.findall(r"%([\w.-]+)", instruction.rest.split(")", 1)[0])
    made = {sibling.name: sibling.result for sibling in siblings}
    return [_arrays(made[name])[0][1] for name in operands]


def _arrays(text: str) -> list[tuple[int, tuple[int, ...]]]:
    """Bytes per number and shape of each array in a type."""
    return [
        (_BYTES.get(kind, 4), tuple(int(size) for size in sizes.split(",") if size))
        for kind, sizes in _ARRAY.findall(text)
    ]


def _add(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in sorted({*one, *other})}
