"""How fast the learner is: its forward and backward beside plain transformers', and an update with half of it filtered.

    python -m benchmarks.learner_speed [--only plain-small|plain-mid|filtering] [--repeats N] [--path FILE]

Prints a Markdown table and appends its figures to benchmarks/results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import RESULTS, Spread, compare, record
from cluster.placement import free_port
from configs.schema import Config, Data, WarmStart
from data.arithmetic import generate, structured_answer
from data.prompts import make_template, render
from data.tokenizer import build_tokenizer
from learner.batching import Sequence as Completion
from learner.batching import kept
from learner.ending import end_process
from learner.rank import LearnerRank, RankOptions
from learner.warm_start import build_llama

GROUP = 8
MID = LlamaConfig(
    vocab_size=32_000,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=6,
    max_position_embeddings=256,
)
THREADS = 1


# -- models and completions -----------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A model, what it completes, and its micro-batches."""

    model: Callable[[], LlamaForCausalLM]
    completions: Callable[[], list[Completion]]
    longest: int
    budget: int


def small_model() -> LlamaForCausalLM:
    """The quickstart's."""
    return build_llama(WarmStart(hidden_size=160, layers=3), build_tokenizer())


def small_completions(groups: int = 32) -> list[Completion]:
    """Groups of the quickstart's problems, half of each answered with working and half at once."""
    tokenizer, data = build_tokenizer(), Data(operators="+")
    template = make_template(data, "think")
    completions = []
    for problem in generate(groups, 0, data.operands, data.digits, data.operators):
        prompt = render(tokenizer, problem.question, template)
        for number in range(GROUP):
            answer = tokenizer.encode(structured_answer(problem, worked=number % 2 == 0), add_special_tokens=False)
            completions.append(_completion(prompt, [*answer, tokenizer.eos_token_id], number))
    return completions


def mid_completions(groups: int = 3) -> list[Completion]:
    """Random tokens: prompts of 16 to 64, completions of 16 to 192."""
    random = np.random.default_rng(0)
    completions = []
    for _ in range(groups):
        prompt = random.integers(0, MID.vocab_size, random.integers(16, 65)).tolist()
        for number in range(GROUP):
            answer = random.integers(0, MID.vocab_size, random.integers(16, 193)).tolist()
            completions.append(_completion(prompt, answer, number))
    return completions


def _completion(prompt: Sequence[int], answer: Sequence[int], number: int) -> Completion:
    return Completion(
        prompt_ids=np.array(prompt, dtype=np.int32),
        completion_ids=np.array(answer, dtype=np.int32),
        sampler_logprobs=np.full(len(answer), -1.0, dtype=np.float32),
        advantage=1.0 if number % 2 else -1.0,
    )


