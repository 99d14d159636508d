"""`Objective`, its two forms, and the checks of what ``update`` receives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import secondorder as so
from secondorder import objective as room

X = jnp.arange(6.0).reshape(3, 2)
CALL = "tx.update(grads, state, params, value=value, grad=grads, value_fn=objective)"


def split() -> so.Objective:
    return so.Objective(lambda w: X @ w, lambda z: jnp.mean(z**2))


def split_with_aux() -> so.Objective:
    def model(w):
        z = X @ w
        return z, {"mean": jnp.mean(z)}

    return so.Objective(model, lambda z: jnp.mean(z**2), has_aux=True)


def test_objective_is_loss_of_model():
    w = jnp.array([1.0, -2.0])
    value, grad = jax.value_and_grad(split())(w)
    np.testing.assert_allclose(value, np.mean((X @ w) ** 2), rtol=1e-6)
    np.testing.assert_allclose(grad, 2 / 3 * X.T @ (X @ w), rtol=1e-6)


def test_objective_with_aux():
    w = jnp.array([1.0, -2.0])
    (value, aux), grad = jax.value_and_grad(split_with_aux(), has_aux=True)(w)
    np.testing.assert_allclose(value, split()(w), rtol=1e-6)
    np.testing.assert_allclose(aux["mean"], np.mean(X @ w), rtol=1e-6)
    np.testing.assert_allclose(grad, jax.grad(split())(w), rtol=1e-6)


def test_objective_is_hashable_and_immutable():
    objective = split()
    assert {objective: 1}[objective] == 1
    assert objective != split()
    with pytest.raises(AttributeError):
        objective.has_aux = True


@pytest.mark.parametrize(("name", "arguments"), [("model", (1, jnp.sum)), ("loss", (jnp.sum, X))])
def test_objective_needs_two_callables(name, arguments):
    with pytest.raises(TypeError, match=rf"`{name}` must be callable.*so\.Objective\(lambda p:"):
        so.Objective(*arguments)


def plain(w):
    return split()(w)


@pytest.mark.parametrize(
    "form",
    [plain, split(), split_with_aux(), lambda w: (plain(w), None), lambda w: (plain(w), [w])],
    ids=["plain", "split", "split_with_aux", "aux_none", "aux"],
)
def test_value_and_grad_of_every_form(form):
    w = jnp.array([0.5, 1.5])
    value, grad = jax.jit(lambda w: room.value_and_grad(form, w))(w)
    expected_value, expected_grad = jax.value_and_grad(plain)(w)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-6)


def test_value_and_aux():
    assert room.value_and_aux(plain)(jnp.ones(2))[1] is None
    value, aux = room.value_and_aux(split_with_aux())(jnp.ones(2))
    assert value.shape == ()
    assert set(aux) == {"mean"}


@pytest.mark.parametrize(
    "value",
    [jnp.ones(3), jnp.ones((1,)), jnp.array(1), jnp.array(True), jnp.array(1j)],
    ids=["vector", "one_element", "integer", "boolean", "complex"],
)
def test_value_must_be_a_real_scalar(value):
    with pytest.raises(TypeError, match=r"some_method: .* one real scalar, .* jnp\.mean"):
        room.check_value(value, "some_method")
    with pytest.raises(TypeError, match="one real scalar"):
        room.value_and_aux(lambda _: value)(X)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_real_scalars_pass(dtype):
    room.check_value(jax.ShapeDtypeStruct((), dtype), "some_method")


def message(check, *arguments) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        check(*arguments)
    return f"{caught.type.__name__}: {caught.value}"


def test_messages_show_the_call_to_write():
    cases = {
        message(room.check_params, None, "kbfgs"): ("ValueError", "`params`", CALL),
        message(room.check_value_fn, None, "kbfgs"): ("ValueError", "`value_fn`", CALL),
        message(room.check_value_fn, 1.0, "kbfgs"): ("TypeError", "`value_fn`", "float", CALL),
        message(room.check_value_fn, None, "kbfgs", "curvature_fn"): ("`curvature_fn`", CALL),
        message(room.check_split, None, "kbfgs"): ("ValueError", "`value_fn`", CALL),
        message(room.check_split, plain, "kbfgs"): ("TypeError", "so.Objective(lambda p: model"),
        message(room.check_split, plain, "kbfgs", "curvature_fn"): ("pass it as `curvature_fn`",),
    }
    for text, parts in cases.items():
        assert "kbfgs" in text
        for part in parts:
            assert part in text


def test_checks_pass():
    room.check_params({}, "kbfgs")
    room.check_value_fn(plain, "kbfgs")
    room.check_value_fn(split(), "kbfgs")
    room.check_split(split(), "kbfgs")


FINITE = {
    "empty": {},
    "none": {"a": None},
    "floats": [jnp.ones((2, 3)), jnp.array(-1e30), jnp.ones(2, jnp.bfloat16)],
    "integers": {"steps": jnp.arange(3), "flag": jnp.array(True), "w": jnp.ones(2)},
    "large_integers": jnp.full((4,), 2**31 - 1, jnp.int32),
    "no_elements": jnp.ones((0, 3)),
}


@pytest.mark.parametrize("name", FINITE)
def test_all_finite_is_true(name):
    finite = jax.jit(room.all_finite)(FINITE[name])
    assert finite.shape == ()
    assert finite.dtype == bool
    assert finite


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_finite_is_false(bad, dtype):
    tree = {"a": jnp.ones(3), "b": [jnp.zeros((2, 2), dtype).at[0, 1].set(bad)]}
    assert not room.all_finite(tree)


def test_all_finite_sees_infinities_that_cancel():
    assert not room.all_finite([jnp.array(jnp.inf), jnp.array(-jnp.inf)])
    assert not room.all_finite(jnp.array([jnp.inf, -jnp.inf]))


def test_all_finite_in_double_precision(x64):
    """Values beyond float32 are finite in float64."""
    assert room.all_finite({"large": jnp.array(1e300), "small": jnp.ones(2, jnp.float32)})
    assert not room.all_finite(jnp.array([1e300, jnp.nan]))
