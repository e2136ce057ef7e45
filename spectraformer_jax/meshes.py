"""Arrays on meshes with Explicit axes, as `jax.make_mesh` makes them.

Examples and heads are independent of each other, so each device works on its
own, with nothing to be said to the compiler about how.
"""

from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spectraformer_jax.typing import Array, PyTree


def on_shards(
  function: Callable,
  query: Array,
  key: Array,
  value: Array,
  *,
  by_head: PyTree,
  by_row: PyTree,
  by_example: PyTree,
):
  """Calls `function` on the examples and heads of each device.

  Where no array lies on a mesh with Explicit axes it is simply called.

  Args:
    function: of all that follows, in this order; returns attention's output
      ``[B, T, N, V]`` and a tree whose leaves lead with ``[B, N]``.
    query: ``[B, T, N G, H]``. How its examples and heads are divided over
      devices holds for all other arrays.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    by_head: leaves lead with ``[N or 1]``.
    by_row: leaves lead with ``[B or 1, N or 1]``, or have fewer axes.
    by_example: leaves lead with ``[B]``.

  Returns:
    What `function` returns, divided like `query`.

  Raises:
    ValueError: the length is divided over devices.
  """
  inputs = (query, key, value, by_head, by_row, by_example)
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
  batch = _spec(query)[0]
  all_heads, heads = _heads(mesh, query, key)

  def rows(x):
    return _fit(x, batch, heads) if x.ndim > 1 else P()

  examples = lambda x: _fit(x, batch)
  specs = (
    P(batch, None, all_heads),
    *(2 * [P(batch, None, heads)]),
    jax.tree.map(lambda x: _fit(x, heads), by_head),
    jax.tree.map(rows, by_row),
    jax.tree.map(examples, by_example),
  )
  inputs = jax.tree.map(
    lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec)),
    inputs,
    specs,
  )
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs
  )
  out, state = jax.eval_shape(function, *shapes)
  run = jax.shard_map(
    function,
    mesh=mesh,
    axis_names=explicit,
    in_specs=specs,
    out_specs=(specs[0], jax.tree.map(rows, state)),
  )
  return run(*inputs)


def with_auto_axes(
  function: Callable,
  mesh,
  axis: str,
  query: Array,
  key: Array,
  value: Array,
  by_position: PyTree,
  shared: PyTree,
) -> Array:
  """Calls `function` on arrays whose length is divided over a mesh axis.

  Args:
    function: of the mesh to name (None: that of the context), and of all that
      follows the axis; returns ``[B, T, N, V]``.
    mesh: its Explicit axes are Auto to `function`, and altogether where no
      array lies on them yet.
    axis: one of its axes.
    query: ``[B, T, N G, H]``.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    by_position: leaves are ``[B, T]`` or ``[B, S]``.
    shared: by all devices.

  Returns:
    What `function` returns, over Explicit axes divided like `query`, and its
    length over `axis`.
  """
  inputs = (query, key, value, by_position, shared)
  explicit = _explicit_axes(mesh)
  if not explicit or _explicit_mesh(inputs) is None:
    return function(_all_auto(mesh), *inputs)
  mesh = getattr(mesh, "abstract_mesh", mesh)
  length = axis if axis in explicit else None

  def place(x):
    old = _spec(x)
    rest = (None if part == axis else part for part in old[2:])
    batch = None if old[0] == axis else old[0]
    spec = P(batch, length, *rest)
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))

  *arrays, by_position = jax.tree.map(place, inputs[:-1])
  everywhere = NamedSharding(mesh, P())
  shared = jax.tree.map(lambda x: jax.sharding.reshard(x, everywhere), shared)
  run = jax.sharding.auto_axes(
    lambda *inputs: function(None, *inputs),
    axes=tuple(explicit),
    out_sharding=NamedSharding(mesh, P(*_spec(arrays[0])[:3])),
  )
  return run(*arrays, by_position, shared)


def on_rows(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
  """The function, called on the examples and heads of each device.

  Args:
    function: of trees whose leaves lead with ``[B or 1, N or 1]``; the leaves
      of its result lead with ``[B, N]``, or with ones where all others do.
  """

  def on_devices(*trees):
    mesh = _explicit_mesh(trees)
    if mesh is None:
      return function(*trees)
    divided = [_spec(x)[:2] for x in jax.tree.leaves(trees)]
    batch, heads = (
      next(filter(None, axes), None) for axes in zip(*divided, strict=True)
    )
    specs = jax.tree.map(lambda x: _fit(x, batch, heads), trees)
    run = jax.shard_map(
      function,
      mesh=mesh,
      axis_names=_explicit_axes(mesh),
      in_specs=specs,
      out_specs=P(batch, heads),
      check_vma=False,  # nothing is summed over devices
    )
    return run(
      *jax.tree.map(
        lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec)),
        trees,
        specs,
      )
    )

  return on_devices


def look_up(table: Array, index: Array, **kwargs) -> Array:
  """Rows ``[..., D]`` of a table ``[K, D]``, divided over devices like `index`.

  Args:
    table: numbers, the same on every device.
    index: ints of any shape.
    **kwargs: of `jax.numpy.ndarray.at.get`.
  """
  mesh = _explicit_mesh((table, index))
  if mesh is not None:
    spec = P(*_spec(index), None)
    kwargs["out_sharding"] = NamedSharding(mesh, spec)
  return table.at[index].get(**kwargs)


def _explicit_axes(mesh) -> frozenset[str]:
  """The names of a mesh's Explicit axes."""
  types = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return frozenset(name for name, kind in types if kind == AxisType.Explicit)


def _all_auto(mesh):
  """The mesh with Auto axes alone."""
  types = len(mesh.axis_names) * (AxisType.Auto,)
  if isinstance(mesh, Mesh):
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)
  return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=types)


def is_on_explicit_axes(*arrays: Array) -> bool:
  """Whether any array lies on a mesh with Explicit axes."""
  return _explicit_mesh(arrays) is not None


def _explicit_mesh(tree: PyTree):
  """The first mesh with Explicit axes that an array lies on, or None."""
  for x in jax.tree.leaves(tree):
    mesh = jax.typeof(x).sharding.mesh
    if _explicit_axes(mesh):
      return mesh
  return None


def _spec(x: Array) -> P:
  """Over which mesh axes each axis of x is divided."""
  return jax.typeof(x).sharding.spec


def _fit(x: Array, *axes) -> P:
  """A spec for the first axes of x; an axis of size 1 is shared."""
  pairs = zip(x.shape, axes, strict=False)
  return P(*(None if size == 1 else axis for size, axis in pairs))


def _heads(mesh, query: Array, key: Array):
  """How queries' heads are divided, and how keys' heads.

  Grouped queries go with their key head. Where a mesh axis is larger than the
  keys' heads, all heads are gathered, but for a single one, which is shared.
  """
  axis = _spec(query)[2]
  if axis is None or key.shape[2] == 1:
    return axis, None
  names = axis if isinstance(axis, tuple) else (axis,)
  size = 1
  for name in names:
    size *= mesh.shape[name]
  return (None, None) if key.shape[2] % size else (axis, axis)
