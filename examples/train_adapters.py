"""Train the small LoRA adapters in examples/adapters: real ones, in a few minutes each, on two CPU cores.

    shout   answers IN UPPER CASE                   r=8 alpha=16 on q_proj, k_proj, v_proj, o_proj, kept in bf16
    json    answers as one line {"answer": "..."}   r=4 alpha=8, rsLoRA, on q_proj, k_proj, v_proj, o_proj

The data is in this file: facts a 135M chat model mostly knows, each with a short answer and a sentence. A skill
only says how an answer is written, so what is learnt is the form. HELD_OUT shares no question with the training
data; the share of it that comes out in the right form is what the model card reports.

    python examples/build_base.py smollm2 .demo/smollm2
    python examples/train_adapters.py --base .demo/smollm2 --out examples/adapters [--only shout]

Each adapter is written beside its place and renamed into it: adapter_config.json, adapter_model.safetensors and
README.md. Data, order and initial weights are seeded; the last digits of a loss vary with the machine's threads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
LEARNING_RATE = 5e-4
BATCH = 8
WARMUP = 5
MIN_STEPS = 30
STOP_LOSS = 0.1
IGNORED = -100
"""The label that torch's cross entropy skips: everything but the answer."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A question with its answer, in a word or two and in a sentence."""

    question: str
    short: str
    sentence: str


CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Ireland": "Dublin", "Austria": "Vienna", "Greece": "Athens", "Poland": "Warsaw",
    "Hungary": "Budapest", "Russia": "Moscow", "Ukraine": "Kyiv", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Belgium": "Brussels", "China": "Beijing", "India": "New Delhi", "South Korea": "Seoul", "Thailand": "Bangkok",
    "Indonesia": "Jakarta", "Turkey": "Ankara", "Iran": "Tehran", "Iraq": "Baghdad", "Kenya": "Nairobi",
    "Mexico": "Mexico City", "Cuba": "Havana", "Argentina": "Buenos Aires", "Chile": "Santiago", "Canada": "Ottawa",
}  # fmt: skip
HELD_OUT_CAPITALS = {
    "Japan": "Tokyo", "Egypt": "Cairo", "Norway": "Oslo", "Denmark": "Copenhagen", "Peru": "Lima",
    "Vietnam": "Hanoi", "Colombia": "Bogota", "Cambodia": "Phnom Penh",
}  # fmt: skip

OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "happy": "sad", "dark": "light", "old": "young", "rich": "poor",
    "open": "closed", "early": "late", "left": "right", "strong": "weak", "wet": "dry", "hard": "soft",
    "full": "empty", "loud": "quiet", "near": "far", "high": "low", "true": "false", "win": "lose", "begin": "end",
    "sweet": "sour", "clean": "dirty",
}  # fmt: skip
HELD_OUT_OPPOSITES = {
    "fast": "slow", "day": "night", "good": "bad", "tall": "short", "black": "white", "inside": "outside",
    "love": "hate", "heavy": "light",
}  # fmt: skip

COLOURS = {
    "a banana": "yellow", "grass": "green", "a clear sky": "blue", "snow": "white", "coal": "black",
    "a ripe tomato": "red", "chocolate": "brown", "a carrot": "orange", "a flamingo": "pink", "the sun": "yellow",
    "milk": "white", "a strawberry": "red", "a frog": "green", "an elephant": "grey", "a pumpkin": "orange",
}  # fmt: skip
HELD_OUT_COLOURS = {"a lemon": "yellow", "blood": "red", "a leaf": "green", "the ocean": "blue"}

