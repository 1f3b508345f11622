"""Damage done to files."""

from pathlib import Path


def biggest(folder: Path) -> Path:
    """The largest file in a folder."""
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def damage(file: Path, how: str) -> None:
    """Cuts a file in half, or flips a bit in its middle."""
    content = bytearray(file.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))
