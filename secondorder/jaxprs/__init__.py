"""Reading jaxprs and evaluating them again, through public JAX names only.

* `equations`: the bodies of calls and scans, and one equation at a time; the only file that knows
  how JAX versions differ.
* `convolutions`: the same function with convolutions that compile well inside loops and branches.
"""

from secondorder.jaxprs.convolutions import canonical_convolutions
from secondorder.jaxprs.equations import (
    INLINED,
    REMAT,
    SCAN,
    Body,
    ScanArity,
    body_of,
    divide_operands,
    evaluate,
    is_literal,
    rematerialized,
    rescan,
    run_equation,
    scan_arity,
)

__all__ = [
    "INLINED",
    "REMAT",
    "SCAN",
    "Body",
    "ScanArity",
    "body_of",
    "canonical_convolutions",
    "divide_operands",
    "evaluate",
    "is_literal",
    "rematerialized",
    "rescan",
    "run_equation",
    "scan_arity",
]
