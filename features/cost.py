"""Cost models of `latents` and `text_features`, and the size of one latent and of one caption's features."""

from features.config import AUTOENCODER_FACTOR, LatentsConfig, TextFeaturesConfig
from features.templates import apply_template
from pipelines.core.config import ModelRef
from pipelines.core.quantity import ZERO, Quantity, smallest
from pipelines.runner.cost import CostInputs, StageEstimate, Workload, limit_on
from pipelines.shards.cost import caption_tokens, sample_bytes

_HIDDEN_STATE_BYTES = 2
"""Text features are bfloat16, on disk and in memory (`features.text_encoder.STORED_TYPE`)."""
_TOKEN_ID_BYTES = 4
_SAMPLE_KEY_BYTES = 16
_NUM_MOMENTS = 2
"""A latent is a posterior: mean and standard deviation."""
_SD3_AUTOENCODER_PARAMETERS = 83.8e6
_VALUE_BYTES = {"float16": 2, "float32": 4}


def latents_cost(inputs: CostInputs, workload: Workload) -> StageEstimate:
    """Return the estimate of `latents`."""
    on_gpu = inputs.setting("latents", LatentsConfig).device != "cpu"
    rate = inputs.derived("latents_per_second", _latents_per_second(inputs, on_gpu))
    return _encoding(inputs, workload, rate, latent_bytes(inputs), "autoencoder", on_gpu)


def text_features_cost(inputs: CostInputs, workload: Workload) -> StageEstimate:
    """Return the estimate of `text_features`; all zero where the profile stores none."""
    config = inputs.optional_setting("text_features", TextFeaturesConfig)
    if config is None:
        none = inputs.implied(0, "text_features")
        return StageEstimate(
            stage=workload.stage, rows_in=none, rows_out=none, bytes_in=none, bytes_out=none, seconds=none, nodes=none,
            limit="not stored",
        )  # fmt: skip
    on_gpu = config.device != "cpu"
    rate = inputs.derived("text_features_per_second", texts_per_second(inputs, on_gpu))
    return _encoding(inputs, workload, rate, text_bytes(inputs), "text encoder", on_gpu)


def _encoding(
    inputs: CostInputs, workload: Workload, rate: Quantity, bytes_out: Quantity, model: str, on_gpu: bool
) -> StageEstimate:
    """Return the estimate of encoding every sample at `rate` a second and process into `bytes_out` each."""
    gpus = workload.num_runs if on_gpu else ZERO
    return StageEstimate(
        stage=workload.stage,
        rows_in=workload.rows,
        rows_out=workload.rows,
        bytes_in=workload.rows * sample_bytes(inputs),
        bytes_out=workload.rows * bytes_out,
        seconds=workload.rows / (rate * workload.num_runs),
        nodes=inputs.nodes_for(gpus) if on_gpu else workload.num_runs,
        gpus=gpus,
        limit=limit_on(model, on_gpu),
    )


def latent_bytes(inputs: CostInputs) -> Quantity:
    """Return the bytes of one image's posterior."""
    side = inputs.from_profile("latents.image_px") / AUTOENCODER_FACTOR
    value_bytes = _VALUE_BYTES[inputs.setting("latents", LatentsConfig).storage_dtype]
    values = inputs.from_profile("model.latent_channels") * side * side
    return values * inputs.implied(value_bytes * _NUM_MOMENTS, "latents.storage_dtype") + _SAMPLE_KEY_BYTES


def _latents_per_second(inputs: CostInputs, on_gpu: bool) -> Quantity:
    side = inputs.from_profile("latents.image_px")
    flops = side * side * autoencoder_flops(inputs, "vae_encode_flops_per_px")
    return inputs.flops_per_second(on_gpu, "vae_mfu") / flops


def autoencoder_flops(inputs: CostInputs, name: str) -> Quantity:
    """Return the operations for a pixel: SD3's, scaled by the parameters of a model in a local folder."""
    flops = inputs.assumed(name)
    model_id = inputs.setting("autoencoder", ModelRef).id
    if model_id not in inputs.facts.local_parameters:
        return flops
    scale = inputs.facts.local_parameters[model_id] / _SD3_AUTOENCODER_PARAMETERS
    return flops * inputs.implied(scale, f"model {model_id}")


def text_tokens(inputs: CostInputs) -> Quantity:
    """Return the tokens of a caption in its template."""
    if inputs.optional_setting("text_features", TextFeaturesConfig) is not None:
        limit = inputs.from_profile("text_features.max_tokens")
    else:
        default = TextFeaturesConfig.model_fields["max_tokens"].default
        limit = inputs.implied(default, "text_encoder (longest text)")
    template = apply_template(inputs.setting("template_version", str), "")
    template_tokens = inputs.implied(len(template), "template_version") / inputs.assumed("chars_per_token")
    return smallest(inputs.derived("text_tokens", caption_tokens(inputs) + template_tokens), limit)


def text_bytes(inputs: CostInputs) -> Quantity:
    """Return the bytes of a caption's stored layers."""
    config = inputs.optional_setting("text_features", TextFeaturesConfig)
    if config is not None and config.layers is not None:
        layers = inputs.implied(len(config.layers), "text_features.layers")
    else:
        layers = inputs.from_profile("model.num_text_layers")
    token_bytes = layers * inputs.from_profile("model.text_width") * _HIDDEN_STATE_BYTES + _TOKEN_ID_BYTES
    return text_tokens(inputs) * token_bytes + _SAMPLE_KEY_BYTES


def texts_per_second(inputs: CostInputs, on_gpu: bool) -> Quantity:
    """Return the captions that one process encodes in a second."""
    flops = text_tokens(inputs) * inputs.encoder_flops_per_token()
    return inputs.flops_per_second(on_gpu, "encode_mfu") / flops
