"""The recipes of `docs/checkpoints.md`, and states that do not fit; see also `tests/protocol`."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from chex import assert_trees_all_equal_shapes_and_dtypes as assert_equal_forms
from flax import serialization

import secondorder as so
from tests.pages import run_blocks


def test_recipes_run(tmp_path):
    namespace = {"folder": tmp_path}
    assert list(run_blocks("docs/checkpoints.md", namespace)) == [0, 1]
    run = namespace["init"]()
    for _ in range(4):
        run = namespace["step"](run)
    jax.tree.map(np.testing.assert_array_equal, namespace["run"], run)


def params_of(width):
    return {"w": jnp.ones((width, 2)), "b": jnp.ones(2)}


def layers_of(width):
    x = jnp.ones((4, width))
    return so.find_layers(lambda p: jnp.mean((x @ p["w"] + p["b"]) ** 2), params_of(width))


OTHERS = {
    "parameters": (so.lsr1().init(params_of(3)), so.lsr1().init(params_of(4))),
    "layers": tuple(so.kbfgs(0.1, layers_of(n)).init(params_of(n)) for n in (3, 4)),
    "memory": tuple(so.lsr1(memory_size=n).init(params_of(3)) for n in (2, 3)),
    "rank": tuple(so.low_rank_saddle_free_newton(0.1, rank=n).init(params_of(3)) for n in (2, 3)),
    "schedule": tuple(so.lsr1(update_every=n).init(params_of(3)) for n in (1, 3)),
    "method": (so.lsr1().init(params_of(3)), optax.adam(0.1).init(params_of(3))),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of files
def test_a_state_that_does_not_fit_is_refused(kind, tmp_path):
    saved, target = OTHERS[kind]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match=r"shape|mismatch|match"):
            checkpointer.restore(tmp_path / "state", target)
    data = serialization.to_bytes(saved)
    with pytest.raises((AssertionError, AttributeError, ValueError), match=r"shapes|keys|match"):
        assert_equal_forms(serialization.from_bytes(target, data), target)
    gc.collect()  # so that what Orbax left open is noticed, and ignored, here
