"""Makes the base policy: ``python -m models.train_base --out models/base --minutes 60``.

Three parts, all in the twin's `lab` shift and all from seeds:

1. samples: kinematic frames with a new scene each (flywheel.twin.sampling);
2. sight: the vision tower learns which boxes lie in which patch, and where in it;
3. policy: flow matching on the operator's chunks (Lipman et al. 2023, as in SmolVLA), with several noise
   draws per prefix because the prefix is the costly part, and two auxiliary losses on the prefix: which
   patch holds the target that was named, and where it lies relative to the cup. For a first share of the
   time the vision tower rests and its outputs come from memory, which makes a step twice as fast.

The result is an ordinary lerobot checkpoint; nothing of the auxiliary heads remains in it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from flywheel.twin.sampling import Samples, draw, project
from flywheel.twin.shift import COLOURS, LAB
from models.architecture import ACTION_DIM, CHUNK, IMAGE_PX, PATCH_PX, SCALE, TEXT, smolvla_config, write_vlm

CELL_PX = PATCH_PX * SCALE
GRID = IMAGE_PX // CELL_PX
DRAWS = 4  # noise draws per prefix
SEEN = tuple(LAB.colours)


@dataclass
class Data:
    """Samples as tensors, with actions relative to the state's tool position."""

    images: torch.Tensor
    states: torch.Tensor
    actions: torch.Tensor
    targets: torch.Tensor
    tops: torch.Tensor
    cells: torch.Tensor = field(init=False)  # [n, 3] index of the patch that each box is in, -1 out of view
    offsets: torch.Tensor = field(init=False)  # [n, 3, 2] where in the patch, -0.5..0.5
    colours: torch.Tensor
    boxes: torch.Tensor

    def __post_init__(self) -> None:
        pixels = torch.from_numpy(project(self.tops.double().numpy(), IMAGE_PX)).float()
        at = torch.floor(pixels / CELL_PX)
        seen = ((at >= 0) & (at < GRID)).all(-1)
        self.offsets = pixels / CELL_PX - at - 0.5
        self.cells = torch.where(seen, (at[..., 1] * GRID + at[..., 0]).long(), torch.tensor(-1))

    def __len__(self) -> int:
        return len(self.images)


def load(paths: list[Path]) -> Samples:
    """Samples from files that ``draw`` made earlier."""
    parts = [dict(np.load(p)) for p in paths]
    return Samples(**{f.name: np.concatenate([p[f.name] for p in parts]) for f in fields(Samples)})


def to_data(s: Samples) -> Data:
    """Tensors of ``s``; x, y, z of the chunk become relative to the tool."""
    chunks = s.chunks.copy()
    chunks[..., :3] -= s.states[:, None, :3]
    return Data(
        images=torch.from_numpy(s.images).permute(0, 3, 1, 2).contiguous(),
        states=torch.from_numpy(s.states),
        actions=torch.from_numpy(chunks),
        targets=torch.from_numpy(s.targets),
        tops=torch.from_numpy(s.tops),
        colours=torch.from_numpy(s.colours),
        boxes=torch.from_numpy(s.boxes),
    )


def statistics(data: Data) -> dict[str, dict[str, torch.Tensor]]:
    """Normalisation, in lerobot's form."""
    actions = data.actions.reshape(-1, ACTION_DIM)
    return {
        "observation.state": {"mean": data.states.mean(0), "std": data.states.std(0) + 1e-3},
        "action": {"mean": actions.mean(0), "std": actions.std(0) + 1e-3},
    }


def _augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Exposure only, and little of it: the lab's own range, so that the policy stays a lab policy."""
    gain = torch.empty(len(images), 1, 1, 1).uniform_(0.93, 1.07, generator=generator)
    return (images.float() / 255.0 * gain).clamp_(0, 1)


