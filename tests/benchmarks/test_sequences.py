"""The networks on sequences, the residual net, and the data that they are given."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import data, networks, sequences
from benchmarks.data import DataError, DataOptions, Split, Splits
from benchmarks.data.formats import _ArrayUnpickler
from benchmarks.problems import PROBLEMS
from tests.benchmarks.data_files import write_cifar, write_shakespeare


def test_lstm_is_its_recurrence():
    """Two layers, step by step in numpy."""
    params = sequences.init_lstm_stack(jax.random.key(0), 3, (4, 5), 2)
    inputs = np.random.default_rng(0).standard_normal((2, 6, 3))

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    rows = [inputs[:, t] for t in range(6)]
    for layer in params[:-1]:
        hidden = cell = np.zeros((2, layer["recurrent"].shape[0]))
        for t, row in enumerate(rows):
            gates = row @ layer["input"] + hidden @ layer["recurrent"] + layer["bias"]
            enter, keep, new, leave = np.split(np.asarray(gates), 4, axis=-1)
            cell = sigmoid(keep) * cell + sigmoid(enter) * np.tanh(new)
            hidden = sigmoid(leave) * np.tanh(cell)
            rows[t] = hidden
    expected = rows[-1] @ params[-1]["kernel"] + params[-1]["bias"]
    outputs = jax.jit(sequences.apply_lstm_stack)(params, jnp.asarray(inputs, jnp.float32))
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def test_transformer_does_not_look_ahead():
    params = sequences.init_transformer(jax.random.key(0), 7, 8, width=16, depth=2)
    apply = jax.jit(lambda characters: sequences.apply_transformer(params, characters, heads=2))
    characters = jnp.arange(8)[None] % 7
    changed = characters.at[0, 5].set(6)
    before, after = apply(characters), apply(changed)
    np.testing.assert_allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert np.abs(before - after)[:, 5:].max(axis=-1).min() > 1e-4
    np.testing.assert_allclose(apply(characters[:, :3]), before[:, :3], atol=1e-6)


def test_transformer_is_linearized_and_transposed():
    """Products with the Gauss-Newton matrix need both of its attention."""
    params = sequences.init_transformer(jax.random.key(0), 7, 8, width=16, depth=1)
    characters = jnp.arange(16).reshape(2, 8) % 7
    outputs, push = jax.linearize(
        lambda p: sequences.apply_transformer(p, characters, heads=2), params
    )
    (pulled,) = jax.linear_transpose(push, params)(jnp.ones_like(outputs))
    expected = jax.grad(lambda p: sequences.apply_transformer(p, characters, heads=2).sum())(params)
    for ours, plain in zip(jax.tree.leaves(pulled), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


def test_residual_block_keeps_the_shortcut():
    block = networks.ResidualBlock(4)
    images = jnp.abs(jax.random.normal(jax.random.key(0), (2, 6, 6, 4)))
    params = jax.tree.map(jnp.zeros_like, block.init(jax.random.key(1), images))
    np.testing.assert_array_equal(block.apply(params, images), images)
    assert networks.ResidualBlock(8, stride=2).init_with_output(jax.random.key(1), images)[
        0
    ].shape == (2, 3, 3, 8)


def test_average_pooling():
    images = np.arange(32, dtype=np.float32).reshape(2, 4, 4, 1)
    part = Split(images, np.zeros(2, np.int32))
    pooled = Splits(part, part).average_pooled(2).train
    np.testing.assert_allclose(pooled.inputs[0], [[2.5, 4.5], [10.5, 12.5]])
    assert pooled.labels is part.labels


def test_windows_of_shakespeare(tmp_path):
    text = write_shakespeare(tmp_path)
    splits = data.shakespeare(DataOptions(tmp_path))
    characters = np.array(sorted(set(text)))
    assert splits.train.inputs.shape == (29, 64)  # of 1890 characters
    assert splits.test.inputs.shape == (3, 64)
    for part, where in ((splits.train, text[:1890]), (splits.test, text[1890:])):
        starts = set()
        for inputs, labels in zip(part.inputs, part.labels, strict=True):
            window = "".join(characters[inputs]) + characters[labels[-1]]
            np.testing.assert_array_equal(inputs[1:], labels[:-1])
            starts.add(where.index(window) // 64)
        assert starts == set(range(len(part)))
    assert len(data.shakespeare(DataOptions(tmp_path, train_size=5)).train) == 5


def test_text_that_is_not_shakespeare(tmp_path):
    write_shakespeare(tmp_path)
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("too short")
    with pytest.raises(DataError, match="not Tiny Shakespeare"):
        data.shakespeare(DataOptions(tmp_path))


def test_batches_of_cifar(tmp_path):
    written = write_cifar(tmp_path)
    splits = data.cifar10(DataOptions(tmp_path, test_size=4))
    assert splits.train.inputs.shape == (30, 32, 32, 3)
    images, labels = written["data_batch_2"]
    np.testing.assert_allclose(splits.train.inputs[6:12], images / 255, rtol=1e-6)
    np.testing.assert_array_equal(splits.train.labels[6:12], labels)
    np.testing.assert_array_equal(splits.test.labels, written["test_batch"][1][:4])
    assert len(data.cifar10(DataOptions(tmp_path, train_size=3)).train) == 3


def test_archive_that_is_not_cifar(tmp_path):
    path = tmp_path / "cifar10" / "cifar-10-python.tar.gz"
    path.parent.mkdir()
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="not an intact archive of CIFAR-10"):
        data.cifar10(DataOptions(tmp_path))


def test_pickles_may_hold_nothing_but_arrays(tmp_path):
    (tmp_path / "p").write_bytes(pickle.dumps(print))
    with (tmp_path / "p").open("rb") as file, pytest.raises(pickle.UnpicklingError, match="names"):
        _ArrayUnpickler(file).load()


def test_accuracy_counts_positions(tmp_path):
    from benchmarks.evaluation import Evaluator
    from benchmarks.problems import Batch

    write_shakespeare(tmp_path)
    problem = PROBLEMS["shakespeare-transformer"]
    part = problem.load(DataOptions(tmp_path)).test
    params = jax.jit(problem.init)(jax.random.key(0))
    metrics = Evaluator(problem)(params, Batch.put(part))
    guesses = np.argmax(jax.jit(problem.model)(params, part.inputs), axis=-1)
    assert metrics.accuracy == pytest.approx(np.mean(guesses == part.labels))
