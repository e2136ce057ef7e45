"""Who may import whom: each room of the package, and the rooms below it."""

import ast
import pathlib

import pytest

PACKAGE = "spectraformer_jax"
ROOT = pathlib.Path(__file__).parents[1]

# A room is a folder, or a module that lies beside folders. It may import the
# rooms that follow its name; `base` stands for those of the first line.
BASE = "checks commands meshes registry seeds typing"
SHARED = {*BASE.split(), "_version", "attention_checks"}  # small helpers
LAYERS = {
  # Shared by all.
  "typing": "",
  "registry": "",
  "seeds": "",
  "commands": "",
  "_version": "",
  "checks": "typing",
  "meshes": "typing",
  # Maps: a matrix knows no component, a component no attention.
  "weight_matrices": "base",
  "mixing_laws": "base weight_matrices",
  "kernels": "base mixing_laws",
  "components": "base kernels mixing_laws weight_matrices",
  "feature_maps": "base components weight_matrices",
  "testing": "base components feature_maps weight_matrices",
  # Attention: the engine knows no feature map.
  "linear_attention": "base linear_attention.pallas linear_attention.xla",
  "linear_attention.xla": "base linear_attention",
  "linear_attention.pallas": "base linear_attention",
  # Exact weights beside features: two kernels, and the engine's passes.
  "hybrid_attention": "base linear_attention linear_attention.xla",
  "attention_checks": "base feature_maps",
  "attention": (
    "base attention_checks feature_maps hybrid_attention linear_attention"
  ),
  "decoding": "base attention feature_maps hybrid_attention linear_attention",
  "adapters": "base attention attention_checks feature_maps hybrid_attention",
  "sequence_parallel": (
    "base attention attention_checks feature_maps linear_attention "
    "linear_attention.xla"
  ),
  "baselines": "base kernels",
  # Models know attention; attention knows no model.
  "nn": (
    "base attention baselines decoding feature_maps hybrid_attention kernels "
    "linear_attention"
  ),
  # Tasks know nothing of maps, attention or models: they need no JAX.
  "data": "base data.formats data.label_rules data.readers data.tasks",
  "data.formats": "base data",
  "data.label_rules": "base data",
  "data.generators": "base data.formats",
  "data.readers": "base data data.formats",
  "data.tasks": (
    "base data data.formats data.generators data.label_rules data.readers"
  ),
  "data.commands": "base data data.formats data.label_rules",
  # Training: a step names no file and no device.
  "train.step": "base data feature_maps nn",
  "train.devices": "base",
  "train.run": "base data nn train train.devices train.step",
  "train": (
    "base data data.formats feature_maps hybrid_attention nn train.devices "
    "train.run train.step"
  ),
  # The study measures all of the above.
  "study.approximation": (
    "base components data feature_maps hybrid_attention kernels nn study train "
    "train.run train.step weight_matrices"
  ),
  "study.sweep": "base data nn study train train.devices train.run",
  "study": "base study.approximation study.sweep",
  # Conversion measures with the study's functions, and attends like anybody.
  "linearize": (
    "base adapters attention feature_maps hybrid_attention kernels "
    "linearize.runs study.approximation"
  ),
  "linearize.runs": (
    "base attention data feature_maps hybrid_attention kernels linearize nn "
    "study study.approximation train train.devices train.run train.step"
  ),
}


def room_of(module: str) -> str:
  """The room that a module lies in, such as ``"train.step"``."""
  folder, room = ROOT / PACKAGE, []
  for part in module.split(".")[1:]:
    folder /= part
    if not folder.is_dir():
      return ".".join(room) or part
    room.append(part)
  return ".".join(room)


def imported_rooms(source: str) -> set[str]:
  """The rooms that a module's code imports, in functions as well."""
  modules = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      modules += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      modules += [f"{node.module}.{alias.name}" for alias in node.names]
  return {room_of(name) for name in modules if name.startswith(PACKAGE + ".")}


def refused_rooms(room: str, source: str) -> set[str]:
  """The rooms that a module imports and that its own room may not."""
  allowed = LAYERS[room].split()
  if "base" in allowed:
    allowed += BASE.split()
  # The package itself is public: `sf.feature_map` is what users call.
  public = {"__init__", *_public_names()}
  return imported_rooms(source) - {room, *allowed} - public


def _public_names() -> set[str]:
  import spectraformer_jax

  return set(spectraformer_jax.__all__) - LAYERS.keys()


def module_name(path: pathlib.Path) -> str:
  return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_module_imports_only_the_rooms_below_its_own(path):
  room = room_of(module_name(path).removesuffix(".__init__"))
  if room:  # the package's own __init__ names everything that is public
    refused = refused_rooms(room, path.read_text())
    assert not refused


def test_every_room_has_a_line_in_the_table():
  rooms = {room_of(module_name(path)) for path in FILES} - {"__init__"}
  assert rooms == LAYERS.keys()


@pytest.mark.parametrize(
  ("room", "line", "refused"),
  [
    ("weight_matrices", "from spectraformer_jax import attention", "attention"),
    ("linear_attention", "import spectraformer_jax.components", "components"),
    ("data", "from spectraformer_jax.nn.encoder import Encoder", "nn"),
    (
      "train.step",
      "def f():\n  from spectraformer_jax.train.run import lock",
      "train.run",
    ),
  ],
)
def test_a_wrong_import_is_seen(room, line, refused):
  assert refused_rooms(room, line) == {refused}


def test_the_map_in_the_readme_shows_every_room():
  text = (ROOT / "README.md").read_text()
  for room in LAYERS:
    *_, name = room.split(".")
    assert f"{name}/" in text or f"{name}.py" in text or room in SHARED
