"""Names under which transformers saves the weights of parts, and which its modules no longer have."""

from torch import nn

# `save_pretrained` writes the left ones, for older versions; `from_pretrained` reads them, `load_state_dict` does not
SAVED_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "language_model.model.": "language_model.",  # of PaliGemma
}


def present_name(name: str) -> str:
    """The name that a module of today has for a weight that may have been saved under an older one."""
    for saved, present in SAVED_NAMES.items():
        name = name.replace(saved, present)
    return name


def accept_saved_names(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Pre-hook of `load_state_dict` of a module: takes weights under their saved names too, as `Trainer` gives them
    when it resumes. It would leave these out with no more than a warning.
    """
    own = {name for name, _ in module.named_parameters()}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        renamed = present_name(name)
        if name not in own and renamed in own:
            state_dict[prefix + renamed] = state_dict.pop(key)
