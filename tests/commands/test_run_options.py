"""Flags come from the options' dataclasses, and nothing is accepted and ignored."""

import dataclasses
import re

import pytest

from convert.errors import UserError
from jaxprune import methods
from jaxprune.commands.command_line import field_docs
from jaxprune.commands.prune import main
from jaxprune.commands.recipe_options import Flags, WholeModel
from jaxprune.commands.run_options import Config, parse
from jaxprune.errors import Change, InputError
from jaxprune.methods import Method
from jaxprune.methods.admm import ADMM
from jaxprune.methods.alps import ALPS
from jaxprune.methods.combine import Crossed, Finished
from jaxprune.methods.exact import Exact
from jaxprune.methods.gradient import Gradient
from jaxprune.methods.magnitude import Magnitude
from jaxprune.methods.sparsegpt import SparseGPT
from jaxprune.methods.wanda import Wanda
from jaxprune.recipe import PRESETS, Recipe
from jaxprune.recipe_parts import Importance, Structure, Tuning
from jaxprune.sparsity.patterns import NM, Unstructured


def test_defaults_are_the_papers() -> None:
    config, recipe = parse(["--ckpt", "llama-7b"])
    assert recipe.method == ADMM()
    assert recipe.pattern == Unstructured(0.5)
    assert recipe.mask is None
    assert (config.nsamples, config.seqlen, config.seed) == (128, 2048, 0)
    assert (config.calib, config.eval_text, config.eval_seqlen) == ("c4", "wikitext2", 2048)
    assert config.out == "llama-7b-admm-50"


def test_every_flag_arrives() -> None:
    config, recipe = parse(
        "--ckpt x/y --out o --overwrite --save-masks m --method admm --sparsity 0.7 --pattern "
        "per-output "
        "--calib wikitext2 --nsamples 3 --seqlen 9 --pack --seed 5 --eval ppl,zero-shot "
        "--eval-text c4,t "
        "--eval-seqlen 8 --eval-windows 2 --tasks boolq,rte --limit 4 --tasks-data d --backend "
        "torch "
        "--dtype bfloat16 --device cpu --schedule constant --iterations 30 --selections 4 "
        "--damping 0.2 --rho 2.5 "
        "--linear-solve cholesky --finish-steps 7 --token-power 0.25 --asymmetry 0.5 --tune-epochs "
        "3 --tune-rate 0.01 "
        "--tune-windows 5 --tune-chunks 6 --tune-gradual 0.7 --quantize q4_0".split()
    )
    assert recipe.importance == Importance(token_power=0.25) and recipe.asymmetry == 0.5
    assert recipe.quantize == "q4_0"
    assert recipe.tuning == Tuning(3, 0.01, 5, 6, tune_gradual=0.7)
    _, other = parse("--ckpt x --weigh-outputs --max-deviation 0.1 --sensitivity-windows 3".split())
    assert other.importance == Importance(
        weigh_outputs=True, max_deviation=0.1, sensitivity_windows=3
    )
    assert recipe.method == Finished(ADMM("constant", 30, 4, 0.2, 2.5, "cholesky"), Exact(steps=7))
    assert recipe.pattern == Unstructured(0.7, per_output=True)
    assert config == Config(
        ckpt="x/y", out="o", overwrite=True, save_masks="m", calib="wikitext2",
        nsamples=3, seqlen=9, pack=True, seed=5, eval="ppl,zero-shot", eval_text="c4,t",
        eval_seqlen=8, eval_windows=2, tasks="boolq,rte", limit=4, tasks_data="d",
        backend="torch", dtype="bfloat16", device="cpu",
    )  # fmt: skip


def method(line: str) -> Method:
    return parse(f"--ckpt x {line}".split())[1].method


