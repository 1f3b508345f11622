"""Text that a model writes itself, to prune it on where there is too little other text."""

from itertools import cycle, islice

import numpy as np

from jaxprune.calibration import open_source
from jaxprune.errors import Change, InputError
from jaxprune.evaluation.samples import CUT
from jaxprune.streaming.generation import generate as continue_texts
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.observer import SILENT, Observer


def generate(
    model: StreamedModel,
    tokens: int,
    *,
    length: int = 256,
    prompts: str | None = None,
    prompt_tokens: int = 16,
    seed: int = 0,
    observer: Observer = SILENT,
) -> list[str]:
    """Returns texts drawn from a model's own distribution, of one length in tokens.

    Over such text the divergence that `jaxprune.prune` tunes by is the one between the two models' whole texts. See Liu
    et al., "LLM-QAT" (arXiv 2305.17888).

    Args:
        model: writes them. It does not end them: behind a text's end begins another.
        tokens: of all texts, at least.
        length: tokens of a text, those of its prompt among them.
        prompts: a source as for `calibration_windows`, with whose documents the texts begin, in an order that the seed
            fixes; None: they begin with the token that texts begin with.
        prompt_tokens: of a document.
        seed: of the tokens, which text by text it fixes.
        observer: is told each token of all texts.

    Raises:
        InputError: no such source, or the model was made for shorter texts.
    """
    if not 0 < prompt_tokens < length:
        raise InputError(
            f"texts of {length} tokens cannot begin with {prompt_tokens}",
            options={"length": Change.RAISE, "prompt_tokens": Change.LOWER},
        )
    if tokens < 1:
        raise InputError(f"tokens must be at least 1, not {tokens}")
    tokenizer, count = model.tokenizer, -(-tokens // length)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id or 0
    begun = [[first]] * count
    if prompts is not None:
        texts = open_source(prompts, "train", tokenizer)
        order = np.random.default_rng(seed).permutation(len(texts))[:count]
        beginnings = [texts.ids(int(document))[:prompt_tokens].tolist() or [first] for document in order]
        begun = [*islice(cycle(beginnings), count)]
    made = continue_texts(model, begun, [length - len(one) for one in begun], lambda *_: False, observer, seed=seed)
    # A tokenizer writes the first one itself.
    whole = ([*prompt, *new][prompt[0] == first :] for prompt, new in zip(begun, made, strict=True))
    return [tokenizer.decode(ids).rstrip(CUT) for ids in whole]
