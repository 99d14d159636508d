"""Reading jaxprs and evaluating them again, through public JAX names only.

* `equations`: the bodies of calls and scans, and one equation at a time; the only file that knows
  how JAX versions differ.
* `convolutions`: the same function with convolutions that compile well inside loops and branches.
* `log_partition`: whether a loss has the curvature of a softmax cross entropy.
"""

from secondorder.jaxprs.convolutions import canonical_convolutions
from secondorder.jaxprs.equations import (
    IDENTITY,
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
from secondorder.jaxprs.log_partition import is_log_partition_loss

__all__ = [
    "IDENTITY",
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
    "is_log_partition_loss",
    "rematerialized",
    "rescan",
    "run_equation",
    "scan_arity",
]
