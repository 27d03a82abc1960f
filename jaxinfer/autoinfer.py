"""The public names: ``from jaxinfer import autoinfer``."""

from jaxinfer.differentiation.jacobian import hessian, jacobian
from jaxinfer.differentiation.laplacian.transform import laplacian
from jaxinfer.differentiation.transform import grad, hvp, jvp, value_and_grad, vjp
from jaxinfer.optimize import Frozen, Optimized, optimize
from jaxinfer.pipeline import VerificationWarning
from jaxinfer.quantization.aware import quantization_aware
from jaxinfer.quantization.bias import BiasCorrected
from jaxinfer.quantization.calibrate import CalibrationError
from jaxinfer.quantization.clipping import Clipped
from jaxinfer.quantization.compare import product_errors
from jaxinfer.quantization.gptq import GPTQ
from jaxinfer.quantization.loss_scaling import loss_scaling
from jaxinfer.quantization.mixed_precision import mixed_precision
from jaxinfer.quantization.observers import KL, MSE, AbsMax, Percentile
from jaxinfer.quantization.program import QuantizeError
from jaxinfer.quantization.quantize import QuantizationWarning, quantize
from jaxinfer.quantization.scheme import (
    BF16,
    F16,
    FP8,
    Format,
    Group,
    Int4,
    Int8,
    Int8Dynamic,
    Int8Weights,
    Override,
    Scheme,
    SchemeError,
)
from jaxinfer.quantization.smoothing import SmoothQuant
from jaxinfer.quantization.tensor import Quantized
from jaxinfer.rewriting import Rule, RuleError
from jaxinfer.sparsity.coupling.channel_groups import channel_groups
from jaxinfer.sparsity.errors import ShrinkError
from jaxinfer.sparsity.learning.batches import BatchesExhausted
from jaxinfer.sparsity.learning.checkpoint import CheckpointMismatch
from jaxinfer.sparsity.learning.distillation import Distillation
from jaxinfer.sparsity.learning.granularity import NM, Block
from jaxinfer.sparsity.learning.l0 import L0
from jaxinfer.sparsity.learning.learn import learn_masks
from jaxinfer.sparsity.learning.magnitude import Magnitude, StraightThrough, Taylor
from jaxinfer.sparsity.learning.result import Diverged, Learned
from jaxinfer.sparsity.learning.schedule import Cubic
from jaxinfer.sparsity.learning.target import Target, TargetError
from jaxinfer.sparsity.learning.transformation import prune_updates
from jaxinfer.sparsity.learning.wanda import Wanda
from jaxinfer.sparsity.low_rank import low_rank
from jaxinfer.sparsity.shrinking.shrink import ShrinkWarning, shrink
from jaxinfer.sparsity.shrinking.small_program import Shrunk
from jaxinfer.storage import Loaded, StorageError, load, save

__all__ = [
    "BF16",
    "F16",
    "FP8",
    "GPTQ",
    "KL",
    "L0",
    "MSE",
    "NM",
    "AbsMax",
    "BatchesExhausted",
    "BiasCorrected",
    "Block",
    "CalibrationError",
    "CheckpointMismatch",
    "Clipped",
    "Cubic",
    "Distillation",
    "Diverged",
    "Format",
    "Frozen",
    "Group",
    "Int4",
    "Int8",
    "Int8Dynamic",
    "Int8Weights",
    "Learned",
    "Loaded",
    "Magnitude",
    "Optimized",
    "Override",
    "Percentile",
    "QuantizationWarning",
    "QuantizeError",
    "Quantized",
    "Rule",
    "RuleError",
    "Scheme",
    "SchemeError",
    "ShrinkError",
    "ShrinkWarning",
    "Shrunk",
    "SmoothQuant",
    "StorageError",
    "StraightThrough",
    "Target",
    "TargetError",
    "Taylor",
    "VerificationWarning",
    "Wanda",
    "channel_groups",
    "grad",
    "hessian",
    "hvp",
    "jacobian",
    "jvp",
    "laplacian",
    "learn_masks",
    "load",
    "loss_scaling",
    "low_rank",
    "mixed_precision",
    "optimize",
    "product_errors",
    "prune_updates",
    "quantization_aware",
    "quantize",
    "save",
    "shrink",
    "value_and_grad",
    "vjp",
]
