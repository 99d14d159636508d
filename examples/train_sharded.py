"""Trains a model on all devices there are: CPUs, GPUs or TPUs, of one host or of many.

Parameters and the state of the optimizer are split over the devices (FSDP), and so is each batch.
The same command runs everywhere; see README.md beside this file for several hosts.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import secondorder as so

METHODS = {
    "kbfgs": lambda rate, layers: so.kbfgs(rate or 0.1, layers(), damping=0.03),
    "lsr1": lambda rate, layers: so.lsr1(),
    "hessian-free": lambda rate, layers: so.hessian_free(max_iterations=20),
    "adam": lambda rate, layers: optax.with_extra_args_support(optax.adam(rate or 1e-2)),
}


def main() -> None:
    """Trains, and prints the loss of each step from the first process."""
    args = parse_arguments()
    start_processes(args)
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))

    # 1. Where everything is: parameters from a rule, the state of the optimizer from theirs.
    inputs, labels = load_data(args.data)
    shapes = jax.eval_shape(lambda: init_params(args, inputs.shape[1]))
    places = jax.tree.map(lambda leaf: place_parameter(mesh, leaf), shapes)
    abstract = jax.tree.map(with_sharding, shapes, places)
    tx = make_optimizer(args, abstract, inputs, labels)
    state_places = so.state_shardings(tx, abstract)

    # 2. Everything starts there: no device ever holds more than its part.
    params = jax.jit(lambda: init_params(args, inputs.shape[1]), out_shardings=places)()
    state = jax.jit(tx.init, out_shardings=state_places)(params)
    first = 0
    if args.restore:
        first, params, state = restore(args.restore, (params, state))

    # 3. And stays there.
    step = jax.jit(make_step(tx), out_shardings=(places, state_places, None), donate_argnums=(0, 1))
    for number in range(first, args.steps):
        batch = load_batch(mesh, inputs, labels, args.batch_size, number)
        params, state, loss = step(params, state, batch)
        if jax.process_index() == 0:
            print(f"step {number} loss {float(loss):.6f}", flush=True)
    if args.save:
        save(args.save, args.steps, (params, state))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, default="kbfgs")
    parser.add_argument("--learning-rate", type=float, help="of kbfgs and adam")
    parser.add_argument("--data", choices=("digits", "synthetic"), default="digits")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=512, help="of all devices together")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=8, help="number of hidden layers")
    parser.add_argument("--save", metavar="DIR", help="write a checkpoint at the end")
    parser.add_argument("--restore", metavar="DIR", help="go on from a checkpoint")
    parser.add_argument("--distributed", action="store_true", help="several hosts of a cluster")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="several hosts, named by hand")
    parser.add_argument("--processes", type=int, help="with --coordinator")
    parser.add_argument("--process-id", type=int, help="with --coordinator")
    return parser.parse_args()


def start_processes(args: argparse.Namespace) -> None:
    """Joins the processes; afterwards each sees the devices of all."""
    if args.coordinator:
        jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
    elif args.distributed:  # Slurm, Open MPI, Kubernetes, or the hosts of a TPU
        jax.distributed.initialize()


# The model: equal hidden layers are one array, which `jax.lax.scan` runs over.


def init_params(args: argparse.Namespace, inputs: int) -> dict[str, Any]:
    """Random weights; ten classes."""
    first, hidden, last = jax.random.split(jax.random.key(0), 3)
    width = args.width
    return {
        "first": jax.random.normal(first, (inputs, width)) / inputs**0.5,
        "hidden": jax.random.normal(hidden, (args.depth, width, width)) / width**0.5,
        "biases": jnp.zeros((args.depth, width)),
        "last": jax.random.normal(last, (width, 10)) / width**0.5,
    }


def apply_model(params: dict[str, Any], inputs: jax.Array) -> jax.Array:
    """The logits."""

    def layer(h: jax.Array, wb: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return jnp.tanh(h @ wb[0] + wb[1]), None

    h = jnp.tanh(inputs @ params["first"])
    h, _ = jax.lax.scan(layer, h, (params["hidden"], params["biases"]))
    return h @ params["last"]


def objective_on(batch: tuple[jax.Array, jax.Array]) -> so.Objective[Any]:
    """The mean cross entropy of a batch, split into model and loss."""
    inputs, labels = batch
    return so.Objective(
        lambda params: apply_model(params, inputs),
        lambda logits: jnp.mean(
            optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, 10, dtype=logits.dtype))
        ),
    )


def make_step(tx: Any) -> Any:
    """The training step, as on one device: nothing here knows of meshes."""

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        objective = objective_on(batch)
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=objective
        )
        return optax.apply_updates(params, updates), state, value

    return step


def make_optimizer(
    args: argparse.Namespace, params: Any, inputs: np.ndarray, labels: np.ndarray
) -> Any:
    """The optimizer; layers are found in the shapes of the model."""
    size = args.batch_size
    batch = jax.ShapeDtypeStruct((size, inputs.shape[1]), inputs.dtype)
    targets = jax.ShapeDtypeStruct((size,), labels.dtype)

    def layers() -> so.Layers:
        return so.find_layers(lambda p, *b: objective_on(b)(p), params, batch, targets)

    return METHODS[args.method](args.learning_rate, layers)


# Where things are.


def place_parameter(mesh: Mesh, leaf: Any) -> NamedSharding:
    """Splits the last axis that the devices divide; none of small parameters."""
    spec: list[str | None] = [None] * leaf.ndim
    for axis in reversed(range(leaf.ndim)):
        if leaf.shape[axis] % mesh.size == 0:
            spec[axis] = "data"
            break
    return NamedSharding(mesh, PartitionSpec(*spec))


def with_sharding(leaf: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
    """The shape of an array and where it is."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def load_data(name: str) -> tuple[np.ndarray, np.ndarray]:
    """All examples, on every host; where data is large each host reads its own part instead."""
    if name == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        return images.astype(np.float32) / 16, labels.astype(np.int32)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2048, 32)).astype(np.float32)
    return inputs, np.argmax(inputs @ rng.normal(size=(32, 10)), axis=1).astype(np.int32)


def load_batch(
    mesh: Mesh, inputs: np.ndarray, labels: np.ndarray, size: int, number: int
) -> tuple[jax.Array, jax.Array]:
    """A batch that all hosts agree on, of which each puts its part on its devices."""
    rows = np.random.default_rng(number).choice(len(inputs), size, replace=False)
    place = NamedSharding(mesh, PartitionSpec("data"))

    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, place, lambda index: array[index])

    return put(inputs[rows]), put(labels[rows])


# Checkpoints. All processes write to one folder, and read from it, on whatever mesh they have.


def save(folder: str, step: int, trees: tuple[Any, Any]) -> None:
    """Writes parameters and state."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder).absolute(), {"step": step, "trees": trees})


def restore(folder: str, trees: tuple[Any, Any]) -> tuple[int, Any, Any]:
    """Reads them to where ``trees`` are."""
    import orbax.checkpoint as ocp

    like = jax.tree.map(lambda leaf: with_sharding(leaf, leaf.sharding), trees)
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(Path(folder).absolute(), {"step": 0, "trees": like})
    return found["step"], *found["trees"]


if __name__ == "__main__":
    main()
