"""The torch model with the virtual tokens that lie beside its weights: what a graph that holds them is compared with.

It is called as the model is, with real tokens only, and returns what the model gives for these. Nothing is shared with
the nodes that the graph has for them, nor with PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.exporters.companions import PAST_KEY_VALUES, SOFT_PROMPT

if TYPE_CHECKING:
    import torch

__all__ = ["LiveModel"]

HALF_UNIT = 2.0**-24


class LiveModel:
    """A module and k virtual tokens; `tokens` is k, 0 where there are none. output: the name of the one wanted."""

    def __init__(self, module: torch.nn.Module, folder: Path, output: str) -> None:
        from safetensors.torch import load_file

        self.module, self.config, self.output = module, module.config, output
        self.prompt: torch.Tensor | None = None
        self.prefix: list[tuple[torch.Tensor, torch.Tensor]] = []
        if (folder / SOFT_PROMPT).is_file():
            self.prompt = load_file(folder / SOFT_PROMPT)["embeddings"]
        if (folder / PAST_KEY_VALUES).is_file():
            found = load_file(folder / PAST_KEY_VALUES)
            self.prefix = [
                (found[f"layers.{layer}.key"], found[f"layers.{layer}.value"]) for layer in range(len(found) // 2)
            ]
        self.tokens = len(self.prompt) if self.prompt is not None else self.prefix[0][0].shape[2] if self.prefix else 0

    @contextmanager
    def rounded(self, seed: int) -> Iterator[None]:
        """Meanwhile each number of the embeddings is off by about half a unit in its last place; drawn from `seed`."""
        import torch

        generator = torch.Generator().manual_seed(seed)

        def change(_module: torch.nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
            return output * (1 + HALF_UNIT * torch.randn(output.shape, generator=generator))

        hook = self.module.get_input_embeddings().register_forward_hook(change)
        try:
            yield
        finally:
            hook.remove()

    def double(self) -> None:
        """Turn the module and its virtual tokens to float64; some of its operations stay in float32."""
        self.module.double()
        if self.prompt is not None:
            self.prompt = self.prompt.double()
        self.prefix = [(key.double(), value.double()) for key, value in self.prefix]

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
        """One pass over int64 [batch, length] real tokens."""
        import torch
        from transformers import DynamicCache

        batch = len(input_ids)
        if not self.tokens:
            found = self.module(input_ids=input_ids, attention_mask=attention_mask, **inputs)[self.output]
            return {self.output: found}
        mask = torch.cat([attention_mask.new_ones(batch, self.tokens), attention_mask], dim=1)
        if self.prefix:
            pairs = [tuple(part.expand(batch, -1, -1, -1) for part in pair) for pair in self.prefix]
            inputs["past_key_values"] = DynamicCache(pairs)
            if "use_cache" in inputs:
                inputs["use_cache"] = True
            if "position_ids" in inputs:
                inputs["position_ids"] = inputs["position_ids"] + self.tokens
            return {self.output: self.module(input_ids=input_ids, attention_mask=mask, **inputs)[self.output]}
        real = self.module.get_input_embeddings()(input_ids)
        embeddings = torch.cat([self.prompt.expand(batch, -1, -1), real], dim=1)
        if "position_ids" in inputs:
            before = torch.arange(self.tokens).expand(batch, -1)
            inputs["position_ids"] = torch.cat([before, inputs["position_ids"] + self.tokens], dim=1)
        if "token_type_ids" in inputs:
            kinds = inputs["token_type_ids"]
            inputs["token_type_ids"] = torch.cat([kinds.new_zeros(batch, self.tokens), kinds], dim=1)
        found = self.module(inputs_embeds=embeddings, attention_mask=mask, **inputs)[self.output]
        return {self.output: found if found.ndim == 2 else found[:, self.tokens :]}
