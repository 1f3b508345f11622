"""Verifies a pruned checkpoint against its record, a pattern, and the dense checkpoint."""

import dataclasses
from pathlib import Path

from convert import open_checkpoint
from convert.hub import resolve
from jaxprune.api.load import load
from jaxprune.errors import Change
from jaxprune.evaluation import verification
from jaxprune.evaluation.verification import Claims, Verdict
from jaxprune.reporting import record as records
from jaxprune.sparsity import masks
from jaxprune.sparsity.patterns import Pattern
from jaxprune.streaming.model import StreamedModel
from jaxprune.structure.removal import without


def verify(
    checkpoint: str | Path | StreamedModel,
    *,
    against: str | Path | StreamedModel | None = None,
    pattern: Pattern | None = None,
    zeros_of: str | Path | None = None,
) -> Verdict:
    """Verifies from the stored tensors what a pruned checkpoint claims.

    Args:
        checkpoint: a model, or a name as for `load`.
        against: the dense model. All tensors except pruned kernels must be bitwise identical to it.
            Its tensors are first rounded to the pruned checkpoint's dtype; for a GGUF file, to the
            file's types.
        pattern: the pattern that every kernel must have; None: that of the checkpoint's record,
            else an N:M pattern that nearly all kernels have.
        zeros_of: the name of a pruned checkpoint whose zeros must also be zeros here, as after
            fine-tuning.

    Raises:
        InputError, CheckpointError: a checkpoint cannot be read, or is not a model.
    """
    if isinstance(checkpoint, StreamedModel):
        model = checkpoint
    else:  # unchecked: verification counts values that are not finite
        source = resolve(checkpoint)
        model = StreamedModel(open_checkpoint(source, check=False), source=source)
    dense = against if isinstance(against, StreamedModel) or against is None else load(against)
    claims = Claims()
    if run := records.run_of(model.source):
        claims = records.expected(run)
        if dense:
            file = Path(model.source, records.RECORD)
            dense = without(dense, run.recipe.structure, run.removed, file)
    if pattern is not None:
        claims = dataclasses.replace(claims, pattern=pattern, wanted=None, own={})
    if zeros_of is not None:
        other = {"zeros_of": Change.OTHER}
        zeros = masks.from_checkpoint(open_checkpoint(zeros_of), str(zeros_of), other)
        claims = dataclasses.replace(claims, masks=zeros)
    return verification.verify(model, claims, dense)