def test_methods_are_chosen_and_crossed() -> None:
    assert method("--method wanda") == Wanda()
    assert method("--method wanda --mask wanda") == Wanda()
    assert method("--mask wanda --update wanda") == Wanda()
    assert method("--method magnitude") == Magnitude()
    assert method("--mask wanda --iterations 25") == Crossed(Wanda(), ADMM(iterations=25))
    assert (
        method("--mask wanda --update admm")
        == method("--method wanda --update admm")
        == Crossed(Wanda(), ADMM())
    )
    assert method("--mask sparsegpt --update exact") == Crossed(SparseGPT(), Exact())
    assert method("--update exact") == Crossed(ADMM(), Exact())
    assert method("--method exact --steps 3") == Exact(steps=3)
    assert method("--mask wanda --update gradient --optimizer sgd --learning-rate 0.2") == Crossed(
        Wanda(), Gradient(optimizer="sgd", learning_rate=0.2)
    )
    assert parse("--ckpt x --mask wanda".split())[0].out == "x-wanda-admm-50"


def test_options_that_both_methods_have_are_distinguished() -> None:
    crossed = method("--mask sparsegpt --update admm --mask-damping 0.3 --update-damping 0.4")
    assert crossed == Crossed(SparseGPT(damping=0.3), ADMM(damping=0.4))
    # Wanda's selection, which the gradient method takes, knows no damping: there is one only.
    assert method("--mask gradient --update admm --damping 0.4") == Crossed(
        Gradient(), ADMM(damping=0.4)
    )
    assert method(
        "--mask alps --update sparsegpt --iterations 9 --block 64 --mask-damping 0.02"
    ) == Crossed(ALPS(iterations=9, damping=0.02), SparseGPT(block=64))


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_given_beside_a_preset_wins(preset: str) -> None:
    def recipe(line: str) -> Recipe:
        return parse(f"--ckpt x --preset {preset} {line}".split())[1]

    made = recipe("--sparsity 0.7")
    assert (
        made.importance.max_deviation == PRESETS[preset].importance.max_deviation == 0.3
        and made.importance.weigh_outputs
    )
    assert made.tuning == PRESETS[preset].tuning
    assert made == PRESETS[preset].at(sparsity=0.7) == PRESETS[preset].at(0.7)
    with pytest.raises(InputError, match="give one sparsity"):
        PRESETS[preset].at(0.7, 0.5)
    assert (
        Recipe(pattern=NM(2, 4)).at()
        == Recipe(pattern=NM(2, 4)).at(0.5)
        == Recipe(pattern=NM(2, 4))
    )
    with pytest.raises(InputError, match="give one sparsity, not both 50 % and 0.7"):
        PRESETS[preset].at(Unstructured(0.5), sparsity=0.7)
    assert PRESETS[preset].at(NM(2, 4), sparsity=0.5) == PRESETS[preset].at("2:4", sparsity=0.5)
    for pattern in (None, "2:4", NM(2, 4)):
        with pytest.raises(InputError, match="2:4 has a sparsity of 0.5, not 0.7"):
            Recipe(pattern=NM(2, 4)).at(pattern, sparsity=0.7)
    with pytest.raises(InputError, match="2:4 has a sparsity of 0.5, not 0.7"):
        Recipe(pattern=NM(2, 4)).at(0.7)
    assert (made.pattern_text, made.slug) == ("70 % in total", f"{preset}-70")
    assert made.method_text.startswith(f"{preset}: admm, ")
    # A quarter of 20 %, which floats make 4.999999999999999 %.
    assert (", the last 5 % of the weights pruned gradually" in made.method_text) == (
        made.tuning.tune_gradual > 0
    )
    assert recipe("--tune-epochs 7 --max-deviation 0.05").tuning.tune_epochs == 7
    assert recipe("--tune-epochs 7 --max-deviation 0.05").importance.max_deviation == 0.05
    assert not recipe("--no-weigh-outputs").importance.weigh_outputs
    # N:M is not pruned gradually.
    for line, target, late in (
        ("--uniform", "50 %", made.tuning.tune_gradual),
        ("--pattern 2:4", "2:4", 0.0),
    ):
        fixed = recipe(line)
        assert (fixed.importance.max_deviation, fixed.pattern_text) == (0.0, target)
        assert fixed.importance.weigh_outputs and fixed.tuning == dataclasses.replace(
            made.tuning, tune_gradual=late
        )
    assert fixed == made.at("2:4")
    own, other = ("tokens", "epochs") if made.tuning.tune_tokens else ("epochs", "tokens")
    assert recipe(f"--tune-{own} 0").tuning == Tuning()
    with pytest.raises(
        InputError, match=f"the tuning of --preset {preset} has no {other}"
    ) as error:
        recipe(f"--tune-{other} 0")
    assert error.value.options == {f"tune_{own}": 0, f"tune_{other}": Change.OMIT}
    assert recipe("--tune-tokens 0 --tune-epochs 0").tuning == Tuning()
    chunks, late = made.tuning.tune_chunks, made.tuning.tune_gradual
    assert recipe("--tune-tokens 250k").tuning == Tuning(
        tune_tokens=250_000, tune_chunks=chunks, tune_gradual=late
    )
    assert (f"windows in {chunks} chunks" in made.method_text) == (chunks > 1)
    for count in (1, 3):
        assert recipe(f"--tune-chunks {count}").tuning == dataclasses.replace(
            made.tuning, tune_chunks=count
        )
    # Given masks have all their zeros.
    assert recipe("--mask from-file:m").tuning == dataclasses.replace(made.tuning, tune_gradual=0.0)
    # No reverse pass where nothing would come of it.
    assert not recipe("--pattern per-output").importance.measured
    assert not recipe("--mask from-file:m").importance.measured
    assert recipe("--uniform").slug == f"{preset}-uniform-50"
    assert recipe("--quantize q4_0").slug == f"{preset}-50-q4_0"
    assert (
        recipe("--rule *=0.7").slug == f"{preset}-70"
        and recipe("--rule *=2:4").slug == f"{preset}-2of4"
    )
    assert recipe("--rule *=0.7 --skip *.mlp.*").slug == f"{preset}-rules"
    assert recipe("--rule *.mlp.*=0.7 --skip * --quantize q4_0").slug == "dense-q4_0"
    assert recipe("--drop-experts 0.25 --skip *").slug == "dense-without-25-experts"
    assert made.method == ADMM(damping=0.03) and recipe("--damping 0.2").method == ADMM(damping=0.2)
    assert recipe("--method alps").method == ALPS()
    assert recipe("--mask sparsegpt").method == Crossed(SparseGPT(), ADMM(damping=0.03))
    weighed = recipe("--token-power 0.5").importance
    assert (weighed.token_power, weighed.sensitivity_windows) == (0.5, None)


