"""Every kind of stage. Adding one: a module here, a word in `AnyStage`, a test."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from onnxsqueeze.stages.branch_exits import BranchExits
from onnxsqueeze.stages.cluster_weights import ClusterWeights
from onnxsqueeze.stages.distill import Distill
from onnxsqueeze.stages.distill_small import DistillSmall
from onnxsqueeze.stages.drop_tokens import DropTokens
from onnxsqueeze.stages.early_exit import EarlyExit
from onnxsqueeze.stages.export import Export
from onnxsqueeze.stages.factorize import Factorize
from onnxsqueeze.stages.finetune import Finetune
from onnxsqueeze.stages.float16 import Float16
from onnxsqueeze.stages.optimize_graph import OptimizeGraph
from onnxsqueeze.stages.pack import Pack
from onnxsqueeze.stages.prune_positions import PrunePositions
from onnxsqueeze.stages.prune_structure import PruneStructure
from onnxsqueeze.stages.prune_vocabulary import PruneVocabulary
from onnxsqueeze.stages.prune_weights import PruneWeights
from onnxsqueeze.stages.quantize_auto import QuantizeAuto
from onnxsqueeze.stages.quantize_dynamic import QuantizeDynamic
from onnxsqueeze.stages.quantize_inc import QuantizeInc
from onnxsqueeze.stages.quantize_static import QuantizeStatic
from onnxsqueeze.stages.quantize_weights import QuantizeWeights
from onnxsqueeze.stages.share_layers import ShareLayers
from onnxsqueeze.stages.train_low_bit import TrainLowBit
from onnxsqueeze.stages.train_quantized import TrainQuantized

AnyStage = Annotated[
    Finetune
    | Distill
    | DistillSmall
    | PruneWeights
    | PruneStructure
    | Factorize
    | ShareLayers
    | TrainQuantized
    | TrainLowBit
    | ClusterWeights
    | EarlyExit
    | DropTokens
    | PruneVocabulary
    | PrunePositions
    | Export
    | QuantizeDynamic
    | QuantizeStatic
    | QuantizeWeights
    | QuantizeInc
    | QuantizeAuto
    | OptimizeGraph
    | BranchExits
    | Float16
    | Pack,
    Field(discriminator="kind"),
]

__all__ = [
    "AnyStage",
    "BranchExits",
    "ClusterWeights",
    "Distill",
    "DistillSmall",
    "DropTokens",
    "EarlyExit",
    "Export",
    "Factorize",
    "Finetune",
    "Float16",
    "OptimizeGraph",
    "Pack",
    "PrunePositions",
    "PruneStructure",
    "PruneVocabulary",
    "PruneWeights",
    "QuantizeAuto",
    "QuantizeDynamic",
    "QuantizeInc",
    "QuantizeStatic",
    "QuantizeWeights",
    "ShareLayers",
    "TrainLowBit",
    "TrainQuantized",
]
