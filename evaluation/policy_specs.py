"""What names a policy on the command line: `expert`, `still`, `untrained:PATH`, PATH (the folder or Hub id of a
checkpoint), or `ws://HOST:PORT`, a policy that `stereovla serve` answers for.
"""

from stereovla.evaluation.policies import ExpertPolicy, Policy, StillPolicy
from stereovla.sources import check_checkpoint, fingerprint, load_checkpoint

UNTRAINED = "untrained:"
SOCKET = ("ws://", "wss://")


def policy_identity(spec: str) -> dict[str, str]:
    """What must be equal for two runs of a spec to be runs of one policy; InputError for a spec that names none."""
    if spec in ("expert", "still"):
        return {"kind": spec}
    if spec.startswith(SOCKET):
        from stereovla.evaluation.socket_policy import SocketPolicy  # needs the extra `serve`

        with SocketPolicy(spec) as policy:
            return {"kind": "served", "model": policy.client.hello["model"]}
    if spec.startswith(UNTRAINED):
        check_checkpoint(spec.removeprefix(UNTRAINED), weights=False)
        return {"kind": "untrained"}
    check_checkpoint(spec)
    return {"kind": "trained", "weights": fingerprint(spec)}


def make_policy(spec: str, chunk_size: int = 8, num_steps: int | None = None, device: str = "cpu") -> Policy:
    """The policy that `spec` names; `chunk_size` is for those that have none of their own, `num_steps` and `device` for
    models in this process.
    """
    if spec == "expert":
        return ExpertPolicy(chunk_size)
    if spec == "still":
        return StillPolicy(chunk_size)
    if spec.startswith(SOCKET):
        from stereovla.evaluation.socket_policy import SocketPolicy

        return SocketPolicy(spec)
    from stereovla.evaluation.model_policy import ModelPolicy, load_untrained  # torch takes seconds to import

    if spec.startswith(UNTRAINED):
        return ModelPolicy(*load_untrained(spec.removeprefix(UNTRAINED), device=device), "untrained", num_steps)
    return ModelPolicy(*load_checkpoint(spec, device), "trained", num_steps)