def with_half_flat(completions: Sequence[Completion]) -> list[Completion]:
    """The same with no advantage in every second group."""
    return [replace(c, advantage=0.0) if i // GROUP % 2 else c for i, c in enumerate(completions)]


SIZES = {
    "small": Size(small_model, small_completions, longest=34, budget=4096),
    "mid": Size(lambda: LlamaForCausalLM(MID), mid_completions, longest=256, budget=4096),
}


# -- what is timed --------------------------------------------------------------------------------


def open_rank(size: Size, folder: Path, **learner: Any) -> LearnerRank:
    """A learner rank of its own around the model in the folder, without gradient checkpointing."""
    sections = {
        "model": {"gradient_checkpointing": False},
        "rollout": {"max_completion_tokens": 192},
        "learner": {"tokens_per_micro_batch": size.budget, "optimizer": "adamw", "learning_rate": 1e-8, **learner},
    }
    return lone_rank(Config.model_validate(sections), folder)


def lone_rank(config: Config, folder: Path, threads: int = THREADS) -> LearnerRank:
    """The only learner rank of a config, in this process, around the model in the folder."""
    options = RankOptions(
        rank=0,
        ranks=1,
        address="127.0.0.1",
        port=free_port(),
        threads=threads,
        model_path=folder,
        reference_path=folder,
        total_updates=1,
    )
    return LearnerRank(config, options)


def learner_pass(rank: LearnerRank, completions: Sequence[Completion]) -> Callable[[], object]:
    """Packing, forward and backward of an update batch, without the optimizer's step."""
    weights = rank._token_weights(completions)
    indices = kept(completions, weights, None)
    return lambda: rank._accumulate(rank._micro_batches(completions, weights, indices))


def plain_pass(folder: Path, tokens: int, size: Size) -> tuple[Callable[[], object], int]:
    """Forward and backward of transformers over about as many tokens in dense rows; and how many they are."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (round(tokens / size.longest), size.longest), generator=random)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        for rows in ids.split(size.budget // size.longest):
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
            logprobs = logits.float().log_softmax(dim=-1).gather(-1, rows[:, 1:, None])
            (-logprobs.sum() / ids.numel()).backward()

    return run, ids.numel()


# -- figures --------------------------------------------------------------------------------------

Figures = dict[str, Any]


def beside_plain(name: str, repeats: int) -> Figures:
    """Tokens a second of the learner and of plain transformers, and their ratio pair by pair; above 1 is faster."""
    size = SIZES[name]
    completions = size.completions()
    tokens = sum(c.length for c in completions)
    with tempfile.TemporaryDirectory(prefix="pocketgrpo-speed-") as folder:
        torch.manual_seed(0)
        size.model().save_pretrained(folder)
        run, dense = plain_pass(Path(folder), tokens, size)
        found = compare(learner_pass(open_rank(size, Path(folder)), completions), run, repeats)
    return {
        "tokens": tokens,
        "learner": Spread(tuple(tokens / seconds for seconds in found.a.values)).figures(),
        "plain": Spread(tuple(dense / seconds for seconds in found.b.values)).figures(),
        "ratio": Spread(tuple(ratio * tokens / dense for ratio in found.ratio.values)).figures(),
    }


def filtering(repeats: int) -> Figures:
    """Seconds of an update of which half of the groups are flat, whole and filtered at 0; below 1 is faster."""
    size = SIZES["small"]
    completions = with_half_flat(size.completions())
    with tempfile.TemporaryDirectory(prefix="pocketgrpo-speed-") as folder:
        size.model().save_pretrained(folder)
        ranks = [open_rank(size, Path(folder), filter_threshold=threshold) for threshold in (None, 0.0)]
        whole, filtered = ((lambda rank=rank: rank.update(completions, on_policy=False)) for rank in ranks)
        return compare(whole, filtered, repeats).figures()


def row(label: str, *spreads: Figures) -> str:
    cells = [f"{s['median']:.3g}" for s in spreads[:-1]]
    ratio = spreads[-1]
    return " | ".join([f"| {label}", *cells, f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) |"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Learner speed beside plain transformers, and with filtering.")
    parser.add_argument("--only", choices=("plain-small", "plain-mid", "filtering"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--path", type=Path, default=RESULTS, help="where the figures are appended (%(default)s)")
    options = parser.parse_args(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    chosen = {options.only} if options.only else {"plain-small", "plain-mid", "filtering"}
    figures: dict[str, Figures] = {}
    lines = ["| tokens a second | learner | plain | ratio |", "|---|---|---|---|"]
    for name in SIZES:
        if f"plain-{name}" in chosen:
            found = figures[name] = beside_plain(name, options.repeats)
            lines.append(row(name, found["learner"], found["plain"], found["ratio"]))
    if "filtering" in chosen:
        found = figures["filtering"] = filtering(options.repeats)
        lines += ["", "| seconds of an update | whole | half filtered | ratio |", "|---|---|---|---|"]
        lines.append(row("small", found["a_seconds"], found["b_seconds"], found["b_over_a"]))
    print("\n".join(lines))
    print(json.dumps(record("learner speed", figures, options.path)))
    return 0


if __name__ == "__main__":
    end_process(main())