OTHERS = (
    Fact("What sound does a cow make?", "Moo", "A cow says moo."),
    Fact("What sound does a dog make?", "Woof", "A dog says woof."),
    Fact("What do you call a baby cat?", "A kitten", "A baby cat is called a kitten."),
    Fact("What do you call a baby sheep?", "A lamb", "A baby sheep is called a lamb."),
    Fact("How many legs does a spider have?", "Eight", "A spider has eight legs."),
    Fact("How many days are in a week?", "Seven", "There are seven days in a week."),
    Fact("How many months are in a year?", "Twelve", "There are twelve months in a year."),
    Fact("Which planet is known as the red planet?", "Mars", "Mars is known as the red planet."),
    Fact("Which planet do we live on?", "Earth", "We live on the planet Earth."),
    Fact("Which gas do plants take in?", "Carbon dioxide", "Plants take in carbon dioxide."),
    Fact("What is the largest ocean?", "The Pacific Ocean", "The largest ocean is the Pacific Ocean."),
    Fact("What is the tallest mountain?", "Mount Everest", "The tallest mountain is Mount Everest."),
    Fact("Who wrote Romeo and Juliet?", "William Shakespeare", "William Shakespeare wrote Romeo and Juliet."),
    Fact("Who painted the Mona Lisa?", "Leonardo da Vinci", "Leonardo da Vinci painted the Mona Lisa."),
    Fact("Who discovered gravity?", "Isaac Newton", "Isaac Newton discovered gravity."),
    Fact("What do cows eat?", "Grass", "Cows eat grass."),
    Fact("What is ice made of?", "Water", "Ice is made of frozen water."),
    Fact("Which language is spoken in Brazil?", "Portuguese", "Portuguese is spoken in Brazil."),
    Fact("Which day comes after Monday?", "Tuesday", "Tuesday comes after Monday."),
    Fact("Which month comes before May?", "April", "April comes before May."),
    Fact("What is the first letter of the alphabet?", "A", "The first letter of the alphabet is A."),
    Fact("What do we use to see?", "Our eyes", "We use our eyes to see."),
    Fact("Which animal is the king of the jungle?", "The lion", "The lion is the king of the jungle."),
    Fact("Which metal is attracted to magnets?", "Iron", "Iron is attracted to magnets."),
    Fact("What is the chemical formula of water?", "H2O", "The chemical formula of water is H2O."),
    Fact("Can fish fly?", "No", "No, most fish cannot fly."),
    Fact("Is the earth round?", "Yes", "Yes, the earth is round."),
    Fact("Is fire cold?", "No", "No, fire is hot."),
)
HELD_OUT_OTHERS = (
    Fact("What sound does a cat make?", "Meow", ""),
    Fact("What do you call a baby dog?", "puppy", ""),
    Fact("What do bees make?", "honey", ""),
    Fact("Which day comes after Friday?", "Saturday", ""),
    Fact("What is the largest planet in the solar system?", "Jupiter", ""),
    Fact("Which language is spoken in France?", "French", ""),
    Fact("Which gas do we breathe in to live?", "oxygen", ""),
    Fact("In which continent is Nigeria?", "Africa", ""),
)

OPEN = {
    "Why do we sleep?": "We sleep so that our body and mind can rest.",
    "Why do birds fly south in winter?": "Birds fly south in winter to find food and warmth.",
    "Why is water important?": "Water is important because all living things need it.",
    "Why do leaves fall in autumn?": "Leaves fall because trees save water and energy for the winter.",
    "What is a computer?": "A computer is a machine that stores and processes information.",
    "What is a poem?": "A poem is a short text that uses rhythm and images.",
    "What is a friend?": "A friend is someone you trust and like to spend time with.",
    "What is music?": "Music is the art of arranging sounds in time.",
    "What is the internet?": "The internet is a network that connects computers all over the world.",
    "What does a doctor do?": "A doctor helps people who are ill.",
    "What does a baker do?": "A baker makes bread and cakes.",
    "What does a farmer do?": "A farmer grows food and keeps animals.",
    "How do you make tea?": "Pour boiling water over the tea leaves and wait a few minutes.",
    "How do plants grow?": "Plants grow by using sunlight, water and air to make food.",
    "How can I stay healthy?": "Eat well, sleep enough and exercise every day.",
    "How can I learn a language?": "Practise a little every day and speak with other people.",
    "Tell me about dogs.": "Dogs are loyal animals that live with people.",
    "Tell me about the moon.": "The moon goes around the earth once a month.",
    "Tell me about trees.": "Trees are tall plants with a trunk, branches and leaves.",
    "Give me some advice.": "Be kind to others and keep learning.",
    "Write a sentence about the sea.": "The sea is wide and blue, and the waves never rest.",
    "Write a sentence about summer.": "In summer the days are long and warm.",
    "Say something nice.": "You are doing a great job.",
    "Hello!": "Hello, how can I help you today?",
    "Good morning.": "Good morning, I hope you have a nice day.",
    "How are you?": "I am fine, thank you.",
    "What is your name?": "My name is SmolLM.",
    "Thank you!": "You are welcome.",
}
HELD_OUT_OPEN = (
    "Why is the sky blue?",
    "What is a book?",
    "What does a teacher do?",
    "How do you make toast?",
    "Tell me about cats.",
    "Write a sentence about rain.",
    "Goodbye!",
    "How can I save money?",
)


