"""Load a base and an adapter by name, in the ways that transformers and peft have. Prints how far the logits differ.

Usage: load.py BASE ADAPTER [any]; COMPOSED names a base that is their composition.
"""

import json
import os
import sys

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

base, adapter = sys.argv[1:3]
tokens = torch.arange(8)[None]
plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
before = plain(tokens).logits
wrapped = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter, revision="latest"
)
loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
loaded.load_adapter(adapter)
logits = wrapped(tokens).logits
result = {"adapter": float((logits - loaded(tokens).logits).abs().max()), "changed": bool((logits != before).any())}
if len(sys.argv) > 3:
    found = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    result["found"] = float((logits - found(tokens).logits).abs().max())
if "COMPOSED" in os.environ:
    composed = AutoModelForCausalLM.from_pretrained(os.environ["COMPOSED"], dtype=torch.float32)
    result["composed"] = float((logits - composed(tokens).logits).abs().max())
print(json.dumps(result))
