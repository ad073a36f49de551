"""vLLM's engine, one step at a time. The only sampling-side file that knows vLLM.

It schedules in this process. On a CPU it is eager, and on one thread its output is bitwise independent of the
batch a request shares, so a seed per completion is all that exact resume needs. Tensor parallel, the model is in
worker processes of vLLM's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actors.imports import importing
from actors.shared_memory import unname_mapped
from data.records import Completion

if TYPE_CHECKING:
    from vllm import LLMEngine
    from vllm.outputs import RequestOutput

Device = Literal["cpu", "cuda"]

# Read by vLLM and OpenMP when they are imported, so the hosting process needs them from its start.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# oneDNN keeps what it builds for a number of rows. By default that is 1,024 of them, so memory grows for hours.
ONEDNN_ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
CPU_ENVIRONMENT = {
    **ENVIRONMENT,
    **ONEDNN_ENVIRONMENT,
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",  # loading threads wait asleep: spinning beside others took four times as long
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",  # vLLM compiles a log-prob helper even when eager; that needs a C++ compiler
}

BLOCK_SIZE = 32  # tokens of a KV-cache block; vLLM's 128 on CPU caches no prompt shorter than that


def environment(device: Device) -> dict[str, str]:
    """What the process that hosts an engine on this device must have in its environment."""
    return CPU_ENVIRONMENT if device == "cpu" else ENVIRONMENT


def batched_tokens(max_tokens: int, max_running: int, device: Device) -> int:
    """How many tokens one of vLLM's steps computes at most, of prompts and of completions.

    On a CPU more makes tensors larger and of another size every time, for which the heap grows.
    """
    return max(max_tokens, 8192) if device == "cuda" else max(max_tokens + max_running, 1024)


@dataclass(frozen=True)
class EngineOptions:
    """What an engine needs to know. kv_cache_bytes in bytes; max_tokens is prompt plus completion.

    transport: the weight-transfer backend, which vLLM's worker processes know once they have imported the class
    worker_extension (its path), which also brings the calls that are not vLLM's. tensor_parallel: GPUs, or
    processes on a CPU, that share the model and the cache. sleeps: whether it will be asked to sleep, on a GPU.
    """

    model_path: Path
    dtype: str
    max_tokens: int
    max_running: int
    block_size: int
    kv_cache_bytes: int
    transport: str
    worker_extension: str
    tensor_parallel: int = 1
    device: Device = "cpu"
    sleeps: bool = False


@dataclass(frozen=True)
class Sampling:
    """How to sample one request. temperature 0 is greedy; top_k 0 takes all tokens."""

    temperature: float
    max_completion_tokens: int
    top_k: int = 0
    top_p: float = 1.0


@dataclass
class _Running:
    """A request under way. `marks` are (tokens sampled so far, policy version from there on)."""

    index: int
    seed: int
    marks: list[tuple[int, int]]


class Engine:
    """One vLLM engine. Not thread-safe: every call comes from the thread that built it."""

    def __init__(self, options: EngineOptions) -> None:
        os.environ.update(environment(options.device))
        with importing():
            from transformers import AutoTokenizer
            from vllm import EngineArgs, LLMEngine
            from vllm.config import WeightTransferConfig

        self.version = 0
        self.cached_tokens = 0
        self._tokenizer = AutoTokenizer.from_pretrained(options.model_path, trust_remote_code=False)
        self._running: dict[str, _Running] = {}
        self._sleeps = options.sleeps
        arguments = EngineArgs(
            model=str(options.model_path),
            load_format="safetensors",
            trust_remote_code=False,
            dtype=options.dtype,
            max_model_len=options.max_tokens,
            max_num_seqs=options.max_running,
            max_num_batched_tokens=batched_tokens(options.max_tokens, options.max_running, options.device),
            block_size=options.block_size,
            kv_cache_memory_bytes=options.kv_cache_bytes,
            enable_prefix_caching=True,
            tensor_parallel_size=options.tensor_parallel,
            distributed_executor_backend="uni" if options.tensor_parallel == 1 else "mp",
            worker_extension_cls=options.worker_extension,
            logprobs_mode="processed_logprobs",
            weight_transfer_config=WeightTransferConfig(backend=options.transport),
            disable_log_stats=True,
            seed=0,
            **_device_arguments(options),
        )
        self._engine: LLMEngine = LLMEngine.from_engine_args(arguments)
        if options.tensor_parallel > 1:
            self._engine.collective_rpc("unname_shared_memory")
            unname_mapped()

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def add(self, request_id: str, index: int, token_ids: list[int], seed: int, sampling: Sampling) -> None:
        """Queue one completion of a prompt. `token_ids` is the whole prompt, BOS included if it has one."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_tokens=sampling.max_completion_tokens,
            seed=seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._running[request_id] = _Running(index, seed, [(0, self.version)])
        self._engine.add_request(request_id, tokens_input(token_ids, cache_salt=str(self.version)), parameters)

    def step(self) -> list[tuple[str, Completion]]:
        """One decode step of everything that runs; returns (request id, completion) of what ended."""
        finished = []
        for output in self._engine.step():
            if output.finished:
                finished.append((output.request_id, self._completion(output)))
        return finished

    def _completion(self, output: RequestOutput) -> Completion:
        request = self._running.pop(output.request_id)
        answer = output.outputs[0]
        self.cached_tokens += output.num_cached_tokens or 0
        token_ids = np.asarray(answer.token_ids, dtype=np.int32)
        return Completion(
            index=request.index,
            seed=request.seed,
            token_ids=token_ids,
            logprobs=_sampled_logprobs(answer.logprobs, token_ids),
            versions=_versions(request.marks, len(token_ids)),
            text=self._tokenizer.decode(answer.token_ids, skip_special_tokens=True),
            finish_reason="length" if answer.finish_reason == "length" else "stop",
        )

    def abort_all(self) -> None:
        """Forget every request under way."""
        self._engine.abort_request(list(self._running))
        self._running.clear()

    def weight_transfer(self, call: str, **arguments: Any) -> None:
        """One call of vLLM's weight-transfer interface (init_weight_transfer_engine, start_weight_update, …)."""
        self._engine.collective_rpc(call, kwargs=arguments)

    def update_seconds(self) -> dict[str, float]:
        """Seconds of the last weight update in the slowest worker process, by part."""
        answers = self._engine.collective_rpc("update_seconds")
        return {part: max(answer[part] for answer in answers) for part in answers[0]}

    def sleep(self) -> None:
        """Weights to the CPU's memory, cache forgotten; nothing may be running. Nothing where it does not sleep."""
        if self._sleeps:
            if self.busy:
                raise RuntimeError(f"the engine cannot sleep: {len(self._running)} completions are under way")
            self._engine.sleep(level=1)

    def wake_up(self, what: Literal["weights", "kv_cache"]) -> None:
        """Have the weights, which an update needs, or the cache, which sampling needs too, on the GPU again."""
        if self._sleeps:
            self._engine.wake_up([what])

    def close(self) -> None:
        """End vLLM's worker processes, if it has any."""
        core = self._engine.engine_core
        queues = _message_queues(core.engine_core.model_executor)
        core.shutdown()
        # Left to the garbage collector, in vLLM 0.26, a queue waits for its own sockets to be closed, forever.
        for queue in queues:
            queue.local_socket.context.destroy(linger=0)

    def set_version(self, version: int) -> None:
        """Stamp what is sampled from now on, running requests included, with this policy version."""
        states = self._engine.output_processor.request_states
        for request_id, request in self._running.items():
            detokenizer = states[_internal_id(states, request_id)].detokenizer
            request.marks.append((detokenizer.num_output_tokens() if detokenizer else 0, version))
        self.version = version


