"""A folder that can be run: its graph in a session, its tokenizer, and what its configs say of beginning and end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from composer.errors import CorruptFileError, NotFoundError
from composer.exporters.companions import PAST_KEY_VALUES, SOFT_PROMPT
from composer.exporters.onnx import find_graph, open_session
from composer.exporters.onnx.adapted import AdaptedSession, activate, adapters_in
from composer.exporters.onnx.architectures import Architecture, architecture_of
from composer.exporters.onnx.seq2seq import DECODER_FILE
from composer.exporters.onnx.seq2seq_session import Seq2SeqSession, open_seq2seq
from composer.exporters.onnx.skeleton import quiet
from composer.exporters.onnx.verify import TOKENIZER_FILES
from composer.files import read_json
from composer.provenance import changed_outputs
from composer.recipe import Placement
from composer.tensors import read_header

if TYPE_CHECKING:
    import onnxruntime
    from transformers import PreTrainedTokenizerBase

__all__ = ["Runnable", "open_runnable"]


@dataclass(frozen=True, slots=True)
class Runnable:
    """A session and what is needed to give it words.

    longest: how many tokens fit, those of the answer included; None where the config does not say.
    eos_ids: the tokens that end a text, as transformers' generate takes them.
    session: with an adapter active, where the graph keeps them apart; both of an encoder-decoder.
    start_ids: what the decoder of an encoder-decoder starts from; empty for others.
    """

    folder: Path
    architecture: Architecture
    config: dict[str, Any]
    session: onnxruntime.InferenceSession | AdaptedSession | Seq2SeqSession
    tokenizer: PreTrainedTokenizerBase
    provider: str
    longest: int | None
    eos_ids: tuple[int, ...]
    start_ids: tuple[int, ...] = ()


def open_runnable(
    folder: Path,
    provider: Literal["cpu", "cuda"] = "cpu",
    *,
    adapter: str | None = None,
    threads: int | None = None,
    check: bool = True,
) -> Runnable:
    """Open the model that was composed into `folder`.

    adapter: one of those that the graph keeps apart; None for the base.
    check: compare the files with the digests in composition.json first; a folder without a record has none.
    Raises NotFoundError (no graph, no tokenizer, no such adapter), CorruptFileError (files that were changed since),
    what architecture_of raises, and what open_session raises, such as MissingDependencyError for a provider that is
    not there.
    """
    seq2seq = (folder / DECODER_FILE).is_file()
    graph = folder / DECODER_FILE if seq2seq else find_graph(folder)
    config = read_json(folder / "config.json")
    architecture = architecture_of(config)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise NotFoundError(
            f"{folder} has no tokenizer, so it cannot be given words",
            expected=list(TOKENIZER_FILES),
            found="none of them",
            remedy="put the tokenizer's files beside the base's weights and compose again",
        )
    if check and (folder / "composition.json").is_file():
        changed = changed_outputs(folder)
        if changed:
            raise CorruptFileError(
                f"{folder} is not what was composed: {', '.join(changed[:5])}",
                expected="the digests of composition.json",
                found=changed,
                remedy="compose it again",
                files=changed,
            )
    session = (
        _session(folder, graph, provider, adapter, threads)
        if not seq2seq
        else _pair(folder, provider, adapter, threads)
    )
    with quiet():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    return Runnable(
        folder=folder,
        architecture=architecture,
        config=config,
        session=session,
        tokenizer=tokenizer,
        provider=provider,
        longest=longest - _virtual_tokens(folder) if isinstance(longest, int) else None,
        eos_ids=_eos_ids(folder, config, tokenizer),
        start_ids=_start_ids(folder, config, tokenizer) if architecture.is_seq2seq else (),
    )


def _session(
    folder: Path, graph: Path, provider: Literal["cpu", "cuda"], adapter: str | None, threads: int | None
) -> onnxruntime.InferenceSession | AdaptedSession:
    session = open_session(graph, provider, threads=threads)
    if adapter is None and adapters_in(session)[0] is Placement.MERGED:
        return session
    return activate(session, folder, [adapter])


def _pair(folder: Path, provider: Literal["cpu", "cuda"], adapter: str | None, threads: int | None) -> Seq2SeqSession:
    if adapter is not None:
        raise NotFoundError(
            f"{folder} keeps no adapters apart",
            expected="no adapter",
            found=adapter,
            remedy="leave it out: what was composed is in the weights",
        )
    return open_seq2seq(folder, provider, threads=threads)


def _virtual_tokens(folder: Path) -> int:
    """How many places the graph takes for itself."""
    for name, tensor, axis in ((SOFT_PROMPT, "embeddings", 0), (PAST_KEY_VALUES, "layers.0.key", 2)):
        if (folder / name).is_file():
            return int(read_header(folder / name).tensors[tensor].shape[axis])
    return 0


def _start_ids(folder: Path, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """As transformers' generate starts a decoder: from its start token, and from the one that is forced after it."""
    path = folder / "generation_config.json"
    given = {**config, **(read_json(path) if path.is_file() else {})}
    ends = (given.get("decoder_start_token_id"), given.get("bos_token_id"), tokenizer.pad_token_id)
    start = next((int(number) for number in ends if number is not None), 0)
    forced = given.get("forced_bos_token_id")
    return (start,) if forced is None else (start, int(forced))


def _eos_ids(folder: Path, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    for ids in (read_json(path).get("eos_token_id") if path.is_file() else None, config.get("eos_token_id")):
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (int(ids),)
    return () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
