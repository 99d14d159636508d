"""How many gradients an update evaluated beyond the one that it was given.

The unit is the gradient of one batch. A forward pass is a third of a gradient, and a product with
the Gauss-Newton matrix, once it is linearized, four thirds.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.blocks import block_labels
from secondorder.objective import Objective
from secondorder.operators import choose_engine
from secondorder.tree.blocks import label_blocks

# `optax.ZoomLinesearchInfo` keeps the number of steps of the last line search under this name. Each
# of them evaluates the value and the gradient once.
_LINESEARCH_STEPS = "num_linesearch_steps"
_FORWARD, _BACKWARD, _PRODUCT = 1 / 3, 2 / 3, 4 / 3
HESSIAN_PRODUCT = 2.0


class Site(NamedTuple):
    """Where an update was done.

    Attributes:
        settings: All settings of the method.
        objective: The objective for the curvature.
        params: The parameters.
    """

    settings: Mapping[str, Any]
    objective: Objective[Any]
    params: Any


class Work(NamedTuple):
    """What the last update evaluated, in gradients of the batches that it was done on.

    Attributes:
        batch: On the batch of the gradient.
        curvature: On the curvature batch, which is the same if there is no other.
    """

    batch: jax.Array | float = 0.0
    curvature: jax.Array | float = 0.0

    def in_gradients(self, curvature_share: float) -> jax.Array:
        """The sum in gradients of one batch.

        Args:
            curvature_share: Samples of a curvature batch per sample of a batch.

        Returns:
            A float32 scalar.
        """
        return jnp.asarray(self.batch + curvature_share * self.curvature, jnp.float32)


def linesearch_gradients(state: optax.OptState) -> jax.Array:
    """Gradients that optax's zoom line search evaluated in the last update.

    Args:
        state: The state of an optimizer after the update.

    Returns:
        A 32-bit integer, 0 where the optimizer has no line search.
    """
    return reported_count(state, _LINESEARCH_STEPS)


def reported_count(state: optax.OptState, name: str) -> jax.Array:
    """The sum of the integers of a name in a state, 0 where there are none."""
    counts = [jnp.sum(count) for count in _reported(state, name)]
    return sum(counts, jnp.zeros((), jnp.int32))


def linesearch_work(state: optax.OptState, site: Site) -> Work:
    """The work of optax's line search, none without one."""
    del site
    return Work(batch=linesearch_gradients(state))


def hessian_free_work(
    state: optax.OptState,
    site: Site,
    *,
    counted: str = "iterations",
    product: float = _PRODUCT,
    evaluation: float = _FORWARD,
    trials: int = 0,
    preconditioner: str | None = None,
) -> Work:
    """The work of a method that solves by products and tries its step, from its metrics.

    It is made of the products, the linearization before them, the probes of a preconditioner, and
    the ``evaluations`` of the objective. Exact solves are not counted.

    Args:
        state: The state of an optimizer after the update.
        site: Where the update was done.
        counted: The metric to take as the number of products, where there are no ``products``.
        product: Gradients that a product costs.
        evaluation: Gradients that an evaluation costs.
        trials: Evaluations in every step that are not in the metrics.
        preconditioner: What the method takes if its settings name none.

    Returns:
        The work.
    """
    settings = site.settings
    given = settings.get("preconditioner", preconditioner)
    probes = settings.get("preconditioner_probes", 1) if given else 0
    return Work(
        batch=evaluation * (reported_count(state, "evaluations") + trials),
        curvature=_FORWARD + _BACKWARD * probes + product * _products(state, settings, counted),
    )


def block_hessian_free_work(state: optax.OptState, site: Site) -> Work:
    """The work of `block_hessian_free`, by the package's own prediction for the engine it took.

    The prediction is a number of forward passes for the setup and one for a product of all blocks.
    The length of the step takes one more product, with the whole matrix.
    """
    blocks = label_blocks(block_labels(site.settings.get("blocks"), site.params), site.params)
    once, twice = (
        jnp.stack(choose_engine(site.objective, site.params, blocks, iterations=count).costs)
        for count in (1, 2)
    )
    engine = reported_count(state, "engine")
    product, setup = (twice - once)[engine], (2 * once - twice)[engine]
    passes = setup + product * reported_count(state, "products")
    whole = _PRODUCT  # along the step, for its length or for what it promises
    return Work(
        batch=_FORWARD * reported_count(state, "evaluations"),
        curvature=_FORWARD * passes + whole,
    )


