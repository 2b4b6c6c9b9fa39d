"""Keys of other trainers and ours for them: TRL, transformers, PEFT, Axolotl, LLaMA-Factory, Unsloth, OpenAI, Ludwig.

Keys are mapped by meaning. A note says how another trainer's key differs from ours in unit or form. If we have no such
key, the note says what happens instead. A key with a dot counts in that section only: `generation.max_length`.
"""

from typing import NamedTuple

from app.domain.spelling import normalise_word


class ForeignKey(NamedTuple):
    """Our dotted key, or None if we have none, and a note about the difference."""

    key: str | None
    note: str | None = None


_SHARE = "it is a share of all updates, not a number of them"
_SPLIT = "it holds the shares of train, validation and test rows, such as [0.9, 0.1, 0]"
_EVALUATED = "it is a number of updates; every checkpoint is evaluated"
_LISTED_BASE = "it is a name that GET /base-models lists"
_UPLOADED = "upload the file by POST /datasets and give its name"
_INSTRUCTIONS = "it is the text around {claim}; there is no chat template"
_ROW = "it counts the rows of one micro-batch; effective_batch_size counts those of an update"
_OBSERVATIONS = "Thoughts and Actions are learned, the prompt never; this one adds Observations"
_DECAY = "it is cosine, linear or constant"
_ONE_LIST = "both betas stand in one list, such as [0.9, 0.999]"

