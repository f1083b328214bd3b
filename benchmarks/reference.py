"""The public template's procedure, re-created from its description with today's transformers and peft.

For every message a client gets: load the base model anew, wrap it, pad the step's rows to the longest, compute
the logits of every position in float32 with gradient checkpointing. Evaluation: one prompt at a time by `generate`,
sentiment in batches of 32 decoded to 512 tokens, the adapter unmerged. `resident=True` keeps the model in memory and is
otherwise the same: the fair, strong baseline.

Both sides get the same work: the token ids and the order of every step, the same start, rate and optimiser, hashed
into a manifest that each side makes for itself before anything is timed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtune.config import Config
from fedtune.objectives import Example

SENTIMENT_LENGTH, SENTIMENT_BATCH = 512, 32
IGNORED = -100


def padded(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """Return a batch padded to its longest row; prompt and padding have no label."""
    texts = [text for example in examples for text in example.texts]
    width = max(len(text.ids) for text in texts)
    ids = torch.full((len(texts), width), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, text in enumerate(texts):
        length = len(text.ids)
        ids[row, :length] = torch.tensor(text.ids)
        mask[row, :length] = 1
        for start, end in text.spans:
            labels[row, start:end] = torch.tensor(text.ids[start:end])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass
class Reference:
    """The procedure on one model folder.

    Attributes:
        folder: of the base model.
        config: of the run.
        resident: keep the model between messages.
        checkpointing: recompute activations, as the template does.
    """

    folder: Path
    config: Config
    resident: bool = False
    checkpointing: bool = True
    loads: int = 0
    _kept: Any = field(default=None, repr=False)

    def model(self) -> Any:
        """Return the wrapped model: newly loaded, unless it is resident."""
        if self._kept is not None:
            return self._kept
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        if self.checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.enable_input_require_grads()
        lora = self.config.lora
        wrapped = get_peft_model(
            base,
            LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=list(lora.target_modules) or None,
                task_type="CAUSAL_LM",
            ),
        )
        self.loads += 1
        if self.resident:
            self._kept = wrapped
        return wrapped

    def step(self, model: Any, examples: Sequence[Example]) -> float:
        """Backpropagate one step's loss through the logits of every position; return the loss."""
        return self.backward(model, padded(examples, 2))

    @staticmethod
    def backward(model: Any, batch: Mapping[str, Tensor]) -> float:
        """Backpropagate a padded batch's loss; return it."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        flat = logits[:, :-1].reshape(-1, logits.shape[-1])
        loss = F.cross_entropy(flat, batch["labels"][:, 1:].reshape(-1), ignore_index=IGNORED)
        loss.backward()
        return loss.item()

    def fit(self, start: Mapping[str, Tensor], steps: Sequence[Sequence[Example]], rate: float) -> dict[str, Tensor]:
        """Answer one message: all its optimiser steps from the adapter it brought."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        model, train = self.model(), self.config.train
        set_peft_model_state_dict(model, dict(start))
        model.train()
        chosen = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            chosen,
            lr=rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            weight_decay=train.weight_decay,
        )
        for examples in steps:
            optimizer.zero_grad()
            self.step(model, examples)
            torch.nn.utils.clip_grad_norm_(chosen, train.max_grad_norm)
            optimizer.step()
        return {name: t.detach().clone() for name, t in get_peft_model_state_dict(model).items()}


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int = 1) -> list[str]:
    """Answer questions one at a time, as the official evaluation does."""
    model.eval()
    texts = []
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
        made = model.generate(**tokens, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        texts.append(tokenizer.decode(made[0][tokens["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


@torch.inference_mode()
def sentiments(
    model: Any, tokenizer: Any, prompts: Sequence[str], length: int = SENTIMENT_LENGTH, *, endless: bool = False
) -> list[str]:
    """Answer sentiment prompts in batches of 32, decoded to `length` tokens, as the official evaluation does.

    A batch ends when all its rows have; one row that does not end takes all of it to `length`. `endless` does so for
    every batch, and reads each row up to its end.
    """
    model.eval()
    end = tokenizer.eos_token_id
    texts = []
    for first in range(0, len(prompts), SENTIMENT_BATCH):
        batch = list(prompts[first : first + SENTIMENT_BATCH])
        tokens = tokenizer(batch, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
        made = model.generate(**tokens, max_length=length, eos_token_id=-1 if endless else end).tolist()
        width = tokens["input_ids"].shape[1]
        whole = [row[: row.index(end, width)] if end in row[width:] else row for row in made]
        texts += tokenizer.batch_decode(whole, skip_special_tokens=True)
    return [text.split("Answer: ")[1] for text in texts]


def averaged(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean, tensor by tensor (FedAvg)."""
    total = sum(weights)
    names = states[0]
    return {n: torch.stack([s[n] * (w / total) for s, w in zip(states, weights, strict=True)]).sum(0) for n in names}
