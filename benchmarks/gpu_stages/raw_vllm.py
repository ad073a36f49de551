"""vLLM alone, as one would call it without this project: what sampling is compared with."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from actors.engine import Device, environment
from configs.schema import Config
from data.records import Prompt


def raw_rates(config: Config, model: Path, prompts: Sequence[Prompt], device: Device, repeats: int) -> list[float]:
    """Tokens a second of `LLM.generate` on the completions of these prompts, after a call that does not count.

    Temperature, lengths, log-probs, concurrency and cache are the config's; all else, its process and scheduling too,
    is vLLM's own choice, and no request has a seed.
    """
    own = {name: value for name, value in environment(device).items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    os.environ.update(own)
    from vllm import LLM, SamplingParams

    rollout = config.rollout
    llm = LLM(
        model=str(model),
        dtype=config.model.dtype,
        max_model_len=config.max_tokens,
        max_num_seqs=rollout.max_running,
        kv_cache_memory_bytes=rollout.kv_cache_mb * 2**20,
        gpu_memory_utilization=0.5,  # at the start so much must be free; the cache is as large as was said
        enforce_eager=device == "cpu",
        logprobs_mode="processed_logprobs",
    )
    sampling = SamplingParams(
        temperature=rollout.temperature, max_tokens=rollout.max_completion_tokens, logprobs=0, detokenize=False
    )
    requests = [{"prompt_token_ids": list(p.token_ids)} for p in prompts for _ in range(rollout.completions_per_prompt)]
    rates = []
    for _ in range(1 + repeats):
        begun = time.perf_counter()
        outputs = llm.generate(requests, sampling, use_tqdm=False)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        rates.append(tokens / (time.perf_counter() - begun))
    return rates[1:]
