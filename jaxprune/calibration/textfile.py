"""The user's own text: .jsonl, .json, .parquet, .txt, compressed or not, or a folder as hub datasets are laid out.

A .txt file is one document; in the others each row's `text` is one.
"""

from collections.abc import Sequence
from pathlib import Path

from jaxprune.errors import InputError

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def documents(path: Path, split: str) -> Sequence[str]:
    """The texts of a file, whatever the split, or of a folder's split.

    Raises:
        InputError: an unknown kind of file, no text column, or no text.
    """
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetGenerationError

    name = path.name.removesuffix(path.suffix) if path.suffix in COMPRESSED else path.name
    kind = FORMATS.get(Path(name).suffix)
    if not path.is_dir() and kind is None:
        raise InputError(f"{path} is of no known kind: use {', '.join(FORMATS)} (also compressed), .npy, or a folder")
    try:
        if path.is_dir():
            loaded = load_dataset(str(path))
            chosen = next((s for s in (split, "validation", "train") if s in loaded), None)
            if chosen is None or (chosen == "train") != (split == "train"):
                raise InputError(f"{path} has no {split} split: it has {', '.join(loaded)}")
            rows: Dataset = loaded[chosen]
        else:
            options = {"sample_by": "document"} if kind == "text" else {}
            rows = load_dataset(kind, data_files=str(path), split="train", **options)
    except InputError:
        raise
    except StopIteration:  # an empty file
        raise InputError(f"{path} holds no text") from None
    except (DatasetGenerationError, OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error.__cause__ or error}") from error
    if "text" not in rows.column_names:
        raise InputError(f"{path} has no column 'text': its columns are {', '.join(rows.column_names)}")
    if not any(len(text) for text in rows[:1000]["text"]):
        raise InputError(f"{path} holds no text")
    return rows["text"]
