"""The generated data sets: shape, range, determinism, geometry and the cache."""

import dataclasses

import numpy as np
import pytest

from benchmarks import data
from benchmarks.data import generated
from benchmarks.data.generated import CurvesRecipe, FacesRecipe
from benchmarks.data.sources import DataError, DataOptions

SMALL_CURVES = CurvesRecipe(train_count=300, test_count=50)
SMALL_FACES = FacesRecipe(train_count=300, test_count=120)


@pytest.fixture
def faces():
    """Every face has the gray level of its person, so that patches tell whose they are."""
    people = np.arange(40, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(40 + 4 * people, (40, 10, 64, 64)).copy()


class TestCurves:
    def test_shape_and_range(self):
        train, test = generated.draw_curves(SMALL_CURVES)
        assert train.shape == (300, 28, 28)
        assert test.shape == (50, 28, 28)
        assert train.dtype == np.uint8
        # Every image shows a saturated stroke on an empty ground.
        assert np.all(train.max(axis=(1, 2)) > 230)
        assert np.all(np.mean(train == 0, axis=(1, 2)) > 0.4)

    def test_deterministic_by_seed(self):
        train, test = generated.draw_curves(SMALL_CURVES)
        again, _ = generated.draw_curves(SMALL_CURVES)
        other, _ = generated.draw_curves(dataclasses.replace(SMALL_CURVES, seed=1))
        np.testing.assert_array_equal(train, again)
        assert not np.array_equal(train, other)
        assert not np.array_equal(train[:50], test)

    def test_stroke_passes_through_its_points(self):
        points = np.array([[[5.0, 5.0], [20.0, 12.0], [8.0, 21.0]]])
        image = generated._stroke(points, SMALL_CURVES)[0]
        for row, column in points[0].astype(int)[1:2]:
            assert image[row, column] > 200
        for row, column in points[0].astype(int)[[0, 2]]:  # The pen is half off at an end.
            assert image[row, column] > 100

    def test_stroke_has_no_beads(self):
        """The longest curve that occurs is as even along its length as a short one."""
        low, high = SMALL_CURVES.margin, 27 - SMALL_CURVES.margin
        points = np.array([[[low, 10.0], [high, 10.5], [low, 11.0]]])
        image = generated._stroke(points, SMALL_CURVES)[0].astype(int)
        column = image[int(low) + 4 : int(high) - 4].max(axis=1)
        assert column.max() - column.min() < 12


class TestFaces:
    def test_shape_and_determinism(self, faces):
        train, test = generated.crop_faces(SMALL_FACES, faces)
        again, _ = generated.crop_faces(SMALL_FACES, faces)
        assert train.shape == (300, 25, 25)
        assert test.shape == (120, 25, 25)
        np.testing.assert_array_equal(train, again)

    def test_people_are_not_shared(self, faces):
        recipe = dataclasses.replace(SMALL_FACES, contrast=0.0, brightness=0.0)
        train, test = generated.crop_faces(recipe, faces)
        assert set(np.unique(train)) == {40 + 4 * person for person in range(25)}
        assert set(np.unique(test)) == {40 + 4 * person for person in range(30, 40)}

    def test_patches_stay_inside_the_face(self):
        rows, columns = generated._patch_grid(np.random.default_rng(0), 2000, 64, SMALL_FACES)
        for grid in (rows, columns):
            assert grid.min() > -1e-3
            assert grid.max() < 63 + 1e-3

    def test_neighbors_are_one_step_apart(self):
        rows, columns = generated._patch_grid(np.random.default_rng(0), 100, 64, SMALL_FACES)
        steps = np.hypot(np.diff(rows, axis=1), np.diff(columns, axis=1))
        assert steps.min() == pytest.approx(1.4, abs=0.05)
        assert steps.max() == pytest.approx(1.8, abs=0.05)

    def test_loader_standardises_by_the_training_part(self, data_folder):
        splits = data.faces(DataOptions(data_folder, train_size=500, test_size=100))
        assert splits.train.inputs.shape == (500, 25, 25)
        np.testing.assert_allclose(splits.train.inputs.mean(axis=0), 0, atol=1e-5)
        assert np.mean(splits.train.inputs.var(axis=0)) == pytest.approx(1, rel=1e-4)


class TestCache:
    def test_built_once_per_recipe(self):
        built = []

        def build():
            built.append(1)
            return np.zeros((2, 3, 3), np.uint8), np.ones((1, 3, 3), np.uint8)

        for recipe in (SMALL_CURVES, SMALL_CURVES, dataclasses.replace(SMALL_CURVES, seed=3)):
            train, test = generated.cached(recipe, build)
            assert (train.sum(), test.sum()) == (0, 9)
        assert len(built) == 2

    def test_damaged_file(self, tmp_path):
        generated.cached(SMALL_CURVES, lambda: (np.zeros(1, np.uint8),) * 2)
        (file,) = (tmp_path / "cache").rglob("*.npz")
        file.write_bytes(b"damaged")
        with pytest.raises(DataError, match=r"is damaged .* delete it"):
            generated.cached(SMALL_CURVES, lambda: pytest.fail("must not be called"))
