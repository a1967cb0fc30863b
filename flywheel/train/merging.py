"""LoRA adapters become part of the weights: what comes out of training is a checkpoint like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from flywheel.errors import StageError
from flywheel.vla import offline

ADAPTER = "adapter_config.json"


def merge(adapted: Path, start: Path, out: Path) -> None:
    """Write ``start``'s weights with the adapters of lerobot's checkpoint ``adapted`` added to them.

    W + (alpha / r)·B·A (Hu et al. 2021, "LoRA", section 4.1). Raises ``StageError`` if nothing was adapted.
    """
    offline()
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from peft import PeftModel

    config: Any = PreTrainedConfig.from_pretrained(start)
    config.device = "cpu"
    policy = SmolVLAPolicy.from_pretrained(start, config=config)
    merged = PeftModel.from_pretrained(policy, str(adapted)).merge_and_unload(safe_merge=True)
    if not isinstance(merged, SmolVLAPolicy):
        raise StageError(f"{adapted}: merging its adapters gives no policy but {type(merged).__name__}")
    merged.config.use_peft = False
    merged.save_pretrained(out)
    for path in adapted.iterdir():
        if path.is_file() and path.name not in (
            ADAPTER,
            "adapter_model.safetensors",
            "config.json",
            "README.md",
        ):
            shutil.copyfile(path, out / path.name)  # processors
    if json.loads((out / "config.json").read_text()).get("use_peft"):
        raise StageError(f"{out / 'config.json'}: still says that it has adapters")
