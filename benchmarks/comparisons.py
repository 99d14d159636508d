"""The comparisons: which methods meet on which problems, and over which settings each is tuned.

A comparison is one entry of `COMPARISONS`, a list of trials. Within a trial all methods start from
the same parameters and see the same batches in the same order, and all have the same work to spend.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.families import FAMILIES
from benchmarks.trials import Contender, Trial

_SGD = Contender("sgd", {"learning_rate": (0.01, 0.03, 0.1, 0.3, 1.0)})
_ADAM = Contender("adam", {"learning_rate": (1e-3, 3e-3, 1e-2)})


def _saddle_free(problem: str, batch_size: int, curvature: int, **fields: Any) -> Trial:
    """Low-rank saddle-free Newton, what it is made of, and what a user would take instead."""
    # Two equal chunks compile once. A smaller damping changes little: it follows the eigenvalues.
    fixed = {"rank": 10, "chunk_size": 5, "damping": 0.1}
    low_rank = Contender(
        "lrsfn",
        {"learning_rate": (0.1, 0.3, 1.0)},
        fixed,
        curvature_batch_size=curvature,
    )
    newton_cg = Contender(
        "newton-cg",
        {"damping": (1e-2, 1e-1, 1.0)},
        {"max_iterations": 10},
        curvature_batch_size=curvature,
    )
    ablations = [
        Contender(method, settings=fixed, name=name, like="lrsfn", curvature_batch_size=curvature)
        for method, name in (
            ("lrsfn-zero", "eigenvalues 0"),
            ("lrsfn-inf", "eigenvalues infinite"),
            ("lrsfn-random", "random subspace"),
        )
    ]
    return Trial(
        name=f"saddle-free-{problem}",
        problem=problem,
        contenders=(_SGD, _ADAM, newton_cg, low_rank, *ablations),
        batch_size=batch_size,
        **fields,
    )


def _hessian_free(
    name: str,
    problem: str,
    curvature: int,
    blocks: Sequence[str],
    solver: Mapping[str, Any],
    peers: Sequence[Contender],
    **fields: Any,
) -> Trial:
    """Hessian-free with and without blocks at one size of the curvature batch."""
    full = Contender("hf", name="hf", settings=solver, curvature_batch_size=curvature)
    block = [
        Contender(
            "bhf",
            name=f"bhf, {by}",
            settings={"blocks": by, **solver},
            curvature_batch_size=curvature,
        )
        for by in blocks
    ]
    return Trial(name, problem, (*peers, full, *block), **fields)


_FEW: Mapping[str, int] = {"train_size": 10000, "test_size": 2000}

_AUTOENCODERS = tuple(
    _hessian_free(
        f"mnist-autoencoder-tanh-{curvature}",
        "mnist-autoencoder-tanh",
        curvature,
        blocks=("halves", "layers"),
        solver={"max_iterations": 20},
        peers=[dataclasses.replace(_ADAM, grid={"learning_rate": (3e-4, 1e-3)})],
        gradients=gradients,
        records=6,
        **_FEW,
    )
    for curvature, gradients in ((100, 300), (500, 300), (1500, 300), (6000, 600))
)

_RESNETS = tuple(
    _hessian_free(
        problem,
        problem,
        64,
        blocks=("modules",),
        solver={"max_iterations": 10},
        peers=[_ADAM],
        gradients=150,
        test_size=2000,
        **sizes,
    )
    for problem, sizes in (("fashion-resnet", {"train_size": 10000}), ("cifar-resnet", {}))
)

COMPARISONS: dict[str, tuple[Trial, ...]] = {
    **FAMILIES,
    "saddle-free": (
        _saddle_free("fashion-lenet5", 256, 64, gradients=400, **_FEW),
        _saddle_free("mnist-autoencoder", 250, 64, gradients=400, **_FEW),
        _saddle_free("cifar-resnet", 128, 32, gradients=200, test_size=2000),
    ),
    "hessian-free-autoencoder": _AUTOENCODERS,
    "hessian-free": (
        _hessian_free(
            "mnist-lstm",
            "mnist-lstm",
            250,
            blocks=("modules",),
            solver={"max_iterations": 20},
            peers=[_ADAM],
            gradients=1500,
            **_FEW,
        ),
        *_RESNETS,
        _hessian_free(
            "shakespeare-transformer",
            "shakespeare-transformer",
            8,
            blocks=("layers",),
            solver={"max_iterations": 10},
            peers=[
                Contender("adamw", {"learning_rate": (1e-3, 3e-3, 1e-2)}),
                Contender("muon", {"learning_rate": (0.01, 0.02, 0.05)}),
            ],
            gradients=1000,
            train_size=4000,
            test_size=500,
        ),
        # A large batch, of which layerwise curvature takes a quarter and more iterations.
        _hessian_free(
            "shakespeare-transformer-256",
            "shakespeare-transformer",
            64,
            blocks=("layers",),
            solver={"max_iterations": 20},
            peers=[
                Contender("adamw", {"learning_rate": (3e-3, 1e-2)}),
                Contender("muon", {"learning_rate": (0.01, 0.02)}),
            ],
            gradients=240,
            batch_size=256,
            train_size=4000,
            test_size=500,
        ),
    ),
}
