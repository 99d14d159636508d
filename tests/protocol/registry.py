"""Every optimizer of the package, one line each; the protocol suite runs over all of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax

import secondorder as so
from secondorder.methods.layerwise import with_settings_of

LAYERS = "layers"  # a factory that takes `layers=so.find_layers(objective, params)`


@dataclasses.dataclass(frozen=True)
class Entry:
    """An optimizer.

    Attributes:
      name: Shown in test names.
      factory: Called with keywords only.
      settings: Its hyperparameters.
      needs: What else the factory is given: any of `LAYERS`.
      static: Structural hyperparameters, which `optax.inject_hyperparams` must not trace.
      learning_rate: Whether the factory takes one; otherwise it only gives a direction.
      terminal: Whether it gives the step itself, which it has tried; no learning rate follows.
      remembers: Whether its state holds vectors like the parameters, and is not counters alone.
      idle: Steps at the start that are zero.
    """

    name: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    needs: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    learning_rate: bool = True
    terminal: bool = False
    remembers: bool = True
    idle: int = 0


KBFGS_STATIC = ("update_every", "memory_size")

LSR1 = {"memory_size": 2, "radius": 0.3}
LSR1_STATIC = ("memory_size", "full_batch", "storage_dtype", "diagonal", "update_every")


def lsr1(name: str, **settings: Any) -> Entry:
    """An entry of a method without a learning rate, whose updates are its steps."""
    return Entry(name, so.lsr1, LSR1 | settings, (), LSR1_STATIC, False, terminal=True)


HF_STATIC = ("max_iterations", "max_trials", "preconditioner_probes", "backtracking")


def hessian_free(factory: Callable[..., Any], *static: str, **settings: Any) -> Entry:
    """An entry of a method of the Hessian-free family, which tries its steps."""
    return Entry(factory.__name__, factory, settings, (), static, False, terminal=True)


LM = {"damping": 0.1, "full_batch": True}
LM_STATIC = ("relative", "max_iterations", "blocks", "full_batch", "diagonal_probes")


def lm(name: str, **settings: Any) -> Entry:
    """An entry of Levenberg-Marquardt."""
    return Entry(name, so.levenberg_marquardt, LM | settings, (), LM_STATIC, False, terminal=True)


PCH_STATIC = ("max_iterations",)
NEWTON_CG_STATIC = ("max_iterations", "max_trials", "full_batch")

LRSFN = {"rank": 4, "damping": 0.3}
LRSFN_STATIC = (
    "rank", "oversampling", "warm_start", "passes", "initial_passes", "refresh_every", "block_size",
    "chunk_size", "seed",
)  # fmt: skip

# Few evaluations and a high floor: the search multiplies the rounding errors by which two compiled
# programs differ.
KRYLOV = {"subspace_size": 2, "max_evaluations": 3, "eigenvalue_floor": 0.1}
KRYLOV_STATIC = ("subspace_size", "preconditioner_probes", "max_evaluations")


def krylov(name: str, **settings: Any) -> Entry:
    """An entry of Krylov subspace descent."""
    given = KRYLOV | settings
    return Entry(name, so.krylov_subspace_descent, given, (), KRYLOV_STATIC, False, terminal=True)


BLOCK_STATIC = (
    "update_every", "precondition_every", "block_size", "merge_dims", "one_sided",
    "precondition_vectors",
)  # fmt: skip
SHAMPOO_STATIC = (*BLOCK_STATIC, "start_preconditioning_step", "root_order")
KFAC_STATIC = ("update_every", "inverse_every", "seed")
STEP_STATIC = ("adapt_every", "plane_every", "rates_every")
MODEL_STATIC = (*STEP_STATIC, "parts")


@with_settings_of(so.scale_by_quadratic_model)
def modeled_kbfgs(layers: so.Layers, **settings: Any) -> optax.GradientTransformationExtraArgs:
    """K-BFGS with the quadratic model's steps, which it shares its damping with."""
    direction = so.scale_by_kbfgs(layers, momentum=0.0)
    return so.scale_by_quadratic_model(**{**settings, "direction": direction})


