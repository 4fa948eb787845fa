"""The configuration: every key with its meaning, unit, range and default, in one table.

Relative paths (base_model, datasets, tokenizer, output_dir) count from the current folder. Anything that does
not fit raises a `UserError` naming the key. `compat.py` has the keys of other tools, `load.py` reads YAML.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from tessera.core.errors import UserError

if TYPE_CHECKING:
    from tessera.sizes.rules import TensorParallel
    from tessera.sizes.schedule import Schedule

LocalPath = Annotated[str, Field(min_length=1), BeforeValidator(lambda v: _expand_home(v))]


def _expand_home(value: object) -> object:
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value


def _geometry(mode: str) -> str:
    from tessera.sizes.geometries import GEOMETRIES

    if mode not in GEOMETRIES:
        raise UserError("tensor_parallel_mode", mode, "is not a geometry", f"one of {', '.join(GEOMETRIES)}")
    return mode


def _yaml_no(value: object) -> object:
    return "no" if value is False else value  # YAML reads a bare `no` as false


class Section(BaseModel):
    """Settings that refuse unknown keys, do not turn one type into another, and never change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DatasetConfig(Section):
    """One source of training rows."""

    path: LocalPath = Field(description="A text file, a folder of text files, or a JSONL file (one row a line).")
    type: Literal["completion", "alpaca"] | None = Field(
        None,
        description="completion: text; alpaca: instruction, input, output. Unset: told from the first row, "
        "where `input_ids` means already tokenized.",
    )
    field: str = Field("text", min_length=1, description="The JSONL field that holds a row's text.")
    split: Literal["train"] = Field("train", description="Local files have the one split, train.")


class TokenizerConfig(Section):
    """A tokenizer trained on the data before the run starts, saved in output_dir."""

    train: Literal["bpe"] = Field(description="The kind of tokenizer: byte-level byte-pair encoding.")
    vocab_size: int = Field(ge=257, description="Entries of the vocabulary: 256 bytes, one end mark, merges.")


def _kind_of_tokenizer(value: object) -> str:
    return "path" if isinstance(value, str) else "train"


TokenizerChoice = Annotated[
    Annotated[LocalPath, Tag("path")] | Annotated[TokenizerConfig, Tag("train")],
    Discriminator(_kind_of_tokenizer),
]


class MeshConfig(Section):
    """The sizes of the tensor axes, given one by one."""

    inner: int = Field(1, ge=1, description="Cuts the features of the residual stream (3d).")
    depth: int = Field(1, ge=1, description="Cuts tokens; weights are repeated along it (2.5d), or stored cut.")
    row: int = Field(1, ge=1, description="Cuts tokens; weights are stored cut along it (2d, 2.5d, 3d).")
    col: int = Field(1, ge=1, description="Cuts heads, feed-forward features and the vocabulary (all geometries).")


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


class FsdpConfig(Section):
    """How FSDP2 cuts and moves parameters along the data axes."""

    reshard_after_forward: bool = Field(
        True, description="Drop a layer's gathered weights after its forward, and gather them again for its backward."
    )
    forward_prefetch: bool = Field(False, description="Gather the next layer's weights before this one's forward.")
    offload_params: bool = Field(
        False, description="Keep parameters, gradients and optimizer in host memory; weights come in for each layer."
    )
    auto_wrap_policy: Annotated[Literal["TRANSFORMER_BASED_WRAP", "NO_WRAP"], BeforeValidator(_upper)] = Field(
        "TRANSFORMER_BASED_WRAP", description="What is gathered at once: each decoder layer, or the whole model."
    )
    mixed_precision_policy: Literal["bf16", "fp32"] | None = Field(
        None,
        description="The dtype of gathered weights and of compute; gradients are summed in float32. "
        "Unset: as bf16 says.",
    )


