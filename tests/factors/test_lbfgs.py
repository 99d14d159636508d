"""The limited-memory inverse against the recursion it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from secondorder.factors import (
    Bookkeeping,
    Pair,
    damp_pair,
    extend_triangle,
    forget_scores,
    init_memory,
    inverse_bfgs_update,
    inverse_matrix,
    inverse_product,
    push_pair,
    write_pair,
)
from tests.factors.factor_oracles import averaged_pairs, bfgs_of, convex_pairs, remember

N, P = 6, 4

push = jax.jit(push_pair, static_argnames="forget")
product = jax.jit(inverse_product)
matrix = jax.jit(inverse_matrix)


def filled(count, seed=0, dtype=None, forget="redundant"):
    """A memory after `count` pairs, and the pairs."""
    pairs = convex_pairs(np.random.default_rng(seed), count, N)
    memory = init_memory(P, N, dtype or jnp.float32)
    for s, y in pairs:
        memory = push(memory, Pair(jnp.asarray(s), jnp.asarray(y)), True, forget=forget)
    return memory, pairs


def books_of(memory):
    return Bookkeeping(memory.triangle_inverse, memory.accepted, memory.numbers)


def test_empty_memory_is_the_identity():
    v = jnp.arange(2.0 * N).reshape(2, N)
    np.testing.assert_array_equal(product(init_memory(P, N), v), v)
    np.testing.assert_array_equal(matrix(init_memory(P, N)), np.eye(N))


@pytest.mark.parametrize("forget", ["redundant", "oldest"])
@pytest.mark.parametrize("memory_size", [1, P])
def test_every_fill_level_and_the_wrap_equal_the_recursion(x64, memory_size, forget):
    rng = np.random.default_rng(1)
    pairs = convex_pairs(rng, 3 * P + 1, N)
    v = rng.standard_normal((3, N))
    memory, kept = init_memory(memory_size, N, jnp.float64), []
    for count, (s, y) in enumerate(pairs, start=1):
        scale = 10.0 ** -(count % 4)  # which pair is redundant does not depend on lengths
        pair = Pair(jnp.asarray(s * scale), jnp.asarray(y * scale))
        memory = push(memory, pair, True, forget=forget)
        kept = remember(kept, (s, y), memory_size, forget)
        expected = bfgs_of(kept, N)
        tolerance = 1e-10 * np.abs(expected).max()
        assert memory.accepted == count
        np.testing.assert_allclose(matrix(memory), expected, rtol=0, atol=tolerance)
        np.testing.assert_allclose(product(memory, v), v @ expected, rtol=0, atol=9 * tolerance)


def test_dense_and_limited_memory_agree_until_the_memory_is_full(x64):
    """K-BFGS and K-BFGS(L) must make the same steps before the first pair is forgotten."""

    @jax.jit
    def advance(h, memory, s, y):
        dense = damp_pair(Pair(s, y), h @ y, damping=0.3, rule="powell_lm")
        limited = damp_pair(
            Pair(s, y), inverse_product(memory, y[None])[0], damping=0.3, rule="powell_lm"
        )
        return inverse_bfgs_update(h, dense), push_pair(memory, limited)

    h, memory = jnp.eye(N), init_memory(P, N, jnp.float64)
    differences = []
    for s, y in averaged_pairs(np.random.default_rng(2), P + 1, N, scale=3.0):
        h, memory = advance(h, memory, jnp.asarray(s), jnp.asarray(y))
        differences.append(np.abs(h - matrix(memory)).max())
    assert max(differences[:P]) < 1e-12
    assert differences[P] > 1e-6


@pytest.mark.parametrize("count", [0, 2, P, P + 3])
@pytest.mark.parametrize("case", ["rejected", "negative", "zero", "nan", "inf", "overflow"])
def test_rejected_pairs_leave_the_memory_bit_identical(count, case):
    memory, _ = filled(count)
    s, y = (jnp.float32(v) for v in convex_pairs(np.random.default_rng(9), 1, N)[0])
    pair = {
        "rejected": Pair(s, y),
        "negative": Pair(s, -y),
        "zero": Pair(0 * s, 0 * y),
        "nan": Pair(s, y.at[2].set(jnp.nan)),
        "inf": Pair(s.at[0].set(jnp.inf), y),
        "overflow": Pair(s * 1e-20, y * 1e20),
    }[case]
    new = push(memory, pair, case != "rejected")
    for old, kept in zip(memory, new, strict=True):
        assert np.asarray(old).tobytes() == np.asarray(kept).tobytes()
    assert push(memory, Pair(s, y), True).accepted == count + 1


@pytest.mark.parametrize("count", range(2 * P + 2))
def test_triangle_is_the_inverse_of_the_kept_products(x64, count):
    """Rows and columns of the stored inverse are slots; sorted by age they invert triu(S Yᵀ)."""
    memory, _ = filled(count, dtype=jnp.float64)
    kept = min(count, P)
    numbers = np.asarray(memory.numbers)
    order = [slot for slot in np.argsort(numbers) if numbers[slot] >= 0]
    assert len(order) == len(set(numbers[order])) == kept
    s, y = np.asarray(memory.s)[order], np.asarray(memory.y)[order]
    triangle = np.asarray(memory.triangle_inverse)
    np.testing.assert_allclose(
        triangle[np.ix_(order, order)] @ np.triu(s @ y.T), np.eye(kept), rtol=0, atol=1e-10
    )
    empty = [slot for slot in range(P) if slot not in order]
    np.testing.assert_array_equal(triangle[empty], np.eye(P)[empty])
    np.testing.assert_array_equal(triangle[:, empty], np.eye(P)[:, empty])


@pytest.mark.parametrize("count", [0, P - 1, P + 2])
def test_pushing_in_two_parts_is_pushing(count):
    """The triangle and the vectors may be extended apart, as is done for many blocks at once."""
    memory, _ = filled(count, forget="oldest")
    s, y = (jnp.float32(v) for v in convex_pairs(np.random.default_rng(5), 1, N)[0])
    unit = Pair(s / jnp.sqrt(s @ y), y / jnp.sqrt(s @ y))
    scores = forget_scores(memory.numbers, None, memory.s @ s, "oldest")
    books, slot = extend_triangle(books_of(memory), memory.s @ unit.y, True, scores)
    np.testing.assert_array_equal(slot, np.arange(P) == count % P)
    assert books.accepted == count + 1
    expected = push(memory, Pair(s, y), True, forget="oldest")
    for new, old in zip((*write_pair(memory, unit, slot), *books), expected, strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "accept"), [(0.0, False), (np.nan, True), (np.inf, True), (np.nan, False)]
)
def test_a_pair_that_is_not_used_leaves_the_triangle_and_has_no_slot(spoil, accept):
    books = books_of(filled(P + 1)[0])
    # Of the pair in slot 1 the product does not matter: that pair is forgotten.
    projections = jnp.ones(P).at[2].add(spoil)
    after, slot = extend_triangle(books, projections, accept, jnp.arange(P) == 1)
    np.testing.assert_array_equal(after.triangle_inverse, books.triangle_inverse)
    np.testing.assert_array_equal(after.numbers, books.numbers)
    assert after.accepted == books.accepted
    assert not slot.any()


@pytest.mark.parametrize("product", [-7.0, np.inf, np.nan])
def test_the_product_with_the_forgotten_pair_does_not_matter(product):
    books, scores = books_of(filled(P + 1)[0]), jnp.arange(P) == 1
    one, _ = extend_triangle(books, jnp.ones(P), True, scores)
    other, slot = extend_triangle(books, jnp.ones(P).at[1].set(product), True, scores)
    np.testing.assert_array_equal(one.triangle_inverse, other.triangle_inverse)
    np.testing.assert_array_equal(slot, np.arange(P) == 1)


def test_secant_equation_after_the_wrap(x64):
    memory, pairs = filled(2 * P + 1, dtype=jnp.float64)
    s, y = pairs[-1]
    np.testing.assert_allclose(product(memory, y[None])[0], s, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("scale", "tolerance"), [(1e-2, 1e-6), (1.0, 1e-6), (1e2, 1e-5)])
def test_float32_is_accurate_on_strongly_correlated_pairs(scale, tolerance):
    """100 kept pairs, each an average with weight 0.9 on the one before."""
    n, memory_size, count = 40, 100, 150
    pairs = averaged_pairs(np.random.default_rng(4), count, n, scale)

    def advance(memory, pair):
        damped = damp_pair(
            pair, inverse_product(memory, pair.y[None])[0], damping=0.5, rule="powell_lm"
        )
        return push_pair(memory, damped, forget="oldest"), damped

    stacked = Pair(*(jnp.float32(np.stack(v)) for v in zip(*pairs, strict=True)))
    memory, damped = jax.jit(lambda m, p: jax.lax.scan(advance, m, p))(
        init_memory(memory_size, n), stacked
    )
    assert memory.accepted == count
    s, y = (np.float64(v) for v in damped)
    cosines = np.sum(s[1:] * s[:-1], 1) / np.linalg.norm(s[1:], axis=1)
    assert np.mean(cosines / np.linalg.norm(s[:-1], axis=1)) > 0.5
    expected = bfgs_of(list(zip(s, y, strict=True))[-memory_size:], n)
    for value in (matrix(memory), product(memory, jnp.eye(n))):
        assert np.linalg.norm(value - expected) < tolerance * np.linalg.norm(expected)
    assert np.linalg.eigvalsh(matrix(memory))[0] > 0.9 * np.linalg.eigvalsh(expected)[0]


def test_dtypes_are_a_fixed_point(x64):
    memory = init_memory(P, N)
    pair = Pair(jnp.ones(N, jnp.float64), jnp.ones(N, jnp.float64))
    before = jax.tree.map(lambda v: (v.shape, v.dtype, v.weak_type), memory)
    after = jax.tree.map(lambda v: (v.shape, v.dtype, v.weak_type), push(memory, pair, True))
    assert before == after


def test_stack_equals_loop():
    memories = [filled(count, seed=count)[0] for count in (0, 3, P, P + 2)]
    stack = jax.tree.map(lambda *v: jnp.stack(v), *memories)
    pairs = convex_pairs(np.random.default_rng(8), 4, N)
    s, y = (jnp.float32(np.stack(v)) for v in zip(*pairs, strict=True))
    accept = jnp.array([True, False, True, True])
    pushed = jax.jit(jax.vmap(push_pair))(stack, Pair(s, y), accept)
    values = jax.jit(jax.vmap(inverse_product))(pushed, s[:, None])
    for k, memory in enumerate(memories):
        one = push(memory, Pair(s[k], y[k]), accept[k])
        assert pushed.accepted[k] == one.accepted
        np.testing.assert_allclose(values[k], product(one, s[k][None]), rtol=1e-4, atol=1e-4)


def test_a_repeated_direction_takes_the_place_of_its_last_pair():
    """Else what the other pairs know would be lost, one by one, to copies of the new one."""
    memory, pairs = filled(P)
    s, y = (jnp.float32(v) for v in pairs[2])
    for scale in (2.0, 3.0, 4.0):
        memory = push(memory, Pair(scale * s, scale * y), True)
        assert memory.numbers[2] == memory.accepted - 1
    np.testing.assert_array_equal(memory.numbers[jnp.array([0, 1, 3])], [0, 1, 3])


def test_forget_scores_rank_empty_slots_first_and_check_the_rule():
    numbers, products = jnp.array([3, -1, 2, -1]), jnp.ones(4)
    for rule, gram in (("oldest", None), ("redundant", jnp.diag(jnp.array([1.0, 0, 1, 0])))):
        assert jnp.argmax(forget_scores(numbers, gram, products, rule)) == 1
    assert jnp.argmax(forget_scores(jnp.array([3, 1, 2, 4]), None, products, "oldest")) == 1
    with pytest.raises(ValueError, match="forget"):
        forget_scores(numbers, None, products, "newest")


def test_memory_size_is_checked():
    with pytest.raises(ValueError, match="memory_size"):
        init_memory(0, N)
