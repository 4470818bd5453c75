"""Soft prompts as words: k more rows of the embedding matrix and k tokens of the tokenizer, before every input.

embedding   [V + k, d]    the prompts' vectors, after (or in place of) the rows that the tokenizer does not use
head        [V + k, d]    each new row is the mean of all others: a tied head is untied and written out
tokenizer                 puts the k tokens in front of every text (composer.exporters.tokenizer)

Why the mean: the logit of such a row is the mean of all other logits, whatever the hidden state, so it is never the
largest, and its probability is at most 1/V (the exponential is convex). A row of zeros promises neither: where all
logits are negative, as GPT-2's are, its 0 wins. generation_config.json suppresses the tokens besides, so that
transformers gives them no probability at all.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from composer.additions import SoftPrompt
from composer.checkpoint import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS, Checkpoint
from composer.ends import tied
from composer.errors import UnsupportedArchitectureError
from composer.exporters.tokenizer import Tokenizer, read_tokenizer
from composer.files import read_json
from composer.plan import NewRows, Plan, ShardPlan, TensorJob, encode_shard

__all__ = ["GENERATES", "embedding_scale", "with_virtual_tokens"]

# Their embedding layer multiplies what it looks up; PEFT puts a prompt behind that layer.
SCALED_EMBEDDINGS = ("gemma", "gemma2", "gemma3", "gemma3_text")
GENERATES = ("ForCausalLM", "LMHeadModel")
READS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model")
UNTIED_HEADS = {"GPTNeoXForCausalLM": "embed_out.weight"}
GENERATION = "generation_config.json"


def with_virtual_tokens(plan: Plan) -> Plan:
    """The plan of a checkpoint and tokenizer that hold the plan's soft prompts, all of them one after the other.

    Raises UnsupportedArchitectureError (a model with several vocabularies, or a head of another kind) and what
    `composer.exporters.tokenizer` raises.
    """
    checkpoint = plan.checkpoint
    prompts = tuple(item.addition for item in plan.additions if isinstance(item.addition, SoftPrompt))
    count = sum(prompt.tokens for prompt in prompts)
    embedding = _embedding(plan)
    generates = checkpoint.architecture.endswith(GENERATES)
    resized = plan.vocabulary.tokenizer if plan.vocabulary else {}
    tokenizer = read_tokenizer({**checkpoint.files, **resized})
    start = _first_free(tokenizer, embedding)
    rows = NewRows(start, count, prompts, embedding_scale(checkpoint.config))
    means = NewRows(start, count)
    untied = generates and tied(checkpoint)
    shards = []
    for shard in plan.shards:
        jobs = [_changed(job, embedding, rows, means) for job in shard.jobs]
        if untied and embedding in shard.jobs and not any(map(_is_head, plan.jobs)):
            name = UNTIED_HEADS.get(checkpoint.architecture, "lm_head.weight")
            jobs.append(replace(embedding, renamed=name, new_rows=means))
        shards.append(ShardPlan(shard.name, encode_shard(jobs), tuple(jobs)))
    names, files = [], {}
    warnings = ()
    ids = list(range(start, start + count))
    if tokenizer is None:
        warnings = (f"the base has no tokenizer: put the ids {ids[0]} to {ids[-1]} in front of every input yourself",)
    else:
        types = int(checkpoint.config.get("type_vocab_size") or 1) > 1
        names, files = tokenizer.with_virtual_tokens(count, token_types=types)
    if generates:
        files[GENERATION] = _generation_config(checkpoint, ids)
    changes: dict[str, Any] = {"vocab_size": max(embedding.source.shape[0], start + count)}
    if generates:
        changes["tie_word_embeddings"] = False
    return replace(
        plan,
        shards=tuple(shards),
        files=files,
        config_fields=changes,
        facts={"virtual_tokens": {"ids": ids, "tokens": names or None}},
        warnings=warnings,
    )


def embedding_scale(config: dict[str, Any]) -> float:
    """By what the model's embedding layer multiplies a row; 1 for nearly all."""
    return float(config["hidden_size"]) ** 0.5 if config.get("model_type") in SCALED_EMBEDDINGS else 1.0


def _embedding(plan: Plan) -> TensorJob:
    """The one embedding matrix of a model whose other vocabulary tensors are known."""
    architecture = plan.checkpoint.architecture
    jobs = [job for job in plan.jobs if job.name.endswith(INPUT_EMBEDDINGS) and len(job.source.shape) == 2]
    others = [job.name for job in plan.jobs if "per_layer" in job.name and "embed" in job.name]
    known = architecture.endswith(GENERATES + READS) and not isinstance(plan.checkpoint.config.get("text_config"), dict)
    if len(jobs) == 1 and known and not others:
        return jobs[0]
    raise UnsupportedArchitectureError(
        f"{architecture}: it is not known which tensors of this model belong to its vocabulary",
        expected=f"a model whose class ends in {', '.join(GENERATES + READS)}, with one embedding matrix",
        found=[architecture, *(job.name for job in jobs), *others],
        remedy="export bundle, or onnx where the architecture is supported",
    )


def _first_free(tokenizer: Tokenizer | None, embedding: TensorJob) -> int:
    """The first id that no text gives: behind the tokenizer's last, or the matrix's last row where there is none."""
    rows = embedding.source.shape[0]
    if tokenizer is None:
        return rows
    if tokenizer.size <= rows:
        return tokenizer.size
    raise UnsupportedArchitectureError(
        f"the tokenizer has {tokenizer.size} ids, the embedding matrix {rows} rows",
        expected=f"at most {rows} ids",
        found=tokenizer.size,
        remedy="the tokenizer belongs to another model",
    )


def _is_head(job: TensorJob) -> bool:
    return job.name.endswith(OUTPUT_EMBEDDINGS)


def _changed(job: TensorJob, embedding: TensorJob, rows: NewRows, means: NewRows) -> TensorJob:
    if job is embedding:
        return replace(job, new_rows=rows)
    head = job.name if _is_head(job) else f"{job.name.removesuffix('bias')}weight" if job.name.endswith(".bias") else ""
    sized = job.source.shape[:1] == embedding.source.shape[:1]
    return replace(job, new_rows=means) if sized and head.endswith(OUTPUT_EMBEDDINGS) else job


def _generation_config(checkpoint: Checkpoint, ids: list[int]) -> bytes:
    """generation_config.json with the tokens suppressed; a new one keeps the special ids that config.json names."""
    if GENERATION in checkpoint.files:
        config = read_json(checkpoint.files[GENERATION])
    else:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        config = {name: checkpoint.config[name] for name in names if checkpoint.config.get(name) is not None}
    config["suppress_tokens"] = [*(config.get("suppress_tokens") or []), *ids]
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