@pytest.mark.parametrize("name", ["from-checkpoint:pruned", "from-file:masks.safetensors"])
def test_masks_made_elsewhere_leave_the_update_to_choose(name: str) -> None:
    config, recipe = parse(["--ckpt", "x", "--mask", name, "--iterations", "30"])
    assert (recipe.method, recipe.mask) == (ADMM(iterations=30), name)
    assert config.out == "x-admm-given-mask"
    assert name in recipe.pattern_text
    assert parse(["--ckpt", "x", "--mask", name, "--update", "exact"])[1].method == Exact()


def test_a_method_compares_scores_as_it_was_published() -> None:
    def pattern(line: str) -> object:
        return parse(f"--ckpt x {line}".split())[1].pattern

    assert (
        pattern("--method wanda") == pattern("--mask wanda") == Unstructured(0.5, per_output=True)
    )
    assert pattern("--method wanda --pattern unstructured") == Unstructured(0.5)
    assert pattern("--method sparsegpt") == pattern("--method alps") == Unstructured(0.5)
    assert pattern("--pattern 2:4 --sparsity 0.5") == NM(2, 4)
    assert parse("--ckpt a/b.gguf --pattern 2:4".split())[0].out == "b-admm-2of4"


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
        ("--ckpt x --eval zero-shot --limit 0", "--limit must be at least 1"),
        (
            "--ckpt x --eval boolq",
            "--eval takes ppl, samples, zero-shot, speed or none, not 'boolq'; tasks go to --tasks",
        ),
        (
            "--ckpt x --tasks boolq",
            "--tasks is for --eval zero-shot, but --eval is ppl: pass --eval ppl,zero-shot",
        ),
        ("--ckpt x --eval none --eval-text c4", "--eval-text is for --eval ppl"),
        ("--ckpt x --iterations 0", "iterations must be at least 1"),
        ("--ckpt x --pattern 2:4 --sparsity 0.7", "2:4 has a sparsity of 0.5, not 0.7"),
        ("--ckpt x --rho 0", "rho must be finite and positive"),
        ("--ckpt x --method admm --mask wanda --update exact", "leave one of the three out"),
        ("--ckpt x --mask from-file:m --sparsity 0.5", "decides which weights stay"),
        ("--ckpt x --mask from-checkpoint:m --pattern 2:4", "decides which weights stay"),
        ("--ckpt x --finish-steps -1", "--finish-steps must not be negative"),
        ("--ckpt x --mask nobody", "no 'nobody' in methods"),
        ("--ckpt x --update nobody", "no 'nobody' in methods"),
        ("--ckpt x --method sparsegpt --block 0", "block must be at least 1"),
        ("--ckpt x --method sparsegpt --damping 0", "damping must be finite and positive"),
        ("--ckpt x --method alps --rho 0", "rho and damping must be finite and positive"),
        (
            "--ckpt x --method gradient --learning-rate 0",
            "learning_rate must be finite and positive",
        ),
        ("--ckpt x --method exact --steps 0", "steps must be at least 1"),
        ("--ckpt x --max-deviation 1", "max_deviation must be at least 0 and below 1"),
        ("--ckpt x --sensitivity-windows 0", "sensitivity_windows must be at least 1"),
        (
            "--ckpt x --token-power 1 --sensitivity-windows 4",
            "tokens can be weighed only by the gradients of all windows",
        ),
        ("--ckpt x --token-power -1", "token_power must be finite and not negative"),
        (
            "--ckpt x --pattern 2:4 --max-deviation 0.1",
            "2:4 is the same for every linear layer: leave --max-deviation out",
        ),
        (
            "--ckpt x --preset fast --pattern per-output --max-deviation 0.1",
            "only compare weights of one output: leave --max-deviation",
        ),
        (
            "--ckpt x --method wanda --weigh-outputs",
            "only compare weights of one output: leave --weigh-outputs out",
        ),
        ("--ckpt x --uniform", "--uniform does nothing by itself: pass --preset"),
        ("--ckpt x --sensitivity-windows 4", "--sensitivity-windows does nothing by itself"),
        (
            "--ckpt x --tune-rate 0.1",
            "--tune-rate does nothing by itself: pass --tune-epochs or --tune-tokens",
        ),
        ("--ckpt x --preset fast --uniform --max-deviation 0.1", "--uniform wants one sparsity"),
        (
            "--ckpt x --preset thorough --pattern 2:4 --tune-gradual 0.1",
            "pruned gradually during tuning: leave --tune-gradual out",
        ),
        (
            "--ckpt x --tune-epochs 1 --mask from-file:m --tune-gradual 0.1",
            "weights stay: leave --tune-gradual out",
        ),
        (
            "--ckpt x --mask from-file:m --max-deviation 0.1",
            "decide which weights stay: leave --max-deviation out",
        ),
        ("--ckpt x --asymmetry 1.5", "asymmetry must lie between 0 and 1"),
        (
            "--ckpt x --tune-gradual 0.5",
            "--tune-gradual does nothing by itself: pass --tune-epochs or --tune-tokens",
        ),
        (
            "--ckpt x --tune-tokens 1k --tune-gradual 1.5",
            "tune_gradual must be at least 0 and at most 1, not 1.5",
        ),
        ("--ckpt x --tune-epochs -1", "tune_epochs must be finite and not negative"),
        ("--ckpt x --tune-tokens -1", "tune_tokens must not be negative"),
        (
            "--ckpt x --tune-tokens 1M --tune-epochs 1",
            "the calibration windows or tokens of a text, not both",
        ),
        (
            "--ckpt x --tune-epochs 1 --tune-to-end",
            "--tune-to-end does nothing by itself: pass --tune-tokens",
        ),
        (
            "--ckpt x --preset best --tune-text own.jsonl",
            "--tune-text does nothing by itself: pass --tune-tokens",
        ),
        ("--ckpt x --seed -1", "--seed must be at least 0, not -1"),
        ("--ckpt x --seqlen 1", "--seqlen must be at least 2"),
        ("--ckpt x --eval-seqlen 1", "--eval-seqlen must be at least 2"),
        ("--ckpt x --devices 0", "--devices must be at least 1"),
        ("--ckpt x --devices 1000000", "--devices must be at most 256, not 1000000"),
        ("--ckpt x --device-memory 0", "--device-memory must be a positive number of GiB, not 0.0"),
        ("--ckpt x --device-memory -3", "--device-memory must be a positive number of GiB"),
        (
            "--ckpt x --coordinator h:1 --processes 2 --process-id 2",
            "--process-id must be below --processes, 2, not 2",
        ),
        (
            "--ckpt x --coordinator h:1 --processes 2 --process-id -1",
            "--process-id must be at least 0",
        ),
        (
            "--ckpt x --coordinator h:1 --processes 0 --process-id 0",
            "--processes must be at least 1",
        ),
        (
            "--ckpt x --coordinator h:70000 --processes 2 --process-id 0",
            "takes a port from 1 to 65534, not 70000",
        ),
        ("--ckpt x --coordinator h:0 --processes 2 --process-id 0", "takes a port from 1 to 65534"),
        (
            "--ckpt x --coordinator h --processes 2 --process-id 0",
            "takes HOST:PORT or auto, not 'h'",
        ),
        ("--ckpt x --coordinator :1 --processes 2 --process-id 0", "takes HOST:PORT or auto"),
        ("--ckpt x --coordinator a/b:1 --processes 2 --process-id 0", "takes HOST:PORT or auto"),
        (
            "--ckpt x --coordinator h:1",
            "--coordinator HOST:PORT, --processes and --process-id go together",
        ),
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
        "--ckpt x --mask from-file:m --schedule cubic",
        "--ckpt x --mask alps --update admm --cg-steps 3",
        "--ckpt x --mask sparsegpt --update admm --damping 0.1",
        "--ckpt x --method gradient --optimizer lbfgs",
        "--ckpt x --no-such-flag",
        "--ckpt x --dtype int8",
        "--ckpt x --method wanda --rho 1",
        "--ckpt x --preset better",
        "--ckpt x --out=",
        "--ckpt x --seed a",
        "--ckpt x --tune-epochs 0 --tune-tokens 1.5k",
        "--ckpt x --seed 99999999999",
        "--ckpt x --nsamples 1000000000000",
        f"--ckpt x --seqlen {'9' * 5000}",
        "--ckpt x --sparsity nan",
        "--ckpt x --asymmetry nan",
        "--ckpt x --tune-epochs 1 --tune-rate nan",
        "--ckpt x --max-deviation nan",
        "--ckpt x --token-power inf",
        "--ckpt x --damping nan",
        "--ckpt x --device-memory nan",
        "--ckpt x --device-memory inf",
    ],
)
def test_unknown_flags_and_values_are_errors_of_the_users(
    line: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(UserError):
        parse(line.split())
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_help_beside_a_preset_has_its_defaults(capsys: pytest.CaptureFixture) -> None:
    for line, there in (("--preset thorough --help", True), ("--help", False)):
        with pytest.raises(SystemExit):
            parse(line.split())
        text = re.sub(r"[\s│]", "", capsys.readouterr().out)
        for default in (0.03, True, 0.3, 8, 1_000_000, 0.25):
            assert (f"(default:{default})" in text) == there
    assert text.count("(default:") > 20 and not re.search(r"\(default:[^)]*\)\(default", text)


@pytest.mark.parametrize("name", methods.names())
def test_help_explains_every_flag(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--method", name, "--help"])
    assert ended.value.code == 0
    text = re.sub(r"[\s│]", "", capsys.readouterr().out)
    for cls in (Config, Flags, WholeModel, Importance, Tuning, Structure, methods.load(name)):
        docs = field_docs(cls)
        for field in dataclasses.fields(cls):
            assert f"--{field.name.replace('_', '-')}" in text, field.name
            assert re.sub(r"\s", "", docs[field.name]) in text
