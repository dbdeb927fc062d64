"""Combinations of values that cannot work, whatever the data and the machine: refused before anything is loaded."""

from collections.abc import Mapping

from fastvit_engine.config.cuda_graph import check_cuda_graph
from fastvit_engine.config.deepspeed_section import check_deepspeed
from fastvit_engine.config.fp8 import check_fp8
from fastvit_engine.config.model_shape import Shape, resolve_shape
from fastvit_engine.config.packing import check_packing
from fastvit_engine.config.pretraining import check_pretraining
from fastvit_engine.config.sections import Config, DinoConfig, MocoConfig, ZeroConfig
from fastvit_engine.config.timm_model import check_timm_run, is_timm
from fastvit_engine.config.tokens import check_tokens
from fastvit_engine.duration import parse_duration
from fastvit_engine.errors import UserError


def check_config(config: Config) -> None:
    """Raises UserError, naming the keys, if two values of a valid configuration contradict each other."""
    check_timm_run(config)
    if not is_timm(config.model) and (config.init.from_ is None or "name" in config.model.model_fields_set):
        shape = resolve_shape(config.model)  # else the weights say the name
        _check_resnet(config, shape)
        _check_activation_checkpointing(config, shape)
        check_fp8(config, shape)
        check_cuda_graph(config, shape)
    else:
        check_fp8(config, None)
        check_cuda_graph(config, None)
    _check_compilation(config)
    _check_decoder(config)
    if config.pretraining is None:
        _check_classes(config)
    else:
        check_pretraining(config)
    check_packing(config)
    if config.train.micro_batch_trial:
        _check_trial(config)
    if config.optimizer.frozen != "none" and _quantizes_what_is_frozen(config):
        raise UserError(
            f"optimizer.frozen = {config.optimizer.frozen} keeps every bit of the weights, and "
            "deepspeed.zero_optimization.zero_quantized_nontrainable_weights rounds them: leave one of them out"
        )
    if config.optimizer.frozen == "backbone" and config.optimizer.kind == "muon":
        raise UserError(
            "optimizer.kind = muon is for the matrices of the blocks, which optimizer.frozen = backbone keeps as they "
            "are: set optimizer.kind=adamw"
        )
    if config.optimizer.kernels == "apex":
        _check_apex(config)
    _check_durations(config)
    check_tokens(config)
    if config.data.order == "stream" and not isinstance(config.data.train, str | None):
        raise UserError("data.order is stream, which reads one source: mix sources with data.order: indexed")
    if config.data.subset is not None and config.data.order == "stream":
        raise UserError(
            f"data.subset is {config.data.subset}, and data.order = stream reads shards without knowing how many "
            "samples they hold: set data.order=indexed, which takes shards that are not gzipped"
        )
    config.data.epoch_samples  # noqa: B018, raises if data.subset is more than data.train_samples
    few_shot = config.evaluate.fewshot
    if (few_shot.train is None) != (few_shot.eval is None):
        given, missing = ("train", "eval") if few_shot.eval is None else ("eval", "train")
        raise UserError(
            f"evaluate.fewshot.{given} is set and evaluate.fewshot.{missing} is not: few-shot accuracy needs images to "
            "fit classifiers to, and others to measure them on"
        )
    best = config.checkpoint.keep_best
    if best is not None and config.data.eval is None:
        raise UserError(f"checkpoint.keep_best = {best} needs an evaluation: set data.eval")
    if best is not None and best.startswith("eval_ema") and config.ema.decay is None:
        raise UserError(f"checkpoint.keep_best = {best} needs an average of the weights: set ema.decay")
    check_zero(config.zero)
    check_deepspeed(config)


def _check_decoder(config: Config) -> None:
    """Raises UserError if images would reach the GPU in a form that it cannot decode."""
    if config.data.decoder == "cpu":
        return
    what = "data.decoder = nvjpeg decodes one crop per image of indexed shards"
    if config.data.order == "stream":
        raise UserError(f"{what}, and data.order is stream: set data.order=indexed, or data.decoder=cpu")
    if config.packing.on:
        raise UserError(
            f"{what} to a square, and packing.max_patches keeps the images' proportions: set data.decoder=cpu"
        )
    if isinstance(config.pretraining, MocoConfig | DinoConfig):
        raise UserError(
            f"{what}, and train.objective = {config.train.objective} compares several: set data.decoder=cpu"
        )


