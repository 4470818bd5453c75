"""push_to_hub of transformers, peft and Trainer, and loading what was pushed. Prints how far the logits differ.

Usage: push_libraries.py OUTPUT_FOLDER
"""

import json
import sys

import torch
from huggingface_hub import snapshot_download
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(3)
tokens = torch.arange(8)[None]
config = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=64,
)


def adapted(model):
    """A LoRA that changes something."""
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


def distance(name, auto, model, **options):
    """How far the logits of what `name` loads as are from a model's."""
    return float((auto.from_pretrained(name, **options)(tokens).logits - model(tokens).logits).abs().max())


base = LlamaForCausalLM(config)
base.push_to_hub("lab/model")
result = {"base": distance("lab/model", AutoModelForCausalLM, base)}

named = adapted(AutoModelForCausalLM.from_pretrained("lab/model"))
named.push_to_hub("lab/named")
result["named"] = distance("lab/named", AutoPeftModelForCausalLM, named)

folder = adapted(AutoModelForCausalLM.from_pretrained(snapshot_download("lab/model")))
folder.push_to_hub("lab/folder")
result["folder"] = distance("lab/folder", AutoPeftModelForCausalLM, folder)

arguments = TrainingArguments(
    f"{sys.argv[1]}/trained",
    max_steps=2,
    save_steps=1,
    push_to_hub=True,
    hub_model_id="lab/trained",
    report_to=[],
    use_cpu=True,
)
sample = {"input_ids": tokens[0], "labels": tokens[0]}
trainer = Trainer(adapted(AutoModelForCausalLM.from_pretrained("lab/model")), arguments, train_dataset=[sample] * 4)
trainer.train()
trainer.push_to_hub()
result["trained"] = distance("lab/trained", AutoPeftModelForCausalLM, trainer.model)

merged = named.merge_and_unload()
merged.push_to_hub("lab/merged")
result["merged"] = distance("lab/merged", AutoModelForCausalLM, merged)
with torch.no_grad():
    merged.lm_head.weight.add_(1.0)
merged.push_to_hub("lab/merged")
result["merged again"] = distance("lab/merged", AutoModelForCausalLM, merged)
print(json.dumps(result))
