"""Shardings of what a method computes and keeps, under any mesh.

Under Auto axes the compiler chooses, and these functions do nothing. Under Explicit axes every
array's type carries its sharding, and an operation that would have to guess raises: there the
small dense algebra is replicated, and updates get the sharding of their parameter back.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

try:
    from jax.sharding import reshard as reshard
except ImportError:  # JAX < 0.7
    from jax.experimental.shard import reshard as reshard  # type: ignore[no-redef]


def state_shardings(tx: optax.GradientTransformation, params: Any) -> Any:
    """The shardings of an optimizer's state, from those of the parameters.

    What is like the parameters, such as a momentum, is sharded as they are; a stack of such vectors
    too, with whole vectors on the leading axis. Kronecker factors of layers of equal shape are
    split over the devices that divide their number. All else is small, and on every device. This
    is what ``tx.init`` makes of parameters on an Explicit mesh, so that it holds for any transform.

    Args:
      tx: Any optimizer.
      params: The parameters, or `jax.ShapeDtypeStruct` of them with ``sharding``. All on one mesh
        of Auto or Explicit axes; leaves without a mesh count as replicated.

    Returns:
      A pytree like ``tx.init(params)``, of `jax.sharding.NamedSharding` on that mesh: for
      ``jax.jit(tx.init, out_shardings=...)``, for the state that a compiled step takes and returns,
      and for a state that is restored from a checkpoint.

    Raises:
      ValueError: If no parameter is on a mesh, or if they are on several.

    Example:
      >>> import jax, optax
      >>> import secondorder as so
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None))
      >>> weight = jax.ShapeDtypeStruct((4, 2), "float32", sharding=place)
      >>> shardings = so.state_shardings(so.lsr1(memory_size=3), weight)
      >>> tuple(shardings.memory.vectors[0].spec)
      (None, 'data', None)
    """
    mesh = _common_mesh(params)
    kinds = (AxisType.Explicit,) * len(mesh.axis_names)
    explicit = Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)

    def typed(leaf: Any) -> jax.ShapeDtypeStruct:
        given = getattr(leaf, "sharding", None)
        spec = given.spec if isinstance(given, NamedSharding) else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(explicit, spec))

    with _enter_mesh(explicit):
        state = jax.eval_shape(tx.init, jax.tree.map(typed, params))

    def place(leaf: Any) -> NamedSharding:
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return NamedSharding(mesh, spec)

    return jax.tree.map(place, state)


def _common_mesh(params: Any) -> Mesh:
    """The mesh on which all parameters are."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    meshes = {sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)}
    if len(meshes) != 1:
        raise ValueError(
            f"state_shardings needs parameters on one mesh, but these are on {len(meshes)}. Put "
            "them there: jax.device_put(params, jax.sharding.NamedSharding(mesh, spec)), or give "
            "jax.ShapeDtypeStruct(shape, dtype, sharding=...)."
        )
    mesh = meshes.pop()
    if not isinstance(mesh, Mesh):
        raise ValueError(
            "state_shardings needs a jax.sharding.Mesh of devices, not an abstract one."
        )
    return mesh


def _enter_mesh(mesh: Mesh) -> AbstractContextManager[Any]:
    """Makes a mesh the present one; the name of it changed after JAX 0.6."""
    enter = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh  # type: ignore[attr-defined]
    return enter(mesh)


def _mesh(array: jax.Array) -> Any:
    """The mesh in an array's type, or None."""
    mesh = getattr(getattr(jax.typeof(array), "sharding", None), "mesh", None)
    return None if mesh is None or mesh.empty else mesh


def mesh_of(tree: Any) -> Any:
    """The mesh that a tree of arrays is on, as their types or else the context say.

    Args:
      tree: A pytree of arrays.

    Returns:
      An abstract mesh, or None.

    Example:
      >>> import jax.numpy as jnp
      >>> mesh_of(jnp.ones(2)) is None
      True
    """
    meshes = (_mesh(leaf) for leaf in jax.tree.leaves(tree))
    present = jax.sharding.get_abstract_mesh()
    return next((mesh for mesh in meshes if mesh is not None), None if present.empty else present)


def _explicit(array: jax.Array) -> Any:
    """The sharding in an array's type, or None outside an Explicit mesh."""
    mesh, explicit = _mesh(array), AxisType.Explicit
    if mesh is None or all(kind != explicit for kind in mesh.axis_types):
        return None
    return jax.typeof(array).sharding


