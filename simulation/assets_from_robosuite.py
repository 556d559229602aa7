"""Make the low-polygon meshes of the Panda and of four groceries in `simulation/assets/` from robosuite on PyPI.

    pip install trimesh fast-simplification scipy pillow
    python -m stereovla.simulation.assets_from_robosuite [--wheel robosuite-1.5.2-py3-none-any.whl] [--output ASSETS]

The wheel (MIT) is downloaded when not given. Its meshes derive from Franka Emika's `franka_description` 0.7.0
(Apache-2.0, as the wheel's own `bullet_data/panda_description/package.xml` says). Visual meshes are merged per link
and colour and decimated to 4 to 16 % of their triangles: triangles are what software rendering pays
for (136 k triangles: 21.7 ms a stereo pair at 224 px, 12 k: 5.8 ms). Collision meshes become their convex hulls. Only
this command needs trimesh, fast-simplification, scipy and pillow; the world itself needs mujoco and numpy.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

ROBOSUITE = "robosuite==1.5.2"
MODELS = "robosuite/models/assets/"
VISUAL_RATIO = 0.08  # of the upstream triangles
# the cameras see little of the base and the upper arm, and the hand from near
RATIOS = {**{f"link{i}": 0.04 for i in range(5)}, "hand": 0.16}
# upstream's z is up; triangles to keep
OBJECTS = {"lemon": 160, "bread": 104, "milk": 160, "cereal": 114}
COLLIDING_LINKS = ["link5", "link6", "link7"]  # the upper arm cannot reach the table


def download_wheel(folder: Path) -> Path:
    """Downloads the pinned robosuite wheel (and nothing it depends on) into `folder`; returns its path."""
    subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), ROBOSUITE], check=True)
    return next(folder.glob("robosuite-*.whl"))


def colour_of(rgba: str) -> str:
    """Name of one of our two Panda materials for an upstream colour; a few millimetre-sized coloured marks become
    dark.
    """
    return "white" if min(float(value) for value in rgba.split()[:3]) > 0.8 else "dark"


def merged_visuals(root: Path) -> dict[str, list[Path]]:
    """Upstream visual mesh files by our name, `link5_white` and so on, from the geoms and materials of robot.xml."""
    tree = ElementTree.parse(root / "robots/panda/robot.xml")
    colours = {material.get("name"): colour_of(material.get("rgba")) for material in tree.iter("material")}
    files = {mesh.get("name"): root / "robots/panda" / mesh.get("file") for mesh in tree.iter("mesh")}
    groups: dict[str, list[Path]] = {}
    for geom in tree.iter("geom"):
        if geom.get("material"):
            link = geom.get("mesh").split("_")[0]
            groups.setdefault(f"{link}_{colours[geom.get('material')]}", []).append(files[geom.get("mesh")])
    gripper = root / "grippers/meshes/panda_gripper"
    return groups | {"hand_white": [gripper / "hand_vis.stl"], "finger_dark": [gripper / "finger_vis.stl"]}


def write_obj(path: Path, vertices: np.ndarray, faces: np.ndarray) -> None:
    """Writes an OBJ with 0.1 mm coordinates; `vertices` (n, 3) in m, `faces` (m, 3)."""
    lines = [f"# decimated from {ROBOSUITE}; see LICENSES.md"]
    lines += ["v " + " ".join(f"{value:.4f}" for value in vertex) for vertex in vertices]
    lines += ["f " + " ".join(str(index + 1) for index in face) for face in faces]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(lines).replace("-0.0000", "0.0000") + "\n")
    os.replace(temporary, path)


def main() -> None:
    import fast_simplification
    import trimesh

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help=f"the upstream wheel; {ROBOSUITE} is downloaded when not given")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "assets")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wheel = options.wheel or download_wheel(Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            parts = tuple(
                MODELS + part for part in ("robots/panda/", "grippers/meshes/panda_gripper/", "objects/meshes/")
            )
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(parts)])
        root = Path(folder) / MODELS
        total = 0
        for name, files in merged_visuals(root).items():
            mesh = trimesh.util.concatenate([trimesh.load(file, force="mesh", process=False) for file in files])
            mesh = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
            mesh.merge_vertices(merge_tex=True, merge_norm=True, digits_vertex=5)
            ratio = RATIOS.get(name.split("_")[0], VISUAL_RATIO)
            vertices, faces = fast_simplification.simplify(
                np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces, np.int32), 1.0 - ratio
            )
            write_obj(options.output / f"{name}.obj", vertices, faces)
            total += len(faces)
            print(f"{name:14s} {len(mesh.faces):6d} -> {len(faces):5d} triangles")
        collision = {link: root / f"robots/panda/meshes/{link}.stl" for link in COLLIDING_LINKS}
        collision["hand"] = root / "grippers/meshes/panda_gripper/hand.stl"
        collision["finger"] = root / "grippers/meshes/panda_gripper/finger.stl"
        for name, file in collision.items():
            hull = trimesh.load(file, force="mesh").convex_hull
            write_obj(options.output / f"{name}_collision.obj", hull.vertices, hull.faces)
        for name, triangles in OBJECTS.items():
            mesh = trimesh.load(root / f"objects/meshes/{name}.stl", force="mesh")
            vertices, faces = np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces, np.int32)
            if len(faces) > triangles:
                vertices, faces = fast_simplification.simplify(vertices, faces, 1.0 - triangles / len(faces))
            write_obj(options.output / f"object_{name}.obj", vertices, faces)
            print(f"{name:14s} {len(mesh.faces):6d} -> {len(faces):5d} triangles")
    size = sum(file.stat().st_size for file in options.output.glob("*.obj"))
    print(f"{total} visual triangles; {size / 1e3:.0f} kB in {options.output}")


if __name__ == "__main__":
    main()
