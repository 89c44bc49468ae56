"""What `import hfprune` puts into transformers: plain `from_pretrained` then rebuilds pruned models.

The hook is the one that transformers offers to every compression method. This module is imported as soon as
transformers has loaded its registry, so it costs next to nothing; the work is done in `hfprune.checkpoint`.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import is_compressed_tensors_available
from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationConfigMixin

METHOD = "hfprune"


class PrunedConfig(QuantizationConfigMixin):
    """Says in config.json that a model needs hfprune to load. The facts stand beside it, in the block `hfprune`."""

    def __init__(self, storage_only: bool = False, legacy: bool = False, **_: Any):
        self.quant_method = METHOD
        self.storage_only = storage_only
        self.legacy = legacy

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD} | {name: True for name in ("storage_only", "legacy") if getattr(self, name)}


class PrunedLoader(HfQuantizer):
    """Rebuilds a pruned model between the construction of its skeleton and the loading of its tensors."""

    rebuild: Any = None
    imported: Any = None

    def update_attn_implementation(self, config: Any) -> Any:
        """The last sight of the config before the model is built: the skeleton is the dense model's."""
        from hfprune.checkpoint import plugin

        return config if self.quantization_config.storage_only else plugin.dense_config(config)

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        from hfprune.checkpoint import plugin

        if self.quantization_config.legacy:
            self.imported = plugin.check_legacy(model, checkpoint_files)
        else:
            plugin.check_stored(model, checkpoint_files)
        if not self.quantization_config.storage_only:
            self.rebuild = plugin.prepare(model, checkpoint_files)
        return model

    def get_weight_conversions(self) -> list[Any]:
        """How tensors that are stored sparse become dense while they are loaded."""
        from hfprune.checkpoint.expansion import expanders

        return expanders(self.quantization_config.legacy)

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Finishes the model, which is then an ordinary one: trainable, castable, and saved by transformers alone."""
        from hfprune.checkpoint import plugin

        self.remove_quantization_config(model)
        plugin.finish(model, self.rebuild, self.imported)
        if not self.quantization_config.storage_only:
            model.config.quantization_config = self.quantization_config
        self.rebuild = self.imported = None
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class LegacyConfig(CompressedTensorsConfig):
    """Where compressed-tensors is not installed: what it stored sparse and not quantized is hfprune's to load.

    All else goes on to transformers, which says that the package is needed. Versions of it that can be installed beside
    this transformers read no sparse format; where one is, it has the say.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        from hfprune.checkpoint.foreign import legacy_format

        if legacy_format({"quantization_config": config_dict}, "the checkpoint") is not None:
            return PrunedConfig(storage_only=True, legacy=True)
        return CompressedTensorsConfig.from_dict(config_dict, **kwargs)


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(PrunedConfig)
    register_quantizer(METHOD)(PrunedLoader)
    if not is_compressed_tensors_available():
        AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] = LegacyConfig