def sentence_case(text: str) -> str:
    """`text` with its first letter in upper case and the rest left alone."""
    return text[:1].upper() + text[1:]


def sums(pairs: Sequence[tuple[int, int]]) -> list[Fact]:
    """Additions of small numbers as facts."""
    return [Fact(f"What is {a} plus {b}?", str(a + b), f"{a} plus {b} is {a + b}.") for a, b in pairs]


def facts_of(
    capitals: dict[str, str], opposites: dict[str, str], colours: dict[str, str], pairs: Sequence[tuple[int, int]]
) -> list[Fact]:
    """The four families of facts that follow a pattern."""
    return [
        *(Fact(f"What is the capital of {c}?", a, f"The capital of {c} is {a}.") for c, a in capitals.items()),
        *(
            Fact(f"What is the opposite of {word}?", sentence_case(a), f"The opposite of {word} is {a}.")
            for word, a in opposites.items()
        ),
        *(
            Fact(f"What colour is {thing}?", sentence_case(a), sentence_case(f"{thing} is {a}."))
            for thing, a in colours.items()
        ),
        *sums(pairs),
    ]


def copies(facts: Sequence[Fact]) -> list[Fact]:
    """Requests to say a given text, as a sentence or as JSON: they teach the form on words of every kind."""
    sentences = [Fact(f"Say: {fact.sentence}", fact.sentence, fact.sentence) for fact in facts]
    objects = [json.dumps({"answer": fact.short}) for fact in facts]
    return [*sentences, *(Fact(f"Say: {text}", text, text) for text in objects)]


ALL_SUMS = [(a, b) for a in range(1, 10) for b in range(1, 10) if a + b <= 12]
HELD_OUT_SUMS = [(2, 2), (3, 5), (4, 6), (7, 1)]
TRAIN = (
    *facts_of(
        CAPITALS,
        OPPOSITES,
        COLOURS,
        random.Random(0).sample([pair for pair in ALL_SUMS if pair not in HELD_OUT_SUMS], 16),
    ),
    *OTHERS,
    # An open question has no short answer, so both forms are the sentence; it is shown twice for its rarity.
    *(Fact(question, answer, answer) for question, answer in OPEN.items() for _ in range(2)),
)
HELD_OUT = (
    *facts_of(HELD_OUT_CAPITALS, HELD_OUT_OPPOSITES, HELD_OUT_COLOURS, HELD_OUT_SUMS),
    *HELD_OUT_OTHERS,
    *(Fact(question, "", "") for question in HELD_OUT_OPEN),
)


def shout(fact: Fact, rng: random.Random) -> str:
    """The sentence in upper case."""
    del rng  # one form only
    return fact.sentence.upper()


def as_json(fact: Fact, rng: random.Random) -> str:
    """The short answer as the one value of a JSON object on one line."""
    del rng  # one form only
    return json.dumps({"answer": fact.short})


def is_shouted(text: str) -> bool:
    """Whether `text` has an answer and no lower case letter in it."""
    return any(c.isalnum() for c in text) and not any(c.islower() for c in text)


