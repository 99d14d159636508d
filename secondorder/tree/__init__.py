"""Vectors that are pytrees: stacks of them, their inner products and linear combinations."""

from secondorder.tree.blocks import (
    Blocks,
    BlockSetting,
    block_inner,
    block_scale,
    embedding,
    label_blocks,
    leaf_paths,
    one_block,
)
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
    moving_average,
    project,
    read,
    write,
    zeros_stack,
    zeros_vector,
)

__all__ = [
    "BlockSetting",
    "Blocks",
    "PairMemory",
    "accumulation_dtype",
    "block_inner",
    "block_scale",
    "combine",
    "combine_pairs",
    "drop_pairs",
    "embedding",
    "init_pairs",
    "inner",
    "label_blocks",
    "leaf_paths",
    "moving_average",
    "newest_slot",
    "one_block",
    "project",
    "project_on_pairs",
    "push_pair",
    "read",
    "write",
    "zeros_stack",
    "zeros_vector",
]
