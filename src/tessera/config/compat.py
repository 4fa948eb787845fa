"""Keys and values that users know from axolotl, Hugging Face's Trainer and accelerate.

Each is either not done yet (an error that says so by name, unless the value asks for nothing), spelled
differently here, or accepted without effect, for the reason given in one line.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class NotDone:
    """A key of another tool that is not done yet: its meaning, and the values that ask for nothing."""

    meaning: str
    neutral: tuple[object, ...] = (None, False, "", [], {})


_SIZE = (None, 1)
_SWITCH_OFF = (None, False)

NOT_DONE: dict[str, NotDone] = {
    # Layout
    "context_parallel_size": NotDone("context parallelism", _SIZE),
    "context_parallel_degree": NotDone("context parallelism", _SIZE),
    "sequence_parallel_degree": NotDone("context parallelism", _SIZE),
    "ring_attn_func": NotDone("context parallelism"),
    "heads_k_stride": NotDone("context parallelism", _SIZE),
    "pipeline_parallel_size": NotDone("pipeline parallelism", _SIZE),
    "expert_parallel_size": NotDone("expert parallelism", _SIZE),
    "fsdp": NotDone("FSDP1; dp_shard_size asks for FSDP2"),
    "deepspeed": NotDone("DeepSpeed"),
    "ddp": NotDone("DistributedDataParallel; dp_replicate_size asks for replicas", _SWITCH_OFF),
    # Numbers and memory
    "fp16": NotDone("float16 compute with loss scaling; bf16 is done", _SWITCH_OFF),
    "bfloat16": NotDone("bfloat16 parameters; bf16 (compute) is done", _SWITCH_OFF),
    "float16": NotDone("float16 parameters", _SWITCH_OFF),
    "fp8": NotDone("float8 products", _SWITCH_OFF),
    "torch_compile": NotDone("compilation", _SWITCH_OFF),
    "torch_compile_backend": NotDone("compilation"),
    "torch_compile_mode": NotDone("compilation"),
    "load_in_8bit": NotDone("quantized weights", _SWITCH_OFF),
    "load_in_4bit": NotDone("quantized weights", _SWITCH_OFF),
    "activation_offloading": NotDone("activations kept in host memory", _SWITCH_OFF),
    "auto_find_batch_size": NotDone("a search for the batch size", _SWITCH_OFF),
    # What is trained
    "adapter": NotDone("adapters (LoRA); every weight is trained"),
    "lora_r": NotDone("adapters (LoRA)"),
    "lora_alpha": NotDone("adapters (LoRA)"),
    "lora_dropout": NotDone("adapters (LoRA)"),
    "lora_target_modules": NotDone("adapters (LoRA)"),
    "lora_target_linear": NotDone("adapters (LoRA)", _SWITCH_OFF),
    "lora_model_dir": NotDone("adapters (LoRA)"),
    "unfrozen_parameters": NotDone("training a part of the weights"),
    "rl": NotDone("preference training"),
    "reward_model": NotDone("reward models", _SWITCH_OFF),
    "trust_remote_code": NotDone("model code that comes with the weights", _SWITCH_OFF),
    "special_tokens": NotDone("changes to the tokenizer's special tokens"),
    "tokens": NotDone("changes to the tokenizer's vocabulary"),
    "neftune_noise_alpha": NotDone("noise on embeddings", (None, False, 0, 0.0)),
    # Data
    "sample_packing": NotDone("packing several rows into one sequence", _SWITCH_OFF),
    "eval_sample_packing": NotDone("packing several rows into one sequence", _SWITCH_OFF),
    "pad_to_sequence_len": NotDone("rows padded to sequence_len", _SWITCH_OFF),
    "group_by_length": NotDone("batches of rows of like length", _SWITCH_OFF),
    "pretraining_dataset": NotDone("streamed data; use datasets with text"),
    "streaming": NotDone("streamed data", _SWITCH_OFF),
    "test_datasets": NotDone("separate evaluation files; val_set_size is done"),
    "chat_template": NotDone("chat rows"),
    "shuffle_merged_datasets": NotDone("shuffling apart from shuffle", (None, True)),
    "push_dataset_to_hub": NotDone("uploads"),
    "hub_model_id": NotDone("uploads"),
    # Optimizer and schedule
    "lr_scheduler_kwargs": NotDone("options of a schedule"),
    "cosine_min_lr_ratio": NotDone("a cosine that ends above zero", (None, 0, 0.0)),
    "cosine_constant_lr_ratio": NotDone("a cosine with a constant part", (None, 0, 0.0)),
    "optim_args": NotDone("further options of the optimizer"),
    "embedding_lr": NotDone("a learning rate of its own for embeddings"),
    "embedding_lr_scale": NotDone("a learning rate of its own for embeddings"),
    "z_loss": NotDone("the z-loss", (None, False, 0, 0.0)),
    # Log, evaluation, checkpoints
    "wandb_project": NotDone("Weights & Biases; output_dir/metrics.jsonl has every step"),
    "wandb_entity": NotDone("Weights & Biases"),
    "wandb_watch": NotDone("Weights & Biases"),
    "wandb_name": NotDone("Weights & Biases"),
    "wandb_log_model": NotDone("Weights & Biases"),
    "use_wandb": NotDone("Weights & Biases", _SWITCH_OFF),
    "use_mlflow": NotDone("MLflow", _SWITCH_OFF),
    "mlflow_experiment_name": NotDone("MLflow"),
    "use_tensorboard": NotDone("TensorBoard; output_dir/metrics.jsonl has every step", _SWITCH_OFF),
    "report_to": NotDone("outside trackers", (None, "none", "", [])),
    "eval_strategy": NotDone("eval_strategy; use eval_steps", (None, "no", "steps")),
    "evaluation_strategy": NotDone("evaluation_strategy; use eval_steps", (None, "no", "steps")),
    "evals_per_epoch": NotDone("evaluations counted per epoch; use eval_steps", (None, 0)),
    "saves_per_epoch": NotDone("checkpoints counted per epoch; use save_steps", (None, 0)),
    "save_only_model": NotDone("checkpoints without the optimizer", _SWITCH_OFF),
    "load_best_model_at_end": NotDone("a return to the best checkpoint", _SWITCH_OFF),
    "early_stopping_patience": NotDone("early stopping", (None, 0)),
    "profile": NotDone("the profiler", _SWITCH_OFF),
}

# Keys of one entry of `datasets`.
NOT_DONE_IN_DATASETS: dict[str, NotDone] = {
    "data_files": NotDone("a choice of files inside path"),
    "ds_type": NotDone("a file format given by name; it is read from the file's ending"),
    "name": NotDone("configurations of a hub data set"),
    "revision": NotDone("hub data sets"),
    "shards": NotDone("a part of a data set", _SIZE),
    "preprocess_shards": NotDone("a part of a data set", _SIZE),
    "chat_template": NotDone("chat rows"),
    "field_messages": NotDone("chat rows"),
    "message_property_mappings": NotDone("chat rows"),
    "message_field_role": NotDone("chat rows"),
    "message_field_content": NotDone("chat rows"),
    "roles": NotDone("chat rows"),
    "roles_to_train": NotDone("chat rows"),
    "train_on_eos": NotDone("chat rows"),
    "conversation": NotDone("chat rows"),
    "input_transform": NotDone("changes to rows"),
    "trust_remote_code": NotDone("code that comes with a data set", _SWITCH_OFF),
}

NOT_DONE_VALUES: dict[str, tuple[str, ...]] = {
    "save_strategy": ("epoch", "best"),
    "gradient_checkpointing": ("offload", "offload_disk", "unsloth"),
    "fsdp_config.auto_wrap_policy": ("SIZE_BASED_WRAP",),
    "optimizer": (
        "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adamw_torch_8bit",
        "adamw_torch_4bit", "adafactor", "sgd", "adamw_hf", "lion_8bit", "muon", "galore_adamw",
        "schedule_free_adamw", "ademamix",
    ),
    "lr_scheduler": (
        "cosine_with_restarts", "polynomial", "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr",
        "warmup_stable_decay", "one_cycle", "rex",
    ),
    "datasets.type": ("chat_template", "sharegpt", "pretrain", "input_output"),
    "datasets.split": ("test", "validation"),
}  # fmt: skip

SPELLED_HERE: dict[str, str] = {
    "model_name_or_path": "base_model",
    "tokenizer_config": "tokenizer",
    "tokenizer_name": "tokenizer",
    "max_length": "sequence_len",
    "max_seq_length": "sequence_len",
    "per_device_train_batch_size": "micro_batch_size",
    "num_train_epochs": "num_epochs",
    "epochs": "num_epochs",
    "optim": "optimizer",
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "tp_size": "tensor_parallel_size",
    "excess_token_handling": "excess_length_strategy",
    "ddp_timeout": "group_timeout_minutes",
    "activation_checkpointing": "gradient_checkpointing",
}

_ATTENTION = "torch's scaled_dot_product_attention chooses the fastest kernel that fits"
_LOSS = "the fused vocabulary-parallel loss is always used"
_READ_FROM_CONFIG = "the model's config.json says which model it is"

NO_EFFECT: dict[str, str] = {
    "flash_attention": _ATTENTION,
    "sdp_attention": _ATTENTION,
    "xformers_attention": _ATTENTION,
    "eager_attention": _ATTENTION,
    "attn_implementation": _ATTENTION,
    "plugins": _LOSS,
    "cut_cross_entropy": _LOSS,
    "gradient_checkpointing_kwargs": "blocks are recomputed without re-entrant autograd",
    "dataloader_num_workers": "rows are prepared before the run and read in the training process",
    "dataloader_pin_memory": "rows are prepared before the run and read in the training process",
    "dataloader_prefetch_factor": "rows are prepared before the run and read in the training process",
    "dataset_prepared_path": "prepared rows lie in output_dir/prepared",
    "dataset_processes": "rows are prepared before the run, in one process",
    "model_type": _READ_FROM_CONFIG,
    "tokenizer_type": _READ_FROM_CONFIG,
    "is_llama_derived_model": _READ_FROM_CONFIG,
    "strict": "unknown keys are always refused",
    "save_safetensors": "the final model is always safetensors",
    "logging_first_step": "output_dir/metrics.jsonl has every step",
    "low_cpu_mem_usage": "every rank reads only its slices of the weights",
    "use_cpu": "a GPU is used where there is one; hide it with CUDA_VISIBLE_DEVICES=''",
}

_SHARDED = "checkpoints are always sharded, and the final model is always a whole Hugging Face folder"
_FROM_SHARDS = "every rank reads only its own shards of the weights, or draws only its own"

# Keys of fsdp_config, also as `fsdp_...`, as accelerate writes them.
NO_EFFECT_IN_FSDP: dict[str, str] = {
    "state_dict_type": _SHARDED,
    "final_state_dict_type": _SHARDED,
    "transformer_layer_cls_to_wrap": "the decoder layers are wrapped, whatever the model calls them",
    "cpu_ram_efficient_loading": _FROM_SHARDS,
    "sync_module_states": _FROM_SHARDS,
    "use_orig_params": "FSDP2 always keeps the parameters as they are",
    "cpu_offload_pin_memory": "host memory is pinned where there is a GPU",
}
NOT_DONE_IN_FSDP: dict[str, NotDone] = {
    "activation_checkpointing": NotDone("this place for it; write gradient_checkpointing: true", _SWITCH_OFF),
    "min_num_params": NotDone("wrapping by size", (None, 0)),
    "backward_prefetch": NotDone("a choice; FSDP2 always gathers the next layer early", (None, "BACKWARD_PRE")),
    "sharding_strategy": NotDone("FSDP1's strategies; dp_shard_size, dp_replicate_size, reshard_after_forward say it"),
}

# The other plugins are not done.
PLUGINS_WITHOUT_EFFECT = ("axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",)


def asks_for_nothing(value: object, key: NotDone) -> bool:
    """Whether with `value` a key that is not done yet changes nothing."""
    # the types are compared too: True == 1, and False == 0
    return any(type(value) is type(neutral) and value == neutral for neutral in key.neutral)
