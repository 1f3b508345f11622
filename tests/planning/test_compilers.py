"""What the compilers of hardware that is not here make of each program; see the README for what
installs them."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxprune import ADMM, SparseGPT, Unstructured
from jaxprune.costs.shapes import Shapes
from jaxprune.distill import tuning_costs
from jaxprune.distill.placement import Placement
from jaxprune.distill.schedule import TuningSteps
from jaxprune.evaluation import perplexity
from jaxprune.hardware import writing_for
from jaxprune.methods import Method
from jaxprune.models import architecture_of
from jaxprune.planning.target_hardware import target_of, without_cache
from jaxprune.recipe_parts import Tuning
from jaxprune.solve import layer_costs, sensitivity
from tests.helpers import tiny

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
GPUS = r"cusolver|cublas|__triton|TopK|topk|cu_|__cudnn\$fmha"
"""Custom calls that GPUs have."""


@pytest.mark.parametrize("method", [ADMM(), SparseGPT()], ids=["admm", "sparsegpt"])
@pytest.mark.parametrize("name", ["h100", "v5e"])
def test_every_program_compiles(name: str, method: Method, tmp_path: Path) -> None:
    target = target_of(name)
    if not target.has_compiler:
        pytest.skip(f"the compiler of {target.display_name} is not installed: {target.install}")
    tiny.config(**SIZES, num_hidden_layers=1, max_position_embeddings=1024).save_pretrained(
        tmp_path
    )
    with writing_for(target.hardware), without_cache(), jax.numpy_dtype_promotion("standard"):
        shapes = Shapes(architecture_of(tmp_path, jnp.bfloat16), jnp.bfloat16, target.devices(1))
        every = [*layer_costs.programs(shapes, 16, 1024, method, Unstructured(0.5))]
        if isinstance(method, ADMM):
            every += sensitivity.programs(shapes, 16, 1024)
            steps = TuningSteps.of(Tuning(tune_epochs=1, tune_gradual=0.5), 16, 1024)
            every += tuning_costs.programs(shapes, steps, Placement(True, True))
            every += perplexity.programs(shapes, 16, 1024)
        for program in every:
            compiled = program.compiled(target.options)
            written = compiled.as_text() or ""
            on = {
                device
                for one in jax.tree.leaves(compiled.input_shardings)
                for device in one.device_set
            }
            assert on <= {shapes.devices.device}, program.name
            libraries = 2**23  # what they ask for besides
            assert program.peak_bytes(compiled) <= program.most_bytes() + libraries, program.name
            assert "f64[" not in written, program.name
            calls = set(re.findall(r'custom_call_target="([^"]*)"', written))
            assert not [call for call in calls if re.search("lapack|eigen|onednn", call.lower())], (
                calls
            )
            if name == "h100":
                assert all(re.search(GPUS, call) for call in calls), calls
            if program.phase in ("gram", "forward") or program.name == "backward":
                assert any("fmha" in call for call in calls) == target.hardware.cudnn, program.name
    assert {program.phase for program in every} >= {"gram", "solve", "forward"}
