"""Multitask prompt tuning: one soft prompt, times a low-rank matrix for each task (arXiv:2303.02861).

prompt_embeddings [k, d]     shared              prompt of task t = prompt_embeddings ⊙ (cols[t] · rows[t])
prefix_task_cols [T, k, r]
prefix_task_rows [T, r, d]

A recipe names the task: base+adapter#2. Source: peft/tuners/multitask_prompt_tuning/model.py
"""

from __future__ import annotations

from typing import Any

from composer.adapters import adapter_kind
from composer.adapters._common import damaged
from composer.adapters._prompts import PROMPT, prompt_shape
from composer.adapters.prompt_tuning import PromptTuning
from composer.additions import Addition, SoftPrompt
from composer.tensors import SafetensorsHeader

__all__ = ["MultitaskPromptTuning"]

COLUMNS, ROWS = "prefix_task_cols", "prefix_task_rows"


@adapter_kind
class MultitaskPromptTuning(PromptTuning):
    """No weight: the vectors of the task that the recipe names come before the embeddings of every input."""

    name = "multitask-prompt-tuning"
    peft_types = ("MULTITASK_PROMPT_TUNING",)
    parts = (PROMPT, COLUMNS, ROWS)

    def check(self, config: dict[str, Any], header: SafetensorsHeader) -> None:
        """Raise CorruptFileError where the tasks' factors do not fit the prompt."""
        super().check(config, header)
        tokens, numbers = prompt_shape(header)
        found = [header.tensors[name].shape for name in (COLUMNS, ROWS)]
        tasks, rank = config.get("num_tasks"), config.get("num_ranks")
        expected = [(tasks, tokens, rank), (tasks, rank, numbers)]
        if found != expected or not tasks:
            raise damaged(f"{COLUMNS} and {ROWS} have the shapes {found}", expected, found)

    def tasks(self, config: dict[str, Any]) -> int:
        """How many tasks it was trained on."""
        return int(config["num_tasks"])

    def additions(self, config: dict[str, Any], header: SafetensorsHeader, task: int = 0) -> list[Addition]:
        """The prompt of one task."""
        tensors = header.tensors
        return [SoftPrompt(tensors[PROMPT], (tensors[COLUMNS], tensors[ROWS]), task)]
