"""A checkpoint as lm-eval's model, in JAX: no torch, and one layer on the device at a time.

All requests go through the model together, layer by layer, their hidden states on the host, so that
a model is read once however many requests there are.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from convert import open_checkpoint
from convert.assets import encode
from jaxprune import hardware
from jaxprune.errors import InputError
from jaxprune.evaluation.packing import Packed, Request, batches, group, pack
from jaxprune.evaluation.tasks import samples
from jaxprune.streaming.generation import generate
from jaxprune.streaming.model import StreamedModel
from jaxprune.streaming.observer import SILENT, Observer

MAX_LENGTH = 2048
"""Of models whose configuration names no context, as in lm-eval."""


@register_model("jaxprune")
class StreamedLM(TemplateLM):
    """lm-eval's interface to a streamed model.

    Args:
        pretrained: a model, or a checkpoint's name as for `convert.open_checkpoint`.
        dtype: the dtype of the computation; auto as in `StreamedModel`. That of a model which is
            open stays.
        max_length: the longest text; of longer ones the beginning is dropped. None: the context
            that the model was made for.
        host_gb: the most memory for hidden states, in 10^9 bytes; more requests read the model more
            than once.
        observer: is notified of progress.
        batch_size, max_batch_size, device: lm-eval's command line passes them; batches are chosen
            here, and devices by JAX, so that only their defaults are taken.

    Raises:
        InputError, CheckpointError: the checkpoint cannot be used.
    """

    def __init__(
        self,
        pretrained: str | Path | StreamedModel,
        *,
        dtype: str | np.dtype = "auto",
        max_length: int | None = None,
        host_gb: float = 8.0,
        observer: Observer = SILENT,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if str(batch_size) not in ("None", "1", "auto") or max_batch_size is not None:
            raise InputError(
                "jaxprune chooses the batch by the number of tokens: leave the batch size out"
            )
        if device not in (None, "cuda:0"):
            raise InputError(
                f"JAX chooses the device: leave {device!r} out, or set JAX_PLATFORMS to cpu, cuda "
                "or tpu"
            )
        if isinstance(pretrained, str | Path):
            pretrained = StreamedModel(
                open_checkpoint(pretrained), None if dtype == "auto" else np.dtype(dtype)
            )
        self._model = pretrained
        self.tokenizer = pretrained.tokenizer
        context = pretrained.hf_config.get("max_position_embeddings", MAX_LENGTH)
        context = min(context, pretrained.architecture.config.max_positions or context)
        if max_length is not None and not 0 < max_length <= context:
            raise InputError(
                f"max_length must be 1 to {context}, the model's context, not {max_length}"
            )
        self.max_length = max_length or context
        self._most_tokens = max(1, int(host_gb * 1e9) // self._model.architecture.state_bytes)
        self._observer = observer

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return (
            self.eot_token_id
            if self.tokenizer.bos_token_id is None
            else self.tokenizer.bos_token_id
        )

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the token ids; a text that begins with BOS gets no second one."""
        special = add_special_tokens
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode(self.prefix_token_id)
        ):
            special = False
        options = {} if special is None else {"add_special_tokens": special}
        return encode(self.tokenizer, string, **options)["input_ids"]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = self._score(
            [Request(context, continuation) for _, context, continuation in requests]
        )
        for (asked, _, _), score in zip(requests, scores, strict=True):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, score)
        return scores

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        windows, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, rolling):
                windows.append(Request(*window))
                owners.append(number)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [log_prob for log_prob, _ in self._score(windows)])
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, float(total))
        return totals.tolist()

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Generates greedily.

        Raises:
            InputError: a request wants sampling.
        """
        prompts, stops, most_of = [], [], []
        for context, given in (request.args for request in requests):
            options = normalize_gen_kwargs(given)
            if samples(options):
                raise InputError(
                    "the JAX backend generates greedily, but a task samples",
                    options={"backend": "torch"},
                )
            most = options["max_gen_toks"]
            stops.append(options["until"])
            prompts.append(
                self.tok_encode(context)[-max(1, self.max_length - most) :]
                or [self.prefix_token_id]
            )
            most_of.append(min(most, self.max_length - len(prompts[-1])))

        def text_of(tokens: list[int]) -> str:
            return self.tokenizer.decode(
                [t for t in tokens if t != self.eot_token_id], skip_special_tokens=True
            )

        def cuts(number: int, text: str) -> list[int]:
            return [text.find(stop) for stop in stops[number] if stop and stop in text]

        def finished(number: int, tokens: list[int]) -> bool:
            return tokens[-1] == self.eot_token_id or bool(cuts(number, text_of(tokens)))

        made = map(text_of, generate(self._model, prompts, most_of, finished, self._observer))
        done = [
            text[: min(cuts(number, text), default=len(text))] for number, text in enumerate(made)
        ]
        for request, text in zip(requests, done, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return done

    def _score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation, and whether it is what greedy generation
        gives."""
        totals, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
        for windows, head, states in self._predictions(requests):
            scores = self._model.score_tokens(head, states, windows.targets)
            np.add.at(totals, windows.request, scores.log_prob.astype(np.float64))
            np.logical_and.at(greedy, windows.request, scores.greedy)
        if np.isnan(totals).any():  # which would be no choice's, and so look like a wrong answer
            raise InputError("the model's predictions hold NaN", options={"dtype": "float32"})
        return list(zip(totals.tolist(), greedy.tolist(), strict=True))

    def _predictions(
        self, requests: Sequence[Request]
    ) -> Iterator[tuple[Packed, Mapping[str, Array], Float[np.ndarray, "_ d"]]]:
        """Yields windows, the head's params on the device, and the last layer's output where tokens
        are predicted."""
        model = self._model
        for batch in batches(group(requests, self.max_length), self._most_tokens):
            packed = pack(requests, batch, self.max_length, hardware.current().tokens_per_batch)
            count = sum(one.size for one in batch)
            self._observer.started(
                f"log-likelihoods of the tasks' answers by {model.short_name}, {count:,} tokens",
                model.num_layers,
            )
            states = model.final_states(
                *(windows.tokens for windows in packed),
                layouts=[windows.layout for windows in packed],
                visit=lambda index, states: self._observer.layer_visited(index),
            )
            head = model.params_of(model.architecture.head)
            for windows, hidden in zip(packed, states, strict=True):
                yield windows, head, hidden.pick(windows.rows, windows.columns)
