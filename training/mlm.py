"""Stage 0: masked language modeling of the text tower (arXiv 2310.19923, section 4.1: 30 % of the tokens)."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments, set_seed

from bifocal.data.loading import load_source
from bifocal.data.shards import ShardStream
from bifocal.data.skips import ERROR_COLUMN, SkipLog
from bifocal.errors import RecipeError
from bifocal.files import RUN, replace_folder
from bifocal.modeling import BifocalConfig, BifocalProcessor, BifocalTextConfig, BifocalTextForMaskedLM
from bifocal.modeling.encoding_bifocal import folder_or_id
from bifocal.modeling.loading_bifocal import read_config
from bifocal.modeling.processing_bifocal import private_tokenizer
from bifocal.progress import no_progress_bars
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.builders import load_processor, loading_log, require_device, training_arguments, vocabulary
from bifocal.training.checkpoints import last_complete_checkpoint
from bifocal.training.recipe import Recipe, StartFrom
from bifocal.training.tasks import Task

# The first character of scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Chinese.
_NO_SPACES = re.compile("[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def train_mlm(recipe: Recipe, arguments: BifocalTrainingArguments | None = None) -> Path:
    """Train the text tower with transformers' Trainer and collator, masking whole words; resume a killed run.

    Args:
        arguments: result of `training_arguments`, if there is one already.

    Returns:
        A folder with the text tower and its processor, that a stage can start from (`start_from: {text: ...}`).

    Raises:
        RecipeError: if the data cannot be read, or a setting has no effect or no valid value.
    """
    require_device(recipe)
    assert recipe.mlm is not None
    own = {item.name for item in dataclasses.fields(BifocalTrainingArguments)}
    own -= {item.name for item in dataclasses.fields(TrainingArguments)}
    ignored = sorted((own | {"per_device_train_batch_size"}) & recipe.training.keys())
    if ignored:
        raise RecipeError(
            f"Recipe '{recipe.name}': {ignored[0]} has no effect on masked language modeling (the batch size is "
            "mlm.batch_size). Remove it."
        )
    if recipe.mlm.data.streaming and "max_steps" not in recipe.training:
        raise RecipeError(f"Recipe '{recipe.name}': an epoch of a stream has no length. Set training.max_steps.")
    data = load_source(recipe.mlm.data, "text-only", recipe.seed, SkipLog(loading_log(recipe)), "mlm")
    columns = ["text"]
    if isinstance(data, ShardStream):
        data = data.as_iterable()
    elif recipe.mlm.data.streaming:
        columns.append(ERROR_COLUMN)
    if recipe.mlm.data.streaming and recipe.tokenizer_vocab_size is not None:
        raise RecipeError(
            f"Recipe '{recipe.name}' trains a tokenizer, which a stream cannot. Set processor, or streaming: false."
        )
    processor = _processor(recipe, data)
    tokenizer = private_tokenizer(processor.tokenizer)  # pads at the end
    if tokenizer.mask_token_id is None or not tokenizer.is_fast:
        lack = "has no mask token" if tokenizer.is_fast else "does not say where in a text its tokens are"
        raise RecipeError(
            f"Recipe '{recipe.name}': the tokenizer ({type(tokenizer).__name__}) {lack}. Set processor to another one, "
            "or tokenizer_vocab_size to train one."
        )
    set_seed(recipe.seed)
    model = _model(recipe, tokenizer)
    model.sparse_prediction = True

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, Any]:
        good = [text for text in rows["text"] if text is not None]  # None: a bad row of a stream
        texts = [wording for text in good for wording in (text if isinstance(text, list) else [text])]
        options = dict(truncation=True, max_length=recipe.max_length, return_special_tokens_mask=True)
        tokens = dict(tokenizer(texts, return_offsets_mapping=True, **options))
        columns = zip(texts, tokens["offset_mapping"], tokens["special_tokens_mask"], strict=True)
        return tokens | {"offset_mapping": [separate_words(*row) for row in columns]}

    tokenized = data.map(tokenize, batched=True, remove_columns=columns)
    arguments = arguments or training_arguments(recipe)
    arguments.remove_unused_columns = False
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=tokenized,
        data_collator=WholeWordCollator(
            tokenizer, whole_word_mask=True, mlm_probability=recipe.mlm.mlm_probability, mask_replace_prob=1.0,
            random_replace_prob=0.0,
        ),
        processing_class=processor,
    )  # fmt: skip
    checkpoint = last_complete_checkpoint(recipe.folder)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    folder = recipe.folder / "model"
    if trainer.is_world_process_zero():
        with no_progress_bars(), replace_folder(folder, RUN) as scratch:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(scratch)
            processor.save_pretrained(scratch)
    trainer.accelerator.wait_for_everyone()
    return folder


def separate_words(text: str, spans: Sequence[tuple[int, int]], special: Sequence[int]) -> list[tuple[int, int]]:
    """Return spans of tokens that meet within a word and have a gap before each word, as transformers' collator reads.

    It knows the words of BERT's tokenizers only. In the spans of others, a token may begin with the space before it,
    and several tokens may share one character. Where a script has no spaces between words, each token is a word.

    Args:
        text: the tokenized text.
        spans: first and last character (exclusive) of each token.
        special: for each token 1 if it is a special one, else 0.
    """
    separated = []
    position = end = 0
    blank = False  # whether the token before is the space before this one
    for (first, last), is_special in zip(spans, special, strict=True):
        piece = text[first:last]
        if not is_special:
            shares = first < end  # bytes of one character
            space = first > end or piece[:1].isspace() or text[max(first - 1, 0) : first].isspace()
            position += not shares and not blank and (space or _NO_SPACES.match(piece) is not None)
            end, blank = last, piece.isspace()
        separated.append((position, position + 1))
        position += 1
    return separated


class WholeWordCollator(DataCollatorForLanguageModeling):
    """transformers' collator with padded token offsets, which it needs to find words but does not pad itself."""

    def torch_call(self, examples: Any) -> dict[str, Any]:
        longest = max(len(example["input_ids"]) for example in examples)
        padded: list[Any] = []
        for example in examples:
            missing = longest - len(example["input_ids"])
            offsets = [list(span) for span in example["offset_mapping"]] + [[0, 0]] * missing
            padded.append({**example, "offset_mapping": offsets})
        return super().torch_call(padded)


