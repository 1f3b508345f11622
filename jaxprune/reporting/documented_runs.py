"""How a checkpoint's perplexity compares with the runs of a preset that the documentation
publishes."""

import json
from importlib import resources


def compared(ratio: float) -> str:
    """Returns how a perplexity, over the dense model's, compares with the nearest of the published
    runs, as a sentence."""
    published = json.loads((resources.files(__package__) / "documented_runs.json").read_text())
    ratios = published["ratios"]
    below = {pattern: found for pattern, found in ratios.items() if found <= ratio}
    pattern = max(below, key=ratios.get) if below else min(ratios, key=ratios.get)
    return (
        f"That is {'no less' if below else 'less'} than the {ratios[pattern]:.2f} times that the "
        f"documentation reports for {published['model']} with {pattern} zeros and --preset "
        f"{published['preset']}."
    )
