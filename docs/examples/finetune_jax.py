"""Fine-tunes the decoder layers of a pruned checkpoint with optax, the whole model in memory, and
keeps its zeros.

    python finetune_jax.py PRUNED TEXT.jsonl TUNED

TEXT.jsonl has one document a line, under "text". `jaxprune verify TUNED --zeros-of PRUNED` proves
the outcome. A model that does not fit in memory three times over is tuned layer by layer while it
is pruned: `jaxprune --tune-tokens`.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune
from convert import create_checkpoint, parts
from jaxprune.streaming.model import in_checkpoint


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pruned")
    parser.add_argument("text")
    parser.add_argument("tuned")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    args = parser.parse_args(argv)
    if Path(args.tuned).exists():
        parser.error(f"{args.tuned} already exists")
    if not Path(args.text).is_file():
        parser.error(f"there is no file {args.text}")
    if args.steps < 1 or args.length < 2:
        parser.error("there must be a step at least, and windows of two tokens")

    model = jaxprune.load(args.pruned)
    embed, layers, head = (
        model.architecture.embed,
        model.architecture.layers,
        model.architecture.head,
    )
    embed_params, head_params = model.params_of(embed), model.params_of(head)
    # these are trained
    params = [model.put_layer(index, layer) for index, layer in enumerate(model.layers())]

    def loss(params, tokens):
        x = embed(embed_params, tokens)
        for layer, own in zip(layers, params, strict=True):
            x, _ = layer(own, x)
        logits = head(head_params, x)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    schedule = optax.warmup_cosine_decay_schedule(0, args.rate, args.steps // 10, args.steps)
    optimizer = optax.chain(optax.adam(schedule), optax.stateless(keep_zeros))

    @jax.jit
    def step(params, state, tokens):
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    stream = jaxprune.TextStream(args.text, model.tokenizer, args.length, seed=0, held_out=0)
    windows = stream.windows(0)
    for number in range(args.steps):
        tokens = jnp.asarray(np.stack([next(windows) for _ in range(4)]), jnp.int32)
        params, state, value = step(params, state, tokens)
        if number % 10 == 0 or number == args.steps - 1:
            print(f"step {number}: loss {value:.4f}")

    spec = model.reader.spec
    with create_checkpoint(args.tuned, spec, model.reader.assets) as writer:
        for part, paths in parts(spec).items():
            if not part.startswith("layers."):
                writer.write(model.reader.read(paths))
        for index, (layer, own) in enumerate(zip(layers, params, strict=True)):
            stored = in_checkpoint(
                index, layer.unstack({path: np.asarray(array) for path, array in own.items()})
            )
            writer.write({path: array.astype(spec[path].dtype) for path, array in stored.items()})
    print(f"{args.tuned} is written: jaxprune verify {args.tuned} --zeros-of {args.pruned}")


def keep_zeros(updates, params):
    """Returns the updates with zeros where a kernel has zeros."""
    return jax.tree.map(lambda u, p: jnp.where(p == 0, 0, u) if p.ndim > 1 else u, updates, params)


if __name__ == "__main__":
    main()
