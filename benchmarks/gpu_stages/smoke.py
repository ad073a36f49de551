"""Whether anything else is worth starting: the environment, and log-probs of sampler and learner that agree."""

from __future__ import annotations

import platform
from functools import partial

import torch

from benchmarks.gpu_stages.models import SHAPES, base_shape, random_model
from benchmarks.gpu_stages.part import Part, Row, Setting
from benchmarks.gpu_stages.rig import random_prompts, rig
from cluster.hardware import GIB
from cluster.machine import look, old_driver, untested_libraries

MEAN_LIMITS = {"bfloat16": 0.005, "float32": 1e-4}  # of |log-prob difference|


def parts(setting: Setting) -> list[Part]:
    """The environment, then each type, the recipes' first."""
    agreements = [Part(dtype, partial(agreement, dtype=dtype), 150.0) for dtype in MEAN_LIMITS]
    return [Part("environment", environment, 60.0), *agreements]


def environment(setting: Setting) -> list[Row]:
    """Versions, driver, GPU, and what the preflight of a run would say of them."""
    machine = look()
    rows = [Row("python", platform.python_version())]
    rows += [Row(library, version) for library, version in machine.versions.items()]
    rows.append(Row("versions", untested_libraries(machine) or "as tested"))
    if setting.device == "cpu":
        return [*rows, Row("GPU", "none is used")]
    gpu = torch.cuda.get_device_properties(0)
    return [
        *rows,
        Row("GPU", f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}"),
        Row("GPU memory", gpu.total_memory / GIB, "GiB"),
        Row("CUDA of torch", str(machine.cuda)),
        Row("driver", old_driver(machine) or f"{machine.driver}, new enough"),
    ]


def agreement(setting: Setting, dtype: str) -> list[Row]:
    """|vLLM's - the learner's| log-prob of sampled tokens, before an update, and after it and a sync of its weights.

    The last row is what old weights would have shown: the same completions by the learner's new ones.
    """
    shape, tokens = base_shape(setting), setting.size(64, 16)
    options = (
        f"model.dtype={dtype}",
        f"rollout.max_completion_tokens={tokens}",
        f"rollout.completions_per_prompt={setting.size(8, 4)}",
        "learner.learning_rate=1e-3",
        "learner.warmup=0",
    )
    prompts = random_prompts(setting.size(32, 4), 48, SHAPES[shape].vocabulary)
    with rig(setting, random_model(setting, shape, dtype), *options) as both:
        first = both.sample(prompts)
        before = both.difference(first)
        both.learn(first)
        moved = both.difference(first)
        both.push()
        after = both.difference(both.sample(prompts))
    limit = MEAN_LIMITS[dtype]
    name = f"{dtype}: mean log-prob difference"
    return [
        Row(f"{name}, weights from the folder", before[0], "nats", most=limit),
        Row(f"{name}, weights from a sync", after[0], "nats", most=limit),
        Row(f"{dtype}: largest difference of a token", max(before[1], after[1]), "nats", most=100 * limit),
        Row(f"{name}, had there been no sync", moved[0], "nats", least=limit),
    ]
