"""Methods of other packages, as pip leaves them."""

from pathlib import Path


def install_method(folder: Path, name: str, source: str) -> None:
    """Installs a package with one method into a folder; it is found once that is on `sys.path`.

    Args:
        folder: the folder.
        name: of the package, of its module and of the method.
        source: of the module.
    """
    (folder / f"{name}.py").write_text(source)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[jaxprune.methods]\n{name} = {name}\n")
