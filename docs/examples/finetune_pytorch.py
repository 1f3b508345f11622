"""Fine-tunes a pruned checkpoint with transformers' Trainer, all weights or LoRA adapters, and
keeps its zeros.

    python finetune_pytorch.py PRUNED TEXT.jsonl TUNED [--lora]

TEXT.jsonl has one document a line, under "text". `jaxprune verify TUNED --zeros-of PRUNED` proves
the outcome.
"""

import argparse
import tempfile

import datasets
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import jaxprune


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pruned")
    parser.add_argument("text")
    parser.add_argument("tuned")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, help="default: 1e-5, with --lora 2e-4")
    parser.add_argument("--length", type=int, default=512, help="most tokens of a document")
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.pruned)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.pruned, dtype=torch.float32)
    stored = model.config.dtype
    masks = jaxprune.keep_zeros(model)  # this line keeps the zeros
    if args.lora:
        model = get_peft_model(
            model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
        )
        layers = {
            name: layer
            for name, layer in model.base_model.model.named_modules()
            if isinstance(layer, LoraLayer)
        }
        for name, layer in layers.items():
            layer.forward = masked(layer, masks.get(f"{name}.weight"))

    texts = datasets.load_dataset("json", data_files=args.text, split="train")
    tokens = texts.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=args.length),
        remove_columns=texts.column_names,
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=args.steps,
            learning_rate=args.rate or (2e-4 if args.lora else 1e-5),
            per_device_train_batch_size=4,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            save_strategy="no",
            report_to="none",
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        Trainer(model, settings, train_dataset=tokens, data_collator=collator).train()

    if args.lora:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.base_layer.weight += masks[f"{name}.weight"] * layer.get_delta_weight(
                    "default"
                )
        model = model.unload()
    model.to(stored).save_pretrained(args.tuned)
    tokenizer.save_pretrained(args.tuned)


def masked(layer, mask):
    """Returns a forward pass in which an adapter changes only weights that are kept, as they will
    when it is merged."""

    def forward(x):
        weight = layer.base_layer.weight + mask * layer.get_delta_weight("default")
        return torch.nn.functional.linear(x, weight, layer.base_layer.bias)

    return forward


if __name__ == "__main__":
    main()
