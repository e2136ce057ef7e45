"""Arrays on meshes with Explicit axes, as `jax.make_mesh` makes them.

Examples and heads are independent of each other, so `jax.shard_map` lets each
device compute its own.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spectraformer_jax.typing import Array, PyTree


def on_shards(
  function: Callable[..., tuple[Array, PyTree]],
  query: Array,
  key: Array,
  value: Array,
  *,
  by_head: PyTree,
  by_example_and_head: PyTree,
  by_example: PyTree,
) -> tuple[Array, PyTree]:
  """Calls `function` on the examples and heads of each device.

  If no array lies on a mesh with Explicit axes, it gets the arrays as they are.

  Args:
    function: takes the arguments below, in this order; returns attention's
      output ``[B, T, N, V]`` and a tree whose leaves lead with ``[B, N]``.
    query: ``[B, T, N G, H]``. Examples and heads of the other arrays are
      divided over devices like those of the query.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    by_head: leaves lead with ``[N or 1]``.
    by_example_and_head: leaves lead with ``[B or 1, N or 1]``, or have fewer
      than two axes.
    by_example: leaves lead with ``[B]``.

  Returns:
    The result of `function`, divided like `query`.

  Raises:
    ValueError: the length is divided over devices.
  """
  inputs = (query, key, value, by_head, by_example_and_head, by_example)
  mesh = _explicit_mesh(inputs)
  if mesh is None:
    return function(*inputs)
  explicit = _explicit_axes(mesh)
  for name, x in (("query", query), ("key", key), ("value", value)):
    if axis := _spec(x)[1]:
      raise ValueError(
        f"{name} has its length divided over mesh axis {axis!r}, "
        f"{name}.sharding.spec={_spec(x)}: use sequence_parallel_attention("
        "mesh=..., axis=...), or reshard it by examples and heads first."
      )
  batch_axes = _spec(query)[0]
  query_head_axes, head_axes = _head_axes(mesh, query, key)

  def spec_of_heads(x: Array) -> P:
    return _fit(x, batch_axes, head_axes) if x.ndim > 1 else P()

  specs = (
    P(batch_axes, None, query_head_axes),
    P(batch_axes, None, head_axes),
    P(batch_axes, None, head_axes),
    jax.tree.map(lambda x: _fit(x, head_axes), by_head),
    jax.tree.map(spec_of_heads, by_example_and_head),
    jax.tree.map(lambda x: _fit(x, batch_axes), by_example),
  )
  inputs = _reshard(inputs, mesh, specs)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs
  )
  out, state = jax.eval_shape(function, *shapes)
  run = jax.shard_map(
    function,
    mesh=mesh,
    axis_names=explicit,
    in_specs=specs,
    out_specs=(specs[0], jax.tree.map(spec_of_heads, state)),
  )
  return run(*inputs)


def with_auto_axes(
  function: Callable[..., Array],
  mesh: Mesh,
  axis: str,
  arrays: PyTree,
  shared: PyTree,
) -> Array:
  """Calls `function` on arrays whose length is divided over a mesh axis.

  Args:
    function: takes a mesh without Explicit axes (None: the mesh of the
      context), `arrays` and `shared`; returns ``[B, T, N, V]``.
    mesh: may have Explicit axes.
    axis: one of its axes.
    arrays: leaves lead with ``[B, length]``; the first is ``[B, T, N, H]``.
    shared: replicated on all devices.

  Returns:
    The result of `function`, divided over Explicit axes like the first array,
    with its length divided over `axis`.
  """
  explicit = _explicit_axes(mesh)
  if not explicit or _explicit_mesh((arrays, shared)) is None:
    return function(_all_auto(mesh), arrays, shared)
  abstract = mesh.abstract_mesh
  length_axis = axis if axis in explicit else None

  def place(x: Array) -> Array:
    batch, _, *rest = _spec(x)
    batch, *rest = (None if part == axis else part for part in (batch, *rest))
    spec = P(batch, length_axis, *rest)
    return jax.sharding.reshard(x, NamedSharding(abstract, spec))

  arrays = jax.tree.map(place, arrays)
  everywhere = NamedSharding(abstract, P())
  shared = jax.tree.map(lambda x: jax.sharding.reshard(x, everywhere), shared)
  first = jax.tree.leaves(arrays)[0]
  on_auto_axes = jax.sharding.auto_axes(
    axes=tuple(explicit),
    out_sharding=NamedSharding(abstract, P(*_spec(first)[:3])),
  )
  run = on_auto_axes(lambda arrays, shared: function(None, arrays, shared))
  return run(arrays, shared)


def on_heads(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
  """Wraps `function` so that it runs on the examples and heads of each device.

  Args:
    function: takes trees whose leaves lead with ``[B or 1, N or 1]``; the
      leaves of its result lead with the largest of these sizes.
  """

  def on_devices(*trees: PyTree) -> PyTree:
    mesh = _explicit_mesh(trees)
    if mesh is None:
      return function(*trees)
    divided = [_spec(x)[:2] for x in jax.tree.leaves(trees)]
    batch_axes, head_axes = (
      next(filter(None, axes), None) for axes in zip(*divided, strict=True)
    )
    specs = jax.tree.map(lambda x: _fit(x, batch_axes, head_axes), trees)
    run = jax.shard_map(
      function,
      mesh=mesh,
      axis_names=_explicit_axes(mesh),
      in_specs=specs,
      out_specs=P(batch_axes, head_axes),
      check_vma=False,  # nothing is summed over devices
    )
    return run(*_reshard(trees, mesh, specs))

  return on_devices


def look_up(table: Array, index: Array, **kwargs: Any) -> Array:
  """Returns rows ``[..., D]`` of a table, divided over devices like `index`.

  Args:
    table: ``[K, D]``, the same on every device.
    index: ints of any shape.
    **kwargs: options of `jax.numpy.ndarray.at.get`.
  """
  mesh = _explicit_mesh((table, index))
  if mesh is not None:
    spec = P(*_spec(index), None)
    kwargs["out_sharding"] = NamedSharding(mesh, spec)
  return table.at[index].get(**kwargs)


def _reshard(
  trees: tuple[PyTree, ...], mesh: Mesh | AbstractMesh, specs: PyTree
) -> tuple[PyTree, ...]:
  """Divides leaves over a mesh by `specs`, a tree of the same structure."""
  return jax.tree.map(
    lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec)),
    trees,
    specs,
  )


def _explicit_axes(mesh: Mesh | AbstractMesh) -> frozenset[str]:
  """Returns the names of a mesh's Explicit axes."""
  types = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return frozenset(name for name, kind in types if kind == AxisType.Explicit)


