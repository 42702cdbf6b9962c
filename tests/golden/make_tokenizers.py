"""Make tests/golden/tokenizers: tiny tokenizers of four families, and what transformers returns for them.

    cd /tmp && python <graftax>/tests/golden/make_tokenizers.py

Run it from another folder than the repository, whose `peft` would hide the package. Nothing is downloaded. Run it again
only to change what is tested: the files were written by transformers 5.23 and tokenizers 0.23.
"""

import io
import json
import shutil
import tempfile
from pathlib import Path

import sentencepiece
import tokenizers
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

OUT = Path(__file__).parent / "tokenizers"
TEXT = """\
The graft takes when the cambium of the scion meets the cambium of the stock. A gardener cuts both at one angle, binds
them, and waits; in three weeks the sap runs from the old root into the new wood, and what grows above is another tree.
The root stays what it was. It has learnt the soil, the stones and the winters; the branch brings only its fruit. That
is why an orchard of one stock can carry 20 kinds of apple, 12 of pear, and in 1987 even a quince that nobody wanted.
You are a helpful assistant. What is the answer to the question of the user? The answer is 42, said the system, because
the user asked for it. The assistant answers in one line, or in two lines, or not at all.
def graft(stock, scion, angle=30):
    for name, branch in scion.items():
        if name not in stock:
            raise KeyError(f"no place for {name}")
        stock[name] = stock[name] + angle * branch
    return stock
Der Gärtner schneidet beide im selben Winkel. Le jardinier coupe les deux au même angle. El injerto crece despacio.
Привет, мир. 你好，世界。こんにちは世界。 The tree said "hello" and the tree said 'good-bye'; the wind said nothing.
"""
LINES = [line for line in TEXT.splitlines(keepends=True) for _ in range(4)]

TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "\t\ta\tb",
    "hello",
    " hello",
    "  hello  ",
    "The graft takes when the cambium meets.",
    "a\r\nb\r",
    "x" + " " * 40 + "y",
    "def f(x):\n    return x + 1\n\n\nprint(f(2))\n",
    "12345 6.789e10",
    "\U0001f642\U0001f469\u200d\U0001f469 \u00e9 e\u0301 \ufb01 \u4f60\u597d",
    "\0a\x01\x7f\u00a0\u2028\ufeff",
    "\u2581a \u2581 b",
    "[INST] <<SYS>> <0x0A>",
    "It's we'll I'M don't",
]
TRICKY = [  # special tokens in a text: `encode` takes them as text, HF's tokenizer(text) does not
    "a <s> b</s>c",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|begin_of_text|>x <|eot_id|> y",
    "<bos>x<end_of_turn>\n",
    "<think>\n</think>",
]
CHATS = [
    [("user", "What is the answer?"), ("assistant", "The answer is 42.")],
    [
        ("user", "hello \U0001f642"),
        ("assistant", "hello,\n\nthe tree said \U0001f642"),
        ("user", "  你好 \n"),
        ("assistant", "  世界  \n\n"),
        ("user", "\n"),
        ("assistant", "x"),
    ],
    [
        ("user", "def f(x):\n\treturn x\n"),
        ("assistant", "\n```python\nfor i in range(3):\n    print(i)\n```"),
        ("user", " "),
        ("assistant", "e\u0301 \0 \u2028 {{ messages }} {% raw %}"),
    ],
    [("system", "You are brief.\n"), ("user", "why"), ("assistant", "because")],
    [("user", "the user asked"), ("assistant", "a"), ("user", "again"), ("assistant", "")],
]

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" and not message.tool_calls %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {{- message.content + '<|im_end|>' }}
        {{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set head = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}"
    "{% if loop.index0 == 0 %}{% set head = bos_token + head %}{% endif %}{{ head }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' }}{{ message['content'] | trim + '<end_of_turn>' }}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# The same texts with the assistant's words marked: HF then gives a mask. (what is replaced, by what)
MARKED = {
    "llama2": (
        "{{ ' ' + content | trim + ' ' + eos_token }}",
        "{% generation %}{{ ' ' + content | trim + ' ' + eos_token }}{% endgeneration %}",
    ),
    "qwen": (
        "{{- message.content + '<|im_end|>' }}",
        "{%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}",
    ),
    "llama3": (
        "{{ message['content'] | trim + '<|eot_id|>' }}",
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}"
        "{% endgeneration %}{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}",
    ),
    "gemma": (
        "{{ message['content'] | trim + '<end_of_turn>' }}",
        "{% if role == 'model' %}{% generation %}{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] | trim + '<end_of_turn>' }}{% endif %}",
    ),
}
# More templates, over the qwen tokenizer.
TEMPLATES = {
    # {% generation %} without the token that ends the turn, as some publish it.
    "generation": """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content }}{% endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
    # Qwen3's essence: thoughts of earlier turns go, the last turn gets an empty one.
    "qwen3": """\
{%- set ns = namespace(last=messages|length - 1, multi=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user" %}
        {%- set ns.multi = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role != "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- else %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
    # Phi-3's: a token at the very end that a turn in the middle has not.
    "phi3": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
}


def write(path, value):
    """Text as it is, or JSON with one line a value of the outer object and of the lists in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, dict):
        value = "{\n" + ",\n".join(f"{json.dumps(k)}: {lines(v)}" for k, v in value.items()) + "\n}\n"
    elif isinstance(value, list):
        value = lines(value) + "\n"
    path.write_text(value, "utf-8")


def lines(value):
    if not isinstance(value, list) or not value or not isinstance(value[0], (list, dict)):
        return json.dumps(value)
    return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"


def turns(chat):
    return [{"role": role, "content": content} for role, content in chat]


def expected(tokenizer, marked=None, chats=CHATS):
    """What `tokenizer` gives: [text, ids, ids with special tokens], then chats with ids, prompts and masks."""
    texts = []
    for text in TEXTS + TRICKY:
        plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        texts.append([text, plain, tokenizer(text)["input_ids"]])
    found = []
    for chat in chats:
        messages = turns(chat)
        one = {"messages": messages}
        try:
            one["ids"] = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
            one["prompt"] = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        except Exception as e:
            one["error"] = str(e)
        else:
            kw = {} if marked is None else {"chat_template": marked}
            out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **kw)
            assert out["input_ids"] == one["ids"]
            one["mask"] = out["assistant_masks"] if "generation %}" in (marked or tokenizer.chat_template) else None
        found.append(one)
    return {"texts": texts, "chats": found, "vocab_size": len(tokenizer)}


def marked(name, template):
    old, new = MARKED[name]
    assert template.count(old) == 1
    return template.replace(old, new)


def llama2(out):
    """A SentencePiece model as Llama 2's, alone; and the tokenizer.json that transformers makes of it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        model_type="bpe",
        vocab_size=450,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.99,
        num_threads=1,
        minloglevel=2,
    )
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "__type": "AddedToken"}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": token | {"content": "<s>"},
        "eos_token": token | {"content": "</s>"},
        "unk_token": token | {"content": "<unk>"},
        "pad_token": None,
        "legacy": False,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "chat_template": LLAMA2,
    }
    (out / "llama2").mkdir(parents=True)
    (out / "llama2" / "tokenizer.model").write_bytes(model.getvalue())
    write(out / "llama2" / "tokenizer_config.json", config)
    for legacy in (False, True):
        name = "llama2_legacy" if legacy else "llama2"
        folder = Path(tempfile.mkdtemp())
        shutil.copy(out / "llama2" / "tokenizer.model", folder)
        write(folder / "tokenizer_config.json", config | {"legacy": legacy})
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        found = expected(tokenizer, marked("llama2", LLAMA2))
        write(out / name / "expected.json", found)
        if not legacy:
            tokenizer.save_pretrained(folder / "json")
            again = transformers.AutoTokenizer.from_pretrained(folder / "json")
            assert expected(again, marked("llama2", LLAMA2)) == found
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                (out / "llama2_json").mkdir(exist_ok=True)
                shutil.copy(folder / "json" / file, out / "llama2_json" / file)


WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
PATTERN = WORD + r"|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # Qwen's and Llama 3's


def byte_level(pattern, size, special, normalizer=None, **kw):
    """A byte-level BPE over pieces cut by `pattern`; `special` tokens come after it, so their ids are the last."""
    model = tokenizers.Tokenizer(models.BPE(**kw))
    model.normalizer = normalizer
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    model.train_from_iterator(LINES, trainer)
    model.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return model