class TrainConfig(Section):
    """One training run."""

    # What is trained on what
    base_model: LocalPath = Field(
        description="A local folder with config.json and safetensors, or a model on the hub, which is downloaded."
    )
    random_init: bool = Field(
        False, description="Start from config.json alone with random weights instead of loading safetensors."
    )
    tokenizer: TokenizerChoice | None = Field(
        None,
        description="A folder with a tokenizer, or {train: bpe, vocab_size: N} to train one on the data. "
        "Unset: the tokenizer of base_model.",
    )
    datasets: list[DatasetConfig] = Field(min_length=1, description="The sources of rows, joined in this order.")
    output_dir: LocalPath = Field(
        "./outputs",
        description="Gets metrics.jsonl, resolved_config.yaml, checkpoint-N folders and the final model.",
    )

    # Rows
    sequence_len: int = Field(2048, ge=1, description="The longest row, in tokens; text is cut into such windows.")
    excess_length_strategy: Literal["drop", "truncate", "raise"] = Field(
        "drop", description="What happens to a row longer than sequence_len; how many is reported."
    )
    train_on_inputs: bool = Field(
        False, description="Count prompt tokens in the loss too, in rows made of a prompt and an answer."
    )
    val_set_size: float | int = Field(
        0, ge=0, description="Rows held out for evaluation: a fraction below 1, or a whole number of rows."
    )
    shuffle: bool = Field(True, description="Draw rows in random order; false feeds them in file order.")
    seed: int = Field(42, ge=0, description="Seeds weights, the order of rows, the held-out split and dropout.")

    # Length of the run and size of a step
    micro_batch_size: int = Field(1, ge=1, description="Rows in one forward and backward of a model replica.")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Micro batches whose gradients are summed before one optimizer step."
    )
    num_epochs: float = Field(1, gt=0, description="Passes over the data; max_steps, when given, decides instead.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps of the run. Unset: from num_epochs.")

    # Optimizer
    optimizer: Literal["adamw_torch_fused", "adamw_torch"] = Field(
        "adamw_torch_fused", description="torch.optim.AdamW with its fused kernel, or without."
    )
    learning_rate: float = Field(2e-5, ge=0, description="The highest learning rate, reached after warm-up.")
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="The course of the learning rate after warm-up, to zero for cosine and linear."
    )
    warmup_steps: int | None = Field(
        None,
        ge=0,
        description="Optimizer steps over which the learning rate rises. Unset: from warmup_ratio.",
    )
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="Share of the steps that are warm-up, rounded up.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of AdamW's mean of gradients.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of AdamW's mean of squared gradients.")
    adam_epsilon: float = Field(1e-8, ge=0, description="Added to AdamW's denominator.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled decay, applied to every parameter.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are scaled down to this global norm; 0 never scales."
    )
    label_smoothing_factor: float = Field(
        0.0, ge=0, lt=1, description="Share of the target spread evenly over the whole vocabulary."
    )

    # Numbers and memory
    bf16: Literal["auto", True, False] = Field(
        "auto", description="Compute in bfloat16 over float32 parameters; auto: where the device has it."
    )
    tf32: bool = Field(False, description="Let float32 products on CUDA use the TF32 tensor cores.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute each block in the backward instead of keeping its activations."
    )

    # Layout
    dp_shard_size: int | None = Field(
        None,
        ge=1,
        description="Data-parallel devices over which FSDP2 cuts parameters, gradients and optimizer. "
        "Unset: as many as the processes given leave, or 1.",
    )
    dp_replicate_size: int = Field(1, ge=1, description="Replicas of all that is cut otherwise (HSDP).")
    fsdp_config: FsdpConfig = Field(FsdpConfig.model_validate({}), description="Switches of FSDP2.")
    fsdp_version: Literal[2] = Field(2, description="There is FSDP2 alone.")
    tensor_parallel_size: int | None = Field(
        None, ge=1, description="Devices over which each layer is cut. Unset: from tensor_parallel_mesh, or 1."
    )
    tensor_parallel_mode: Annotated[str, AfterValidator(lambda v: _geometry(v))] = Field(
        "1d", description="The geometry of that cut: 1d (Megatron), 2d (SUMMA), 2.5d (Tesseract) or 3d."
    )
    tensor_parallel_depth: int | None = Field(
        None, ge=1, description="Devices along depth in 2.5d. Unset: 2, or as tensor_parallel_mesh says."
    )
    tensor_parallel_mesh: MeshConfig | None = Field(
        None, description="The sizes of the axes {inner, depth, row, col}. Unset: derived from mode and size."
    )
    tensor_parallel_depth_weights: Literal["replicate", "shard"] = Field(
        "replicate", description="shard: store weights cut over depth too and gather them for each product."
    )
    tensor_parallel_schedule: Literal["gather", "summa", "cannon", "auto"] = Field(
        "gather", description="How operands move: in one collective, in one of the loops, or as measured fastest."
    )
    tensor_parallel_slices: int = Field(
        1, ge=1, description="Panels into which a gathered product is cut, each gathered while the last multiplies."
    )
    tensor_parallel_keep_gathered: bool = Field(
        False, description="Keep gathered operands for the backward instead of gathering them again."
    )
    tensor_parallel_prefetch: bool = Field(True, description="Gather the weights of a product during the one before.")
    tensor_parallel_defer: bool = Field(
        True, description="Wait for the sum of a weight's gradient only when the next one is on its way."
    )
    tensor_parallel_overlap: bool = Field(
        True, description="Sum the gradient of a product's input during the product that gives its weight's."
    )
    tensor_parallel_scratch_gib: float = Field(
        2.0,
        gt=0,
        description="Memory that schedule auto may use for gathered operands on a device, in GiB, copies for joining "
        "and contiguity not counted.",
    )
    sequence_parallel: bool = Field(
        True, description="Cut the residual stream over tokens along col instead of repeating it there."
    )
    group_timeout_minutes: float = Field(
        10, gt=0, description="Minutes a collective may wait for a rank before the run ends with an error."
    )

    nonfinite_step: Literal["stop", "skip"] = Field(
        "stop",
        description="A step whose loss or gradient is not finite never changes weights; it ends the run, or is skipped "
        "and counted (10 in a row end it).",
    )
    check_replicas_steps: int | None = Field(
        100,
        ge=1,
        description="Optimizer steps between comparisons, by hash, of weights that several ranks hold alike; they are "
        "compared before each save too. null: never.",
    )

    # Log, evaluation, checkpoints
    logging_steps: int = Field(1, ge=1, description="Optimizer steps between two lines on the terminal.")
    eval_steps: int | None = Field(
        None, ge=1, description="Optimizer steps between evaluations. Unset: once, at the end."
    )
    save_strategy: Annotated[Literal["no", "steps"], BeforeValidator(_yaml_no)] = Field(
        "steps", description="no: no checkpoints along the way, save_steps is not allowed then."
    )
    save_steps: int | None = Field(
        None, ge=1, description="Optimizer steps between checkpoints. Unset: none along the way."
    )
    save_total_limit: int | None = Field(None, ge=1, description="Checkpoints kept, the newest ones. Unset: all.")
    save_async: bool = Field(
        True,
        description="Write a checkpoint while training goes on, from a copy of model and optimizer in host memory.",
    )
    resume_from_checkpoint: LocalPath | bool | None = Field(
        None, description="A checkpoint-N folder to go on from; true: the latest whole one in output_dir."
    )
    auto_resume_from_checkpoints: bool = Field(
        False, description="Go on from the latest whole checkpoint in output_dir if there is one."
    )

    @property
    def world_size(self) -> int:
        """Processes that the sizes given make."""
        return math.prod(self.mesh_sizes.values())

    @property
    def data_sizes(self) -> dict[str, int]:
        """The sizes of replicate and shard."""
        return {"replicate": self.dp_replicate_size, "shard": self.dp_shard_size or 1}

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """The sizes of all axes. Raises UserError as `axes`."""
        return self.data_sizes | self.axes

    def filled_in(self, processes: int | None, key: str = "processes") -> "TrainConfig":
        """With dp_shard_size, where it is unset, as large as so many processes make it.

        Raises UserError, naming `key`, which gave the number, when no size does.
        """
        others = self.dp_replicate_size * math.prod(self.axes.values())
        if self.dp_shard_size is not None or processes is None:
            return self
        if processes % others:
            nearest = sorted({max(1, processes // others) * others, -(-processes // others) * others})
            reason = f"does not divide by dp_replicate_size × tensor axes = {others}"
            raise UserError(key, processes, reason, f"use {' or '.join(map(str, nearest))} processes")
        return self.model_copy(update={"dp_shard_size": processes // others})

    @property
    def axes(self) -> dict[str, int]:
        """The sizes of inner, depth, row and col. Raises UserError when mode, size and mesh do not agree."""
        return self.tensor_parallel.axes

    @property
    def tensor_parallel(self) -> "TensorParallel":
        """The tensor axes as the keys ask for them; see `fitting.check_sizes`."""
        from tessera.sizes.rules import TensorParallel

        mesh = self.tensor_parallel_mesh
        return TensorParallel(
            mode=self.tensor_parallel_mode,
            size=self.tensor_parallel_size,
            depth=self.tensor_parallel_depth,
            mesh=None if mesh is None else mesh.model_dump(),
            depth_weights=self.tensor_parallel_depth_weights,
            schedule=self.tensor_parallel_schedule,
            slices=self.tensor_parallel_slices,
            keep_gathered=self.tensor_parallel_keep_gathered,
            prefetch=self.tensor_parallel_prefetch,
            defer=self.tensor_parallel_defer,
            overlap=self.tensor_parallel_overlap,
            sequence_parallel=self.sequence_parallel,
        )

    @property
    def schedule(self) -> "Schedule":
        """How operands move; before auto has measured, gathered."""
        from tessera.sizes.schedule import Schedule

        return Schedule(
            "gather" if self.tensor_parallel_schedule == "auto" else self.tensor_parallel_schedule,
            self.tensor_parallel_slices,
            keep=self.tensor_parallel_keep_gathered,
            prefetch=self.tensor_parallel_prefetch,
            defer=self.tensor_parallel_defer,
            overlap=self.tensor_parallel_overlap,
        )

    @model_validator(mode="after")
    def _keys_agree(self) -> "TrainConfig":
        given = self.model_fields_set
        if {"warmup_steps", "warmup_ratio"} <= given and self.warmup_steps is not None:
            raise UserError("warmup_ratio", self.warmup_ratio, "warmup_steps is given too", "give one of the two")
        warmup = self.warmup_steps or ("warmup_ratio" in given and self.warmup_ratio)
        if self.lr_scheduler == "constant" and warmup:
            raise UserError(
                "lr_scheduler",
                self.lr_scheduler,
                "has no warm-up, but warm-up is given",
                "use lr_scheduler: constant_with_warmup, or leave the warm-up out",
            )
        if self.save_strategy == "no" and self.save_steps is not None:
            raise UserError("save_steps", self.save_steps, "save_strategy is no", "leave one of the two out")
        if isinstance(self.val_set_size, float) and self.val_set_size >= 1:
            raise UserError(
                "val_set_size",
                self.val_set_size,
                "neither a fraction below 1 nor a whole number of rows",
                f"for rows, write {round(self.val_set_size)}",
            )
        policy = self.fsdp_config.mixed_precision_policy
        if policy is not None and self.bf16 != "auto" and self.bf16 != (policy == "bf16"):
            raise UserError(
                "fsdp_config.mixed_precision_policy",
                policy,
                f"bf16 is {str(self.bf16).lower()}",
                "leave one of the two out",
            )
        if self.eval_steps is not None and not self.val_set_size:
            raise UserError(
                "eval_steps",
                self.eval_steps,
                "no rows are held out for evaluation",
                "set val_set_size, for example 0.05",
            )
        return self


def defaults_taken(config: TrainConfig) -> dict[str, Any]:
    """The keys that the user did not give, with the values that hold; of sections none."""
    values = {key: getattr(config, key) for key in type(config).model_fields if key not in config.model_fields_set}
    return {key: value for key, value in values.items() if not isinstance(value, Section)}


def keys_table() -> str:
    """Every key with its default and meaning, as a Markdown table."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    sections: dict[str, type[Section]] = {
        "": TrainConfig,
        "datasets[].": DatasetConfig,
        "tokenizer.": TokenizerConfig,
        "tensor_parallel_mesh.": MeshConfig,
        "fsdp_config.": FsdpConfig,
    }
    for prefix, section in sections.items():
        for name, field in section.model_fields.items():
            default = "required" if field.is_required() else f"`{_as_yaml(field.default)}`"
            default = "" if isinstance(field.default, Section) else default
            lines.append(f"| `{prefix}{name}` | {default} | {field.description} |")
    return "\n".join(lines)


def _as_yaml(value: object) -> str:
    words = {None: "unset", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