def learn_to_see(policy: Any, data: Data, steps: int, batch: int, lr: float, seed: int) -> None:
    """Part 2: per patch and colour, is a box's face centred here, and where in the patch."""
    model = policy.model.vlm_with_expert.get_vlm_model()
    vision, connector = model.vision_model, model.connector
    head = nn.Linear(TEXT["hidden_size"], 3 * len(SEEN))
    generator = torch.Generator().manual_seed(seed)

    def tokens(images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = connector(
            vision(pixel_values=images * 2 - 1, patch_attention_mask=None).last_hidden_state
        )
        return out

    with torch.no_grad():
        scale = tokens(data.images[:256].float() / 255).pow(2).mean().sqrt()
    slot = torch.full((len(COLOURS),), -1)
    slot[[list(COLOURS).index(c) for c in SEEN]] = torch.arange(len(SEEN))
    parameters = [*vision.parameters(), *connector.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    start, recent = time.monotonic(), []
    for step in range(steps):
        b = torch.randint(len(data), (batch,), generator=generator)
        out = head(tokens(_augment(data.images[b], generator))).reshape(batch, GRID * GRID, len(SEEN), 3)
        cells, colours = data.cells[b], slot[data.colours[b]]
        rows, which = torch.nonzero(cells >= 0, as_tuple=True)
        at = (rows, cells[rows, which], colours[rows, which])
        present = torch.zeros(out.shape[:3])
        present[at] = 1.0
        where = F.binary_cross_entropy_with_logits(out[..., 0], present, pos_weight=torch.tensor(8.0))
        offset = (out[..., 1:][at] - data.offsets[b][rows, which]).pow(2).sum(-1).mean()
        loss = where + 4 * offset
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        recent.append((where.item(), math.sqrt(offset.item()) * CELL_PX))
        if (step + 1) % 200 == 0:
            w, o = np.mean(recent[-200:], axis=0)
            print(
                f"sight {step + 1}/{steps} where {w:.3f} offset {o:.2f} px {time.monotonic() - start:.0f} s",
                flush=True,
            )
    with torch.no_grad():
        ratio = scale / tokens(data.images[:256].float() / 255).pow(2).mean().sqrt()
        connector.modality_projection.proj.weight.mul_(ratio)


class Heads(nn.Module):
    """Auxiliary read-outs of the prefix, thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(TEXT["hidden_size"], 3)
        self.place = nn.Linear(TEXT["hidden_size"], 3)


def losses(
    policy: Any, heads: Heads, batch: dict[str, torch.Tensor], data: Data, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Flow loss, the two auxiliary ones (the target's patch, its place from the cup), and patch accuracy."""
    from lerobot.policies.common.vla_utils import make_att_2d_masks
    from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS

    model = policy.model
    images, masks = policy.prepare_images(batch)
    state, actions = policy.prepare_state(batch), policy.prepare_action(batch)
    embedded, padding, attention = model.embed_prefix(
        images, masks, batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK], state=state
    )
    out, cache = model.vlm_with_expert.forward(
        attention_mask=make_att_2d_masks(padding, attention),
        position_ids=torch.cumsum(padding, 1) - 1,
        past_key_values=None,
        inputs_embeds=[embedded, None],
        use_cache=True,
    )
    rows = torch.arange(len(b))
    cell = data.cells[b][rows, data.boxes[b]]
    free = (data.states[b, 3] < 0.5).float()
    visible = free * (cell >= 0)
    patch = heads.patch(out[0][:, : GRID * GRID])
    n = visible.sum().clamp(min=1)
    which = (F.cross_entropy(patch[..., 0], cell.clamp(min=0), reduction="none") * visible).sum() / n
    offset = (patch[rows, cell.clamp(min=0), 1:] - data.offsets[b][rows, data.boxes[b]]).pow(2).sum(-1)
    which = which + 4 * (offset * visible).sum() / n
    hit = ((patch[..., 0].argmax(1) == cell).float() * visible).sum() / n
    place = (heads.place(out[0][:, -1]) - 5 * data.tops[b][rows, data.boxes[b]]).pow(2).sum(-1)
    place = (place * free).sum() / free.sum().clamp(min=1)
    cache.batch_repeat_interleave(DRAWS)
    actions = actions.repeat_interleave(DRAWS, 0)
    noise = torch.randn_like(actions)
    t = model.sample_time(len(actions), actions.device)
    noisy = t[:, None, None] * noise + (1 - t[:, None, None]) * actions
    velocity = model.denoise_step(padding.repeat_interleave(DRAWS, 0), cache, noisy, t)
    flow = (noise - actions - velocity)[..., :ACTION_DIM].pow(2).mean()
    return flow, which, place, hit


def image_tokens(policy: Any, data: Data, batch: int = 500) -> torch.Tensor:
    """What the vision tower and the connector make of every frame, ``[n, tokens, width]``."""
    policy.eval()
    with torch.no_grad():
        parts = [
            policy.model.vlm_with_expert.embed_image(part.float() / 255 * 2 - 1)
            for part in data.images.split(batch)
        ]
    policy.train()
    return torch.cat(parts)


def learn_to_act(policy: Any, pre: Any, data: Data, args: argparse.Namespace, save: Any) -> None:
    """Part 3, bounded in time: the learning rate follows a cosine over ``args.minutes``."""
    heads = Heads()
    parameters = [p for p in [*policy.parameters(), *heads.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=1e-4, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(args.seed)
    colours = list(COLOURS)
    eyes = policy.model.vlm_with_expert
    remembered = image_tokens(policy, data) if args.resting > 0 else None
    look = eyes.embed_image
    start, step, saved = time.monotonic(), 0, 0
    log: list[list[float]] = []
    while (gone := (time.monotonic() - start) / 60 / args.minutes) < 1:
        lr = args.lr * min(1.0, step / 100) * (0.5 * (1 + math.cos(math.pi * gone)) * 0.98 + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = lr
        b = torch.randint(len(data), (args.batch,), generator=generator)
        resting = gone < args.resting
        if remembered is not None and resting:
            tokens = remembered[b]
            eyes.embed_image = lambda _, tokens=tokens: tokens
        elif remembered is not None:
            eyes.embed_image, remembered = look, None
        batch = pre(
            {
                "observation.images.wrist": _augment(data.images[b], generator),
                "observation.state": data.states[b],
                "action": data.actions[b],
                "task": [f"pick the {colours[int(c)]} box and place it in the bin" for c in data.targets[b]],
            }
        )
        flow, which, place, hit = losses(policy, heads, batch, data, b)
        fade = 1.0 - 0.7 * gone
        loss = flow + fade * (0.3 * which + 2.0 * place)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        log.append([x.item() for x in (flow, which, place, hit)])
        if step % 200 == 0:
            f, w, p, h = np.mean(log[-200:], axis=0)
            print(
                f"act {step} flow {f:.4f} patch {w:.3f} ({h:.2f}) place {100 * math.sqrt(p) / 5:.1f} cm "
                f"lr {lr:.1e} {time.monotonic() - start:.0f} s",
                flush=True,
            )
        if not resting and int(gone * 12) > saved:
            saved = int(gone * 12)
            save()
    eyes.embed_image = look


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("models/base"))
    parser.add_argument("--samples", type=int, default=60_000, help="frames to draw")
    parser.add_argument(
        "--from", dest="cached", type=Path, nargs="*", default=[], help="samples drawn earlier (.npz)"
    )
    parser.add_argument("--start", type=Path, help="go on from this checkpoint's weights: part 3 only")
    parser.add_argument("--minutes", type=float, default=60, help="of part 3")
    parser.add_argument("--resting", type=float, default=0.4, help="share of part 3 without the vision tower")
    parser.add_argument("--sight-steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors

    data = to_data(load(args.cached) if args.cached else draw(LAB, args.samples, args.seed, CHUNK))
    vlm = write_vlm(args.out / "vlm")
    config = smolvla_config(vlm)
    policy = SmolVLAPolicy(config)
    pre, post = make_smolvla_pre_post_processors(config, statistics(data))
    print(
        f"{sum(p.numel() for p in policy.parameters()) / 1e6:.2f} M parameters, {len(data)} frames",
        flush=True,
    )

    def save() -> None:
        policy.save_pretrained(args.out)
        pre.save_pretrained(args.out)
        post.save_pretrained(args.out)
        (args.out / "made_by.json").write_text(
            json.dumps({k: v for k, v in vars(args).items() if k not in ("out", "cached", "start")}, indent=1)
            + "\n"
        )

    policy.train()
    if args.start:
        from safetensors.torch import load_file

        policy.load_state_dict(load_file(args.start / "model.safetensors"), strict=False)
    else:
        learn_to_see(policy, data, args.sight_steps, args.batch, 2e-3, args.seed)
    learn_to_act(policy, pre, data, args, save)
    save()


if __name__ == "__main__":
    main()