def _all_auto(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
  """Returns the mesh with all axes Auto."""
  types = len(mesh.axis_names) * (AxisType.Auto,)
  if isinstance(mesh, Mesh):
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)
  return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=types)


def is_on_explicit_axes(*arrays: Array) -> bool:
  """Returns whether any array lies on a mesh with Explicit axes."""
  return _explicit_mesh(arrays) is not None


def _explicit_mesh(tree: PyTree) -> AbstractMesh | None:
  """Returns the first mesh with Explicit axes that holds an array, or None."""
  for x in jax.tree.leaves(tree):
    mesh = jax.typeof(x).sharding.mesh
    if _explicit_axes(mesh):
      return mesh
  return None


def _spec(x: Array) -> P:
  """Returns the mesh axes that divide each axis of x."""
  return jax.typeof(x).sharding.spec


def _fit(x: Array, *axes: Any) -> P:
  """Returns a spec for the first axes of x; an axis of size 1 is replicated."""
  pairs = zip(x.shape, axes, strict=False)
  return P(*(None if size == 1 else axis for size, axis in pairs))


def _head_axes(mesh: AbstractMesh, query: Array, key: Array) -> tuple[Any, Any]:
  """Returns the mesh axes that divide the heads of queries and of keys.

  Grouped queries go with their key head. If the number of devices does not
  divide that of key heads, heads are not divided; a single key head is
  replicated.
  """
  axis = _spec(query)[2]
  if axis is None or key.shape[2] == 1:
    return axis, None
  names = axis if isinstance(axis, tuple) else (axis,)
  size = math.prod(mesh.shape[name] for name in names)
  return (None, None) if key.shape[2] % size else (axis, axis)