def levenberg_marquardt_work(state: optax.OptState, site: Site) -> Work:
    """The work of trial steps: one value each, or also its gradient where it is kept."""
    evaluation = 1.0 if site.settings.get("full_batch") else _FORWARD
    return hessian_free_work(state, site, evaluation=evaluation, trials=1)


def low_rank_work(state: optax.OptState, site: Site) -> Work:
    """The work of low-rank saddle-free Newton, whose Hessian is linearized in refreshes only.

    That costs a gradient of the curvature batch, and each product two more.
    """
    del site
    products = reported_count(state, "products")
    return Work(
        batch=_FORWARD * reported_count(state, "evaluations"),
        curvature=jnp.where(products > 0, 1.0, 0.0) + HESSIAN_PRODUCT * products,
    )


def lsr1_work(state: optax.OptState, site: Site) -> Work:
    """The work of L-SR1 at its trial point: the value, and the gradient where it makes a pair."""
    del site
    return Work(batch=_FORWARD + _BACKWARD * reported_count(state, "trial_gradients"))


def quadratic_model_work(state: optax.OptState, site: Site) -> Work:
    """The work of a step from the quadratic model: two thirds of a gradient for each vector.

    Passes of the parts of a direction, each of which starts at its part and takes half of a
    vector's, are spread over the steps between them.
    """
    plane_every = int(site.settings.get("plane_every", 1))
    vectors = 1 + 1 / plane_every
    rates = jax.tree.leaves(optax.tree_utils.tree_get(state, "rates", ()))
    vectors += sum(leaf.size for leaf in rates) / 2 / int(site.settings.get("rates_every", 10))
    trials = _FORWARD * reported_count(state, "evaluations")
    return Work(batch=trials, curvature=_BACKWARD * vectors)


def kfac_work(state: optax.OptState, site: Site) -> Work:
    """The work of K-FAC: the passes back of its cotangents, spread over the steps between them."""
    every = int(site.settings.get("update_every", 1))
    curvature = site.settings.get("curvature", "sampled")
    outputs = jax.eval_shape(site.objective.model, site.params)
    columns = {"sampled": 1, "empirical": 0, "exact": getattr(outputs, "shape", (1,))[-1]}
    passes = _BACKWARD * columns[curvature] / every
    if site.settings.get("learning_rate") is not None:
        return Work(curvature=passes)
    modeled = quadratic_model_work(state, site)
    return modeled._replace(curvature=modeled.curvature + passes)


def kfac_jax_work(state: optax.OptState, site: Site) -> Work:
    """The work of kfac_jax: sampled cotangents, its quadratic model, a value in five steps."""
    work = kfac_work(state, site._replace(settings={"plane_every": 1, "learning_rate": None}))
    return work._replace(batch=_FORWARD / 5)


def sophia_work(state: optax.OptState, site: Site) -> Work:
    """The work of Sophia: a product with the Hessian in a refresh, spread over the steps."""
    del state
    return Work(batch=HESSIAN_PRODUCT / int(site.settings["update_every"]))


def layer_statistics_work(state: optax.OptState, site: Site) -> Work:
    """The work of a method whose products do not depend on the batch, but statistics of it do."""
    return Work(batch=hessian_free_work(state, site).batch, curvature=1.0)


def _products(state: optax.OptState, settings: Mapping[str, Any], counted: str) -> jax.Array:
    """Products in the last update, that of a warm start included."""
    if _reported(state, "products"):
        return reported_count(state, "products")
    most = [jnp.max(count) for count in _reported(state, counted)]
    started = settings.get("warm_start") is not None
    return sum(most, jnp.zeros((), jnp.int32)) + started


def _reported(state: optax.OptState, name: str) -> list[jax.Array]:
    """The integers of a name in the state."""
    found = optax.tree_utils.tree_get_all_with_path(state, name)
    return [jnp.asarray(number, jnp.int32) for _, number in found if number is not None]


def stores_gradient(state: optax.OptState) -> bool:
    """Whether a state keeps the value and the gradient for `optax.value_and_grad_from_state`."""
    return all(optax.tree_utils.tree_get(state, name) is not None for name in ("value", "grad"))