def check_sees_batch(method: str, params: Any) -> None:
    """Raises inside `jax.shard_map` where each device has other examples and the same parameters.

    A gradient is right there, as its sum over devices is the objective's own. Statistics of
    examples that are no gradients would be those of one device. Only where JAX follows what varies
    over devices, ``check_vma=True``: without, gradients are those of one device too.

    Args:
      method: Name of what needs the statistics, for messages.
      params: The parameters.

    Raises:
      ValueError: If they do not vary over all axes that are mapped. Where each device trains a
        model of its own they do.

    Example:
      >>> import jax.numpy as jnp
      >>> check_sees_batch("kbfgs", jnp.ones(2))
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    mapped = {name for name, kind in kinds if kind == AxisType.Manual}
    followed = {name for name in mapped if _varying_axes(jax.lax.axis_index(name))}
    if followed - set().union(*map(_varying_axes, jax.tree.leaves(params))):
        raise ValueError(
            f"{method} needs statistics of the whole batch, but inside jax.shard_map each device "
            "has those of its own examples. Use jax.jit with sharded arrays instead: "
            "docs/sharding.md. For one model on each device map with check_vma=False."
        )


def _varying_axes(array: jax.Array) -> Any:
    """The mapped axes over which an array varies; the name of it changed after JAX 0.6."""
    kind = jax.typeof(array)
    since = getattr(kind, "manual_axis_type", None)
    return getattr(kind, "vma", ()) if since is None else since.varying


def sum_of_parts(array: jax.Array, params: Any) -> jax.Array:
    """Sums over devices what each has made of its own examples, inside `jax.shard_map`.

    A gradient with respect to the parameters is such a sum by itself. An inner product of outputs
    is not.

    Args:
      array: A sum over examples.
      params: The parameters, which are the same wherever examples are of one batch.

    Returns:
      The sum over all examples; the same array outside of `jax.shard_map`.

    Example:
      >>> import jax.numpy as jnp
      >>> sum_of_parts(jnp.ones(2), jnp.ones(3)).tolist()
      [1.0, 1.0]
    """
    axes = set(_varying_axes(array)).difference(*map(_varying_axes, jax.tree.leaves(params)))
    summed: jax.Array = jax.lax.psum(array, tuple(sorted(axes))) if axes else array
    return summed


def explicit_spec(array: Any) -> tuple[Any, ...] | None:
    """How the axes of an array are sharded on an Explicit mesh.

    Args:
      array: An array, or a `jax.ShapeDtypeStruct` from a trace.

    Returns:
      For each axis the names of axes of the mesh, or None; and None outside an Explicit mesh.

    Example:
      >>> import jax.numpy as jnp
      >>> explicit_spec(jnp.ones(2)) is None
      True
    """
    if isinstance(array, jax.ShapeDtypeStruct):
        sharding = array.sharding
    else:
        sharding = getattr(jax.typeof(array), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return None
    spec = tuple(sharding.spec)
    return spec + (None,) * (len(array.shape) - len(spec))


def constrain(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Gives an array a sharding, under Explicit and under Auto axes.

    Args:
      array: Any array.
      sharding: Of it, on a mesh of one kind of axes.

    Returns:
      The same array.

    Example:
      >>> import jax.numpy as jnp
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
      >>> constrain(jnp.ones(2), NamedSharding(mesh, PartitionSpec("data"))).tolist()
      [1.0, 1.0]
    """
    if AxisType.Explicit in sharding.mesh.axis_types:
        return reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)


def replicate(array: jax.Array) -> jax.Array:
    """Gathers an array on every device of an Explicit mesh.

    Args:
      array: Any array.

    Returns:
      The same array, unsharded.

    Example:
      >>> import jax.numpy as jnp
      >>> replicate(jnp.ones(2)).tolist()
      [1.0, 1.0]
    """
    sharding = _explicit(array)
    if sharding is None or all(axis is None for axis in sharding.spec):
        return array
    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    return reshard(array, replicated)


