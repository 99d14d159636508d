"""The choice of an engine: predicted costs against XLA's counts, and a table of cases."""

import math

import jax.numpy as jnp
import pytest

import secondorder as so
from secondorder.operators.block_diagonal import block_gauss_newton
from secondorder.operators.dual import dual_solve
from secondorder.operators.engine import (
    ENGINES,
    choose_engine,
    engine_costs,
    engine_memory,
    measure_workload,
)
from secondorder.operators.factored import factor_gauss_newton, trace_or_reason
from secondorder.tree.blocks import label_blocks, one_block
from tests.operators.factored_models import build, deep_mlp, flops, product_cost
from tests.operators.operator_models import normal


def workload(objective, params, blocks=None):
    trace, _ = trace_or_reason(objective, params)
    return measure_workload(trace, blocks or label_blocks(None, params))


@pytest.mark.parametrize("depth", [2, 5])
def test_predicts_what_xla_counts(depth):
    objective, params = deep_mlp(depth, 128, 16, 10, inputs=256)
    load = workload(objective, params)
    first, second = engine_costs(load, 1), engine_costs(load, 2)
    blocks = label_blocks(None, params)
    for name, make in {
        "linearized": lambda p: block_gauss_newton(objective, p, blocks),
        "factored": lambda p: factor_gauss_newton(objective, p).operator(blocks),
    }.items():
        product, setup = product_cost(make, objective, params)
        predicted = getattr(second, name) - getattr(first, name)
        assert predicted == pytest.approx(product, rel=0.1)
        assert getattr(first, name) - predicted == pytest.approx(setup, rel=0.25)


def test_predicts_the_cost_of_the_gram_matrices():
    """Of the decomposition XLA counts nothing: it is a call of a library."""
    objective, params = deep_mlp(3, 128, 32, 10, inputs=256)
    blocks, load = label_blocks(None, params), workload(*deep_mlp(3, 128, 32, 10, inputs=256))
    counted = flops(
        lambda p, b: dual_solve(factor_gauss_newton(objective, p), b, 0.1, blocks), params, params
    ) / flops(objective.model, params)
    rows = load.cases * load.columns
    total = sum(2 * load.cases * use.parameters for use in load.uses)
    predicted = engine_costs(load, 1).dual - load.blocks * rows**3 / 3 / total
    assert predicted == pytest.approx(counted, rel=0.25)


# Depth, width, cases, outputs, iterations: which engine.
TABLE = [
    (8, 512, 128, 10, 30, "dual"),
    (8, 512, 256, 10, 30, "factored"),
    (8, 512, 512, 10, 30, "factored"),
    (8, 512, 512, 10, 1, "linearized"),
    (16, 512, 512, 10, 2, "factored"),
    (3, 512, 512, 10, 2, "linearized"),
    (3, 512, 512, 10, 30, "factored"),
    (8, 256, 64, 256, 30, "linearized"),
    (3, 512, 8, 1, 1, "factored"),
]


@pytest.mark.parametrize(("depth", "width", "cases", "outputs", "iterations", "engine"), TABLE)
def test_table(depth, width, cases, outputs, iterations, engine):
    objective, params = deep_mlp(depth, width, cases, outputs)
    choice = choose_engine(objective, params, label_blocks(None, params), iterations=iterations)
    assert choice.engine == engine
    assert choice.code == ENGINES.index(engine)
    assert choice.costs[choice.code] == min(
        cost for cost, held in zip(choice.costs, choice.memory, strict=True) if held <= 2**30
    )


def test_costs_are_those_of_the_specification():
    """Eight layers of 512 units with 10 outputs; published counts in forward passes."""
    for cases, dual in ((128, 45), (256, 100), (512, 275)):
        objective, params = deep_mlp(8, 512, cases, 10, inputs=784)
        costs = engine_costs(workload(objective, params), 30)
        assert costs.dual == pytest.approx(dual, rel=0.15)
        assert costs.factored == pytest.approx(73, rel=0.05)
        assert costs.linearized == pytest.approx(237, rel=0.05)


def test_one_block_costs_what_a_full_product_does():
    objective, params = deep_mlp(4, 64, 8, 64)
    load = workload(objective, params, one_block(params))
    product = engine_costs(load, 2).linearized - engine_costs(load, 1).linearized
    assert product == pytest.approx(4 - 2 / 4)


def test_recurrent_layers_pass_their_own_tangents():
    objective, params = build("lstm")
    load = workload(objective, params, one_block(params))
    product = engine_costs(load, 2).linearized - engine_costs(load, 1).linearized
    assert product == pytest.approx(4)
    assert not any(use.alone and use.positions == 1 for use in load.uses[:2])


def test_memory_limits_the_choice_and_is_named():
    objective, params = deep_mlp(8, 512, 128, 10)
    blocks = label_blocks(None, params)
    choices = [
        choose_engine(objective, params, blocks, iterations=30, memory_limit=limit)
        for limit in (2**30, 2**25, 2**10)
    ]
    assert [choice.engine for choice in choices] == ["dual", "factored", "linearized"]
    assert choices[0].reason == ""
    assert "'dual' would hold" in choices[1].reason
    assert "'factored'" in choices[2].reason
    memory = engine_memory(workload(objective, params))
    assert memory.factored == 4 * 1280 * (7 * 512 + 10)


def test_only_among_the_given_engines():
    objective, params = deep_mlp(8, 512, 128, 10)
    blocks = label_blocks(None, params)
    choice = choose_engine(
        objective, params, blocks, iterations=30, among=("linearized", "factored")
    )
    assert choice.engine == "factored"
    with pytest.raises(ValueError, match="among"):
        choose_engine(objective, params, blocks, iterations=30, among=("magic",))
    with pytest.raises(ValueError, match="iterations"):
        choose_engine(objective, params, blocks, iterations=0)


def test_falls_back_with_the_reason():
    x = normal(4, 3)
    objective = so.Objective(lambda p: (x @ p["w"]) * p["s"], lambda z: jnp.mean(z**2))
    params = {"w": normal(3, 2), "s": normal(2)}
    choice = choose_engine(objective, params, label_blocks(lambda p: p, params), iterations=10)
    assert (choice.engine, choice.trace) == ("linearized", None)
    assert choice.reason == "the parameter 's' goes into `mul`"
    assert choice.costs == (31, math.inf, math.inf)
    one = choose_engine(objective, params, one_block(params), iterations=10)
    assert one.costs.linearized == 41
