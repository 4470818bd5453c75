"""Where the oracle of each kind, method, format and quantised scheme is: node ids for pytest.

docs/kinds.md prints them; tests/test_oracles.py walks the registries, so that a file without an oracle fails. No heavy
import: `python -m cli.tables` reads this.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ORACLES", "PEFT_FORWARD"]

# PEFT's own forward, unmerged; the kind has a case of its name in that file's CASES
PEFT_FORWARD = "tests/composer/adapters/test_kinds.py::test_the_merged_model_computes_what_peft_computes"
PAPERS_FORMULA = "tests/composer/methods/test_methods.py::test_a_method_computes_its_papers_formula"
LIVE_FORWARD = "tests/composer/adapters/test_lora_variants.py::test_logits_are_those_of_pefts_live_forward"
REFUSED = "tests/composer/adapters/test_kinds.py::test_kinds_that_are_no_change_of_weights_say_why"
TWIN = "tests/composer/formats/test_{}.py::test_lora_gives_the_bytes_of_its_peft_twin"
QUANTISED = "tests/composer/test_quantised.py::test_{}"

BY_CASE = (
    "adalora", "bdlora", "beft", "boft", "c3a", "deft", "delora", "fourierft", "frod", "glora", "gralora", "hira", "hra",
    "ia3", "kasa", "ln-tuning", "loha", "lokr", "lora-training", "miss", "oft", "osf", "peanut", "pvera", "randlora",
    "road", "shira", "supertuning", "tinylora", "trainable-tokens", "unilora", "vblora", "vera", "waveft",
)  # fmt: skip
METHODS = (
    "breadcrumbs", "breadcrumbs@mergekit", "breadcrumbs_ties@mergekit", "cat", "core_space", "dare_linear",
    "dare_linear@mergekit", "dare_linear@peft", "dare_linear_svd@peft", "dare_ties", "dare_ties@mergekit",
    "dare_ties@peft", "dare_ties_svd@peft", "della", "della@mergekit", "della_linear@mergekit", "iso_c", "knots",
    "linear", "linear@peft", "magnitude_prune", "magnitude_prune@peft", "magnitude_prune_svd@peft", "model_stock",
    "model_stock@mergekit", "sce", "sce@mergekit", "slerp", "slerp@mergekit", "svd", "task_arithmetic", "ties",
    "ties@mergekit", "ties@peft", "ties_svd@peft", "tsv",
)  # fmt: skip
PROMPTS = ("cpt", "multitask-prompt-tuning", "p-tuning", "prefix-tuning", "prompt-tuning")
ORACLES: Mapping[str, Mapping[str, str]] = {
    "kinds": {
        **dict.fromkeys(BY_CASE, PEFT_FORWARD),
        **dict.fromkeys(PROMPTS, "tests/composer/adapters/test_prompts.py::test_a_bundle_runs_as_peft_does"),
        "bottleneck": "tests/composer/adapters/test_bottlenecks.py::test_hooks_compute_what_the_library_does",
        "lora": LIVE_FORWARD,
        "checkpoint-delta": "tests/composer/test_checkpoint_delta.py::test_weight_1_gives_the_fine_tunes_own_bits",
        "unmergeable": REFUSED,
        "unmergeable-lora": "tests/composer/adapters/test_kinds.py::test_a_lora_that_acts_on_some_inputs_only_says_why",
    },
    "methods": dict.fromkeys(METHODS, PAPERS_FORMULA),
    "formats": {
        "AdapterHub": TWIN.format("adapterhub"),
        "MLX": TWIN.format("mlx"),
        "diffusers": TWIN.format("diffusers"),
        "kohya-ss / LyCORIS": TWIN.format("kohya"),
    },
    "schemes": {
        "awq": QUANTISED.format("awq_interleaves_the_outputs_of_a_word"),
        "bitsandbytes 4-bit": QUANTISED.format("decoding_equals_bitsandbytes_bit_for_bit"),
        "bitsandbytes int8": QUANTISED.format("decoding_equals_bitsandbytes_bit_for_bit"),
        "compressed-tensors": QUANTISED.format("decoding_equals_compressed_tensors_bit_for_bit"),
        "compressed-tensors 8": QUANTISED.format("decoding_equals_compressed_tensors_bit_for_bit"),
        "fp8": QUANTISED.format("fp8_multiplies_by_the_scale_of_the_block"),
        "gguf": "tests/composer/test_gguf.py::test_all_types_decode_as_transformers_does",
        "gptq": QUANTISED.format("gptq_takes_the_zero_and_the_scale_of_the_inputs_group"),
        "mxfp4": QUANTISED.format("mxfp4_equals_transformers_bit_for_bit"),
    },
}
