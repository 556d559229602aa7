"""What names a policy on the command line: `expert`, `still`, `untrained:PATH`, PATH (the folder or Hub id of a
checkpoint), or `ws://HOST:PORT`, a policy that `stereovla serve` or another server on openpi's wire answers for.
"""

import json

from stereovla.evaluation.policies import ExpertPolicy, Policy, StillPolicy
from stereovla.sources import (
    InputError,
    adapted_model,
    check_checkpoint,
    check_interface,
    fingerprint,
    load_checkpoint,
    source_of,
    trusted_base,
)

UNTRAINED = "untrained:"
SOCKET = ("ws://", "wss://")


def policy_identity(spec: str, run_code: bool = False, keys: str = "") -> dict[str, str]:
    """What must be equal for two runs of a spec to be runs of one policy; InputError for a spec that names none, or one
    whose code is not to be run (see `sources.trusted_base`).
    """
    if spec in ("expert", "still"):
        return {"kind": spec}
    if spec.startswith(SOCKET):
        from stereovla.evaluation.socket_policy import SocketPolicy  # needs the extra `serve`

        with SocketPolicy(spec, keys) as policy:
            return {"kind": "served", **policy.identity, **({"keys": json.dumps(policy.named)} if keys else {})}
    if spec.startswith(UNTRAINED):
        check_checkpoint(spec.removeprefix(UNTRAINED), weights=False)
        trusted_base(spec.removeprefix(UNTRAINED), run_code)
        return {"kind": "untrained"}
    check_checkpoint(spec)
    trusted_base(spec, run_code)
    return {"kind": "trained", "weights": fingerprint(spec)}


def make_policy(
    spec: str,
    chunk_size: int = 8,
    num_steps: int | None = None,
    device: str = "cpu",
    run_code: bool = False,
    keys: str = "",
    shown: str = "given",
) -> Policy:
    """The policy that `spec` names; `chunk_size` is for those that have none of their own, `num_steps`, `device` and
    `run_code` for models in this process, `keys` (see `SocketPolicy`) for a server that does not say its own, `shown`
    for models whose geometry is shown others (see `check_shown`).
    """
    if spec == "expert":
        return ExpertPolicy(chunk_size)
    if spec == "still":
        return StillPolicy(chunk_size)
    if spec.startswith(SOCKET):
        from stereovla.evaluation.socket_policy import SocketPolicy

        return SocketPolicy(spec, keys)
    from stereovla.evaluation.model_policy import ModelPolicy, load_untrained  # torch takes seconds to import

    if spec.startswith(UNTRAINED):
        return ModelPolicy(
            *load_untrained(spec.removeprefix(UNTRAINED), device=device, run_code=run_code),
            "untrained",
            num_steps,
            shown,
        )
    return ModelPolicy(*load_checkpoint(spec, device, run_code), "trained", num_steps, shown)


def check_shown(spec: str, shown: str) -> None:
    """InputError unless the geometry of the policy that `spec` names can be shown what `shown` says."""
    if shown == "given":
        return
    if spec in ("expert", "still") or spec.startswith(SOCKET):
        raise InputError(f"--shown {shown} is for models in this process; {spec} is none")
    from transformers import AutoConfig

    from stereovla.evaluation.shown_geometry import controls

    source = spec.removeprefix(UNTRAINED)
    source = adapted_model(source) or source
    with source_of(source, "checkpoint"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    check_interface(source, config=config)
    possible = controls(config)
    if shown not in possible:
        raise InputError(f"--shown is {shown}, but {spec} can be shown {', '.join(('given', *possible))}")
