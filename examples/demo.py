"""The main job on a real model, through the command line that a user has. Run by `make demo`.

    build SmolLM2-135M-Instruct -> register it -> publish three trained adapters -> which fit? ->
    compose one, compose two with weights -> safetensors and ONNX -> ask all of them ->
    a soft prompt, which is no weight, the same way -> refuse a wrong base

Everything is kept in .demo/: a second run finds it there. Every `$` line is a command that you can run yourself
with REGISTRY_HOME=.demo/home.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = Path(".demo")
REGISTRY = Path(sys.executable).parent / "registry"
BASE = DEMO / "smollm2"
WRONG = DEMO / "smollm2-changed"
ONE = "smollm2+team/shout"
TWO = "smollm2+team/shout:0.9+team/json:0.9"
PROMPT = "smollm2+team/pirate"
QUESTIONS = ("What is the opposite of hot?", "What is 2 plus 2?")
ANSWER_TOKENS = 24
TIMES: list[tuple[str, float]] = []


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Note how long a step took."""
    started = time.perf_counter()
    yield
    TIMES.append((name, time.perf_counter() - started))


def registry(*args: str | Path, expect: int = 0, show: bool = True) -> str:
    """Run one `registry` command; its progress and errors go to the terminal, its output is returned and shown."""
    words = [str(arg) for arg in args]
    print(f"\n$ registry {' '.join(words)}", flush=True)
    done = subprocess.run([REGISTRY, *words], stdout=subprocess.PIPE, text=True, check=False)
    if show:
        print(done.stdout, end="", flush=True)
    if done.returncode != expect:
        sys.exit(f"registry {words[0]} ended with {done.returncode}, expected {expect}")
    return done.stdout


def heading(text: str) -> None:
    """A line between the parts."""
    print(f"\n=== {text}", flush=True)


def compose(recipe: str, target: str) -> Path:
    """Compose `recipe` to `target` below .demo/out, once."""
    out = DEMO / "out" / f"{recipe.replace('team/', '').replace(':', '-')}-{target}"
    with timed(f"compose {recipe} to {target}"):
        registry("compose", recipe, "--export", target, "-o", out)
    return out


def make_wrong_base() -> None:
    """A model of the same shapes whose weights differ: what other tools load an adapter onto without a word."""
    from safetensors.numpy import load_file, save_file

    if WRONG.exists():
        return
    aside = DEMO / ".smollm2-changed"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(BASE, aside)
    tensors = load_file(aside / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name][::-1].copy()
    save_file(tensors, aside / "model.safetensors", {"format": "pt"})
    aside.rename(WRONG)


def torch_answers(folder: Path) -> Callable[[str], str]:
    """Ask the checkpoint in `folder` through transformers, greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def ask(question: str) -> str:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return ask


def onnx_answers(folder: Path) -> Callable[[str], str]:
    """Ask the graph in `folder` through ONNX Runtime, greedily."""
    from transformers import AutoTokenizer

    from composer.exporters.onnx.session import generate, open_session

    tokenizer = AutoTokenizer.from_pretrained(folder)
    session = open_session(folder / "model.onnx")

    def ask(question: str) -> str:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="np", return_dict=True
        )
        tokens = generate(
            session, inputs["input_ids"], inputs["attention_mask"], ANSWER_TOKENS, [tokenizer.eos_token_id]
        )
        return tokenizer.decode(tokens[0], skip_special_tokens=True)

    return ask


def answer(name: str, folder: Path, load: Callable[[Path], Callable[[str], str]]) -> list[str]:
    """One model's answer to every question; kept beside the model's folder, and asked again when the model changed."""
    kept = DEMO / "answers" / f"{name}.json"
    asked = {"questions": QUESTIONS, "model": str(folder), "made": (folder / "config.json").stat().st_mtime_ns}
    if kept.exists() and (found := json.loads(kept.read_text()))["asked"] == json.loads(json.dumps(asked)):
        return found["answers"]
    ask = load(folder)
    answers = [ask(question) for question in QUESTIONS]
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps({"asked": asked, "answers": answers}))
    return answers


def compare(answers: dict[str, list[str]]) -> None:
    """Every model's answer to every question."""
    for index, question in enumerate(QUESTIONS):
        print(f"\n  {question}")
        for name, given in answers.items():
            print(f"    {name:<24} {given[index]}", flush=True)


def main() -> None:
    """All of it."""
    os.chdir(ROOT)
    os.environ["REGISTRY_HOME"] = str((DEMO / "home").resolve())
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    heading("A real base model, from a package")
    with timed("build the base"):
        subprocess.run([sys.executable, "examples/build_base.py", "smollm2", BASE], check=True)
    with timed("register the base"):
        registry("base", "add", BASE, "--name", "smollm2")

    heading("Three trained adapters, published")
    with timed("publish three adapters"):
        registry("publish", "examples/adapters/shout", "--name", "team/shout", "--version", "1.0.0")
        registry("publish", "examples/adapters/json", "--name", "team/json", "--version", "1.0.0")
        registry("publish", "examples/adapters/pirate", "--name", "team/pirate", "--version", "1.0.0")

    heading("Which adapters fit this base?")
    with timed("ask what is compatible"):
        registry("compatible", "smollm2")

    heading("Compose: one adapter, then two with weights, as safetensors and as ONNX")
    registry("plan", TWO)
    one, two = compose(ONE, "safetensors"), compose(TWO, "safetensors")
    one_onnx, two_onnx = compose(ONE, "onnx"), compose(TWO, "onnx")

    heading("Ask them")
    with timed("answer in torch and ONNX Runtime"):
        models = {
            "base": (BASE, torch_answers),
            "+shout": (one, torch_answers),
            "+shout, ONNX": (one_onnx, onnx_answers),
            "+shout+json": (two, torch_answers),
            "+shout+json, ONNX": (two_onnx, onnx_answers),
        }
        compare({name: answer(name, *model) for name, model in models.items()})

    heading("A soft prompt: 16 words of the vocabulary, or inside the graph; no weight of the base changes")
    registry("plan", PROMPT)
    words, inside = compose(PROMPT, "safetensors"), compose(PROMPT, "onnx")
    with timed("answer with the soft prompt"):
        models = {
            "base": (BASE, torch_answers),
            "+pirate": (words, torch_answers),
            "+pirate, ONNX": (inside, onnx_answers),
        }
        compare({name: answer(name, *model) for name, model in models.items()})

    heading("Any of the graphs answers by itself")
    with timed("run a graph"):
        registry("run", two_onnx, QUESTIONS[0], "--max-new-tokens", str(ANSWER_TOKENS))

    heading("A wrong base: the same shapes, other weights")
    with timed("refuse a wrong base"):
        make_wrong_base()
        registry("base", "add", WRONG, "--name", "smollm2-changed")
        registry("check", "team/shout", "smollm2-changed", expect=4)
        registry("compose", "smollm2-changed+team/shout", "-o", DEMO / "out" / "wrong", expect=4)

    heading("What was made")
    for out in (one, two, one_onnx, two_onnx, words, inside):
        record = json.loads((out / "composition.json").read_text())
        size = sum(entry["size"] for entry in record["outputs"].values()) >> 20
        print(f"  {out}  {size} MiB  {record['output_digest']}")
    heading("Seconds")
    for name, seconds in TIMES:
        print(f"  {seconds:7.1f}  {name}")


if __name__ == "__main__":
    main()
