"""The state of L-SR1, and what it reports."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from secondorder.methods.lsr1_model import SR1Model
from secondorder.methods.lsr1_proposal import Proposal
from secondorder.methods.terminal import zero_metrics
from secondorder.tree import PairMemory


class LSR1Metrics(NamedTuple):
    """What `lsr1` reports, all scalars.

    Attributes:
      ratio: Actual over predicted reduction of the last trial step.
      radius: Of the trust region that it was made in.
      step_norm: Length of that trial step.
      scale: ``γ`` of its model.
      smallest_eigenvalue: Of its matrix.
      largest_eigenvalue: Of its matrix.
      pairs_kept: Pairs that its matrix used, int32.
      pairs_skipped: Pairs in the memory that it left out, int32.
      trial_gradients: Whether the gradient at the last trial point was evaluated, 1 or 0, int32.
      rejections: Trial steps rejected since `init`, int32.
      probes: Random trial steps at stationary points since `init`, int32.
      restarts: How often the memory was emptied, int32.
      nonfinite_steps: Batches whose value or gradient was not finite; they changed nothing.
    """

    ratio: jax.Array
    radius: jax.Array
    step_norm: jax.Array
    scale: jax.Array
    smallest_eigenvalue: jax.Array
    largest_eigenvalue: jax.Array
    pairs_kept: jax.Array
    pairs_skipped: jax.Array
    trial_gradients: jax.Array
    rejections: jax.Array
    probes: jax.Array
    restarts: jax.Array
    nonfinite_steps: jax.Array


class LSR1State(NamedTuple):
    """State of `lsr1`.

    Attributes:
      count: Updates so far, int32.
      memory: The pairs.
      radius: Of the trust region; with a penalty the inverse of its weight.
      last_step: Length of the last step if it was accepted and is known, else 0.
      last_slope: Slope at its start along its direction.
      last_direction: That direction with ``update_every > 1``; None if it is the newest pair's.
      rejected_in_a_row: Trial steps rejected since the last accepted one, int32.
      largest_gradient: The largest gradient norm so far.
      diagonal: Second moments of the gradient, like the parameters, or None.
      value: With ``full_batch`` the value at the parameters after the step, else None.
      grad: With ``full_batch`` the gradient there, else None.
      metrics: What is reported.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, also a method of tuples
    memory: PairMemory
    radius: jax.Array
    last_step: jax.Array
    last_slope: jax.Array
    last_direction: chex.ArrayTree | None
    rejected_in_a_row: jax.Array
    largest_gradient: jax.Array
    diagonal: chex.ArrayTree | None
    value: jax.Array | None
    grad: chex.ArrayTree | None
    metrics: LSR1Metrics


def no_metrics(dtype: Any) -> LSR1Metrics:
    """The metrics before the first step.

    Args:
      dtype: Of those that are real numbers.

    Returns:
      Zeros.
    """
    reals = ("ratio", "radius", "step_norm", "scale", "smallest_eigenvalue", "largest_eigenvalue")
    return zero_metrics(LSR1Metrics, dtype, reals)


def report(
    metrics: LSR1Metrics,
    model: SR1Model,
    proposal: Proposal,
    radius: jax.Array,
    params: chex.ArrayTree,
    is_due: bool | jax.Array,
    ratio: jax.Array,
    accepted: jax.Array,
    restarts: jax.Array,
) -> LSR1Metrics:
    """The metrics after a step.

    Args:
      metrics: Those before it.
      model: Its model.
      proposal: The trial step.
      radius: Of the region that it was made in.
      params: The parameters.
      is_due: Whether the gradient was evaluated at its end.
      ratio: Of actual to predicted reduction.
      accepted: Whether the step was taken.
      restarts: Whether the memory is emptied.

    Returns:
      The new metrics.
    """
    quadratic, used = model.quadratic, model.matrix.used
    stored = jnp.sum(jnp.diagonal(model.gram)[: len(used)] > 0, dtype=jnp.int32)
    kept = jnp.sum(used, dtype=jnp.int32)
    # Outside the span of the pairs all eigenvalues are ``γ``, if there is an outside.
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    known = jnp.append(quadratic.kept, jnp.sum(quadratic.kept) < size)
    values = jnp.append(quadratic.eigenvalues, quadratic.complement)
    return LSR1Metrics(
        ratio=ratio.astype(metrics.ratio.dtype),
        radius=radius,
        step_norm=proposal.norm,
        scale=quadratic.complement,
        smallest_eigenvalue=jnp.min(values, where=known, initial=jnp.inf),
        largest_eigenvalue=jnp.max(values, where=known, initial=-jnp.inf),
        pairs_kept=kept,
        pairs_skipped=stored - kept,
        trial_gradients=jnp.asarray(is_due, jnp.int32),
        rejections=metrics.rejections + ~accepted,
        probes=metrics.probes + proposal.is_probe,
        restarts=metrics.restarts + restarts,
        nonfinite_steps=metrics.nonfinite_steps,
    )
