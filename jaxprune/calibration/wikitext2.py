"""WikiText-2, raw: train calibrates, test evaluates; the rows of a split are one text.

References:
    Merity et al., "Pointer Sentinel Mixture Models", ICLR 2017 (arXiv 1609.07843).
"""

from collections.abc import Sequence

from jaxprune.calibration import hub, textfile
from jaxprune.calibration.texts import JOIN

PACK = True


def documents(split: str) -> Sequence[str]:
    path = hub.fetch("Salesforce/wikitext", f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet")
    return [JOIN.join(textfile.documents(path, split))]
