"""Training: joint losses over images and texts, from a recipe or from Python.

- `recipe`, `data_summary`, `run_folder`, `runner`, `plan`, `stage_record`, `checkpoints`: a stage from a YAML file to
  an exported model.
- `trainer`, `arguments`, `argument_names`, `setting_warnings`, `resuming`, `eval_loss`, `precision`, `param_groups`:
  `MultiTaskTrainer` and its settings.
- `tasks`, `task_dataset`, `row_check`, `streams`, `joint_batches`, `collator`, `signature`: from data sets to batches.
- `losses/`: InfoNCE, InfoNCE+, sigmoid, Matryoshka, and their sum over the tasks of a step.
- `engine/`: the joint forward pass, the gradient cache, chunk sizes, processes.
- `callbacks/`: moving average, training metrics, epochs, progress.
- `mlm`, `tokenizer`: pre-training of the text tower. `mining`, `mining_settings`, `mining_vectors`, `mine_source`: hard
  negatives.
- `recipes/`: the recipes that come with Bifocal.
"""
