"""The comparisons of all methods and peers on families of problems, each tuned over four points."""

from collections.abc import Mapping
from typing import Any

from benchmarks.trials import Contender, Grid, Trial

# Points of every grid: all methods have the same budget.
BUDGET = 4


def _rates(*rates: float) -> Grid:
    return {"learning_rate": rates}


def _dampings(*dampings: float) -> Grid:
    return {"damping": dampings}


# For means of a cross entropy over samples, or over all positions of sequences.
_CLASSIFIERS: Mapping[str, Grid] = {
    "sgd": _rates(0.03, 0.1, 0.3, 1.0),
    "nag": _rates(0.003, 0.01, 0.03, 0.1),
    "adam": _rates(3e-4, 1e-3, 3e-3, 1e-2),
    "adamw": _rates(3e-4, 1e-3, 3e-3, 1e-2),
    "adadelta": _rates(0.3, 1.0, 3.0, 10.0),
    "muon": _rates(0.003, 0.01, 0.03, 0.1),
    "sophia": _rates(1e-4, 3e-4, 1e-3, 3e-3),
    "lbfgs": {"memory_size": (5, 10, 20, 40)},
    "kfac-jax": _dampings(0.1, 1.0, 10.0, 100.0),
    "optax-shampoo": _rates(3e-4, 1e-3, 3e-3, 1e-2),
    "shampoo": _rates(3e-4, 1e-3, 3e-3, 1e-2),
    "soap": _rates(3e-4, 1e-3, 3e-3, 1e-2),
    "kfac": {**_rates(0.01, 0.1), **_dampings(0.01, 0.1)},
    "kfac-adaptive": {**_dampings(0.01, 0.1), "confirmation": (2.0, None)},
    "kfac-layerwise": _dampings(0.01, 0.03, 0.1, 0.3),
    "kbfgs": {**_rates(0.1, 0.3), **_dampings(0.03, 0.3)},
    "kbfgs-l": {**_rates(0.1, 0.3), **_dampings(0.03, 0.3)},
    "kbfgs-model": _dampings(1e-3, 1e-2, 0.1, 1.0),
    "lsr1": {"memory_size": (5, 10, 20, 40)},
    "lrsfn": _rates(0.03, 0.1, 0.3, 1.0),
    "hf": _dampings(0.01, 0.1, 1.0, 10.0),
    "bhf": _dampings(0.01, 0.1, 1.0, 10.0),
}
# For sums over pixels, whose gradients and curvatures are hundreds of times larger.
_SUMS: Mapping[str, Grid] = {
    **_CLASSIFIERS,
    "sgd": _rates(0.01, 0.03, 0.1, 0.3),
    "nag": _rates(1e-3, 3e-3, 1e-2, 3e-2),
    "adam": _rates(3e-4, 1e-3, 3e-3, 1e-2),
    "adamw": _rates(3e-4, 1e-3, 3e-3, 1e-2),
    "kfac-jax": _dampings(0.1, 1.0, 10.0, 100.0),
    "kfac": {**_rates(0.03, 0.1), **_dampings(1.0, 10.0)},
    # Batches are large, and the run of a tuning too short to tell steps that are held back.
    "kfac-adaptive": {**_dampings(0.03, 0.1, 0.3, 1.0), "confirmation": (None,)},
    "kfac-layerwise": _dampings(0.03, 0.1, 0.3, 1.0),
    "kbfgs": {**_rates(0.1, 0.3), **_dampings(0.1, 0.3)},
    "kbfgs-l": {**_rates(0.1, 0.3), **_dampings(0.1, 0.3)},
    "kbfgs-model": _dampings(0.03, 0.1, 0.3, 1.0),
    "hf": _dampings(0.1, 1.0, 10.0, 100.0),
    "bhf": _dampings(0.1, 1.0, 10.0, 100.0),
}
# All that depends on the problem is in the grids, but for the blocks.
_FIXED: Mapping[str, Mapping[str, Any]] = {
    # The papers' epsilons, the defaults of their problems, are tuned along with the rate.
    "adam": {"eps": 1e-8},
    "hf": {"max_iterations": 20},
    "bhf": {"max_iterations": 20},
    # A short run of a tuning prefers longer steps or shorter ones, by where it ends.
    "kfac-layerwise": {"confirmation": 4.0},
    # A bias of a thousand units would have a factor as large as its weight's.
    "shampoo": {"precondition_vectors": False},
    "kbfgs": {"update_every": 5},
    "kbfgs-l": {"update_every": 5},
    "kbfgs-model": {"update_every": 5},
    # Two equal chunks compile once.
    "lrsfn": {"rank": 10, "chunk_size": 5, "damping": 0.1},
}
_ADAPTIVE_KFAC = ("kfac-adaptive", "kfac-layerwise")
_ON_PART_OF_THE_BATCH = ("hf", "bhf", "lrsfn", "kbfgs-model", *_ADAPTIVE_KFAC)


