"""Discovery, probes and statistics on every model of the table."""

import numpy as np
import pytest

from tests.layers.layer_models import CASES, Case, Expected, assert_close, measure

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
def test_finds_the_layers(case: Case):
    measurement = measure(case.name)
    layers = measurement.layers
    paths = [leaf.path for leaf in layers.leaves]
    found = {
        Expected(
            paths[traced.layer.weight],
            traced.layer.kind,
            None if traced.layer.bias is None else paths[traced.layer.bias],
            traced.layer.weight_view.shape,
            traced.positions,
            len(traced.uses),
            len(traced.tied),
        )
        for traced in measurement.traced
    }
    assert found == set(case.layers)
    assert [paths[leaf] for leaf, _ in layers.unassigned] == list(case.rest)
    assert measurement.batch_size == case.batch_size
    usages = [(u.uses, u.tied, u.positions * case.batch_size) for u in layers.usages]
    traced = measurement.traced
    assert usages == [(len(t.uses), len(t.tied), t.positions) for t in traced]


@every_case
def test_gradients_are_products_of_inputs_and_cotangents(case: Case):
    measurement = measure(case.name)
    np.testing.assert_allclose(measurement.tape_value, measurement.value, rtol=case.tolerance)
    for traced, measured in zip(measurement.traced, measurement.measured, strict=True):
        layer = traced.layer
        assert measured.inputs.shape == (layer.stack, traced.positions, layer.weight_view.shape[1])
        assert measured.cotangents.shape == (layer.stack, traced.positions, layer.outputs)
        weight = np.einsum("sti,sto->sio", measured.inputs, measured.cotangents)
        expected = layer.weight_view.apply(measurement.gradient[layer.weight])
        assert np.any(expected != 0)
        assert_close(weight + measured.tied_gradient, expected, case.tolerance)
        if layer.bias is not None:
            expected = layer.bias_view.apply(measurement.gradient[layer.bias])
            assert_close(measured.cotangents.sum(axis=1), expected, case.tolerance)


@every_case
def test_statistics(case: Case):
    measurement = measure(case.name)
    m = measurement.batch_size
    for traced, measured in zip(measurement.traced, measurement.measured, strict=True):
        layer, count = traced.layer, traced.positions
        a, g = measured.inputs, measured.cotangents
        if layer.bias is not None:
            a = np.concatenate([a, np.ones_like(a[..., :1])], axis=-1)
        gram = np.einsum("sti,stj->sij", a, a)
        diagonal = np.einsum("sii->si", gram)
        assert_close(measured.mean_input[:, 0], a.mean(axis=1))
        assert_close(measured.output_means[:, 0], measured.outputs.mean(axis=1))
        assert_close(measured.output_means[:, 1], g.sum(axis=1) / (count / m))
        assert_close(measured.gram, diagonal if layer.diagonal_input else gram)
        expected = np.einsum("skj,sij->ski", measured.probe_rows, gram)
        assert_close(measured.gram_product, expected)
        inputs, outputs = measured.eigenvalues
        assert_close(inputs, diagonal.sum(axis=1) / (m * layer.inputs))
        per_example = (m * g) ** 2
        assert_close(outputs, per_example.sum(axis=(1, 2)) / (count * layer.outputs))


@every_case
def test_matrix_form_is_invertible(case: Case):
    measurement = measure(case.name)
    leaves = [np.asarray(leaf, np.float32) for leaf in measurement.gradient]
    for layer in measurement.layers.layers:
        matrix = layer.to_matrix(leaves)
        assert matrix.shape == (layer.stack, layer.inputs, layer.outputs)
        back = layer.from_matrix(matrix)
        assert set(back) == set(layer.leaves)
        for index, array in back.items():
            np.testing.assert_array_equal(array, leaves[index])
