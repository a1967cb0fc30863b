"""Checkpoint in, verified bundle out."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flywheel import __version__
from flywheel.config import ExportSettings
from flywheel.errors import BundleError, ConfigError, StageError
from flywheel.export import describing
from flywheel.export.observations import Seen, generated, recorded
from flywheel.export.parity import Chunk, Parity, compare, reference
from flywheel.schema import Bundle, bundle_digest, sha256_file
from flywheel.vla import ACT, WEIGHTS_FILE, Checkpoint, load, offline, signature

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx

MODEL_BYTES = 2**31 - 1  # of one protobuf message
# First ONNX Runtime that reads an intermediate representation, that has an opset (its release notes). What
# is not listed is taken to need the one that the bundle was compared on. 2.0 is not known to run it.
_READS = {8: (1, 14), 9: (1, 15), 10: (1, 18)}
_HAS = {17: (1, 12), 18: (1, 14), 19: (1, 15), 20: (1, 17), 21: (1, 18)}


@dataclass(frozen=True)
class ExportResult:
    """``parity_*``: from lerobot's actions, see ``Parity``. Times: medians, one thread.

    ``float_*``: of the float32 bundle that a smaller one was compared with. ``success``: of the smaller one
    in the twin; ``success_difference``: that minus the float32 one's on the same scenes, ``success_low`` the
    lower end of Tango's 95 % interval. None where ``precision`` is float32.
    """

    digest: str
    onnx_bytes: int
    precision: str
    observations: int
    recorded: bool  # the observations are a dataset's; else drawn at random
    parity_max: float
    parity_relative: float
    infer_ms: float
    seconds: float
    peak_rss_mb: float
    float_bytes: int | None = None
    float_infer_ms: float | None = None
    success: float | None = None
    float_success: float | None = None
    success_difference: float | None = None
    success_low: float | None = None
    success_pairs: int | None = None


def export(
    checkpoint: Path,
    out: Path,
    settings: ExportSettings | None = None,
    *,
    name: str = "policy",
    limits_sha256: str = "",
    provenance: Mapping[str, Any] | None = None,
    observations: Path | None = None,
) -> ExportResult:
    """Export ``checkpoint`` to the bundle ``out``; nothing appears there unless parity holds.

    ``observations`` is a LeRobotDataset to compare on; without one, noise is drawn.

    Raises:
        BundleError: the checkpoint is incomplete, or of a policy that is not exported.
        StageError: ONNX Runtime's actions differ from lerobot's by more than ``settings`` allows, a smaller
            precision loses success in the twin, or the policy cannot be exported.
    """
    settings = ExportSettings() if settings is None else settings
    started = time.monotonic()
    offline()
    loaded = load(checkpoint)
    about = {
        "runtime": __version__,
        "checkpoint_sha256": sha256_file(checkpoint / WEIGHTS_FILE),
        "policy": loaded.kind,
        "pad_token_id": describing.pad_id(checkpoint, loaded.kind),
        "parameters": sum(p.numel() for p in loaded.policy.parameters()),
        "precision": settings.precision,
        **(provenance or {}),
    }
    bundle = describing.bundle_of(checkpoint, loaded, settings, name, limits_sha256, about)
    if observations is None:
        seen = generated(loaded.stats, bundle, settings.parity_observations)
    else:
        seen = recorded(observations, bundle, settings.parity_observations)
    with _staging(out) as staging:
        expected = reference(loaded, bundle, seen, signature(checkpoint).relative)
        std = np.asarray(loaded.stats["action"]["std"], np.float32)
        bundle = _write(checkpoint, loaded, bundle, staging)
        del loaded  # and its memory, before the bundle is loaded
        parity = compare(staging, seen, expected, std)
        _require(checkpoint, parity, settings.parity_atol, settings.parity_rtol, "export.parity")
        more: dict[str, Any] = {}
        if settings.precision != "float32":
            parity, more = _reduced(checkpoint, staging, bundle, settings, seen, expected, std, parity)
        shutil.rmtree(out, ignore_errors=True)
        staging.rename(out)
    return ExportResult(
        digest=bundle_digest(out),
        onnx_bytes=(out / "policy.onnx").stat().st_size,
        precision=settings.precision,
        observations=len(seen),
        recorded=observations is not None,
        parity_max=parity.absolute,
        parity_relative=parity.relative,
        infer_ms=parity.infer_ms,
        seconds=time.monotonic() - started,
        peak_rss_mb=peak_rss_mb(),
        **more,
    )


def write_metrics(result: ExportResult, path: Path) -> None:
    """``export.json``: the figures that DVC tracks."""
    path.write_text(json.dumps(asdict(result), indent=1, sort_keys=True) + "\n")


def peak_rss_mb() -> float:
    """The most memory that this process has had resident, MB; nan where the kernel does not say."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return math.nan
    return int(found[1]) * 1024 / 1e6 if found else math.nan


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A directory beside ``out`` that is gone afterwards, unless it was renamed."""
    staging = out.with_name(out.name + ".part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(_smaller(staging), ignore_errors=True)


def _smaller(staging: Path) -> Path:
    return staging.with_suffix(".smaller.part")


def _write(checkpoint: Path, loaded: Checkpoint, bundle: Bundle, staging: Path) -> Bundle:
    """Write the float32 bundle; returns its ``policy.json``, complete."""
    import onnx

    model = _graph(checkpoint, loaded, bundle)
    opset = next(o.version for o in model.opset_import if o.domain == "")
    bundle = bundle.model_copy(update={"opset": opset, "onnxruntime": _range(model.ir_version, opset)})
    properties = {**bundle.provenance, "opset": opset, "onnxruntime": bundle.onnxruntime}
    onnx.helper.set_model_props(model, {k: str(v) for k, v in properties.items()})
    onnx.save(model, str(staging / "policy.onnx"))
    del model
    onnx.checker.check_model(str(staging / "policy.onnx"))
    describing.write_tokenizer(checkpoint, loaded.kind, staging / "tokenizer.json")
    (staging / "policy.json").write_bytes(bundle.to_bytes())
    return bundle


def _graph(checkpoint: Path, loaded: Checkpoint, bundle: Bundle) -> onnx.ModelProto:
    import torch

    from flywheel.export import act
    from flywheel.export.graphs import both
    from flywheel.export.join import join

    example = {
        "images": torch.zeros(1, len(bundle.cameras), *bundle.image_hw, 3, dtype=torch.uint8),
        "tokens": torch.full((1, bundle.tokens), int(bundle.provenance["pad_token_id"])),
        "token_mask": (torch.arange(bundle.tokens) < 4)[None],
        "state": torch.zeros(1, len(bundle.state_names)),
        "noise": torch.zeros(1, bundle.chunk, bundle.max_action_dim),
    }
    relative = signature(checkpoint).relative
    if loaded.kind == ACT:
        model = act.graph(loaded.policy, loaded.stats, example, relative)
        _require_one_file(checkpoint, [model])
        return model
    parts = both(loaded.policy, loaded.stats, example)
    _require_one_file(checkpoint, parts)
    action = loaded.stats["action"]
    return join(
        *parts,
        bundle.chunk,
        bundle.max_action_dim,
        np.asarray(action["mean"], np.float32),
        np.asarray(action["std"], np.float32),
        relative,
    )


def _require_one_file(checkpoint: Path, parts: Iterable[onnx.ModelProto]) -> None:
    """Weights beside the graph would be loaded by ONNX Runtime itself, after they were hashed."""
    from onnx.helper import tensor_dtype_to_np_dtype as type_of

    weights = (t for part in parts for t in part.graph.initializer)
    size = sum(math.prod(t.dims) * int(type_of(t.data_type).itemsize) for t in weights)
    if size > MODEL_BYTES:
        raise StageError(
            f"{checkpoint}: the graph's weights are {size} bytes; one ONNX file holds {MODEL_BYTES}, and a "
            "bundle is one file, so that what is loaded is what is hashed: export a smaller policy"
        )


def _range(ir_version: int, opset: int) -> str:
    """The versions of ONNX Runtime that are known to run such a model."""
    import onnxruntime

    mine = tuple(int(n) for n in onnxruntime.__version__.split(".")[:2])
    major, minor = max(_READS.get(ir_version, mine), _HAS.get(opset, mine))
    return f">={major}.{minor},<{major + 1}.0"


def _require(checkpoint: Path, parity: Parity, atol: float, rtol: float, setting: str) -> None:
    if not (parity.absolute <= atol and parity.relative <= rtol):
        raise StageError(
            f"{checkpoint}: ONNX Runtime differs from PyTorch by {parity.absolute:.2e} in normalised actions "
            f"({parity.relative:.2e} of their size), more than {setting}_atol = {atol:.0e} or {setting}_rtol "
            f"= {rtol:.0e}; no bundle was written"
        )


def _reduced(
    checkpoint: Path,
    staging: Path,
    bundle: Bundle,
    settings: ExportSettings,
    seen: list[Seen],
    expected: list[Chunk],
    std: Any,
    full: Parity,
) -> tuple[Parity, dict[str, Any]]:
    """Replace the float32 bundle in ``staging`` by a smaller one, if that does the same."""
    from flywheel.export import precision

    smaller = _smaller(staging)
    shutil.rmtree(smaller, ignore_errors=True)
    smaller.mkdir()
    convert = precision.to_int8 if settings.precision == "int8" else precision.to_float16
    convert(staging / "policy.onnx", smaller / "policy.onnx")
    shutil.copyfile(staging / "tokenizer.json", smaller / "tokenizer.json")
    (smaller / "policy.json").write_bytes(bundle.to_bytes())
    parity = compare(smaller, seen, expected, std)
    _require(checkpoint, parity, settings.reduced_atol, settings.reduced_rtol, "export.reduced")
    more: dict[str, Any] = {
        "float_bytes": (staging / "policy.onnx").stat().st_size,
        "float_infer_ms": full.infer_ms,
    }
    if settings.closed_loop_pairs:
        more |= _closed_loop(staging, smaller, settings)
    shutil.rmtree(staging)
    smaller.rename(staging)
    return parity, more


def _closed_loop(full: Path, smaller: Path, settings: ExportSettings) -> dict[str, Any]:
    """The same scenes with either bundle, in lockstep; ``StageError`` unless a drop can be excluded."""
    from flywheel.evaluate import paired

    try:
        found = paired(
            full, smaller, settings.closed_loop_shift, settings.closed_loop_pairs, settings.closed_loop_seed
        )
    except (BundleError, ConfigError) as e:
        raise StageError(
            f"export.precision = {settings.precision}: success cannot be measured in the twin ({e}); export "
            "float32, or set export.closed_loop_pairs to 0 and measure it on the robot; no bundle was written"
        ) from None
    if not found.low >= -settings.max_success_drop:
        raise StageError(
            f"export.precision = {settings.precision}: success in {settings.closed_loop_shift} is "
            f"{found.b.success.mean:.2f} after {found.a.success.mean:.2f} with float32, in {found.n} pairs; "
            f"a drop of {-found.low:.2f} cannot be excluded, and export.max_success_drop is "
            f"{settings.max_success_drop:g}: more pairs may tell, or export float32; no bundle was written"
        )
    return {
        "success": found.b.success.mean,
        "float_success": found.a.success.mean,
        "success_difference": found.difference,
        "success_low": found.low,
        "success_pairs": found.n,
    }
