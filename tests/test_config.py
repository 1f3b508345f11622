"""Flags come from the options' dataclasses, and nothing is accepted and ignored."""

import dataclasses
import re

import pytest

from jaxprune import methods
from jaxprune.config import Config, field_docs, parse
from jaxprune.errors import InputError
from jaxprune.methods import Crossed
from jaxprune.methods.admm import ADMM
from jaxprune.methods.magnitude import Magnitude
from jaxprune.methods.wanda import Wanda
from jaxprune.patterns import NM, Unstructured


def test_defaults_are_the_papers() -> None:
    config, method = parse(["--ckpt", "llama-7b"])
    assert method == ADMM()
    assert (config.nsamples, config.seqlen, config.seed) == (128, 2048, 0)
    assert (config.calib, config.eval_text, config.eval_seqlen) == ("c4", "wikitext2", 2048)
    assert config.pattern_object() == Unstructured(0.5)
    assert config.out == "llama-7b-admm-50"


def test_every_flag_arrives() -> None:
    config, method = parse(
        "--ckpt x/y --out o --overwrite --method admm --sparsity 0.7 --pattern per-output --calib wikitext2 "
        "--nsamples 3 --seqlen 9 --pack --eval-text none --eval-seqlen 8 --eval-windows 2 --seed 5 --dtype bfloat16 "
        "--device cpu --schedule constant --iterations 30 --selections 4 --damping 0.2 --rho 2.5 "
        "--linear-solve cholesky".split()
    )
    assert method == ADMM("constant", 30, 4, 0.2, 2.5, "cholesky")
    assert config == Config(
        ckpt="x/y", out="o", overwrite=True, method="admm", mask=None, sparsity=0.7, pattern="per-output",
        calib="wikitext2", nsamples=3, seqlen=9, pack=True, eval_text="none", eval_seqlen=8, eval_windows=2, seed=5,
        dtype="bfloat16", device="cpu",
    )  # fmt: skip


def test_methods_are_chosen_and_crossed() -> None:
    assert parse("--ckpt x --method wanda".split())[1] == Wanda()
    assert parse("--ckpt x --method wanda --mask wanda".split())[1] == Wanda()
    config, method = parse("--ckpt x --mask wanda --iterations 25".split())
    assert method == Crossed(Wanda(), ADMM(iterations=25))
    assert config.out == "x-wanda-admm-50"
    assert parse("--ckpt x --method magnitude".split())[1] == Magnitude()


def test_a_method_compares_scores_as_it_was_published() -> None:
    assert parse("--ckpt x --method wanda".split())[0].pattern_object() == Unstructured(0.5, per_output=True)
    assert parse("--ckpt x --mask wanda".split())[0].pattern_object() == Unstructured(0.5, per_output=True)
    assert parse("--ckpt x --method wanda --pattern unstructured".split())[0].pattern_object() == Unstructured(0.5)
    config, _ = parse("--ckpt a/b.gguf --pattern 2:4 --sparsity 0.5".split())
    assert config.pattern_object() == NM(2, 4)
    assert config.out == "b-admm-2of4"


def test_the_model_without_a_hub_gets_text_without_a_hub() -> None:
    config, _ = parse(["--ckpt", "smollm2-135m"])
    assert (config.calib, config.eval_text) == ("wikipedia", "wikipedia")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--ckpt x --sparsity 1.5", "sparsity must be"),
        ("--ckpt x --pattern 4:2", "0 < N < M"),
        ("--ckpt x --method wnda", "did you mean wanda"),
        ("--ckpt x --nsamples 0", "--nsamples must be at least 1"),
        ("--ckpt x --eval-windows -3", "--eval-windows must be at least 1"),
        ("--ckpt x --iterations 0", "iterations must be at least 1"),
        ("--ckpt x --pattern 2:4 --sparsity 0.7", "2:4 has a sparsity of 0.5, not 0.7"),
        ("--ckpt x --rho 0", "rho must be positive"),
    ],
)
def test_impossible_values_are_one_error(line: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(line.split())


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--ckpt x --mask wanda --schedule cubic",
        "--ckpt x --no-such-flag",
        "--ckpt x --dtype int8",
        "--ckpt x --method wanda --rho 1",
        "--ckpt x --seed a",
    ],
)
def test_unknown_flags_and_values_end_the_program(line: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(line.split())
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("name", methods.names())
def test_help_explains_every_flag(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--method", name, "--help"])
    assert ended.value.code == 0
    text = re.sub(r"\s", "", capsys.readouterr().out)  # argparse breaks lines within hyphened words
    for cls in (Config, methods.load(name)):
        docs = field_docs(cls)
        for field in dataclasses.fields(cls):
            assert f"--{field.name.replace('_', '-')}" in text
            assert re.sub(r"\s", "", docs[field.name]) in text
