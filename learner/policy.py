"""The policy: a causal language model that answers with log-probs of given tokens, not logits.

Logits exist for `chunk` tokens at a time and are recomputed in the backward pass, so memory does
not grow with vocabulary x tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class LogProbHead(nn.Module):
    """Log-probs and entropies of targets from hidden states, through the model's own output matrix.

    The weight is registered here once more, so that ZeRO-3 gathers it for the whole forward: every
    rank then communicates once, however many chunks its micro-batch has.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, chunk: int) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.chunk = chunk

    def forward(
        self, hidden: Float[Tensor, "tokens width"], targets: Int[Tensor, " tokens"], temperature: float
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
        pieces = []
        for start in range(0, len(targets), self.chunk):
            part = slice(start, start + self.chunk)
            if torch.is_grad_enabled():
                piece = checkpoint(self._piece, hidden[part], targets[part], temperature, use_reentrant=False)
            else:
                piece = self._piece(hidden[part], targets[part], temperature)
            pieces.append(piece)
        logprobs, entropies = zip(*pieces, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _piece(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logits = nn.functional.linear(hidden, self.weight, self.bias).float() / temperature
        logprobs = logits.log_softmax(dim=-1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
        return logprobs.gather(1, targets[:, None]).squeeze(1), entropy


class Policy(nn.Module):
    """A Hugging Face causal language model with a `LogProbHead` in place of its logits."""

    def __init__(self, model: Any, chunk: int) -> None:
        super().__init__()
        if getattr(model.config, "final_logit_softcapping", None):
            raise ValueError(
                f"{type(model).__name__} caps its logits (final_logit_softcapping), which the learner's "
                "log-probs do not do; choose a model without it"
            )
        self.model = model
        head = model.get_output_embeddings()
        self.log_prob_head = LogProbHead(head.weight, getattr(head, "bias", None), chunk)

    def forward(
        self,
        input_ids: Int[Tensor, "rows length"],
        rows: Int[Tensor, " tokens"],
        positions: Int[Tensor, " tokens"],
        targets: Int[Tensor, " tokens"],
        temperature: float,
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
        """Log-prob and entropy, at `temperature`, of each target given what precedes it in its row.

        Rows are padded on the right: under the causal mask no token sees the padding, so no
        attention mask is needed. `positions` point at the token before each target.
        """
        hidden = self.model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.log_prob_head(hidden[rows, positions], targets, temperature)

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Parameters under their checkpoint names; a tied head appears once, as the embedding."""
        return dict(self.model.named_parameters())


def load_policy(path: Path, dtype: str, chunk: int, gradient_checkpointing: bool) -> Policy:
    """A policy from a Hugging Face folder. Dropout is off: the ratio of two forwards must be exact."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="sdpa", attention_dropout=0.0
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return Policy(model, chunk)
