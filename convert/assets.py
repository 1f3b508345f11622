"""What a checkpoint holds besides weights: configuration, tokenizer, generation settings."""

import json
import shutil
from pathlib import Path
from typing import Any

from convert import CheckpointError

SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


def read_config(assets: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    path = assets / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{assets} has no config.json: point at a complete checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object: fetch it again")
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(
            f"{assets} is quantized ({method}); take the unquantized checkpoint, or a GGUF file, which is "
            "dequantized when read"
        )
    return config


def copy_assets(source: Path, target: Path) -> None:
    """Copies configuration and tokenizer files; weights, their index and model cards stay behind."""
    for path in sorted(source.iterdir()):
        # Files in a hub cache are links to blobs; copyfile copies what they point to, with this user's mode.
        if path.suffix in SUFFIXES and not path.name.endswith(".index.json") and path.is_file():
            shutil.copyfile(path, target / path.name)


def has_tokenizer(assets: Path) -> bool:
    return any((assets / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))


def load_tokenizer(assets: Path) -> Any:
    """The tokenizer of a checkpoint, by transformers; no code from the checkpoint is run.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if not has_tokenizer(assets):
        raise CheckpointError(
            f"{assets} has no tokenizer: add the model's tokenizer files, or give the calibration text as token "
            "ids in a .npy file"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(assets, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read the tokenizer in {assets}: {error}") from error