def _check_trial(config: Config) -> None:
    """Raises UserError if a trial would say nothing of the run."""
    train, off = config.train, "set train.micro_batch_trial=false"
    if config.packing.on:
        raise UserError(
            "train.micro_batch_trial = true tries images of one size, and with packing.max_patches the memory differs "
            f"from step to step: {off}, and give packing.token_budget"
        )
    if train.cuda_graph:
        raise UserError(
            "train.micro_batch_trial = true takes too few steps for train.cuda_graph to capture one, so it would not "
            f"see the memory of the graphs: {off}, or set train.cuda_graph=false"
        )
    if train.compile:
        raise UserError(
            "train.micro_batch_trial = true tries several sizes, for each of which train.compile would compile the "
            f"model anew, until PyTorch's limit of compilations is reached: {off}, or set train.compile=false"
        )
    if config.data.decoder == "nvjpeg":
        raise UserError(
            "train.micro_batch_trial = true decodes no images and would not see the memory that data.decoder = nvjpeg "
            f"takes: {off}, or set data.decoder=cpu"
        )
    if train.objective in ("dino", "moco"):
        why = {
            "dino": "learns from a teacher, which a trial has not",
            "moco": "takes all images of a process at once, so there is nothing to choose",
        }[train.objective]
        raise UserError(f"train.micro_batch_trial = true, and train.objective = {train.objective} {why}: {off}")


def _check_compilation(config: Config) -> None:
    """Raises UserError if the model would be compiled around what compiled code cannot call."""
    if not config.train.compile:
        return
    if config.zero.stage == 3 or config.zero.offload == "all":
        raise UserError(
            "train.compile = true needs whole weights, and ZeRO-3 gathers them in the middle of the model: set "
            "zero.stage to 0, 1 or 2, or train.compile=false"
        )
    if config.train.activation_checkpointing not in ("auto", 0):
        raise UserError(
            f"train.compile = true chooses by itself what is computed again, and train.activation_checkpointing is "
            f"{config.train.activation_checkpointing}: set one of them only"
        )
    if config.packing.on:
        raise UserError(
            "train.compile = true compiles for tensors of few sizes, and packing.max_patches makes every micro-batch "
            "another size: set train.compile=false"
        )
    if config.pretraining is not None:
        raise UserError(
            f"train.compile = true compiles the forward pass of a classifier, and train.objective is "
            f"{config.train.objective}: set train.compile=false"
        )


def _check_activation_checkpointing(config: Config, shape: Shape) -> None:
    """Raises UserError if more blocks would be checkpointed than there are, or to no purpose."""
    train, key = config.train, "train.activation_checkpointing"
    asked = train.activation_checkpointing
    if isinstance(asked, int) and asked > shape.depth:
        raise UserError(f"{key} = {asked}, and {config.model.name} has {shape.depth} blocks: set {key}=all")
    if asked not in ("auto", 0) and config.optimizer.frozen == "backbone":
        raise UserError(
            f"{key} = {asked} saves what blocks keep for their backward pass, and with optimizer.frozen = backbone "
            f"they have none: set {key}=auto"
        )
    if train.offload_activations and asked in ("auto", 0):
        why = "train.offload_activations keeps the inputs of checkpointed blocks in host memory, and"
        impossible = {
            f"model.name = {config.model.name}": not shape.is_transformer,
            "optimizer.frozen = backbone": config.optimizer.frozen == "backbone",
            "train.compile = true": train.compile,
            "train.cuda_graph = true": train.cuda_graph,
        }
        for setting, found in impossible.items():
            if found:
                raise UserError(f"{why} with {setting} there are none: set train.offload_activations=false")
        raise UserError(f"{why} {key} is {asked}: set {key}=all, or a number of blocks")


def _check_resnet(config: Config, shape: Shape) -> None:
    """Raises UserError if a setting acts on the blocks of a Transformer, and the model has none."""
    if shape.is_transformer:
        return
    settings: dict[str, tuple[object, object]] = {
        "optimizer.layer_decay": (config.optimizer.layer_decay, None),
        "optimizer.kind": (config.optimizer.kind if config.optimizer.kind == "muon" else "adamw", "adamw"),
        "train.recompute": (config.train.recompute, "auto"),
        "train.activation_checkpointing": (config.train.activation_checkpointing or "auto", "auto"),
    }
    for key, (value, instead) in settings.items():
        if value != instead:
            raise UserError(
                f"{key} = {value} is of the blocks of a Transformer, and model.name = {config.model.name} is a ResNet: "
                f"set {key}={'null' if instead is None else instead}"
            )