_KEYS: tuple[tuple[str, str | None, str], ...] = (
    # our key, what to say about the difference, the words of others
    ("name", None, "suffix run_name job_name experiment_name wandb_run_name wandb_name swanlab_run_name"),
    ("base_model", None, "model model_name model_id"),
    ("base_model", _LISTED_BASE, "model_name_or_path base_model_name_or_path pretrained_model_name_or_path model_path"),
    ("dataset", None, "dataset_name train_dataset"),
    ("dataset", _UPLOADED, "training_file train_file training_data dataset_path data_path data_files"),
    ("input_features", "map a column by {name: claim, column: …}", "dataset_text_field text_column field_instruction"),
    ("seed", None, "random_seed random_state train_seed data_seed"),
    ("prompt.template", None, "prompt_template prompt_style"),
    ("prompt.template", _INSTRUCTIONS, "template chat_template chat_templates chat_template_path"),
    (
        "prompt.template",
        "instructions stand there, around {claim}",
        "system system_prompt default_system prompt.task task",
    ),
    ("adapter", "full fine-tuning is adapter: null, with quantization: null", "full_finetuning"),
    ("adapter.type", None, "peft_type adapter_type peft_method"),
    ("adapter.type", "full fine-tuning is adapter: null", "finetuning_type train_type"),
    ("adapter.r", None, "lora_r lora_rank lora_dim rank peft_r"),
    ("adapter.alpha", None, "lora_alpha"),
    ("adapter.dropout", None, "lora_dropout"),
    ("adapter.target_modules", None, "lora_target_modules"),
    ("adapter.target_modules", "it is all-linear or a list of module names", "lora_target lora_target_linear"),
    ("adapter.target_modules", "name the modules to train; no others are trained", "exclude_modules"),
    ("adapter.use_rslora", None, "peft_use_rslora"),
    ("adapter.use_dora", None, "peft_use_dora"),
    ("adapter.init_lora_weights", None, "peft_init_lora_weights"),
    ("adapter.init_lora_weights", "write pissa", "pissa_init use_pissa"),
    (
        "adapter.pretrained_adapter_weights",
        "it is a name that GET /adapters lists",
        "adapter_name_or_path lora_model_dir",
    ),
    ("adapter.target_r", None, "target_rank"),
    ("adapter.init_r", None, "init_rank"),
    ("adapter.feedforward_modules", None, "feedforward"),
    ("adapter.adapter_len", None, "adapter_length"),
    ("quantization.bits", None, "quantization_bit"),
    ("quantization.bits", "write bits: 4", "load_in_4bit"),
    ("quantization.bits", "write bits: 8", "load_in_8bit"),
    ("quantization", "write quantization: null", "load_in_16bit"),
    ("quantization", None, "quantization_config bnb_config"),
    ("quantization.quant_type", None, "bnb_4bit_quant_type"),
    ("quantization.double_quant", None, "bnb_4bit_use_double_quant double_quantization use_double_quant"),
    (
        "preprocessing.global_max_sequence_length",
        None,
        "max_length max_seq_length max_seq_len max_sequence_length sequence_len seq_length cutoff_len model_max_length",
    ),
    (
        "preprocessing.overlength",
        "Observations are shortened, or the row is dropped or refused; no ending is cut",
        "truncation truncation_mode truncation_side excess_length_strategy drop_long_sequences",
    ),
    (
        "preprocessing.split.probabilities",
        _SPLIT,
        "val_set_size val_size validation_split validation_size split_ratio split_probabilities test_size eval_split",
    ),
    (
        "preprocessing.split",
        "held-out rows belong to the same dataset; a column marks them, with {type: fixed}",
        "validation_file eval_dataset test_datasets eval_file validation_data val_dataset force_split",
    ),
    (
        "trainer",
        "epochs, batch_size and learning_rate are keys of it",
        "hyperparameters training_arguments training_args",
    ),
    ("trainer.epochs", None, "num_train_epochs num_epochs n_epochs max_epochs"),
    ("trainer.train_steps", None, "max_steps num_steps num_training_steps total_steps max_train_steps"),
    ("trainer.learning_rate", None, "lr base_learning_rate"),
    ("trainer.learning_rate", "it is the rate itself, not a factor", "learning_rate_multiplier"),
    ("trainer.batch_size", _ROW, "batch_size train_batch_size"),
    ("trainer.batch_size", None, "per_device_train_batch_size micro_batch_size mini_batch_size"),
    ("trainer.effective_batch_size", None, "total_batch_size global_batch_size"),
    ("trainer.eval_batch_size", None, "per_device_eval_batch_size val_batch_size"),
    ("trainer.gradient_accumulation_steps", None, "gradient_accumulation grad_accum_steps grad_accumulation_steps"),
    ("trainer.optimizer.type", "adamw is the only one", "optim optimizer_type optimizer_name"),
    ("trainer.optimizer.betas", _ONE_LIST, "adam_beta1 adam_beta2 optimizer.beta1 optimizer.beta2"),
    ("trainer.optimizer.eps", None, "adam_epsilon adam_eps epsilon"),
    ("trainer.optimizer.weight_decay", "it is decoupled from the loss", "regularization_lambda"),
    ("trainer.learning_rate_scheduler.decay", _DECAY, "lr_scheduler lr_scheduler_type scheduler_type scheduler"),
    ("trainer.learning_rate_scheduler.warmup_fraction", None, "warmup_ratio lr_scheduler_warmup_fraction"),
    (
        "trainer.learning_rate_scheduler.warmup_fraction",
        _SHARE,
        "warmup_steps num_warmup_steps lr_warmup_steps warmup_evaluations "
        "warmup_epochs learning_rate_warmup_epochs warmup",
    ),
    ("trainer.gradient_clipping.clipglobalnorm", None, "max_grad_norm gradient_clip_norm gradient_clip_val grad_clip"),
    (
        "trainer.gradient_clipping.clipglobalnorm",
        "all gradients are clipped by their common norm",
        "clipnorm clipvalue",
    ),
    (
        "trainer.early_stop",
        "it counts evaluations without a lower loss",
        "early_stopping early_stopping_patience early_stopping_steps",
    ),
    ("trainer.steps_per_checkpoint", None, "save_steps save_every checkpoint_steps"),
    (
        "trainer.steps_per_checkpoint",
        "it is a number of updates",
        "save_strategy saves_per_epoch checkpoints_per_epoch save_freq",
    ),
    (
        "trainer.steps_per_checkpoint",
        _EVALUATED,
        "eval_steps eval_strategy evaluation_strategy evals_per_epoch eval_every eval_interval steps_between_evals",
    ),
    (
        "trainer.enable_gradient_checkpointing",
        None,
        "gradient_checkpointing use_gradient_checkpointing activation_checkpointing",
    ),
    ("trainer.enable_gradient_checkpointing", "write false", "disable_gradient_checkpointing"),
    (
        "trainer.train_on_observations",
        _OBSERVATIONS,
        "train_on_inputs train_on_prompt train_on_input completion_only_loss assistant_only_loss "
        "train_on_responses_only mask_prompt mask_history roles_to_train",
    ),
    ("generation.max_new_tokens", "it bounds one Thought", "max_tokens max_completion_tokens generation.max_length"),
    ("generation.temperature", "0 is greedy", "do_sample"),
    ("backend.strategy", "it is ddp or fsdp", "fsdp fsdp_config deepspeed ddp backend.trainer"),
    ("backend.processes", None, "num_gpus n_gpus num_processes nproc_per_node world_size num_gpus_per_worker"),
)

