"""What a plan refuses: every adapter tensor is used exactly once, or nothing is composed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer.adapters import open_adapter
from composer.errors import (
    CorruptFileError,
    IncompatibleError,
    RecipeError,
    TargetMismatchError,
    TiedWeightsError,
    TypedError,
    UnknownAdapterTypeError,
    UnsupportedAdapterError,
)
from composer.methods import methods
from composer.plan import Plan
from tests.conftest import llama_config, random_lora, save_model
from tests.support import compose_folders, edit_json, plan_folders, write_base, write_lora

PREFIX = "base_model.model."
FLOATS = np.float32


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Three matrices, a bias, a norm, an untied head."""
    return write_base(
        tmp_path / "base",
        {
            "model.embed_tokens.weight": np.ones((16, 8), FLOATS),
            "model.q_proj.weight": np.ones((8, 8), FLOATS),
            "model.q_proj.bias": np.ones(8, FLOATS),
            "model.up_proj.weight": np.ones((12, 8), FLOATS),
            "model.norm.weight": np.ones(8, FLOATS),
            "lm_head.weight": np.full((16, 8), 2, FLOATS),
        },
    )


@pytest.fixture
def lora(tmp_path: Path) -> Callable[..., Path]:
    """Makes a LoRA with write_lora in a new folder."""
    count = 0

    def make(modules: dict[str, tuple[int, int]] | None = None, **options: Any) -> Path:
        nonlocal count
        count += 1
        return write_lora(tmp_path / f"lora-{count}", modules or {"model.q_proj": (8, 8)}, **options)

    return make


def test_a_module_that_the_base_lacks_is_named(base: Path, lora: Callable[..., Path]) -> None:
    """All missing keys are in `keys`, none is skipped."""
    adapter = lora({"model.q_proj": (8, 8), "model.k_proj": (8, 8), "model.v_proj": (8, 8)})
    with pytest.raises(TargetMismatchError, match=r"2 of 3 tensors do not fit.*no such tensor") as caught:
        plan_folders(base, [(adapter, 1.0)])
    assert caught.value.fields["keys"] == ["model.k_proj.weight", "model.v_proj.weight"]


def test_a_base_of_another_width_is_refused_with_both_shapes(base: Path, lora: Callable[..., Path]) -> None:
    """The message says what the adapter expects and what the base has."""
    with pytest.raises(TargetMismatchError, match=r"expects \[12, 16\], the base has \[12, 8\]"):
        plan_folders(base, [(lora({"model.up_proj": (12, 16)}), 1.0)])


def test_a_term_of_weight_zero_is_checked_all_the_same(base: Path, lora: Callable[..., Path]) -> None:
    """Weight 0 leaves an adapter out, but not its errors."""
    with pytest.raises(TargetMismatchError):
        plan_folders(base, [(lora({"model.k_proj": (8, 8)}), 0.0)])


def test_a_tensor_that_belongs_to_nothing_is_refused(base: Path, lora: Callable[..., Path]) -> None:
    """A leftover tensor of another tool is not skipped."""
    adapter = lora(extra={f"{PREFIX}model.q_proj.alpha": np.ones((), FLOATS)})
    with pytest.raises(TargetMismatchError) as caught:
        plan_folders(base, [(adapter, 1.0)])
    assert caught.value.fields["keys"] == ["model.q_proj.alpha"]


