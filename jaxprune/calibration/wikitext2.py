"""WikiText-2, raw: train calibrates, test evaluates; the rows of a split are one text.

References:
    Merity et al., "Pointer Sentinel Mixture Models", ICLR 2017 (arXiv 1609.07843).
"""

from collections.abc import Sequence

from jaxprune.calibration import hub_datasets, text_files
from jaxprune.calibration.tokenized_texts import JOIN

PACK = True


def documents(split: str) -> Sequence[str]:
    path = hub_datasets.fetch(
        "Salesforce/wikitext", f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet"
    )
    return [JOIN.join(text_files.documents(path, split))]