def _contenders(
    grids: Mapping[str, Grid], curvature: int, blocks: str, whole: tuple[str, ...] = ()
) -> tuple[Contender, ...]:
    """Every method of the grids, with products on the first ``curvature`` samples of the batch.

    But for those methods that take the ``whole`` batch.
    """
    parts = set(_ON_PART_OF_THE_BATCH).difference(whole)
    return tuple(
        Contender(
            method,
            grid,
            {**_FIXED.get(method, {}), **({"blocks": blocks} if method == "bhf" else {})},
            curvature_batch_size=curvature if method in parts else None,
        )
        for method, grid in grids.items()
    )


def _autoencoder(problem: str, **fields: Any) -> Trial:
    """An autoencoder at the batch size of the K-BFGS papers, tuned with 15 % of the work."""
    return Trial(
        f"all-{problem}",
        problem,
        _contenders(_SUMS, curvature=250, blocks="layers"),
        records=30,
        tuning=0.15,
        **fields,
    )


def _classifier(
    problem: str, targets: tuple[float, ...], accuracies: tuple[float, ...], **fields: Any
) -> Trial:
    return Trial(
        f"all-{problem}",
        problem,
        _contenders(_CLASSIFIERS, curvature=64, blocks="modules"),
        records=40,
        tuning=0.25,
        targets=targets,
        accuracies=accuracies,
        **fields,
    )


FAMILIES: dict[str, tuple[Trial, ...]] = {
    "autoencoders": (
        _autoencoder(
            "mnist-autoencoder", gradients=1000, targets=(60, 56, 54), gradient_seconds=0.16
        ),
        _autoencoder(
            "faces-autoencoder",
            gradients=400,
            train_size=10000,
            test_size=2500,
            targets=(60, 30, 20, 15.7),
            gradient_seconds=0.42,
        ),
        _autoencoder(
            "curves-autoencoder",
            gradients=1500,
            targets=(68.4, 60, 55.7, 53.2, 49),
            gradient_seconds=0.05,
        ),
        _autoencoder(
            "mnist-autoencoder-tanh-bce",
            gradients=800,
            targets=(100, 73.6, 66.9, 61.6, 57.5),
            gradient_seconds=0.16,
        ),
    ),
    "classifiers": (
        _classifier(
            "fashion-lenet5",
            (0.3, 0.25, 0.2, 0.1, 0.063),
            (0.85, 0.87, 0.88),
            gradients=3000,
            train_size=20000,
            test_size=5000,
            gradient_seconds=0.028,
        ),
        _classifier(
            "fashion-resnet",
            (0.4, 0.3, 0.2, 0.1),
            (0.8, 0.84, 0.86),
            gradients=800,
            train_size=10000,
            test_size=2000,
            gradient_seconds=0.1,
        ),
        _classifier(
            "cifar-resnet",
            (1.5, 1.0, 0.5, 0.1),
            (0.35, 0.4, 0.45),
            gradients=800,
            train_size=5000,
            test_size=2000,
            gradient_seconds=0.1,
        ),
    ),
    "recurrent": (
        Trial(
            "all-mnist-lstm",
            "mnist-lstm",
            _contenders(_CLASSIFIERS, curvature=250, blocks="modules"),
            gradients=4000,
            records=40,
            tuning=0.25,
            targets=(0.2, 0.15, 0.1, 0.08),
            accuracies=(0.8, 0.9, 0.93),
            gradient_seconds=0.011,
        ),
    ),
    "transformer": (
        Trial(
            "all-shakespeare-transformer",
            "shakespeare-transformer",
            # A sequence costs K-FAC little, and eight of them are too few for its quadratic model.
            _contenders(_CLASSIFIERS, curvature=8, blocks="layers", whole=_ADAPTIVE_KFAC),
            gradients=2500,
            train_size=4000,
            test_size=500,
            records=40,
            tuning=0.25,
            targets=(2.0, 1.7, 1.5, 1.41),
            accuracies=(0.42, 0.45, 0.48),
            gradient_seconds=0.05,
        ),
    ),
}