def _processor(recipe: Recipe, data: Any) -> BifocalProcessor:
    if recipe.tokenizer_vocab_size is None:
        return load_processor(recipe, [])
    # A tokenizer is trained on the columns of tasks; the texts serve as both sides of a pair.
    pairs = data.rename_column("text", "query")
    pairs = pairs.add_column("positive", pairs["query"])
    return load_processor(recipe, [Task("texts", "text-pair", pairs, 1)])


def _model(recipe: Recipe, tokenizer: Any) -> BifocalTextForMaskedLM:
    settings = dict(recipe.model.get("text_config", recipe.model))
    start = recipe.start_from
    if isinstance(start, StartFrom):
        raise RecipeError(f"Recipe '{recipe.name}': masked language modeling starts from one folder or Hub id.")
    try:
        if start is not None:
            kind = getattr(read_config(folder_or_id(start)), "model_type", None)
            if kind not in (BifocalTextConfig.model_type, BifocalConfig.model_type):
                raise ValueError(f"'{start}' is a '{kind}', but masked language modeling trains Bifocal's text tower.")
            # Unknown keys are allowed in a saved config, but not in a recipe.
            known = BifocalTextConfig()
            BifocalTextConfig(**{key: value for key, value in settings.items() if not hasattr(known, key)})
            return BifocalTextForMaskedLM.from_pretrained(start, dtype=torch.float32, **settings)
        return BifocalTextForMaskedLM(BifocalTextConfig(**{**vocabulary(tokenizer), **settings}))
    except (OSError, TypeError, ValueError) as error:
        raise RecipeError(f"Recipe '{recipe.name}', model: {error}") from error