_NO_KEY: tuple[tuple[str, str], ...] = (
    # what happens instead, the words of others
    ("an adapter is published unmerged, without its base; leave it out",
     "postprocessor merge_lora merge_adapter_into_base_model merge_method save_method"),
    ("results stay with the job and are downloaded; leave it out",
     "output_dir save_dir output_directory push_to_hub hub_token hub_model_id hub_strategy logging_dir"),
    ("every update is recorded (GET /jobs/{job}/metrics); leave it out",
     "logging_steps logging_strategy logging_first_step report_to integrations wandb_project use_wandb use_swanlab "
     "plot_loss log_every disable_tqdm"),
    ("the state with the lowest validation loss is published; leave it out",
     "load_best_model_at_end metric_for_best_model greater_is_better validation_metric validation_field"),
    ("the last two checkpoints and the best one are kept; leave it out", "save_total_limit save_only_model"),
    ("a paused job goes on by POST /jobs/{job}/resume; leave it out",
     "resume_from_checkpoint auto_resume_from_checkpoints"),
    ("the number format follows the device; leave it out",
     "bf16 fp16 tf32 pure_bf16 float16 bfloat16 dtype torch_dtype compute_dtype bnb_4bit_compute_dtype precision "
     "mixed_precision use_mixed_precision"),
    ("kernels follow the device; leave it out",
     "flash_attn flash_attention attn_implementation sdp_attention xformers_attention use_unsloth use_liger_kernel "
     "enable_liger_kernel torch_compile compile"),
    ("rows are packed without padding; leave it out",
     "packing sample_packing neat_packing eval_packing packing_strategy padding_free pad_to_sequence_len "
     "pad_to_multiple_of group_by_length bucketing_field eval_sample_packing"),
    ("rows are shuffled anew every epoch; leave it out", "shuffle should_shuffle shuffle_dataset"),
    ("upload the rows that you want; every row is used",
     "sample_ratio sample_size max_samples max_train_samples oversample_minority undersample_majority"),
    ("rows are encoded once, before the training; leave it out",
     "preprocessing_num_workers dataset_num_proc dataset_processes dataloader_num_workers dataloader_pin_memory"),
    ("batch_size auto is bounded by tokens; leave it out", "max_batch_size auto_find_batch_size"),
    ("only the adapter's own weights are trained; leave it out",
     "modules_to_save lora_modules_to_save additional_target bias bias_type lora_bias trainable_token_indices"),
    ("every layer gets the same adapter; leave it out",
     "layers_to_transform layers_pattern peft_layers_to_transform rank_pattern alpha_pattern layers_to_freeze_regex"),
    ("A and B learn at one rate; leave it out", "loraplus_lr_ratio loraplus_lr_embedding"),
    ("gaussian, pissa and olora are the initialisers of an adapter; leave it out",
     "loftq_config eva_config corda_config"),
    ("adalora's schedule follows the number of updates; leave it out",
     "tinit tfinal deltaT orth_reg_weight total_step adapter.beta1 adapter.beta2"),
    ("the defaults of bitsandbytes hold; leave it out",
     "llm_int8_threshold llm_int8_has_fp16_weight llm_int8_skip_modules bnb_4bit_quant_storage quantization_method"),
    ("the rate ends at 0, by a cosine or a line, or stays constant; leave it out",
     "lr_scheduler_kwargs decay_rate decay_steps staircase eta_min t_0 cosine_min_lr_ratio min_lr reduce_on_plateau "
     "reduce_learning_rate_on_plateau increase_batch_size_on_plateau"),
    ("this service trains by supervised fine-tuning only; leave it out", "stage method rl do_train task_type"),
    ("choices are greedy or drawn by temperature and top_p; leave it out",
     "top_k min_p typical_p num_beams repetition_penalty no_repeat_ngram_size penalty_alpha"),
    ("pages are searched when a claim is judged (POST /corpora); leave it out", "retrieval"),
    ("no noise is added, and no label smoothed; leave it out", "neftune_noise_alpha label_smoothing_factor"),
    ("submit one job for each setting; leave it out", "hyperopt"),
    ("no code that comes with a model is run; leave it out", "trust_remote_code"),
    ("it means nothing here; leave it out", "ludwig_version defaults combiner model_parameters"),
)  # fmt: skip


FOREIGN_KEYS: dict[str, ForeignKey] = {
    word: meaning
    for meaning, words in (
        *((ForeignKey(key, note), words) for key, note, words in _KEYS),
        *((ForeignKey(None, note), words) for note, words in _NO_KEY),
    )
    for word in words.split()
}
_BY_PLAIN_WORD = {normalise_word(word): meaning for word, meaning in FOREIGN_KEYS.items()}


def find_foreign_key(word: str, section: str = "") -> ForeignKey | None:
    """Our key for another trainer's key `word`, in `section` or anywhere. Case and hyphens do not count."""
    return _BY_PLAIN_WORD.get(normalise_word(f"{section}.{word}")) or _BY_PLAIN_WORD.get(normalise_word(word))
