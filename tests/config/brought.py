"""YAML files such as people bring from axolotl, as {folder} and {rows} make them local, and what they must come to.

Every key that its examples of full fine-tunes have, with its value, stands in one of them. Each case: the file; what
keys of ours come to, inner ones with dots; the keys that have no effect here, each in one line of its own.
"""

from typing import Any, NamedTuple


class Brought(NamedTuple):
    """A file, the values of our keys that it must come to, and the keys that must be said to have no effect."""

    text: str
    means: dict[str, Any]
    idle: tuple[str, ...] = ()


_LIGER = ("liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_fused_linear_cross_entropy")

FILES = {
    "replicas, shards and tensor parallelism": Brought(
        """
base_model: {folder}
plugins:
  - axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin
dp_replicate_size: 2
dp_shard_size: 4
tensor_parallel_size: 2
fsdp_version: 2
fsdp_config:
  offload_params: false
  state_dict_type: FULL_STATE_DICT
  auto_wrap_policy: TRANSFORMER_BASED_WRAP
  transformer_layer_cls_to_wrap: LlamaDecoderLayer
  reshard_after_forward: true
special_tokens:
  pad_token: <start_of_turn>
datasets:
  - path: {rows}
    type: alpaca
dataset_prepared_path: {out}/last_run_prepared
output_dir: {out}/layout
sequence_len: 2048
sample_packing: true
attn_implementation: flash_attention_2
micro_batch_size: 1
gradient_accumulation_steps: 1
num_epochs: 2
optimizer: adamw_torch_fused
learning_rate: 2e-6
lr_scheduler: constant_with_warmup
warmup_ratio: 0.1
bf16: true
tf32: true
logging_steps: 1
saves_per_epoch: 1
""",
        {
            "world_size": 16,
            "fsdp_config.offload_params": False,
            "fsdp_config.reshard_after_forward": True,
            "special_tokens.pad_token": "<start_of_turn>",
            "sample_packing": True,
            "learning_rate": 2e-6,
            "lr_scheduler": "constant_with_warmup",
            "saves_per_epoch": 1,
            "tf32": True,
        },
        (
            "plugins",
            "fsdp_config.state_dict_type",
            "fsdp_config.transformer_layer_cls_to_wrap",
        ),
    ),
    "an old file with many blanks": Brought(
        """
base_model: {folder}
model_type: LlamaForCausalLM
tokenizer_type: LlamaTokenizer
load_in_8bit: false
load_in_4bit: false
strict: false
datasets:
  - path: {rows}
    type: alpaca
dataset_prepared_path:
val_set_size: 0.05
output_dir: {out}/old
sequence_len: 4096
sample_packing: true
eval_sample_packing: false
adapter:
lora_model_dir:
lora_r:
lora_alpha:
lora_dropout:
lora_target_linear:
wandb_project:
wandb_entity:
wandb_watch:
wandb_name:
wandb_log_model:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.000005
train_on_inputs: false
group_by_length: false
bf16: auto
fp16:
tf32: false
gradient_checkpointing: true
early_stopping_patience:
resume_from_checkpoint:
local_rank:
logging_steps: 1
attn_implementation: flash_attention_2
flash_attn_cross_entropy: false
flash_attn_fuse_mlp: true
warmup_ratio: 0.1
evals_per_epoch: 4
eval_table_size:
saves_per_epoch: 1
debug:
deepspeed:
weight_decay: 0.1
fsdp:
fsdp_config:
special_tokens:
  bos_token: "<s>"
  eos_token: "</s>"
  unk_token: "<unk>"
""",
        {
            "val_set_size": 0.05,
            "eval_sample_packing": False,
            "optimizer": "adamw_bnb_8bit",
            "learning_rate": 5e-6,
            "gradient_checkpointing": True,
            "evals_per_epoch": 4,
            "weight_decay": 0.1,
            "special_tokens.eos_token": "</s>",
            "special_tokens.unk_token": "<unk>",
        },
        ("model_type", "tokenizer_type", "flash_attn_fuse_mlp"),
    ),
    "chats under FSDP1 with Liger": Brought(
        """
base_model: {folder}
plugins:
  - axolotl.integrations.liger.LigerPlugin
liger_rope: true
liger_rms_norm: true
liger_glu_activation: true
liger_fused_linear_cross_entropy: true
chat_template: llama3
datasets:
  - path: {rows}
    type: chat_template
    split: train[:20%]
    field_messages: conversations
    message_property_mappings:
      role: from
      content: value
val_set_size: 0.02
output_dir: {out}/chats
sequence_len: 4096
sample_packing: true
gradient_accumulation_steps: 4
micro_batch_size: 2
optimizer: adamw_torch_fused
learning_rate: 2e-5
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
warmup_ratio: 0.1
evals_per_epoch: 2
saves_per_epoch: 1
fsdp:
  - full_shard
  - auto_wrap
fsdp_config:
  fsdp_limit_all_gathers: true
  fsdp_sync_module_states: true
  fsdp_offload_params: true
  fsdp_use_orig_params: false
  fsdp_cpu_ram_efficient_loading: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_sharding_strategy: FULL_SHARD
  fsdp_backward_prefetch: BACKWARD_PRE
special_tokens:
  pad_token: <|finetune_right_pad_id|>
  eos_token: <|im_end|>
""",
        {
            "chat_template": "llama3",
            "datasets.type": "chat_template",
            "datasets.split": "train[:20%]",
            "datasets.field_messages": "conversations",
            "datasets.message_property_mappings": {"role": "from", "content": "value"},
            "fsdp_config.offload_params": True,
            "fsdp_config.reshard_after_forward": True,
            "special_tokens.eos_token": "<|im_end|>",
        },
        ("plugins", *_LIGER, "gradient_checkpointing_kwargs"),
    ),
    "tokenized rows for a hub": Brought(
        """
base_model: {folder}
hub_model_id: someone/their-model
datasets:
  - path: {rows}
    type:
val_set_size: 0.01
output_dir: {out}/tokenized
sequence_len: 8192
sample_packing: true
gradient_accumulation_steps: 8
micro_batch_size: 4
num_epochs: 3
optimizer: paged_adamw_8bit
learning_rate: 2e-5
evals_per_epoch: 5
saves_per_epoch: 5
weight_decay: 0.05
""",
        {"datasets.type": None, "num_epochs": 3, "optimizer": "paged_adamw_8bit", "saves_per_epoch": 5},
        ("hub_model_id",),
    ),
    "FSDP2 in words of FSDP1": Brought(
        """
base_model: {folder}
plugins:
  - axolotl.integrations.liger.LigerPlugin
liger_layer_norm: true
seed: 42
chat_template: qwen_25
datasets:
  - path: {rows}
    type: chat_template
output_dir: {out}/qwen
sequence_len: 8096
sample_packing: true
micro_batch_size: 16
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 5e-6
eta_min: 7e-7
cosine_constant_lr_ratio: 0
fsdp_version: 2
fsdp_config:
  offload_params: false
  cpu_ram_efficient_loading: true
  auto_wrap_policy: TRANSFORMER_BASED_WRAP
  transformer_layer_cls_to_wrap: Qwen2DecoderLayer
  state_dict_type: FULL_STATE_DICT
  sharding_strategy: FULL_SHARD
  reshard_after_forward: true
  activation_checkpointing: true
special_tokens:
""",
        {
            "chat_template": "qwen_25",
            "gradient_checkpointing": True,
            "fsdp_config.reshard_after_forward": True,
            "micro_batch_size": 16,
            "seed": 42,
            "sequence_len": 8096,
        },
        ("liger_layer_norm", "eta_min", "fsdp_config.cpu_ram_efficient_loading"),
    ),
    "rows that ranks share": Brought(
        """
base_model: {folder}
plugins:
  - axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin
dp_shard_size: 2
context_parallel_size: 2
tensor_parallel_size: 2
tiled_mlp: true
gradient_checkpointing: true
activation_offloading: legacy
dataset_prepared_path: {out}/prepared
datasets:
  - path: {rows}
    type: alpaca
output_dir: {out}/ndp
sequence_len: 8192
sample_packing: true
attn_implementation: flash_attention_2
gradient_accumulation_steps: 1
micro_batch_size: 1
optimizer: adamw_torch_fused
lr_scheduler: constant_with_warmup
learning_rate: 2e-6
fsdp_version: 2
fsdp_config:
  offload_params: false
  state_dict_type: FULL_STATE_DICT
  auto_wrap_policy: TRANSFORMER_BASED_WRAP
  transformer_layer_cls_to_wrap: LlamaDecoderLayer
  reshard_after_forward: true
""",
        {
            "context_parallel_size": 2,
            "tensor_parallel_size": 2,
            "dp_shard_size": 2,
            "tiled_mlp": True,
            "activation_offloading": True,
            "gradient_checkpointing": True,
        },
        ("fsdp_config.state_dict_type", "fsdp_config.transformer_layer_cls_to_wrap"),
    ),
    "from random weights with Muon": Brought(
        """
base_model: {folder}
model_type: AutoModelForCausalLM
tokenizer_type: AutoTokenizer
reinit_weights: true
pretraining_dataset:
  - path: {rows}
    name: en
    type: pretrain
    split: train
val_set_size: 0.0
output_dir: {out}/muon
sequence_len: 2048
sample_packing: true
pad_to_sequence_len: true
wandb_project: dist_muon
wandb_entity:
wandb_name: muon
micro_batch_size: 4
num_epochs: 1
max_steps: 305
optimizer: muon
learning_rate: 0.02
weight_decay: 0.01
train_on_inputs: true
fp16: false
gradient_checkpointing: false
warmup_steps: 10
evals_per_epoch: 0
saves_per_epoch: 1
fsdp_config:
  fsdp_version: 2
  fsdp_offload_params: false
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_transformer_layer_cls_to_wrap: Qwen2DecoderLayer
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: false
  fsdp_reshard_after_forward: true
special_tokens:
""",
        {
            "random_init": True,
            "streaming": True,
            "optimizer": "muon",
            "learning_rate": 0.02,
            "max_steps": 305,
            "pad_to_sequence_len": True,
            "train_on_inputs": True,
            "warmup_steps": 10,
            "wandb_project": "dist_muon",
            "wandb_name": "muon",
            "datasets.name": "en",
            "datasets.type": "pretrain",
        },
        ("model_type", "fsdp_config.transformer_layer_cls_to_wrap", "num_epochs", "train_on_inputs"),
    ),
    "rows that stream": Brought(
        """
base_model: {folder}
datasets:
  - path: {rows}
    type: alpaca
    split: train
streaming: true
streaming_multipack_buffer_size: 10000
pretrain_multipack_attn: true
shuffle_merged_datasets: true
max_steps: 1000
output_dir: {out}/streaming
sequence_len: 1024
sample_packing: true
gradient_accumulation_steps: 4
micro_batch_size: 1
optimizer: adamw_torch
learning_rate: 2e-4
logging_steps: 10
save_strategy: steps
save_steps: 100
save_total_limit: 3
special_tokens:
  pad_token: "</s>"
""",
        {"max_steps": 1000, "save_steps": 100, "save_total_limit": 3, "save_strategy": "steps", "logging_steps": 10},
        ("streaming", "streaming_multipack_buffer_size", "pretrain_multipack_attn", "shuffle_merged_datasets"),
    ),
    "texts that stream": Brought(
        """
base_model: {folder}
pretraining_dataset:
  - path: {rows}
    name:
    type: pretrain
    text_column: text
    split: train
max_steps: 1000
streaming_multipack_buffer_size: 10000
pretrain_multipack_attn: true
output_dir: {out}/texts
sequence_len: 1024
sample_packing: true
gradient_accumulation_steps: 2
micro_batch_size: 2
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 5e-4
bf16: auto
num_epochs: 1
warmup_steps: 10
save_strategy: steps
save_steps: 100
special_tokens:
  pad_token: "</s>"
""",
        {"streaming": True, "max_steps": 1000, "sample_packing": True, "datasets.type": "pretrain"},
        ("streaming_multipack_buffer_size", "pretrain_multipack_attn", "num_epochs"),
    ),
    "a part of a model, in other words": Brought(
        """
base_model: {folder}
trust_remote_code: true
ddp_find_unused_parameters: true
chat_template: gemma3
eot_tokens:
  - <end_of_turn>
datasets:
  - path: {rows}
    type: chat_template
    field_messages: conversations
    message_field_role: from
    message_field_content: value
output_dir: {out}/part
sequence_len: 1024
micro_batch_size: 1
eval_batch_size: 1
evaluation_strategy: "no"
max_steps: 1000
optimizer: adamw_torch_fused
adam_beta2: 0.95
adam_epsilon: 0.00001
max_grad_norm: 1.0
learning_rate: 0.000003
attn_implementation: flex_attention
flex_attn_compile_kwargs:
  mode: default
gradient_checkpointing_kwargs:
  use_reentrant: True
resize_token_embeddings_to_32x: true
unfrozen_parameters:
  - model.layers.*
  - lm_head.*
special_tokens:
  pad_token: "<|endoftext|>"
""",
        {
            "adam_beta2": 0.95,
            "adam_epsilon": 1e-5,
            "attn_implementation": "flex_attention",
            "datasets.message_field_content": "value",
            "datasets.message_field_role": "from",
            "eot_tokens": ["<end_of_turn>"],
            "eval_strategy": "no",
            "max_grad_norm": 1.0,
            "resize_token_embeddings_to_32x": True,
            "unfrozen_parameters": ["model.layers.*", "lm_head.*"],
        },
        ("trust_remote_code", "ddp_find_unused_parameters", "eval_batch_size", "flex_attn_compile_kwargs"),
    ),
    "long texts with DeepSpeed": Brought(
        """
base_model: {folder}
datasets:
  - path: {folder}
    type: completion
    field: chapter
    data_files:
      - pretrain/part.jsonl.zst
output_dir: {out}/long
sequence_len: 500_000
min_sample_len: 200_000
sample_packing: true
micro_batch_size: 1
optimizer: adamw_torch_8bit
learning_rate: 2e-5
warmup_steps: 100
saves_per_epoch: 1
evals_per_epoch: 2
special_tokens:
  pad_token: <end_of_turn>
deepspeed: deepspeed_configs/zero3_bf16_cpuoffload_all.json
""",
        {
            "sequence_len": 500_000,
            "min_sample_len": 200_000,
            "warmup_steps": 100,
            "optimizer": "adamw_torch_8bit",
            "datasets.field": "chapter",
            "datasets.data_files": ["pretrain/part.jsonl.zst"],
            "fsdp_config.offload_params": True,
        },
        ("evals_per_epoch",),
    ),
}

