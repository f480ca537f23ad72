"""Evaluation in training: logged, chosen by, and without a trace in the weights."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, EarlyStoppingCallback

from bifocal.errors import EvaluationError
from bifocal.evaluation.callback import EvaluationCallback
from bifocal.evaluation.protocols import Result, image_text_retrieval, text_retrieval
from bifocal.modeling import BifocalModel
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.tasks import Task
from bifocal.training.trainer import MultiTaskTrainer
from tests.conftest import small_config
from tests.modeling.test_images import photo


def retrieval(encoder):
    captions = [[f"star {n}"] for n in range(6)]
    return image_text_retrieval(encoder, "photos", [photo(32 + n, 32) for n in range(6)], captions)


def texts(encoder):
    queries = {str(n): f"star {n}" for n in range(6)}
    return text_retrieval(encoder, "pairs", queries, queries, {n: [n] for n in queries})


def train(processor, folder, callbacks, **changes):
    torch.manual_seed(0)
    model = BifocalModel(small_config(text_config={"hidden_dropout_prob": 0.2}, vision_config={"patch_dropout": 0.2}))
    model.processor = processor
    data = Dataset.from_dict({"query": [f"star {n}" for n in range(40)], "positive": [f"box {n}" for n in range(40)]})
    args = BifocalTrainingArguments(
        output_dir=str(folder), max_steps=6, learning_rate=1e-3, report_to="none", use_cpu=True, disable_tqdm=True,
        logging_steps=3, **changes,
    )  # fmt: skip
    task = Task("pairs", "text-pair", data, 8)
    trainer = MultiTaskTrainer(model, args, [task], processor, 32, eval_tasks=[task], callbacks=callbacks)
    trainer.train()
    return trainer


def test_weights_are_those_of_a_run_without(processor, tmp_path):
    plain = train(processor, tmp_path / "a", [])
    watched = train(processor, tmp_path / "b", [EvaluationCallback([retrieval, texts], every=2)])
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name
    logged = [entry for entry in watched.state.log_history if "eval_photos_mean_recall" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6], "at the end once"
    assert 0.0 <= logged[0]["eval_pairs_ndcg@5"] <= 1.0
    assert watched.model.training == plain.model.training


def test_it_chooses_the_best_model(processor, tmp_path):
    trainer = train(
        processor, tmp_path, [EvaluationCallback([texts])], eval_strategy="steps", eval_steps=2, save_steps=2,
        metric_for_best_model="pairs_mrr", greater_is_better=True, load_best_model_at_end=True,
    )  # fmt: skip
    found = {
        e["step"]: e["eval_pairs_mrr"] for e in trainer.state.log_history if "eval_pairs_mrr" in e and "eval_loss" in e
    }
    assert sorted(found) == [2, 4, 6]
    assert trainer.state.best_metric == pytest.approx(max(found.values()))


def test_models_of_transformers(processor, tmp_path):
    """One with both towers is evaluated through the trainer's processor; one that cannot be is refused at the start."""
    tiny = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    towers = dict(
        text_config={**tiny, "vocab_size": 320, "max_position_embeddings": 64, "eos_token_id": 3},
        vision_config={**tiny, "image_size": 32, "patch_size": 8},
    )
    model = CLIPModel(CLIPConfig(**towers, projection_dim=16))
    data = Dataset.from_dict(
        {"image": [photo(32 + n, 32) for n in range(8)], "caption": [f"star {n}" for n in range(8)]}
    )
    args = BifocalTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )

    def with_a_broken_row(encoder):
        return image_text_retrieval(
            encoder, "photos", [*images[:6], b"broken", images[0]], [f"box {n}" for n in range(8)]
        )

    images = [photo(32 + n, 32) for n in range(8)]
    watch = EvaluationCallback(with_a_broken_row)
    trainer = MultiTaskTrainer(model, args, [Task("p", "image-text", data, 4)], processor, callbacks=[watch])
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "eval_photos_mean_recall" in entry)
    assert logged["eval_photos_skipped_rows"] == 1.0
    assert logged["eval_photos_shared_rows"] == 2.0, "the first image is in two rows"
    with pytest.raises(EvaluationError, match="To evaluate a CLIPModel, give its processor"):
        watch.attach(SimpleNamespace(log=None, averaged_weights=None, model=model))
    bert = BertModel(BertConfig(**tiny, vocab_size=320))
    with pytest.raises(EvaluationError, match="A BertModel cannot be evaluated here"):
        watch.attach(SimpleNamespace(log=None, averaged_weights=None, model=bert, processing_class=processor))


@pytest.mark.parametrize("evaluation_first", [True, False])
def test_early_stopping_finds_its_metrics_in_any_order(processor, tmp_path, evaluation_first):
    """The metric never changes, so one evaluation without a better one stops the run."""

    def constant(encoder):
        return Result("same", "text-retrieval", "score", {"score": 0.5}, {})

    callbacks = [EvaluationCallback([constant]), EarlyStoppingCallback(1)]
    trainer = train(
        processor, tmp_path, callbacks if evaluation_first else callbacks[::-1], eval_strategy="steps", eval_steps=1,
        save_steps=1, metric_for_best_model="same_score", greater_is_better=True, load_best_model_at_end=True,
    )  # fmt: skip
    assert trainer.state.global_step == 2


def test_a_metric_that_is_not_measured(processor, tmp_path):
    with pytest.raises(ValueError, match="metric_for_best_model='nothing' is not among what is measured: eval_loss"):
        train(processor, tmp_path, [], eval_strategy="steps", eval_steps=1, metric_for_best_model="nothing")
