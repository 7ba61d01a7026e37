"""Train, prune, validate and test the digits' autoencoder, as the YAML files beside this one say.

python examples/cli/main.py fit --config examples/cli/prune.yaml
"""

from digits import DigitsAutoencoder, DigitsData
from lightning.pytorch.cli import ArgsType, LightningCLI

from lightning_softprune.parser import SuggestingParser


def main(args: ArgsType = None) -> LightningCLI:
    """Reads `args`, by default those of the command line, and does what they say."""
    return LightningCLI(
        DigitsAutoencoder, DigitsData, seed_everything_default=0, parser_class=SuggestingParser, args=args
    )


if __name__ == "__main__":
    main()
