"""The hyperparameters of low-rank saddle-free Newton, and what they must be."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, get_args

import chex
import jax
import jax.numpy as jnp

from secondorder.checks import check_choice, check_flag, check_range, check_static_count
from secondorder.operators.hessian import HessianMode

Eigensolver: TypeAlias = Literal["subspace_iteration", "single_pass", "block_krylov", "adaptive"]
SpectrumKind: TypeAlias = Literal["absolute", "shifted"]
Spectrum: TypeAlias = SpectrumKind | Callable[[jax.Array], jax.Array]


class EigenSettings(NamedTuple):
    """How the eigenpairs are found; see `scale_by_low_rank_saddle_free_newton`."""

    rank: int
    oversampling: int
    eigensolver: Eigensolver
    warm_start: bool
    passes: int
    initial_passes: int
    tolerance: chex.Numeric
    block_size: int
    signal_to_noise: chex.Numeric | None
    mode: HessianMode
    chunk_size: int | None

    def columns(self, params: chex.ArrayTree) -> int:
        """The number of vectors in a basis, never more than parameters."""
        return min(self.rank + self.oversampling, dimension(params))


class StepSettings(NamedTuple):
    """What is done with the eigenpairs; see `scale_by_low_rank_saddle_free_newton`."""

    refresh_every: int
    damping: chex.Numeric
    damping_share: chex.Numeric
    spectrum: Spectrum
    max_norm: chex.Numeric | None
    escape_length: chex.Numeric


def dimension(params: chex.ArrayTree) -> int:
    """How many numbers the parameters are.

    Args:
      params: A pytree of arrays, or abstract.

    Returns:
      Their number.
    """
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(params))


def check_rank(method: str, rank: int, params: chex.ArrayTree) -> None:
    """Raises if there are fewer parameters than eigenpairs.

    Args:
      method: Name of the method, for the message.
      rank: Number of eigenpairs.
      params: The parameters, arrays or abstract.

    Raises:
      ValueError: If there are.
    """
    # `optax.tree.map_params` passes a tree without leaves.
    if jax.tree.leaves(params) and rank > dimension(params):
        raise ValueError(
            f"{method}: `rank` is {rank}, but there are only {dimension(params)} parameters."
        )


def check_settings(eigen: EigenSettings, settings: StepSettings) -> None:
    """Raises `ValueError` for whatever can be judged before tracing.

    Args:
      eigen: How the eigenpairs are found.
      settings: The hyperparameters of the step.

    Raises:
      ValueError: For hyperparameters out of range.
    """
    for name in ("rank", "passes", "initial_passes", "block_size"):
        check_static_count(name, getattr(eigen, name))
    check_static_count("refresh_every", settings.refresh_every)
    if eigen.oversampling != 0:
        check_static_count("oversampling", eigen.oversampling)
    if eigen.chunk_size is not None:
        check_static_count("chunk_size", eigen.chunk_size)
    check_flag("warm_start", eigen.warm_start)
    check_choice("eigensolver", eigen.eigensolver, get_args(Eigensolver))
    check_choice("mode", eigen.mode, get_args(HessianMode))
    if not callable(settings.spectrum):
        check_choice("spectrum", settings.spectrum, get_args(SpectrumKind))
    check_range("tolerance", eigen.tolerance, low=0, high=1, open_low=True)
    for name in ("damping", "max_norm"):
        check_range(name, getattr(settings, name), low=0, open_low=True)
    for name in ("damping_share", "escape_length"):
        check_range(name, getattr(settings, name), low=0)
    check_range("signal_to_noise", eigen.signal_to_noise, low=0)
    if eigen.signal_to_noise is not None and eigen.eigensolver in ("single_pass", "block_krylov"):
        raise ValueError(
            f"`signal_to_noise` needs `eigensolver` 'subspace_iteration' or 'adaptive', got "
            f"{eigen.eigensolver!r}."
        )
