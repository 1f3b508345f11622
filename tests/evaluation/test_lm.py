"""The JAX model of lm-eval against lm-eval's own HFLM, request by request."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from convert import create_checkpoint, open_checkpoint
from jaxprune import StreamedModel
from jaxprune.commands.lm_eval import main as lm_eval_main
from jaxprune.errors import InputError
from jaxprune.evaluation.lm import StreamedLM
from tests.helpers import families, rows, tiny, xla
from tests.helpers.optional import needs_torch, torch

if torch:
    from lm_eval.models.huggingface import HFLM

    from jaxprune.evaluation.torch_lm import hflm

TEXTS = [
    ("The cat sat on", " the mat."),
    ("The cat sat on", " the house and then it ran."),
    ("The cat sat on", " a"),
    ("The cat sat on", " b"),
    ("The cat sat on", " the mat."),
    ("The cat sat on the", " mat."),
    ("", "The dog ran."),
    ("", "The"),
    ("A red tree ", "was old."),
    ("The dog was very small and the cat was big. " * 30, "It ran under the house."),
    ("The dog was very small and the cat was big. " * 200, "It ran under the house."),
    ("The dog was very small and the cat was big. " * 200, "It sat."),
    ("<|end|>The cat", " ran."),
]


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


# Without its cache of logits, which takes a text that two requests split at different places for
# one and the same.
@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return HFLM(
        pretrained=str(checkpoint), dtype="float32", device="cpu", logits_cache=False, batch_size=4
    )


@needs_torch
@pytest.mark.parametrize("options", [{}, {"host_gb": 2e-5}, {"max_length": 40}], ids=str)
def test_loglikelihoods_are_hflms(
    options: dict[str, Any], checkpoint: Path, reference: Any
) -> None:
    ours, theirs = StreamedLM(checkpoint, **options), reference
    if "max_length" in options:
        theirs = HFLM(
            pretrained=str(checkpoint),
            dtype="float32",
            device="cpu",
            logits_cache=False,
            batch_size=4,
            **options,
        )
    requests = instances("loglikelihood", TEXTS)
    found, expected = (
        ours.loglikelihood(requests),
        theirs.loglikelihood(requests, disable_tqdm=True),
    )
    np.testing.assert_allclose(
        [x for x, _ in found], [x for x, _ in expected], rtol=1e-4, atol=1e-4
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@needs_torch
@pytest.mark.parametrize(
    "change", [{}, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}]
)
def test_models_with_short_contexts(change: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "short", tiny.config(max_position_embeddings=48, **change))
    requests = instances("loglikelihood", TEXTS)
    found = StreamedLM(folder).loglikelihood(requests)
    reference = HFLM(
        pretrained=str(folder), dtype="float32", device="cpu", logits_cache=False, batch_size=4
    )
    expected = reference.loglikelihood(requests, disable_tqdm=True)
    np.testing.assert_allclose(
        [x for x, _ in found], [x for x, _ in expected], rtol=1e-4, atol=1e-4
    )


@needs_torch
def test_texts_are_cut_to_what_the_model_takes(tmp_path: Path) -> None:
    # stretched from 128 positions to 256
    families.save(tmp_path / "hf", families.config("ministral3", "plain"))
    model = StreamedLM(tmp_path / "hf")
    assert model.max_length == 128
    assert len(model.loglikelihood(instances("loglikelihood", TEXTS))) == len(TEXTS)


@needs_torch
def test_greedy_continuations_are_found_out(checkpoint: Path, reference: Any) -> None:
    context = "The cat sat on"
    (made,) = reference.generate_until(
        instances("generate_until", [(context, {"until": [], "max_gen_toks": 4})]),
        disable_tqdm=True,
    )
    requests = instances("loglikelihood", [(context, made), (context, made[:-1] + "~")])
    assert [greedy for _, greedy in StreamedLM(checkpoint).loglikelihood(requests)] == [
        greedy for _, greedy in reference.loglikelihood(requests, disable_tqdm=True)
    ]


@needs_torch
def test_rolling_loglikelihoods_are_hflms(checkpoint: Path, reference: Any) -> None:
    requests = instances(
        "loglikelihood_rolling",
        [("The cat sat on the mat. " * 400,), ("The dog",), ("A tree. " * 9,)],
    )
    found, expected = (
        StreamedLM(checkpoint).loglikelihood_rolling(requests),
        reference.loglikelihood_rolling(requests),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@needs_torch
def test_generation_is_hflms(checkpoint: Path, reference: Any) -> None:
    options = {"until": ["cat", "\n\n"], "max_gen_toks": 12, "do_sample": False}
    contexts = ["The cat sat on", "A dog", "The big red house. " * 300, "It was"]
    requests = instances("generate_until", [(context, options) for context in contexts])
    found = StreamedLM(checkpoint).generate_until(requests)
    assert found == reference.generate_until(requests, disable_tqdm=True)
    assert any(found)


@needs_torch
@pytest.mark.parametrize(
    "name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"]
)
def test_the_length_of_a_generation_has_hflms_names(
    name: str, checkpoint: Path, reference: Any
) -> None:
    requests = instances("generate_until", [("The cat sat on", {"until": "\n\n", name: 3})])
    assert StreamedLM(checkpoint).generate_until(requests) == reference.generate_until(
        requests, disable_tqdm=True
    )


@pytest.mark.parametrize("options", [{"do_sample": True}, {"temperature": 0.5}], ids=str)
def test_a_generation_that_samples_is_refused(options: dict[str, Any], checkpoint: Path) -> None:
    with pytest.raises(InputError, match="generates greedily"):
        StreamedLM(checkpoint).generate_until(instances("generate_until", [("A", options)]))
    options = {"max_gen_toks": 1, "do_sample": False, "temperature": 0.5}
    assert StreamedLM(checkpoint).generate_until(instances("generate_until", [("A", options)]))


def test_the_model_is_read_once_and_few_shapes_are_compiled(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = open_checkpoint(checkpoint)
    asked: list[str] = []
    read = reader.read
    monkeypatch.setattr(reader, "read", lambda paths: asked.extend(paths) or read(paths))
    model = StreamedModel(reader)
    shapes: list[tuple[int, ...]] = []
    states = model.final_states
    monkeypatch.setattr(
        model,
        "final_states",
        lambda *texts, **rest: shapes.extend(t.shape for t in texts) or states(*texts, **rest),
    )
    texts = [
        (f"The cat {'sat ' * (number % 70 * 5)}on", f" {'mat ' * (number % 5 + 1)}")
        for number in range(300)
    ]
    StreamedLM(model).loglikelihood(instances("loglikelihood", texts))
    assert [length for _, length in shapes] == [256, 512, 1024]
    layers = [path for path in asked if path.startswith("layers.")]
    assert (
        len(layers) == len(set(layers)) == sum(path.startswith("layers.") for path in reader.spec)
    )


def test_options_that_mean_nothing_are_refused(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="leave the batch size out"):
        StreamedLM(checkpoint, batch_size=8)
    with pytest.raises(InputError, match="JAX chooses the device"):
        StreamedLM(checkpoint, device="cuda:1")
    with pytest.raises(InputError, match="must be 1 to 1024"):
        StreamedLM(checkpoint, max_length=2000)
    assert StreamedLM(checkpoint, batch_size=1, dtype="float32").max_length == 1024


@needs_torch
@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_hflm_of_any_format_is_the_same_model(
    to: str, checkpoint: Path, reference: Any, tmp_path: Path
) -> None:
    reader = open_checkpoint(checkpoint)
    with create_checkpoint(tmp_path / to, reader.spec, reader.assets, to=to) as writer:
        writer.write(reader.read(reader.spec))
    requests = instances("loglikelihood", TEXTS[:5])
    found = hflm(open_checkpoint(tmp_path / to), np.dtype("float32")).loglikelihood(
        requests, disable_tqdm=True
    )
    expected = reference.loglikelihood(requests, disable_tqdm=True)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=1e-6)


WITHOUT_TORCH = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: (
    None if name.split(".")[0] == "torch" else find(name, *rest)
)
class Hide:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("no torch here", name=name)
sys.meta_path.insert(0, Hide())
from jaxprune.commands.evaluate import main
print([main(sys.argv[1:]), main([*sys.argv[1:], "--overwrite", "--backend", "torch"])])
"""


