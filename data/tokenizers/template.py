"""graftax's own chat format as a jinja2 template, for Hugging Face tokenizers without a template."""

from collections.abc import Collection

from ..dialogue import ROLES


def default_template(special: Collection[str]) -> str:
    """Return the template: bos, then `<|role|>`, content, eos for each turn.

    A role without a special token in `special` has the plain text `<|role|>` and a newline instead.
    """
    heads = ", ".join(f"'{r}': '<|{r}|>{'' if f'<|{r}|>' in special else chr(92) + 'n'}'" for r in ROLES)
    turns = "{% for m in messages %}{{ heads[m['role']] + m['content'] + eos_token }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}{{ heads['assistant'] }}{% endif %}"
    return f"{{% set heads = {{{heads}}} %}}{{{{ bos_token or eos_token }}}}{turns}{prompt}"