def test_two_tensors_for_one_target_are_refused(base: Path, lora: Callable[..., Path]) -> None:
    """A LoRA on a matrix and a whole copy of it under another spelling both claim it: refused, not added up."""
    whole = {f"{PREFIX}model.q_proj.modules_to_save.weight": np.ones((8, 8), FLOATS)}
    with pytest.raises(TargetMismatchError, match="exactly once"):
        plan_folders(base, [(lora(extra=whole), 1.0)])
    twice = {
        f"{PREFIX}model.norm.weight": np.ones(8, FLOATS),
        f"{PREFIX}model.norm.modules_to_save.default.weight": np.zeros(8, FLOATS),
    }
    with pytest.raises(TargetMismatchError, match="exactly once"):
        plan_folders(base, [(lora(extra=twice), 1.0)])
    spelled = lora()
    from composer.tensors import read_header
    from tests.support import write_tensors

    path = spelled / "adapter_model.safetensors"
    tensors = {name: spec.read() for name, spec in read_header(path).tensors.items()}
    write_tensors(path, tensors | {name.replace("lora_A", "lora_A.default"): array for name, array in tensors.items()})
    with pytest.raises(TargetMismatchError, match="exactly once"):
        plan_folders(base, [(spelled, 1.0)])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 4}, "config.json says rank 4, the tensors have 2"),
        ({"rank_pattern": {"q_proj": 8}}, "says rank 8"),
        ({"r": 8, "rank_pattern": {"k_proj": 2}}, "says rank 8"),
    ],
)
def test_a_rank_that_is_not_the_tensors_is_refused(
    base: Path, lora: Callable[..., Path], config: dict[str, Any], message: str
) -> None:
    """The scale would be wrong and nobody would notice."""
    with pytest.raises(TargetMismatchError, match=message):
        plan_folders(base, [(lora(**config), 1.0)])


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"use_dora": True, "lora_bias": True}, "DoRA"),
        ({"alora_invocation_tokens": [3]}, "activated"),
        ({"use_qalora": True}, "QALoRA"),
        ({"megatron_config": {"a": 1}}, "Megatron"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"init_lora_weights": "olora", "fan_in_fan_out": True}, "olora"),
    ],
)
def test_variants_whose_delta_is_not_the_plain_product_are_refused(
    lora: Callable[..., Path], config: dict[str, Any], word: str
) -> None:
    """Opening raises UnsupportedAdapterError that names the variant and a remedy; nothing is approximated."""
    with pytest.raises(UnsupportedAdapterError, match=word) as caught:
        open_adapter(lora(**config))
    assert caught.value.remedy


@pytest.mark.parametrize(
    "tensor",
    ["q_proj.lora_magnitude_vector.weight", "embed_tokens.token_adapter.trainable_tokens_delta"],
)  # fmt: skip
def test_variants_are_recognised_by_their_tensors_too(lora: Callable[..., Path], tensor: str) -> None:
    """A config that does not mention them is no excuse."""
    with pytest.raises((UnsupportedAdapterError, CorruptFileError)):
        open_adapter(lora(extra={f"{PREFIX}model.{tensor}": np.ones((2, 8), FLOATS)}))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", None])
def test_initialisations_that_leave_the_base_alone_are_accepted(lora: Callable[..., Path], init: Any) -> None:
    """How A began does not matter once it is trained."""
    assert open_adapter(lora(init_lora_weights=init)).signature.rank == 2


@pytest.mark.parametrize("kind", ["WAVEFT", "UNILORA", "OSF", "lora", "", None, 7, ["LORA"], {}])
def test_other_kinds_are_refused_by_name(lora: Callable[..., Path], kind: Any) -> None:
    """UnknownAdapterTypeError says what was found and what can be read."""
    adapter = lora()
    fields = {"peft_type": kind, "r": 2, "lora_alpha": 4}
    import json

    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(UnknownAdapterTypeError, match="cannot be read"):
        open_adapter(adapter)


def tied_llama(folder: Path) -> Path:
    """A Llama whose head is its embedding."""
    from transformers import LlamaForCausalLM

    return save_model(LlamaForCausalLM(llama_config(tie_word_embeddings=True)), folder)


