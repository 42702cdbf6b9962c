"""The chat format for tokenizers that come without a template, as a template that all readers render alike."""

from collections.abc import Collection

from ..dialogue import ROLES


def default_template(special: Collection[str]) -> str:
    """graftax's chat format in jinja2: bos, then each turn as `<|role|>` content eos.

    A role without a special token of its own has `<|role|>` and a newline as plain text.
    """
    heads = ", ".join(f"'{r}': '<|{r}|>{'' if f'<|{r}|>' in special else chr(92) + 'n'}'" for r in ROLES)
    turns = "{% for m in messages %}{{ heads[m['role']] + m['content'] + eos_token }}{% endfor %}"
    asked = "{% if add_generation_prompt %}{{ heads['assistant'] }}{% endif %}"
    return f"{{% set heads = {{{heads}}} %}}{{{{ bos_token or eos_token }}}}{turns}{asked}"
