"""Stand-ins for CURVES and FACES, whose original files are not public any more.

Results on these are not comparable with published figures, and whatever prints them says so.
A recipe is a frozen dataclass of everything that shapes the arrays; the arrays are a pure
function of it, so that it is also the key under which they are cached.
"""

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from benchmarks.data.sources import DataError, cache_folder

ByteArray = NDArray[np.uint8]
Scalar = TypeVar("Scalar", bound=np.generic)

GENERATED_NOTE = "generated, not the papers' files"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all recipes share; ``version`` is raised when the code that draws is changed."""

    train_count: int
    test_count: int
    seed: int = 0
    version: int = 1

    def with_counts(self, train_count: int | None, test_count: int | None) -> Self:
        """The recipe with other numbers of images, where not None."""
        return dataclasses.replace(
            self,
            train_count=train_count or self.train_count,
            test_count=test_count or self.test_count,
        )


@dataclasses.dataclass(frozen=True)
class CurvesRecipe(Recipe):
    """Images of one smooth curve each.

    Three points are drawn uniformly from the square that keeps ``margin`` pixels from the border.
    The parabola that passes through them at times 0, 1/2 and 1 is drawn with a round Gaussian
    pen of width ``pen``: the ink of a pixel is the integral of the pen along the curve by arc
    length, and its intensity ``1 - exp(-ink)`` saturates where strokes overlap. The integral
    makes the line antialiased.

    Attributes:
        size: Height and width in pixels.
        margin: Distance of the three points from the border, in pixels.
        pen: Standard deviation of the pen, in pixels.
        ink: Ink at the center of a straight stroke.
        samples: Points at which the integral is taken; the longest curves that occur must not
            show them as beads, that is, they must stay below about two pens apart.
    """

    train_count: int = 20_000
    test_count: int = 10_000
    size: int = 28
    margin: float = 4.0
    pen: float = 0.7
    ink: float = 4.0
    samples: int = 96


@dataclasses.dataclass(frozen=True)
class FacesRecipe(Recipe):
    """Square patches of the 400 Olivetti faces, varied in scale, orientation, place, contrast.

    After Hinton and Salakhutdinov (Science 313, 2006, supporting material): each 64x64 face is
    rotated by -90 to 90 degrees, and one pixel of a patch spans 1.4 to 1.8 pixels of the face, so
    that the largest patch, 45 pixels wide, just fits into the face at every angle. The room
    that smaller patches leave is used to shift them. Contrast (about the patch's mean) and
    brightness are varied a little. The face is smoothed first with a Gaussian of ``blur`` pixels,
    against aliasing.

    The split is by person: the first 25 people are trained on, the last 10 are the test, and the
    5 between are left out. With 414 patches of each face these are just the 103500, 41400 and
    20700 of the papers' split of their file by position.

    Attributes:
        size: Height and width of a patch in pixels.
        rotation: Largest angle, in degrees.
        smallest_step: Smallest distance of neighboring patch pixels, in face pixels.
        largest_step: Largest such distance.
        contrast: Largest relative change of contrast.
        brightness: Largest change of brightness, where white is 1.
        blur: Standard deviation of the smoothing, in face pixels.
    """

    train_count: int = 103_500
    test_count: int = 41_400
    train_people: int = 25
    test_people: int = 10
    size: int = 25
    rotation: float = 90.0
    smallest_step: float = 1.4
    largest_step: float = 1.8
    contrast: float = 0.2
    brightness: float = 0.05
    blur: float = 0.6


def draw_curves(recipe: CurvesRecipe) -> tuple[ByteArray, ByteArray]:
    """Draws the training and test images of a recipe, ``(count, size, size)`` bytes."""
    rng = np.random.default_rng(recipe.seed)
    counts = (recipe.train_count, recipe.test_count)
    low, high = recipe.margin, recipe.size - 1 - recipe.margin
    parts = (rng.uniform(low, high, (count, 3, 2)) for count in counts)
    train, test = (_in_chunks(points, 2_000, lambda p: _stroke(p, recipe)) for points in parts)
    return train, test


def _stroke(points: NDArray[np.float64], recipe: CurvesRecipe) -> ByteArray:
    """Images of the parabolas through ``points``, ``(count, 3, 2)`` in pixels."""
    time = np.linspace(0.0, 1.0, recipe.samples)
    # Lagrange's polynomials for the times 0, 1/2 and 1.
    basis = np.stack(
        [2 * (time - 0.5) * (time - 1), 4 * time * (1 - time), 2 * time * (time - 0.5)]
    )
    path = np.einsum("npx,pt->ntx", points, basis).astype(np.float32)
    speed = np.linalg.norm(np.gradient(path, axis=1), axis=-1)
    # A Gaussian pen is separable: each sample is an outer product, and the image of a
    # curve is one matrix product over its samples.
    pixels = np.arange(recipe.size, dtype=np.float32)
    profile = np.exp(-0.5 * ((path[:, :, None, :] - pixels[None, None, :, None]) / recipe.pen) ** 2)
    strength = recipe.ink / (np.sqrt(2 * np.pi) * recipe.pen)
    rows = profile[..., 0] * (strength * speed)[:, :, None]
    ink = np.matmul(rows.transpose(0, 2, 1), profile[..., 1])
    return _to_bytes(1 - np.exp(-ink))


def crop_faces(recipe: FacesRecipe, faces: ByteArray) -> tuple[ByteArray, ByteArray]:
    """Crops the training and test patches of a recipe.

    Args:
        recipe: The recipe.
        faces: ``(people, images, height, width)`` upright faces.

    Returns:
        Training and test patches, ``(count, size, size)`` bytes, in random order.
    """
    rng = np.random.default_rng(recipe.seed)
    smooth = scipy.ndimage.gaussian_filter(
        faces.astype(np.float32) / 255, (0, 0, recipe.blur, recipe.blur)
    )
    train, test = smooth[: recipe.train_people], smooth[-recipe.test_people :]
    return (
        _crop_part(rng, train, recipe.train_count, recipe),
        _crop_part(rng, test, recipe.test_count, recipe),
    )


def _crop_part(
    rng: np.random.Generator, faces: NDArray[np.float32], count: int, recipe: FacesRecipe
) -> ByteArray:
    faces = faces.reshape(-1, *faces.shape[2:])
    # Every face equally often (up to one), in random order; few patches are of random faces.
    sources = rng.permutation(np.resize(rng.permutation(len(faces)), count))
    return _in_chunks(sources, 5_000, lambda chunk: _crop(rng, faces, chunk, recipe))


def _crop(
    rng: np.random.Generator,
    faces: NDArray[np.float32],
    sources: NDArray[np.int64],
    recipe: FacesRecipe,
) -> ByteArray:
    """One patch of each of the faces numbered ``sources``."""
    rows, columns = _patch_grid(rng, len(sources), faces.shape[-1], recipe)
    numbers = np.broadcast_to(sources[:, None, None], rows.shape)
    patches = scipy.ndimage.map_coordinates(
        faces, [numbers, rows, columns], order=1, mode="nearest"
    )
    shape = (len(sources), 1, 1)
    gain = rng.uniform(1 - recipe.contrast, 1 + recipe.contrast, shape)
    offset = rng.uniform(-recipe.brightness, recipe.brightness, shape)
    mean = patches.mean(axis=(1, 2), keepdims=True)
    return _to_bytes(mean + gain * (patches - mean) + offset)


def _patch_grid(
    rng: np.random.Generator, count: int, face_size: int, recipe: FacesRecipe
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Row and column of each patch pixel in its face, both ``(count, size, size)``."""
    angle = np.deg2rad(rng.uniform(-recipe.rotation, recipe.rotation, (count, 1, 1)))
    step = rng.uniform(recipe.smallest_step, recipe.largest_step, (count, 1, 1))
    cos, sin = step * np.cos(angle), step * np.sin(angle)
    offsets = np.arange(recipe.size) - (recipe.size - 1) / 2
    down, right = np.meshgrid(offsets, offsets, indexing="ij")
    middle = (face_size - 1) / 2
    # Half the side of the upright box around the turned patch: what is left may be shifted.
    half_box = (recipe.size - 1) / 2 * (np.abs(cos) + np.abs(sin))
    room = np.maximum(middle - half_box, 0)
    row_center, column_center = (middle + room * rng.uniform(-1, 1, room.shape) for _ in range(2))
    rows = row_center + cos * down - sin * right
    columns = column_center + sin * down + cos * right
    return rows.astype(np.float32), columns.astype(np.float32)


def cached(
    recipe: Recipe, build: Callable[[], tuple[ByteArray, ByteArray]]
) -> tuple[ByteArray, ByteArray]:
    """The arrays of a recipe, from the cache folder or built now and kept there.

    Args:
        recipe: Everything that the arrays depend on: the key.
        build: Makes training and test arrays.

    Returns:
        Training and test arrays.
    """
    digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]
    path = cache_folder() / "generated" / f"{type(recipe).__name__}-{digest}.npz"
    if path.is_file():
        try:
            with np.load(path) as arrays:
                return arrays["train"], arrays["test"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} is damaged ({error}); delete it.") from error
    train, test = build()
    _save_atomically(path, train, test)
    return train, test


def _save_atomically(path: Path, train: ByteArray, test: ByteArray) -> None:
    """Writes beside the final name first: two runs may build the same recipe at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".npz")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, train=train, test=test)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _in_chunks(
    items: NDArray[Scalar], size: int, build: Callable[[NDArray[Scalar]], ByteArray]
) -> ByteArray:
    """``build`` over slices of ``items``, so that its temporaries stay small."""
    starts = range(0, len(items), size)
    return np.concatenate([build(items[start : start + size]) for start in starts])


def _to_bytes(intensity: NDArray[np.floating]) -> ByteArray:
    rounded: ByteArray = np.round(255 * np.clip(intensity, 0, 1)).astype(np.uint8)
    return rounded
