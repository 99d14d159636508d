"""Vectors that are pytrees: stacks of them, their inner products and linear combinations."""

from secondorder.tree.pair_memory import (
    PairMemory,
    combine_pairs,
    drop_pairs,
    init_pairs,
    newest_slot,
    project_on_pairs,
    push_pair,
)
from secondorder.tree.vectors import (
    accumulation_dtype,
    combine,
    inner,
    project,
    read,
    write,
    zeros_stack,
)

__all__ = [
    "PairMemory",
    "accumulation_dtype",
    "combine",
    "combine_pairs",
    "drop_pairs",
    "init_pairs",
    "inner",
    "newest_slot",
    "project",
    "project_on_pairs",
    "push_pair",
    "read",
    "write",
    "zeros_stack",
]
