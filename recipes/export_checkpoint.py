"""Turn a training run into a checkpoint folder: `python -m audiotok.recipes.export_checkpoint RUN/best OUT`.

Weights are rounded to half precision by default, which halves the file and changed no figure of auv-mini beyond its
noise. The rounded weights are what the fingerprint covers; they load as float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from audiotok import AudioTokenizer, AutoAudioTokenizer
from audiotok.errors import OutputExistsError, check_choice
from audiotok.recipes.command_line import Overwrite, run_command

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@torch.no_grad()
def export_checkpoint(source: Path, output: Path, name: str, dtype: str = "float16", overwrite: bool = False) -> Path:
    """Write `source` (a folder that `save_pretrained` wrote) to `output` as the tokenizer called `name`.

    Args:
        dtype: of the weights on disk. Counters and other integers stay as they are.
        overwrite: replace an earlier export; its README.md stays.

    Raises:
        OutputExistsError: `output` holds a checkpoint already.
    """
    check_choice("dtype", dtype, DTYPES)
    if (output / "config.json").exists() and not overwrite:
        raise OutputExistsError(f"{output} holds a checkpoint already: add --overwrite to replace it.")
    tokenizer: AudioTokenizer = AutoAudioTokenizer.from_pretrained(source)
    tokenizer.name_or_path = name
    for tensor in (*tokenizer.codec.parameters(), *tokenizer.codec.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(DTYPES[dtype]))
    tokenizer.save_pretrained(output)
    stored = {
        key: value.to(DTYPES[dtype]).contiguous() if value.is_floating_point() else value
        for key, value in tokenizer.codec.state_dict().items()
    }
    save_file(stored, output / "model.safetensors", metadata={"format": "pt"})
    (output / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    return output


def main(
    source: Annotated[Path, typer.Argument(help="Folder with the trained weights, e.g. RUN/best.", exists=True)],
    output: Annotated[Path, typer.Argument(help="Folder of the checkpoint.")],
    name: Annotated[str, typer.Option(help="What users call it, e.g. audiotok/auv-mini.")] = "",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    overwrite: Overwrite = False,
) -> None:
    """Round the weights and write a folder that `from_pretrained` reads."""
    folder = export_checkpoint(source, output, name or output.name, dtype, overwrite)
    size = sum(path.stat().st_size for path in folder.iterdir())
    typer.echo(f"{folder}: {size / 1e6:.1f} MB, fingerprint {AutoAudioTokenizer.from_pretrained(folder).fingerprint}")


if __name__ == "__main__":
    run_command(main)
