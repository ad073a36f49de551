"""The policy: a causal language model that answers with log-probs of given tokens, not logits.

Logits exist for `chunk` tokens at a time and all but the last are recomputed in the backward pass, so memory
does not grow with vocabulary x tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.errors import RunError
from learner.lora import Adapters, base_weights
from learner.varlen_attention import attention_on, sequence_bounds


@dataclass(frozen=True)
class SampledFrom:
    """What the sampler made of the logits before it drew: log-probs and entropies are those of that distribution."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def logprobs(self, logits: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]) -> Tensor:
        """Log-probs [tokens, vocabulary]: logits / temperature, cut to the top k, then to the top p of what is
        left, and normalised again. A target is never cut: at the border the sampler may have kept what rounding
        cuts here. The order and the treatment of ties are vLLM's."""
        logits = logits.float() if self.temperature == 1.0 else logits.float() / self.temperature
        cut = self._cut(logits.detach(), targets)
        return (logits if cut is None else logits.masked_fill(cut, -torch.inf)).log_softmax(dim=-1)

    @property
    def cuts(self) -> bool:
        """Whether some tokens may have been cut."""
        return self.top_k > 0 or self.top_p < 1.0

    @torch.no_grad()
    def _cut(self, logits: Tensor, targets: Tensor) -> Tensor | None:
        top_k = self.top_k if 0 < self.top_k < logits.shape[-1] else 0
        if not top_k and self.top_p >= 1.0:
            return None
        if self.top_p >= 1.0:
            cut = logits < logits.topk(top_k, dim=-1).values[:, -1:]
        else:
            ascending, order = logits.sort(dim=-1)
            if top_k:
                ascending = ascending.masked_fill(ascending < ascending[:, -top_k, None], -torch.inf)
            # 1 - p in float32, as vLLM has it.
            below = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - torch.tensor(self.top_p, device=logits.device)
            below[:, -1] = False
            cut = torch.empty_like(below).scatter_(1, order, below)
        return cut.scatter_(1, targets[:, None], value=False)


class LogProbHead(nn.Module):
    """Log-probs and entropies of targets from hidden states, through the model's own output matrix.

    entropy_gradient: whether entropies carry a gradient, as an entropy bonus needs. The weight is
    registered here once more, so that ZeRO-3 gathers it for the whole forward: every rank then
    communicates once, however many chunks its micro-batch has.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, chunk: int, entropy_gradient: bool = False
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.chunk = chunk
        self.entropy_gradient = entropy_gradient

    def forward(
        self, hidden: Float[Tensor, "tokens width"], targets: Int[Tensor, " tokens"], sampled_from: SampledFrom
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
        pieces = []
        for start in range(0, len(targets), self.chunk):
            part = slice(start, start + self.chunk)
            # The last chunk's logits may wait for the backward pass: when it takes them up there are no others.
            if torch.is_grad_enabled() and start + self.chunk < len(targets):
                piece = checkpoint(self._piece, hidden[part], targets[part], sampled_from, use_reentrant=False)
            else:
                piece = self._piece(hidden[part], targets[part], sampled_from)
            pieces.append(piece)
        logprobs, entropies = zip(*pieces, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _piece(self, hidden: Tensor, targets: Tensor, sampled_from: SampledFrom) -> tuple[Tensor, Tensor]:
        logprobs = sampled_from.logprobs(nn.functional.linear(hidden, self.weight, self.bias), targets)
        # First what the backward pass needs: where nothing else is needed, recomputing stops here.
        of_targets = logprobs.gather(1, targets[:, None]).squeeze(1)
        with torch.set_grad_enabled(self.entropy_gradient and torch.is_grad_enabled()):
            finite = logprobs.clamp(min=torch.finfo(logprobs.dtype).min) if sampled_from.cuts else logprobs
            entropy = -torch.einsum("tv,tv->t", logprobs.exp(), finite)
        return of_targets, entropy


class Policy(nn.Module):
    """A Hugging Face causal language model with a `LogProbHead` in place of its logits.

    adapters: what LoRA put beside the model's layers; nothing without it.
    """

    def __init__(self, model: Any, chunk: int, entropy_gradient: bool = False) -> None:
        super().__init__()
        if getattr(model.config, "final_logit_softcapping", None):
            raise ValueError(
                f"{type(model).__name__} caps its logits (final_logit_softcapping), which the learner's "
                "log-probs do not do; choose a model without it"
            )
        self.model = model
        self.adapters = Adapters()
        head = model.get_output_embeddings()
        self.log_prob_head = LogProbHead(head.weight, getattr(head, "bias", None), chunk, entropy_gradient)

    def forward(
        self,
        input_ids: Int[Tensor, "rows length"],
        position_ids: Int[Tensor, "rows length"],
        rows: Int[Tensor, " tokens"],
        columns: Int[Tensor, " tokens"],
        targets: Int[Tensor, " tokens"],
        sampled_from: SampledFrom,
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
        """Log-prob and entropy, as the sampler saw them, of each target given what precedes it in its sequence.

        (rows, columns) point at the token before each target. Positions start again at 0 where a sequence
        of the row does: from that SDPA, and only without attention mask and cache, and the variable-length
        kernel keep the sequences of a row apart. Padding is on the right, where no token sees it.
        """
        decoder = self.model.get_decoder()
        hidden = decoder(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **sequence_bounds(position_ids)
        ).last_hidden_state
        return self.log_prob_head(hidden[rows, columns], targets, sampled_from)

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Parameters under their checkpoint names; a tied head appears once, as the embedding. With LoRA these are
        the base's, and the checkpoint's are those that `adapters` merges."""
        return base_weights(self.model) if self.adapters else dict(self.model.named_parameters())


def load_policy(
    path: Path,
    dtype: str,
    chunk: int,
    gradient_checkpointing: bool,
    entropy_gradient: bool = False,
    device: str = "cpu",
) -> Policy:
    """A policy from a Hugging Face folder, with the attention of the device that it will be moved to. Dropout is off:
    the ratio of two forwards must be exact.

    RunError naming a tensor with numbers that are none, or that `dtype` cannot hold.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        attn_implementation=attention_on(device, getattr(torch, dtype)),
        attention_dropout=0.0,
        use_safetensors=True,
        trust_remote_code=False,
    )
    _refuse_non_finite(model, path)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return Policy(model, chunk, entropy_gradient)


def _refuse_non_finite(model: nn.Module, path: Path) -> None:
    """Looked for here, where the weights are in memory, as nothing before reads them."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            count = int((~torch.isfinite(weight)).sum())
            raise RunError(
                f"The tensor {name} in {path} has {count} of {weight.numel()} numbers that are NaN or infinite as "
                f"{weight.dtype}. Fetch or save the model anew, or choose model.dtype=float32 if it overflows."
            )