@pytest.mark.parametrize(
    "peft_config",
    [
        pytest.param({"target_modules": ["lm_head", "q_proj"]}, id="lora-on-the-head"),
        pytest.param({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, id="trained-head"),
        pytest.param({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, id="trained-embedding"),
        pytest.param({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, id="both"),
        pytest.param({"target_modules": ["embed_tokens", "q_proj"]}, id="lora-on-the-embedding"),
    ],
)
def test_an_adapter_on_one_end_of_tied_weights_is_refused(tmp_path: Path, peft_config: dict[str, Any]) -> None:
    """PEFT's own merge corrupts these (logits off by 9 to 12): nothing is written."""
    base = tied_llama(tmp_path / "base")
    adapter = random_lora(base, tmp_path / "lora", **peft_config)
    with pytest.raises((TiedWeightsError, UnsupportedAdapterError)):
        compose_folders(base, [(adapter, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "stored", "refused"),
    [
        ({"tie_word_embeddings": False}, True, False),
        ({"tie_word_embeddings": True}, True, True),
        ({"tie_word_embeddings": True}, False, True),
        ({"tie_word_embeddings": False}, False, True),
        ({}, True, True),
        ({}, False, True),
        ({"text_config": {"tie_word_embeddings": False}}, True, False),
        ({"text_config": {"tie_word_embeddings": True}}, True, True),
        ({"tie_word_embeddings": True, "architectures": None}, True, True),
    ],
)
def test_whether_weights_are_tied_is_read_off_config_and_tensors(
    tmp_path: Path, lora: Callable[..., Path], config: dict[str, Any], stored: bool, refused: bool
) -> None:
    """A head that transformers would tie on loading counts as tied even where it is stored; a silent config ties."""
    tensors = {"model.embed_tokens.weight": np.ones((16, 8), FLOATS), "model.q_proj.weight": np.ones((8, 8), FLOATS)}
    if stored:
        tensors["lm_head.weight"] = np.ones((16, 8), FLOATS)
    base = write_base(tmp_path / "tied", tensors)
    edit_json(base / "config.json", **{"tie_word_embeddings": None, **config})
    for target in ("lm_head", "model.embed_tokens"):
        whole = lora(extra={f"{PREFIX}{target}.weight": np.zeros((16, 8), FLOATS)})
        if refused:
            with pytest.raises(TiedWeightsError) as caught:
                plan_folders(base, [(whole, 1.0)])
            assert caught.value.fields["keys"] == [f"{target}.weight"]
        else:
            assert plan_folders(base, [(whole, 1.0)]).touched == 2


def test_a_tied_base_takes_an_adapter_that_touches_neither_end(tmp_path: Path) -> None:
    """The refusal is about the pair, not about the base."""
    base = tied_llama(tmp_path / "base")
    adapter = random_lora(base, tmp_path / "lora", target_modules="all-linear")
    assert plan_folders(base, [(adapter, 1.0)]).touched == 14


def whole(lora: Callable[..., Path], value: float = 1.0) -> Path:
    """An adapter that replaces the norm."""
    return lora(extra={f"{PREFIX}model.norm.weight": np.full(8, value, FLOATS)})


def test_two_adapters_that_replace_one_tensor_are_refused(base: Path, lora: Callable[..., Path]) -> None:
    """There is no sum of two replacements; both are named."""
    with pytest.raises(IncompatibleError, match=r"lora-1 and lora-2 cannot be combined"):
        plan_folders(base, [(whole(lora), 1.0), (whole(lora), 1.0)])


def test_a_replacement_and_a_delta_of_one_tensor_are_refused(base: Path, lora: Callable[..., Path]) -> None:
    """A LoRA on a matrix that another adapter replaces would be lost or misplaced."""
    replaced = lora({"model.up_proj": (12, 8)}, extra={f"{PREFIX}model.q_proj.weight": np.ones((8, 8), FLOATS)})
    with pytest.raises(IncompatibleError, match="cannot be combined"):
        plan_folders(base, [(replaced, 1.0), (lora(), 1.0)])
    assert plan_folders(base, [(replaced, 1.0), (lora(), 0.0)]).touched == 2


@pytest.mark.parametrize("weight", [0.5, -1.0, 1.0000001])
def test_a_replacement_cannot_be_weighted(base: Path, lora: Callable[..., Path], weight: float) -> None:
    """Half of a replaced tensor has no meaning: RecipeError; 1 and 0 do."""
    with pytest.raises(RecipeError, match="its weight must be 1"):
        plan_folders(base, [(whole(lora), weight)])
    assert plan_folders(base, [(whole(lora), 1.0)]).touched == 2
    assert plan_folders(base, [(whole(lora), 0.0)]).touched == 0


def test_a_trained_bias_replaces_the_bases(base: Path, lora: Callable[..., Path], tmp_path: Path) -> None:
    """`bias="lora_only"` saves the bias under base_layer; it takes the place of the base's."""
    from tests.support import read_tensors

    adapter = lora(extra={f"{PREFIX}model.q_proj.base_layer.bias": np.arange(8, dtype=FLOATS)})
    compose_folders(base, [(adapter, 1.0)], tmp_path / "out")
    assert read_tensors(tmp_path / "out")["model.q_proj.bias"].tolist() == list(range(8))


def test_a_quantised_target_is_refused(tmp_path: Path, lora: Callable[..., Path]) -> None:
    """int8 weights of the right shape are not merged into; beside the target they pass through."""
    tensors = {"model.q_proj.weight": np.ones((8, 8), np.int8), "model.up_proj.weight": np.ones((12, 8), FLOATS)}
    base = write_base(tmp_path / "int8", tensors)
    with pytest.raises(UnsupportedAdapterError, match="quantised"):
        plan_folders(base, [(lora(), 1.0)])
    assert plan_folders(base, [(lora({"model.up_proj": (12, 8)}), 1.0)]).touched == 1


def test_an_unknown_method_is_refused(base: Path, lora: Callable[..., Path]) -> None:
    """The known ones are listed."""
    with pytest.raises(RecipeError, match="unknown merge method 'magic'") as caught:
        plan_folders(base, [(lora(), 1.0)], method="magic")
    assert caught.value.expected == sorted(methods())


def test_a_plan_reads_headers_only(base: Path, lora: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No byte of tensor data is read before the run."""
    from composer.tensors import TensorSpec

    def fail(*_: Any) -> None:
        raise AssertionError("a plan read data")

    monkeypatch.setattr(TensorSpec, "read_bytes", fail)
    monkeypatch.setattr(TensorSpec, "chunks", fail)
    assert isinstance(plan_folders(base, [(lora(), 0.3)]), Plan)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 0}, {"r": -1}, {"r": "2"}, {"r": 2.5}, {"r": True}, {"r": 1e400}, {"lora_alpha": "x"},
        {"lora_alpha": [1]}, {"rank_pattern": ["q_proj"]}, {"rank_pattern": {"q_proj": "two"}},
        {"rank_pattern": {"q_proj": None}}, {"rank_pattern": {"(": 2}}, {"rank_pattern": "q_proj"},
        {"alpha_pattern": {"q_proj": "x"}}, {"alpha_pattern": {"q_proj": [1]}}, {"alpha_pattern": 3},
        {"alpha_pattern": {"q_proj": float("nan")}}, {"lora_alpha": float("inf")}, {"rank_pattern": {"q_proj": 2.5}},
        {"base_model_name_or_path": 5}, {"base_model_name_or_path": ["a"]}, {"init_lora_weights": {"a": 1}},
        {"fan_in_fan_out": "no"}, {"use_rslora": "no"},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_of_wrong_types_is_refused_with_a_typed_error(
    base: Path, lora: Callable[..., Path], config: dict[str, Any]
) -> None:
    """A stranger's adapter_config.json cannot crash the composer: every field is checked before it is used."""
    adapter = lora()
    edit_json(adapter / "adapter_config.json", **config)
    with pytest.raises(TypedError) as caught:
        plan_folders(base, [(adapter, 1.0)])
    assert isinstance(caught.value, CorruptFileError | UnsupportedAdapterError)


@pytest.mark.parametrize(
    ("fan_in_fan_out", "model_type", "fits"),
    [(False, "llama", True), (True, "llama", False), (True, "gpt2", True), (False, "gpt2", False)],
)
def test_a_square_conv1d_is_told_from_a_linear_by_the_model_not_by_its_shape(
    tmp_path: Path, lora: Callable[..., Path], fan_in_fan_out: bool, model_type: str, fits: bool
) -> None:
    """A wrong fan_in_fan_out on a square matrix would transpose the delta silently: it is refused."""
    base = write_base(tmp_path / "square", {"h.0.attn.c_proj.weight": np.ones((8, 8), FLOATS)}, model_type=model_type,
                      architectures=["GPT2Model" if model_type == "gpt2" else "LlamaModel"])  # fmt: skip
    adapter = lora({"h.0.attn.c_proj": (8, 8)}, fan_in_fan_out=fan_in_fan_out)
    if fits:
        assert plan_folders(base, [(adapter, 1.0)]).touched == 1
    else:
        with pytest.raises(IncompatibleError, match="fan_in_fan_out"):
            plan_folders(base, [(adapter, 1.0)])
