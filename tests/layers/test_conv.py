"""Convolutions against patches that loops over output positions cut out, and their gradients."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.layer_models import assert_close, measure_objective, normal


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A convolution with channels last, and a bias."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    padding: str | tuple[tuple[int, int], ...] = "VALID"
    input_dilation: tuple[int, ...] | None = None
    kernel_dilation: tuple[int, ...] | None = None
    groups: int = 1
    channels: int = 2  # per group
    outputs: int = 3  # per group
    batch: int = 2

    def ones(self, given: tuple[int, ...] | None) -> tuple[int, ...]:
        return given or (1,) * len(self.kernel)

    def numbers(self) -> tuple[str, str, str]:
        space = "HWD"[: len(self.kernel)]
        return "N" + space + "C", space + "IO", "N" + space + "C"


GEOMETRIES = {
    "1d": Geometry((6,), (3,)),
    "1d_stride_same": Geometry((7,), (3,), strides=(2,), padding="SAME"),
    "1d_causal_dilated": Geometry((6,), (2,), padding=((2, 0),), kernel_dilation=(2,)),
    "1d_depthwise": Geometry((5,), (2,), groups=3, channels=1, outputs=1),
    "2d_same": Geometry((4, 3), (3, 2), padding="SAME"),
    "2d_strides": Geometry((5, 6), (2, 3), strides=(2, 1)),
    "2d_strides_same": Geometry((5, 4), (3, 3), strides=(2, 2), padding="SAME"),
    "2d_padded": Geometry((3, 4), (2, 3), padding=((1, 2), (0, 1))),
    "2d_cropped": Geometry((5, 5), (2, 2), padding=((-1, 0), (1, -1))),
    "2d_dilated_kernel": Geometry((5, 6), (2, 2), kernel_dilation=(2, 3)),
    "2d_dilated_input": Geometry((3, 3), (2, 2), padding=((1, 1), (1, 0)), input_dilation=(2, 2)),
    "2d_groups": Geometry((4, 4), (2, 2), groups=2),
    "2d_everything": Geometry(
        (4, 5), (2, 3), (2, 1), ((1, 0), (2, 1)), (1, 2), (2, 1), groups=2, channels=1, outputs=2
    ),
    "2d_pointwise": Geometry((2, 3), (1, 1), channels=3),
    "3d": Geometry((3, 3, 4), (2, 1, 2), strides=(1, 2, 1), padding="SAME", channels=1),
    "3d_groups": Geometry((3, 2, 3), (2, 2, 2), groups=2, channels=1, outputs=1),
}


def explicit_padding(geometry: Geometry) -> list[tuple[int, int]]:
    """The padding of "SAME" and "VALID" from their definitions."""
    if not isinstance(geometry.padding, str):
        return list(geometry.padding)
    if geometry.padding == "VALID":
        return [(0, 0)] * len(geometry.kernel)
    pads = []
    for size, kernel, stride in zip(
        geometry.size, geometry.kernel, geometry.ones(geometry.strides), strict=True
    ):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads.append((total // 2, total - total // 2))
    return pads


def dilate_and_pad(x: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Zeros between and around the pixels of ``(batch, space..., channels)``."""
    dilations = geometry.ones(geometry.input_dilation)
    for axis, (dilation, (low, high)) in enumerate(
        zip(dilations, explicit_padding(geometry), strict=True), start=1
    ):
        x = np.moveaxis(x, axis, 0)
        wide = np.zeros(((len(x) - 1) * dilation + 1, *x.shape[1:]), x.dtype)
        wide[::dilation] = x
        wide = wide[max(-low, 0) : len(wide) - max(-high, 0)]
        wide = np.pad(wide, [(max(low, 0), max(high, 0))] + [(0, 0)] * (x.ndim - 1))
        x = np.moveaxis(wide, 0, axis)
    return x


def cut_patches(x: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Patches ``(groups, positions, inputs)``, with inputs ordered (channel, kernel offsets)."""
    x = dilate_and_pad(x, geometry)
    dilations, strides = geometry.ones(geometry.kernel_dilation), geometry.ones(geometry.strides)
    reach = [(k - 1) * d + 1 for k, d in zip(geometry.kernel, dilations, strict=True)]
    starts = [
        range(0, size - r + 1, stride)
        for size, r, stride in zip(x.shape[1:-1], reach, strides, strict=True)
    ]
    result = []
    for group in range(geometry.groups):
        channels = range(group * geometry.channels, (group + 1) * geometry.channels)
        rows = []
        for example, *start in itertools.product(range(len(x)), *starts):
            row = []
            for channel, *offset in itertools.product(channels, *map(range, geometry.kernel)):
                pixel = (s + o * d for s, o, d in zip(start, offset, dilations, strict=True))
                row.append(x[(example, *pixel, channel)])
            rows.append(row)
        result.append(rows)
    return np.array(result)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_against_patches(geometry: Geometry):
    x = normal(geometry.batch, *geometry.size, geometry.groups * geometry.channels)
    outputs = geometry.groups * geometry.outputs
    params = {"w": normal(*geometry.kernel, geometry.channels, outputs), "b": normal(outputs)}

    def objective(p):
        hidden = jax.lax.conv_general_dilated(
            x,
            p["w"],
            geometry.ones(geometry.strides),
            geometry.padding,
            geometry.input_dilation,
            geometry.kernel_dilation,
            geometry.numbers(),
            geometry.groups,
        )
        return jnp.mean(jnp.tanh(hidden + p["b"]) ** 2)

    patches = cut_patches(np.asarray(x), geometry)
    measurement = measure_objective(objective, params)
    (traced,), (measured,) = measurement.traced, measurement.measured
    layer = traced.layer
    assert (layer.kind, layer.stack, traced.uses[0].inputs) == (
        "conv",
        geometry.groups,
        patches.shape[2],
    )
    assert measurement.batch_size == geometry.batch
    assert traced.positions == patches.shape[1]
    np.testing.assert_array_equal(measured.inputs, patches.astype(np.float32))

    ones = np.ones_like(patches[..., :1])
    a = np.concatenate([patches, ones], axis=2)
    gram = np.einsum("sti,stj->sij", a, a)
    assert_close(measured.gram, gram)
    assert_close(measured.gram_product, np.einsum("skj,sij->ski", measured.probe_rows, gram))
    assert_close(measured.mean_input[:, 0], a.mean(axis=1))

    gradient = np.einsum("sti,sto->sio", a, measured.cotangents)
    assert_close(gradient, layer.to_matrix(measurement.gradient))
