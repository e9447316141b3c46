"""How does the low-rank direction become a weight step? One rule a file."""

from subspan.optim.lift.gradient_scaling import GradientScaling
from subspan.optim.lift.project_back import ProjectBack
from subspan.optim.lift.scaled_residual import ScaledResidual
from subspan.optim.lift.sign_residual import SignResidual

__all__ = ["GradientScaling", "ProjectBack", "ScaledResidual", "SignResidual"]
