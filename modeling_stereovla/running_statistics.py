"""Running statistics of batch norm are no parameters, so freezing misses them: what does not train must not change."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def hold_running_statistics(module: nn.Module) -> None:
    """Puts the batch norms below `module` of which no parameter trains into evaluation mode, where they use their
    running statistics and leave them as they are.

    Called in every forward pass of a training, since freezing may come at any time and by anyone: by `model.freeze`, by
    PEFT, by hand. An adapter does not hold these statistics: its base would not have those that it was trained with.
    """
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and norm.training and not any(p.requires_grad for p in norm.parameters()):
            norm.eval()