def gather_axes(array: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Gathers some axes of an array on an Explicit mesh, before what cannot be done across them.

    Args:
      array: Any array.
      axes: The axes that must not be sharded.

    Returns:
      The same array, still sharded along the other axes.

    Example:
      >>> import jax.numpy as jnp
      >>> gather_axes(jnp.ones(2), [0]).tolist()
      [1.0, 1.0]
    """
    sharding = _explicit(array)
    if sharding is None:
        return array
    given = tuple(sharding.spec) + (None,) * (array.ndim - len(sharding.spec))
    spec = tuple(None if axis in axes else name for axis, name in enumerate(given))
    if spec == given:
        return array
    kept = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return reshard(array, kept)


def merge_axes(array: jax.Array, shape: Sequence[int], axis: int) -> jax.Array:
    """Reshapes; what an Explicit mesh has sharded is the major part of one axis of the result.

    Args:
      array: An array sharded along at most one axis.
      shape: The new shape.
      axis: The axis of the new shape into which the sharded one is merged, as its major part.

    Returns:
      The reshaped array, sharded along ``axis``.

    Example:
      >>> import jax.numpy as jnp
      >>> merge_axes(jnp.ones((2, 3)), (1, -1), 1).shape
      (1, 6)
    """
    sharding = _explicit(array)
    names = [name for name in (sharding.spec if sharding is not None else ()) if name is not None]
    if not names:
        return jnp.reshape(array, shape)
    spec = PartitionSpec(*(names[0] if i == axis else None for i in range(len(shape))))
    merged = NamedSharding(sharding.mesh, spec)
    return jnp.reshape(array, shape, out_sharding=merged)


def contract(
    a: jax.Array, b: jax.Array, axes: tuple[Sequence[int], Sequence[int]], dtype: Any
) -> jax.Array:
    """Sums products over pairs of axes, whatever is sharded; the free axes keep their shardings.

    Args:
      a: An array.
      b: An array of the same dtype; contracted axes are sharded as those of ``a``.
      axes: The contracted axes of each.
      dtype: In which to accumulate, and that of the result.

    Returns:
      The free axes of ``a``, then those of ``b``; full precision on every device.

    Example:
      >>> import jax.numpy as jnp
      >>> contract(jnp.ones((2, 3)), jnp.ones((3, 2)), ((1,), (0,)), jnp.float32).tolist()
      [[3.0, 3.0], [3.0, 3.0]]
    """
    a, b = _on_mesh_of(a, b), _on_mesh_of(b, a)
    return jax.lax.dot_general(
        a,
        b,
        ((tuple(axes[0]), tuple(axes[1])), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
        **_out_sharding(((a, axes[0]), (b, axes[1]))),
    )


def _on_mesh_of(array: jax.Array, other: jax.Array) -> jax.Array:
    """Replicates an array on the Explicit mesh of another, where JAX < 0.7 has it on none."""
    sharding = _explicit(other)
    if sharding is None or _mesh(array) is not None:
        return array
    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    return reshard(array, replicated)


def _out_sharding(operands: Sequence[tuple[jax.Array, Sequence[int]]]) -> dict[str, Any]:
    """The sharding of the axes of some operands that are not contracted, on an Explicit mesh."""
    names: list[Any] = []
    mesh = None
    for array, contracted in operands:
        sharding = _explicit(array)
        mesh = mesh if sharding is None else sharding.mesh
        given = () if sharding is None else tuple(sharding.spec)
        given += (None,) * (array.ndim - len(given))
        names += [name for axis, name in enumerate(given) if axis not in contracted]
    if mesh is None:
        return {}
    free = PartitionSpec(*names)
    return {"out_sharding": NamedSharding(mesh, free)}


def replicated_zeros(shape: Sequence[int], dtype: Any) -> jax.Array:
    """Zeros on the present mesh; before JAX 0.7 those of `jax.numpy` are on none.

    Args:
      shape: The shape.
      dtype: The dtype.

    Returns:
      The zeros.

    Example:
      >>> replicated_zeros((2,), "float32").tolist()
      [0.0, 0.0]
    """
    zeros, present = jnp.zeros(shape, dtype), jax.sharding.get_abstract_mesh()
    if present.empty or _mesh(zeros) is not None:
        return zeros
    return reshard(zeros, NamedSharding(present, PartitionSpec()))


def enter_context(array: jax.Array) -> jax.Array:
    """Brings an array from inside `jax.sharding.auto_axes` to the Explicit mesh around it.

    Args:
      array: Any array.

    Returns:
      The same array, replicated if it was typed by another mesh than the present one.

    Example:
      >>> import jax.numpy as jnp
      >>> enter_context(jnp.ones(2)).tolist()
      [1.0, 1.0]
    """
    mesh, present = _mesh(array), jax.sharding.get_abstract_mesh()
    if mesh is None or present.empty or mesh.axis_types == present.axis_types:
        return array
    return reshard(array, NamedSharding(present, PartitionSpec()))


def leave_context(array: jax.Array, reference: jax.Array) -> jax.Array:
    """The inverse of `enter_context`.

    Args:
      array: An array of the present mesh.
      reference: The array as it was typed.

    Returns:
      The array, typed like the reference.

    Example:
      >>> import jax.numpy as jnp
      >>> leave_context(jnp.ones(2), jnp.zeros(2)).tolist()
      [1.0, 1.0]
    """
    mesh, present = _mesh(reference), _mesh(array)
    if mesh is None or present is None or mesh.axis_types == present.axis_types:
        return array
    return reshard(array, NamedSharding(mesh, PartitionSpec()))


def shard_like(array: jax.Array, reference: jax.Array) -> jax.Array:
    """Gives an array the sharding that another has on an Explicit mesh.

    Args:
      array: Any array.
      reference: An array of the same shape.

    Returns:
      The array, sharded like the reference.

    Example:
      >>> import jax.numpy as jnp
      >>> shard_like(jnp.ones(2), jnp.zeros(2)).tolist()
      [1.0, 1.0]
    """
    sharding = _explicit(reference)
    return array if sharding is None else reshard(array, sharding)
