"""Weights between those that training started from and those that it came to.

Fine-tuning forgets what its data hold little of. On the line between the two policies the old skills are
mostly back while the new one is mostly there: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models"
(CVPR, WiSE-FT, equation 1); for policies that learn one shift after the other, measured by
``flywheel bench turns``.
"""

from __future__ import annotations

from pathlib import Path

from flywheel.errors import StageError
from flywheel.vla import WEIGHTS_FILE


def average(start: Path, trained: Path, kept: float) -> None:
    """Rewrite ``trained``'s weights as ``kept``·``start`` + (1 - ``kept``)·``trained``, both checkpoints.

    What is not floating point stays as trained. Raises ``StageError`` where the two differ in shape.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    found = load_file(trained / WEIGHTS_FILE)
    with safe_open(start / WEIGHTS_FILE, "pt") as before:
        if set(before.keys()) != found.keys():
            names = sorted(set(before.keys()) ^ found.keys())[:3]
            raise StageError(f"{trained}: cannot be averaged with {start}: only one of them has {names}")
        for name, value in found.items():
            old = before.get_tensor(name)
            if old.shape != value.shape:
                raise StageError(
                    f"{trained}: cannot be averaged with {start}: {name} is {tuple(value.shape)},"
                    f" was {tuple(old.shape)}"
                )
            if value.is_floating_point():
                found[name] = torch.lerp(value, old.to(value.dtype), kept)
    part = trained / f"{WEIGHTS_FILE}.part"
    save_file(found, part, metadata={"format": "pt"})
    part.replace(trained / WEIGHTS_FILE)