def test_the_jax_backend_needs_no_torch(checkpoint: Path, tmp_path: Path) -> None:
    data = rows.write(tmp_path / "rows")
    options = [
        *"--eval zero-shot --tasks openbookqa --tasks-data".split(),
        data,
        "--out",
        tmp_path / "out",
    ]
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, [checkpoint, *options])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | xla.quick())
    assert done.stdout.splitlines()[-1] == "[0, 2]", done.stderr
    assert "openbookqa, acc_norm" in done.stdout
    assert "pip install 'jaxprune[torch]'" in done.stderr.splitlines()[-1]


WITHOUT_LM_EVAL = """
import sys
sys.modules["lm_eval"] = None
from jaxprune.commands.lm_eval import main
sys.exit(main())
"""


def test_lm_eval_is_asked_for_where_it_is_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LM_EVAL, "run"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: zero-shot tasks need lm-eval")
    assert "pip install 'jaxprune[eval]'" in done.stderr


def test_lm_evals_own_command_line_without_a_network_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable() -> None:
        raise ConnectionError("Couldn't reach 'google/boolq' on the Hub\nand more")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", unreachable)
    monkeypatch.setattr(sys, "argv", ["jaxprune"])
    assert lm_eval_main(["run"]) == 2
    said = capsys.readouterr().err
    assert "boolq' on the Hub): connect to the hub once" in said and said.count("\n") == 1


def test_lm_evals_own_command_line_knows_the_model(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = rows.write(tmp_path / "rows")
    task = tmp_path / "task"
    task.mkdir()
    (task / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {data / 'openbookqa.jsonl'}}}}}\n"
        'doc_to_text: question_stem\ndoc_to_target: 2\ndoc_to_choice: "{{choices.text}}"\n'
    )
    command = [
        *"run --model jaxprune --tasks mine --model_args".split(),
        f"pretrained={checkpoint}",
    ]
    command += ["--include_path", str(task), "--output_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["jaxprune"])
    assert lm_eval_main(command) == 0
    assert "|acc" in capsys.readouterr().out.replace(" ", "")
