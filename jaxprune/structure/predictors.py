"""Removes modules for multi-token prediction.

Their layers have the sizes of the model's own, which one configuration gives. They do not fit a
model with fewer layers, heads or channels.
"""

from convert.assets import load_config
from convert.checkpoint import RenamedReader
from convert.names import BESIDE, predictors_in
from jaxprune.streaming.model import StreamedModel

COUNTS = "num_nextn_predict_layers", "mtp_num_hidden_layers"
"""Entries of config.json that hold the number of these modules."""


def without_predictors(model: StreamedModel) -> tuple[StreamedModel, list[str]]:
    """Returns the model without modules for multi-token prediction, and their names, such as
    `mtp`."""
    reader = model.reader
    removed = predictors_in(model.hf_config, reader.spec)
    prefixes = tuple(f"{BESIDE}.{name}." for name in removed)
    paths = {path: path for path in reader.spec if not path.startswith(prefixes)}
    config = load_config(reader.assets)
    changes = {name: 0 for name in COUNTS if hasattr(config, name)}
    return model.derived(RenamedReader(reader, paths, changes)), removed