def qwen(out):
    """Byte-level BPE without bos, ChatML; vocab.json and merges.txt beside tokenizer.json, as Qwen publishes it."""
    pattern = PATTERN.replace("DIGITS", r"\p{N}")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    model = byte_level(pattern, 400, special, normalizers.NFC())
    model.post_processor = processors.ByteLevel(trim_offsets=False)
    model.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    folder = out / "qwen"
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"), pretty=False)
    model.model.save(str(folder))  # vocab.json, merges.txt
    added = {
        str(i): {k: getattr(t, k) for k in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")}
        for i, t in sorted(model.get_added_tokens_decoder().items())
    }
    config = {
        "add_bos_token": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": special[1:],
        "bos_token": None,
        "chat_template": QWEN,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write(folder / "tokenizer_config.json", config)
    write(folder / "generation_config.json", {"eos_token_id": [402, 400], "pad_token_id": 400, "do_sample": True})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = expected(tokenizer, marked("qwen", QWEN))
    slow = Path(tempfile.mkdtemp())
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(folder / file, slow)
    assert expected(transformers.AutoTokenizer.from_pretrained(slow), marked("qwen", QWEN)) == found
    write(folder / "expected.json", found)
    thought = [[("user", "a"), ("assistant", "<think>\nwhy\n</think>\n\nb"), ("user", "c"), ("assistant", "d")]]
    thought += [[*thought[0][:2], ("user", "c"), ("assistant", "<think>hm</think>e")]]
    for name, template in TEMPLATES.items():
        tokenizer.chat_template = template
        write(out / "templates" / f"{name}.jinja", template)
        chats = expected(tokenizer, None, CHATS + thought)["chats"]
        write(out / "templates" / f"{name}.json", chats)


def llama3(out):
    """Byte-level BPE with a post-processor that puts bos first; turns end with another token than texts."""
    pattern = PATTERN.replace("DIGITS", r"\p{N}{1,3}")
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
    special = [f"<|{name}|>" for name in names]
    model = byte_level(pattern, 380, special, ignore_merges=True)
    model.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{special[0]} $A",
                pair=f"{special[0]} $A {special[0]}:1 $B:1",
                special_tokens=[(special[0], 380)],
            ),
        ]
    )
    folder = out / "llama3"
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "bos_token": special[0],
        "eos_token": special[1],
        "chat_template": [{"name": "default", "template": LLAMA3}, {"name": "tool_use", "template": "{{ 1 }}"}],
        "clean_up_tokenization_spaces": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write(folder / "tokenizer_config.json", config)
    write(folder / "generation_config.json", {"bos_token_id": 380, "eos_token_id": [381, 384]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    write(folder / "expected.json", expected(tokenizer, marked("llama3", LLAMA3)))


def gemma(out):
    """BPE over characters with byte fallback, spaces as U+2581 and no dummy prefix; bos by the post-processor."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("(?<=[^\u2581])(?=\u2581)"), behavior="isolated")
    text = "".join(LINES).replace(" ", "\u2581")
    letters = sorted(set(text), key=lambda c: (-text.count(c), c))[
        :60
    ]  # the trainer's own choice is a matter of chance
    trainer = trainers.BpeTrainer(
        vocab_size=240, initial_alphabet=letters, limit_alphabet=len(letters), show_progress=False
    )
    trained.train_from_iterator(LINES, trainer)
    state = json.loads(trained.to_str())["model"]
    vocab = {piece: i for i, piece in enumerate([*pieces, *sorted(state["vocab"], key=state["vocab"].get)])}
    merges = [tuple(pair) for pair in state["merges"]]
    model = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True, dropout=None)
    )
    model.normalizer = normalizers.Replace(" ", "\u2581")
    model.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    model.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    model.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
    )
    model.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in pieces[:7]])
    folder = out / "gemma"
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"), pretty=False)
    config = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk", "mask")}
    config |= {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "spaces_between_special_tokens": False}
    write(folder / "tokenizer_config.json", config)
    write(folder / "chat_template.json", {"chat_template": GEMMA})
    write(folder / "generation_config.json", {"eos_token_id": [1, 6]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = GEMMA  # transformers reads chat_template.json for processors only
    write(folder / "expected.json", expected(tokenizer, marked("gemma", GEMMA)))


if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)
    for make in (llama2, qwen, llama3, gemma):
        make(OUT)
    print(sum(file.stat().st_size for file in OUT.rglob("*") if file.is_file()), "bytes")