def _check_apex(config: Config) -> None:
    """Raises UserError if NVIDIA's apex has no kernels that compute what the configuration says."""
    settings, zero = config.optimizer, config.zero
    if settings.kind not in ("adamw", "lamb"):
        raise UserError(
            f"optimizer.kernels = apex has none for optimizer.kind = {settings.kind}: set optimizer.kernels=torch, or "
            "optimizer.kind to adamw or lamb"
        )
    if zero.offload != "none":
        raise UserError(
            f"optimizer.kernels = apex computes on GPUs, and zero.offload = {zero.offload} keeps the optimizer's state "
            "in host memory: set optimizer.kernels=torch or zero.offload=none"
        )
    if settings.kind == "lamb" and zero.stage != 0:
        raise UserError(
            "optimizer.kernels = apex: FusedLAMB takes the norms of the tensors that it is given, and from ZeRO-1 on "
            f"those are parts of many parameters: set zero.stage=0, which is {zero.stage}, or optimizer.kernels=torch"
        )
    for name, decay in (("weight_decay", settings.weight_decay), ("head_weight_decay", settings.head_weight_decay)):
        if settings.kind == "lamb" and decay == 0:
            raise UserError(
                "optimizer.kernels = apex: FusedLAMB sets the length of decayed parameters' updates only, and "
                f"optimizer.{name} is 0: set optimizer.kernels=torch, or a weight decay"
            )


def _check_classes(config: Config) -> None:
    """Raises UserError if head, labels and loss do not go together."""
    if config.model.num_classes == 0:
        raise UserError(
            "model.num_classes is 0, a model without a head, and training on labels needs one: set the number of "
            "classes, or train.objective=mae to train without labels"
        )
    if config.data.max_labels > config.model.num_classes:
        raise UserError(
            f"data.max_labels is {config.data.max_labels}, more than model.num_classes = {config.model.num_classes}: "
            "lower the one or raise the other"
        )
    if config.model.num_classes == 1 and config.loss.kind == "softmax":
        raise UserError("model.num_classes is 1, and a softmax over one class is always 1: set loss.kind=sigmoid")
    if config.data.max_labels > 1 and config.loss.kind == "softmax":
        raise UserError(
            f"data.max_labels is {config.data.max_labels}, and a softmax loss takes one label: set loss.kind=sigmoid"
        )
    if config.data.soft_labels and config.loss.kind == "sigmoid":
        raise UserError(
            "data.soft_labels are probabilities of which one class is right, and a sigmoid loss judges each class by "
            "itself: set loss.kind=softmax"
        )


def _quantizes_what_is_frozen(config: Config) -> bool:
    zero = config.deepspeed.get("zero_optimization")
    return isinstance(zero, Mapping) and bool(zero.get("zero_quantized_nontrainable_weights"))


def _check_durations(config: Config) -> None:
    duration, schedule = config.train.duration, config.schedule
    length, unit = parse_duration(duration)
    if unit == "%":
        raise UserError(
            f"train.duration = '{duration}' is a fraction of the run and cannot be the length of the run itself: use "
            "steps, epochs or samples"
        )
    if length == 0:
        raise UserError(f"train.duration = '{duration}' trains nothing: lengthen it")
    intervals = {
        "evaluate.every": config.evaluate.every,
        "evaluate.fewshot.every": config.evaluate.fewshot.every,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep_every": config.checkpoint.keep_every,
    }
    for key, every in intervals.items():
        if every is not None and parse_duration(every)[0] == 0:
            raise UserError(f"{key} = '{every}' is no interval: lengthen it, or set it to null")
    parts = {"warmup": schedule.warmup} | ({"cooldown": schedule.cooldown} if schedule.kind == "rsqrt" else {})
    if schedule.kind == "rsqrt" and parse_duration(schedule.timescale)[0] == 0:
        raise UserError(f"schedule.timescale = '{schedule.timescale}' divides by zero: lengthen it")
    shares = [_share(part, length, unit) for part in parts.values()]
    # Rounding to whole steps may shorten the parts of a run that is short; the schedule itself decides then.
    if None not in shares and sum(share or 0 for share in shares) > 1 + 1e-9 and unit != "step":
        named = " + ".join(f"schedule.{name} = '{part}'" for name, part in parts.items())
        raise UserError(f"{named} is longer than train.duration = '{duration}': shorten the one or lengthen the other")
    rate, final = config.optimizer.learning_rate, schedule.final_learning_rate
    if schedule.kind != "constant" and final > rate:
        raise UserError(
            f"schedule.final_learning_rate = {final:g} is greater than optimizer.learning_rate = {rate:g}, from which "
            "it falls: lower the one or raise the other"
        )


def _share(part: str, length: float, unit: str) -> float | None:
    """What fraction of the run `part` takes; None if that depends on the data."""
    value, of = parse_duration(part)
    if of == "%":
        return value / 100
    return value / length if of == unit and length > 0 else None


def check_zero(zero: ZeroConfig) -> None:
    """Raises UserError if the stage cannot offload what zero.offload says. Stage auto is left to whoever chooses it."""
    if zero.offload != "none" and zero.stage == 0:
        raise UserError("zero.offload needs ZeRO: set zero.stage to 1, 2 or 3")
    if zero.offload == "all" and zero.stage not in (3, "auto"):
        raise UserError("zero.offload = all moves parameters to host memory, which needs zero.stage = 3")
