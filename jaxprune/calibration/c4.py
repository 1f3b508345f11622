"""C4, English: the first shard of the training split calibrates, the first of validation evaluates.

References:
    Raffel et al., "Exploring the Limits of Transfer Learning", JMLR 2020 (arXiv 1910.10683). The
    choice of shards and the 1100 validation documents are those of SparseGPT's and Wanda's
    published scripts.
"""

from collections.abc import Sequence

from jaxprune.calibration import hub_datasets, text_files

FILES = {
    "train": "en/c4-train.00000-of-01024.json.gz",
    "test": "en/c4-validation.00000-of-00008.json.gz",
}


def documents(split: str) -> Sequence[str]:
    return text_files.documents(
        hub_datasets.fetch("allenai/c4", FILES[split]), split, None if split == "train" else 1100
    )
