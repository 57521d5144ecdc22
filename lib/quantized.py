"""Checkpoints whose weights are quantised: read as the weights that they stand for, or refused."""

import copy
import inspect

from transformers import PretrainedConfig

from .errors import RunError, reason_of

KEY = "quantization_config"


def _holders(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The configuration and its parts that say how weights are quantised."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    return [part for part in parts if getattr(part, KEY, None) is not None]


def is_quantized(config: PretrainedConfig) -> bool:
    return bool(_holders(config))


def dequantizing(config: PretrainedConfig, model: str) -> PretrainedConfig:
    """A copy of the configuration that has transformers turn quantised weights into ordinary ones as it loads them.

    Raises RunError where transformers cannot do that for this kind of quantisation, on any device, or lacks a package
    for it.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING  # a second to import

    config = copy.deepcopy(config)
    for part in _holders(config):
        given = getattr(part, KEY)
        settings = dict(given if isinstance(given, dict) else given.to_dict())
        method = settings.get("quant_method") or "by a method without a name"
        method = str(getattr(method, "value", method))
        known = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
        if known is None or "dequantize" not in inspect.signature(known).parameters:
            raise RunError(
                f"--model {model}: its weights are quantised ({method}), which transformers cannot load as ordinary "
                "weights; give the model that they were made from, or a copy that was dequantised and saved"
            )
        setattr(part, KEY, settings | {"dequantize": True})
        try:
            _quantizer(part)
        except Exception as error:  # a package that is missing, or whatever a method makes of settings it cannot read
            reason = reason_of(error)
            raise RunError(f"--model {model}: its weights are quantised ({method}): {reason[:300]}") from error
    return config


def _quantizer(config: PretrainedConfig):
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(dict(getattr(config, KEY)), pre_quantized=True)
    quantizer.validate_environment(device_map={"": "cpu"}, weights_only=True)
    return quantizer


def prepare(model, config: PretrainedConfig):
    """The quantiser that dequantises what a model on the meta device reads, or None; `config` is of `dequantizing`."""
    if not is_quantized(config):
        return None
    quantizer = _quantizer(_holders(config)[0])
    quantizer.preprocess_model(model=model, dtype=model.dtype, device_map=None, checkpoint_files=[], use_kernels=False)
    forget(model)
    return quantizer


def forget(model) -> None:
    """Make an ordinary model of one that was dequantised, so that it is saved as one."""
    for part in _holders(model.config):
        delattr(part, KEY)
    # What was done to the weights at loading, which saving would undo.
    for name in ("hf_quantizer", "quantization_method", "_weight_conversions"):
        model.__dict__.pop(name, None)
    model.is_quantized = False