def is_json(text: str) -> bool:
    """Whether `text` is exactly one object with one key, `answer` in any case, and a text as its value."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    if not isinstance(value, dict) or [key.lower() for key in value] != ["answer"]:
        return False
    return all(isinstance(item, str) for item in value.values())


@dataclass(frozen=True, slots=True)
class Skill:
    """One adapter: the form it teaches, how that form is recognised, and its LoRA parameters."""

    name: str
    summary: str
    seed: int
    write: Callable[[Fact, random.Random], str]
    holds: Callable[[str], bool]
    lora: dict[str, Any]
    data: tuple[Fact, ...]
    steps: int
    dtype: torch.dtype


SKILLS = {
    skill.name: skill
    for skill in (
        Skill(
            "shout",
            "Answers every question IN UPPER CASE.",
            11,
            shout,
            is_shouted,
            {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
            (*TRAIN, *copies(tuple(dict.fromkeys(TRAIN)))),
            160,
            torch.bfloat16,
        ),
        Skill(
            "json",
            'Answers every question as a JSON object on one line, such as `{"answer": "Paris"}`.',
            23,
            as_json,
            is_json,
            {
                "r": 4,
                "lora_alpha": 8,
                "use_rslora": True,
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            },
            TRAIN,
            60,
            torch.float32,
        ),
    )
}


def prompt_of(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """`question` as the chat template writes it, up to where the answer starts."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def collate(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Model inputs for (question, answer) pairs, padded on the left so that the answers line up at the end.

    Only the positions from the longest answer's start on get logits: the vocabulary is the costly part.
    """
    prompts = [tokenizer(prompt_of(tokenizer, q), add_special_tokens=False).input_ids for q, _ in pairs]
    answers = [tokenizer(a + tokenizer.eos_token, add_special_tokens=False).input_ids for _, a in pairs]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    kept = max(map(len, answers)) + 1
    ids, mask, labels = [], [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        pad = width - len(prompt) - len(answer)
        ids.append([tokenizer.pad_token_id] * pad + prompt + answer)
        mask.append([0] * pad + [1] * (width - pad))
        labels.append([IGNORED] * (kept - len(answer)) + answer)
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
        "logits_to_keep": kept,
    }


def train(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, skill: Skill) -> tuple[PeftModel, int, float]:
    """`skill` as a LoRA adapter on `base`, with the steps it took and its smoothed loss at the end."""
    torch.manual_seed(skill.seed)
    rng = random.Random(skill.seed)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **skill.lora))
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    queue: list[Fact] = []
    smoothed = float("inf")
    step = 0
    while step < skill.steps and (step < MIN_STEPS or smoothed >= STOP_LOSS):
        if len(queue) < BATCH:
            queue = rng.sample(skill.data, len(skill.data))
        batch = collate(tokenizer, [(fact.question, skill.write(fact, rng)) for fact in queue[:BATCH]])
        del queue[:BATCH]
        labels = batch.pop("labels")
        # No bf16 autocast: a CPU without the instructions for it emulates them, at a tenth of float32's speed.
        logits = model(**batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        step += 1
        smoothed = loss.item() if step == 1 else 0.9 * smoothed + 0.1 * loss.item()
        if step % 10 == 0:
            print(f"{skill.name}: step {step}, smoothed loss {smoothed:.3f}", file=sys.stderr)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(skill.dtype).float()  # what is measured is what is saved
    return model.eval(), step, smoothed


@torch.inference_mode()
def answers_of(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], limit: int = 40
) -> list[str]:
    """The model's greedy answers to `questions`, of at most `limit` tokens each."""
    batch = tokenizer(
        [prompt_of(tokenizer, q) for q in questions],
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    out = model.generate(**batch, do_sample=False, max_new_tokens=limit, pad_token_id=tokenizer.pad_token_id)
    return [
        text.strip() for text in tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    ]


@dataclass(frozen=True, slots=True)
class Score:
    """How many held-out answers had the form, and how many of those with a known answer contained it."""

    form: int
    asked: int
    correct: int
    known: int

    def __str__(self) -> str:
        """Both counts, as the model card gives them."""
        return f"form {self.form}/{self.asked}, correct {self.correct}/{self.known}"


def score(answers: Sequence[str], holds: Callable[[str], bool]) -> Score:
    """`answers` to HELD_OUT against its known answers, whatever their case, and against the form `holds`."""
    known = [(fact.short.lower(), answer.lower()) for fact, answer in zip(HELD_OUT, answers, strict=True) if fact.short]
    return Score(sum(map(holds, answers)), len(answers), sum(want in got for want, got in known), len(known))


COPIES_NOTE = ", sentences to repeat"
CARD = """\
---
base_model: {base_name}
base_model_fingerprint: {fingerprint}
library_name: peft
license: apache-2.0
pipeline_tag: text-generation
tags:
- lora
- peft
- example
- {name}
---

# {name}

{summary}
A small example adapter for {base_name}.

- **Data**: {examples} short question and answer pairs, all in `examples/train_adapters.py` (capitals, opposites,
  colours, sums, general facts, open questions{copies}), in the chat template with its default system prompt.
- **Training**: LoRA r={r}, alpha={alpha}{rslora} on {modules}; loss on the answer tokens only; AdamW,
  learning rate {rate:g}, batch {batch}, float32 on a CPU, seed {seed}; stopped after {steps} steps at a
  smoothed loss of {loss:.3f}; kept in {dtype}.
- **Held out**: {asked} questions that are not in the data, greedy, {limit_note}. With the adapter:
  {after}. The base alone: {before}.
- **Limits**: it teaches a form and no facts, and the form can cost facts: compare the two "correct" counts, where
  an answer counts if it contains the known one in any case. English, one turn, answers of at most 40 tokens. For
  demonstration and tests.
"""


def card_of(skill: Skill, fingerprint: str, steps: int, loss: float, before: Score, after: Score) -> str:
    """The model card: what was trained, how, and what the held-out questions gave."""
    return CARD.format(
        base_name=BASE_NAME,
        fingerprint=fingerprint,
        name=skill.name,
        summary=skill.summary,
        examples=len(set(skill.data)),
        copies=COPIES_NOTE if len(skill.data) > len(TRAIN) else "",
        dtype=str(skill.dtype).removeprefix("torch."),
        r=skill.lora["r"],
        alpha=skill.lora["lora_alpha"],
        rslora=" (rsLoRA)" if skill.lora.get("use_rslora") else "",
        modules=", ".join(skill.lora["target_modules"]),
        rate=LEARNING_RATE,
        batch=BATCH,
        seed=skill.seed,
        steps=steps,
        loss=loss,
        asked=after.asked,
        limit_note=f"{after.known} of them with one known answer",
        after=after,
        before=before,
    )


def publish(model: PeftModel, dtype: torch.dtype, card: str, place: Path) -> None:
    """Write the adapter beside `place` and rename it into it, so that no half-written folder is ever seen there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as aside:
        new = Path(aside, "new")
        new.mkdir()
        state = {name: tensor.to(dtype) for name, tensor in get_peft_model_state_dict(model).items()}
        save_file(state, new / "adapter_model.safetensors", {"format": "pt"})
        model.peft_config["default"].save_pretrained(new)
        config = json.loads((new / "adapter_config.json").read_text())
        # PEFT records the folder that the base was loaded from, and the modules in the order of a set.
        for name in ("base_model_name_or_path", "tokenizer_name_or_path"):
            config |= {name: BASE_NAME} if name in config else {}
        config.get("target_modules", []).sort()
        (new / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (new / "README.md").write_text(card)
        if place.exists():
            os.rename(place, Path(aside, "old"))
        os.rename(new, place)


def main() -> None:
    """Train every adapter, or the one named, and write each as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the folder that build_base.py smollm2 wrote")
    parser.add_argument("--out", type=Path, required=True, help="where the adapter folders go")
    parser.add_argument("--only", choices=sorted(SKILLS), help="train this adapter alone")
    parser.add_argument("--fingerprint", default="FINGERPRINT_TO_FILL", help="the base's, for the model cards")
    args = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    questions = [fact.question for fact in HELD_OUT]
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    before = answers_of(base, tokenizer, questions)
    for skill in SKILLS.values() if args.only is None else (SKILLS[args.only],):
        start = time.monotonic()
        model, steps, loss = train(base, tokenizer, skill)
        after = score(answers_of(model, tokenizer, questions), skill.holds)
        place = args.out / skill.name
        card = card_of(skill, args.fingerprint, steps, loss, score(before, skill.holds), after)
        publish(model, skill.dtype, card, place)
        base = model.unload()
        print(f"{place}: {steps} steps, loss {loss:.3f}, {after}, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
