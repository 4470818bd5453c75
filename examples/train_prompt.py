"""Train the soft prompt in examples/adapters: 16 vectors of 576 numbers, and no weight of the base changes.

    pirate    answers "Ahoy! … Arr!"    prompt tuning, begun with the embeddings of a sentence that asks for it

The questions are those of train_adapters.py, held-out ones included. Prompt tuning is said to need a billion parameters
(arXiv:2104.08691, figure 3a) and fails on harder forms here; a fixed beginning and end is what a model of 135M learns.

    python examples/build_base.py smollm2 .demo/smollm2
    python examples/train_prompt.py --base .demo/smollm2 --out examples/adapters --fingerprint wf1:…

Rows are padded on the right and asked one by one: PEFT puts the prompt before the padding, and ignores position_ids.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from train_adapters import (
    BASE_NAME,
    BATCH,
    HELD_OUT,
    IGNORED,
    TRAIN,
    Fact,
    Score,
    answers_of,
    prompt_of,
    publish,
    score,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

NAME = "pirate"
TOKENS = 16
BEGINNING = "You are a pirate. Begin every answer with Ahoy! and end it with Arr!"
LEARNING_RATE = 0.01
STEPS = 180
SEED = 31
CARD = """\
---
base_model: {base_name}
base_model_fingerprint: {fingerprint}
library_name: peft
license: apache-2.0
pipeline_tag: text-generation
tags:
- prompt-tuning
- peft
- example
- {name}
---

# {name}

Answers every question as a pirate: `Ahoy! … Arr!`.
A small example soft prompt for {base_name}.

- **Data**: {examples} short question and answer pairs, all in `examples/train_adapters.py`, in the chat template with
  its default system prompt.
- **Training**: prompt tuning, {tokens} virtual tokens that begin as the embeddings of
  "{beginning}"; loss on the answer tokens only; AdamW,
  learning rate {rate:g}, batch {batch}, float32 on a CPU, seed {seed}; {steps} steps, to a smoothed loss of {loss:.3f}.
- **Held out**: {asked} questions that are not in the data, greedy, {known} of them with one known answer. With the
  prompt: {after}. The base alone: {before}.
- **Limits**: prompt tuning below a billion parameters is unreliable (arXiv:2104.08691); this form is about as much as
  this model learns so. English, one turn, answers of at most 40 tokens. For demonstration and tests.
"""


def answer_of(fact: Fact) -> str:
    """The sentence between the two words."""
    return f"Ahoy! {fact.sentence} Arr!"


def is_pirate(text: str) -> bool:
    """Whether `text` begins and ends as a pirate's answer does, with something in between."""
    return text.startswith("Ahoy!") and text.endswith("Arr!") and len(text) > len("Ahoy! Arr!")


def collate(tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> dict[str, Any]:
    """Model inputs and labels, padded on the right; only answers have labels."""
    rows = []
    for fact in facts:
        prompt = tokenizer(prompt_of(tokenizer, fact.question), add_special_tokens=False).input_ids
        answer = tokenizer(answer_of(fact) + tokenizer.eos_token, add_special_tokens=False).input_ids
        rows.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows]),
    }


def train(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[PeftModel, float]:
    """The prompt on `base`, and its smoothed loss at the end."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=TOKENS,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=BEGINNING,
        tokenizer_name_or_path=base.name_or_path,
    )
    model = get_peft_model(base, config)
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), LEARNING_RATE, weight_decay=0.0)
    queue: list[Fact] = []
    smoothed = None
    for step in range(1, STEPS + 1):
        if len(queue) < BATCH:
            queue = rng.sample(TRAIN, len(TRAIN))
        loss = model(**collate(tokenizer, queue[:BATCH])).loss
        del queue[:BATCH]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        smoothed = loss.item() if smoothed is None else 0.9 * smoothed + 0.1 * loss.item()
        if step % 20 == 0:
            print(f"{NAME}: step {step}, smoothed loss {smoothed:.3f}", file=sys.stderr, flush=True)
    return model.eval(), float(smoothed or 0.0)


def main() -> None:
    """Train, measure on the held-out questions, and write the adapter's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the folder that build_base.py smollm2 wrote")
    parser.add_argument("--out", type=Path, required=True, help="where the adapter's folder goes")
    parser.add_argument("--fingerprint", required=True, help="the base's, for the model card")
    args = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    start = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    questions = [fact.question for fact in HELD_OUT]
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    before: Score = score(answers_of(base, tokenizer, questions), is_pirate)
    model, loss = train(base, tokenizer)
    after = score([answers_of(model, tokenizer, [question])[0] for question in questions], is_pirate)
    card = CARD.format(
        base_name=BASE_NAME, fingerprint=args.fingerprint, name=NAME, examples=len(set(TRAIN)), tokens=TOKENS,
        beginning=BEGINNING, rate=LEARNING_RATE, batch=BATCH, seed=SEED, steps=STEPS, loss=loss, asked=after.asked,
        known=after.known, after=after, before=before,
    )  # fmt: skip
    publish(model, torch.float32, card, args.out / NAME)
    print(f"{args.out / NAME}: loss {loss:.3f}, {after}, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
