"""lm-eval's own command line, with jaxprune's model: `python -m jaxprune.lm_eval run --model jaxprune ...`.

python -m jaxprune.lm_eval run --model jaxprune --model_args pretrained=DIR --tasks boolq,rte
"""

import sys

from lm_eval.__main__ import cli_evaluate

from jaxprune.console import run_main
from jaxprune.evaluation import lm  # noqa: F401  registers the model


def main() -> int:
    """Runs lm-eval's command line; returns the exit status."""
    return run_main(lambda argv: cli_evaluate(), None)


if __name__ == "__main__":
    sys.exit(main())
