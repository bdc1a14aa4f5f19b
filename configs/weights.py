"""python weights.py ENCODER [ENCODER ...]

Fetches the weights of encoders once, before many jobs start that would all fetch them. Run it where there is a network.
"""

import sys

from extract.config import Encoder
from extract.encoders.frozen import load_encoder


def main(names: list[str]) -> None:
    """Load each encoder; whatever is not at hand comes from the hub."""
    for name in names:
        encoder = load_encoder(Encoder(name=name, device="cpu"))
        print(f"{name}: {encoder.source}, weights {encoder.weights_sha256[:12]}")


if __name__ == "__main__":
    main(sys.argv[1:])
