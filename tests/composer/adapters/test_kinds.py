"""Every kind of adapter against its oracle: PEFT's own forward on tiny models in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from composer.adapters import kinds, open_adapter
from composer.adapters.unmergeable import REASONS
from composer.errors import CorruptFileError, RecipeError, TargetMismatchError, UnsupportedAdapterError
from composer.recipe import Dtype
from composer.tensors import read_header
from tests.conftest import llama_config, save_model
from tests.support import compose_folders, edit_json, plan_folders, read_tensors, weight_bytes, write_tensors

LINEAR = ["q_proj", "k_proj", "gate_proj", "down_proj"]
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # case: (base, PEFT's config class, options)
    "ia3": ("llama", "IA3Config", {"target_modules": LINEAR, "feedforward_modules": []}),
    "ia3-feedforward": ("llama", "IA3Config", {"target_modules": LINEAR, "feedforward_modules": ["down_proj"]}),
    "ia3-head": (
        "llama",
        "IA3Config",
        {"target_modules": ["k_proj"], "feedforward_modules": [], "modules_to_save": ["lm_head"]},
    ),
    "ia3-conv1d": (
        "gpt2",
        "IA3Config",
        {
            "target_modules": ["c_attn", "attn.c_proj", "mlp.c_proj"],
            "feedforward_modules": ["mlp.c_proj"],
            "fan_in_fan_out": True,
        },
    ),
    "ia3-bias": (
        "bert",
        "IA3Config",
        {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
    ),
    "loha": ("llama", "LoHaConfig", {"target_modules": LINEAR, "r": 3, "alpha": 5}),
    "loha-patterns": (
        "bert",
        "LoHaConfig",
        {"target_modules": ["query", "dense"], "r": 2, "rank_pattern": {"query": 4}, "alpha_pattern": {"dense": 3}},
    ),
    "loha-head": ("llama", "LoHaConfig", {"target_modules": ["q_proj"], "r": 2, "modules_to_save": ["lm_head"]}),
    "lokr": ("llama", "LoKrConfig", {"target_modules": LINEAR, "r": 2, "alpha": 3}),
    "lokr-both": (
        "llama",
        "LoKrConfig",
        {"target_modules": LINEAR, "r": 2, "decompose_both": True, "decompose_factor": 8},
    ),
    "lokr-whole": (
        "bert",
        "LoKrConfig",
        {"target_modules": ["query", "dense"], "r": 64, "alpha": 16, "alpha_pattern": {"query": 4}},
    ),
    "adalora": ("llama", "AdaLoraConfig", {"target_modules": LINEAR, "init_r": 6, "lora_alpha": 9, "total_step": 9}),
    "adalora-conv1d": (
        "gpt2",
        "AdaLoraConfig",
        {"target_modules": ["c_attn", "mlp.c_proj"], "init_r": 3, "fan_in_fan_out": True, "total_step": 9},
    ),
    "adalora-bias": (
        "bert",
        "AdaLoraConfig",
        {"target_modules": ["query", "dense"], "init_r": 3, "lora_alpha": 0, "bias": "all", "total_step": 9},
    ),
    "oft": ("llama", "OFTConfig", {"target_modules": LINEAR, "oft_block_size": 8}),
    "oft-exact": (
        "bert",
        "OFTConfig",
        {"target_modules": ["query", "dense"], "oft_block_size": 8, "use_cayley_neumann": False},
    ),
    "oft-terms": ("llama", "OFTConfig", {"target_modules": LINEAR, "oft_block_size": 4, "num_cayley_neumann_terms": 3}),
    "oft-shared": ("llama", "OFTConfig", {"target_modules": LINEAR, "oft_block_size": 16, "block_share": True}),
    "oft-coft": ("llama", "OFTConfig", {"target_modules": LINEAR, "oft_block_size": 8, "coft": True, "eps": 2.0}),
    "boft": ("llama", "BOFTConfig", {"target_modules": LINEAR, "boft_block_size": 8}),
    "boft-bias": ("bert", "BOFTConfig", {"target_modules": ["query", "dense"], "boft_block_size": 4, "bias": "all"}),
    "hra": ("llama", "HRAConfig", {"target_modules": LINEAR, "r": 4}),
    "hra-gs": ("bert", "HRAConfig", {"target_modules": ["query", "dense"], "r": 3, "apply_GS": True}),
    "vera": ("llama", "VeraConfig", {"target_modules": LINEAR, "r": 4}),
    "vera-conv1d": (
        "gpt2",
        "VeraConfig",
        {"target_modules": ["c_attn", "mlp.c_proj"], "r": 4, "fan_in_fan_out": True},
    ),
    "pvera": ("llama", "PveraConfig", {"target_modules": LINEAR, "r": 4}),
    "randlora": ("llama", "RandLoraConfig", {"target_modules": LINEAR, "r": 7, "randlora_alpha": 3}),
    "randlora-sparse": ("bert", "RandLoraConfig", {"target_modules": ["query", "dense"], "r": 8, "sparse": True}),
    "fourierft": ("llama", "FourierFTConfig", {"target_modules": LINEAR, "n_frequency": 50, "scaling": 90.0}),
    "fourierft-conv1d": (
        "gpt2",
        "FourierFTConfig",
        {"target_modules": ["c_attn", "mlp.c_proj"], "n_frequency": 20, "fan_in_fan_out": True, "random_loc_seed": 5},
    ),
    "vblora": ("llama", "VBLoRAConfig", {"target_modules": LINEAR, "r": 3, "num_vectors": 8, "vector_length": 16}),
    "vblora-topk": (
        "bert",
        "VBLoRAConfig",
        {
            "target_modules": ["query", "dense"],
            "r": 2,
            "num_vectors": 9,
            "vector_length": 8,
            "topk": 3,
            "save_only_topk_weights": True,
        },
    ),
    "miss": ("llama", "MissConfig", {"target_modules": LINEAR, "r": 4}),
    "miss-rest": ("llama", "MissConfig", {"target_modules": LINEAR, "r": 7}),
    "miss-bat": ("llama", "MissConfig", {"target_modules": LINEAR, "r": 4, "init_weights": "bat"}),
    "miss-mini": ("llama", "MissConfig", {"target_modules": LINEAR, "r": 4, "init_weights": "mini", "mini_r": 8}),
    "shira": ("llama", "ShiraConfig", {"target_modules": LINEAR, "r": 2}),
    "c3a": ("llama", "C3AConfig", {"target_modules": LINEAR, "block_size": 8}),
    "road": ("llama", "RoadConfig", {"target_modules": LINEAR, "group_size": 8}),
    "road-2": ("bert", "RoadConfig", {"target_modules": ["query", "dense"], "group_size": 16, "variant": "road_2"}),
    "road-4": ("bert", "RoadConfig", {"target_modules": ["query", "dense"], "group_size": 4, "variant": "road_4"}),
    "gralora": ("llama", "GraloraConfig", {"target_modules": LINEAR, "r": 8, "gralora_k": 4, "alpha": 3}),
    "gralora-hybrid": ("bert", "GraloraConfig", {"target_modules": ["query", "dense"], "r": 6, "hybrid_r": 3}),
    "hira": ("llama", "HiraConfig", {"target_modules": LINEAR, "r": 3}),
    "delora": ("llama", "DeloraConfig", {"target_modules": LINEAR, "r": 3, "delora_lambda": 30}),
    "trainable-tokens": ("llama", "TrainableTokensConfig", {"token_indices": [3, 5, 60]}),
    "ln-tuning": ("llama", "LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
    "ln-tuning-bias": ("gpt2", "LNTuningConfig", {"target_modules": ["ln_1", "ln_f"]}),
}
# tests/composer/test_merge_oracles.py; test_kinds_that_… below; tests/composer/test_checkpoint_delta.py; test_prompts.py
PROMPT_KINDS = {"prompt-tuning", "p-tuning", "cpt", "multitask-prompt-tuning", "prefix-tuning"}
ELSEWHERE = {"lora", "unmergeable", "checkpoint-delta", "bottleneck", *PROMPT_KINDS}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny float32 models by architecture, with biases that are not zero."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

    torch.manual_seed(3)
    models = {
        "llama": LlamaForCausalLM(llama_config()),
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=128, n_positions=64)),
        "bert": BertModel(
            BertConfig(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=64,
                vocab_size=128,
                max_position_embeddings=64,
            )
        ),
    }
    for model in models.values():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return {name: save_model(model, tmp_path_factory.mktemp("kinds") / name) for name, model in models.items()}


def run_model(model: Any) -> torch.Tensor:
    """Logits, or the last hidden states of an encoder, on fixed tokens."""
    with torch.no_grad():
        return model.eval()(torch.arange(24).reshape(2, 12) * 5 % 128)[0]


def load(base: Path) -> Any:
    """The model at `base` in float32."""
    from transformers import AutoModel, AutoModelForCausalLM

    auto = AutoModel if base.name == "bert" else AutoModelForCausalLM
    return auto.from_pretrained(base, dtype=torch.float32)


def make_adapter(case: str, bases: dict[str, Path], folder: Path) -> torch.Tensor:
    """Save PEFT's adapter of a case, each of its parameters far from its initial value; returns PEFT's own output."""
    import peft

    base, config, options = CASES[case]
    torch.manual_seed(5)
    adapted = peft.get_peft_model(load(bases[base]), getattr(peft, config)(**options))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return run_model(adapted)


def copy_adapter(source: Path, folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The adapter with other tensors."""
    write_tensors(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    return folder


def adapter_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The adapter's tensors."""
    return {name: spec.read() for name, spec in read_header(folder / "adapter_model.safetensors").tensors.items()}


def test_every_kind_has_an_oracle() -> None:
    """A kind added without a case here fails."""
    covered = {kind for case in CASES for kind in kinds() if case == kind or case.startswith(f"{kind}-")}
    assert covered | ELSEWHERE == set(kinds())


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_computes_what_peft_computes(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Oracle: PEFT's forward, unmerged, to 1e-5; the adapter's effect is far above that."""
    wanted = make_adapter(case, bases, tmp_path / "adapter")
    base = bases[CASES[case][0]]
    out = tmp_path / base.name
    compose_folders(base, [(tmp_path / "adapter", 1.0)], out)
    assert (run_model(load(base)) - wanted).abs().max() > 1e-2
    assert torch.allclose(run_model(load(out)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_weight_zero_gives_the_bytes_of_the_base(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """The adapter is checked and then left out."""
    make_adapter(case, bases, tmp_path / "adapter")
    base = bases[CASES[case][0]]
    compose_folders(base, [(tmp_path / "adapter", 0.0)], tmp_path / "out")
    compose_folders(base, [], tmp_path / "plain")
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "plain")


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("ia3") and case != "ia3-head"])
def test_half_a_weight_is_half_the_change(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Oracle: W + 0.5·(W' − W) in float64, with W' from PEFT's merge of a float64 model; each result is one rounding off."""
    import peft

    make_adapter(case, bases, tmp_path / "adapter")
    base = bases[CASES[case][0]]
    compose_folders(base, [(tmp_path / "adapter", 0.5)], tmp_path / "out")
    model = peft.PeftModel.from_pretrained(load(base).double(), tmp_path / "adapter").double().merge_and_unload()
    merged, written = model.state_dict(), read_tensors(tmp_path / "out")
    for name, tensor in read_tensors(base).items():
        exact = 0.5 * (tensor.double() + merged[name])
        assert torch.allclose(written[name].double(), exact, rtol=3e-7, atol=1e-8), name


def test_ia3_on_a_bf16_base_rounds_once(tiny_llama: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    """Oracle: W·l in float64; a result in bf16 is within half a unit in the last place of it."""
    make_adapter("ia3-feedforward", bases, tmp_path / "adapter")
    compose_folders(tiny_llama, [(tmp_path / "adapter", 1.0)], tmp_path / "out", dtype=Dtype.KEEP)
    base, written = read_tensors(tiny_llama), read_tensors(tmp_path / "out")
    for name, vector in adapter_arrays(tmp_path / "adapter").items():
        target = name.removeprefix("base_model.model.").replace("ia3_l", "weight")
        exact = base[target].double() * torch.from_numpy(vector).double()
        assert written[target].dtype == torch.bfloat16
        assert torch.allclose(written[target].double(), exact, rtol=2**-8 + 2**-20, atol=0), target


def test_norms_that_are_trained_whole_take_no_weight(bases: dict[str, Path], tmp_path: Path) -> None:
    """Half a replacement is not defined: RecipeError."""
    make_adapter("ln-tuning", bases, tmp_path / "adapter")
    with pytest.raises(RecipeError, match="weight must be 1"):
        plan_folders(bases["llama"], [(tmp_path / "adapter", 0.5)])


@pytest.mark.parametrize("case", ["ia3-conv1d", "ia3-bias", "ln-tuning"])
def test_a_damaged_shape_is_named(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """One number too many in any tensor: TargetMismatchError. A vector as a matrix, or integers: CorruptFileError."""
    make_adapter(case, bases, tmp_path / "adapter")
    arrays = adapter_arrays(tmp_path / "adapter")
    base = bases[CASES[case][0]]
    for index, (name, array) in enumerate(arrays.items()):
        axis = int(np.argmax(array.shape))
        longer = np.concatenate([array, array.take([0], axis)], axis)
        damaged = copy_adapter(tmp_path / "adapter", tmp_path / f"long-{index}", {**arrays, name: longer})
        with pytest.raises(TargetMismatchError):
            plan_folders(base, [(damaged, 1.0)])
        integers = {**arrays, name: array.astype(np.int32)}
        with pytest.raises(CorruptFileError):
            open_adapter(copy_adapter(tmp_path / "adapter", tmp_path / f"int-{index}", integers))
        if case.startswith("ia3"):
            square = {**arrays, name: np.ones((4, 4), np.float32)}
            with pytest.raises(CorruptFileError):
                open_adapter(copy_adapter(tmp_path / "adapter", tmp_path / f"square-{index}", square))


@pytest.mark.parametrize("case", ["ia3", "ln-tuning"])
def test_a_file_without_the_kinds_tensors_is_corrupt(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Whole tensors alone do not make an adapter of these kinds."""
    make_adapter(case, bases, tmp_path / "adapter")
    other = {"base_model.model.lm_head.weight": np.zeros((128, 64), np.float32)}
    with pytest.raises(CorruptFileError):
        open_adapter(copy_adapter(tmp_path / "adapter", tmp_path / "other", other))


def test_a_bias_of_another_size_is_a_mismatch(bases: dict[str, Path], tmp_path: Path) -> None:
    """A base whose bias does not fit the vector of its weight is refused."""
    make_adapter("ia3-bias", bases, tmp_path / "adapter")
    tensors = {name: tensor.numpy() for name, tensor in read_tensors(bases["bert"]).items()}
    bias = next(name for name in tensors if name.endswith("key.bias"))
    write_tensors(tmp_path / "base" / "model.safetensors", {**tensors, bias: np.zeros(7, np.float32)})
    (tmp_path / "base" / "config.json").write_bytes((bases["bert"] / "config.json").read_bytes())
    with pytest.raises(TargetMismatchError, match=r"key\.bias"):
        plan_folders(tmp_path / "base", [(tmp_path / "adapter", 1.0)])


def test_a_wrong_fan_in_fan_out_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """With the switch turned over rows and columns would swap: no adapter on GPT-2 gets through."""
    from composer.errors import IncompatibleError

    make_adapter("ia3-conv1d", bases, tmp_path / "adapter")
    arrays = {name: a for name, a in adapter_arrays(tmp_path / "adapter").items() if "attn.c_proj" in name}
    square = copy_adapter(tmp_path / "adapter", tmp_path / "square", arrays)
    edit_json(square / "adapter_config.json", fan_in_fan_out=False)
    with pytest.raises(IncompatibleError, match="fan_in_fan_out"):
        plan_folders(bases["gpt2"], [(square, 1.0)])


@pytest.mark.parametrize("peft_type", REASONS)
def test_kinds_that_are_no_change_of_weights_say_why(peft_type: str, tmp_path: Path) -> None:
    """UnsupportedAdapterError with the reason and a remedy; PEFT knows each type by this name."""
    import peft

    assert peft_type in peft.PeftType.__members__
    write_tensors(tmp_path / "adapter_model.safetensors", {"prompt_embeddings": np.ones((2, 4), np.float32)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type}))
    with pytest.raises(UnsupportedAdapterError, match=f"{peft_type} cannot be merged into weights") as caught:
        open_adapter(tmp_path)
    assert REASONS[peft_type] in str(caught.value)
    assert caught.value.remedy


LINEAR_IN_WEIGHT = [
    "loha",
    "lokr",
    "lokr-both",
    "adalora",
    "oft",
    "hra",
    "vera-conv1d",
    "randlora",
    "fourierft",
    "road-2",
]


@pytest.mark.parametrize("case", LINEAR_IN_WEIGHT)
def test_half_the_weight_is_half_the_delta(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Linear in the weight, on every tensor."""
    make_adapter(case, bases, tmp_path / "adapter")
    base = bases[CASES[case][0]]
    for weight in (0.5, 1.0):
        compose_folders(base, [(tmp_path / "adapter", weight)], tmp_path / str(weight))
    start, half, full = (read_tensors(folder) for folder in (base, tmp_path / "0.5", tmp_path / "1.0"))
    for name, tensor in start.items():
        assert torch.allclose(half[name] - tensor, (full[name] - tensor) / 2, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("case", ["loha", "lokr", "lokr-both", "adalora"])
def test_a_missing_factor_is_corrupt(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Any one tensor fewer: the kind says that the factors do not fit."""
    make_adapter(case, bases, tmp_path / "adapter")
    arrays = adapter_arrays(tmp_path / "adapter")
    for index, name in enumerate(sorted(arrays)[:4]):
        rest = {other: array for other, array in arrays.items() if other != name}
        with pytest.raises(CorruptFileError, match="do not fit one another"):
            open_adapter(copy_adapter(tmp_path / "adapter", tmp_path / str(index), rest))


@pytest.mark.parametrize(
    "changes", [{"r": 7}, {"r": 0}, {"alpha": "4"}, {"rank_pattern": [1]}, {"alpha_pattern": {"q": None}}]
)
@pytest.mark.parametrize("case", ["loha", "lokr-both"])
def test_a_rank_or_alpha_that_is_wrong_is_corrupt(
    case: str, changes: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    """A rank other than the tensors', and values of other types."""
    make_adapter(case, bases, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CorruptFileError):
        open_adapter(tmp_path / "adapter")


def pruned_adapter(bases: dict[str, Path], folder: Path) -> torch.Tensor:
    """An AdaLoRA that PEFT's own allocator pruned, module by module, saved; returns PEFT's output after loading it."""
    import peft

    torch.manual_seed(5)
    config = peft.AdaLoraConfig(
        target_modules=LINEAR, init_r=4, target_r=1, lora_alpha=8, tinit=1, tfinal=1, total_step=9
    )
    adapted = peft.get_peft_model(load(bases["llama"]), config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    kept = iter([[True, False, True, False], [False] * 4, [True] * 4, [False, False, False, True]] * 9)
    masks = {name: next(kept) for name, _ in adapted.base_model.model.named_parameters() if "lora_E" in name}
    adapted.peft_config["default"].rank_pattern = masks
    adapted.save_pretrained(folder)
    return run_model(peft.PeftModel.from_pretrained(load(bases["llama"]), folder))


def test_an_adalora_that_was_pruned_has_the_ranks_that_are_left(bases: dict[str, Path], tmp_path: Path) -> None:
    """Oracle: PEFT's forward of the loaded adapter; a module may have lost all of its ranks."""
    wanted = pruned_adapter(bases, tmp_path / "adapter")
    ranks = {array.shape[0] for name, array in adapter_arrays(tmp_path / "adapter").items() if "lora_A" in name}
    assert ranks == {0, 1, 2, 4}
    compose_folders(bases["llama"], [(tmp_path / "adapter", 1.0)], tmp_path / "llama")
    assert torch.allclose(run_model(load(tmp_path / "llama")), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"init_r": 5},
        {"init_r": "6"},
        {"lora_alpha": None},
        {"fan_in_fan_out": "yes"},
        {"rank_pattern": [1]},
        {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": "all"}},
        {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True, False, True, True, True, True]}},
    ],
)
def test_an_adalora_whose_config_does_not_fit_is_corrupt(
    changes: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    """Ranks other than the tensors', and values of other types."""
    make_adapter("adalora", bases, tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", **changes)
    with pytest.raises(CorruptFileError):
        open_adapter(tmp_path / "adapter")


MISSING = ["boft", "vera", "pvera", "randlora", "vblora-topk", "shira", "road", "gralora", "hira", "delora"]


@pytest.mark.parametrize("case", MISSING)
def test_a_missing_part_is_refused(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Any one tensor fewer is an error before anything is composed; a shared copy may be missing once."""
    make_adapter(case, bases, tmp_path / "adapter")
    arrays = adapter_arrays(tmp_path / "adapter")
    copies = [name for name in arrays if case == "randlora" and ("randlora_A" in name or "randlora_B" in name)]
    for index, name in enumerate(sorted(set(arrays) - set(copies))[:4]):
        rest = {other: array for other, array in arrays.items() if other != name}
        with pytest.raises(CorruptFileError):
            open_adapter(copy_adapter(tmp_path / "adapter", tmp_path / str(index), rest))


NEW_KINDS = ["oft", "boft", "hra", "vera", "randlora", "fourierft", "vblora", "miss", "miss-bat", "miss-mini", "shira"]
NEW_KINDS += ["c3a", "road", "gralora", "hira", "delora"]


@pytest.mark.parametrize("case", NEW_KINDS)
def test_a_part_of_another_shape_is_refused(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """One axis more than the format has: CorruptFileError that names the module. Integers for floats: the same."""
    make_adapter(case, bases, tmp_path / "adapter")
    arrays = adapter_arrays(tmp_path / "adapter")
    for index, (name, array) in enumerate(sorted(arrays.items())[:6]):
        if name.startswith("base_model.randlora"):
            continue  # PEFT writes this one beside each module's own copy
        deeper = {**arrays, name: array[None]}
        with pytest.raises(CorruptFileError, match="do not fit"):
            open_adapter(copy_adapter(tmp_path / "adapter", tmp_path / f"deep-{index}", deeper))
        other = array.astype(np.float32 if array.dtype.kind == "i" else np.int32)
        with pytest.raises(CorruptFileError):
            open_adapter(copy_adapter(tmp_path / "adapter", tmp_path / f"int-{index}", {**arrays, name: other}))


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("oft", {"num_cayley_neumann_terms": "5"}),
        ("oft", {"fan_in_fan_out": "yes"}),
        ("hra", {"r": 5}),
        ("randlora", {"r": 8}),
        ("randlora", {"randlora_alpha": None}),
        ("fourierft", {"scaling": "150"}),
        ("fourierft", {"random_loc_seed": 7.5}),
        ("vblora", {"topk": 0}),
        ("vblora", {"save_only_topk_weights": True}),
        ("miss", {"r": 8}),
        ("miss", {"init_weights": "bat"}),
        ("road", {"variant": "road_3"}),
        ("road", {"group_size": 7}),
        ("gralora", {"alpha": "3"}),
        ("gralora", {"hybrid_r": 2}),
    ],
)
def test_a_config_that_does_not_fit_its_tensors_is_corrupt(
    case: str, changes: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    """Values of other types, or those of another adapter."""
    make_adapter(case, bases, tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", **changes)
    with pytest.raises(CorruptFileError):
        open_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("vera", {"save_projection": False}),
        ("randlora", {"save_projection": False}),
        ("pvera", {"sample_at_inference": True}),
        ("miss", {"init_weights": "other"}),
        ("hra", {"apply_GS": "maybe"}),
    ],
)
def test_options_that_are_not_composed_are_refused_by_name(
    case: str, changes: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    """UnsupportedAdapterError with what would work."""
    make_adapter(case, bases, tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", **changes)
    with pytest.raises(UnsupportedAdapterError) as caught:
        open_adapter(tmp_path / "adapter")
    assert caught.value.remedy


@pytest.mark.parametrize("case", ["oft-shared", "vera", "randlora", "miss-bat", "shira", "fourierft"])
def test_a_base_of_other_sizes_is_refused(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Sizes that only the base tells: TargetMismatchError, and no output."""
    make_adapter(case, bases, tmp_path / "adapter")
    tensors = {name: tensor.numpy() for name, tensor in read_tensors(bases["llama"]).items()}
    name = next(name for name in tensors if name.endswith("layers.0.self_attn.q_proj.weight"))
    rows, columns = tensors[name].shape
    shape = {"vera": (rows, 999), "randlora": (rows, 3), "fourierft": (7, 7)}.get(case, (rows, columns - 1))
    if case == "shira":
        shape = (3, columns)
    write_tensors(tmp_path / "base" / "model.safetensors", {**tensors, name: np.zeros(shape, np.float32)})
    (tmp_path / "base" / "config.json").write_bytes((bases["llama"] / "config.json").read_bytes())
    with pytest.raises(TargetMismatchError):
        compose_folders(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