REFUSED = {
    "qat: {activation_dtype: int8, weight_dtype: int4, group_size: 32}": "quantize the final model",
    "fp8: true\nfp8_enable_fsdp_float8_all_gather: true": "write bf16: true",
    "model_quantization_config: Mxfp4Config\nmodel_quantization_config_kwargs: {dequantize: true}": "not quantized",
    "use_onebitllms: true": "not quantized",
    "expert_parallel_size: 4": "remove it",
    "experts_implementation: grouped_mm": "remove it",
    "use_sonicmoe: true": "remove it",
    "plugins: [axolotl.integrations.expert_parallel.ExpertParallelPlugin]": "remove it",
    "plugins: [axolotl.integrations.llm_compressor.LLMCompressorPlugin]": "remove it",
    "llmcompressor: {recipe: {}, save_compressed: true}": "remove it",
    "model_config: {output_router_logits: true}": "change config.json",
    "lisa_n_layers: 4\nlisa_step_interval: 20\nlisa_layers_attribute: model.layers": "remove it",
    "use_eaft: true\neaft_alpha: 1.0\neaft_k: 20": "remove it",
    "pipeline_parallel_size: 8": "remove it",
    "activation_offloading: disk": "gradient_checkpointing: offload",
    "gradient_checkpointing: offload_disk": "offload",
    "loss_watchdog_threshold: 5.0\nloss_watchdog_patience: 3": "nonfinite_step",
}
"""What is asked for beside a plain file, and a part of the way out that the refusal names."""
