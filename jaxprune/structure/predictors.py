"""Removes modules for multi-token prediction.

Their layers have the sizes of the model's own, which one configuration gives. They do not fit a
model with fewer layers, heads or channels.
"""

from collections.abc import Iterable

from convert import Params, Reader
from convert.assets import load_config, read_config
from convert.checkpoint import DerivedReader
from convert.names import BESIDE, predictors_in
from jaxprune.streaming.model import StreamedModel

COUNTS = "num_nextn_predict_layers", "mtp_num_hidden_layers"
"""Entries of config.json that hold the number of these modules."""


class WithoutPredictors(DerivedReader):
    """Reads a checkpoint without its modules for multi-token prediction.

    Args:
        reader: reads the whole checkpoint.
        removed: the modules.
    """

    def __init__(self, reader: Reader, removed: Iterable[str]) -> None:
        prefixes = tuple(f"{BESIDE}.{name}." for name in removed)
        spec = {path: own for path, own in reader.spec.items() if not path.startswith(prefixes)}
        config = load_config(reader.assets)
        super().__init__(reader, spec, {name: 0 for name in COUNTS if hasattr(config, name)})

    def read(self, paths: Iterable[str]) -> Params:
        """Returns the named parameters, in memory; errors as the reader's."""
        return self._reader.read(paths)


def without_predictors(model: StreamedModel) -> tuple[StreamedModel, list[str]]:
    """Returns the model without modules for multi-token prediction, and their names, such as
    `mtp`."""
    reader = model.reader
    removed = predictors_in(read_config(reader.assets), reader.spec)
    return model.derived(WithoutPredictors(reader, removed)), removed