REGISTRY = [
    Entry("kbfgs", so.kbfgs, {}, (LAYERS,), KBFGS_STATIC),
    Entry("kbfgs-l", so.kbfgs, {"memory_size": 2}, (LAYERS,), KBFGS_STATIC),
    Entry(
        "kbfgs-average-every-third",
        so.kbfgs,
        {"input_factor": "moving_average", "update_every": 3},
        (LAYERS,),
        KBFGS_STATIC,
    ),
    Entry("scale_by_kbfgs", so.scale_by_kbfgs, {"update_every": 2}, (LAYERS,), KBFGS_STATIC, False),
    Entry(
        "scale_by_lsr1",
        so.scale_by_lsr1,
        {"memory_size": 2},
        (),
        ("memory_size", "storage_dtype"),
        False,
    ),
    lsr1("lsr1"),
    lsr1("lsr1-every-third", update_every=3, momentum=0.5),
    lsr1(
        "lsr1-full-batch",
        full_batch=True,
        storage_dtype=jnp.bfloat16,
        diagonal=True,
        diagonal_decay=0.9,
        momentum=0.1,
        weight_decay=1e-3,
    ),
    hessian_free(
        so.hessian_free, *HF_STATIC, "seed", max_iterations=6, preconditioner="empirical_fisher"
    ),
    hessian_free(so.stochastic_hessian_free, "max_iterations", "backtracking", "seed", damping=1.0),
    hessian_free(
        so.block_hessian_free,
        "max_iterations",
        "max_trials",
        "relative_damping",
        "seed",
        step="armijo",
        warm_start=0.5,
        max_iterations=4,
    ),
    hessian_free(so.gauss_newton, "max_iterations", "max_trials", damping=0.5, momentum=0.1),
    lm("levenberg_marquardt"),
    lm("levenberg_marquardt-cg", solver="conjugate_gradient"),
    lm(
        "levenberg_marquardt-blocks",
        blocks=lambda path: path,
        scaling="running_diagonal",
        weight_decay=1e-3,
        uphill=1.0,
    ),
    Entry(
        "pch",
        so.positive_curvature_hessian,
        {"input_moment": "full"},
        (LAYERS,),
        PCH_STATIC,
        remembers=False,
    ),
    Entry(
        "pch-cg",
        so.positive_curvature_hessian,
        {"solver": "conjugate_gradient", "weight_decay": 1e-3, "mixing": 0.3},
        (LAYERS,),
        PCH_STATIC,
        remembers=False,
    ),
    Entry(
        "scale_by_pch",
        so.scale_by_positive_curvature,
        {"expectation": "exact", "mixing": 0.1},
        (LAYERS,),
        PCH_STATIC,
        False,
        remembers=False,
    ),
    Entry(
        "newton_cg",
        so.newton_cg,
        {"damping": 1e-2},
        (),
        NEWTON_CG_STATIC,
        False,
        terminal=True,
        remembers=False,
    ),
    Entry(
        "newton_cg-full-batch",
        so.newton_cg,
        {
            "full_batch": True,
            "damping": 1e-2,
            "weight_decay": 1e-3,
            "negative_curvature": "truncate",
        },
        (),
        NEWTON_CG_STATIC,
        False,
        terminal=True,
    ),
    krylov("krylov_subspace_descent"),
    krylov(
        "krylov_subspace_descent-preconditioned",
        preconditioner="empirical_fisher",
        weight_decay=1e-3,
    ),
    Entry("lrsfn", so.low_rank_saddle_free_newton, LRSFN, (), LRSFN_STATIC),
    Entry(
        "scale_by_lrsfn",
        so.scale_by_low_rank_saddle_free_newton,
        LRSFN
        | {"refresh_every": 1, "warm_start": False, "passes": 2, "spectrum": "shifted", "seed": 1},
        (),
        LRSFN_STATIC,
        False,
        remembers=False,
    ),
    Entry(
        "saddle_free_newton",
        so.saddle_free_newton,
        {"subspace_size": 2, "damping": 0.5, "dampings": (1.0, 0.1), "weight_decay": 1e-3},
        (),
        ("subspace_size", "dampings"),
        False,
        terminal=True,
    ),
    Entry("kfac", so.kfac, {"damping": 0.1, "max_divergence": 1.0}, (LAYERS,), KFAC_STATIC),
    Entry(
        "kfac-adaptive",
        so.kfac,
        {"learning_rate": None, "damping": 0.1, "plane_every": 2, "layer_rates": True},
        (LAYERS,),
        KFAC_STATIC + STEP_STATIC,
        False,
        terminal=True,
    ),
    Entry(
        "scale_by_kfac",
        so.scale_by_kfac,
        {
            "damping": 0.1,
            "curvature": "exact",
            "weight_sharing": "reduce",
            "inverse": "corrected",
            "inverse_every": 2,
        },
        (LAYERS,),
        KFAC_STATIC,
        False,
        remembers=False,
    ),
    Entry(
        "scale_by_kfac-empirical",
        so.scale_by_kfac,
        {
            "damping": 0.1,
            "curvature": "empirical",
            "inverse": "eigen",
            "fallback": optax.scale(0.3),
        },
        (LAYERS,),
        KFAC_STATIC,
        False,
        remembers=False,
    ),
    Entry(
        "shampoo",
        so.shampoo,
        # Roots of eigenvalues near the floor multiply the rounding by which two programs differ.
        {"precondition_every": 2, "start_preconditioning_step": 1, "eps": 1e-3},
        (),
        (*SHAMPOO_STATIC, "nesterov"),
    ),
    Entry(
        "scale_by_shampoo",
        so.scale_by_shampoo,
        {
            "grafting": "none",
            "gradient_decay": 0.0,
            "moment_decay": None,
            "root_solver": "newton",
            "one_sided": True,
            "precondition_every": 1,
            "update_every": 2,
            "block_size": 2,
        },
        (),
        SHAMPOO_STATIC,
        False,
        remembers=False,
    ),
    Entry("soap", so.soap, {"precondition_every": 2, "block_size": 2}, (), BLOCK_STATIC, idle=1),
    Entry(
        "scale_by_soap",
        so.scale_by_soap,
        {"precondition_vectors": True, "one_sided": True, "precondition_every": 1},
        (),
        BLOCK_STATIC,
        False,
        idle=1,
    ),
    Entry(
        "scale_by_quadratic_model",
        so.scale_by_quadratic_model,
        {
            "damping": 0.1,
            "adapt_every": 1,
            "weight_decay": 1e-3,
            "max_norm": 10.0,
            "parts": str,  # every leaf for itself
            "rates_every": 2,
        },
        (),
        MODEL_STATIC,
        False,
        terminal=True,
    ),
    Entry(
        "modeled-kbfgs",
        modeled_kbfgs,
        {"damping": 0.3},
        (LAYERS,),
        MODEL_STATIC,
        False,
        terminal=True,
    ),
]

# Their methods are run by other entries: what has to be compiled is left to the slow tests.
VARIANTS = (
    "lsr1-full-batch",
    "stochastic_hessian_free",
    "levenberg_marquardt-cg",
    "pch-cg",
    "newton_cg-full-batch",
    "krylov_subspace_descent-preconditioned",
    "scale_by_shampoo",
    "scale_by_soap",
    "kbfgs-average-every-third",
    "scale_by_lsr1",
    "lsr1-every-third",
    "scale_by_lrsfn",
    "levenberg_marquardt-blocks",
    "scale_by_pch",
    "scale_by_kfac-empirical",
    "modeled-kbfgs",
)
