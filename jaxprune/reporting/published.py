"""How a checkpoint's perplexity compares with the runs of a preset that the documentation
publishes."""

import json
from importlib import resources


def compared(ratio: float) -> str:
    """Returns where a perplexity, over the dense model's, stands among those of the published runs,
    as a sentence."""
    published = json.loads((resources.files(__package__) / "published.json").read_text())
    ratios, source = (
        published["ratios"],
        f"{published['model']}, as published, with the preset {published['preset']}",
    )
    below = {pattern: found for pattern, found in ratios.items() if found <= ratio}
    pattern = max(below, key=ratios.get) if below else min(ratios, key=ratios.get)
    how = "no better" if below else "better"
    return f"That is {how} than {source} at {pattern} zeros ({ratios[pattern]:.2f} times)."
