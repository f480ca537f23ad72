"""The plan that `bifocal train --dry-run` prints: data, batches, steps, parameters, memory."""

import tempfile

from transformers import SchedulerType

from bifocal.data.kinds import COLUMNS
from bifocal.training.engine.chunk_size import kept_per_row
from bifocal.training.param_groups import not_trained, parameter_groups
from bifocal.training.precision import precision_title
from bifocal.training.recipe import Recipe
from bifocal.training.runner import prepare


def plan(recipe: Recipe) -> str:
    """Load the data and the model of a recipe and return what its run would do, as text."""
    if recipe.mlm is not None:
        settings, rows = recipe.training, recipe.mlm.batch_size
        long = (
            f"{settings['max_steps']:,} steps"
            if "max_steps" in settings
            else f"{settings['num_train_epochs']:g} epochs"
        )
        return (
            f"Recipe '{recipe.name}': masked language modeling, {recipe.mlm.mlm_probability:.0%} of the tokens\n"
            f"data     {recipe.mlm.data.path}\n"
            f"length   {long}, {rows} texts of up to {recipe.max_length} tokens a step"
        )
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer creates its output folder
        prepared = prepare(recipe.model_copy(update={"output_dir": scratch}), disable_tqdm=True)
    trainer, args = prepared.trainer, prepared.trainer.args
    schedule = trainer.joint_batches.schedule
    lines = [f"Recipe '{recipe.name}', from {_start(recipe)}, into {recipe.folder}", "", "data"]
    for task in prepared.tasks:
        share = schedule.shares[task.name]
        size = task.size
        drawn = schedule.num_batches(task.modality) * share * task.batch_size * args.world_size
        passes = f", {drawn / size:.2f} passes" if size else ""
        many = "streamed" if size is None else f"{size:,} rows"
        lines.append(
            f"  {task.name}: {task.kind} ({', '.join(COLUMNS[task.kind])}), {many}, {task.batch_size} a batch, "
            f"{share:.0%} of the {task.modality} batches{passes}, {task.loss} times {task.loss_weight:g}"
        )
    if schedule.alternates:
        lines.append("  each batch holds one modality, images first, in turn (alternate_modalities)")
    lines += [
        "",
        f"steps    {args.max_steps:,}, warm-up {args.get_warmup_steps(args.max_steps):,}, "
        f"{SchedulerType(args.lr_scheduler_type).value}",
    ]
    lines += [f"dtype    {precision_title(args)}", "", "parameters"]
    model = trainer.model
    with not_trained(model, trainer.without_gradient()):
        for group in parameter_groups(model, args):
            count = sum(parameter.numel() for parameter in group["params"])
            lines.append(f"  {count:>12,}  learning rate {group['lr']:g}, weight decay {group['weight_decay']:g}")
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    if frozen:
        lines.append(f"  {frozen:>12,}  frozen, or reached by no task")
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    per_text, per_image = kept_per_row(model, trainer.max_length, prepared.processor, args)
    lines += [
        "",
        "memory (estimated)",
        f"  {(whole + 3 * trained) / 2**30:.2f} GiB  weights, gradients and two optimiser states",
        f"  {per_text / 2**20:.1f} MiB  a text of {trainer.max_length} tokens embedded with gradients",
        f"  {per_image / 2**20:.1f} MiB  an image",
    ]
    if args.auto_find_chunk_size:
        lines.append("  auto_find_chunk_size will embed as many at once as fit")
    return "\n".join(lines)


def _start(recipe: Recipe) -> str:
    start = recipe.start_from
    if start is None:
        return "nothing"
    if isinstance(start, str):
        return start
    return f"stage {start.stage}" if start.stage else f"{start.text} and {start.image}"
