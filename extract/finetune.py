"""python -m extract.finetune config=NAME [key=value ...]

Fine-tunes an encoder on labelled tiles: LoRA (mode=lora) or all weights (mode=full), beside the frozen encoder; or only
the frozen one (mode=probe): a linear probe and the nearest neighbours, with intervals. Extraction takes the result as
encoder.adapter=RUN/adapter (mode=lora) or encoder.weights=RUN/encoder.safetensors (mode=full).

    python -m extract.finetune config=nct-crc-lora.yaml
    python -m extract.finetune config=nct-crc-lora.yaml data.root=/data/nct-crc-he
    python -m extract.finetune config=nct-crc-lora.yaml mode=probe data.features=cache/nct-crc out=runs/nct-crc
    python -m extract.finetune data.folder=/data/NCT-CRC-HE out=runs/mine
    python -m extract.finetune data.csv=tiles.csv encoder.name=phikon out=runs/mine

The first reads owkin/nct-crc-he from the Hugging Face hub (data.hub, data.revision), the second its Parquet files on
disk, the third features that `python -m extract.run config=nct-crc.yaml` has written; the others a folder a class,
and a table with image, label and patient or slide.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from extract.config import config_from_command_line
from extract.encoders.table import EncoderError
from extract.ending import ended
from extract.finetuning.config import FinetuneConfig, finetune_problems
from extract.lock import only_command_in
from extract.stores.sessions import stores_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 config, tiles or encoder are wrong (nothing was written), 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    config = config_from_command_line(FinetuneConfig, arguments, __doc__ or "", also=finetune_problems)
    config = config.model_copy(update={"out": config.out or default_out(arguments)})

    def finetune() -> int:
        assert config.out is not None
        with only_command_in(config.out, "extract.finetune"), stores_of(config, out=config.out):
            from extract.finetuning.tuning import run_finetuning  # torch, lightning: only for a valid config

            folder, table = run_finetuning(config, ["python", "-m", "extract.finetune", *arguments])
        print(f"\n{table}\n\nReport: {folder / 'report.html'}")
        if config.mode == "lora":
            print(f"For extraction: encoder.name={config.encoder.name} encoder.adapter={folder / 'adapter'}")
        return 0

    return ended(
        finetune,
        interrupted=lambda: "Interrupted; nothing was written.",
        after=lambda: "Nothing of this fine-tuning was kept.",
        known=lambda: (EncoderError,),
    )


def default_out(arguments: Sequence[str]) -> Path:
    """runs/NAME for config=NAME.yaml, runs/finetune without a config."""
    names = [a.partition("=")[2] for a in arguments if a.startswith("config=")]
    return Path("runs") / (Path(names[-1]).stem if names else "finetune")


if __name__ == "__main__":
    sys.exit(main())