def _device_arguments(options: EngineOptions) -> dict[str, Any]:
    """What of vLLM's arguments hangs on the device."""
    if options.device == "cpu":
        # vLLM takes back what a seed drew at a prompt that it reads in two steps, which a CPU's generator cannot.
        return {"enforce_eager": True, "enable_chunked_prefill": False}
    # Asynchronous scheduling has a step in flight between two calls of `step`, sampled with the old weights.
    # The cache's size is given, so the share of the GPU is only what must be free at the start: next to nothing, as a
    # learner may be on it. What does not fit, `pocketgrpo plan` says.
    own = {"enable_sleep_mode": options.sleeps, "gpu_memory_utilization": 0.01}
    return {"enforce_eager": False, "async_scheduling": False, **own}


def _message_queues(executor: Any) -> list[Any]:
    """vLLM's queues to and from its worker processes on this machine."""
    if getattr(executor, "rpc_broadcast_mq", None) is None:
        return []
    return [executor.rpc_broadcast_mq, *executor.response_mqs]


def _internal_id(states: dict[str, Any], request_id: str) -> str:
    """vLLM adds a suffix to the ids it is given; find the state that stands for ours."""
    return next(key for key, state in states.items() if state.external_req_id == request_id)


def _sampled_logprobs(logprobs: Any, token_ids: np.ndarray) -> np.ndarray:
    """float32 [length]: the sampled token's log-prob at each position, out of vLLM's flat lists."""
    starts = np.asarray(logprobs.start_indices)
    flat_ids = np.asarray(logprobs.token_ids)
    if not np.array_equal(flat_ids[starts], token_ids):
        raise RuntimeError("vLLM's log-probs are not those of the sampled tokens; its flat layout has changed")
    return np.asarray(logprobs.logprobs, dtype=np.float32)[starts]


def _versions(marks: list[tuple[int, int]], length: int) -> np.ndarray:
    """int32 [length] of policy versions from marks (first token, version)."""
    versions = np.empty(length, dtype=np.int32)
    for first, version in marks:
        versions[first:] = version
    return versions
